"""Trajectories in files, and windows of their frames as training examples."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxablate.data import Batch
from jaxablate.studies.burgers.data.pdebench import Layout, values


class _Reopened:
    """Of a dataclass: pickles to its fields, so that each process opens files and maps for itself."""

    def __reduce__(self) -> tuple[type[Any], tuple[Any, ...]]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # pyright: ignore


@dataclass(frozen=True)
class Trajectories(_Reopened):
    """Some rows of a file, all of one viscosity.

    Attributes:
      path, layout: of the file (see `pdebench`).
      first, count: the rows.
      frames: of a row.
      space_stride: every so many cells are used.
      viscosity: epsilon.
      interval: time between frames.
    """

    path: Path
    layout: Layout
    first: int
    count: int
    frames: int
    space_stride: int
    viscosity: float
    interval: float

    @cached_property
    def _values(self) -> Any:
        return values(self.path, self.layout)

    def read(self, row: int, frames: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Frames of a row, counted from the first one here: (frames, cells)."""
        return self.rows(row, row + 1, frames)[0]

    def rows(self, start: int, stop: int, frames: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Frames of several rows: (rows, frames, cells)."""
        found = np.asarray(self._values[self.first + start : self.first + stop, frames])
        return found.reshape(found.shape[:3])[..., :: self.space_stride].astype(np.float32)


@dataclass(frozen=True)
class Windows(_Reopened):
    """All windows of `steps` + 1 frames which are `stride` apart, of fields brought to mean 0 and deviation 1.

    An item is {"u": float32 (steps + 1, cells), "viscosity": float32 (), "dt": float32 ()}; dt is the true
    time between its frames. Items follow in the order of files, rows and starts.

    Attributes:
      hop: frames from the start of a window to that of the next.
      mean, std: of the training fields.
    """

    parts: tuple[Trajectories, ...]
    steps: int
    stride: int
    hop: int
    mean: float
    std: float

    @cached_property
    def _ends(self) -> list[int]:
        """Windows up to each part's last."""
        return list(accumulate(part.count * self.per_row(part) for part in self.parts))

    def per_row(self, part: Trajectories) -> int:
        """Windows of a row of a part."""
        return len(range(0, part.frames - self.steps * self.stride, self.hop))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int, /) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        part = self.parts[number]
        before = self._ends[number - 1] if number else 0
        row, window = divmod(index - before, self.per_row(part))
        start = window * self.hop
        fields = part.read(row, slice(start, start + self.steps * self.stride + 1, self.stride))
        return {
            "u": (fields - np.float32(self.mean)) / np.float32(self.std),
            "viscosity": np.float32(part.viscosity),
            "dt": np.float32(self.stride * part.interval),
        }

    def of(self, viscosity: float) -> npt.NDArray[np.int64]:
        """The numbers of the windows of one viscosity."""
        starts = [0, *self._ends]
        return np.concatenate(
            [np.arange(a, b) for part, a, b in zip(self.parts, starts, self._ends, strict=False)
             if part.viscosity == viscosity]
        )  # fmt: skip

    def batch(self, indices: Sequence[int]) -> Batch:
        """Several items, stacked."""
        rows = [self[int(i)] for i in indices]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
