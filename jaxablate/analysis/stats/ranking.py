"""The arms by one number: how far each is from the baseline, in percent, and what to call that.

Ranked is the best validation loss, which every study has; of a table that holds none, the first response.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxablate.analysis import sentences
from jaxablate.analysis.findings import Estimate, Judgement, Place, Ranking
from jaxablate.analysis.results import Result, Results
from jaxablate.analysis.stats import intervals
from jaxablate.runstore import OUTCOMES
from jaxablate.study import Response

BEST_LOSS = "best val/loss"
CRITICAL, MODERATE = 10.0, 5.0  # percent: above it


@dataclass(frozen=True)
class Yardstick:
    """What arms are ranked by: seed -> value of the finished runs of each arm."""

    of: str
    better: int  # +1 if more is better
    values: Mapping[str, Mapping[int, float]]


def yardstick(results: Results) -> Yardstick:
    """The best validation loss where runs recorded one, else the study's first response that is no time."""
    arms = [arm.name for arm in results.study.arms]
    losses = {arm: dict(_best_losses(results, arm)) for arm in arms}
    if any(losses.values()):
        return Yardstick(BEST_LOSS, -1, losses)
    response = first_response(results)
    return Yardstick(
        response.name, response.better, {arm: results.values(arm, response.name) for arm in arms}
    )


def first_response(results: Results) -> Response:
    """The study's first response with a value axis, or a time if it has no other."""
    responses = results.study.responses
    return next((response for response in responses if response.reduce != "time_to"), responses[0])


def _best_losses(results: Results, arm: str) -> Iterator[tuple[int, float]]:
    for run in results.of(arm):
        if run.state == "done" and (best := recorded(run).get("val_loss.min")) is not None:
            yield run.seed, best


def recorded(run: Result) -> dict[str, float]:
    """The numbers of a run's statistics, by dotted name: `train_loss.final`."""
    return dict(_numbers(run.statistics, ""))


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value


# ----------------------------------------------------------------------------------------- the ranking


def ranking(results: Results) -> Ranking:
    """All arms of which a run has ended, best first."""
    study, by = results.study, yardstick(results)
    base = by.values[study.baseline]
    note = ""
    if not base:
        runs = results.of(study.baseline)
        lost = sum(run.state == "diverged" for run in runs)
        why = f"{lost} of its {len(runs)} runs diverged" if lost else "it has no finished run"
        note = f"The baseline ({study.baseline}) has no value, {why}: no degradation can be stated"
    elif any(run.state == "diverged" for run in results.of(study.baseline)):
        note = f"Runs of the baseline ({study.baseline}) diverged: changes are from its survivors"
    places = [_place(results, arm.name, by) for arm in study.arms]
    ranked = sorted((place for place in places if place.done or place.diverged), key=lambda p: _order(p, by))
    return Ranking(by.of, _goal(by.better), tuple(ranked), note)


def _goal(better: int) -> Literal["lower", "higher"]:
    return "higher" if better > 0 else "lower"


def _order(place: Place, by: Yardstick) -> tuple[bool, float]:
    value = place.value.value
    return place.diverged > 0, math.inf if value is None else -by.better * value


def _place(results: Results, arm: str, by: Yardstick) -> Place:
    study, level, runs = results.study, 1 - results.study.alpha, results.of(arm)
    done = [run for run in runs if run.state == "done"]
    ended = sum(run.state in OUTCOMES for run in runs)
    diverged = ended - len(done)
    known = np.array(list(by.values[arm].values()))
    note = f"of the survivors: {diverged} of {ended} diverged" if diverged else ""
    value = Estimate(None, level=level, note="no run has a value")
    if len(known):
        fit = intervals.per_seed(known, f"Student t over {len(known)} seeds")
        value = intervals.estimate(fit, level, note=note)
    change, better = None, "unclear"
    if arm != study.baseline and not diverged:
        change, better = change_from(by.values[study.baseline], by.values[arm], level, by.better)
    means: dict[str, list[float]] = {}
    for run in done:
        for name, number in recorded(run).items():
            means.setdefault(name, []).append(number)
    return Place(
        arm=arm,
        value=value,
        change=change,
        better=better,
        label="" if change is None or change.value is None else label(change.value, by.better),
        means={name: statistics.fmean(numbers) for name, numbers in means.items()},
        done=len(done),
        diverged=diverged,
        note=note,
    )


def change_from(
    base: Mapping[int, float], arm: Mapping[int, float], level: float, better: int
) -> tuple[Estimate | None, Judgement]:
    """The change of an arm from the baseline in percent of it, over the seeds that both have.

    With one seed it is 100 (arm - base) / base; with more the mean is of the logarithms of their ratios, and
    has Student's interval. What the interval says is in the response's direction.
    """
    seeds = [seed for seed in base if seed in arm]
    values = np.array([[arm[seed], base[seed]] for seed in seeds]).reshape(-1, 2)
    if not seeds or values.min() <= 0:  # of what is not positive there is no percentage
        return None, "unclear"
    fit = intervals.paired(*np.log(values.T))
    change = sentences.ratio_in_percent(intervals.estimate(fit, level, math.exp))
    return change, intervals.judge(fit, level, better)


def label(percent: float, better: int) -> str:
    """What a change from the baseline is called by its size; one to the better is never a degradation."""
    size = "CRITICAL" if abs(percent) > CRITICAL else "MODERATE" if abs(percent) > MODERATE else "MINOR"
    return f"IMPROVEMENT ({size})" if percent * better > 0 else size
