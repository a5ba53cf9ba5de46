"""From text files to one file of token ids, streaming, so that a killed command goes on where it was.

Beside `OUT.npy.part` lies `OUT.npy.progress.json`: what the part is made from, and how far it has come. It is
written every few seconds, after the tokens that it counts; whoever finds it goes on from there.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
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
from jaxablate.text.documents import CHUNK, pieces
from jaxablate.text.tokenizer import END_OF_TEXT, Level, Vocabulary
from jaxablate.text.tokens import TokenWriter, part_of, written

logger = logging.getLogger(__name__)

BATCH = 1 << 20  # characters encoded at a time; of each token the library makes some 200 bytes
AHEAD = 2  # batches in the making while one is written
COMMIT_EVERY_S = 2.0
_HEAD = 1 << 16


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
    from another's; `training_seconds` is 0 if no tokenizer was trained.
    """

    out: str
    tokenizer: str
    vocabulary: int
    tokens: int
    characters: int
    bytes: int
    seconds: float
    training_seconds: float
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
        return (
            f"{self.out}: {self.tokens:,} tokens of {self.characters:,} characters, "
            f"{found['characters_per_token']:.2f} characters per token\n"
            f"{self.tokenizer}: {trained}{self.vocabulary:,} ids\n"
            f"{self.bytes / 1e6:,.1f} MB encoded in {self.seconds:.1f} s, "
            f"{found['megabytes_per_second']:.1f} MB/s"
        )


@dataclass(frozen=True)
class _Place:
    """How far it has come: the files before `file`, and `offset` bytes of that one, are `tokens` tokens."""

    file: int = 0
    offset: int = 0
    tokens: int = 0
    characters: int = 0


class _Part(NamedTuple):
    """A piece of a document, the place behind it, and what is between it and the next."""

    text: str
    file: int
    offset: int
    then: Literal["separator", "nothing"]


