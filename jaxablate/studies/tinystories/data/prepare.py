"""Stories and texts brought to files of tokens, once, below the cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from jaxablate import cache
from jaxablate.errors import UserError
from jaxablate.studies.tinystories.config import LmData
from jaxablate.studies.tinystories.data.stories import GENERATOR, Story, stories
from jaxablate.studies.tinystories.metrics import OTHER
from jaxablate.text.encode import Part, encoded, parts
from jaxablate.text.tokenizer import Vocabulary
from jaxablate.text.tokens import TokenWriter

log = logging.getLogger(__name__)

FORMAT = 2  # of what is prepared, part of the cache key: raise it when the same text makes other files
HELD_OUT = 20  # one document in so many is for validation: 5 %
TRAIN, VAL, KINDS, TOKENIZER = "train.npy", "val.npy", "kinds.npy", "tokenizer.json"

Parts = Callable[[], Iterator[Part]]  # anew at each call


def prepared_stories(data: LmData, given: Vocabulary | None, folder: Path) -> Path:
    """The folder with the tokens of generated stories: TRAIN, VAL, TOKENIZER and the KINDS of VAL's tokens."""
    key = cache.fingerprint(
        "stories", FORMAT, GENERATOR, data.stories_characters, data.stories_seed, *_tokenizer_key(data, given)
    )

    def build(scratch: Path) -> None:
        made = stories(data.stories_characters, data.stories_seed)
        if len(made) < 2:
            raise UserError(
                f"data.stories_characters={data.stories_characters}: is a single story, and validation needs one "
                f"of its own; generate more"
            )
        kept = len(made) - max(1, len(made) // HELD_OUT)
        vocabulary = _build(scratch, data, given, lambda: _told(made[:kept]), lambda: _told(made[kept:]))
        np.save(scratch / KINDS, kinds_of_tokens(made[kept:], vocabulary), allow_pickle=False)

    return _built(folder / key, f"{data.stories_characters:,} characters of stories", build)


def prepared_text(data: LmData, given: Vocabulary | None, folder: Path) -> Path:
    """The folder with the tokens of a text: TRAIN, VAL, TOKENIZER.

    Without `data.val`, the last 5 % of the documents of `data.train` are held out; of fewer than 20
    documents (a text without separators is one), the last 5 % of the characters.

    Raises:
      UserError: a file that cannot be read, or two with the same content.
    """
    digests = [_digest(f"data.{name}", getattr(data, name)) for name in ("train", "val")]
    if digests[0] == digests[1]:
        raise same_content(data)
    key = cache.fingerprint("text", FORMAT, *digests, *_tokenizer_key(data, given))

    def build(scratch: Path) -> None:
        if data.val:
            train, val = (lambda: parts([data.train])), (lambda: parts([data.val]))
        else:
            train, val = split(data.train)
        _build(scratch, data, given, train, val)

    return _built(folder / key, data.train, build)


def same_content(data: LmData) -> UserError:
    """What is said when training and validation are the same tokens."""
    return UserError(
        f"data.val={data.val}: is the same as data.train={data.train}; validation must not be trained on, give "
        f"other text"
    )


def split(path: str | Path) -> tuple[Parts, Parts]:
    """The documents of a file for training, and the last 5 % of them for validation (see `prepared_text`).

    Blank ones do not count. The separator between the two sides belongs to neither.
    """
    count, characters = _documents_and_characters(parts([path]))
    if count >= HELD_OUT:
        _, left = _documents_and_characters(parts([path]), count - count // HELD_OUT)
    else:
        left = characters - characters // HELD_OUT
    return (lambda: head(parts([path]), left)), (lambda: tail(parts([path]), left))


def head(of: Iterator[Part], characters: int) -> Iterator[Part]:
    """The first so many characters, not counting separators, and what is between them."""
    for part in of:
        if len(part.text) >= characters:
            yield Part(part.text[:characters], "nothing")
            return
        characters -= len(part.text)
        yield part


def tail(of: Iterator[Part], characters: int) -> Iterator[Part]:
    """What is behind the first so many characters, from the next one on."""
    for part in of:
        if len(part.text) > characters:
            yield part._replace(text=part.text[characters:])
            yield from of
        characters -= len(part.text)


def _documents_and_characters(of: Iterator[Part], most: int | None = None) -> tuple[int, int]:
    """How many documents there are that are not blank, and all characters up to the end of the last (or `most`-th)."""
    documents, characters, blank = 0, 0, True
    for part in of:
        characters += len(part.text)
        blank = blank and (part.text.isspace() or not part.text)
        if part.then == "separator":
            documents, blank = documents + (not blank), True
        if documents == most:
            break
    return documents + (not blank), characters


def _told(made: Sequence[Story]) -> Iterator[Part]:
    for number, story in enumerate(made, start=1):
        then: Literal["separator", "nothing"] = "separator" if number < len(made) else "nothing"
        yield Part(story.text, then)


def kinds_of_tokens(made: Sequence[Story], vocabulary: Vocabulary) -> np.ndarray:
    """The kind of each token of the stories as `encode_to` writes them, uint8: that of its last character."""
    separator, parts = np.array([OTHER], np.uint8), []
    for story, ends in zip(made, vocabulary.ends([story.text for story in made]), strict=True):
        parts += [separator, story.kinds[np.maximum(ends - 1, 0)]]
    return np.concatenate(parts[1:])


def encode_to(path: Path, of: Iterable[Part], vocabulary: Vocabulary) -> None:
    """Writes the ids of parts, and of what is between them, as `.npy`; memory stays flat."""
    with TokenWriter(path) as writer:
        writer.begin(vocabulary.dtype)
        for ids, _ in encoded(vocabulary, of):
            writer.append(ids)
        writer.finish()


def _build(folder: Path, data: LmData, given: Vocabulary | None, train: Parts, val: Parts) -> Vocabulary:
    vocabulary = given or Vocabulary.train((part.text for part in train()), data.vocab_size, data.level)
    vocabulary.save(folder / TOKENIZER)
    encode_to(folder / TRAIN, train(), vocabulary)
    encode_to(folder / VAL, val(), vocabulary)
    return vocabulary


def _built(folder: Path, what: str, build: Callable[[Path], None]) -> Path:
    def announced(scratch: Path) -> None:
        log.info("tokenizing %s into %s", what, folder)
        build(scratch)

    cache.built_folder(folder, announced)
    return folder


def _tokenizer_key(data: LmData, given: Vocabulary | None) -> list[object]:
    return [given.fingerprint] if given else [data.level, data.vocab_size]


def _digest(field: str, path: str) -> str:
    """The digest of a file's content; empty for no path."""
    try:
        return cache.file_digest(Path(path)) if path else ""
    except OSError as error:
        raise UserError(f"{field}={path}: cannot be read: {error.strerror}; give a UTF-8 text file") from None
