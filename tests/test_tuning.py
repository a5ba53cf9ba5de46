"""The learning-rate rule: which rate an arm gets, when the grid grows, what is flagged."""

from __future__ import annotations

from typing import Any

import pytest

from jaxablate import tuning
from jaxablate.analysis.results import Result
from jaxablate.errors import UserError
from jaxablate.study import Arm, LearningRate, Response, Study, switch

WIDE = switch("wide", "model", {"model.width": 16})
LOSS = Response("val/loss", "min")
GRID = (1e-3, 3e-3, 9e-3)


def study(response: Response = LOSS, **rule: Any) -> Study:
    rule = {"grid": GRID, "tuning_seeds": (7, 8), "extend": 1, **rule}
    return Study("s", (WIDE,), (Arm("baseline"),), (0, 1), (response,), learning_rate=LearningRate(**rule))


def runs(arm: str = "baseline", name: str = "loss", **values: Any) -> list[Result]:
    """`r1e_3=(0.5, None)`: the tuning runs of a rate with their values; None diverged, a word is a state."""
    found = []
    for rate, outcomes in values.items():
        for seed, value in zip((7, 8), outcomes, strict=True):
            state = value if isinstance(value, str) else "diverged" if value is None else "done"
            number = None if isinstance(value, str) else value
            rate_value = float(rate.removeprefix("r").replace("_", "-"))
            found.append(Result(arm, seed, state, {name: number}, "tuning", learning_rate=rate_value))
    return found


def choice(declared: Study, found: list[Result]) -> tuning.Choice:
    return tuning.choose(declared, found)["baseline"]


def warning(found: tuning.Choice) -> str:
    return tuning.warning("baseline", found.to_dict())


def test_the_best_mean_in_the_declared_direction_wins() -> None:
    found = runs(r1e_3=(0.5, 0.7), r3e_3=(0.3, 0.4), r9e_3=(0.2, 0.9))
    lower = choice(study(), found)
    assert (lower.learning_rate, lower.edge, lower.extend_by, warning(lower)) == (3e-3, "", None, "")
    assert lower.to_dict()["means"] == pytest.approx([0.6, 0.35, 0.55])
    # The same numbers where more is better: the other end of the same table.
    higher = choice(study(Response("val/loss", "max")), found)
    assert higher.learning_rate == 1e-3


def test_a_rate_with_one_seed_lost_is_not_eligible_however_good_the_other() -> None:
    found = choice(study(), runs(r1e_3=(0.5, 0.7), r3e_3=(0.6, 0.6), r9e_3=(0.01, None)))
    assert found.learning_rate in (1e-3, 3e-3)
    assert found.grid[2].diverged == 1
    assert found.to_dict()["means"][2] is None


def test_the_largest_stable_rate_is_below_the_first_that_diverged() -> None:
    found = runs(r1e_3=(0.1, 0.1), r3e_3=(0.5, 0.5), r9e_3=(0.2, None))
    stable = choice(study(rule="largest_stable"), found)
    assert (stable.learning_rate, stable.edge) == (3e-3, "")
    only_lowest = choice(
        study(rule="largest_stable"), runs(r1e_3=(0.1, 0.1), r3e_3=(None, 0.5), r9e_3=(None, None))
    )
    assert (only_lowest.learning_rate, only_lowest.edge) == (1e-3, "")


@pytest.mark.parametrize(
    ("values", "edge", "further"),
    [
        ({"r1e_3": (0.1, 0.1), "r3e_3": (0.5, 0.5), "r9e_3": (0.6, 0.6)}, "lowest", 1e-3 / 3),
        ({"r1e_3": (0.6, 0.6), "r3e_3": (0.5, 0.5), "r9e_3": (0.1, 0.1)}, "highest", 27e-3),
        ({"r1e_3": (None, 0.6), "r3e_3": (None, None), "r9e_3": (None, None)}, "lowest", 1e-3 / 3),
    ],
)
def test_an_optimum_at_the_edge_extends_the_grid_by_its_own_ratio(
    values: dict[str, Any], edge: str, further: float
) -> None:
    found = choice(study(), runs(**values))
    assert found.edge == edge
    assert found.extend_by == pytest.approx(further, rel=1e-5)
    assert warning(found)  # and if it stays there it is flagged