def tokenize(options: Options) -> Tokenized:
    """Writes `out` and beside it `<out's stem>.tokenizer.json`, or goes on with what a killed process left.

    Raises:
      UserError: a text is missing, empty or binary; the tokenizer does not fit; `out` cannot be written.
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
    sizes, texts = zip(*map(_identity, options.texts), strict=True)
    try:
        with _Bar(sizes) as bar:
            return _tokenize(options, texts, bar)
    except OSError as error:
        if not is_storage(error):
            raise
        raise StorageError(
            f"{options.out}: cannot be written: {error.strerror}; what is written stays, run it again to go on"
        ) from None


def _tokenize(options: Options, texts: Sequence[str], bar: _Bar) -> Tokenized:
    beside = options.out.with_name(f"{options.out.stem}.tokenizer.json")
    given = Vocabulary.load(options.tokenizer) if options.tokenizer else None
    wanted = given.fingerprint if given else f"{options.level} {options.vocab_size}"
    record = _Record(options.out, {"texts": list(texts), "wanted": wanted})

    vocabulary, training_seconds = given or record.trained(part_of(beside)), 0.0
    if vocabulary is None:
        began = time.monotonic()
        vocabulary = _train(options, bar)
        training_seconds = time.monotonic() - began
    place = first = record.place(vocabulary)
    vocabulary.save(part_of(beside))

    began = committed = time.monotonic()
    with TokenWriter(options.out, vocabulary.dtype, place.tokens) as writer:
        record.write(vocabulary, place)
        for ids, parts in _encode(vocabulary, options.texts, place):
            writer.append(ids)
            characters = place.characters + sum(len(part.text) for part in parts)
            place = _Place(parts[-1].file, parts[-1].offset, writer.tokens, characters)
            bar.at("encoding", place.file, place.offset)
            if time.monotonic() - committed > COMMIT_EVERY_S:
                writer.commit()
                record.write(vocabulary, place)
                committed = time.monotonic()
        writer.finish()
    os.replace(part_of(beside), beside)
    record.remove()
    return Tokenized(
        out=str(options.out),
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
        for file, path in enumerate(options.texts):
            for piece in pieces(path, chunk=CHUNK):
                bar.at("training the tokenizer", file, piece.end)
                yield piece.text

    return Vocabulary.train(texts(), options.vocab_size, options.level)


# ------------------------------------------------------------------------------------------ encoding


def _encode(
    vocabulary: Vocabulary, texts: Sequence[Path], place: _Place
) -> Iterator[tuple[np.ndarray, list[_Part]]]:
    """Batches of parts from `place` on, with their ids (tokens,); the next ones are in the making meanwhile."""
    with ThreadPoolExecutor(AHEAD) as threads:
        waiting: deque[tuple[Future[np.ndarray], list[_Part]]] = deque()
        for parts in _batches(_parts(texts, place)):
            waiting.append((threads.submit(_ids, vocabulary, parts), parts))
            if len(waiting) > AHEAD:
                ids, done = waiting.popleft()
                yield ids.result(), done
        for ids, done in waiting:
            yield ids.result(), done


def _parts(texts: Sequence[Path], place: _Place) -> Iterator[_Part]:
    for file, path in enumerate(texts[place.file :], start=place.file):
        start = place.offset if file == place.file else 0
        for piece in pieces(path, chunk=CHUNK, start=start):
            ends = piece.followed_by == "separator"
            joined = piece.followed_by == "end of file" and file + 1 < len(texts)
            yield _Part(piece.text, file, piece.end, "separator" if ends or joined else "nothing")


def _batches(parts: Iterator[_Part]) -> Iterator[list[_Part]]:
    batch, characters = [], 0
    for part in parts:
        batch.append(part)
        characters += len(part.text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _ids(vocabulary: Vocabulary, parts: Sequence[_Part]) -> np.ndarray:
    """The ids of the parts and of what is between them, (tokens,)."""
    end = vocabulary.end_of_text
    if end is None and any(part.then == "separator" for part in parts):
        raise UserError(f"tokenizer: has no {END_OF_TEXT} to separate documents by; give one that has")
    between = {"separator": np.array([end or 0], vocabulary.dtype), "nothing": np.array([], vocabulary.dtype)}
    encoded = vocabulary.encode([part.text for part in parts])
    pairs = zip(encoded, parts, strict=True)
    return np.concatenate([array for ids, part in pairs for array in (ids, between[part.then])])


# ------------------------------------------------------------------------------- what is kept and shown


class _Record:
    """`<out>.progress.json`: what `<out>.part` is made from, and how far it is.

    Args:
      out: the file that is made.
      source: the texts, and the tokenizer or what one is to be trained with.
    """

    def __init__(self, out: Path, source: dict[str, Any]):
        self._out, self._source = out, source
        self._path = out.with_name(f"{out.name}.progress.json")
        self._left: dict[str, Any] = read_json(self._path) if self._path.exists() else {}
        changed = [key for key in source if self._left and self._left["source"].get(key) != source[key]]
        if changed:
            other = "text" if "texts" in changed else "tokenizer"
            logger.info("%s: was begun with another %s; starts over", part_of(out), other)
            self._left = {}

    def trained(self, path: Path) -> Vocabulary | None:
        """The tokenizer that was trained for this source, if it is there."""
        if not self._left or not path.exists():
            return None
        vocabulary = Vocabulary.load(path)
        return vocabulary if vocabulary.fingerprint == self._left["tokenizer"] else None

    def place(self, vocabulary: Vocabulary) -> _Place:
        """Where to go on; the beginning, if the part is missing or of another tokenizer."""
        if not self._left or self._left["tokenizer"] != vocabulary.fingerprint:
            return _Place()
        place = _Place(**self._left["place"])
        if written(self._out, vocabulary.dtype) < place.tokens:
            return _Place()
        logger.info("%s: goes on behind %d tokens", part_of(self._out), place.tokens)
        return place

    def write(self, vocabulary: Vocabulary, place: _Place) -> None:
        """Says that the part has come to `place`; its tokens are on the disk by now."""
        kept = {"source": self._source, "tokenizer": vocabulary.fingerprint, "place": asdict(place)}
        write_json(self._path, kept)

    def remove(self) -> None:
        """There is nothing to go on with."""
        self._path.unlink()


def _identity(text: Path) -> tuple[int, str]:
    """A file's size, and what changes when the file does, without reading all of it."""
    try:
        with open(text, "rb") as file:
            status, head = os.fstat(file.fileno()), file.read(_HEAD)
    except OSError as error:
        raise UserError(f"{text}: cannot be read: {error.strerror}; give a UTF-8 text file") from None
    digest = hashlib.blake2b(head, digest_size=8).hexdigest()
    return status.st_size, f"{status.st_size} bytes, {status.st_mtime_ns} ns, {digest}"


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
