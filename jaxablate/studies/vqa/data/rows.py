"""Questions as what a model is trained on and asked: tokens with the picture's places among them, and its patches.

Imports no jax of its own; reader processes get a few arrays and the pictures' places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jaxablate.data import Batch
from jaxablate.studies.vqa.data.pictures import Pictures

Ints = npt.NDArray[np.int32]
# What a row holds: the answer as well, with targets; or the prompt, to be answered.
Form = Literal["answered", "prompt"]

NOT_ASKED = -100  # a target that counts for nothing
NO_ROW = -1  # of a row that only fills up a batch


@dataclass(frozen=True)
class Rows:
    """Questions as items, each with its answer as targets; see `answered` and `prompt` for the keys.

    Attributes:
      texts: ids of the different prompts and answers, int32 (length,) each; a prompt holds one `image_token`.
      prompt, answer: int32 (rows,), which of the texts.
      picture: int32 (rows,), which of the pictures.
      visual: int32 (rows,), how many tokens the row's picture takes.
      stage: int32 (rows,).
      row: int32 (rows,), the questions' numbers in their split.
      width: tokens of an item.
    """

    pictures: Pictures
    texts: tuple[Ints, ...]
    prompt: Ints
    answer: Ints
    picture: Ints
    visual: Ints
    stage: Ints
    row: Ints
    image_token: int
    width: int

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: int, /) -> Batch:
        """`answered`, and `index` int32 (), by which `check` sees the order that training takes them in."""
        return {**self.answered(index, self.width), "index": np.int32(index)}

    def answered(self, index: int, width: int) -> Batch:
        """One question with its answer.

        `tokens` int32 (width,): the picture's places, the prompt, the answer; zeros behind. `targets` int32 (width,):
        of each token the one behind it, where that belongs to the answer or ends it; else -100. `patches` uint8
        (1, P, values) and `grids` int32 (1, 2) as `qwen3vl.images` has them. `stage`, `row` int32 ().
        """
        prompt, answer = self._prompt(index), self.texts[self.answer[index]]
        whole = np.concatenate([prompt, answer])
        tokens, targets = np.zeros(width, np.int32), np.full(width, NOT_ASKED, np.int32)
        tokens[: len(whole) - 1] = whole[:-1]
        targets[len(prompt) - 1 : len(whole) - 1] = answer
        return {"tokens": tokens, "targets": targets, **self._of(index)}

    def asked(self, index: int, width: int) -> Batch:
        """One question without its answer: `tokens` (width,), of which `length` int32 () are the prompt; the others."""
        prompt = self._prompt(index)
        tokens = np.zeros(width, np.int32)
        tokens[: len(prompt)] = prompt
        return {"tokens": tokens, "length": np.int32(len(prompt)), **self._of(index)}

    def text_lengths(self, form: Form) -> npt.NDArray[np.int64]:
        """Tokens of each row beside its picture's, what ends an answer included: (rows,)."""
        lengths = np.array([len(text) for text in self.texts], np.int64)
        prompts = lengths[self.prompt] - 1  # one stands for the picture
        return prompts if form == "prompt" else prompts + lengths[self.answer]

    def longest(self, form: Form) -> int:
        """The width that holds every row. What ends an answer is a target alone."""
        return int(np.max(self.text_lengths(form) + self.visual, initial=0)) - (form == "answered")

    def taken(self, chosen: npt.NDArray[np.integer]) -> Rows:
        """Some of the rows."""
        return Rows(
            self.pictures, self.texts, self.prompt[chosen], self.answer[chosen], self.picture[chosen],
            self.visual[chosen], self.stage[chosen], self.row[chosen], self.image_token, self.width,
        )  # fmt: skip

    def _prompt(self, index: int) -> Ints:
        ids = self.texts[self.prompt[index]]
        return np.repeat(ids, np.where(ids == self.image_token, self.visual[index], 1))

    def _of(self, index: int) -> Batch:
        patches, grids = self.pictures.padded(int(self.picture[index]))
        return {"patches": patches, "grids": grids, "stage": self.stage[index], "row": self.row[index]}


@dataclass(frozen=True)
class StageBatches(Sequence[Batch]):
    """Batches of rows of one stage each, one stage after another; each is made when it is asked for.

    All have the same shape: where a stage's last batch is not full, its last row stands again, with `row` -1 and no
    target.
    """

    rows: Rows
    form: Form
    batch_size: int
    width: int

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        return self._batch(self._chosen[index])

    @cached_property
    def _chosen(self) -> list[npt.NDArray[np.intp]]:
        """The rows of each batch."""
        of_stages = [np.flatnonzero(self.rows.stage == stage) for stage in np.unique(self.rows.stage)]
        size = self.batch_size
        return [there[at : at + size] for there in of_stages for at in range(0, len(there), size)]

    @property
    def numbers(self) -> list[list[int]]:
        """Of each batch the questions' numbers, those that fill it up among them."""
        every = [self.rows.row[chosen].tolist() for chosen in self._chosen]
        return [own + [NO_ROW] * (self.batch_size - len(own)) for own in every]

    def _batch(self, chosen: npt.NDArray[np.intp]) -> Batch:
        make = self.rows.answered if self.form == "answered" else self.rows.asked
        made = [make(int(i), self.width) for i in chosen]
        if missing := self.batch_size - len(made):
            filler = {**made[-1], "row": np.int32(NO_ROW)}
            if "targets" in filler:
                filler["targets"] = np.full_like(filler["targets"], NOT_ASKED)
            made += [filler] * missing
        return {key: np.stack([one[key] for one in made]) for key in made[0]}
