"""`jaxablate data tokenize`: the ids are the text's, however often it is killed, and memory does not grow with it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxablate import cli
from jaxablate.errors import UserError
from jaxablate.text import encode
from jaxablate.text import tokenize as module
from jaxablate.text.tokenize import Options, tokenize
from jaxablate.text.tokenizer import END_OF_TEXT, Vocabulary
from jaxablate.text.tokens import TokenWriter

# The command, as it is on a machine that is so slow that it commits every few stories.
SLOWED = (
    "import sys; from jaxablate import cli; from jaxablate.text import encode, tokenize; "
    "encode.BATCH, tokenize.COMMIT_EVERY_S = 5_000, 0.0; sys.exit(cli.main())"
)
# The command, and then the peak of its memory. (getrusage has that of the process that started it, too.)
MEASURED = (
    "import sys; from jaxablate import cli; from jaxablate.text import encode; "
    "encode.BATCH, encode.CHUNK = 1 << 16, {chunk}; code = cli.main(); "
    "print(*[line for line in open('/proc/self/status') if line.startswith('VmHWM')]); sys.exit(code)"
)

RESULT = {"t.npy", "t.tokenizer.json", "t.source.json"}


def words(count: int, seed: int = 0) -> str:
    """Made words with frequencies as 1/rank, in sentences."""
    chance = np.random.default_rng(seed)
    letters = chance.integers(97, 123, (2000, 7), np.uint8).tobytes().decode()
    vocabulary = [letters[7 * i : 7 * i + 1 + i % 7] + ".\n" * (i % 11 == 0) for i in range(2000)]
    frequency = 1 / np.arange(1, 2001)
    return " ".join(vocabulary[i] for i in chance.choice(2000, count, p=frequency / frequency.sum()))


def stories(count: int, seed: int = 0) -> str:
    return END_OF_TEXT.join(words(120, seed * count + i) + "\n" for i in range(count))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text(stories(20))
    (tmp_path / "b.txt").write_text(f"\n{stories(5, 7)}{END_OF_TEXT}\n")
    return tmp_path


def made(out: Path) -> tuple[bytes, bytes]:
    return out.read_bytes(), out.with_name(f"{out.stem}.tokenizer.json").read_bytes()


def removed(out: Path) -> tuple[bytes, bytes]:
    """What was made, which is there no longer."""
    found = made(out)
    for name in RESULT:
        (out.parent / name).unlink()
    return found


@pytest.mark.parametrize("level", ["bpe", "char"])
def test_the_ids_are_the_text_s(folder, capsys, level):
    argv = ["data", "tokenize", f"{folder}/a.txt", f"{folder}/b.txt", f"--out={folder}/t.npy", "--json"]
    assert cli.main([*argv, "--vocab-size=400", f"--level={level}"]) == 0
    said = json.loads(capsys.readouterr().out)

    ids, vocabulary = np.load(folder / "t.npy"), Vocabulary.load(folder / "t.tokenizer.json")
    text = END_OF_TEXT.join((folder / name).read_text() for name in ("a.txt", "b.txt"))
    assert ids.dtype == np.uint16 and ids.ndim == 1
    np.testing.assert_array_equal(ids, vocabulary.encode([text])[0])
    assert vocabulary.decode(ids) == text
    assert (ids == vocabulary.end_of_text).sum() == 20 - 1 + 5 + 1
    assert said["tokens"] == len(ids) and said["vocabulary"] == vocabulary.size <= 400
    assert said["characters"] == len(text.replace(END_OF_TEXT, ""))
    assert {path.name for path in folder.iterdir()} == {"a.txt", "b.txt", *RESULT}


def test_people_are_told_what_came_of_it(folder, capsys):
    assert cli.main(["data", "tokenize", f"{folder}/a.txt", f"--out={folder}/t.npy", "--vocab-size=300"]) == 0
    said = capsys.readouterr().out
    for part in ("tokens", "characters per token", "MB/s", "300 ids", "t.tokenizer.json"):
        assert part in said


def test_a_given_tokenizer_is_used_and_kept_beside(folder):
    Vocabulary.train(["the cat"] * 9, 260, "bpe").save(folder / "given.json")
    tokenize(Options((folder / "a.txt",), folder / "t.npy", folder / "given.json"))
    given = Vocabulary.load(folder / "given.json")
    assert made(folder / "t.npy")[1] == (folder / "given.json").read_bytes()
    np.testing.assert_array_equal(
        np.load(folder / "t.npy"), given.encode([(folder / "a.txt").read_text()])[0]
    )


def test_batches_make_no_difference(folder, monkeypatch):
    options = Options((folder / "a.txt", folder / "b.txt"), folder / "t.npy", vocab_size=300)
    tokenize(options)
    whole = removed(options.out)
    monkeypatch.setattr(encode, "BATCH", 50)
    monkeypatch.setattr(module, "COMMIT_EVERY_S", 0.0)
    tokenize(options)
    assert made(options.out) == whole


# ------------------------------------------------------------------------------------ going on


def killed(options: Options, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """What a process leaves that is killed behind its `after`-th batch."""

    class Killed(BaseException):
        pass

    append, calls = TokenWriter.append, iter(range(after))

    def until(self: TokenWriter, ids: np.ndarray) -> None:
        append(self, ids)
        if next(calls, None) is None:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(encode, "BATCH", 2000)
        patch.setattr(module, "COMMIT_EVERY_S", 0.0)
        patch.setattr(TokenWriter, "append", until)
        with pytest.raises(Killed):
            tokenize(options)


def progress(out: Path) -> dict:
    return json.loads(out.with_name(f"{out.stem}.source.json").read_text())


def come_to(out: Path) -> int:
    """The tokens that are committed; 0 before and after."""
    try:
        return progress(out)["place"]["tokens"]
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_killed_at_any_instant_it_goes_on_to_the_same_bytes(tmp_path, child_env):
    (tmp_path / "long.txt").write_text(stories(200) + " " + words(40_000))
    (tmp_path / "more.txt").write_text(stories(50, 3))
    texts = (tmp_path / "long.txt", tmp_path / "more.txt")
    tokenize(Options(texts, tmp_path / "whole.npy", vocab_size=400))
    whole, tokens = made(tmp_path / "whole.npy"), len(np.load(tmp_path / "whole.npy"))

    out = tmp_path / "t.npy"
    command = [sys.executable, "-c", SLOWED, "data", "tokenize", *texts, f"--out={out}", "--vocab-size=400"]
    came_to = [0]
    for _ in range(5):
        child = subprocess.Popen(command, env=child_env, stderr=subprocess.PIPE, text=True)
        while child.poll() is None and come_to(out) < came_to[-1] + tokens // 9:
            time.sleep(0.001)
        child.kill()
        _, said = child.communicate()
        if child.returncode == 0:  # it was done before this process had its turn
            break
        assert (f"goes on behind {came_to[-1]} tokens" in said) is (came_to[-1] > 0)
        came_to.append(come_to(out))
    assert len(came_to) > 2 and came_to == sorted(set(came_to)) and came_to[-1] < tokens
    subprocess.run(command, env=child_env, check=True, capture_output=True)
    assert made(out) == whole
    assert not list(tmp_path.glob("*.part"))


def test_a_wrong_place_to_go_on_from_shows(folder, monkeypatch):
    """That the bytes are the same says something: a place that is off by one token gives others."""
    options = Options((folder / "a.txt",), folder / "t.npy", vocab_size=300)
    tokenize(options)
    whole = removed(options.out)
    for off, same in ((0, True), (1, False)):
        killed(options, monkeypatch, after=3)
        record = progress(options.out)
        assert record["place"]["tokens"] > 100
        record["place"]["tokens"] -= off
        (folder / "t.source.json").write_text(json.dumps(record))
        tokenize(options)
        assert (removed(options.out) == whole) is same


@pytest.mark.parametrize("other", ["text", "tokenizer"])
def test_with_another_source_it_says_so_and_starts_over(folder, monkeypatch, caplog, other):
    caplog.set_level(logging.INFO)
    options = Options((folder / "a.txt",), folder / "t.npy", vocab_size=300)
    killed(options, monkeypatch, after=3)
    if other == "text":
        (folder / "a.txt").write_text(stories(20, 1))
    else:
        options = Options(options.texts, options.out, vocab_size=310)
    tokenize(options)
    assert f"was begun with another {other}; starts over" in caplog.text
    assert "goes on" not in caplog.text
    fresh = Options(options.texts, folder / "fresh.npy", vocab_size=options.vocab_size)
    tokenize(fresh)
    assert made(options.out) == made(fresh.out)


@pytest.mark.parametrize("lost", ["t.npy.part", "t.tokenizer.json.part"])
def test_what_was_deleted_is_made_again(folder, monkeypatch, lost):
    options = Options((folder / "a.txt",), folder / "t.npy", vocab_size=300)
    tokenize(options)
    whole = removed(options.out)
    killed(options, monkeypatch, after=3)
    (folder / lost).unlink()
    tokenize(options)
    assert made(options.out) == whole


@pytest.mark.parametrize("record", ['{"x": 1}', '{"source": {"texts": []}}', "[]", "torn"])
def test_a_record_of_another_format_starts_over(folder, monkeypatch, record):
    options = Options((folder / "a.txt",), folder / "t.npy", vocab_size=300)
    tokenize(options)
    whole = removed(options.out)
    killed(options, monkeypatch, after=3)
    (folder / "t.source.json").write_text(record)
    tokenize(options)
    assert made(options.out) == whole


# ------------------------------------------------------------------------- what is there, and who else is


def test_what_is_there_of_the_same_text_and_settings_is_left_alone(folder, capsys):
    argv = ["data", "tokenize", f"{folder}/a.txt", f"--out={folder}/t.npy", "--vocab-size=300"]
    assert cli.main(argv) == 0
    assert "MB/s" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "a.txt").touch()  # the same text, nevertheless
    before[folder / "a.txt"] = (folder / "a.txt").stat().st_mtime_ns
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert "is there already" in said and f"{len(np.load(folder / 't.npy')):,} tokens" in said
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "a.txt").write_text(stories(20, 1)), "is there, of other text"),
        (lambda folder: ["--vocab-size=310"], "is there, made with another --tokenizer, --vocab-size or --level"),
        (lambda folder: ["--vocab-size=300", "--level=char"], "is there, made with another --tokenizer"),
        (lambda folder: (folder / "t.source.json").unlink(), "not known to be of this text and tokenizer"),
        (lambda folder: (folder / "t.source.json").write_text('{"x": 1}'), "not known to be of this text"),
        (lambda folder: (folder / "t.tokenizer.json").unlink(), "t.tokenizer.json is not its tokenizer"),
        (lambda folder: np.save(folder / "t.npy", np.arange(5, dtype=np.uint16)), "with other than the"),
    ],
)  # fmt: skip
def test_what_is_there_and_was_made_otherwise_is_not_overwritten(folder, capsys, change, message):
    argv = ["data", "tokenize", f"{folder}/a.txt", f"--out={folder}/t.npy"]
    assert cli.main([*argv, "--vocab-size=300"]) == 0
    capsys.readouterr()
    changed = change(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert cli.main([*argv, *(changed if isinstance(changed, list) else ["--vocab-size=300"])]) == 2
    said = capsys.readouterr().err
    assert message in said and "--out=" in said and "remove it, or choose another --out" in said
    assert [line for line in said.splitlines() if line.startswith("error: ")] == said.splitlines()[-1:]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_second_command_touches_nothing_of_the_first_one_s(folder, monkeypatch):
    """It is refused while the first one writes, and the ids lie beside the tokenizer that made them."""
    first = Options((folder / "a.txt",), folder / "t.npy", vocab_size=300)
    second = Options((folder / "b.txt",), folder / "t.npy", level="char")
    append, refused = TokenWriter.append, []

    def interrupted(self: TokenWriter, ids: np.ndarray) -> None:
        append(self, ids)
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match=r"t\.npy: another process writes it") as error:
            tokenize(second)
        refused.append(error)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before

    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "append", interrupted)
        tokenize(first)
    assert refused
    text = (folder / "a.txt").read_text()
    assert Vocabulary.load(folder / "t.tokenizer.json").decode(np.load(folder / "t.npy")) == text
    removed(first.out)
    tokenize(second)  # alone, nothing is wrong with it


def test_on_a_full_disk_it_stops_with_one_line_and_goes_on_later(folder, child_env):
    (folder / "a.txt").write_text(words(60_000))
    options = Options((folder / "a.txt",), folder / "whole.npy", vocab_size=300)
    tokenize(options)
    size = options.out.stat().st_size
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))"
    program = f"{limit}\n{SLOWED}"
    command = [sys.executable, "-c", program, "data", "tokenize", folder / "a.txt", f"--out={folder}/t.npy"]
    full = subprocess.run(
        [*command, "--vocab-size=300"], env=child_env, capture_output=True, text=True, check=False
    )
    assert full.returncode == 2
    assert full.stderr.count("\n") == 1 and "cannot be written: File too large" in full.stderr
    assert progress(folder / "t.npy")["place"]["tokens"] > 1000
    tokenize(Options(options.texts, folder / "t.npy", vocab_size=300))
    assert made(folder / "t.npy") == made(options.out)


# --------------------------------------------------------------------------------------- memory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path, child_env):
    """One document without separators: four times as long, and a fraction of what holding it would take."""

    def peak(text: Path, chunk: int) -> int:
        program = MEASURED.format(chunk=chunk)
        out = f"{text}.{chunk}.npy"
        command = [sys.executable, "-c", program, "data", "tokenize", text, f"--out={out}", "--json"]
        child = subprocess.run(
            [*command, "--vocab-size=300"], env=child_env, capture_output=True, text=True, check=True
        )
        return int(child.stdout.split()[-2]) << 10

    (tmp_path / "short.txt").write_text(words(20_000))
    (tmp_path / "long.txt").write_text("".join(words(80_000, i) for i in range(4)))
    size = (tmp_path / "long.txt").stat().st_size
    short, long = peak(tmp_path / "short.txt", 1 << 10), peak(tmp_path / "long.txt", 1 << 10)
    assert long - short < 10 * size
    assert peak(tmp_path / "long.txt", 1 << 28) - short > 50 * size, "held whole, it shows"


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["empty.txt", "--out=t.npy"], "empty.txt: is empty"),
        (["zero.txt", "--out=t.npy"], "zero.txt: byte 3 is no UTF-8 text"),
        (["latin.txt", "--out=t.npy"], "latin.txt: byte 3 is no UTF-8 text"),
        (
            ["a.txt", "latin.txt", "--out=t.npy", "--tokenizer=given.json"],
            "latin.txt: byte 3 is no UTF-8 text",
        ),
        (["missing.txt", "--out=t.npy"], "missing.txt: cannot be read: No such file"),
        ([".", "--out=t.npy"], ".: cannot be read: Is a directory"),
        (["a.txt", "--out=t.npy", "--vocab-size=256"], "vocab_size=256: "),
        (["a.txt", "--out=t.npy", "--vocab-size=9", "--level=char"], "vocab_size=9: the text has"),
        (["a.txt", "--out=t.npy", "--vocab-size=many"], "--vocab-size: invalid int value: 'many'"),
        (["a.txt", "--out=t.npy", "--level=word"], "--level: invalid choice: 'word'"),
        (["a.txt", "--out=t.npy", "--tokenizer=a.txt"], "a.txt: is not a tokenizer's JSON"),
        (["a.txt", "--out=t.npy", "--tokenizer=missing.json"], "missing.json: cannot be read"),
        (
            ["a.txt", "--out=t.npy", "--tokenizer=given.json", "--level=bpe"],
            "--tokenizer=given.json: has its own",
        ),
        (["a.txt", "--out=t.npy", "--tokenizer=endless.json"], "has no <|endoftext|> to separate"),
        (["a.txt", "--out=nowhere/t.npy"], "--out=nowhere/t.npy: there is no folder 'nowhere'"),
        (["a.txt", "--out=t.bin"], "--out=t.bin: is to be an .npy file"),
        (["a.txt", "--out=folder.npy"], "--out=folder.npy: is to be an .npy file"),
        (["a.txt"], "--out"),
        (["--out=t.npy"], "TEXT"),
        (["a.txt", "--out=t.npy", "--workdir=x"], "--workdir, --config.PATH: text belongs to no study"),
    ],
)
def test_bad_input_is_one_line(folder, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(folder)
    (folder / "empty.txt").touch()
    (folder / "zero.txt").write_bytes(b"abc\0def")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    vocabulary = Vocabulary.train(["the cat"], 260, "bpe")
    vocabulary.save("given.json")
    Path("endless.json").write_text(Path("given.json").read_text().replace(END_OF_TEXT, "[end]"))
    Path("folder.npy").mkdir()
    before = {path.name for path in folder.iterdir()}
    assert cli.main(["data", "tokenize", *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert message in said
    assert not Path("t.npy").exists()
    left = {path.name for path in folder.iterdir()} - before
    assert left <= {"t.npy.part", "t.source.json", "t.tokenizer.json.part"}


def test_the_command_line_starts_without_the_library(child_env):
    code = "import sys; from jaxablate import cli; assert 'tokenizers' not in sys.modules; cli.main()"
    child = subprocess.run(
        [sys.executable, "-c", code, "data", "tokenize", "--help"],
        env=child_env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0 and "--vocab-size" in child.stdout
