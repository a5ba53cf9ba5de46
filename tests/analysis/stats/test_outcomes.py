"""What became of the runs: means of survivors, divergence, times to a target, speed, learning rates, compute."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from jaxablate.analysis.results import Result, Results
from jaxablate.analysis.stats.outcomes import arm_values, divergence, proportion, times_to_target
from jaxablate.analysis.stats.rates import rate_curves
from jaxablate.analysis.stats.speed import compute, speeds
from jaxablate.errors import UserError
from jaxablate.study import LearningRate, Response, Study, one_factor_out, switch
from tests.analysis.made import HARDWARE, made_results, made_study, tuned_study

NEW = switch("new", "model", {"model.new": 1})
TIME = Response("val/auroc", "max", reduce="time_to", target=0.9, name="time")


def two_arms(runs: list[Result], *responses: Response, seeds: int = 4, **about: Any) -> Results:
    study = Study(
        name="two",
        factors=(NEW,),
        arms=one_factor_out((NEW,)),
        seeds=tuple(range(seeds)),
        responses=responses,
        **({"learning_rate": about.pop("rule")} if "rule" in about else {}),
    )
    return Results(study, tuple(runs), **about)


# ------------------------------------------------------------------------------------------ values


def test_the_mean_of_an_arm_is_students() -> None:
    results = made_results(seeds=6)
    value = next(v for v in arm_values(results) if (v.arm, v.response) == ("rms_only", "macro_auroc"))
    numbers = list(results.values("rms_only", "macro_auroc").values())
    interval = stats.ttest_1samp(numbers, 0).confidence_interval(0.95)
    assert value.mean.value == pytest.approx(np.mean(numbers))
    assert [value.mean.low, value.mean.high] == pytest.approx([interval.low, interval.high])
    assert value.sd == pytest.approx(np.std(numbers, ddof=1))
    assert value.mean.p is None
    assert value.complete
    assert value.mean.note == ""


def test_a_mean_over_survivors_says_so() -> None:
    results = made_results(seeds=3, diverged={"rms_only": (1,)})
    values = {(v.arm, v.response): v for v in arm_values(results)}
    lost = values["rms_only", "macro_auroc"]
    assert (lost.planned, lost.done, lost.diverged, lost.unfinished) == (3, 2, 1, 0)
    assert not lost.complete
    assert lost.mean.low is None
    assert lost.mean.note == "of the 2 survivors: 1 of 3 diverged; 2 seeds: no interval below 3"
    assert values["baseline", "macro_auroc"].mean.note == ""


def test_unfinished_seeds_are_counted_whether_or_not_they_have_a_run() -> None:
    results = made_results(seeds=4, missing={"rms_only": (1, 2, 3)}, missing_state="oom")
    fewer = dataclasses.replace(
        results, runs=tuple(r for r in results.runs if (r.arm, r.seed) != ("rms_only", 3))
    )
    for each in (results, fewer):
        value = next(v for v in arm_values(each) if v.arm == "rms_only")
        assert (value.planned, value.done, value.unfinished) == (4, 1, 3)
        assert "3 of 4 seeds have not finished" in value.mean.note


def test_a_seed_that_was_dropped_later_still_counts() -> None:
    results = made_results(seeds=4)
    dropped = dataclasses.replace(results, study=dataclasses.replace(results.study, seeds=(0, 1, 2)))
    value = arm_values(dropped)[0]
    assert value.planned == len(value.values) == 4


# -------------------------------------------------------------------------------------- divergence


def test_shares_have_exact_intervals() -> None:
    for k, n in ((1, 5), (2, 3), (4, 9)):
        assert proportion(k, n) == pytest.approx(proportion_confint(k, n, 0.05, method="beta"))
    low, high = proportion(0, 5)
    assert (low, round(high, 2)) == (0.0, 0.45)
    assert high == pytest.approx(1 - 0.05 ** (1 / 5))
    assert proportion(5, 5) == pytest.approx((0.05 ** (1 / 5), 1.0))


def test_divergence_is_counted_and_compared_with_the_baseline() -> None:
    results = made_results(
        seeds=8, diverged={"rms_only": range(6), "baseline": (0,)}, missing={"rms_only": (7,)}
    )
    found = {d.arm: d for d in divergence(results)}
    assert (found["rms_only"].diverged, found["rms_only"].ended) == (6, 7)
    assert found["rms_only"].fisher_p == pytest.approx(stats.fisher_exact([[6, 1], [1, 7]]).pvalue, rel=1e-9)
    assert found["rms_only"].steps == (40,) * 6
    assert found["baseline"].fisher_p is None
    assert found["flash_only"].diverged == 0


def test_an_arm_that_never_ended_has_no_share() -> None:
    found = {d.arm: d for d in divergence(made_results(seeds=2, missing={"rms_only": (0, 1)}))}
    assert (found["rms_only"].ended, found["rms_only"].high, found["rms_only"].fisher_p) == (0, None, None)


# -------------------------------------------------------------------------------------- time to target


def timed(arm: str, seed: int, step: float | None, **about: Any) -> Result:
    fields: dict[str, Any] = {
        "steps": 100,
        "seconds": {"time": None if step is None else step / 10},
        "perf": {"steps_per_sec": 10.0},
        "hardware": "1 x A",
    }
    return Result(arm, seed, "done", {"time": step}, **(fields | about))


def test_a_target_that_was_not_reached_counts_as_the_horizon() -> None:
    baseline = [timed("baseline", seed, step) for seed, step in enumerate((40, 60, None, 80))]
    new = [timed("new", seed, step) for seed, step in enumerate((20, None, None, None))]
    found = {t.arm: t for t in times_to_target(two_arms([*baseline, *new], TIME, targets={"time": 0.9}))}
    one = found["baseline"]
    assert (one.reached, one.runs, one.horizon, one.target) == (3, 4, 100, 0.9)
    assert one.mean_steps.value == (40 + 60 + 100 + 80) / 4
    assert one.mean_seconds is not None
    assert one.mean_seconds.value == pytest.approx(28 / 4)
    assert one.median_steps == 60
    assert one.note == "1 of 4 did not reach it"
    assert found["new"].median_steps is None  # fewer than half
    assert found["new"].mean_steps.value == (20 + 300) / 4


def test_a_diverged_run_never_reaches_its_target() -> None:
    runs = [timed("baseline", 0, 40), timed("baseline", 1, 60)]
    lost = dataclasses.replace(timed("baseline", 2, None), state="diverged", steps=7)
    found = times_to_target(two_arms([*runs, lost], TIME, targets={"time": 0.9}))[0]
    assert (found.reached, found.runs, found.horizon) == (2, 3, 100)
    assert found.mean_steps.value == pytest.approx(200 / 3)
    assert found.median_steps == 60


def test_a_run_that_stopped_early_never_reaches_its_target_and_shortens_no_horizon() -> None:
    runs = [timed("baseline", 0, 40), timed("baseline", 1, 60)]
    short = timed("baseline", 2, None, steps=30)
    (found, _) = times_to_target(
        two_arms([*runs, dataclasses.replace(short, stopped_at=30)], TIME, targets={"time": 0.9})
    )
    assert (found.reached, found.runs, found.horizon) == (2, 3, 100)
    assert found.mean_steps.value == pytest.approx(200 / 3)
    (other, _) = times_to_target(two_arms([*runs, short], TIME, targets={"time": 0.9}))
    assert other.horizon == 30  # of one that was only short nothing is known beyond its end


def test_a_target_counts_only_up_to_the_horizon_that_all_runs_have() -> None:
    runs = [timed("baseline", 0, 40), timed("baseline", 1, 150, steps=200)]
    found = times_to_target(two_arms(runs, TIME, targets={"time": 0.9}))[0]
    assert (found.reached, found.horizon, found.mean_steps.value) == (1, 100, 70)


@pytest.mark.parametrize("other", [{"hardware": "1 x B"}, {"cohort_size": 4}])
def test_seconds_need_the_same_hardware_and_cohort(other: dict[str, Any]) -> None:
    same = [timed(arm, seed, 40) for arm in ("baseline", "new") for seed in range(3)]
    assert all(
        t.mean_seconds is not None for t in times_to_target(two_arms(same, TIME, targets={"time": 0.9}))
    )
    mixed = [*same[:-1], timed("new", 2, 40, **other)]
    for found in times_to_target(two_arms(mixed, TIME, targets={"time": 0.9})):
        assert found.mean_seconds is None
        assert "different hardware" in found.note
        assert found.mean_steps.value == 40


def test_without_a_target_there_are_no_times() -> None:
    found = times_to_target(two_arms([timed("new", 0, None)], TIME, targets={"time": None}))
    assert found[1].mean_steps.value is None
    assert "no target" in found[1].note


def test_a_table_without_lengths_cannot_bound_what_was_not_reached() -> None:
    runs = [Result("baseline", seed, "done", {"time": step}) for seed, step in enumerate((40.0, 60.0, None))]
    found = times_to_target(two_arms(runs, TIME, targets={"time": 0.9}))[0]
    assert (found.reached, found.runs, found.mean_steps.value) == (2, 3, None)
    whole = times_to_target(two_arms(runs[:2], TIME, targets={"time": 0.9}))[0]
    assert whole.mean_steps.value == 50


# ------------------------------------------------------------------------------------------- speed


def test_speed_is_a_median_beside_its_hardware_and_kernels() -> None:
    found = {s.arm: s for s in speeds(made_results(seeds=5))}
    flash, baseline = found["flash_only"], found["baseline"]
    assert (flash.hardware, flash.kernels, flash.runs) == (HARDWARE, "attention: blockwise", 5)
    assert flash.ratio == pytest.approx(1.5, rel=0.05)
    assert baseline.ratio == 1.0
    assert flash.ratio == flash.steps_per_sec / baseline.steps_per_sec
    assert 0 < (flash.spread or 0) < 0.05 * flash.steps_per_sec
    assert (flash.peak_bytes, baseline.peak_bytes) == (2**30, 2**31)


def test_speeds_on_different_hardware_are_never_compared() -> None:
    found = {s.arm: s for s in speeds(made_results(seeds=3, hardware={"flash_only": "1 x NVIDIA B200"}))}
    assert found["flash_only"].ratio is None
    assert found["flash_rms"].ratio is not None
    results = made_results(seeds=3)
    alone = dataclasses.replace(
        results,
        runs=tuple(
            dataclasses.replace(r, cohort_size=1) if r.arm == "flash_only" else r for r in results.runs
        ),
    )
    assert {s.arm: s.ratio for s in speeds(alone)}["flash_only"] is None


def test_an_arm_on_two_machines_has_two_rows() -> None:
    results = made_results(seeds=4)
    runs = tuple(
        dataclasses.replace(r, hardware="1 x NVIDIA B200") if r.arm == "rms_only" and r.seed > 1 else r
        for r in results.runs
    )
    rows = [s for s in speeds(dataclasses.replace(results, runs=runs)) if s.arm == "rms_only"]
    assert [(s.hardware, s.runs, s.ratio is None) for s in rows] == [
        (HARDWARE, 2, False), ("1 x NVIDIA B200", 2, True),
    ]  # fmt: skip


def test_compute_shares_a_cohort_and_counts_devices() -> None:
    perf = {"steps_per_sec": 1.0, "compile_sec": 600.0}
    common: dict[str, Any] = {"values": {"time": None}, "perf": perf, "steps": 3000}
    runs = [
        *(Result("new", s, "done", hardware="1 x A", cohort_size=3, **common) for s in range(3)),
        Result("baseline", 0, "done", hardware="4 x B", **common),
        Result("baseline", 1, "diverged", {"time": None}),
        Result("baseline", 2, "oom", {"time": None}),
    ]
    found = compute(two_arms(runs, TIME))
    assert (found["runs"], found["runs_done"], found["runs_diverged"], found["runs_oom"]) == (6, 4, 1, 1)
    assert found["run_hours"] == pytest.approx(4)
    assert found["device_hours_on"] == pytest.approx({"1 x A": 1.0, "4 x B": 4.0})
    assert found["device_hours"] == pytest.approx(5)
    assert found["runs_without_times"] == 1


# ---------------------------------------------------------------------------------- learning rates


def tuned(
    scores: dict[float, tuple[float | None, ...]], chosen: float, response: Response, **row: Any
) -> Any:
    """None is a tuning run that diverged; `row` is what `rates.json` says besides of the arm."""
    rule = LearningRate(tuple(scores), (10, 11))
    runs = [
        Result("baseline", 10 + i, "diverged" if value is None else "done", {response.name: value},
               phase="tuning", learning_rate=rate)
        for rate, column in scores.items()
        for i, value in enumerate(column)
    ]  # fmt: skip
    about = {"rule": rule, "rates": {"baseline": {"learning_rate": chosen, "edge": ""} | row}}
    return rate_curves(two_arms(runs, response, **about))[0]


def test_sensitivity_is_the_mean_shortfall_from_the_best_rate() -> None:
    score = Response("val/auroc", "max", chance=0.5)
    curve = tuned({0.1: (0.6, 0.6), 0.2: (0.8, 0.9), 0.4: (None, 0.7)}, 0.2, score)
    assert [p.mean for p in curve.points] == pytest.approx([0.6, 0.85, 0.7])
    assert [p.diverged for p in curve.points] == [0, 0, 1]
    # The diverged run counts at chance: (0.85 - 0.6 + 0 + 0.85 - 0.6) / 3.
    assert curve.sensitivity == pytest.approx(0.5 / 3)
    assert not curve.at_edge
    # Wortsman et al. cut off at what not having trained gives.
    below = tuned({0.1: (0.3, 0.3), 0.2: (0.8, 0.8)}, 0.2, score)
    assert below.sensitivity == pytest.approx(0.15)


def test_a_lower_loss_is_the_best_rate() -> None:
    curve = tuned({0.1: (3.0, 3.2), 0.2: (2.0, 2.2), 0.4: (2.5, 2.5)}, 0.2, Response("val/loss", "min"))
    assert curve.sensitivity == pytest.approx((1.0 + 0 + 0.4) / 3)


def test_divergence_without_a_chance_level_gives_no_number() -> None:
    curve = tuned({0.1: (3.0, 3.2), 0.2: (None, 2.2)}, 0.1, Response("val/loss", "min"))
    assert curve.sensitivity is None
    assert "chance=X" in curve.note


def test_an_optimum_at_the_edge_is_flagged() -> None:
    scores: dict[float, tuple[float | None, ...]] = {0.1: (0.6, 0.6), 0.2: (0.8, 0.9)}
    curve = tuned(scores, 0.2, Response("val/auroc", "max"), edge="highest")
    assert curve.at_edge
    assert "edge of the grid" in curve.note


def test_edge_and_means_are_those_that_the_choice_went_by() -> None:
    """The largest stable rate is chosen below one that diverged, and loses with log scale are geometric means."""
    scores: dict[float, tuple[float | None, ...]] = {0.1: (1.0, 4.0), 0.2: (None, 2.0)}
    row = {"edge": "", "grid": [0.1, 0.2], "means": [2.0, None]}
    curve = tuned(scores, 0.1, Response("val/loss", "min", scale="log"), **row)
    assert not curve.at_edge
    assert [p.mean for p in curve.points] == [2.0, None]
    before = tuned(scores, 0.1, Response("val/loss", "min"))
    assert [p.mean for p in before.points] == [2.5, 2.0]
    with pytest.raises(UserError, match="arm 'baseline': 2 rates with 1 means; restore"):
        tuned(scores, 0.1, Response("val/loss", "min"), grid=[0.1, 0.2], means=[2.0])


def test_tuning_runs_make_a_curve_and_enter_nothing_else() -> None:
    results = made_results(tuned_study(3))
    curves = {c.arm: c for c in rate_curves(results)}
    assert list(curves) == [arm.name for arm in results.study.arms]
    assert [p.learning_rate for p in curves["baseline"].points] == [3e-4, 1e-3, 3e-3]
    assert curves["baseline"].chosen == 1e-3
    assert not curves["baseline"].at_edge
    assert all(v.planned == len(v.values) == 3 for v in arm_values(results) if v.response == "loss")
    assert sum(s.runs for s in speeds(results)) == 24
    assert rate_curves(made_results(made_study(3))) == ()
