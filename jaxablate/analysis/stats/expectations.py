"""Expectations about results, held to what was measured. No number but an interval decides."""

from __future__ import annotations

import math
from typing import Literal

from jaxablate.analysis import sentences
from jaxablate.analysis.findings import ArmValue, Contrast, Divergence, Estimate, Expected
from jaxablate.analysis.results import Results
from jaxablate.study import Expectation, Study

Answer = Literal["met", "not met", "cannot be said"]


def expectations(
    results: Results,
    arms: tuple[ArmValue, ...],
    contrasts: tuple[Contrast, ...],
    divergence: tuple[Divergence, ...],
) -> tuple[Expected, ...]:
    """The study's expectations about responses, in their order; those in words or of the step are not here."""
    study, found = results.study, []
    for number, expected in enumerate(study.expectations):
        if not expected.response or expected.benchmarked:
            continue
        arm = arm_of(study, expected)
        if not arm:
            why = f"No arm changes {expected.factor} alone"
            found.append(
                Expected(number, "", "cannot be said", None, f"{why}: {_wanted(expected)} cannot be judged.")
            )
            continue
        concerned = (arm, study.baseline) if expected.relative else (arm,)
        lost = [
            f"{d.diverged} of {d.ended} runs of {d.arm} diverged"
            for d in divergence
            if d.diverged and d.arm in concerned
        ]
        if expected.relative:
            contrast = next(c for c in contrasts if (c.arm, c.response) == (arm, expected.response))
            found.append(_of_ratio(number, expected, arm, contrast, lost))
        else:
            value = next(v for v in arms if (v.arm, v.response) == (arm, expected.response))
            found.append(_of_value(number, expected, arm, value, lost))
    return tuple(found)


def arm_of(study: Study, expected: Expectation) -> str:
    """The arm that an expectation is of: its own, or the one that changes its factor alone; empty if none does."""
    alone = (arm.name for arm in study.arms if list(study.set_levels(arm.name)) == [expected.factor])
    return expected.arm or next(alone, "")


def answer(expected: Expectation, measured: Estimate) -> tuple[Answer, str]:
    """Whether the bounds hold of what was measured, and why, in words: all of the interval must agree."""
    if measured.low is None or measured.high is None:
        return "cannot be said", measured.note or "there is no interval"
    low = -math.inf if expected.low is None else expected.low
    high = math.inf if expected.high is None else expected.high
    if low <= measured.low and measured.high <= high:
        return "met", "all of the interval lies within"
    if measured.high < low:
        return "not met", "it is less"
    if measured.low > high:
        return "not met", "it is more"
    return "cannot be said", "the interval crosses a bound"


def _of_ratio(number: int, expected: Expectation, arm: str, contrast: Contrast, lost: list[str]) -> Expected:
    ratio, name = contrast.ratio, f"{arm}: {expected.response}"
    if ratio is None or ratio.value is None:
        why = (
            "; ".join(lost) or contrast.difference.note or "not all values are positive, so there is no ratio"
        )
        return _unsaid(number, expected, arm, f"{name} has no ratio to {contrast.control}'s ({why})")
    pairs = sentences.count(ratio.n, "paired seed")
    said = f"{name} is ×{sentences.interval(ratio)} of {contrast.control}'s over {pairs}{_order(contrast)}"
    return _judged(number, expected, arm, ratio, said, lost)


def _order(contrast: Contrast) -> str:
    """Which is better, as far as the interval of the paired seeds says it."""
    if contrast.better in ("better", "worse"):
        return f", {contrast.better} than it"
    if contrast.better == "same":
        return ", the same"
    return "" if contrast.difference.low is None else ", not told apart from it"


def _of_value(number: int, expected: Expectation, arm: str, value: ArmValue, lost: list[str]) -> Expected:
    name = f"{arm}: {expected.response}"
    if value.mean.value is None:
        return _unsaid(number, expected, arm, f"{name} has no value ({'; '.join(lost) or value.mean.note})")
    seeds = sentences.count(value.mean.n, "seed")
    return _judged(
        number, expected, arm, value.mean, f"{name} is {sentences.interval(value.mean)} over {seeds}", lost
    )


def _unsaid(number: int, expected: Expectation, arm: str, said: str) -> Expected:
    return Expected(
        number, arm, "cannot be said", None, f"{said}. Expected {_wanted(expected)}: cannot be said."
    )


def _judged(
    number: int, expected: Expectation, arm: str, measured: Estimate, said: str, lost: list[str]
) -> Expected:
    found, why = answer(expected, measured)
    if lost:  # survivors flatter
        found, why = "cannot be said", "; ".join(lost)
    return Expected(number, arm, found, measured, f"{said}. Expected {_wanted(expected)}: {found}, {why}.")


def _wanted(expected: Expectation) -> str:
    """The bounds in words: `×1.15 to ×1.3`, `1.45 at most`."""
    sign = "×" if expected.relative else ""
    low, high = (None if x is None else f"{sign}{sentences.number(x)}" for x in (expected.low, expected.high))
    if low is None:
        return f"{high} at most"
    return f"{low} or more" if high is None else f"{low} to {high}"
