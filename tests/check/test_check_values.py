"""Where arms are compared: shared parameters get shared values, and rounding is told from a difference."""

from __future__ import annotations

import numpy as np
import pytest

from jaxablate.check.values import CHANGED, SAME, Difference, Draw, difference, perturbed


def draw(batch: str = "b", loss: float = 1.0, **gradients: list[float]) -> Draw:
    values = {name: np.array(value, np.float32) for name, value in gradients.items()}
    return Draw(batch, {"main": loss}, values, {"eval": {"logits": np.array([1.0, 2.0], np.float32)}})


def test_noise_depends_on_the_path_and_the_draw_alone() -> None:
    start = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    here = perturbed("params/a/kernel", start, 0)
    assert np.array_equal(here, perturbed("params/a/kernel", start, 0))
    assert not np.array_equal(here, perturbed("params/b/kernel", start, 0))
    assert not np.array_equal(here, perturbed("params/a/kernel", start, 1))
    assert here.dtype == np.float32


def test_what_starts_at_zero_or_one_is_moved() -> None:
    """Zero gates and unit scales would hide what they multiply."""
    for start in (np.zeros(5, np.float32), np.ones(5, np.float32), np.float32(1.0) * np.ones(())):
        assert (perturbed("params/p", start, 0) != start).all()


def test_whole_numbers_stay() -> None:
    table = np.arange(4)
    assert perturbed("params/table", table, 0) is table


def test_equal_draws_do_not_differ() -> None:
    d = difference(draw(w=[1.0, -2.0]), draw(w=[1.0, -2.0]))
    assert (d.outputs, d.loss, d.gradients) == (0.0, 0.0, 0.0)
    assert not d.beyond(0.0)


def test_the_largest_relative_difference_counts_and_is_named() -> None:
    d = difference(draw(v=[1.0, 1.0], w=[1.0, -2.0]), draw(v=[1.0, 1.0], w=[1.0, -1.0]))
    assert d.gradients == pytest.approx(0.5)
    assert d.where == "w"


def test_a_gradient_that_is_zero_but_for_rounding_is_no_difference() -> None:
    """A bias that a softmax cancels has a gradient of 1e-9 with any sign."""
    d = difference(draw(w=[1.0], bias=[1e-9]), draw(w=[1.0], bias=[-1e-9]))
    assert d.gradients is not None
    assert d.gradients < CHANGED["float32"] < SAME["float32"]


def test_a_number_against_none_is_infinitely_far() -> None:
    assert difference(draw(w=[1.0]), draw(w=[np.nan])).gradients == np.inf
    assert difference(draw(w=[np.nan]), draw(w=[np.nan])).gradients == 0.0


def test_only_what_two_arms_share_is_compared() -> None:
    d = difference(draw(w=[1.0], own=[5.0]), draw(w=[1.0], other=[7.0, 8.0]))
    assert d.gradients == 0.0
    elsewhere = difference(draw(w=[1.0]), draw(batch="another", w=[9.0]))
    assert (elsewhere.gradients, elsewhere.loss, elsewhere.outputs) == (None, None, 0.0)
    assert not elsewhere.nothing
    assert Difference(None, None, None).nothing
