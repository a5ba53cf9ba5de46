"""Seeds that the hypotheses need, from finished runs, and what the missing ones cost."""

from __future__ import annotations

import pytest

from jaxablate.analysis.stats import hypotheses, power
from jaxablate.errors import UserError
from jaxablate.schedule.plan.seeds import Spread
from tests.analysis.made import made_results, made_study
from tests.analysis.made_dirs import made_study_dir


def spread(rate: float | None = 2.0, **made: object) -> Spread:
    study = made_study(5)
    found = made_results(study, **made)  # pyright: ignore[reportArgumentType]
    return Spread(study, found, 0.8, rate)


def test_what_is_missing_is_priced():
    noisy = spread(effects={"swiglu": 0.01}, noise=0.02)
    needed = {need.hypothesis: need for need in noisy.needed(5, 4.0)}
    swiglu = needed["swiglu_better"]
    assert swiglu.seeds is not None
    assert swiglu.seeds > 5
    assert (swiglu.more, swiglu.hours, swiglu.cost) == (
        swiglu.seeds - 5,
        4.0 * (swiglu.seeds - 5),
        8.0 * (swiglu.seeds - 5),
    )
    assert "over 5 finished seeds" in swiglu.why


def test_what_is_enough_costs_nothing_and_unknown_hours_no_number():
    clear = spread(effects={"swiglu": 0.05}, noise=0.001)
    need = next(n for n in clear.needed(5, 4.0) if n.hypothesis == "swiglu_better")
    assert (need.more, need.hours, need.cost) == (0, 0.0, 0.0)
    assert all(n.hours is None and n.cost is None for n in clear.needed(5, None))


def test_the_number_is_that_of_the_verdicts_advice():
    """An inconclusive verdict and the plan speak of the same number."""
    noisy = spread(effects={"swiglu": 0.01}, noise=0.02)
    assert noisy.found is not None
    needed = {need.hypothesis: need.seeds for need in noisy.needed(5, None)}
    told = 0
    for verdict in hypotheses.verdicts(noisy.found):
        if verdict.advice.startswith("about "):
            assert verdict.advice.startswith(f"about {needed[verdict.hypothesis]} seeds")
            told += 1
    assert told


def test_more_power_needs_more_seeds():
    noisy = spread(effects={"swiglu": 0.01}, noise=0.02)
    assert noisy.found is not None
    seeds = [
        next(n for name, n, _ in hypotheses.seeds_needed(noisy.found, p) if name == "swiglu_better")
        for p in (0.5, 0.8)
    ]
    assert seeds[0] < seeds[1]


def test_what_cannot_be_told_says_why():
    wrong = spread(effects={"swiglu": -0.05}, noise=0.001)
    need = next(n for n in wrong.needed(5, 1.0) if n.hypothesis == "swiglu_better")
    assert (need.seeds, need.more, need.hours) == (None, None, None)
    assert f"more than {power.MOST} seeds" in need.why
    nothing = spread(diverged={"optimized_full": range(5)})
    need = next(n for n in nothing.needed(5, 1.0) if n.hypothesis == "full_no_worse")
    assert need.seeds is None
    assert need.why


def test_a_pilot_is_asked_this_studys_questions(tmp_path):
    pilot = made_study(4, hypotheses=(), name="pilot")
    made_study_dir(tmp_path, pilot, effects={"swiglu": 0.01}, noise=0.02)
    asked = Spread.of(made_study(6), tmp_path / "made", str(tmp_path / "pilot"), 0.8, 2.0)
    needed = {need.hypothesis: need for need in asked.needed(6, 1.0)}
    assert set(needed) == {h.name for h in made_study().hypotheses}
    assert "over 4 finished seeds" in needed["swiglu_better"].why


def test_a_studys_own_finished_runs_are_its_pilot(tmp_path):
    made_study_dir(tmp_path, made_study(4), effects={"swiglu": 0.01}, noise=0.02)
    asked = Spread.of(made_study(4), tmp_path / "made", "", 0.8, None)
    assert any("over 4 finished seeds" in need.why for need in asked.needed(4, None))


def test_without_runs_nothing_is_said(tmp_path):
    study = made_study(5)
    assert Spread.of(study, tmp_path, "", 0.8, None).needed(5, 1.0) == ()
    with pytest.raises(UserError, match="no such directory"):
        Spread.of(study, tmp_path, str(tmp_path / "pilot"), 0.8, None)
