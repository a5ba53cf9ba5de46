"""Ratios of times taken in turns: their intervals hold the truth on a simulated machine that others use too."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from jaxablate.analysis.findings import Estimate
from jaxablate.analysis.stats.effects import design
from jaxablate.bench import step_stats
from jaxablate.bench.timing import _order
from tests.analysis.made import made_study

DRAWS, ROUNDS, LEVEL = 1500, 40, 0.95


def slots(rounds: int, arms: int) -> np.ndarray:
    """(arms, rounds): when each arm has its turn, in the order of `time_interleaved`."""
    found = np.zeros((arms, rounds), int)
    for number in range(rounds):
        for place, arm in enumerate(_order(tuple(range(arms)), number)):
            found[arm, number] = number * arms + place
    return found


def slow(shape: tuple[int, ...], turns: float, sd: float, rng: np.random.Generator) -> np.ndarray:
    """Noise that keeps its value for about `turns` along the last axis."""
    keep = np.exp(-1 / turns)
    steps = rng.normal(size=shape) * sd * np.sqrt(1 - keep**2)
    found = np.zeros(shape)
    found[..., 0] = rng.normal(size=shape[:-1]) * sd
    for i in range(1, shape[-1]):
        found[..., i] = keep * found[..., i - 1] + steps[..., i]
    return found


def machine(kind: str, rng: np.random.Generator, arms: int = 3) -> np.ndarray:
    """Log times (draws, arms, rounds) of arms that take equally long.

    `quiet`: independent noise with heavy tails. `busy`: the machine gets slower by a third, wavers, and for
    stretches of 25 turns, which begin at random, a neighbour makes single turns half as slow again. `own`: each
    arm also wavers by itself, over 6 rounds.
    """
    when = slots(ROUNDS, arms)
    times = 0.02 * rng.standard_t(3, (DRAWS, arms, ROUNDS))
    if kind != "quiet":
        turns = ROUNDS * arms
        wavering = slow((DRAWS, turns), 60, 0.15, rng) + 0.3 * np.linspace(0, 1, turns)
        started = np.cumsum(rng.random((DRAWS, turns)) < 1 / 35, axis=-1)
        neighbour = started % 2
        times = times + wavering[:, when]
        times += neighbour[:, when] * (0.4 + 0.15 * rng.normal(size=times.shape))
    if kind == "own":
        times = times + slow((DRAWS, arms, ROUNDS), 6, 0.02, rng)
    return times


def share(low: np.ndarray, high: np.ndarray, truth: float = 0.0) -> float:
    return float(((low <= truth) & (truth <= high)).mean())


def blocks_hold(times: np.ndarray, truth: float = 0.0) -> float:
    return share(*step_stats.fit(times[:, 1] - times[:, 0]).limits(LEVEL), truth)


def t_interval(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n = numbers.shape[-1]
    half = stats.t.isf((1 - LEVEL) / 2, n - 1) * numbers.std(-1, ddof=1) / np.sqrt(n)
    return numbers.mean(-1) - half, numbers.mean(-1) + half


def bounds(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None and estimate.high is not None
    return estimate.low, estimate.high


@pytest.mark.parametrize("kind", ["quiet", "busy"])
def test_intervals_of_equal_arms_hold_one(kind: str) -> None:
    assert 0.935 <= blocks_hold(machine(kind, np.random.default_rng(0))) <= 0.985


def test_intervals_hold_a_true_ratio() -> None:
    times = machine("busy", np.random.default_rng(1))
    times[:, 1] += np.log(1.07)
    assert blocks_hold(times, np.log(1.07)) >= 0.935
    assert blocks_hold(times, 0.0) <= 0.9  # and do not hold everything


def test_an_interval_that_ignores_the_drift_does_not_hold_one() -> None:
    """Two arms one after another on the busy machine: what taking turns is for."""
    times = machine("busy", np.random.default_rng(2))
    half = ROUNDS // 2
    first, second = times[:, 0, :half], times[:, 1, half:]
    difference = second.mean(-1) - first.mean(-1)
    error = 2.02 * np.sqrt((first.var(-1, ddof=1) + second.var(-1, ddof=1)) / half)
    assert share(difference - error, difference + error) <= 0.5


def test_an_interval_that_ignores_the_pairs_is_blind() -> None:
    """The arms in turns, but not compared within their rounds: the drift is in the error, and hides a ratio."""
    times = machine("busy", np.random.default_rng(3))
    _, high = step_stats.fit(times[:, 1] - times[:, 0]).limits(LEVEL)
    paired = float(np.median(high - (times[:, 1] - times[:, 0]).mean(-1)))
    unpaired = 2.02 * np.sqrt(times[:, :2].var(-1, ddof=1).sum(-1) / ROUNDS)
    assert float(np.median(unpaired)) > 2 * paired


def test_blocks_hold_more_than_single_rounds_where_an_arm_wavers_by_itself() -> None:
    times = machine("own", np.random.default_rng(4))
    calm = times - machine("busy", np.random.default_rng(4))  # the arms' own wavering alone
    single = share(*t_interval(calm[:, 1] - calm[:, 0]))
    assert single <= 0.75
    assert blocks_hold(calm) >= single + 0.1
    assert blocks_hold(times) >= 0.9


def test_a_single_disturbed_round_does_not_move_the_ratio() -> None:
    rng = np.random.default_rng(5)
    control = np.exp(0.01 * rng.normal(size=ROUNDS))
    treatment = control * 1.1 * np.exp(0.01 * rng.normal(size=ROUNDS))
    before = step_stats.time_ratio(treatment, control, LEVEL)
    treatment[17] *= 50
    after = step_stats.time_ratio(treatment, control, LEVEL)
    assert after.value == pytest.approx(before.value, rel=0.003)
    low, high = bounds(after)
    assert low < 1.1 < high
    assert np.exp(np.log(treatment / control).mean()) > 1.2  # the mean is moved


@pytest.mark.parametrize("rounds", [1, 2])
def test_too_few_rounds_have_no_interval(rounds: int) -> None:
    found = step_stats.time_ratio([2.0] * rounds, [1.0] * rounds, LEVEL)
    assert found.value == pytest.approx(2)
    assert found.low is None and found.high is None
    assert f"{rounds} round" in found.note and "no interval" in found.note


def test_effects_are_ratios_and_an_interaction_is_over_the_product() -> None:
    crossed, _ = design(made_study())
    assert crossed is not None
    rng = np.random.default_rng(6)
    factor = {"flash": 0.5, "rms": 0.9, "swiglu": 1.2}
    logs = np.array(
        [
            sum(np.log(factor[f]) for f, level in cell.items() if level == "on")
            + (np.log(0.8) if cell["flash"] == cell["rms"] == "on" else 0.0)
            for cell in crossed.cells
        ]
    )
    drift = 0.5 * rng.normal(size=(ROUNDS, 1))
    times = np.exp(logs + drift + 0.005 * rng.normal(size=(ROUNDS, 8)))
    timed = {e.factors: e.estimate for e in step_stats.time_effects(times, crossed, "step", LEVEL)}
    exact = {e.factors: e.estimate for e in step_stats.memory_effects(np.exp(logs), crossed)}
    # A main effect averages over the other factors' cells, so half of the interaction is in it.
    truth = {("flash",): 0.5 * 0.8**0.5, ("swiglu",): 1.2, ("flash", "rms"): 0.8, ("rms", "swiglu"): 1.0,
             ("flash", "rms", "swiglu"): 1.0}  # fmt: skip
    for names, ratio in truth.items():
        assert timed[names].value == pytest.approx(ratio, rel=0.02), names
        low, high = bounds(timed[names])
        assert low < ratio < high
        assert exact[names].value == pytest.approx(ratio, rel=1e-9)
        assert exact[names].low is None and exact[names].how == "exact"
    assert bounds(timed["flash", "rms"])[1] < 1
