"""Verdicts: the tests behind them, what they may say, and what they must not."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from jaxablate import runstore
from jaxablate.analysis.findings import Verdict
from jaxablate.analysis.results import Result, Results
from jaxablate.analysis.stats import hypotheses, intervals, power
from jaxablate.analysis.stats.contrasts import contrasts
from jaxablate.analysis.stats.effects import effect_tables
from jaxablate.analysis.stats.hypotheses import holm, loss_ratio_in_words, verdicts
from jaxablate.analysis.stats.locked import standing
from jaxablate.errors import UserError
from jaxablate.study import Hypothesis, Response, Study, one_factor_out, switch
from tests.analysis.made import FACTORS, made_results, made_study

NEW = switch("new", "model", {"model.new": 1})
AUROC, LOSS = Response("val/auroc", "max"), Response("val/loss", "min", scale="log")


def pair(
    control: Any, treatment: Any, *asked: Hypothesis, response: Response = AUROC, **about: Any
) -> Results:
    """A study of two arms; None is a run that diverged."""
    study = Study(
        name="pair",
        factors=(NEW,),
        arms=one_factor_out((NEW,)),
        seeds=tuple(range(len(control))),
        responses=(response,),
        hypotheses=asked,
    )
    runs = [
        Result(arm, seed, "diverged" if value is None else "done", {response.name: value})
        for arm, column in (("baseline", control), ("new", treatment))
        for seed, value in enumerate(column)
    ]
    return Results(study, tuple(runs), **({"locked": "2026-01-01"} | about))


def verdict(control: Any, treatment: Any, claim: str, response: Response = AUROC, **h: Any) -> Verdict:
    asked = Hypothesis("h", claim, **({"treatment": "new"} | h))
    return verdicts(pair(control, treatment, asked, response=response))[0]


RNG = np.random.default_rng(7)
CONTROL = 0.7 + 0.01 * RNG.normal(size=8)
TREATMENT = CONTROL + 0.006 + 0.004 * RNG.normal(size=8)
BORDER = np.zeros(5), np.array([0.6, 1.4, 1.5, 0.7, 2.1])  # p = 0.01


# --------------------------------------------------------------------------- the tests behind the words


def test_equivalence_is_two_one_sided_tests() -> None:
    ours = verdict(CONTROL, TREATMENT, "equivalence", margin=0.01)
    p, (_, p_low, _), (_, p_high, _) = ttost_paired(TREATMENT, CONTROL, -0.01, 0.01)
    assert ours.p == pytest.approx(p, rel=1e-9)
    assert ours.p == pytest.approx(max(p_low, p_high), rel=1e-9)
    low, high = stats.ttest_rel(TREATMENT, CONTROL).confidence_interval(0.90)
    assert [ours.estimate.low, ours.estimate.high] == pytest.approx([low, high], rel=1e-9)


def test_equivalence_of_a_ratio_is_that_of_logs() -> None:
    ours = verdict(
        CONTROL * 4, TREATMENT * 4, "equivalence", margin=0.05, scale="ratio", response=LOSS
    )  # fmt: skip
    p, _, _ = ttost_paired(TREATMENT, CONTROL, 1 / 1.05, 1.05, transform=np.log)
    assert ours.p == pytest.approx(p, rel=1e-9)
    assert ours.outcome == "supported"
    assert ours.estimate.value == pytest.approx(stats.gmean(TREATMENT) / stats.gmean(CONTROL))


@pytest.mark.parametrize("margin", [0.0, 0.004])
def test_superiority_is_the_paired_t_test_against_the_margin(margin: float) -> None:
    ours = verdict(CONTROL, TREATMENT, "superiority", margin=margin)
    reference = stats.ttest_rel(TREATMENT - margin, CONTROL)
    assert min(ours.p, ours.p_against) == pytest.approx(reference.pvalue, rel=1e-9)
    low, high = stats.ttest_rel(TREATMENT, CONTROL).confidence_interval(0.95)
    assert [ours.estimate.low, ours.estimate.high] == pytest.approx([low, high], rel=1e-9)
    assert (ours.outcome == "supported") == (low > margin)


def test_non_inferiority_is_one_of_the_two_one_sided_tests() -> None:
    worse = 2 * CONTROL - TREATMENT
    ours = verdict(CONTROL, worse, "non_inferiority", margin=0.01)
    reference = stats.ttest_rel(worse + 0.01, CONTROL, alternative="greater")
    assert ours.p == pytest.approx(reference.pvalue, rel=1e-9)
    assert verdict(CONTROL, worse, "non_inferiority", margin=0.03).outcome == "supported"
    assert verdict(CONTROL, worse - 0.1, "non_inferiority", margin=0.03).outcome == "refuted"


def test_welch_is_scipys_and_ignores_the_pairing() -> None:
    ours = verdict(CONTROL, TREATMENT, "superiority", test="welch")
    reference = stats.ttest_ind(TREATMENT, CONTROL, equal_var=False)
    assert min(ours.p, ours.p_against) == pytest.approx(reference.pvalue, rel=1e-9)
    interval = reference.confidence_interval(0.95)
    assert [ours.estimate.low, ours.estimate.high] == pytest.approx([interval.low, interval.high], rel=1e-9)
    shuffled = verdict(CONTROL, TREATMENT[::-1], "superiority", test="welch")
    assert shuffled.p == pytest.approx(ours.p)
    assert verdict(CONTROL, TREATMENT[::-1], "superiority").p != pytest.approx(
        verdict(CONTROL, TREATMENT, "superiority").p
    )


def test_welch_of_a_main_effect_weighs_all_cells() -> None:
    asked = Hypothesis("h", "superiority", factor="rms", test="welch")
    results = made_results(
        made_study(6, arms=one_factor_out(FACTORS[1:2]), factors=FACTORS[1:2], hypotheses=(asked,))
    )
    columns = [list(results.values(arm, "macro_auroc").values()) for arm in ("rms", "baseline")]
    reference = stats.ttest_ind(*columns, equal_var=False)
    ours = verdicts(results)[0]
    assert min(ours.p, ours.p_against) == pytest.approx(reference.pvalue, rel=1e-9)


def test_holms_correction() -> None:
    """Step by step: the smallest times 4, the next times 3, and so on, never falling."""
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    many = np.random.default_rng(0).random((20, 7)) ** 3
    many[0, :3] = 0.01  # ties
    assert holm(many) == pytest.approx(np.array([multipletests(p, method="holm")[1] for p in many]), rel=1e-9)
    results = made_results(effects={"swiglu": 0.01, "rms": 0.002}, seeds=4, noise=0.01)
    found = verdicts(results)
    primary = [v for v in found if v.primary]
    assert [v.p_holm for v in primary] == pytest.approx(
        list(holm(np.array([min(v.p, v.p_against) for v in primary])))
    )
    assert [v.p_holm for v in found if not v.primary] == [None]


def test_a_result_that_holds_alone_may_not_hold_among_many() -> None:
    alone = verdict(*BORDER, "superiority")
    assert alone.outcome == "supported"
    assert (alone.p or 0) > 0.05 / 7
    many = [Hypothesis(f"h{i}", "superiority", "new") for i in range(7)]
    found = verdicts(pair(*BORDER, *many))
    assert {v.outcome for v in found} == {"inconclusive"}
    assert "not after Holm's correction" in found[0].reason
    secondary = [dataclasses.replace(h, primary=False) for h in many]
    assert {v.outcome for v in verdicts(pair(*BORDER, *secondary))} == {"supported"}


def test_an_untested_hypothesis_still_counts_in_the_family() -> None:
    h = Hypothesis("h", "superiority", "new")
    waiting = Hypothesis("waits", "superiority", "new", response="loss")
    results = pair(CONTROL, TREATMENT, h)
    both = dataclasses.replace(results.study, responses=(AUROC, LOSS), hypotheses=(h, waiting))
    first, second = verdicts(dataclasses.replace(results, study=both))
    assert second.outcome == "not run"
    assert first.p_holm == pytest.approx(min(1, 2 * first.p))


def test_p_above_5_percent_is_not_equivalence() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 4))
    assert stats.ttest_rel(a, b).pvalue > 0.05
    assert verdict(a, b, "equivalence", margin=0.1).outcome == "inconclusive"


@pytest.mark.parametrize(
    ("response", "ratio", "outcome"),
    [
        (LOSS, 0.895, "supported"),
        (LOSS, 0.905, "refuted"),  # below 1/1.1, and still not better by 10 %
        (AUROC, 1.105, "supported"),
        (AUROC, 1.095, "refuted"),
    ],
)
def test_better_by_ten_percent_is_a_ratio_beyond_090_or_110(
    response: Response, ratio: float, outcome: str
) -> None:
    noise = np.exp(0.001 * np.array([-1, 1, 0.5, -0.5, 0.2, -0.2]))
    control = np.array([3.0, 3.1, 3.2, 2.9, 3.3, 3.05])
    found = verdict(control, ratio * control * noise, "superiority", response, margin=0.1, scale="ratio")
    assert found.outcome == outcome


def test_a_claim_that_cannot_be_is_refused_when_it_is_declared() -> None:
    with pytest.raises(UserError, match="nothing positive is lower by 100 %"):
        verdict(CONTROL, TREATMENT, "superiority", LOSS, margin=1.0, scale="ratio")
    assert verdict(CONTROL, TREATMENT, "superiority", AUROC, margin=1.0, scale="ratio").outcome == "refuted"


def test_a_ratio_needs_positive_values() -> None:
    found = verdict([-1.0, 1, 2], [1.0, 2, 3], "superiority", scale="ratio")
    assert found.outcome == "inconclusive"
    assert "above zero" in found.reason


# --------------------------------------------------------------------------------------- direction


@settings(max_examples=60)
@given(
    st.lists(st.floats(0.5, 2.0), min_size=3, max_size=8),
    st.floats(0.01, 2.0),
    st.sampled_from(["difference", "ratio"]),
    st.integers(0, 1000),
)
def test_what_got_worse_is_never_called_better(
    control: list[float], worse: float, scale: str, rng: int
) -> None:
    """A loss that rose in every seed, a score that fell, a target reached later: whatever the numbers."""
    rises = np.array(control) + worse * (1 + 0.3 * np.random.default_rng(rng).random(len(control)))
    late = dataclasses.replace(AUROC, reduce="time_to", target=0.9, name="late")
    for response, bad in ((LOSS, rises), (AUROC, 6 - rises), (late, rises)):
        good = 6 - np.array(control) if response is AUROC else np.array(control)
        asked = Hypothesis("h", "superiority", "new", scale=scale)
        results = pair(good, bad, asked, response=response)
        assert verdicts(results)[0].outcome in ("refuted", "inconclusive")
        found = contrasts(results)[0]
        assert found.better in ("worse", "unclear")
        assert found.difference.value * (-1 if response is AUROC else 1) > 0
        for table in effect_tables(results):
            assert {effect.better for effect in table.effects} <= {"worse", "unclear"}
        # The control: the same numbers the other way round.
        turned = pair(bad, good, asked, response=response)
        assert verdicts(turned)[0].outcome in ("supported", "inconclusive")
        assert contrasts(turned)[0].better in ("better", "unclear")


def test_a_shorter_time_to_the_target_is_better_although_the_metric_is_better_high() -> None:
    late = Response("val/auroc", "max", reduce="time_to", target=0.9)
    found = verdict([300.0, 310, 305, 290], [200.0, 215, 210, 190], "superiority", late)
    assert found.outcome == "supported"
    assert (
        contrasts(pair([300.0, 310, 305, 290], [200.0, 215, 210, 190], response=late))[0].better == "better"
    )


# ----------------------------------------------------------------------------- few seeds, lost runs


def test_below_three_seeds_there_is_no_interval_and_it_says_so() -> None:
    found = verdict([0.70, 0.71], [0.90, 0.91], "superiority")
    assert found.outcome == "inconclusive"
    assert (found.estimate.low, found.p, found.p_holm) == (None, None, None)
    assert "2 seeds: no interval below 3" in found.reason
    assert "at least 3 seeds" in found.advice
    one = verdict([0.70], [0.90], "equivalence", margin=0.5, test="welch")
    assert "1 seed: no interval below 3" in one.reason


def test_nothing_run_is_not_run() -> None:
    study = pair([1.0], [1.0], Hypothesis("h", "superiority", "new")).study
    found = verdicts(Results(study, (), locked="2026-01-01"))[0]
    assert found.outcome == "not run"
    assert "no run has ended of new, baseline" in found.reason
    half = Results(study, (Result("baseline", 0, "done", {"auroc": 1.0}),), locked="2026-01-01")
    assert "no run has ended of new" in verdicts(half)[0].reason


def test_survivors_alone_support_nothing() -> None:
    few = verdict(CONTROL[:5], [None, 0.8, 0.82, 0.81, 0.83], "superiority")
    assert few.outcome == "inconclusive"
    assert "new: 1 of 5 diverged" in few.reason
    assert few.estimate.note == "of the survivors"
    whole = verdict(CONTROL[:5], CONTROL[:5] + np.array([0.1, 0.11, 0.12, 0.1, 0.09]), "superiority")
    assert whole.outcome == "supported"


def test_with_enough_seeds_the_lost_run_is_ranked_worst() -> None:
    rng = np.random.default_rng(0)
    control = 0.7 + 0.01 * rng.normal(size=14)
    treatment = list(control + 0.1 + 0.01 * rng.normal(size=14))
    one_lost = verdict(control, [None, *treatment[1:]], "superiority")
    assert one_lost.outcome == "supported"
    assert "signed-rank" in one_lost.reason
    many_lost = verdict(control, [None] * 5 + treatment[5:], "superiority")
    assert many_lost.outcome == "inconclusive"
    assert (many_lost.p or 0) > 0.1


def test_losses_cannot_save_a_claim_that_the_survivors_refute() -> None:
    rng = np.random.default_rng(0)
    control = 0.7 + 0.01 * rng.normal(size=5)
    worse = [None, *(control[1:] - 0.2 - 0.01 * rng.normal(size=4))]
    assert verdict(control, worse, "superiority").outcome == "refuted"
    # What the control lost cannot flatter the treatment, and could flatter its refutation.
    noise = 0.01 * rng.normal(size=5)
    lossy = [None, *control[1:]]
    assert verdict(lossy, control + 0.2 + noise, "superiority").outcome == "supported"
    assert verdict(lossy, control - 0.2 + noise, "superiority").outcome == "inconclusive"


def test_a_loss_in_any_cell_bears_on_the_main_effect() -> None:
    made = {"effects": {"swiglu": 0.1}, "seeds": 5, "noise": 0.001}
    by_name = {v.hypothesis: v for v in verdicts(made_results(diverged={"flash_swiglu": (0,)}, **made))}
    assert by_name["swiglu_better"].outcome == "inconclusive"
    assert "flash_swiglu: 1 of 5 diverged" in by_name["swiglu_better"].reason
    assert by_name["full_no_worse"].outcome == "supported"  # of other arms
    assert {v.hypothesis: v for v in verdicts(made_results(**made))}["swiglu_better"].outcome == "supported"


def test_a_main_effect_needs_a_factorial() -> None:
    asked = (Hypothesis("h", "superiority", factor="rms"),)
    found = verdicts(made_results(made_study(5, arms=one_factor_out(FACTORS), hypotheses=asked)))[0]
    assert found.outcome == "inconclusive"
    assert "one factor at a time" in found.reason


def test_a_main_effect_uses_the_tables_method() -> None:
    for seeds, method in ((3, "pooled"), (5, "effect in each of 5 seeds")):
        results = made_results(effects={"swiglu": 0.02}, seeds=seeds)
        found = next(v for v in verdicts(results) if v.hypothesis == "swiglu_better")
        effect = next(e for e in effect_tables(results)[0].effects if e.factors == ("swiglu",))
        ours = [found.estimate.value, found.estimate.low, found.estimate.high, found.estimate.p]
        table = [effect.estimate.value, effect.estimate.low, effect.estimate.high, effect.estimate.p]
        assert ours == pytest.approx(table)
        assert method in found.estimate.how


# ------------------------------------------------------------------------------------------- ranks


def test_sign_flips_are_scipys() -> None:
    d = RNG.normal(0.5, 1, size=9)
    for alternative in ("two-sided", "greater", "less"):
        reference = stats.permutation_test(
            (d,), np.mean, permutation_type="samples", alternative=alternative, n_resamples=np.inf
        )
        assert intervals.sign_flip(d, alternative) == pytest.approx(reference.pvalue)
        wilcoxon = stats.wilcoxon(d, alternative=alternative, method="exact")
        assert intervals.signed_rank(d, alternative) == pytest.approx(wilcoxon.pvalue)
    many = RNG.normal(0.3, 1, size=40)
    assert intervals.signed_rank(many) == pytest.approx(stats.wilcoxon(many).pvalue, abs=0.01)


def test_below_six_a_sign_flip_says_why_not() -> None:
    with pytest.raises(UserError, match=r"5 pairs: the smallest p it can give is 0\.0625; use 6 or more"):
        intervals.sign_flip(np.ones(5))
    assert intervals.sign_flip(np.arange(1.0, 7.0)) == pytest.approx(2 / 64)
    assert intervals.signed_rank(np.ones(5)) is None


# ------------------------------------------------------------------------------------------ seeds


@pytest.mark.parametrize(
    ("claim", "alpha", "needed"),
    [
        ("superiority", 0.05, [10, 6, 5, 4]),
        ("superiority", 0.05 / 7, [17, 10, 7, 5]),
        ("equivalence", 0.05, [11, 6, 4, 3]),
    ],
)
def test_seeds_for_80_percent_power(claim: str, alpha: float, needed: list[int]) -> None:
    """By difference / SD for superiority, by margin / SD at no difference for equivalence: 1, 1.5, 2, 3."""
    sizes = (1, 1.5, 2, 3)
    asked = [(size, 0.0) if claim == "superiority" else (0.0, size) for size in sizes]
    found = [power.seeds_needed(claim, difference, margin, 1.0, alpha) for difference, margin in asked]
    assert found == needed


def test_power_of_equivalence_is_what_simulation_gives() -> None:
    rng = np.random.default_rng(0)
    d = rng.normal(0.3, 1, size=(20_000, 9))
    reach = stats.t.isf(0.05, 8) * d.std(axis=1, ddof=1) / 3
    share = ((d.mean(axis=1) - reach > -1.2) & (d.mean(axis=1) + reach < 1.2)).mean()
    assert power.tost_power(0.3, 1.2, np.array([9.0]), 0.05)[0] == pytest.approx(share, abs=0.01)


def test_an_inconclusive_verdict_says_how_many_seeds_would_do() -> None:
    d = np.array([-0.5, 1.5, 1.0])
    found = verdict([0.0, 0, 0], d, "superiority")
    assert found.outcome == "inconclusive"
    needed = power.seeds_needed("superiority", d.mean(), 0, d.std(ddof=1), 0.05)
    assert found.advice.startswith(f"about {needed} seeds would give 80 % power")
    assert "(3 now)" in found.advice
    asked = [Hypothesis(f"h{i}", "superiority", "new") for i in range(7)]
    more = power.seeds_needed("superiority", d.mean(), 0, d.std(ddof=1), 0.05 / 7)
    assert verdicts(pair([0.0, 0, 0], d, *asked))[0].advice.startswith(f"about {more} seeds")
    assert more > needed


def test_where_no_number_of_seeds_helps_it_says_so() -> None:
    none = verdict([0.0, 0, 0, 0], [-1.0, 1, -0.5, 0.51], "superiority")
    assert "no reasonable number of seeds" in none.advice
    wrong = verdict([0.0, 0, 0, 0], [-3.0, 1, -1.5, 0.5], "superiority")
    assert "no reasonable number of seeds" in wrong.advice


# ------------------------------------------------------------------------------------ the locked plan


def changed(*changes: str, **about: Any) -> list[Verdict]:
    amendments = ({"time": "2026-02-01", "hash": "x", "changes": list(changes)},) if changes else ()
    return list(verdicts(made_results(amendments=amendments, **about)))


def test_what_was_declared_before_the_first_run_is_confirmatory() -> None:
    assert {(v.locked, v.declared) for v in changed()} == {(True, "confirmatory")}
    never = verdicts(made_results(locked=None))
    assert {(v.locked, v.declared) for v in never} == {(False, "exploratory")}


@pytest.mark.parametrize(
    ("began", "declared"),
    [
        ("2025-12-31T23:59:59.999+00:00", "exploratory"),
        ("2026-01-01T00:00:00.001+00:00", "confirmatory"),
        ("2026-01-01T01:00:00.000+02:00", "exploratory"),  # times are compared, and not their text
        ("yesterday", "confirmatory"),  # nobody can tell
        (None, "confirmatory"),
    ],
)
def test_runs_that_began_before_the_lock_make_verdicts_exploratory(began: str | None, declared: str) -> None:
    results = made_results()
    first = dataclasses.replace(results.runs[0], started=began, run_id="the-early-one")
    found = dataclasses.replace(results, runs=(first, *results.runs[1:]))
    assert {v.declared for v in verdicts(found)} == {declared}
    named = [w for w in standing(found).warnings if "began before the plan was locked" in w]
    assert [("baseline/the-early-one" in w) for w in named] == ([True] if declared == "exploratory" else [])


@pytest.mark.parametrize(
    ("change", "exploratory"),
    [
        ("hypotheses[1].margin: 0.01 -> 0.02", {"rms_no_worse"}),
        ('hypotheses[4].name: (absent) -> "full_loss"', {"full_loss"}),
        ("hypotheses[4].primary: (absent) -> false", {"full_loss"}),
        ('responses[1].scale: "raw" -> "log"', {"full_loss"}),
        ('responses[2].metric: (absent) -> "val/macro_auroc"', set()),
        ("seeds: [0, 1, 2] -> [0, 1, 2, 3, 4]", set()),
        ('arms[8].name: (absent) -> "more"', {"flash_equal", "rms_no_worse", "swiglu_better"}),  # by factor
        ('factors[3].name: (absent) -> "more"', {"flash_equal", "rms_no_worse", "swiglu_better"}),
        ("hypotheses[1].primary: true -> false", "all"),
        ('hypotheses[5].name: "dropped" -> (absent)', "all"),
        ("alpha: 0.01 -> 0.05", "all"),
        ("learning_rate.rule: x -> y", "all"),
        ("something else", "all"),
    ],
)
def test_what_was_changed_later_is_exploratory(change: str, exploratory: Any) -> None:
    found = changed(change)
    names = {v.hypothesis for v in found}
    assert {v.hypothesis for v in found if v.declared == "exploratory"} == (
        names if exploratory == "all" else exploratory
    )
    assert all((v.declared == "confirmatory") == v.locked for v in found)


def test_changes_are_read_as_they_are_written() -> None:
    """Of a real edit of the plan: one margin changed, one hypothesis and one seed added."""
    old = made_study(3)
    first, *others = old.hypotheses
    more = Hypothesis("afterthought", "superiority", "flash_rms")
    edited = (dataclasses.replace(first, margin=0.5), *others, more)
    new = dataclasses.replace(old, hypotheses=edited, seeds=(0, 1, 2, 3))
    changes = runstore.differences(old.plan, new.plan)
    found = verdicts(made_results(new, amendments=({"time": "t", "hash": "x", "changes": changes},)))
    assert [v.hypothesis for v in found if v.declared == "exploratory"] == [first.name, "afterthought"]
    assert all("seeds were changed" in v.reason for v in found)
    fewer = dataclasses.replace(old, hypotheses=old.hypotheses[:-1])
    changes = runstore.differences(old.plan, fewer.plan)
    found = verdicts(made_results(fewer, amendments=({"time": "t", "hash": "x", "changes": changes},)))
    assert {v.declared for v in found} == {"exploratory"}


def test_a_main_effect_on_censored_times_is_left_open() -> None:
    asked = (Hypothesis("h", "superiority", factor="rms", response="macro_auroc_time"),)
    found = verdicts(made_results(made_study(5, hypotheses=asked), seed_sd=0.1))[0]
    assert found.outcome == "inconclusive"
    assert "censored" in found.reason


def test_seeds_that_were_added_are_named_in_the_reason() -> None:
    assert all("seeds were changed after the lock" in v.reason for v in changed("seeds: [0] -> [0, 1]"))
    assert not any("seeds were changed" in v.reason for v in changed())


# ------------------------------------------------------------------------------------------ words


def test_what_a_ratio_of_a_loss_means() -> None:
    assert loss_ratio_in_words(1.05, 3.3) == "5.0 % more of a loss of 3.3 nats is 18 % more perplexity"
    assert "less perplexity" in loss_ratio_in_words(0.95, 3.3)
    found = verdict(CONTROL * 4, TREATMENT * 4, "equivalence", LOSS, margin=0.05, scale="ratio")
    assert "perplexity" in found.reason
    accuracy = verdict(CONTROL, TREATMENT, "equivalence", AUROC, margin=0.05, scale="ratio")
    assert "perplexity" not in accuracy.reason


def test_reasons_name_both_sides_of_the_claim() -> None:
    fits = hypotheses._claim(Hypothesis("h", "non_inferiority", "new", margin=0.05, scale="ratio"), -1)
    assert fits == ("below 1.05", "above 1.05")
    assert hypotheses._claim(Hypothesis("h", "non_inferiority", "new", margin=0.05, scale="ratio"), 1) == (
        "above 0.9524", "below 0.9524",
    )  # fmt: skip
    assert hypotheses._claim(Hypothesis("h", "superiority", "new", margin=0.1, scale="ratio"), -1) == (
        "below 0.9", "above 0.9",
    )  # fmt: skip
    assert math.isclose(
        hypotheses.scaled_margin(Hypothesis("h", "equivalence", "new", margin=0.05, scale="ratio"), -1),
        math.log(1.05),
    )
