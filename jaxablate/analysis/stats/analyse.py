"""From results to what they say: the one entry to the statistics."""

from __future__ import annotations

from collections import Counter
from textwrap import shorten

from jaxablate.analysis import sentences
from jaxablate.analysis.advice import ADVICE
from jaxablate.analysis.findings import Analysis, ArmValue, Divergence, RateCurve
from jaxablate.analysis.results import Result, Results
from jaxablate.analysis.stats import (
    contrasts,
    effects,
    expectations,
    hypotheses,
    instability,
    outcomes,
    ranking,
    rates,
    speed,
)
from jaxablate.analysis.stats.locked import standing
from jaxablate.analysis.stats.pairing import seed_list
from jaxablate.runstore import FAILURES


def analyse(results: Results) -> Analysis:
    """All findings of a study, however much of it has run."""
    arms = outcomes.arm_values(results)
    divergence = outcomes.divergence(results)
    curves = rates.rate_curves(results)
    against = contrasts.contrasts(results)
    return Analysis(
        arms=arms,
        contrasts=against,
        effects=effects.effect_tables(results),
        verdicts=hypotheses.verdicts(results),
        divergence=divergence,
        time_to=outcomes.times_to_target(results),
        speed=speed.speeds(results),
        rates=curves,
        warnings=(
            *_of_runs(results, arms, divergence),
            *_of_rates(curves),
            *standing(results).warnings,
            *results.notes,
        ),
        ranking=ranking.ranking(results),
        expectations=expectations.expectations(results, arms, against, divergence),
        instability=instability.instability(results),
        compute=speed.compute(results),
    )


def _of_runs(
    results: Results, arms: tuple[ArmValue, ...], divergence: tuple[Divergence, ...]
) -> tuple[str, ...]:
    """What a reader must know of the runs before any number."""
    study, found = results.study, []
    for arm in divergence:
        if arm.diverged:
            survivors = "its means are of the survivors" if arm.diverged < arm.ended else "it has no means"
            found.append(
                f"{arm.arm}: {arm.diverged} of {arm.ended} runs diverged; {survivors}; {ADVICE['diverged']}"
            )
    for value in arms[: len(study.arms)]:  # those of the first response
        if value.unfinished:
            without = (run for run in results.of(value.arm) if run.without_result)
            states = Counter("unreadable" if run.unread else _state_of(run) for run in without)
            known = ", ".join(f"{n} {state}" for state, n in states.items())
            said = (
                f"{value.arm}: {value.unfinished} of {value.planned} seeds have no result ({known or 'not run'}); "
                f"verdicts until then are interim looks"
            )
            out_of_memory = any(run.state == "oom" for run in results.of(value.arm))
            found.append(f"{said}; {ADVICE['oom']}" if out_of_memory else said)
    for value in arms:
        if study.response(value.response).reduce != "time_to" and value.done > len(value.values):
            blank = value.done - len(value.values)
            found.append(f"{value.arm}: {blank} of {value.done} finished runs have no {value.response}")
    if len(study.seeds) < 3:
        found.append(f"{sentences.count(len(study.seeds), 'seed')}: no intervals below 3, and no verdicts")
    undeclared = sorted({run.seed for run in results.confirm} - set(study.seeds))
    if undeclared:
        found.append(
            f"{seed_list(undeclared)}: has runs and is no longer declared; it is counted all the same"
        )
    twice = [cell for cell, n in Counter((run.arm, run.seed) for run in results.confirm).items() if n > 1]
    if twice:
        arm, seed = twice[0]
        found.append(f"{arm}, seed {seed}: more than one confirmatory run; the last one in runs.jsonl counts")
    return tuple(found)


def _state_of(run: Result) -> str:
    """The state of a run without a result, with the reason if it failed."""
    if run.state not in FAILURES or not run.reason:
        return run.state
    return f"{run.state}: {shorten(run.reason, 100, placeholder=' …')}"


def _of_rates(curves: tuple[RateCurve, ...]) -> tuple[str, ...]:
    edge = [curve.arm for curve in curves if curve.at_edge]
    if not edge:
        return ()
    return (f"learning rate at the edge of its grid, so that a better one may lie beyond: {', '.join(edge)}",)
