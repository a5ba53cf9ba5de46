"""Schedules, clipping and decay, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxablate import optim
from jaxablate.config import OptimConfig
from jaxablate.trees import flat


@pytest.mark.parametrize(
    ("peak", "end", "warmup", "steps", "expected"),
    [
        (3e-4, 0.1, 400, 40_000, {1: 7.5e-7, 399: 2.9925e-4, 400: 3e-4, 10_000: 2.6270409514e-4}),
        (3e-4, 0.1, 400, 40_000, {20_200: 1.65e-4, 39_999: 3.0000000425e-5}),
        (1.0, 0.1, 7, 21, {8: 0.9887175605, 14: 0.55, 21: 0.1, 24: 0.1}),
    ],
)
def test_warm_up_is_a_line_and_the_decay_a_cosine(peak, end, warmup, steps, expected) -> None:
    share = optim.schedule(OptimConfig(warmup_steps=warmup, end_fraction=end), steps)
    for step, rate in expected.items():
        np.testing.assert_allclose(peak * float(share(step)), rate, rtol=1e-5)


def test_a_line_is_no_cosine() -> None:
    line = optim.schedule(OptimConfig(warmup_steps=400, end_fraction=0.1, schedule="linear"), 40_000)
    assert abs(3e-4 * float(line(10_000)) / 2.6270409514e-4 - 1) > 1e-2


def updated(config: OptimConfig, params, *gradients, rate=0.1, decay=0.1, decays=True, trained=True):
    """The parameters after an update with each of the gradients."""
    transform = optim.transform(config, decays, rate, decay, trained)
    state, seen = transform.init(params), []
    for gradient in gradients:
        updates, state = transform.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


@pytest.mark.parametrize(
    ("at", "expected"), [("before", (0.89, 0.9177103542)), ("after", (0.8910000626, 0.9183343009))]
)
def test_decay_before_or_after_the_update(at, expected) -> None:
    config = OptimConfig(b1=0.9, b2=0.999, eps=1e-8, clip_norm=0.0, decay="all", decay_at=at)
    found = updated(config, jnp.ones(1), jnp.array([0.5]), jnp.array([-1.0]))
    np.testing.assert_allclose([float(p[0]) for p in found], expected, rtol=1e-5)


def adam_with_l2(params, gradients, rate, decay, clip):
    """torch.optim.Adam(weight_decay=decay) after clip_grad_norm_, step by step in float64."""
    params = {name: np.array(p, np.float64) for name, p in params.items()}
    mean = {name: np.zeros_like(p) for name, p in params.items()}
    square = {name: np.zeros_like(p) for name, p in params.items()}
    for t, gradient in enumerate(gradients, start=1):
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradient.values()))
        for name, p in params.items():
            g = gradient[name] * min(1.0, clip / norm) + decay * p
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.999 * square[name] + 0.001 * g**2
            root = np.sqrt(square[name] / (1 - 0.999**t)) + 1e-8
            params[name] = p - rate * (mean[name] / (1 - 0.9**t)) / root
    return params


def test_decay_in_the_gradient_is_the_weight_decay_of_torch_s_adam() -> None:
    config = OptimConfig(b1=0.9, b2=0.999, eps=1e-8, clip_norm=1.0, decay="all", decay_at="gradient")
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    gradients = [{name: rng.normal(size=p.shape) for name, p in params.items()} for _ in range(4)]

    def ours(config: OptimConfig) -> dict[str, np.ndarray]:
        start = {name: jnp.asarray(p, jnp.float32) for name, p in params.items()}
        each = [{name: jnp.asarray(g, jnp.float32) for name, g in gradient.items()} for gradient in gradients]
        return updated(config, start, *each, rate=0.01, decay=0.3)[-1]

    expected, found = adam_with_l2(params, gradients, 0.01, 0.3, 1.0), ours(config)
    decoupled = ours(dataclasses.replace(config, decay_at="before"))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5)
        assert np.abs(decoupled[name] - value).max() > 1e-3


@pytest.mark.parametrize("at", ["before", "after", "gradient"])
def test_the_state_of_the_optimiser_has_the_names_it_always_had(at) -> None:
    state = optim.transform(OptimConfig(decay_at=at), True, 0.1, 0.1).init({"kernel": jnp.ones(2)})
    assert sorted(flat(state)) == ["1/count", "1/mu/kernel", "1/nu/kernel"]


@pytest.mark.parametrize("at", ["before", "after"])
def test_only_what_decays_and_is_trained_shrinks(at) -> None:
    config = OptimConfig(clip_norm=0.0, decay_at=at)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "frozen": jnp.ones((2, 2))}
    nothing = {name: jnp.zeros_like(p) for name, p in params.items()}
    decays = optim.decay_mask(config, {"kernel": 2, "bias": 1, "frozen": 2})
    trained = {"kernel": True, "bias": True, "frozen": False}
    (found,) = updated(config, params, nothing, decays=decays, trained=trained)
    np.testing.assert_allclose(found["kernel"], 0.99, rtol=1e-6)
    assert (found["bias"] == 1).all()
    assert (found["frozen"] == 1).all()


def test_clipping_is_by_the_norm_of_all_gradients() -> None:
    gradients = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
    clip = optax.clip_by_global_norm(1.0)
    found, _ = clip.update(gradients, clip.init(gradients))
    np.testing.assert_allclose(found["a"], [0.23076921, 0.30769228], rtol=1e-5)
    np.testing.assert_allclose(found["b"], [0.92307685], rtol=1e-5)
    # What transform does to them before Adam is the same: an update of SGD's size would show it, Adam's hides it.
    config = OptimConfig(clip_norm=1.0, decay="all")
    state = optim.transform(config, True, 0.1, 0.0).init(gradients)
    _, after = optim.transform(config, True, 0.1, 0.0).update(gradients, state, gradients)
    mean: Any = optax.tree.get(after, "mu")
    np.testing.assert_allclose(mean["b"], 0.1 * found["b"], rtol=1e-6)
