"""The analysis as a whole: complete, in order, and never silent about what is missing."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxablate.analysis.results import Results
from jaxablate.analysis.stats.analyse import analyse
from jaxablate.runstore import STATES
from jaxablate.study import one_factor_out
from tests.analysis.made import FACTORS, made_results, made_study, tuned_study


def test_everything_is_there_in_the_order_of_the_declaration() -> None:
    results = made_results(tuned_study(5), effects={"swiglu": 0.02})
    study, analysis = results.study, analyse(results)
    arms, responses = [arm.name for arm in study.arms], [r.name for r in study.responses]
    assert [(v.response, v.arm) for v in analysis.arms] == [(r, a) for r in responses for a in arms]
    assert [(c.response, c.arm) for c in analysis.contrasts] == [(r, a) for r in responses for a in arms[1:]]
    assert list(dict.fromkeys(t.response for t in analysis.effects)) == responses
    assert [v.hypothesis for v in analysis.verdicts] == [h.name for h in study.hypotheses]
    assert [d.arm for d in analysis.divergence] == arms
    assert [t.arm for t in analysis.time_to] == arms
    assert [c.arm for c in analysis.rates] == arms
    assert [s.arm for s in analysis.speed] == arms
    assert analysis.arm("rms_only", "loss").response == "loss"
    assert analysis.compute["runs"] == len(results.runs)
    assert analysis.warnings == ()


def test_nothing_run_is_an_analysis_too() -> None:
    study = made_study(3)
    analysis = analyse(Results(study, (), locked=None))
    assert {v.outcome for v in analysis.verdicts} == {"not run"}
    assert {v.mean.value for v in analysis.arms} == {None}
    assert all(table.effects == () and table.note for table in analysis.effects)
    assert analysis.compute == {"runs": 0}
    assert sum("3 of 3 seeds have no result (not run)" in w for w in analysis.warnings) == len(study.arms)


@settings(max_examples=40)
@given(st.integers(1, 7), st.integers(0, 10**6), st.floats(0, 1), st.data())
def test_any_mixture_of_states_is_analysed(seeds: int, rng: int, share: float, data: st.DataObject) -> None:
    """No state is taken for another: counts add up, and nothing is concluded from fewer than three seeds."""
    results = made_results(seeds=seeds, rng=rng, seed_sd=0.05)
    runs = []
    for run in results.runs:
        if data.draw(st.floats(0, 1)) < share:
            state = data.draw(st.sampled_from(STATES))
            run = dataclasses.replace(
                run, state=state, values=run.values if state == "done" else dict.fromkeys(run.values)
            )
        runs.append(run)
    analysis = analyse(dataclasses.replace(results, runs=tuple(runs)))
    for value in analysis.arms:
        assert value.done + value.diverged + value.unfinished == value.planned == seeds
        assert (value.mean.low is None) == (len(value.values) < 3 or value.sd == 0)
        assert not value.diverged or f"{value.diverged} of" in value.mean.note
    diverged = {d.arm for d in analysis.divergence if d.diverged}
    assert all(
        any(w.startswith(f"{arm}:") and "diverged" in w for w in analysis.warnings) for arm in diverged
    )
    for verdict in analysis.verdicts:
        if verdict.estimate.n < 3:
            assert verdict.outcome in ("inconclusive", "not run")
        if verdict.outcome == "supported" and {verdict.treatment, verdict.control} & diverged:
            assert "of the survivors" in verdict.reason
    for contrast in analysis.contrasts:
        assert contrast.difference.n >= 3 or contrast.better == "unclear"
        assert contrast.arm not in diverged or "diverged" in contrast.note


def test_an_arm_with_a_diverged_run_is_reported_as_such_everywhere() -> None:
    results = made_results(seeds=3, effects={"rms": 0.2}, noise=1e-3, diverged={"rms_only": (1,)})
    analysis = analyse(results)
    assert (
        "rms_only: 1 of 3 runs diverged; its means are of the survivors; try a lower learning rate"
        in analysis.warnings
    )
    assert "1 of 3 diverged" in analysis.arm("rms_only", "macro_auroc").mean.note
    assert next(d for d in analysis.divergence if d.arm == "rms_only").diverged == 1
    for contrast in analysis.contrasts:
        if contrast.arm == "rms_only":
            assert "of the survivors: rms_only (seed 1: diverged)" in contrast.note
            assert contrast.better == "unclear"
    assert all("rms_only" in table.note for table in analysis.effects)
    rms = next(v for v in analysis.verdicts if v.hypothesis == "rms_no_worse")
    assert rms.outcome == "inconclusive"
    assert "rms_only: 1 of 3 diverged" in rms.reason
    assert next(t for t in analysis.time_to if t.arm == "rms_only").reached < 3
    clean = analyse(made_results(seeds=3, effects={"rms": 0.2}, noise=1e-3))
    assert {c.better for c in clean.contrasts if c.arm == "rms_only"} == {"better"}
    assert not any("diverged" in w for w in clean.warnings)


def test_two_seeds_have_no_intervals_anywhere_and_say_why() -> None:
    analysis = analyse(made_results(seeds=2, effects={"swiglu": 0.2}))
    assert "2 seeds: no intervals below 3, and no verdicts" in analysis.warnings
    estimates = [
        *(v.mean for v in analysis.arms),
        *(c.difference for c in analysis.contrasts),
        *(c.ratio for c in analysis.contrasts),
        *(e.estimate for t in analysis.effects for e in t.effects),
        *(v.estimate for v in analysis.verdicts),
        *(t.mean_steps for t in analysis.time_to),
    ]
    assert len(estimates) > 100
    for estimate in estimates:
        assert estimate is not None
        assert (estimate.low, estimate.high, estimate.p) == (None, None, None)
        assert re.search("[12] seeds?: no interval below 3", estimate.note)
    assert {v.outcome for v in analysis.verdicts} == {"inconclusive"}
    assert {c.better for c in analysis.contrasts} == {"unclear"}


def test_what_happened_to_the_plan_is_said_first() -> None:
    change = "seeds: [0, 1, 2] -> [0, 1, 2, 3, 4]"
    amended = analyse(made_results(amendments=({"time": "2026-02-01", "hash": "x", "changes": [change]},)))
    assert any("amended after it was locked (2026-02-01): seeds" in w for w in amended.warnings)
    assert any("false positives" in w for w in amended.warnings)
    margin = {"time": "t", "hash": "x", "changes": ["hypotheses[0].margin: 0.01 -> 0.02"]}
    assert any(
        "exploratory because of amendments: flash_equal" in w
        for w in analyse(made_results(amendments=(margin,))).warnings
    )
    assert any("never locked" in w for w in analyse(made_results(locked=None)).warnings)


def test_unfinished_arms_and_notes_are_warned_of() -> None:
    results = made_results(seeds=3, missing={"rms_only": (1, 2)}, missing_state="oom", notes=("left out: x",))
    warnings = analyse(results).warnings
    assert any(w.startswith("rms_only: 2 of 3 seeds have no result (2 oom)") for w in warnings)
    assert "left out: x" in warnings


def test_an_arm_that_diverged_in_every_seed_has_no_survivors() -> None:
    warnings = analyse(made_results(seeds=3, diverged={"rms_only": (0, 1, 2), "flash_only": (0,)})).warnings
    assert "rms_only: 3 of 3 runs diverged; it has no means; try a lower learning rate" in warnings
    assert (
        "flash_only: 1 of 3 runs diverged; its means are of the survivors; try a lower learning rate"
        in warnings
    )


def test_a_rate_at_the_edge_is_warned_of() -> None:
    results = made_results(tuned_study(3))
    edge = {**results.rates, "rms_only": {"learning_rate": 3e-3, "edge": True}}
    warnings = analyse(dataclasses.replace(results, rates=edge)).warnings
    assert any("edge of its grid" in w and "rms_only" in w and "flash" not in w for w in warnings)


def test_runs_that_no_longer_belong_are_named() -> None:
    results = made_results(seeds=4)
    fewer = dataclasses.replace(results, study=dataclasses.replace(results.study, seeds=(0, 1, 2)))
    assert any("seed 3: has runs and is no longer declared" in w for w in analyse(fewer).warnings)
    again = dataclasses.replace(results, runs=(*results.runs, results.runs[0]))
    assert any("more than one confirmatory run" in w for w in analyse(again).warnings)


@pytest.mark.parametrize("seeds", [3, 6])
def test_the_order_of_the_runs_does_not_matter(seeds: int) -> None:
    results = made_results(seeds=seeds, diverged={"rms_only": (1,)})
    turned = dataclasses.replace(results, runs=results.runs[::-1])
    first, second = analyse(results), analyse(turned)
    assert first.verdicts == second.verdicts
    assert first.effects == second.effects
    assert first.contrasts == second.contrasts


def test_a_large_study_without_a_factorial() -> None:
    study = made_study(20, arms=one_factor_out(FACTORS), hypotheses=())
    analysis = analyse(made_results(study, diverged={"rms": range(10)}))
    assert all(c.worst_rank_p is not None for c in analysis.contrasts if c.arm == "rms")
    assert all(
        c.worst_rank_p is None for c in analysis.contrasts if c.arm == "flash" and c.response == "loss"
    )


def test_one_arm_alone_is_described() -> None:
    study = made_study(3, arms=made_study().arms[:1], hypotheses=())
    analysis = analyse(made_results(study))
    assert (analysis.contrasts, analysis.effects, analysis.verdicts) == ((), (), ())
    assert analysis.arms[0].mean.low is not None
