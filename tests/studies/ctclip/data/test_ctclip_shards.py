"""Shards give back what was written, at random, and every inconsistency is named."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from jaxablate.errors import UserError
from jaxablate.studies.ctclip.data.preprocess import Chain
from jaxablate.studies.ctclip.data.shard_writer import Sample, write_shards
from jaxablate.studies.ctclip.data.shards import shard_split

CHAIN = Chain((3, 4, 5), (1.0, 1.0, 1.0))  # three unequal axes: no permutation goes unseen
FIRST = "shard-000000.tar"


def samples(count: int = 5) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(
            key=f"case_{i}",
            volume=rng.standard_normal(CHAIN.volume).astype(np.float16),
            report=f"There is 'finding' ({i}). Not given.",
            labels=(rng.random(18) < 0.3).astype(np.float32),
        )
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path, samples(), per_shard=2)
    return tmp_path


def open_split(folder: Path, chain: Chain = CHAIN):
    return shard_split(str(folder), "data.train", chain)


def rewrite(path: Path, change) -> None:
    """Rewrite a tar; `change(name, content)` gives new content, or None to leave the member out."""
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            new = change(name, content)
            if new is not None:
                info = tarfile.TarInfo(name)
                info.size = len(new)
                tar.addfile(info, io.BytesIO(new))


@pytest.mark.parametrize("suffix", ["labels", "cls"])
def test_what_is_written_is_read_at_random(tmp_path, suffix):
    written = samples()
    assert write_shards(tmp_path, written, per_shard=2, labels=suffix) == 5
    assert len(list(tmp_path.glob("shard-*.tar"))) == 3
    split = pickle.loads(pickle.dumps(open_split(tmp_path)))
    assert split.names == tuple(s.key for s in written)
    assert split.reports[3] == "There is finding 3."
    np.testing.assert_array_equal(split.labels, [s.labels for s in written])
    for i in (4, 0, 3, 1, 2, 0):
        np.testing.assert_array_equal(split.volumes.read(i), written[i].volume)


def test_the_stored_layout_is_height_width_depth(folder):
    with tarfile.open(folder / FIRST) as tar:
        stored = np.frombuffer(tar.extractfile("case_0.bin").read(), "<f2")  # type: ignore[union-attr]
    np.testing.assert_array_equal(stored.reshape(4, 5, 3).transpose(2, 0, 1), samples()[0].volume)


def test_equal_samples_give_equal_bytes_and_digest(folder, tmp_path):
    write_shards(tmp_path / "again", samples(), per_shard=2)
    assert (tmp_path / "again" / FIRST).read_bytes() == (folder / FIRST).read_bytes()
    assert open_split(tmp_path / "again").digest == open_split(folder).digest
    rewrite(folder / FIRST, lambda n, c: c.replace(b"finding", b"nothing") if n.endswith("txt") else c)
    assert open_split(tmp_path / "again").digest != open_split(folder).digest


def change_json(folder: Path, **fields) -> None:
    def change(name: str, content: bytes) -> bytes:
        return json.dumps({**json.loads(content), **fields}).encode() if name == "case_1.json" else content

    rewrite(folder / FIRST, change)


def change_member(folder: Path, member: str, new) -> None:
    rewrite(folder / FIRST, lambda n, c: new(c) if n == member else c)


def cut(folder: Path, keep: int) -> None:
    path = folder / FIRST
    path.write_bytes(path.read_bytes()[:keep])


def duplicate(folder: Path) -> None:
    (folder / "shard-000003.tar").write_bytes((folder / FIRST).read_bytes())


def twice(folder: Path) -> None:
    with tarfile.open(folder / FIRST, "a") as tar:
        info = tarfile.TarInfo("case_0.txt")
        tar.addfile(info, io.BytesIO(b""))


AT = r"shard-000000\.tar key case_1: "
FAULTS = {
    "cut in a member": (lambda f: cut(f, 700), r"shard-000000\.tar: is no whole tar file .*; fetch it again"),
    "cut at a member's end": (lambda f: cut(f, 1024), r"shard-000000\.tar key case_0: has no \.json"),
    "not a tar": (lambda f: (f / FIRST).write_bytes(b"x" * 2000), r"shard-000000\.tar: is no whole tar file"),
    "empty shard": (lambda f: (f / FIRST).write_bytes(b""), r"shard-000000\.tar: is no whole tar file"),
    "bytes": (
        lambda f: change_member(f, "case_1.bin", lambda c: c[:-2]),
        AT + r"\.bin has 118 bytes, not 120",
    ),
    "shape": (
        lambda f: change_json(f, volume_shape=[3, 4, 5]),
        AT + r"volume_shape \(3, 4, 5\) is not \(H, W, T\) \(4, 5, 3\) of data\.volume",
    ),
    "dtype": (lambda f: change_json(f, volume_dtype="float32"), AT + "volume_dtype 'float32' is not float16"),
    "json": (lambda f: change_member(f, "case_1.json", lambda c: b"{}"), AT + r"\.json lacks volume_shape"),
    "labels": (
        lambda f: change_member(f, "case_1.labels", lambda c: c[:-4]),
        AT + r"labels have 68 bytes, not 72 \(18 float32\)",
    ),
    "label value": (
        lambda f: change_member(f, "case_1.labels", lambda c: np.full(18, 0.5, "<f4").tobytes()),
        AT + "label 0.5 is neither 0 nor 1",
    ),
    "no labels": (
        lambda f: change_member(f, "case_1.labels", lambda c: None),
        AT + r"has no \.labels nor \.cls",
    ),
    "no report": (lambda f: change_member(f, "case_1.txt", lambda c: None), AT + r"has no \.txt"),
    "no volume": (lambda f: change_member(f, "case_1.bin", lambda c: None), AT + r"has no \.bin"),
    "report text": (lambda f: change_member(f, "case_1.txt", lambda c: b"\xff"), AT + r"\.txt is not UTF-8"),
    "member twice": (twice, r"shard-000000\.tar key case_0: has \.txt twice"),
    "key twice": (duplicate, r"shard-000003\.tar key case_0: is in shard-000000\.tar too"),
    "missing shard": (
        lambda f: (f / FIRST).unlink(),
        r"manifest\.json: total_samples=5, but the 2 shards hold 3; fetch the missing shards",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json: no such file"),
    "bad manifest": (
        lambda f: (f / "manifest.json").write_text('{"total": 5}'),
        "has no whole number total_samples",
    ),
    "torn manifest": (
        lambda f: (f / "manifest.json").write_text('{"total_'),
        "has no whole number total_samples",
    ),
    "no shards": (lambda f: [p.unlink() for p in f.glob("*.tar")], r"holds no shard-NNNNNN\.tar"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_line_that_names_shard_and_key(folder, fault):
    spoil, message = FAULTS[fault]
    open_split(folder)
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_split(folder)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"data\.train=.*gone: no such folder"):
        open_split(tmp_path / "gone")


def test_a_shard_that_shrinks_or_spoils_after_opening_is_noticed(folder):
    split = open_split(folder)
    rewrite(folder / FIRST, lambda n, c: np.full(60, np.nan, "<f2").tobytes() if n == "case_1.bin" else c)
    with pytest.raises(UserError, match=AT + r"\.bin holds a voxel that is not finite"):
        split.volumes.read(1)
    cut(folder, 600)
    with pytest.raises(UserError, match=AT + r"\.bin ends early"):
        split.volumes.read(1)
    (folder / FIRST).unlink()
    with pytest.raises(UserError, match=AT + "cannot be read"):
        split.volumes.read(1)


@pytest.mark.parametrize("key", ["a.b", "a/b", ""])
def test_a_key_the_reader_would_split_is_refused(tmp_path, key):
    with pytest.raises(ValueError, match="must not be empty or hold a dot"):
        write_shards(
            tmp_path, [Sample(key, *[getattr(samples(1)[0], f) for f in ("volume", "report", "labels")])], 1
        )
