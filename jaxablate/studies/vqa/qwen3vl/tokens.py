"""Questions and answers as the chat template writes them, in the ids of a checkpoint's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxablate.errors import UserError
from jaxablate.studies.vqa.qwen3vl.config import Qwen3VlConfig
from jaxablate.studies.vqa.qwen3vl.images import Picture
from jaxablate.text.tokenizer import Vocabulary

START, END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
OTHERS = ("<|endoftext|>", "<|video_pad|>")
SPECIAL = (START, END, VISION_START, VISION_END, IMAGE, *OTHERS)


@dataclass(frozen=True)
class Chat:
    """One user's turn, with its pictures before its text, and the assistant's answer; made by `Chat.load`.

    Attributes:
      ids: of the special tokens.
      merge: patches along a side of one visual token.
    """

    vocabulary: Vocabulary
    ids: dict[str, int]
    merge: int

    @classmethod
    def load(cls, folder: str | Path, config: Qwen3VlConfig) -> Chat:
        """The tokenizer.json of a checkpoint.

        Raises:
          UserError: the file cannot be read, lacks a special token, or is another model's.
        """
        path = Path(folder).expanduser() / "tokenizer.json"
        vocabulary = Vocabulary.load(path)
        ids = {}
        for token in SPECIAL:
            encoded = vocabulary.encode([token])[0]
            if len(encoded) != 1:
                raise UserError(f"{path}: has no token {token}; give the tokenizer of a Qwen3-VL checkpoint")
            ids[token] = int(encoded[0])
        if ids[IMAGE] != config.image_token:
            raise UserError(
                f"{path}: {IMAGE} is {ids[IMAGE]}, but image_token_id={config.image_token} in config.json; "
                f"take both from one checkpoint"
            )
        if vocabulary.size > config.text.vocab:
            raise UserError(
                f"{path}: has {vocabulary.size} tokens, but vocab_size={config.text.vocab} in config.json; "
                f"take both from one checkpoint"
            )
        return cls(vocabulary, ids, config.vision.merge)

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return self.ids[END]

    def prompt(self, text: str, pictures: Sequence[Picture] = ()) -> np.ndarray:
        """The ids of a question, up to where its answer begins: int32 (length,).

        Raises:
          UserError: the text holds a special token.
        """
        turn = "user\n"
        ids = [self.ids[START]]
        for picture in pictures:
            visual = [self.ids[IMAGE]] * picture.visual_tokens(self.merge)
            ids += [*self._text(turn), self.ids[VISION_START], *visual, self.ids[VISION_END]]
            turn = ""
        # Text between special tokens is encoded in one piece: a token may reach over the end of a line.
        ids += [*self._text(turn + _plain(text)), self.ids[END], *self._text("\n")]
        return np.array([*ids, self.ids[START], *self._text("assistant\n")], np.int32)

    def answer(self, text: str) -> np.ndarray:
        """The ids of an answer and of the token that ends it: int32 (length,).

        Raises:
          UserError: the text holds a special token.
        """
        return np.array([*self._text(_plain(text)), self.end], np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of an answer, without the token that ends it."""
        return self.vocabulary.decode(ids)

    def _text(self, text: str) -> list[int]:
        return self.vocabulary.encode([text])[0].tolist()


def _plain(text: str) -> str:
    """`text`, if it holds no special token: one in a question would end its turn, or stand for a picture."""
    if found := sorted((text.index(token), token) for token in SPECIAL if token in text):
        raise UserError(f"text {text[:60]!r}: holds the special token {found[0][1]}; leave it out")
    return text
