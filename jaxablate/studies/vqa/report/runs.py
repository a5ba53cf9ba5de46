"""The study's experiments with what their finished runs answered. All of them answered the same questions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxablate import disk
from jaxablate.analysis import sentences
from jaxablate.analysis.results import Result, Results
from jaxablate.errors import UserError
from jaxablate.studies.vqa.metrics import Answer, Marks, marks, refinement, right
from jaxablate.studies.vqa.results import NO_EXPERT, Answers, Kept

JOB = re.compile(r"(?P<experiment>.+)_stage(?P<stage>[1-3])")


@dataclass(frozen=True)
class Finished:
    """The answers of one seed of an experiment."""

    name: str
    seed: int
    answers: Answers
    config: Mapping[str, Any]

    @cached_property
    def marks(self) -> Marks:
        """How each answer did."""
        return marks(self.answers.final, self.answers.questions)

    @cached_property
    def refinement(self) -> Mapping[str, float]:
        """What its passes brought; nothing of a single one."""
        passes = self.answers.passes
        return refinement(passes, self.answers.questions) if len(passes) > 1 else {}

    def hits_of(self, name: str) -> NDArray[np.bool_]:
        """Which answers of one pass are exactly right."""
        return right(self.answers.passes[name], self.answers.questions)


@dataclass(frozen=True)
class Experiment:
    """An arm, or several that were trained for a stage each and are asked by the stage of the question."""

    name: str
    arms: tuple[str, ...]
    runs: tuple[Finished, ...]
    missing: int  # seeds without a result

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the finished runs."""
        return tuple(run.seed for run in self.runs)

    @cached_property
    def hits(self) -> NDArray[np.bool_]:
        """Whether each run is exactly right about each question, (runs, questions)."""
        return np.array([run.marks.exact for run in self.runs])

    def mean(self, metric: str, own: NDArray[np.bool_] | None = None) -> float | None:
        """A metric of `Marks.summary`, mean over the runs; None if it has no value."""
        found = [value for run in self.runs if (value := run.marks.summary(own).get(metric)) is not None]
        return float(np.mean(found)) if found else None


