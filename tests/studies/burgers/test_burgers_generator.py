"""Generated trajectories solve the equation that they should, keep what it keeps, and are known by their numbers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate.studies.burgers.data import generator
from jaxablate.studies.burgers.data.generator import centres, evolve, generate, initial_states, tendency

CELLS = (0.1, 0.5, 1.0, 0.4, -0.2, -0.8, -0.3, 0.0)
TENDENCY = (
    *(-0.0588845019, -1.9221281673, -2.1215901599, 3.96, -2.52),
    *(1.7840901599, 0.9192563346, -0.0407436654),
)
A_STEP_LATER = (
    *(0.0993871872, 0.4814905298, 0.9789911912, 0.4384585952),
    *(-0.2243531097, -0.7825062734, -0.2910734969, -0.0003946233),
)


def exact(x: np.ndarray, t: float, viscosity: float) -> np.ndarray:
    """Cole-Hopf for u_0 = sin(2 pi x): the mean of (x - y) / t, weighted by exp(-G / (2 nu)), nu = epsilon / pi."""
    nu = viscosity / math.pi
    y = np.linspace(-2, 3, 50_001)[None]
    primitive = (1 - np.cos(2 * np.pi * y)) / (2 * np.pi)
    exponent = -(primitive + (x[:, None] - y) ** 2 / (2 * t)) / (2 * nu)
    weight = np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return np.sum((x[:, None] - y) / t * weight, axis=1) / weight.sum(axis=1)


def from_sine(cells: int, viscosity: float) -> np.ndarray:
    """The solver's field at time 0.5 of the same start; in the shape of `a_few`, to share its program."""
    start = jnp.broadcast_to(jnp.sin(2 * math.pi * jnp.asarray(centres(cells)))[None], (6, cells))
    found = evolve(start, jnp.full(6, viscosity, jnp.float32), jnp.float32(0.025), frames=20)
    return np.asarray(found)[0, -1]


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def plain_sums(number: int, x: np.ndarray) -> np.ndarray:
    """Sums of waves as in the document, without what happens to some of them afterwards."""
    rng = np.random.default_rng(0)
    counts = np.array([np.bincount(rng.integers(4, size=2), minlength=4) for _ in range(number)])
    waves = 2 * np.pi * np.arange(1, 5) * counts
    amplitude, phase = rng.uniform(0, 1, (number, 4, 1)), rng.uniform(0, 2 * np.pi, (number, 4, 1))
    return np.sum(amplitude * np.sin(waves[..., None] * x / (1023 / 1024) + phase), axis=1)


def of_one_sign(u: np.ndarray) -> float:
    return float(np.mean((u.min(axis=1) >= -1e-6) | (u.max(axis=1) <= 1e-6)))


def a_few(**changed) -> np.ndarray:
    """Six trajectories; the shape is the same in all tests, which share the compiled program."""
    asked = {"viscosity": 0.01, "cells": 128, "frames": 20, "interval": 0.1, "seed": 3, **changed}
    return generate(range(6), **asked)


def test_the_tendency_is_the_documents():
    found = jax.jit(tendency)(jnp.array([CELLS]), jnp.array([0.01]))[0]
    np.testing.assert_allclose(found, TENDENCY, rtol=1e-5)
    assert abs(float(found.sum())) < 1e-6


def test_a_step_is_the_documents():
    found = evolve(jnp.array([CELLS]), jnp.array([0.01]), jnp.float32(0.01), frames=1)[0, 0]
    np.testing.assert_allclose(found, A_STEP_LATER, rtol=1e-5)


def test_the_exact_solution_is_the_documents():
    x = np.array([0.125, 0.25, 0.375])
    np.testing.assert_allclose(exact(x, 0.2, 0.1), [0.3239612, 0.6132417, 0.7561737], rtol=1e-6)
    np.testing.assert_allclose(exact(x, 0.5, 0.1), [0.1788890, 0.3470988, 0.4283724], rtol=1e-6)


def test_the_solver_converges_to_the_exact_solution_in_second_order():
    errors = [relative(from_sine(cells, 0.1), exact(centres(cells), 0.5, 0.1)) for cells in (64, 128, 256)]
    np.testing.assert_allclose(errors, [1.646e-3, 4.319e-4, 1.116e-4], rtol=1e-3)
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (orders > 1.9).all(), orders
    # Another viscosity's solution is not what it converges to.
    assert relative(from_sine(256, 0.1), exact(centres(256), 0.5, 0.11)) > 0.02


