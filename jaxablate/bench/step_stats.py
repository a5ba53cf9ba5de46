"""Ratios of times that were taken in turns, with intervals that hold on a machine that others use too.

Times of one machine are far from independent draws: it gets warm, and a neighbour's job that lasts for ten
rounds makes all of them slower. Three things keep an interval honest:

* pairs: what is averaged is the log ratio of two times of the same round, in which a drift cancels;
* medians: of the pairs of a block, since a disturbance hits one of the two now and then, and hard;
* blocks: Student's t is on `BLOCKS` medians of consecutive rounds. What stays the same for some rounds is in
  the spread between blocks, where t over single rounds would count it as news each time.

`tests/bench/test_step_stats.py` simulates such machines: 95 % intervals of 40 rounds hold the truth in 95 % of
the draws on a quiet machine, in 96 % on a busy one, and in 93 % (over single rounds: 90 %) if each arm wavers by
itself besides. What no method can see is a wavering of one arm as long as the benchmark: run it again, in
another process. `tests/benchmarks/step_null.py` is the experiment on a real machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from jaxablate.analysis.benchmarks import EffectRatio, Quantity, exact
from jaxablate.analysis.findings import Estimate
from jaxablate.analysis.stats import intervals
from jaxablate.analysis.stats.effects import Design

Float = NDArray[np.float64]
BLOCKS = 8
MIN_BLOCKS = 3


def block_medians(values: Float) -> Float:
    """(…, rounds) -> (…, blocks): medians of consecutive rounds, of as nearly equal numbers as there can be."""
    parts = np.array_split(values, min(BLOCKS, values.shape[-1]), axis=-1)
    return np.stack([np.median(part, axis=-1) for part in parts], axis=-1)


def fit(pairs: Float) -> intervals.Fit:
    """The location of one number per round, (…, rounds), such as the log ratio of two times of that round."""
    medians = block_medians(pairs)
    blocks, rounds = medians.shape[-1], pairs.shape[-1]
    how = f"Student t on {blocks} medians of consecutive rounds, {rounds} pairs"
    return intervals.per_seed(medians, how, axis=-1)


def estimate(pairs: Float, level: float) -> Estimate:
    """The ratio whose logarithms, one per round, are `pairs`: (rounds,)."""
    found = fit(pairs)
    ratio = math.exp(float(found.value))
    if found.n < MIN_BLOCKS:
        note = f"{found.n} round{'s' if found.n > 1 else ''}: no interval below {MIN_BLOCKS}"
        return Estimate(ratio, level=level, n=len(pairs), how=found.how, note=note)
    low, high = (math.exp(float(limit)) for limit in found.limits(level))
    p = min(1.0, 2 * float(min(found.p_above(0), found.p_below(0))))
    return Estimate(ratio, low, high, level, p, len(pairs), float(found.df), found.how)


def time_ratio(treatment: Sequence[float], control: Sequence[float], level: float) -> Estimate:
    """Treatment over control, of times that are paired by round."""
    return estimate(np.log(np.asarray(treatment)) - np.log(np.asarray(control)), level)


def time_effects(times: Float, crossed: Design, quantity: Quantity, level: float) -> tuple[EffectRatio, ...]:
    """Main effects and interactions of a factorial on times, (rounds, cells), as ratios.

    Each is computed within every round, so that a drift cancels in it as in a pair.
    """
    by_round = np.log(times) @ _weights(crossed).T
    return tuple(
        EffectRatio(term.names, quantity, estimate(by_round[:, i], level))
        for i, term in enumerate(crossed.terms)
    )


def memory_effects(peaks: Sequence[float], crossed: Design) -> tuple[EffectRatio, ...]:
    """The same of bytes, one number for each cell, which have no spread."""
    logs = _weights(crossed) @ np.log(np.asarray(peaks, np.float64))
    return tuple(
        EffectRatio(term.names, "memory", exact(math.exp(value)))
        for term, value in zip(crossed.terms, logs, strict=True)
    )


def _weights(crossed: Design) -> Float:
    """The design's weights, without the halving of interactions: two factors' ratio over their product."""
    orders = np.array([len(term.names) for term in crossed.terms])
    return crossed.weights(crossed.terms) * 2.0 ** (orders - 1)[:, None]
