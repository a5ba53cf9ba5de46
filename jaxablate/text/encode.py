"""From text to ids, streaming: one way for files and for what is generated, so that equal text has equal ids."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from jaxablate.errors import UserError
from jaxablate.text.documents import CHUNK, pieces
from jaxablate.text.tokenizer import END_OF_TEXT, Vocabulary

BATCH = 1 << 20  # characters encoded at a time; of each token the library makes some 200 bytes
AHEAD = 2  # batches in the making while one is used


class Part(NamedTuple):
    """A document, or a piece of one that is too long to be held whole.

    Args:
      text: without the separator.
      then: what is between it and the next part.
      file: which of the texts it is from.
      end: that file's bytes up to the end of this part and of the separator behind it.
    """

    text: str
    then: Literal["separator", "nothing"]
    file: int = 0
    end: int = 0


def parts(texts: Sequence[str | Path], file: int = 0, offset: int = 0) -> Iterator[Part]:
    """UTF-8 files as if they were one, with END_OF_TEXT between them, from byte `offset` of the `file`-th on.

    Raises:
      UserError: a file is missing, empty or binary.
    """
    for number, path in enumerate(texts[file:], start=file):
        for piece in pieces(path, chunk=CHUNK, start=offset if number == file else 0):
            ends = piece.followed_by == "separator"
            joined = piece.followed_by == "end of file" and number + 1 < len(texts)
            yield Part(piece.text, "separator" if ends or joined else "nothing", number, piece.end)


def encoded(vocabulary: Vocabulary, of: Iterable[Part]) -> Iterator[tuple[np.ndarray, list[Part]]]:
    """Batches of parts, each with the ids (tokens,) of their text and of what is between them.

    Memory stays flat however many there are; the next batches are in the making while one is used.

    Raises:
      UserError: a separator is needed, and the vocabulary has none; a character is not in it.
    """
    with ThreadPoolExecutor(AHEAD) as threads:
        waiting: deque[tuple[Future[np.ndarray], list[Part]]] = deque()
        for batch in _batches(of):
            waiting.append((threads.submit(_ids, vocabulary, batch), batch))
            if len(waiting) > AHEAD:
                ids, done = waiting.popleft()
                yield ids.result(), done
        for ids, done in waiting:
            yield ids.result(), done


def _batches(of: Iterable[Part]) -> Iterator[list[Part]]:
    batch, characters = [], 0
    for part in of:
        batch.append(part)
        characters += len(part.text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _ids(vocabulary: Vocabulary, batch: Sequence[Part]) -> np.ndarray:
    end = vocabulary.end_of_text
    if end is None and any(part.then == "separator" for part in batch):
        raise UserError(f"tokenizer: has no {END_OF_TEXT} to separate documents by; give one that has")
    between = {"separator": np.array([end or 0], vocabulary.dtype), "nothing": np.array([], vocabulary.dtype)}
    found = vocabulary.encode([part.text for part in batch])
    pairs = zip(found, batch, strict=True)
    return np.concatenate([array for ids, part in pairs for array in (ids, between[part.then])])
