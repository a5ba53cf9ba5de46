"""Expectations about results are met, not met, or open; and how unsteadily runs trained is counted, not guessed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jaxablate.analysis import results as results_module
from jaxablate.analysis.findings import Expected
from jaxablate.analysis.report import comparisons, training
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.results import Results
from jaxablate.analysis.stats.analyse import analyse
from jaxablate.analysis.stats.instability import instability
from jaxablate.errors import UserError
from jaxablate.study import Expectation, Study
from tests.analysis.made import made_results, made_study, tuned_study
from tests.analysis.made_dirs import made_study_dir


def judged(*expected: Expectation, seeds: int = 5, **about: Any) -> tuple[Expected, ...]:
    study = made_study(seeds, expectations=expected)
    about = {"effects": {"rms": -0.06}, "noise": 0.002} | about  # a loss 20 % higher: exp(3 · 0.06)
    return analyse(made_results(study, **about)).expectations


def rms(low: float | None, high: float | None, **about: Any) -> Expectation:
    return Expectation("RMSNorm: worse", "rms", response="loss", low=low, high=high, **about)


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [
        (1.15, 1.30, "met"),
        (1.15, None, "met"),
        (1.5, 1.6, "not met"),
        (None, 1.1, "not met"),
        (1.2, 1.30, "cannot be said"),
    ],
)
def test_all_of_the_interval_must_agree(low: float | None, high: float | None, answer: str) -> None:
    (found,) = judged(rms(low, high))
    assert (found.answer, found.arm) == (answer, "rms_only")
    assert found.measured is not None and found.measured.n == 5
    assert f": {answer}, " in found.sentence and "over 5 paired seeds, worse than it" in found.sentence


def test_the_arms_own_value_is_held_to_the_bounds_against_nothing() -> None:
    low, high = judged(
        Expectation("baseline", arm="baseline", response="macro_auroc", low=0.5, against="nothing"),
        Expectation("baseline", arm="baseline", response="loss", high=1.0, against="nothing"),
    )
    assert (low.answer, high.answer) == ("met", "not met")
    assert "×" not in low.sentence and "over 5 seeds" in low.sentence


def test_two_seeds_or_a_lost_run_say_nothing() -> None:
    (two,) = judged(rms(1.15, 1.30), seeds=2)
    assert two.answer == "cannot be said" and "no interval below 3" in two.sentence
    assert "worse" not in two.sentence  # no order without an interval
    (lost,) = judged(rms(1.15, 1.30), diverged={"rms_only": (0,)})
    assert lost.answer == "cannot be said" and "1 of 5 runs of rms_only diverged" in lost.sentence
    (gone,) = judged(rms(1.15, 1.30), diverged={"rms_only": range(5)})
    assert (gone.answer, gone.measured) == ("cannot be said", None)
    (elsewhere,) = judged(rms(1.15, 1.30), diverged={"swiglu_only": (0,)})
    assert elsewhere.answer == "met"


def test_a_difference_that_is_none_is_not_called_one() -> None:
    (found,) = judged(rms(0.9, 1.1), effects={}, noise=0.01)
    assert "not told apart from it" in found.sentence
    assert not any(f", {word} than it" in found.sentence for word in ("better", "worse"))


def test_words_and_what_bench_measures_are_not_judged_from_the_runs() -> None:
    assert judged(Expectation("fine"), Expectation("fast", "rms", response="speedup", low=2.0)) == ()
    found = judged(Expectation("fine"), rms(1.15, 1.30))
    assert [item.number for item in found] == [1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response": "los", "arm": "rms_only", "low": 1.0}, "did you mean 'loss'"),
        ({"response": "loss", "arm": "baseline", "low": 1.0}, "with itself"),
        ({"response": "loss", "arm": "rms_only", "low": -1.0}, "positive ratios"),
        ({"response": "loss", "arm": "rms_only", "low": 2.0, "high": 1.0}, "the smaller one first"),
        (
            {"response": "memory", "arm": "rms_only", "low": 2.0, "against": "nothing"},
            "against the baseline alone",
        ),
        ({"response": "loss", "low": 2.0}, "of what"),
    ],
)
def test_an_expectation_that_cannot_be_judged_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made_study(expectations=(Expectation("text", **fields),))


def test_an_expectation_frozen_before_it_could_be_against_nothing_is_read() -> None:
    study = made_study(expectations=(rms(1.15, 1.30),))
    values = study.to_dict()
    fields = {k: v for k, v in values["expectations"][0].items() if k != "against"}
    assert Study.from_dict({**values, "expectations": [fields]}) == Study.from_dict(values)
    other = made_study(
        expectations=(Expectation("x", arm="baseline", response="loss", low=-1.0, against="nothing"),)
    )
    assert Study.from_dict(other.to_dict()).expectations[0].against == "nothing"


# ----------------------------------------------------------------------------------------- instability


def with_measures(found: Results) -> Results:
    """Tuning runs of `rms_only` at the highest rate diverge, after three spikes; all others have none."""
    runs = []
    for run in found.runs:
        bad = (run.arm, run.phase, run.learning_rate) == ("rms_only", "tuning", 3e-3)
        rows = [
            {"step": 1, "train/loss": 2.0, "train/spikes": 0.0, "train/largest_grad_norm": 1.0},
            {
                "step": 9,
                "train/loss": 1.0,
                "train/spikes": 3.0 * bad,
                "train/largest_grad_norm": 50.0 if bad else 2.0,
            },
        ]
        about = {"state": "diverged", "diverged_at": 10 + run.seed} if bad else {}
        rows += [{"step": 10 + run.seed, "train/loss": None}] if bad else []
        runs.append(dataclasses.replace(run, rows=rows, **about))
    return dataclasses.replace(
        found, runs=tuple(runs), default_rates={arm.name: 3e-3 for arm in found.study.arms}
    )


def test_instability_is_counted_by_arm_rate_and_phase() -> None:
    found = with_measures(made_results(tuned_study(3)))
    rows = instability(found)
    assert len(rows) == 8 * 4  # eight arms: three rates on tuning seeds, one on the study's own
    (bad,) = [row for row in rows if row.unstable]
    assert (bad.arm, bad.learning_rate, bad.phase) == ("rms_only", 3e-3, "tuning")
    assert (bad.diverged, bad.runs, bad.steps, bad.spikes, bad.largest_grad_norm) == (
        2,
        2,
        (110, 111),
        (3, 3),
        50.0,
    )
    table = training.instability(Scene(found, analyse(found)))
    assert table is not None
    (row,) = [[f"{c.text} {c.note}".strip() for c in r] for r in table.rows if r[2].text == "2 of 2"]
    assert row == ["rms_only", "0.003 tuning seeds", "2 of 2", "110", "110.5", "3", "50"]


def test_a_study_that_does_not_measure_it_has_no_table() -> None:
    plain = made_results(tuned_study(3))
    assert instability(plain) == () and training.instability(Scene(plain, analyse(plain))) is None


def test_arms_are_held_to_the_default_rate_if_theirs_is_another_or_they_were_unstable_at_it() -> None:
    def said(default: float) -> dict[str, str]:
        rates = {arm.name: default for arm in found.study.arms}
        own = dataclasses.replace(found, default_rates=rates)
        points = comparisons.default_rates(Scene(own, analyse(own)))
        return {point.text.partition(":")[0]: point.text for point in points}

    found = with_measures(made_results(tuned_study(3)))
    moved = said(3e-3)
    assert list(moved) == [arm.name for arm in found.study.arms]
    assert "at the default rate 0.003 2 of 2 diverged" in moved["rms_only"]
    assert "at the tuned rate 0.001 0 of 2 diverged, mean" in moved["rms_only"]
    assert said(1e-3) == {}  # the tuned rate itself, and nothing was unstable there


def test_the_default_rate_is_read_from_the_frozen_config(tmp_path) -> None:
    manifest = made_study_dir(tmp_path, tuned_study(2), rows=4, spikes={"rms_only": 1}, default_rate=3e-3)
    found = results_module.load(manifest)
    assert found.default_rates["rms_only"] == 3e-3
    assert [r.arm for r in analyse(found).instability if r.unstable] == ["rms_only"] * 4
