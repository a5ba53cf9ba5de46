"""Files of ids: what is written is what numpy writes, and every way that a file can be wrong is one line."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest

from jaxablate.errors import UserError
from jaxablate.text.tokens import TokenWriter, open_tokens, part_of, written

U16 = np.dtype(np.uint16)


def opened(path: Path, vocab_size: int = 100, at_least: int = 1) -> np.ndarray:
    return open_tokens(path, field="data.train", vocab_size=vocab_size, at_least=at_least)


def begun(path: Path, dtype: np.dtype = U16, done: int = 0) -> TokenWriter:
    writer = TokenWriter(path)
    writer.begin(dtype, done)
    return writer


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i8", ">u2"])
def test_arrays_are_mapped(tmp_path, dtype):
    ids = np.arange(100, dtype=dtype)
    np.save(tmp_path / "t.npy", ids)
    found = opened(tmp_path / "t.npy", at_least=100)
    assert isinstance(found, np.memmap) and not found.flags.writeable
    np.testing.assert_array_equal(found, ids)


def test_raw_ids_are_mapped(tmp_path):
    np.arange(100, dtype="<u2").tofile(tmp_path / "t.bin")
    np.testing.assert_array_equal(opened(tmp_path / "t.bin"), np.arange(100))


def test_the_first_wrong_id_is_named_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxablate.text.tokens._CHECKED_AT_ONCE", 7)
    ids = np.zeros(50, np.int64)
    ids[[30, 33]] = 100, 400
    np.save(tmp_path / "t.npy", ids)
    opened(tmp_path / "t.npy", vocab_size=401)
    with pytest.raises(
        UserError, match=r"^data\.train=.*t\.npy: id 100 at position 30 .* vocabulary of 100;"
    ):
        opened(tmp_path / "t.npy")
    ids[12] = -1
    np.save(tmp_path / "t.npy", ids)
    with pytest.raises(UserError, match="id -1 at position 12 "):
        opened(tmp_path / "t.npy", vocab_size=401)


TEN = np.arange(10, dtype=np.uint16)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.npy", saved(TEN)[:-1], "is torn"),
        ("t.npy", saved(TEN)[:40], "is torn"),
        ("t.npy", b"", "is torn"),
        ("t.npy", TEN.tobytes(), "is torn, or no .npy"),
        ("t.npy", saved(np.array([{}, 1], object)), "is torn, or no .npy"),
        ("t.npy", saved(TEN.reshape(2, 5)), r"uint16 of shape \(2, 5\)"),
        ("t.npy", saved(TEN.astype(np.float32)), "float32 of shape"),
        ("t.npy", saved(TEN > 3), "bool of shape"),
        ("t.npy", saved(TEN[:4]), "4 tokens, and 5 are needed"),
        ("t.bin", TEN.tobytes()[:-1], "19 bytes"),
        ("t.bin", b"", "0 bytes"),
        ("t.bin", TEN[:4].tobytes(), "4 tokens, and 5 are needed"),
        ("t.txt", b"some text", "neither .npy nor .bin"),
    ],
)
def test_what_is_no_file_of_tokens_is_said(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^data\.train=.*: .*{message}") as error:
        opened(path, at_least=5)
    assert "; " in str(error.value), "says what to do"


def test_a_missing_file_is_said(tmp_path):
    for name in ("t.npy", "t.bin"):
        with pytest.raises(UserError, match=r"^data\.train=.*cannot be read: No such file"):
            opened(tmp_path / name)


def test_a_damaged_header_is_never_a_traceback(tmp_path):
    chance, path = random.Random(0), tmp_path / "t.npy"
    whole, refused = saved(TEN), 0
    path.write_bytes(whole)
    opened(path)
    for _ in range(250):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(128)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            opened(path)
        except UserError:
            refused += 1
    assert refused > 200  # some spaces of the header may be anything


# ------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_what_is_written_is_what_numpy_writes(tmp_path, dtype):
    ids = np.arange(1000, dtype=dtype)
    with begun(tmp_path / "t.npy", np.dtype(dtype)) as writer:
        for part in np.split(ids, [0, 1, 400]):
            writer.append(part)
        assert not (tmp_path / "t.npy").exists()
        writer.finish()
    assert (tmp_path / "t.npy").read_bytes() == saved(ids)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npy"]


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "t.npy"
    np.save(path, TEN)
    with begun(path) as writer:
        writer.append(TEN[:3])
        writer.commit()
    np.testing.assert_array_equal(np.load(path), TEN)
    assert written(path, U16) == 3


def test_writing_goes_on_behind_what_was_committed(tmp_path):
    path = tmp_path / "t.npy"
    with begun(path) as writer:
        writer.append(TEN[:6])
        assert writer.commit() == 6
        writer.append(TEN)  # and then it is killed: some of this reaches the file, some does not
    with part_of(path).open("ab") as part:
        part.write(b"x")
    with begun(path, done=6) as writer:
        writer.append(TEN[6:])
        writer.finish()
    assert path.read_bytes() == saved(TEN)


def test_what_is_not_there_is_not_gone_on_with(tmp_path):
    path = tmp_path / "t.npy"
    assert written(path, U16) == 0
    with begun(path) as writer:
        writer.append(TEN)
        writer.commit()
    with TokenWriter(path) as writer, pytest.raises(UserError, match="fewer than 11 tokens"):
        writer.begin(U16, done=11)
    assert written(path, U16) == 10, "and stays as it is"


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "t.npy"
    with begun(path) as writer:
        writer.append(TEN)
        with pytest.raises(UserError, match="another process writes it"):
            TokenWriter(path)
        writer.finish()
    assert path.read_bytes() == saved(TEN)
    with TokenWriter(path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["t.npy"], "who begins nothing leaves nothing"


def test_ids_of_another_type_are_refused(tmp_path):
    with begun(tmp_path / "t.npy") as writer, pytest.raises(ValueError, match="int64"):
        writer.append(np.arange(3))