def test_the_mean_is_kept():
    means = a_few(viscosity=[0.001, 0.1] * 3).astype(np.float64).mean(axis=2)
    assert np.abs(means - means[:, :1]).max() < 1e-6
    assert np.abs(means[:, 0]).max() > 0.1  # there is something to keep


def test_the_energy_falls():
    energy = np.square(a_few().astype(np.float64)).mean(axis=2)
    assert (np.diff(energy, axis=1) <= 0).all()
    assert (energy[:, -1] < 0.9 * energy[:, 0]).any()


def test_a_trajectory_converges_with_the_grid():
    """The same start on three grids; with shocks, so by less than the smooth order."""
    fine, middle, coarse = (a_few(cells=cells).astype(np.float64) for cells in (256, 128, 64))

    def halved(u: np.ndarray) -> np.ndarray:
        return u.reshape(*u.shape[:2], -1, 2).mean(axis=3)

    first, second = relative(coarse, halved(middle)), relative(middle, halved(fine))
    assert second < 0.65 * first
    assert second < 0.02
    other = a_few(cells=256, seed=4)
    assert relative(middle, halved(other)) > 0.5


def test_a_trajectory_is_its_number_its_seed_and_its_viscosity():
    some = a_few()
    np.testing.assert_array_equal(some, a_few())
    shuffled = generate([4, 0, 1, 2, 3, 5], viscosity=0.01, cells=128, frames=20, interval=0.1, seed=3)
    np.testing.assert_allclose(shuffled[0], some[4], atol=1e-5)
    assert relative(a_few(seed=4), some) > 0.5
    thicker = a_few(viscosity=0.1)
    np.testing.assert_array_equal(thicker[:, 0], some[:, 0])
    assert relative(thicker[:, -1], some[:, -1]) > 0.1


def test_neighbours_in_the_array_do_not_matter():
    """Each sample takes its own steps; one that must take many holds up the others and does not touch them."""
    alone = a_few(viscosity=0.001)
    beside = a_few(viscosity=[0.001, 0.1, 0.001, 0.1, 0.001, 0.1])
    np.testing.assert_allclose(beside[::2], alone[::2], atol=1e-5)
    assert relative(beside[1::2], alone[1::2]) > 0.05


@pytest.fixture(scope="module")
def states() -> np.ndarray:
    """Initial states on the waves' own period, where their spectra have lines: (2000, 1023)."""
    key = jax.random.key(0, impl="threefry2x32")
    x = jnp.asarray((np.arange(1023) / 1024).astype(np.float32))
    return np.asarray(initial_states(key, jnp.arange(2000, dtype=jnp.uint32), x), np.float64)


def test_initial_states_are_as_often_rectified_and_confined_as_the_document_says(states):
    confined = np.abs(states[:, :8]).max(axis=1) < 1e-5
    assert abs(confined.mean() - 0.1) < 0.02
    # Some sums have one sign by their constants; of the others a tenth are rectified.
    by_chance = of_one_sign(plain_sums(2000, np.arange(1023) / 1024))
    assert abs(of_one_sign(states) - (by_chance + 0.1 * (1 - by_chance))) < 0.03
    assert np.abs(states).max() <= generator.MODES
    assert abs(np.sign(states.mean(axis=1)).mean()) < 0.1  # either sign


def test_waves_have_the_wavenumbers_of_two_draws(states):
    """Two different modes, or one at twice its number: no third, and none above 8."""
    lines = np.abs(np.fft.rfft(states, axis=1)) / states.shape[1] * 2 > 1e-3
    pure = lines[~lines[:, 9:].any(axis=1)]  # kinks and windows have broad spectra
    assert len(pure) > 1000
    assert pure[:, 1:].sum(axis=1).max() <= generator.PICKS
    assert set(np.flatnonzero(pure[:, 1:].any(axis=0)) + 1) == {1, 2, 3, 4, 6, 8}


def test_the_first_frame_is_the_initial_state():
    found = a_few()
    assert found.shape == (6, 21, 128)
    assert found.dtype == np.float32
    key = jax.random.key(3, impl="threefry2x32")
    states = initial_states(key, jnp.arange(6, dtype=jnp.uint32), jnp.asarray(centres(128)))
    np.testing.assert_array_equal(found[:, 0], states)
