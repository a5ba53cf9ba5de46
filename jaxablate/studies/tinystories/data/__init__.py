"""The data of the TinyStories study: generated stories, a text or files of tokens behind one `open_corpus`.

Imports no jax, so that loader processes and login nodes start fast.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jaxablate import cache
from jaxablate.errors import UserError
from jaxablate.rules import Rule, at_least, enforce
from jaxablate.studies.tinystories.config import LmData
from jaxablate.studies.tinystories.data import prepare
from jaxablate.studies.tinystories.data.corpus import Corpus, Windows
from jaxablate.text.tokenizer import SMALLEST, Vocabulary
from jaxablate.text.tokens import open_tokens

__all__ = ["Corpus", "Windows", "open_corpus", "rules"]

_AT_ONCE = 1 << 22  # ids
_READ_BY = {
    "train": ("text", "tokens"),
    "val": ("text", "tokens"),
    "level": ("stories", "text"),
    "stories_characters": ("stories",),
    "stories_seed": ("stories",),
}
_PURPOSE = {"train": "training", "val": "validation"}


def open_corpus(data: LmData, cache_dir: Path, *, eval_batch_size: int) -> Corpus:
    """Find, check and prepare everything `data` names; what it returns can be trained on.

    Tokens of stories and texts stay below `cache_dir` and are used again. Raises UserError, one line, for
    any fault of config or data.
    """
    enforce(rules(data), prefix="")
    _check_files(data)
    given = _given_vocabulary(data)
    if data.source == "tokens":
        places, folder = {"train": Path(data.train), "val": Path(data.val)}, None
    else:
        prepared = prepare.prepared_stories if data.source == "stories" else prepare.prepared_text
        folder = prepared(data, given, Path(cache_dir).absolute() / "tokens")
        places = {"train": folder / prepare.TRAIN, "val": folder / prepare.VAL}
    train, val = (_windows(data, name, place) for name, place in places.items())
    (train_digest, counts), (val_digest, _) = (_survey(side.ids, data.vocab_size) for side in (train, val))
    if train_digest == val_digest:
        raise prepare.same_content(data)
    generated = data.source == "stories"
    return Corpus(
        train=train,
        val=val,
        counts=counts,
        kinds=np.load(folder / prepare.KINDS, allow_pickle=False) if folder and generated else None,
        vocabulary=given or (Vocabulary.load(folder / prepare.TOKENIZER) if folder else None),
        fingerprint=cache.fingerprint(train_digest, val_digest),
        eval_batches=data.eval_batches,
        eval_batch_size=eval_batch_size,
    )


def rules(data: LmData) -> Iterator[Rule]:
    """What must hold before anything is read or generated: nothing is set that nothing reads, and sizes can be."""
    for name, sources in _READ_BY.items():
        if data.source not in sources:
            default, who = getattr(LmData, name), " and ".join(sources)
            detail = (
                f"is read by data.source={who}, not by {data.source}; change that, or leave it at {default!r}"
            )
            value = getattr(data, name)
            yield Rule(f"data.{name}", value, value == default, detail)
    if data.source in _READ_BY["level"]:
        detail = "is not read beside data.tokenizer, which has its own; leave one of them out"
        yield Rule("data.level", data.level, not data.tokenizer or data.level == LmData.level, detail)
        least = 1 if data.tokenizer else SMALLEST[data.level]
        detail = f"must be {least} or more at level {data.level}"
        yield Rule("data.vocab_size", data.vocab_size, data.vocab_size >= least, detail)
    yield at_least(1, "data.stories_characters", data.stories_characters)
    yield at_least(0, "data.stories_seed", data.stories_seed)


def _check_files(data: LmData) -> None:
    for name, needed in (("train", ("text", "tokens")), ("val", ("tokens",))):
        if data.source in needed and not getattr(data, name):
            raise UserError(f"data.{name} is empty: data.source={data.source} needs that file; give its path")


def _given_vocabulary(data: LmData) -> Vocabulary | None:
    if not data.tokenizer:
        return None
    vocabulary = Vocabulary.load(data.tokenizer)
    if vocabulary.size != data.vocab_size:
        raise UserError(
            f"data.vocab_size={data.vocab_size}: data.tokenizer={data.tokenizer} has {vocabulary.size} ids; set "
            f"data.vocab_size={vocabulary.size}"
        )
    return vocabulary


def _windows(data: LmData, name: str, place: Path) -> Windows:
    """The windows of one side; it has one at least, and all its ids are in the vocabulary."""
    field, least = f"data.{name}", data.context + 1
    if data.source == "tokens":
        ids = open_tokens(place, field=field, vocab_size=data.vocab_size, at_least=least)
    else:
        ids = np.load(place, mmap_mode="r", allow_pickle=False)
    if len(ids) < least:
        if data.source == "stories":
            where = f"data.stories_characters={data.stories_characters}"
        else:
            where = f"{field}={getattr(data, name)}" if getattr(data, name) else f"data.train={data.train}"
        raise UserError(
            f"{where}: makes {len(ids)} tokens for {_PURPOSE[name]}, and data.context={data.context} needs {least}; "
            f"give a longer text or a shorter context"
        )
    assert isinstance(ids, np.memmap)
    return Windows.of(ids, data.context)


def _survey(ids: npt.NDArray[np.integer], vocab_size: int) -> tuple[str, npt.NDArray[np.int64]]:
    """A digest of ids, whatever type and file they are in, and how often each is there, (vocab_size,)."""
    digest, counts = hashlib.sha256(), np.zeros(vocab_size, np.int64)
    for start in range(0, len(ids), _AT_ONCE):
        part = ids[start : start + _AT_ONCE]
        digest.update(part.astype("<u4").tobytes())
        counts += np.bincount(part, minlength=vocab_size)
    return digest.hexdigest(), counts
