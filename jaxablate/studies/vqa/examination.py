"""The test questions as a run is asked them once, at its end: what it answered, how good that is, and what is kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from jaxablate.decoding import Continued
from jaxablate.studies.vqa import inference, metrics, results
from jaxablate.studies.vqa.data import Question, VqaSource
from jaxablate.studies.vqa.data.rows import NO_ROW, StageBatches
from jaxablate.studies.vqa.metrics import Answer

TOO_LONG = "not asked: the prompt is too long for data.max_text"


@dataclass(frozen=True)
class Examination:
    """The test questions of some stages.

    Attributes:
      stages: whose questions count.
      limit: most tokens of an answer.
      untaught: of these stages those that no expert was trained for: their questions are not asked, and wrong.
    """

    source: VqaSource
    stages: Collection[int]
    limit: int
    untaught: Collection[int] = ()

    @cached_property
    def batches(self) -> StageBatches:
        """What is asked, each batch of one stage; its pictures are read when it is its turn."""
        return self.source.test(set(self.stages) - set(self.untaught))

    @cached_property
    def numbers(self) -> list[int]:
        """Of the questions, those too long to be asked among them, their places among all test questions."""
        every = enumerate(self.source.questions_of("test"))
        return [number for number, question in every if question.stage in self.stages]

    @cached_property
    def questions(self) -> list[Question]:
        """The questions themselves."""
        every = self.source.questions_of("test")
        return [every[number] for number in self.numbers]

    def answers(self, outputs: Sequence[Mapping[str, Any]]) -> dict[str, list[Answer]]:
        """By pass what was said to each question; None to those that were not asked.

        Args:
          outputs: of each batch, `Continued` on the host by pass.
        """
        place = {number: n for n, number in enumerate(self.numbers)}
        found: dict[str, list[Answer]] = {name: [None] * len(place) for name in outputs[0]}
        for numbers, output in zip(self.batches.numbers, outputs, strict=True):
            said = inference.texts(output, self.source.language.vocabulary)
            for n, number in enumerate(numbers):
                if number != NO_ROW:
                    for name, texts in said.items():
                        found[name][place[number]] = texts[n]
        return found

    def score(self, outputs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Metrics of the last pass; of several passes, those of the others and what each brought."""
        passes = self.answers(outputs)
        found = metrics.score(passes[max(passes)], self.questions)
        return found if len(passes) == 1 else found | metrics.refinement(passes, self.questions)

    def trivial(self, outputs: Sequence[Mapping[str, Any]]) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """Always the most frequent answer of the question's type; and nothing at all."""
        constant = dict(zip(self.numbers, metrics.constant_answers(self.questions), strict=True))
        ids = {text: self.source.language.text(text)[: self.limit] for text in set(constant.values())}

        def said(answer: Sequence[Sequence[int]]) -> dict[str, Any]:
            tokens = np.zeros((len(answer), self.limit), np.int32)
            for row, own in zip(tokens, answer, strict=True):
                row[: len(own)] = own
            lengths = np.array([len(own) for own in answer], np.int32)
            given: Any = Continued(tokens, lengths, np.zeros_like(lengths))  # pyright: ignore[reportArgumentType]
            found: dict[str, Any] = dict.fromkeys(outputs[0], given)
            return found

        asked = self.batches.numbers
        return {
            "constant": [said([ids[constant[n]] if n != NO_ROW else [] for n in each]) for each in asked],
            "empty": [said([[]] * len(each)) for each in asked],
        }

    def keep(self, outputs: Sequence[Mapping[str, Any]]) -> dict[str, npt.NDArray[Any]]:
        """Every question with its answers, and the pictures of a few, for the report."""
        errors = {n: TOO_LONG for n, number in enumerate(self.numbers) if number in self._unfit}
        for n, question in enumerate(self.questions):
            if question.stage in self.untaught:
                errors[n] = f"{results.NO_EXPERT} {question.stage}"
        return results.keep(
            self.questions,
            self.answers(outputs),
            rows=self.numbers,
            errors=errors,
            remarks=self.source.remarks,
            pictures=self._pictures(results.examples(self.questions)),
        )

    @property
    def _unfit(self) -> frozenset[int]:
        return frozenset(self.source.unfit["test"])

    def _pictures(self, places: Sequence[int]) -> dict[int, npt.NDArray[np.uint8]]:
        """By the question's number its picture as it was before the model's own preparation."""
        rows = self.source.rows["test"]
        path = {
            number: rows.pictures.paths[p] for number, p in zip(rows.row.tolist(), rows.picture, strict=True)
        }
        found = {}
        for number in (self.numbers[place] for place in places):
            if number in path:
                with Image.open(path[number]) as image:
                    found[number] = np.asarray(image.convert("RGB"))
        return found
