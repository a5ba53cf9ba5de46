"""Spikes and gradient norms are counted at every step, whatever is logged."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxablate.stability import FEWEST, SPIKE, WINDOW, Stability


def counted(losses, norms=None) -> Stability:
    """After these steps, compiled as in a training step."""
    norms = np.ones(len(losses)) if norms is None else norms

    def step(seen: Stability, x) -> tuple[Stability, None]:
        n, loss, norm = x
        return seen.after(n, loss, norm), None

    steps = (
        jnp.arange(1, len(losses) + 1),
        jnp.asarray(losses, jnp.float32),
        jnp.asarray(norms, jnp.float32),
    )
    return jax.lax.scan(step, Stability.start(), steps)[0]


def reference(losses) -> int:
    """By the definition, with numpy."""
    spikes = 0
    for i, loss in enumerate(losses):
        before = losses[max(0, i - WINDOW) : i]
        spikes += len(before) >= FEWEST and loss > SPIKE * np.median(before)
    return spikes


def test_spikes_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    losses = rng.lognormal(0.0, 0.3, 3 * WINDOW).astype(np.float32)
    losses[[50, 150, 250]] *= 10
    assert reference(losses) > 3
    assert int(counted(losses).spikes) == reference(losses)


def test_a_steady_run_has_none_and_the_first_steps_do_not_count() -> None:
    assert int(counted(np.linspace(9, 1, 300)).spikes) == 0
    assert int(counted([1.0] * (FEWEST - 1) + [100.0]).spikes) == 0
    assert int(counted([1.0] * FEWEST + [100.0]).spikes) == 1


def test_the_largest_norm_stays() -> None:
    assert float(counted([1.0] * 5, [1, 7, 2, 3, 1]).largest_grad_norm) == 7
