"""Features as training examples and evaluation batches, with the scores of what is predicted for them. No jax."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxablate.data import Batch
from jaxablate.studies.lora_space import metrics
from jaxablate.studies.lora_space.data.split import Split

Ints = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Rows:
    """Normalised features of some adapters (`data.Several`); item i is {"x": float32 (dim,), "label": int32 ()}.

    Files' places are all that is kept of the features and their scales, so that it pickles to a few words: each
    process maps the files itself.

    Attributes:
      features: an .npy file (N, dim), of all adapters.
      scale: an .npy file (2, dim): what is subtracted of each column, and what it is then multiplied by.
      rows: which adapters.
      labels: of these.
    """

    features: Path
    scale: Path
    rows: Ints
    labels: Ints

    @cached_property
    def _columns(self) -> npt.NDArray[np.float32]:
        return np.load(self.features, mmap_mode="r", allow_pickle=False)

    @cached_property
    def _scale(self) -> npt.NDArray[np.float32]:
        return np.load(self.scale, allow_pickle=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"adapter {index} of {len(self)}")
        return {key: values[0] for key, values in self.several(np.array([index])).items()}

    def several(self, indices: Ints) -> Batch:
        """Several items: `x` (B, dim) and `label` (B,). What is mapped is read once, and in the order of the file."""
        rows = self.rows[indices]
        order = np.argsort(rows)
        x = np.empty((len(rows), self._columns.shape[1]), np.float32)
        for i in order:
            np.subtract(self._columns[rows[i]], self._scale[0], out=x[i])
            x[i] *= self._scale[1]
        return {"x": x, "label": self.labels[indices].astype(np.int32)}

    def __reduce__(self) -> tuple[type[Rows], tuple[Any, ...]]:
        return Rows, astuple(self)


@dataclass(frozen=True)
class Batches(Sequence[Batch]):
    """Batches of rows, each made when it is asked for: all of them need not fit into memory."""

    rows: Rows
    split: npt.NDArray[np.int32]
    batch_size: int

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        start = index % len(self) * self.batch_size
        stop = min(start + self.batch_size, len(self.rows))
        return {**self.rows.several(np.arange(start, stop)), "split": self.split[start:stop]}


@dataclass(frozen=True)
class Adapters:
    """The opened data of the study (a `task.Source`).

    Attributes:
      features, scale: see `Rows`.
      labels: int32 (N,), of all adapters.
      parts: which of them are for what.
      categories: names of the labels.
      fingerprint: of the adapters' content, what is made of it and how it is cut.
      eval_batch_size: of an evaluation, whose last batch may be smaller.
      dim: features of an adapter.
      near_constant: how many of them hardly differ between training adapters, and are 0.
      remarks: why results are no measurement, or of which category; one sentence each.
      cached: whether the features were there.
      workers: threads that read adapters and computed features.
    """

    features: Path
    scale: Path
    labels: npt.NDArray[np.int32]
    parts: Split
    categories: tuple[str, ...]
    fingerprint: str
    eval_batch_size: int
    dim: int
    near_constant: int
    remarks: tuple[str, ...]
    cached: bool
    workers: int

    @property
    def description(self) -> str:
        """How much there is, in a few words."""
        training, validation, test = (len(rows) for rows in self.parts.parts)
        return (
            f"{training} + {validation} + {test} adapters of {len(self.categories)} categories, {self.dim} features, "
            f"{self.near_constant} of them near-constant"
        )

    @cached_property
    def train(self) -> Rows:
        """The training adapters."""
        return self._rows(self.parts.train)

    @cached_property
    def evaluation(self) -> Batches:
        """The validation adapters, in batches as `all_parts` has them."""
        return self._batches(metrics.VAL)

    @cached_property
    def all_parts(self) -> Batches:
        """All parts: `x` (B, dim), `label` (B,) and `split` (B,), 0 of training, 1 of validation, 2 of the test."""
        return self._batches(*metrics.PARTS)

    def _batches(self, *parts: int) -> Batches:
        rows = [self.parts.parts[part] for part in parts]
        split = np.repeat(np.array(parts, np.int32), [len(own) for own in rows])
        return Batches(self._rows(np.concatenate(rows)), split, self.eval_batch_size)

    def _rows(self, rows: Ints) -> Rows:
        return Rows(self.features, self.scale, rows, self.labels[rows])

    def score(self, outputs: Sequence[Any]) -> dict[str, float]:
        """Metrics of one member on validation, from its {"logits", "label", "split"} per evaluation batch."""
        return metrics.evaluate(outputs, (metrics.VAL,))

    def trivial(self, outputs: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """The shares of the categories in training, whatever the adapter."""
        classes, truth = len(self.categories), self.labels[self.parts.train]
        return {"majority": metrics.knowing_nothing(truth, classes, outputs)}
