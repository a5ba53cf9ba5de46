"""Effects of factorials: published numbers, least squares by statsmodels, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxablate.analysis.results import Result, Results
from jaxablate.analysis.stats.effects import design, effect_tables, fit_effects
from jaxablate.study import Arm, Factor, Response, Study, factorial, one_factor_out, switch
from tests.analysis.made import FACTORS, made_results, made_study

# Montgomery, Design and Analysis of Experiments, example 6.1: etch rate of a plasma tool by gap (a), gas flow
# (b) and power (c), two replicates, and the effects that the book gives.
PLASMA = {
    "": (550, 604), "a": (669, 650), "b": (633, 601), "ab": (642, 635),
    "c": (1037, 1052), "ac": (749, 868), "bc": (1075, 1063), "abc": (729, 860),
}  # fmt: skip
PLASMA_EFFECTS = {
    "a": -101.625, "b": 7.375, "c": 306.125, "ab": -24.875, "ac": -153.625, "bc": -2.125, "abc": 5.625,
}  # fmt: skip
# One run of each arm: invented numbers, and the effects that they have by hand.
ONE_RUN_EACH = {
    "baseline": 0.604, "flash_only": 0.608, "rms_only": 0.606, "swiglu_only": 0.611,
    "flash_rms": 0.609, "flash_swiglu": 0.617, "rms_swiglu": 0.612, "optimized_full": 0.616,
}  # fmt: skip


def results_of(study: Study, values: dict[str, tuple[float, ...]]) -> Results:
    name = study.responses[0].name
    runs = [
        Result(arm, seed, "done", {name: float(value)})
        for arm, column in values.items()
        for seed, value in enumerate(column)
    ]
    return Results(study, tuple(runs), locked="2026-01-01")


def letters(count: int, replicates: int) -> Study:
    factors = [switch(letter, "model", {f"model.{letter}": 1}) for letter in "abcde"[:count]]
    return Study(
        name="book",
        factors=tuple(factors),
        arms=factorial(factors),
        seeds=tuple(range(replicates)),
        responses=(Response("val/y", "max"),),
    )


def plasma() -> Results:
    named = {"_".join(cell) or "baseline": values for cell, values in PLASMA.items()}
    return results_of(letters(3, 2), named)


def frame(results: Results) -> pd.DataFrame:
    """One row a run, factors coded -1 and +1, for statsmodels."""
    study = results.study
    rows = []
    for run in results.runs:
        codes = {f: 1.0 if level == "on" else -1.0 for f, level in study.levels(run.arm).items()}
        rows.append({**codes, "seed": run.seed, "y": run.values[study.responses[0].name]})
    return pd.DataFrame(rows)


def test_effects_of_a_published_experiment() -> None:
    table = effect_tables(plasma())[0]
    found = {"".join(effect.factors): effect.estimate.value for effect in table.effects}
    assert found == pytest.approx(PLASMA_EFFECTS, abs=1e-9)
    assert all(effect.estimate.low is None for effect in table.effects)  # two replicates
    assert "no interval below 3" in table.note


def test_effects_and_errors_are_those_of_least_squares() -> None:
    """The published data, replicates as blocks: estimates, residual, standard errors, limits and p-values."""
    results = plasma()
    crossed, _ = design(results.study)
    assert crossed is not None
    values = np.array([[results.values(arm, "y")[seed] for arm in crossed.arms] for seed in (0, 1)])
    ours = fit_effects(values, crossed.weights(crossed.terms))
    assert ours.pooled
    ols = smf.ols("y ~ C(seed) + a*b*c", frame(results)).fit()
    for index, term in enumerate(crossed.terms):
        name, fit = ":".join(term.names), ours.term(index)
        assert fit.value == pytest.approx(2 * ols.params[name], rel=1e-9)
        assert fit.se == pytest.approx(2 * ols.bse[name], rel=1e-9)
        assert fit.limits(0.95) == pytest.approx(2 * ols.conf_int().loc[name].to_numpy(), rel=1e-9)
        assert 2 * min(fit.p_above(0), fit.p_below(0)) == pytest.approx(ols.pvalues[name], rel=1e-9)
    assert ours.residual_sd == pytest.approx(math.sqrt(ols.mse_resid), rel=1e-9)


@pytest.mark.parametrize(("factors", "seeds", "scale"), [(2, 3, "raw"), (3, 4, "log"), (4, 3, "raw")])
def test_pooled_tables_are_those_of_least_squares(factors: int, seeds: int, scale: str) -> None:
    study = letters(factors, seeds)
    rng = np.random.default_rng(factors + 1)
    values = {arm.name: tuple(5 + rng.normal(size=seeds)) for arm in study.arms}
    results = results_of(study, values)
    table = next(t for t in effect_tables(results) if t.scale == scale)
    assert table.method == "pooled"
    left = "y" if scale == "raw" else "np.log(y)"
    formula = f"{left} ~ C(seed) + {'*'.join('abcde'[:factors])}"
    ols = smf.ols(formula, frame(results)).fit()
    for effect in table.effects:
        name, estimate = ":".join(effect.factors), effect.estimate
        assert estimate.value == pytest.approx(2 * ols.params[name], rel=1e-6)
        assert [estimate.low, estimate.high] == pytest.approx(
            2 * ols.conf_int().loc[name].to_numpy(), rel=1e-6
        )
        assert estimate.p == pytest.approx(ols.pvalues[name], rel=1e-6)
        assert estimate.df == ols.df_resid


def test_the_golden_effects_of_one_run_each() -> None:
    results = results_of(made_study(1), {arm: (value,) for arm, value in ONE_RUN_EACH.items()})
    table = effect_tables(results)[0]
    found = {"".join(f[0] for f in e.factors): e.estimate.value for e in table.effects}
    expected = {
        "f": 0.00425, "r": 0.00075, "s": 0.00725, "fr": -0.00075, "fs": 0.00075, "rs": -0.00075, "frs": -0.00025,
    }  # fmt: skip
    assert found == pytest.approx(expected, abs=1e-12)
    assert {e.better for e in table.effects} == {"unclear"}
    assert table.method == "none"


def test_per_seed_effects_are_t_tests_of_each_seeds_contrast() -> None:
    results = made_results(effects={"swiglu": 0.02}, seeds=6)
    table = effect_tables(results)[0]
    assert table.method == "per_seed"
    swiglu = next(e for e in table.effects if e.factors == ("swiglu",))
    on = [arm.name for arm in results.study.arms if arm.levels["swiglu"] == "on"]
    off = [arm.name for arm in results.study.arms if arm.levels["swiglu"] == "off"]
    per_seed = [
        np.mean([results.values(arm, "macro_auroc")[seed] for arm in on])
        - np.mean([results.values(arm, "macro_auroc")[seed] for arm in off])
        for seed in range(6)
    ]
    reference = stats.ttest_1samp(per_seed, 0)
    interval = reference.confidence_interval(0.95)
    assert swiglu.estimate.p == pytest.approx(reference.pvalue, rel=1e-9)
    assert [swiglu.estimate.low, swiglu.estimate.high] == pytest.approx(
        [interval.low, interval.high], rel=1e-9
    )
    assert swiglu.better == "better"
    assert swiglu.level_means["on"] - swiglu.level_means["off"] == pytest.approx(swiglu.estimate.value)


def test_the_method_follows_the_number_of_seeds_and_the_arms_spread() -> None:
    def method(**made: object) -> tuple[str, str]:
        table = effect_tables(made_results(**made))[0]
        assert table.sd_ratio is not None or made["seeds"] == 1
        return table.method, table.note

    assert method(seeds=1)[0] == "none"
    assert method(seeds=2)[0] == "none"
    assert method(seeds=3)[0] == "pooled"
    assert method(seeds=5)[0] == "per_seed"
    noisy, why = method(seeds=4, noise_of={"rms_only": 0.2})
    assert noisy == "per_seed"
    assert "arm SDs differ (largest arm SD" in why


def test_a_noisy_arm_is_found_as_often_as_the_test_promises() -> None:
    """Equal SDs are taken for unequal in about 10 % of studies; one arm at 10 times the SD hardly ever slips."""
    rng = np.random.default_rng(0)
    crossed, _ = design(made_study())
    assert crossed is not None
    weights = crossed.weights(crossed.terms)
    noise = rng.normal(size=(4000, 3, 8))
    assert 0.06 < 1 - fit_effects(noise, weights).pooled.mean() < 0.12
    noise[..., 5] *= 10
    assert 1 - fit_effects(noise, weights).pooled.mean() > 0.9


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(3, 6), st.floats(-5, 5))
def test_what_a_seed_has_in_common_does_not_matter(rng: int, seeds: int, shift: float) -> None:
    """Blocking: adding a number to all runs of a seed changes no effect, interval or judgement."""
    results = made_results(seeds=seeds, rng=rng)
    runs = list(results.runs)
    for index, run in enumerate(runs):
        if run.seed == 1:
            value = shift + (run.values["macro_auroc"] or 0.0)
            runs[index] = dataclasses.replace(run, values={**run.values, "macro_auroc": value})
    moved = dataclasses.replace(results, runs=tuple(runs))
    before, after = effect_tables(results)[0], effect_tables(moved)[0]
    assert before.method == after.method
    for a, b in zip(before.effects, after.effects, strict=True):
        assert [a.estimate.value, a.estimate.low, a.estimate.high] == pytest.approx(
            [b.estimate.value, b.estimate.low, b.estimate.high], abs=1e-9
        )
        assert a.better == b.better


def test_the_log_scale_is_of_ratios_and_needs_positive_values() -> None:
    results = made_results(effects={"swiglu": 0.02}, seeds=5)
    tables = {(t.response, t.scale): t for t in effect_tables(results)}
    loss = next(e for e in tables["loss", "log"].effects if e.factors == ("swiglu",))
    means = loss.level_means
    assert loss.estimate.value == pytest.approx(math.log(means["on"] / means["off"]))
    assert loss.primary
    assert loss.better == "better"
    assert loss.text.startswith("swiglu lowers loss by 5")
    assert "%" in loss.text
    negative = results_of(letters(1, 3), {"baseline": (-1, 2, 3), "a": (1, 2, 4)})
    assert [t.scale for t in effect_tables(negative)] == ["raw"]


def test_interactions_show_every_combination_of_their_levels() -> None:
    table = effect_tables(made_results(effects={"flash*rms": 0.02}, seeds=5))[0]
    pair = next(e for e in table.effects if e.factors == ("flash", "rms"))
    assert set(pair.level_means) == {
        "flash=off,rms=off", "flash=on,rms=off", "flash=off,rms=on", "flash=on,rms=on",
    }  # fmt: skip
    at_rms = [
        pair.level_means[f"flash=on,rms={rms}"] - pair.level_means[f"flash=off,rms={rms}"]
        for rms in ("off", "on")
    ]
    assert pair.estimate.value == pytest.approx((at_rms[1] - at_rms[0]) / 2)
    assert "clear interaction" in pair.text


# --------------------------------------------------------------------------------------- holes


def test_a_missing_cell_is_refused_by_name() -> None:
    results = made_results(seeds=3, missing={"rms_only": (0, 1, 2)})
    table = effect_tables(results)[0]
    assert table.effects == ()
    assert table.method == "none"
    assert "rms_only (seeds 0, 1, 2: not run)" in table.note


def test_an_incomplete_seed_is_dropped_by_name_in_every_arm() -> None:
    results = made_results(seeds=5, missing={"rms_only": (2,)}, missing_state="oom")
    table = effect_tables(results)[0]
    assert table.seeds == (0, 1, 3, 4)
    assert "left out: rms_only (seed 2: oom)" in table.note
    whole = effect_tables(made_results(seeds=5))[0]
    assert "left out" not in whole.note


def test_a_diverged_run_is_named_and_its_survivors_win_nothing() -> None:
    made = {"effects": {"swiglu": 0.1}, "seeds": 5, "noise": 0.001}
    table = effect_tables(made_results(diverged={"optimized_full": (3,)}, **made))[0]
    assert "optimized_full (seed 3: diverged)" in table.note
    assert "of the survivors" in table.note
    swiglu = next(e for e in table.effects if e.factors == ("swiglu",))
    assert swiglu.estimate.note == "of the survivors"
    assert swiglu.better == "unclear"
    clean = next(e for e in effect_tables(made_results(**made))[0].effects if e.factors == ("swiglu",))
    assert clean.better == "better"
    # With enough seeds the test that ranks lost runs worst agrees.
    many = made_results(
        diverged={"optimized_full": (3,)}, effects={"swiglu": 0.1}, seeds=20, noise=0.001
    )  # fmt: skip
    swiglu = next(e for e in effect_tables(many)[0].effects if e.factors == ("swiglu",))
    assert swiglu.better == "better"


def test_censored_times_have_no_effects() -> None:
    table = next(
        t for t in effect_tables(made_results(seed_sd=0.1, seeds=5)) if t.response == "macro_auroc_time"
    )
    assert table.effects == ()
    assert "censored" in table.note
    assert "did not reach the target" in table.note


# --------------------------------------------------------------------------------------- designs


def test_more_than_two_levels_are_contrasts_with_the_reference() -> None:
    position = Factor("position", "model", {"rope": {}, "none": {"model.p": 0}, "learned": {"model.p": 1}})
    factors = (FACTORS[0], position)
    study = made_study(5, factors=factors, arms=factorial(factors), hypotheses=())
    results = made_results(study, effects={"position=none": -0.05, "flash": 0.01}, noise=1e-6, seed_sd=0.01)
    table = effect_tables(results)[0]
    found = {e.factors: e.estimate.value for e in table.effects}
    assert found == pytest.approx(
        {
            ("flash",): 0.01, ("position=none",): -0.05, ("position=learned",): 0.0,
            ("flash", "position=none"): 0.0, ("flash", "position=learned"): 0.0,
        },
        abs=1e-5,
    )  # fmt: skip
    none = next(e for e in table.effects if e.factors == ("position=none",))
    assert set(none.level_means) == {"rope", "none"}
    assert none.better == "worse"


def test_one_factor_at_a_time_is_no_factorial() -> None:
    study = made_study(3, arms=one_factor_out(FACTORS), hypotheses=())
    tables = effect_tables(made_results(study))
    assert [t.effects for t in tables] == [()] * len(study.responses)
    assert "one factor at a time" in tables[0].note


def test_an_arm_that_is_missing_from_the_design_is_named() -> None:
    study = made_study(3, arms=made_study().arms[:-1], hypotheses=())
    note = effect_tables(made_results(study))[0].note
    assert "flash=on, rms=on, swiglu=on" in note
    assert "incomplete factorial" in note


def test_a_factorial_may_have_arms_beside_it() -> None:
    extra = switch("pos", "model", {"model.pos": "none"})
    study = made_study(5, factors=(*FACTORS, extra), arms=(*made_study().arms, Arm("pos", {"pos": "on"})))
    tables = effect_tables(made_results(study, effects={"pos": 9.0}))
    assert "no part of the factorial: pos" in tables[0].note
    whole = effect_tables(made_results())[0]
    assert [e.factors for e in tables[0].effects] == [e.factors for e in whole.effects]
    assert all(abs(e.estimate.value) < 1 for e in tables[0].effects)


def test_weights_of_two_levels_are_montgomerys() -> None:
    crossed, _ = design(made_study())
    assert crossed is not None
    signs = np.array(list(itertools.product((-1, 1), repeat=3)))
    subsets = [c for size in (1, 2, 3) for c in itertools.combinations(range(3), size)]
    expected = np.array([signs[:, list(c)].prod(axis=1) / 4 for c in subsets])
    assert np.array_equal(crossed.weights(crossed.terms), expected)


def test_identical_arms_are_the_same_and_not_unclear() -> None:
    values = {"baseline": (1.0, 2.0, 3.0, 4.0, 5.0), "a": (1.0, 2.0, 3.0, 4.0, 5.0)}
    effect = effect_tables(results_of(letters(1, 5), values))[0].effects[0]
    assert effect.better == "same"
    assert (effect.estimate.low, effect.estimate.high) == (0.0, 0.0)
    shifted = {**values, "a": (1.5, 2.5, 3.5, 4.5, 5.5)}
    effect = effect_tables(results_of(letters(1, 5), shifted))[0].effects[0]
    assert effect.better == "unclear"
    assert effect.estimate.low is None
    assert "no spread" in effect.estimate.note
