"""The study's finished runs with what each of them recorded, by representation and set of tensors."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxablate import disk
from jaxablate.analysis.results import Result, Results
from jaxablate.errors import UserError
from jaxablate.studies.lora_space import metrics

# The guide's names of the parts, with their numbers in evaluation batches.
PARTS = {"train": metrics.TRAIN, "val": metrics.VAL, "test": metrics.TEST}
SCORES = ("f1", "precision", "recall")

Array = NDArray[Any]


@dataclass(frozen=True)
class Kept:
    """What a run kept of its last evaluation: a row for each adapter, and facts of the data.

    Attributes:
      prediction, label, split: (adapters,).
      categories: names of the labels.
      remarks: why a score is no measurement.
      facts: `features`, `tensors`, `near_constant` columns and `workers` that read batches, each a number.
    """

    prediction: Array
    label: Array
    split: Array
    categories: tuple[str, ...]
    remarks: tuple[str, ...]
    facts: Mapping[str, int]

    def of(self, part: str) -> tuple[Array, Array]:
        """Labels and predictions of one part."""
        own = self.split == PARTS[part]
        return self.label[own].astype(int), self.prediction[own].astype(int)

    def confusion(self, part: str) -> NDArray[np.int64]:
        """(classes, classes), a row for each true label; all labels, also those that nobody has or is given."""
        return metrics.confusion(*self.of(part), len(self.categories))

    @classmethod
    def read(cls, run: Result) -> Kept:
        """From a run's predictions.npz.

        Raises:
          UserError: it is not there, damaged, or of something else.
        """
        if run.dir is None or not run.dir.predictions.is_file():
            raise UserError(f"{run.arm}, seed {run.seed}: kept no predictions; train it again to have them")
        try:
            # In memory: of a torn file numpy would leave the one that it opened open.
            with np.load(io.BytesIO(run.dir.predictions.read_bytes()), allow_pickle=False) as file:
                prediction, label, split = (
                    np.asarray(file[name]) for name in ("prediction", "label", "split")
                )
                categories, remarks = (tuple(map(str, file[name])) for name in ("categories", "remarks"))
                facts = {
                    name: int(file[name]) for name in ("features", "tensors", "near_constant", "workers")
                }
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            what = " ".join(str(error).split())
            raise UserError(f"{run.dir.predictions}: cannot be read: {what}; train the run again") from None
        if label.ndim != 1 or not prediction.shape == label.shape == split.shape:
            raise UserError(f"{run.dir.predictions}: its arrays do not belong together; train the run again")
        return cls(prediction, label, split, categories, remarks, facts)


@dataclass(frozen=True)
class Finished:
    """A run that is done, with its resolved config."""

    run: Result
    kept: Kept
    config: Mapping[str, Any]

    def final(self, name: str) -> float:
        """The last value of val/`name`: that of the parameters which the run ended with; NaN if there is none."""
        last = [row[f"val/{name}"] for row in self.run.rows if row.get(f"val/{name}") is not None][-1:]
        return last[0] if last else float("nan")

    def score(self, part: str, name: str) -> float:
        """`accuracy`, `f1`, … of `train`, `val` or `test`."""
        return self.final(metrics.PARTS[PARTS[part]] + name)

    @cached_property
    def _evaluated(self) -> Mapping[int, float]:
        """Step -> validation accuracy while it trained; what was restored is evaluated after its last step."""
        rows = (row for row in self.run.rows if row.get("val/accuracy") is not None)
        return {row["step"]: row["val/accuracy"] for row in rows if row["step"] <= (self.run.steps or 0)}

    @property
    def accuracy_history(self) -> list[float]:
        """Validation accuracy after each epoch."""
        return [accuracy for step, accuracy in self._evaluated.items() if step > 0]

    @property
    def loss_history(self) -> list[float]:
        """Training loss, of the last batch of each epoch."""
        epoch = self.config["training"]["eval_every"]
        rows = (row for row in self.run.rows if row.get("train/loss") is not None)
        return [row["train/loss"] for row in rows if row["step"] % epoch == 0]

    @property
    def best_epoch(self) -> int:
        """The first epoch with the best validation accuracy; 0 is the start, before any training."""
        best = max(self._evaluated, key=lambda step: self._evaluated[step], default=0)
        return best // self.config["training"]["eval_every"]

    @property
    def seconds(self) -> float:
        """Its share of its cohort's time: members train in one program, and none has a time of its own."""
        return self.run.statistics.get("total_wallclock_time", float("nan")) / self.run.cohort_size


@dataclass(frozen=True)
class Setting:
    """A representation of a set of tensors, with its finished runs, of all splits of the data."""

    representation: str
    tensors: str
    runs: tuple[Finished, ...]
    missing: int  # runs without a result

    @property
    def name(self) -> str:
        """As the document has it: `spectral_visual_only`."""
        return f"{self.representation}_{self.tensors}"

    def scores(self, part: str, name: str = "accuracy") -> NDArray[np.float64]:
        """One number of each run."""
        return np.array([run.score(part, name) for run in self.runs])


Settings = Mapping[tuple[str, str], Setting]  # by representation and tensors


def settings(results: Results, notes: list[str]) -> Settings:
    """All settings that were declared, in that order; what cannot be read is noted, and counts as missing."""
    found: dict[tuple[str, str], list[Finished]] = {}
    declared: dict[tuple[str, str], int] = {}
    for arm in results.study.arms:
        levels = results.study.levels(arm.name)
        key = levels["representation"], levels["tensors"]
        declared[key] = declared.get(key, 0) + len(results.study.seeds)
        found.setdefault(key, []).extend(_finished(results.of(arm.name), notes))
    return {
        key: Setting(*key, runs=tuple(runs), missing=declared[key] - len(runs)) for key, runs in found.items()
    }


def _finished(runs: Sequence[Result], notes: list[str]) -> Iterator[Finished]:
    for run in runs:
        if run.state != "done" or run.unread or run.dir is None:
            continue
        try:
            yield Finished(run, Kept.read(run), disk.read_json(run.dir.config))
        except UserError as error:
            notes.append(str(error))


def finished(found: Settings) -> list[Finished]:
    """All runs that are done."""
    return [run for setting in found.values() for run in setting.runs]


def representations(found: Settings) -> list[str]:
    """In the order of their declaration."""
    return list(dict.fromkeys(representation for representation, _ in found))
