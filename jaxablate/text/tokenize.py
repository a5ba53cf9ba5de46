"""From text files to one file of token ids, streaming, so that a killed command goes on where it was.

Beside `OUT.npy` lie `OUT.tokenizer.json` and `OUT.source.json`: what the ids are made from, and how far that has
come. While `OUT.npy.part` is written, the latter is renewed every few seconds, after the tokens that it counts;
whoever finds it goes on from there. It stays, and tells that the same command has nothing more to do.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from jaxablate.disk import read_json, write_json
from jaxablate.errors import StorageError, UserError, is_storage
from jaxablate.text.encode import encoded, parts
from jaxablate.text.tokenizer import Level, Vocabulary
from jaxablate.text.tokens import TokenWriter, part_of, size_of, written

logger = logging.getLogger(__name__)

COMMIT_EVERY_S = 2.0


@dataclass(frozen=True)
class Options:
    """What to tokenize.

    Args:
      texts: UTF-8 files, read as if they were one, with END_OF_TEXT between them.
      out: the `.npy`.
      tokenizer: a tokenizer's JSON; None trains one on `texts`, of at most `vocab_size` ids of `level`.
    """

    texts: tuple[Path, ...]
    out: Path
    tokenizer: Path | None = None
    vocab_size: int = 10_000
    level: Level = "bpe"


@dataclass(frozen=True)
class Tokenized:
    """What came of it. `bytes` and `seconds` are of the encoding by this process, which may have gone on
    from another's, or found all done; `training_seconds` is 0 if no tokenizer was trained.
    """

    out: str
    tokenizer: str
    vocabulary: int
    tokens: int
    characters: int
    bytes: int
    seconds: float
    training_seconds: float
    state: Literal["made", "was there"] = "made"
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        derived = {
            "characters_per_token": self.characters / max(self.tokens, 1),
            "megabytes_per_second": self.bytes / 1e6 / max(self.seconds, 1e-9),
        }
        return {key: value for key, value in asdict(self).items() if key != "exit_code"} | derived

    def text(self) -> str:
        """For people."""
        found = self.to_dict()
        trained = f"trained in {self.training_seconds:.1f} s, " if self.training_seconds else ""
        took = (
            f"{self.bytes / 1e6:,.1f} MB encoded in {self.seconds:.1f} s, "
            f"{found['megabytes_per_second']:.1f} MB/s"
        )
        return (
            f"{self.out}: {self.tokens:,} tokens of {self.characters:,} characters, "
            f"{found['characters_per_token']:.2f} characters per token\n"
            f"{self.tokenizer}: {trained}{self.vocabulary:,} ids\n"
            f"{took if self.state == 'made' else 'is there already, of the same text and settings'}"
        )


@dataclass(frozen=True)
class _Place:
    """How far it has come: the files before `file`, and `offset` bytes of that one, are `tokens` tokens."""

    file: int = 0
    offset: int = 0
    tokens: int = 0
    characters: int = 0


@dataclass(frozen=True)
class _Record:
    """What a file is made from, and how far it is: `OUT.source.json`.

    Args:
      texts: a digest of each.
      wanted: the tokenizer's fingerprint, or what one is to be trained with.
      tokenizer: the fingerprint.
      place: all before it is in the file.
    """

    texts: tuple[str, ...]
    wanted: str
    tokenizer: str
    place: _Place


def tokenize(options: Options) -> Tokenized:
    """Writes `out` and beside it `<out's stem>.tokenizer.json`, or goes on with what a killed process left.

    Raises:
      UserError: a text is missing, empty or binary; the tokenizer does not fit; `out` cannot be written, is
        written by another process, or is there and was made otherwise.
      StorageError: the disk is full. What is written stays, and the same command goes on from there.
    """
    if options.out.suffix != ".npy" or options.out.is_dir():
        raise UserError(f"--out={options.out}: is to be an .npy file; end its name in .npy")
    if not options.out.parent.is_dir():
        raise UserError(f"--out={options.out}: there is no folder '{options.out.parent}'; make it first")
    if not os.access(options.out.parent, os.W_OK):
        raise UserError(
            f"--out={options.out}: '{options.out.parent}' may not be written; choose another folder"
        )
    sizes, digests = zip(*map(_identity, options.texts), strict=True)
    try:
        with _Bar(sizes) as bar:
            return _tokenize(options, digests, bar)
    except OSError as error:
        if not is_storage(error):
            raise
        raise StorageError(
            f"{options.out}: cannot be written: {error.strerror}; what is written stays, run it again to go on"
        ) from None


def _tokenize(options: Options, texts: tuple[str, ...], bar: _Bar) -> Tokenized:
    given = Vocabulary.load(options.tokenizer) if options.tokenizer else None
    wanted = given.fingerprint if given else f"{options.level} {options.vocab_size}"
    out, beside = options.out, options.out.with_name(f"{options.out.stem}.tokenizer.json")
    with TokenWriter(out) as writer:  # from here on nobody else touches any of the files
        left = _left(out)
        if out.exists():
            return _was_there(out, beside, left, texts, wanted)
        left = _of_the_same(out, left, texts, wanted)

        vocabulary, training_seconds = given or _trained(part_of(beside), left), 0.0
        if vocabulary is None:
            began = time.monotonic()
            vocabulary = _train(options, bar)
            training_seconds = time.monotonic() - began
            vocabulary.save(part_of(beside))
        place = first = _place(out, vocabulary, left)

        def commit() -> None:
            writer.commit()
            write_json(_record(out), asdict(_Record(texts, wanted, vocabulary.fingerprint, place)))

        began = committed = time.monotonic()
        writer.begin(vocabulary.dtype, place.tokens)
        commit()
        for ids, batch in encoded(vocabulary, parts(options.texts, place.file, place.offset)):
            writer.append(ids)
            characters = place.characters + sum(len(part.text) for part in batch)
            place = _Place(batch[-1].file, batch[-1].end, writer.tokens, characters)
            bar.at("encoding", place.file, place.offset)
            if time.monotonic() - committed > COMMIT_EVERY_S:
                commit()
                committed = time.monotonic()
        commit()
        vocabulary.save(beside)
        writer.finish()  # last: where the file is, all that belongs to it is
        part_of(beside).unlink(missing_ok=True)
    return Tokenized(
        out=str(out),
        tokenizer=str(beside),
        vocabulary=vocabulary.size,
        tokens=place.tokens,
        characters=place.characters,
        bytes=bar.bytes(place.file, place.offset) - bar.bytes(first.file, first.offset),
        seconds=time.monotonic() - began,
        training_seconds=training_seconds,
    )


def _train(options: Options, bar: _Bar) -> Vocabulary:
    def texts() -> Iterator[str]:
        for part in parts(options.texts):
            bar.at("training the tokenizer", part.file, part.end)
            yield part.text

    return Vocabulary.train(texts(), options.vocab_size, options.level)


def _identity(text: Path) -> tuple[int, str]:
    """A file's size and the digest of its content."""
    try:
        with open(text, "rb") as file:
            return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{text}: cannot be read: {error.strerror}; give a UTF-8 text file") from None


