"""What a run did step by step: series out of metrics.jsonl, and a curve for the terminal. Numpy alone."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxablate.runstore import RunDir, read_steps

Rows = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Series:
    """One metric over steps. A value that was not finite is NaN: a gap, and never a number."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> Series:
        """The same without its gaps."""
        there = np.isfinite(self.values)
        return Series(self.steps[there], self.values[there])


def load(source: RunDir | str | os.PathLike[str] | Rows) -> Rows:
    """The rows of a run directory, of its metrics.jsonl, or as given. A torn last line is left out."""
    if isinstance(source, RunDir):
        return read_steps(source.metrics)[0]
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        return read_steps(path / "metrics.jsonl" if path.is_dir() else path)[0]
    return source


def series(rows: Iterable[Mapping[str, Any]], key: str) -> Series:
    """The series of `key`, in the order of steps; rows without the key are no part of it."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    points.sort(key=lambda point: point[0])
    steps = np.array([step for step, _ in points], np.int64)
    values = np.array([math.nan if value is None else value for _, value in points], np.float64)
    return Series(steps, np.where(np.isfinite(values), values, np.nan))


def smooth(curve: Series, span: float) -> Series:
    """Gaussian average over about `span` points, centred, so that the curve does not lag behind its values.

    The kernel has a standard deviation of span / 4 points. At the ends and beside a gap the weights of the
    points that are there are normalised to one. A gap stays a gap and does not enter any average.
    """
    sigma = span / 4
    reach = int(3 * sigma)
    if reach < 1 or not len(curve):
        return curve
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    there = np.isfinite(curve.values)
    total = np.convolve(np.where(there, curve.values, 0.0), kernel)[reach:-reach]
    weight = np.convolve(there.astype(np.float64), kernel)[reach:-reach]
    return Series(curve.steps, np.divide(total, weight, out=np.full(len(curve), np.nan), where=there))


def diverged_at(rows: Iterable[Mapping[str, Any]], key: str = "train/loss") -> int | None:
    """The first step after which `key` never was finite again; None if its last value is finite."""
    curve = series(rows, key)
    there = np.flatnonzero(np.isfinite(curve.values))
    first_bad = int(there[-1]) + 1 if len(there) else 0
    return int(curve.steps[first_bad]) if first_bad < len(curve) else None


def _bins(curve: Series, number: int) -> NDArray[np.float64]:
    """Means of `curve` over `number` equal stretches of steps; NaN where a stretch has no value."""
    finite = curve.finite
    span = max(int(curve.steps[-1] - curve.steps[0]), 1)
    place = np.minimum((finite.steps - curve.steps[0]) * number // (span + 1), number - 1)
    if len(curve) == 1:
        place = np.full(len(finite), number // 2)
    count = np.bincount(place, minlength=number).astype(np.float64)
    total = np.bincount(place, weights=finite.values, minlength=number)
    return np.divide(total, count, out=np.full(number, np.nan), where=count > 0)


# The eight dots of a braille character, by (row, column) in its 4 x 2 cell (Unicode block 2800).
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def terminal_curve(rows: Iterable[Mapping[str, Any]], key: str, width: int = 72, height: int = 8) -> str:
    """The curve of `key` as lines of text at most `width` wide: a title, `height` rows of braille, an x axis.

    Each column of dots is the mean over its stretch of steps, and neighbours are joined; a stretch without a
    finite value is a gap. With few points the dots are joined across the empty stretches between them.
    """
    curve = series(rows, key)
    finite = curve.finite
    if not len(curve):
        return f"{key}: no values"
    if not len(finite):
        return f"{key}: no finite values in {len(curve)}"
    columns = max(width - 2 - len("-1.234e-205"), 8) * 2  # two dots in each character
    dots = height * 4
    means = _bins(curve, columns)
    # Joining is for stretches that no value was due in, not for values that were not finite.
    sparse = len(curve) < columns
    bad = np.zeros(columns, bool)
    if sparse:
        gaps = np.where(np.isnan(curve.values), 1.0, np.nan)
        bad = ~np.isnan(_bins(Series(curve.steps, gaps), columns))
    low, high = float(np.nanmin(means)), float(np.nanmax(means))
    labels = [f"{high:.4g}", f"{low:.4g}"]
    level = (means - low) / (high - low) if high > low else np.where(np.isnan(means), np.nan, 0.5)
    canvas = np.zeros((height, columns // 2), np.int64)

    def dot(x: int, y: int) -> None:
        canvas[y // 4, x // 2] |= _DOTS[y % 4][x % 2]

    before: tuple[int, int] | None = None
    for x, value in enumerate(level):
        if np.isnan(value):
            if bad[x] or not sparse:
                before = None
            continue
        y = round((1 - float(value)) * (dots - 1))
        x0, y0 = before or (x, y)
        for step in range(max(abs(y - y0), x - x0) + 1):
            along = step / max(abs(y - y0), x - x0, 1)
            dot(round(x0 + (x - x0) * along), round(y0 + (y - y0) * along))
        before = (x, y)

    margin = max(map(len, labels))
    lost = len(curve) - len(finite)
    lines = [
        f"{key}: {finite.values[0]:.4g} → {finite.values[-1]:.4g}" + (f", {lost} not finite" if lost else "")
    ]
    for number, line in enumerate(canvas):
        label = labels[0] if number == 0 else labels[1] if number == height - 1 else ""
        text = "".join(chr(0x2800 + int(cell)) for cell in line).rstrip("\u2800")
        lines.append(f"{label:>{margin}} ┤{text}")
    first, last = f"step {curve.steps[0]}", str(curve.steps[-1])
    lines.append(f"{'':>{margin}}  {first}{last:>{max(columns // 2 - len(first), len(last) + 1)}}")
    return "\n".join(lines)
