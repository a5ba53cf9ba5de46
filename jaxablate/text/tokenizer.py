"""Between text and token ids: a tokenizer of the `tokenizers` library, kept as the JSON file of that library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxablate.disk import write_bytes
from jaxablate.errors import UserError

Level = Literal["bpe", "char"]
END_OF_TEXT = "<|endoftext|>"
# Fewer ids cannot do, whatever the text: the 256 bytes, or one character; and END_OF_TEXT.
SMALLEST: Mapping[Level, int] = {"bpe": 257, "char": 2}
_SMALLEST_COUNT = 2  # a pair that occurs once is not worth an id


class Vocabulary:
    """What turns documents into ids and ids into text; made by `load` or `train`.

    Both levels are a BPE model: "bpe" works on bytes, after GPT-2's splitting into words, so that it knows
    every text; "char" has the characters of its training text, and no merges.
    """

    def __init__(self, tokenizer: Tokenizer):
        # Documents are neither cut nor padded here, whatever the file was used for before.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """The tokenizer in a JSON file, made here or by anyone else.

        Raises:
          UserError: the file cannot be read, or is no tokenizer.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read: {error.strerror}; give a tokenizer's JSON file"
            ) from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: is binary; give a tokenizer's JSON file") from None
        try:
            return cls(Tokenizer.from_str(text))
        except Exception as error:  # the library raises nothing narrower
            reason = " ".join(str(error).split())
            raise UserError(
                f"{path}: is not a tokenizer's JSON ({reason}); `jaxablate data tokenize` makes one"
            ) from None

    @classmethod
    def train(cls, documents: Iterable[str], size: int, level: Level) -> Vocabulary:
        """A tokenizer of at most `size` ids, END_OF_TEXT being 0, learned from `documents`, which are read once.

        "bpe" merges the most frequent pair, of equally frequent ones that with the lowest ids, until the
        vocabulary is full or no pair occurs twice (Sennrich et al. 2016, on bytes as in GPT-2).

        Raises:
          UserError: no text; fewer than 257 ids for "bpe", or than the text has characters for "char".
        """
        if size < SMALLEST[level]:
            raise UserError(f"vocab_size={size}: must be {SMALLEST[level]} or more at level {level}")
        seen = _Seen(documents)
        tokenizer = _byte_level(seen, size) if level == "bpe" else _characters(seen, size)
        if not seen.characters:
            raise UserError("tokenizer: there is no text to train it on; give a text that is not empty")
        return cls(tokenizer)

    def save(self, path: str | Path) -> None:
        """Writes the JSON file, atomically.

        Raises:
          UserError: the folder is missing or may not be written.
        """
        try:
            write_bytes(path, self._json.encode())
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}; choose another place") from None

    @cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @cached_property
    def end_of_text(self) -> int | None:
        """The id of END_OF_TEXT; None for another's tokenizer that lacks it."""
        return self._tokenizer.token_to_id(END_OF_TEXT)

    @cached_property
    def fingerprint(self) -> str:
        """Tells apart tokenizers that differ in anything."""
        return hashlib.blake2b(self._json.encode(), digest_size=8).hexdigest()

    @cached_property
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.size <= 1 << 16 else np.uint32)

    def encode(self, documents: Sequence[str]) -> list[np.ndarray]:
        """The ids of each document, (its tokens,) of `dtype`, without a separator. Uses every core.

        Raises:
          UserError: a character that a vocabulary of characters lacks.
        """
        self._check(documents)
        encodings = self._tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def ends(self, documents: Sequence[str]) -> list[np.ndarray]:
        """Where each token of `encode` ends, as the number of the document's characters before: (its tokens,) int64.

        A token that ends within a character, as byte pairs may, ends behind it.
        """
        self._check(documents)
        encodings = self._tokenizer.encode_batch(list(documents), add_special_tokens=False)
        return [np.array([end for _, end in encoding.offsets], np.int64) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; bytes that are no UTF-8, as half a character would be, become U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def _json(self) -> str:
        return self._tokenizer.to_str(pretty=True)

    @cached_property
    def _known(self) -> frozenset[str] | None:
        """The characters, of a vocabulary that knows no others; the library would drop them without a word."""
        tokenizer, model = self._tokenizer, self._tokenizer.model
        splits = tokenizer.pre_tokenizer is not None or tokenizer.normalizer is not None
        if splits or not isinstance(model, models.BPE) or model.unk_token is not None or model.byte_fallback:
            return None
        return frozenset(token for token in tokenizer.get_vocab() if len(token) == 1)

    def _check(self, documents: Sequence[str]) -> None:
        if (known := self._known) is None:
            return
        for document in documents:
            unknown = set(document.replace(END_OF_TEXT, "")) - known
            if not unknown:
                continue
            first = min(unknown, key=document.index)
            raise UserError(
                f"character {first!r} (U+{ord(first):04X}): not among the {len(known)} of the tokenizer; train it "
                f"on a text that has it, or use level bpe"
            )


class _Seen:
    """Hands documents on, and counts their characters."""

    def __init__(self, documents: Iterable[str]):
        self._documents, self.characters = documents, 0

    def __iter__(self) -> Iterator[str]:
        for document in self._documents:
            self.characters += len(document)
            yield document


def _byte_level(documents: Iterable[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=_SMALLEST_COUNT,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(documents), trainer)
    return tokenizer


def _characters(documents: Iterable[str], size: int) -> Tokenizer:
    found: set[str] = set()
    for document in documents:
        found.update(document)
    if len(found) >= size:
        raise UserError(
            f"vocab_size={size}: the text has {len(found)} characters, which with {END_OF_TEXT} need "
            f"{len(found) + 1}; give that many, or use level bpe"
        )
    tokens = [END_OF_TEXT, *sorted(found)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
