"""What became of the runs: each arm's value over its seeds, divergence, and the time to reach a target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from jaxablate.analysis import sentences
from jaxablate.analysis.findings import ArmValue, Divergence, Estimate, TimeTo
from jaxablate.analysis.results import Result, Results
from jaxablate.analysis.stats import intervals
from jaxablate.analysis.stats.intervals import Fit
from jaxablate.analysis.stats.pairing import Float, seeds_of
from jaxablate.runstore import OUTCOMES
from jaxablate.study import Response


def arm_values(results: Results) -> tuple[ArmValue, ...]:
    """Every response of every arm over its seeds: Student t, and never a mean that hides a lost run."""
    return tuple(
        _arm_value(results, arm.name, r) for r in results.study.responses for arm in results.study.arms
    )


def _arm_value(results: Results, arm: str, response: Response) -> ArmValue:
    values = results.values(arm, response.name)
    states = {run.seed: "unreadable" if run.unread else run.state for run in results.of(arm)}
    planned, states_now = len(seeds_of(results)), list(states.values())
    done, diverged = states_now.count("done"), states_now.count("diverged")
    known = np.array(list(values.values()))
    notes = []
    if diverged:
        notes.append(
            f"of the {sentences.count(len(known), 'survivor')}: {diverged} of {done + diverged} diverged"
        )
    if response.reduce == "time_to" and done > len(known):
        notes.append(f"of the runs that reached the target: {done - len(known)} of {done} did not")
    elif done > len(known):
        notes.append(f"{done - len(known)} finished without a value")
    if planned > done + diverged:
        notes.append(f"{planned - done - diverged} of {planned} seeds have not finished")
    note = "; ".join(notes)
    return ArmValue(
        arm=arm,
        response=response.name,
        mean=_mean(known, 1 - results.study.alpha, note),
        sd=float(known.std(ddof=1)) if len(known) > 1 else None,
        median=float(np.median(known)) if len(known) else None,
        minimum=float(known.min()) if len(known) else None,
        maximum=float(known.max()) if len(known) else None,
        values=values,
        planned=planned,
        done=done,
        diverged=diverged,
        unfinished=planned - done - diverged,
    )


def _mean(numbers: Float, level: float, note: str) -> Estimate:
    """The mean over runs with its interval; it has no p, there being nothing to compare it with."""
    if not len(numbers):
        return Estimate(None, level=level, note="; ".join(filter(None, [note, "no run has a value"])))
    fit: Fit = intervals.per_seed(numbers, f"Student t over {len(numbers)} seeds")
    found = intervals.estimate(fit, level, note=note)
    return Estimate(found.value, found.low, found.high, level, None, found.n, found.df, found.how, found.note)


# ------------------------------------------------------------------------------------------ divergence


def divergence(results: Results) -> tuple[Divergence, ...]:
    """k of n of each arm, with an exact interval, and Fisher's exact test against the baseline."""
    study = results.study
    ended = {arm.name: [run for run in results.of(arm.name) if run.state in OUTCOMES] for arm in study.arms}
    counts = {arm: (sum(run.state == "diverged" for run in runs), len(runs)) for arm, runs in ended.items()}
    base_k, base_n = counts[study.baseline]
    found = []
    for arm, (k, n) in counts.items():
        low, high = proportion(k, n, study.alpha) if n else (None, None)
        p = None
        if arm != study.baseline and n and base_n:
            # An array, since scipy's types know a tuple of two objects only.
            p = float(np.asarray(stats.fisher_exact([[k, n - k], [base_k, base_n - base_k]]))[1])
        steps = tuple(sorted(run.diverged_at for run in ended[arm] if run.diverged_at is not None))
        found.append(Divergence(arm, k, n, low, high, steps, p))
    return tuple(found)


def proportion(k: int, n: int, alpha: float = 0.05) -> tuple[float, float]:
    """Clopper and Pearson's exact interval of a share.

    If none or all were counted the interval has one open end, and all of alpha goes to it: 0 of 5 allows up
    to 45 % at alpha = 0.05.
    """
    level = 1 - 2 * alpha if k in (0, n) else 1 - alpha
    interval = stats.binomtest(k, n).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


