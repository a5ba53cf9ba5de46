"""How each arm's response depends on its learning rate, from the tuning runs.

Choosing a rate is not done here: the rate, the means that it was chosen by and whether it lies at the edge of
its grid are those of `rates.json`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from jaxablate.analysis import sentences
from jaxablate.analysis.findings import RateCurve, RatePoint
from jaxablate.analysis.results import Result, Results
from jaxablate.errors import UserError
from jaxablate.study import Response


def rate_curves(results: Results) -> tuple[RateCurve, ...]:
    """A curve for each arm that has tuning runs; empty for a study without a rule."""
    study, rule = results.study, results.study.learning_rate
    if rule is None:
        return ()
    response = study.response(rule.response)
    tuning = {arm.name: list[Result]() for arm in study.arms}
    for run in results.runs:
        if run.phase == "tuning" and run.arm in tuning:
            tuning[run.arm].append(run)
    return tuple(_curve(results, arm, runs, response) for arm, runs in tuning.items() if runs)


def _curve(results: Results, arm: str, runs: Sequence[Result], response: Response) -> RateCurve:
    choice = results.rates.get(arm, {})
    chosen, edge = choice.get("learning_rate"), choice.get("edge")
    grid, compared = choice.get("grid", ()), choice.get("means", ())
    if len(grid) != len(compared):
        what = f"{len(grid)} rates with {len(compared)} means"
        raise UserError(f"rates.json: arm '{arm}': {what}; restore the file")
    means = dict(zip(grid, compared, strict=True))
    points = []
    for rate in sorted({run.learning_rate for run in runs if run.learning_rate is not None}):
        point = _point([run for run in runs if run.learning_rate == rate], rate, response)
        points.append(replace(point, mean=means[rate]) if rate in means else point)
    sensitivity, why = _sensitivity(points, response)
    notes = [why] if why else []
    if chosen is None:
        notes.append("no rate has been chosen")
    elif edge:
        notes.append(
            f"the chosen rate {sentences.number(chosen)} is at the edge of the grid: a better one may lie beyond"
        )
    return RateCurve(arm, response.name, tuple(points), chosen, bool(edge), sensitivity, "; ".join(notes))


def _point(runs: Sequence[Result], rate: float, response: Response) -> RatePoint:
    """A rate before the choice, which says itself what mean it went by: there that of the runs that finished."""
    found = {run.seed: run.values.get(response.name) for run in runs if run.state == "done"}
    values = {seed: value for seed, value in found.items() if value is not None}
    mean = statistics.fmean(values.values()) if values else None
    return RatePoint(rate, mean, values, sum(run.state == "diverged" for run in runs), len(runs))


def _sensitivity(points: Sequence[RatePoint], response: Response) -> tuple[float | None, str]:
    """(mean shortfall from the best rate over the grid, why it is missing).

    Wortsman et al. 2023, "Small-scale proxies for large-scale transformer training instabilities": the mean
    over the rates of how much worse than the best rate the result is, and at most as bad as not having
    trained; a run that diverged is that bad. What not having trained scores is the response's `chance`.
    """
    better, floor = response.better, response.chance
    diverged = any(point.diverged for point in points)
    if diverged and floor is None:
        return None, "no sensitivity: runs diverged, and the response has no chance=X to count them at"
    means = []
    for point in points:
        scores = [better * value for value in point.values.values()]
        if floor is not None:
            scores = [max(score, better * floor) for score in scores] + [better * floor] * point.diverged
        if not scores:
            return None, f"no sensitivity: no value at rate {sentences.number(point.learning_rate)}"
        means.append(statistics.fmean(scores))
    if len(means) < 2:
        return None, "no sensitivity: fewer than two rates"
    return max(means) - statistics.fmean(means), ""
