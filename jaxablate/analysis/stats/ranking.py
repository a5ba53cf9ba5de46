"""The arms by one number: how far each is from the baseline, in percent, and what to call that.

Ranked is the study's primary response: the first that it declares.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Literal

import numpy as np

from jaxablate.analysis import sentences
from jaxablate.analysis.findings import Estimate, Judgement, Place, Ranking, Scale
from jaxablate.analysis.results import Results
from jaxablate.analysis.stats import intervals
from jaxablate.analysis.stats.recorded import recorded
from jaxablate.runstore import OUTCOMES
from jaxablate.study import Response, Study

CRITICAL, MODERATE = 10.0, 5.0  # percent: above it


def ranked_response(study: Study) -> Response:
    """The first response with a value axis, or a time to a target if the study has no other."""
    return next((r for r in study.responses if r.reduce != "time_to"), study.responses[0])


def is_loss(response: Response) -> bool:
    """Whether it is a loss, of which ratios are what counts whatever scale was declared."""
    name = response.metric.rpartition("/")[2]
    return response.better < 0 and (name == "loss" or name.endswith("_loss"))


def is_best_loss(response: Response) -> bool:
    """Whether it is the best validation loss, which tables call `Best Val`."""
    return response.metric == "val/loss" and response.reduce == "best"


def scale_of(response: Response) -> Scale:
    """On what scale an arm's change is taken: ratios of losses and of what declares them, else differences."""
    return "log" if response.scale == "log" or is_loss(response) else "raw"


# ----------------------------------------------------------------------------------------- the ranking


def ranking(results: Results) -> Ranking:
    """All arms of which a run has ended, best first."""
    study, by = results.study, ranked_response(results.study)
    base = results.values(study.baseline, by.name)
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
    goal: Literal["lower", "higher"] = "higher" if by.better > 0 else "lower"
    return Ranking(by.name, goal, scale_of(by), tuple(ranked), note)


def _order(place: Place, by: Response) -> tuple[bool, float]:
    value = place.value.value
    return place.diverged > 0, math.inf if value is None else -by.better * value


def _place(results: Results, arm: str, by: Response) -> Place:
    study, level, runs = results.study, 1 - results.study.alpha, results.of(arm)
    done = [run for run in runs if run.state == "done"]
    ended = sum(run.state in OUTCOMES for run in runs)
    diverged = ended - len(done)
    values = results.values(arm, by.name)
    known = np.array(list(values.values()))
    note = f"of the survivors: {diverged} of {ended} diverged" if diverged else ""
    value = Estimate(None, level=level, note="no run has a value")
    if len(known):
        fit = intervals.per_seed(known, f"Student t over {len(known)} seeds")
        value = intervals.estimate(fit, level, note=note)
    change, better = None, "unclear"
    if arm != study.baseline and not diverged:
        base = results.values(study.baseline, by.name)
        change, better = change_from(base, values, level, by)
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
    base: Mapping[int, float], arm: Mapping[int, float], level: float, by: Response
) -> tuple[Estimate | None, Judgement]:
    """The change of an arm from the baseline in percent of it, over the seeds that both have.

    With one seed it is 100 (arm - base) / base. With more it is, where ratios count, the geometric mean of the
    seeds' ratios with the interval of their logarithms; else the mean paired difference in percent of the
    baseline's mean, with the interval of the difference. What the interval says is in the response's direction.
    """
    seeds = [seed for seed in base if seed in arm]
    values = np.array([[arm[seed], base[seed]] for seed in seeds]).reshape(-1, 2)
    logs = scale_of(by) == "log"
    if not seeds or (values.min() if logs else values[:, 1].mean()) <= 0:
        return None, "unclear"  # of what is not positive there is no percentage
    if logs:
        fit = intervals.paired(*np.log(values.T))
        change = sentences.ratio_in_percent(intervals.estimate(fit, level, math.exp))
    else:
        fit, whole = intervals.paired(*values.T), values[:, 1].mean()
        change = intervals.estimate(fit, level, lambda difference: float(100 * difference / whole))
    return change, intervals.judge(fit, level, by.better)


def label(percent: float, better: int) -> str:
    """What a change from the baseline is called by its size; one to the better is never a degradation."""
    size = "CRITICAL" if abs(percent) > CRITICAL else "MODERATE" if abs(percent) > MODERATE else "MINOR"
    return f"IMPROVEMENT ({size})" if percent * better > 0 else size