# ------------------------------------------------------------------------------ what is there already


def _record(out: Path) -> Path:
    return out.with_name(f"{out.stem}.source.json")


def _left(out: Path) -> _Record | None:
    """What the last command has recorded; None if there is nothing, or nothing of this format."""
    path = _record(out)
    if not path.exists():
        return None
    try:
        found = read_json(path)
    except UserError:
        found = None
    match found:
        case {
            "texts": [*texts],
            "wanted": str(wanted),
            "tokenizer": str(tokenizer),
            "place": {"file": int(f), "offset": int(offset), "tokens": int(n), "characters": int(characters)},
        }:
            return _Record(tuple(texts), wanted, tokenizer, _Place(f, offset, n, characters))
    logger.warning("%s: does not say what %s was made from", path, out)
    return None


def _was_there(
    out: Path, beside: Path, left: _Record | None, texts: tuple[str, ...], wanted: str
) -> Tokenized:
    """What a finished file holds. Raises UserError if this command would make another."""
    vocabulary = Vocabulary.load(beside) if left and beside.exists() else None
    if left is None:
        what = "is there, and not known to be of this text and tokenizer"
    elif left.texts != texts:
        what = "is there, of other text"
    elif left.wanted != wanted:
        what = "is there, made with another --tokenizer, --vocab-size or --level"
    elif vocabulary is None or vocabulary.fingerprint != left.tokenizer:
        what = f"is there, and {beside} is not its tokenizer"
    elif out.stat().st_size != size_of(vocabulary.dtype, left.place.tokens):
        what = f"is there, with other than the {left.place.tokens} tokens that were written"
    else:
        done = left.place
        return Tokenized(
            str(out), str(beside), vocabulary.size, done.tokens, done.characters, 0, 0.0, 0.0, "was there"
        )
    raise UserError(f"--out={out}: {what}; remove it, or choose another --out")


def _of_the_same(out: Path, left: _Record | None, texts: tuple[str, ...], wanted: str) -> _Record | None:
    """What is recorded, if it is of the texts and the tokenizer that are asked for."""
    if left is None or (left.texts, left.wanted) == (texts, wanted):
        return left
    other = "text" if left.texts != texts else "tokenizer"
    logger.info("%s: was begun with another %s; starts over", part_of(out), other)
    return None


def _trained(path: Path, left: _Record | None) -> Vocabulary | None:
    """The tokenizer that a killed command has trained, if it is there."""
    if left is None or not path.exists():
        return None
    vocabulary = Vocabulary.load(path)
    return vocabulary if vocabulary.fingerprint == left.tokenizer else None


def _place(out: Path, vocabulary: Vocabulary, left: _Record | None) -> _Place:
    """Where to go on; the beginning, if the part is missing or of another tokenizer."""
    if left is None or left.tokenizer != vocabulary.fingerprint:
        return _Place()
    if written(out, vocabulary.dtype) < left.place.tokens:
        return _Place()
    logger.info("%s: goes on behind %d tokens", part_of(out), left.place.tokens)
    return left.place


class _Bar:
    """How far through the texts it is, on stderr if that is a terminal."""

    def __init__(self, sizes: Sequence[int]):
        self._before = [0, *itertools.accumulate(sizes)]
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._stage, self._task = "", TaskID(0)

    def bytes(self, file: int, offset: int) -> int:
        """How many bytes lie before an offset of a file."""
        return self._before[file] + offset

    def at(self, stage: str, file: int, offset: int) -> None:
        """Shows that a stage is done with all before an offset of a file."""
        if stage != self._stage:
            self._stage = stage
            self._task = self._progress.add_task(stage, total=self._before[-1])
        self._progress.update(self._task, completed=self.bytes(file, offset))

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
