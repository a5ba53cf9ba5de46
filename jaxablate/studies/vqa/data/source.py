"""Questions of three splits as the source of a run, and captions as that of the base before it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from jaxablate import cache
from jaxablate.data import Batch
from jaxablate.studies.vqa.config import STAGES
from jaxablate.studies.vqa.data.language import Language
from jaxablate.studies.vqa.data.questions import Question
from jaxablate.studies.vqa.data.rows import NOT_ASKED, Rows, StageBatches
from jaxablate.studies.vqa.data.stages import Split


@dataclass(frozen=True)
class VqaSource:
    """The opened data of a run (a `task.Source`).

    Attributes:
      questions: of each split, in the order in which training takes them as they lie.
      rows: of each split, those that fit.
      unfit: of each split, the numbers of the questions that are too long. Of training and validation they are
        dropped; of the test they are not asked, and count as wrong.
      fingerprint: of all questions, pictures and tokens.
      stage: the only one that `train` and `evaluation` are of; None for all.
      remarks: why results may mean little; one sentence each.
    """

    questions: Mapping[Split, tuple[Question, ...]]
    rows: Mapping[Split, Rows]
    unfit: Mapping[Split, tuple[int, ...]]
    language: Language
    fingerprint: str
    eval_batch_size: int
    stage: int | None = None
    remarks: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """How much there is, in a few words."""
        counts = {
            split: [int(np.sum(rows.stage == k)) for k in (1, 2, 3)] for split, rows in self.rows.items()
        }
        told = [f"{sum(each)} {split} ({'/'.join(map(str, each))})" for split, each in counts.items()]
        dropped = sum(map(len, self.unfit.values()))
        return f"questions by stage: {', '.join(told)}" + (f"; {dropped} too long" if dropped else "")

    def of_stage(self, stage: int) -> VqaSource:
        """The same, with one stage's questions alone to be trained and evaluated on; the test stays as it is."""
        return replace(self, stage=stage)

    def questions_of(self, split: Split) -> tuple[Question, ...]:
        """All questions of a split, by the numbers that batches have as `row`."""
        return self.questions[split]

    @cached_property
    def train(self) -> Rows:
        """The training questions, stage by stage as they lie; see `Rows.answered`."""
        return self._of_stage("train")

    @cached_property
    def evaluation(self) -> StageBatches:
        """The validation questions, each batch of one stage."""
        width = self.rows["validation"].longest("answered")  # one program for every stage
        return StageBatches(self._of_stage("validation"), "answered", self.eval_batch_size, width)

    def test(self, stages: Collection[int] = STAGES) -> StageBatches:
        """The test questions of some stages without their answers, each batch of one stage; see `Rows.asked`."""
        rows = self.rows["test"]
        asked = rows.taken(np.flatnonzero(np.isin(rows.stage, list(stages))))
        return StageBatches(asked, "prompt", self.eval_batch_size, rows.longest("prompt"))

    def _of_stage(self, split: Split) -> Rows:
        rows = self.rows[split]
        return rows if self.stage is None else rows.taken(np.flatnonzero(rows.stage == self.stage))

    def score(self, outputs: Sequence[Any]) -> dict[str, float]:
        """{"loss"}: nats per answer token, from {"nll": (B,), "count": (B,)} of each evaluation batch.

        Both are sums over a row's tokens; see `mean_loss`.
        """
        return {"loss": mean_loss(outputs)}

    def trivial(self, outputs: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """All tokens alike, and each as frequent as in training answers."""
        del outputs
        return knowing_nothing(self.rows["train"], self.evaluation, self.language.vocabulary.size)


@dataclass(frozen=True)
class CaptionSource:
    """Pictures with texts, to train the base on (a `task.Source`).

    Attributes:
      rows: of all captions; `held_out` of them, the last, are for evaluation.
    """

    rows: Rows
    held_out: int
    language: Language
    fingerprint: str
    eval_batch_size: int

    @cached_property
    def train(self) -> Rows:
        """The captions to train on, with every token behind the picture as a target; see `Rows.answered`."""
        return self.rows.taken(np.arange(len(self.rows) - self.held_out))

    @cached_property
    def evaluation(self) -> StageBatches:
        """The captions held out, of other scenes."""
        held_out = self.rows.taken(np.arange(len(self.rows) - self.held_out, len(self.rows)))
        return StageBatches(held_out, "answered", self.eval_batch_size, self.rows.longest("answered"))

    def score(self, outputs: Sequence[Any]) -> dict[str, float]:
        """{"loss"}, as of questions."""
        return {"loss": mean_loss(outputs)}

    def trivial(self, outputs: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """All tokens alike, and each as frequent as in training."""
        del outputs
        return knowing_nothing(self.train, self.evaluation, self.language.vocabulary.size)


def mean_loss(outputs: Sequence[Any]) -> float:
    """Nats per token: the sum of all losses by the number of all tokens, so that no batch counts for more."""
    tokens = sum(int(np.sum(output["count"])) for output in outputs)
    return math.fsum(float(np.sum(output["nll"], dtype=np.float64)) for output in outputs) / tokens


def knowing_nothing(
    train: Rows, evaluation: Sequence[Batch], vocabulary: int
) -> Mapping[str, Sequence[Mapping[str, np.ndarray]]]:
    """What predictors that see neither picture nor question would give for each batch: {"nll", "count"}.

    `uniform` holds all tokens for alike, `frequency` each for as likely as among the training answers' (plus one).
    """
    seen = np.ones(vocabulary)
    answers, often = np.unique(train.answer, return_counts=True)
    for answer, times in zip(answers, often, strict=True):
        np.add.at(seen, train.texts[answer], times)
    guesses = {"uniform": np.full(vocabulary, math.log(vocabulary)), "frequency": -np.log(seen / seen.sum())}
    targets = [batch["targets"] for batch in evaluation]
    return {name: [_summed(of_id, batch) for batch in targets] for name, of_id in guesses.items()}


def _summed(nll_of_id: np.ndarray, targets: np.ndarray) -> Mapping[str, np.ndarray]:
    asked = targets != NOT_ASKED
    nll = np.where(asked, nll_of_id[np.where(asked, targets, 0)], 0.0)
    return {"nll": nll.sum(axis=1), "count": asked.sum(axis=1)}


def content_fingerprint(questions: Mapping[Split, Sequence[Question]], *parts: object) -> str:
    """Identity of questions and of whatever else is given; where the pictures lie is not part of it."""
    told = {
        split: [
            (
                q.image_filename,
                q.instruction,
                q.answer,
                q.is_multi_label,
                q.question_type,
                q.stage,
                q.candidates,
            )
            for q in each
        ]
        for split, each in questions.items()
    }
    return cache.fingerprint(told, *parts)
