"""Between text and tokens: how a prompt is framed, where its picture stands, and what ends an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxablate import cache
from jaxablate.errors import UserError
from jaxablate.studies.vqa.data.prompts import SLOTS, Passes
from jaxablate.studies.vqa.qwen3vl.images import Picture
from jaxablate.studies.vqa.qwen3vl.tokens import IMAGE, SPECIAL, Chat
from jaxablate.text.tokenizer import END_OF_TEXT, Vocabulary

ALPHABET = "\n" + "".join(chr(code) for code in range(ord(" "), ord("~") + 1))


@dataclass(frozen=True)
class Language:
    """What stands around a question's text, in the ids of a vocabulary. Made by `characters` or `of_chat`.

    Attributes:
      before: what a prompt begins with; `image_token` is in it once, in place of all of the picture's tokens.
      after: what stands between the text and the answer.
      end: what ends an answer.
      special: texts that would be taken for tokens with a meaning of their own.
    """

    vocabulary: Vocabulary
    before: tuple[int, ...]
    after: tuple[int, ...]
    end: int
    image_token: int
    special: tuple[str, ...]

    @classmethod
    def characters(cls, image_token: int) -> Language:
        """Single characters, those of ASCII that print and the end of a line; a space stands before an answer.

        Raises ValueError if `image_token` is one of the ids, which are `len(ALPHABET) + 1`.
        """
        vocabulary = Vocabulary.train([ALPHABET], size=len(ALPHABET) + 1, level="char")
        if image_token < vocabulary.size or vocabulary.end_of_text is None:
            raise ValueError(f"image_token={image_token}: must be {vocabulary.size} or more")
        space = int(vocabulary.encode([" "])[0][0])
        return cls(vocabulary, (image_token,), (space,), vocabulary.end_of_text, image_token, (END_OF_TEXT,))

    @classmethod
    def of_chat(cls, chat: Chat) -> Language:
        """The template and the tokens of a checkpoint."""
        one = Picture(np.zeros((chat.merge**2, 0), np.uint8), (chat.merge, chat.merge))
        frame = chat.prompt("", [one]).tolist()
        ends = frame.index(chat.end)
        return cls(
            chat.vocabulary, tuple(frame[:ends]), tuple(frame[ends:]), chat.end, chat.ids[IMAGE], SPECIAL
        )

    @property
    def tail(self) -> int:
        """How many tokens end every prompt behind its text."""
        return len(self.after)

    @property
    def fingerprint(self) -> str:
        """Tells apart languages that make other tokens of a text."""
        return cache.fingerprint(self.vocabulary.fingerprint, self.before, self.after, self.end)

    def prompt(self, text: str) -> np.ndarray:
        """Ids up to where the answer begins, with one `image_token`: int32 (length,). Raises UserError, see `text`."""
        return np.array([*self.before, *self.text(text), *self.after], np.int32)

    def caption(self) -> np.ndarray:
        """Ids of a picture of which nothing is asked: int32 (length,)."""
        return np.array(self.before, np.int32)

    def answer(self, text: str) -> np.ndarray:
        """Ids of an answer and of what ends it: int32 (length,). Raises UserError, see `text`."""
        return np.array([*self.text(text), self.end], np.int32)

    def text(self, text: str) -> list[int]:
        """Ids of a text alone.

        Raises:
          UserError: a character that the vocabulary lacks; a special token, which would end the turn or stand for
            a picture.
        """
        if found := [token for token in self.special if token in text]:
            raise UserError(f"text {text[:60]!r}: holds the special token {found[0]}; leave it out")
        return self.vocabulary.encode([text])[0].tolist()

    def added_by(self, passes: Passes, answer_tokens: int) -> int:
        """By how many tokens the longest of the later passes is longer than the first."""

        def length(pieces: Sequence[str]) -> int:
            return sum(answer_tokens if piece in SLOTS else len(self.text(piece)) for piece in pieces)

        return max(length(passes.second), length(passes.third))
