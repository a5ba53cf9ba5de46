"""Reports as text, and text as token ids.

Both tokenizers give (n, text_length) int32: [CLS] first, [SEP] last, 0 ([PAD]) after it; a text that
is too long loses its end, never its [SEP].
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from jaxablate.errors import UserError

PAD, UNK, CLS, SEP = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
SPECIAL = (PAD, UNK, CLS, SEP)

_DELETED = str.maketrans("", "", "\"'()")
_WORD = re.compile(r"[^\W_]+")


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids. Plain data, so that it travels to loader processes."""

    @property
    def vocab_size(self) -> int:
        """Ids lie in [0, vocab_size)."""
        ...

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """(n, text_length) ids of n texts."""
        ...


def clean_report(text: str) -> str:
    """A report as the model reads it: "Not given." removed, quotes and parentheses deleted."""
    return text.replace("Not given.", "").translate(_DELETED).strip()


def split_words(text: str) -> list[str]:
    """Lower-case runs of letters and digits."""
    return _WORD.findall(text.lower())


def _frame(
    rows: Iterable[Sequence[int]], count: int, length: int, cls: int, sep: int
) -> npt.NDArray[np.int32]:
    ids = np.zeros((count, length), np.int32)
    for out, row in zip(ids, rows, strict=True):
        kept = [cls, *row[: length - 2], sep]
        out[: len(kept)] = kept
    return ids


@dataclass(frozen=True)
class WordTokenizer:
    """One id a word. `vocabulary[id]` is the word; ids 0 to 3 are [PAD] [UNK] [CLS] [SEP]."""

    vocabulary: tuple[str, ...]
    text_length: int
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", {word: i for i, word in enumerate(self.vocabulary)})

    @property
    def vocab_size(self) -> int:
        """Words and special tokens."""
        return len(self.vocabulary)

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """(n, text_length) ids; a word outside the vocabulary is [UNK]=1."""
        rows = ([self._ids.get(word, 1) for word in split_words(text)] for text in texts)
        return _frame(rows, len(texts), self.text_length, cls=2, sep=3)


def build_words(
    reports: Iterable[str], prompts: Iterable[str], vocab_size: int, text_length: int
) -> WordTokenizer:
    """The word vocabulary of the training reports and all prompts, most frequent first, then by alphabet.

    Words of the prompts are always kept, because an unknown word in a prompt would make two findings
    the same question; the most frequent other words fill what `vocab_size` leaves. Raises UserError
    if the prompts alone do not fit, or if `text_length` cuts a prompt.
    """
    prompts = list(prompts)
    prompt_words = [split_words(prompt) for prompt in prompts]
    needed = {word for words in prompt_words for word in words}
    room = vocab_size - len(SPECIAL)
    if len(needed) > room:
        raise UserError(
            f"data.vocab_size={vocab_size}: the prompts alone need {len(needed) + len(SPECIAL)} entries; "
            f"use at least that"
        )
    longest = max((len(words) for words in prompt_words), default=0) + 2
    if longest > text_length:
        raise UserError(
            f"data.text_length={text_length}: the longest prompt has {longest} tokens; use at least that"
        )
    counts = Counter(word for text in (*reports, *prompts) for word in split_words(text))

    def rank(word: str) -> tuple[int, str]:
        return -counts[word], word

    others = sorted((word for word in counts if word not in needed), key=rank)
    words = sorted((*needed, *others[: room - len(needed)]), key=rank)
    return WordTokenizer((*SPECIAL, *words), text_length)


@dataclass(frozen=True)
class WordpieceTokenizer:
    """BERT's lower-casing word pieces, by the `tokenizers` package. Made by `open_wordpiece`."""

    vocab_file: Path
    text_length: int
    vocab_size: int
    cls: int
    sep: int

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """(n, text_length) ids."""
        encoded = _wordpiece(self.vocab_file).encode_batch(list(texts), add_special_tokens=False)
        return _frame((e.ids for e in encoded), len(texts), self.text_length, self.cls, self.sep)


def _wordpiece(vocab_file: Path) -> Any:
    try:
        from tokenizers import BertWordPieceTokenizer
    except ImportError:
        raise UserError(
            "data.tokenizer=wordpiece needs the package 'tokenizers', which is not installed: "
            "pip install tokenizers, or set data.tokenizer=words"
        ) from None
    return BertWordPieceTokenizer(str(vocab_file), lowercase=True)


def open_wordpiece(vocab_file: str, vocab_size: int, text_length: int) -> WordpieceTokenizer:
    """The tokenizer of a BERT `vocab.txt` (one piece a line, the line number is the id).

    Raises UserError if the file is not given, not there, lacks a special token, has [PAD] anywhere but
    in line 1, or has more pieces than the model's `vocab_size`.
    """
    if not vocab_file:
        raise UserError(
            "data.vocab_file is empty: data.tokenizer=wordpiece needs BERT's vocab.txt; give its path"
        )
    path = Path(vocab_file)
    if not path.is_file():
        raise UserError(f"data.vocab_file={vocab_file}: no such file; give the path of BERT's vocab.txt")
    pieces = path.read_text(encoding="utf-8").splitlines()
    for token in SPECIAL:
        if token not in pieces:
            raise UserError(f"data.vocab_file={vocab_file}: has no line {token}; use BERT's vocab.txt")
    if pieces[0] != PAD:
        raise UserError(
            f"data.vocab_file={vocab_file}: line 1 is '{pieces[0]}'; it must be [PAD], whose id is 0"
        )
    if len(pieces) > vocab_size:
        raise UserError(
            f"data.vocab_size={vocab_size}: {vocab_file} has {len(pieces)} pieces; "
            f"set data.vocab_size={len(pieces)}"
        )
    _wordpiece(path)  # a missing package is found now, not at the first batch
    return WordpieceTokenizer(path, text_length, len(pieces), pieces.index(CLS), pieces.index(SEP))