@dataclass(frozen=True)
class Evaluation:
    """Everything that was asked, and the experiments that answered it."""

    questions: tuple[Kept, ...]
    experiments: tuple[Experiment, ...]
    notes: tuple[str, ...]  # what could not be read or joined

    @property
    def answered(self) -> tuple[Experiment, ...]:
        """The experiments with a finished run."""
        return tuple(one for one in self.experiments if one.runs)

    @cached_property
    def stages(self) -> Mapping[str, NDArray[np.bool_]]:
        """By the name of a stage which questions are of it."""
        return self._groups([f"Stage {q.stage}" if q.stage else "Unknown" for q in self.questions])

    @cached_property
    def types(self) -> Mapping[str, NDArray[np.bool_]]:
        """By type of question which are of it."""
        return self._groups([q.question_type for q in self.questions])

    def clusters(self, unit: str) -> NDArray[np.int64]:
        """By `sequence` or `image`, which questions belong together: a number for each, from 0."""
        names = [q.sequence if unit == "sequence" else f"{q.sequence}/{picture(q)}" for q in self.questions]
        return np.unique(names, return_inverse=True)[1]

    @staticmethod
    def _groups(names: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
        every = np.array(names, np.str_)
        return {name: every == name for name in sorted(set(names))}


def picture(question: Kept) -> str:
    """What a question's picture goes by."""
    return question.image_filename or question.image_id


def read(results: Results) -> Evaluation:
    """All experiments that were declared, in that order; what cannot be read is noted, and counts as missing."""
    notes: list[str] = []
    by_arm = {arm.name: list(_finished(results.of(arm.name), notes)) for arm in results.study.arms}
    questions = max((run.answers.questions for runs in by_arm.values() for run in runs), key=len, default=())
    planned, experiments = len(results.study.seeds), []
    for name, arms in _experiments(by_arm).items():
        runs = list(_answering(name, {arm: by_arm[arm] for arm in arms}, questions, notes))
        experiments.append(Experiment(name, tuple(arms), tuple(runs), planned - len(runs)))
    return Evaluation(questions, tuple(experiments), tuple(dict.fromkeys(notes)))


def _finished(runs: Sequence[Result], notes: list[str]) -> Iterator[Finished]:
    for run in runs:
        if run.state != "done" or run.unread or run.dir is None:
            continue
        try:
            answers, config = Answers.read(run.dir.predictions), disk.read_json(run.dir.config)
        except UserError as error:
            notes.append(str(error))
        else:
            notes.extend(answers.remarks)
            yield Finished(run.arm, run.seed, answers, config)


def _experiments(by_arm: Mapping[str, Sequence[Finished]]) -> dict[str, list[str]]:
    """The arms of each experiment: `exp3_stage1` and its siblings are one, `exp3`, if they trained a stage each."""
    named = {arm: JOB.fullmatch(arm) for arm in by_arm}
    experts = {
        found["experiment"]
        for arm, found in named.items()
        if found is not None and any(_expert_of(run) == int(found["stage"]) for run in by_arm[arm])
    }
    experiments: dict[str, list[str]] = {}
    for arm, found in named.items():
        name = found["experiment"] if found is not None and found["experiment"] in experts else arm
        experiments.setdefault(name, []).append(arm)
    return experiments


def _expert_of(run: Finished) -> int | None:
    """The one stage that a run's expert is of; None of any other run."""
    data = run.config.get("data", {})
    stages = data.get("stages", ()) if data.get("regimen") == "experts" else ()
    return stages[0] if len(stages) == 1 else None


def _answering(
    name: str, by_arm: Mapping[str, Sequence[Finished]], questions: Sequence[Kept], notes: list[str]
) -> Iterator[Finished]:
    """Each seed with an answer to every question: of several arms, that of the question's stage."""
    by_seed: dict[int, list[Finished]] = {}
    for runs in by_arm.values():
        for run in runs:
            by_seed.setdefault(run.seed, []).append(run)
    for seed, runs in sorted(by_seed.items()):
        if unfinished := sorted(by_arm.keys() - {run.name for run in runs}):
            notes.append(f"{name}, seed {seed}: left out: {sentences.listed(unfinished)} not finished")
            continue
        if not set().union(*(run.answers.questions for run in runs)) <= set(questions):
            notes.append(f"{name}, seed {seed}: left out: it was asked other questions than the others")
            continue
        whole = _routed(name, seed, runs, questions)
        if silent := [
            str(q.stage)
            for q, why in zip(questions, whole.answers.errors, strict=True)
            if why.startswith(NO_EXPERT)
        ]:
            stages = sentences.listed(sorted(set(silent)))
            notes.append(
                f"{name}, seed {seed}: {sentences.count(len(silent), 'question')} of stage {stages} had no expert, and "
                "count as wrong"
            )
        yield whole


def _routed(name: str, seed: int, runs: Sequence[Finished], questions: Sequence[Kept]) -> Finished:
    passes: dict[str, list[Answer]] = {pass_: [] for pass_ in runs[0].answers.passes}
    errors: list[str] = []
    known = [(_expert_of(run), _places(run.answers), run.answers) for run in runs]
    for question in questions:
        found = [
            (own, places[question]) for stage, places, own in known
            if question in places and stage in (None, question.stage)
        ]  # fmt: skip
        own, place = found[0] if found else (None, 0)
        for pass_, answers in passes.items():
            answers.append(own.passes[pass_][place] if own else None)
        errors.append(own.errors[place] if own else f"{NO_EXPERT} {question.stage}")
    pictures = {row: shown for run in runs for row, shown in run.answers.pictures.items()}
    every = {pass_: tuple(answers) for pass_, answers in passes.items()}
    return Finished(name, seed, Answers(tuple(questions), every, tuple(errors), pictures), runs[0].config)


def _places(answers: Answers) -> dict[Kept, int]:
    return {question: place for place, question in enumerate(answers.questions)}
