"""The mean of an arm's curves over its seeds, step by step: one for the figures and for TensorBoard."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxablate.analysis.curves import Series
from jaxablate.analysis.stats import intervals
from jaxablate.analysis.stats.intervals import MIN_SEEDS


@dataclass(frozen=True)
class Band:
    """A series over an arm's seeds; `low` and `high` are None below `MIN_SEEDS` of them."""

    steps: NDArray[np.int64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64] | None
    high: NDArray[np.float64] | None
    runs: int


def mean_over_seeds(curves: Sequence[Series], level: float, most: int | None = None) -> Band | None:
    """The mean of curves with Student-t bounds, at the steps where all of them have a finite value.

    A step that one of them lacks is left out, so that a mean never changes what it is a mean of.

    Args:
      curves: one of each seed, in the order of steps.
      level: of the bounds, at each step by itself.
      most: steps to keep, evenly, with the first and the last; default: all.

    Returns:
      None without curves, or if they share no step.
    """
    finite = [curve.finite for curve in curves]
    if not finite:
        return None
    steps = functools.reduce(np.intersect1d, [np.unique(curve.steps) for curve in finite])
    if not len(steps):
        return None
    if most is not None and len(steps) > most:
        steps = steps[np.linspace(0, len(steps) - 1, most).round().astype(int)]
    # The last value of a step that is there twice.
    places = [np.searchsorted(curve.steps, steps, "right") - 1 for curve in finite]
    values = np.array([curve.values[place] for curve, place in zip(finite, places, strict=True)])
    fit = intervals.per_seed(values, "Student t over seeds")
    low, high = fit.limits(level) if fit.n >= MIN_SEEDS else (None, None)
    return Band(steps, fit.value, low, high, fit.n)


def held(curves: Sequence[Series], stopped: Sequence[bool]) -> list[Series]:
    """Curves of which those that stopped early go on at their last value to the end of the longest.

    A run that stopped stays what it is, so a mean over seeds need not end with the first of them. Of evaluations
    only: there is no loss of a batch that was never trained on.
    """
    steps = np.unique(np.concatenate([curve.steps for curve in curves])) if curves else np.empty(0, int)
    return [
        _held(curve.finite, steps) if early else curve for curve, early in zip(curves, stopped, strict=True)
    ]


def _held(curve: Series, steps: NDArray[np.int64]) -> Series:
    if not len(curve):
        return curve
    later = steps[steps > curve.steps[-1]]
    values = np.concatenate([curve.values, np.full(len(later), curve.values[-1])])
    return Series(np.concatenate([curve.steps, later]), values)
