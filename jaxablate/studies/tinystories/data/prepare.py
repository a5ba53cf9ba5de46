"""Stories and texts brought to files of tokens, once, below the cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from jaxablate import cache
from jaxablate.errors import UserError
from jaxablate.studies.tinystories.config import LmData
from jaxablate.studies.tinystories.data.stories import GENERATOR, Story, stories
from jaxablate.studies.tinystories.metrics import OTHER
from jaxablate.text.documents import documents
from jaxablate.text.tokenizer import END_OF_TEXT, Vocabulary
from jaxablate.text.tokens import TokenWriter

log = logging.getLogger(__name__)

FORMAT = 1  # of what is prepared, part of the cache key: raise it when the same text makes other files
HELD_OUT = 20  # one document in so many is for validation: 5 %
TRAIN, VAL, KINDS, TOKENIZER = "train.npy", "val.npy", "kinds.npy", "tokenizer.json"

_AT_ONCE = 1 << 22  # characters that are encoded in one call

Documents = Callable[[], Iterable[str]]  # anew at each call


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
        texts = [story.text for story in made]
        vocabulary = _build(scratch, data, given, lambda: texts[:kept], lambda: texts[kept:])
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
            train, val = (lambda: documents(data.train)), (lambda: documents(data.val))
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


def split(path: str | Path) -> tuple[Documents, Documents]:
    """The documents of a file for training, and the last 5 % of them for validation (see `prepared_text`)."""
    count = sum(1 for _ in documents(path))
    if kept := count - count // HELD_OUT if count >= HELD_OUT else 0:
        return (lambda: islice(documents(path), kept)), (lambda: islice(documents(path), kept, None))
    train, val = cut(list(documents(path)))
    return (lambda: train), (lambda: val)


def cut(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Documents up to 95 % of their characters, and the rest; one of them is cut in two."""
    total = sum(map(len, texts))
    left, train, val = total - total // HELD_OUT, [], []
    for text in texts:
        train.append(text[:left])
        val.append(text[left:])
        left -= len(train[-1])
    return [text for text in train if text], [text for text in val if text]


def kinds_of_tokens(made: Sequence[Story], vocabulary: Vocabulary) -> np.ndarray:
    """The kind of each token of the stories as `encode_to` writes them, uint8: that of its last character."""
    separator, parts = np.array([OTHER], np.uint8), []
    for story, ends in zip(made, vocabulary.ends([story.text for story in made]), strict=True):
        parts += [separator, story.kinds[np.maximum(ends - 1, 0)]]
    return np.concatenate(parts[1:])


def encode_to(path: Path, texts: Iterable[str], vocabulary: Vocabulary) -> None:
    """Writes the ids of documents as `.npy`, with END_OF_TEXT between them; memory stays flat.

    Raises:
      UserError: several documents, and a tokenizer that has no END_OF_TEXT.
    """
    with TokenWriter(path, vocabulary.dtype) as writer:
        for batch in _batches(texts):
            for ids in vocabulary.encode(batch):
                if writer.tokens:
                    writer.append(_separator(vocabulary))
                writer.append(ids)
        writer.finish()


def _separator(vocabulary: Vocabulary) -> np.ndarray:
    if vocabulary.end_of_text is None:
        raise UserError(
            f"data.tokenizer: has no token {END_OF_TEXT} to put between documents; add it, or let data.tokenizer='' "
            f"train one"
        )
    return np.array([vocabulary.end_of_text], vocabulary.dtype)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Documents in portions that keep every core busy for a while."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _build(
    folder: Path, data: LmData, given: Vocabulary | None, train: Documents, val: Documents
) -> Vocabulary:
    vocabulary = given or Vocabulary.train(train(), data.vocab_size, data.level)
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