def test_a_grid_is_extended_as_often_as_declared_and_then_flagged() -> None:
    found = runs(r1e_3=(0.6, 0.6), r3e_3=(0.5, 0.5), r9e_3=(0.2, 0.2), r27e_3=(0.1, 0.1))
    once, twice = choice(study(extend=1), found), choice(study(extend=2), found)
    assert (once.learning_rate, once.extend_by, once.edge) == (27e-3, None, "highest")
    assert "highest rate of its grid" in warning(once)
    assert twice.extend_by == pytest.approx(81e-3)


def test_an_arm_with_a_grid_of_its_own_extends_that_one() -> None:
    own = study(grids={"baseline": (1e-4, 1e-3)})
    found = runs(r1e_4=(0.5, 0.5), r1e_3=(0.3, 0.3))
    assert own.learning_rate is not None
    assert own.learning_rate.grid_of("baseline") == (1e-4, 1e-3)
    assert own.learning_rate.grid_of("another") == GRID
    assert choice(own, found).extend_by == pytest.approx(1e-2)
    # Two rates of a grid of three are no extension used up, four would be.
    longer = [*found, *runs(r1e_2=(0.1, 0.1))]
    assert choice(own, longer).extend_by is None
    assert choice(own, longer).edge == "highest"
    with pytest.raises(UserError, match="no arm 'another'"):
        study(grids={"another": (1e-4, 1e-3)})
    with pytest.raises(UserError, match=r"grids\['baseline'\].*rising order"):
        study(grids={"baseline": (1e-3, 1e-4)})


def test_no_rate_is_chosen_where_every_one_diverged() -> None:
    lost = choice(study(extend=0), runs(r1e_3=(None, 0.6), r3e_3=(None, None), r9e_3=(None, None)))
    assert lost.learning_rate is None
    assert lost.to_dict()["diverged"] == [1, 2, 2]
    assert "worked at every seed" in warning(lost)


def test_one_rate_is_an_edge_on_both_sides_and_has_no_ratio_to_extend_by() -> None:
    found = choice(study(grid=(1e-3,)), runs(r1e_3=(0.1, 0.1)))
    assert (found.learning_rate, found.edge, found.extend_by) == (1e-3, "only", None)
    assert "only rate" in warning(found)


@pytest.mark.parametrize("state", ["bug", "oom", "pending", "running"])
def test_an_arm_waits_for_a_run_that_gave_no_result(state: str) -> None:
    found = runs(r1e_3=(0.5, 0.7), r3e_3=(0.3, state), r9e_3=(0.2, 0.9))
    other = runs("other", r1e_3=(0.5, 0.7), r3e_3=(0.3, 0.3), r9e_3=(0.6, 0.9))
    assert list(tuning.choose(study(), [*found, *other])) == ["other"]


def test_a_log_response_is_averaged_as_ratios() -> None:
    # Arithmetic means 0.505 > 0.4; geometric means 0.1 < 0.4.
    found = runs(r1e_3=(1.0, 0.01), r3e_3=(0.4, 0.4), r9e_3=(0.9, 0.9))
    assert choice(study(Response("val/loss", "min", scale="log")), found).learning_rate == 1e-3
    assert choice(study(), found).learning_rate == 3e-3
    with pytest.raises(UserError, match="response 'loss': scale='log' with a value of -1"):
        choice(study(Response("val/loss", "min", scale="log")), runs(r1e_3=(-1.0, 1.0)))


def test_a_response_that_needs_confirmatory_runs_cannot_choose() -> None:
    late = Response("val/auroc", "max", reduce="time_to", fraction=0.9, chance=0.5)
    with pytest.raises(UserError, match=r"learning_rate\.response='auroc_time'.*name another"):
        tuning.tuning_response(study(late))


def test_a_choice_comes_back_from_its_row() -> None:
    chosen = choice(study(extend=0), runs(r1e_3=(0.5, 0.7), r3e_3=(None, 0.4), r9e_3=(0.2, 0.9)))
    assert tuning.Choice.from_dict("baseline", chosen.to_dict()) == chosen
    for broken in ({"means": [0.6]}, {"grid": None}):
        with pytest.raises(UserError, match=r"rates\.json: arm 'baseline': not the row"):
            tuning.Choice.from_dict("baseline", {**chosen.to_dict(), **broken})
    with pytest.raises(UserError, match=r"restore the file"):
        tuning.Choice.from_dict("baseline", {"learning_rate": 0.1})


def test_reported_seeds_have_no_say() -> None:
    confirm = [Result("baseline", 0, "done", {"loss": 0.0}, "confirm", learning_rate=9e-3)]
    assert tuning.choose(study(), confirm) == {}