# -------------------------------------------------------------------------------------- time to target


def times_to_target(results: Results) -> tuple[TimeTo, ...]:
    """Success rate and restricted mean time of each arm, for each response that is a time to a target.

    A run that does not reach its target is not missing: its time is at least the horizon, and counts as that.
    So does a run that diverged, and one that stopped early: neither was going to. The horizon is the number of steps
    of the shortest run that was trained to its end, over all arms, or of the longest if none was.
    """
    study = results.study
    ended = {arm.name: [run for run in results.of(arm.name) if not run.without_result] for arm in study.arms}
    everyone = [run for runs in ended.values() for run in runs]
    done = [(run.steps, run.stopped_at) for run in everyone if run.state == "done" and run.steps]
    longest = max((steps for steps, _ in done), default=0)
    horizon = min((steps for steps, stopped in done if stopped is None), default=longest)
    places = sorted(
        {f"{run.hardware or 'unknown hardware'}, cohort of {run.cohort_size}" for run in everyone}
    )
    return tuple(
        _time_to(results, response, arm.name, ended[arm.name], horizon, places)
        for response in study.responses
        if response.reduce == "time_to"
        for arm in study.arms
    )


def _time_to(
    results: Results,
    response: Response,
    arm: str,
    runs: Sequence[Result],
    horizon: int,
    places: Sequence[str],
) -> TimeTo:
    level = 1 - results.study.alpha
    target = results.targets.get(response.name)
    if target is None or not runs:
        why = "no run has ended" if target is not None else "no target: the baseline has no finished run"
        nothing = Estimate(None, level=level, note=why)
        return TimeTo(arm, response.name, target, 0, len(runs), nothing, None, None, horizon, why)
    reached = [_reached(run, response, horizon) for run in runs]
    successes = sorted(step for step in reached if step is not None)
    notes = (
        []
        if len(successes) == len(runs)
        else [f"{len(runs) - len(successes)} of {len(runs)} did not reach it"]
    )
    # A table from elsewhere may not say how long its runs were: then a time that is missing has no bound.
    bounded = horizon > 0 or len(successes) == len(runs)
    if bounded:
        limited = np.array([horizon if step is None else step for step in reached], np.float64)
        mean_steps = _mean(limited, level, f"restricted to {horizon} steps" if notes else "")
    else:
        mean_steps = Estimate(
            None, level=level, note="runs that did not reach the target have no known length"
        )
    seconds = [_seconds(run, response, step, horizon) for run, step in zip(runs, reached, strict=True)]
    mean_seconds = None
    if len(places) > 1:
        notes.append(f"no seconds: runs were on different hardware ({'; '.join(places)})")
    elif None in seconds or not bounded:
        notes.append("no seconds: not every run has its speed on record")
    else:
        mean_seconds = _mean(np.array(seconds, np.float64), level, "")
    half = math.ceil(len(runs) / 2)
    return TimeTo(
        arm=arm,
        response=response.name,
        target=target,
        reached=len(successes),
        runs=len(runs),
        mean_steps=mean_steps,
        mean_seconds=mean_seconds,
        median_steps=float(successes[half - 1]) if len(successes) >= half else None,
        horizon=horizon,
        note="; ".join(notes),
    )


def _reached(run: Result, response: Response, horizon: int) -> float | None:
    step = run.values.get(response.name) if run.state == "done" else None
    return None if step is None or 0 < horizon < step else step


def _seconds(run: Result, response: Response, step: float | None, horizon: int) -> float | None:
    """Training seconds to the target, or to the horizon if it was not reached; None if the speed is unknown."""
    if step is not None:
        return run.seconds.get(response.name)
    rate = _rate(run.perf)
    return horizon / rate if rate else None


def _rate(perf: Mapping[str, float | None]) -> float | None:
    return perf.get("steps_per_sec")
