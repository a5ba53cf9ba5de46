"""Which seeds can be compared: a block is one seed in all of the arms that a comparison needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from jaxablate.analysis.findings import Scale
from jaxablate.analysis.results import Result, Results
from jaxablate.study import Response

Float = NDArray[np.float64]
# Why a run that did end gives no number. It is an outcome, and leaving it out flatters its arm.
LOST = ("diverged", "did not reach the target")


def seeds_of(results: Results) -> tuple[int, ...]:
    """The declared seeds, then any others that have runs: dropping a seed later does not drop its runs."""
    return tuple(dict.fromkeys([*results.study.seeds, *sorted({run.seed for run in results.confirm})]))


@dataclass(frozen=True)
class Blocks:
    """One response of several arms, by seed."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]  # of complete blocks
    values: Float  # (complete blocks, arms)
    columns: Mapping[str, Mapping[int, float]]  # arm -> seed -> value, of complete blocks or not
    gaps: Mapping[tuple[str, int], str]  # (arm, seed) -> why there is no value

    @cached_property
    def lost(self) -> dict[tuple[str, int], str]:
        """Gaps that are outcomes: the run ended, badly."""
        return {cell: why for cell, why in self.gaps.items() if why in LOST}

    @property
    def toll(self) -> str:
        """How many runs of each arm were lost: `optimized_full: 1 of 8 diverged`."""
        cells = list(self.lost.items())
        parts = []
        for arm, why in dict.fromkeys((arm, why) for (arm, _), why in cells):
            count = sum(a == arm and w == why for (a, _), w in cells)
            ended = len(self.columns[arm]) + sum(a == arm for (a, _), _ in cells)
            parts.append(f"{arm}: {count} of {ended} {why}")
        return ", ".join(parts)

    @property
    def untried(self) -> tuple[str, ...]:
        """Arms of which no run has ended."""
        ended = {arm for arm, _ in self.lost} | {arm for arm in self.arms if self.columns[arm]}
        return tuple(arm for arm in self.arms if arm not in ended)

    @property
    def left_out(self) -> str:
        """The cells without a value, in words; empty if there are none."""
        by_cell: dict[tuple[str, str], list[int]] = {}
        for (arm, seed), why in self.gaps.items():
            by_cell.setdefault((arm, why), []).append(seed)
        cells = [f"{arm} ({seed_list(seeds)}: {why})" for (arm, why), seeds in by_cell.items()]
        return ", ".join(cells[:8]) + (f" and {len(cells) - 8} more" if len(cells) > 8 else "")


def seed_list(seeds: Sequence[int]) -> str:
    """`seed 3`, `seeds 0, 2`, `seeds 0, 1, 2, 3, 4, … (20 of them)`."""
    first = ", ".join(str(seed) for seed in seeds[:5])
    rest = f", … ({len(seeds)} of them)" if len(seeds) > 5 else ""
    return f"seed{'s' if len(seeds) > 1 else ''} {first}{rest}"


def blocks(results: Results, arms: Sequence[str], response: Response) -> Blocks:
    """The values of `arms`, and which seeds have one in all of them."""
    seeds = seeds_of(results)
    columns: dict[str, dict[int, float]] = {}
    gaps: dict[tuple[str, int], str] = {}
    for arm in arms:
        columns[arm] = results.values(arm, response.name)
        runs = {run.seed: run for run in results.of(arm)}
        for seed in seeds:
            if seed not in columns[arm]:
                gaps[arm, seed] = _why(runs.get(seed), response)
    complete = tuple(seed for seed in seeds if all(seed in columns[arm] for arm in arms))
    table = [[columns[arm][seed] for arm in arms] for seed in complete]
    values = np.array(table, np.float64).reshape(len(complete), len(arms))
    return Blocks(tuple(arms), complete, values, columns, gaps)


def worst_case(data: Blocks, weights: Float, response: Response, scale: Scale = "raw") -> Float:
    """A weighted sum of the arms in each seed, more being better, with lost runs worse than any number.

    A seed in which more runs of positive weight were lost than of negative weight gets -inf, one with fewer
    +inf, and one with equally many 0. Seeds with a run that has not ended are left out.
    """
    found = []
    for seed in seeds_in(data):
        lost = sum(np.sign(w) for arm, w in zip(data.arms, weights, strict=True) if (arm, seed) in data.lost)
        if any((arm, seed) in data.lost for arm in data.arms):
            found.append(-math.inf * lost if lost else 0.0)
        else:
            values = np.array([data.columns[arm][seed] for arm in data.arms])
            found.append(response.better * float(weights @ (np.log(values) if scale == "log" else values)))
    return np.array(found)


def losing_sides(data: Blocks, weights: Float) -> tuple[bool, bool]:
    """Whether runs were lost of arms with positive weight (the treatment), and with negative (the control)."""
    of_lost = [w for arm, w in zip(data.arms, weights, strict=True) if any(arm == a for a, _ in data.lost)]
    return any(w > 0 for w in of_lost), any(w < 0 for w in of_lost)


def seeds_in(data: Blocks) -> list[int]:
    """Seeds of which every run has ended, well or badly."""
    seeds = dict.fromkeys([*data.seeds, *(seed for _, seed in data.lost)])
    return [s for s in seeds if all(s in data.columns[arm] or (arm, s) in data.lost for arm in data.arms)]


def _why(run: Result | None, response: Response) -> str:
    if run is None or run.state == "pending":
        return "not run"
    if run.unread:
        return "cannot be read"
    if run.state == "done":
        return "did not reach the target" if response.reduce == "time_to" else "no value"
    return run.state
