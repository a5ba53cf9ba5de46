"""Test-time conditioning: of several corrected predictions of a step, the one that a reward prefers.

Every sample has draws of its own and a choice of its own. The number of evaluations is known before anything is
compiled, and `max_evaluations` is never exceeded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxablate.studies.burgers.budget import draws, evaluations
from jaxablate.studies.burgers.config import ConditioningConfig

Step = Callable[[Array], Array]  # tokens (B, T, D) -> tokens
Corrector = Callable[[Array, Array], Array]  # tokens, tau (B,) -> what is to be added to them
Reward = Callable[[Array, Array], Array]  # tokens before and after a step -> (B,), more is better


# ------------------------------------------------------------------------------------------ rewards


Weights = tuple[float, float, float]  # of mass, energy and negativity


def mass_reward(
    before: Float[Array, "B X"], after: Float[Array, "B X"], weights: Weights = (1.0, 1.0, 0.5)
) -> Float[Array, " B"]:
    """-w_m |mean after - mean before| of fields: what periodic Burgers conserves, and nothing else.

    Energy decays in viscosity and shocks, and the field has a sign, so neither is a reason to prefer a candidate.
    """
    return -weights[0] * jnp.abs(jnp.mean(after, axis=-1) - jnp.mean(before, axis=-1))


def faithful_reward(
    before: Float[Array, "B ..."], after: Float[Array, "B ..."], weights: Weights = (1.0, 1.0, 0.5)
) -> Float[Array, " B"]:
    """Upstream's -(w_m |sum r' - sum r| + w_e |sum e'^2 - sum e^2| + w_n sum max(-r', 0)).

    Burgers has neither a density r nor an energy e apart from the one field, which stands for both.
    """
    mass, energy, negative = weights  # each a sum over all cells
    inner = tuple(range(1, before.ndim))
    moved = jnp.abs(after.sum(inner) - before.sum(inner))
    spent = jnp.abs(jnp.square(after).sum(inner) - jnp.square(before).sum(inner))
    return -(mass * moved + energy * spent + negative * jnp.maximum(-after, 0).sum(inner))


# ------------------------------------------------------------------------------------------- choice


def conditioned(
    z: Float[Array, "B T D"],
    step: Step,
    corrector: Corrector,
    reward: Reward,
    config: ConditioningConfig,
    keys: Array,
) -> tuple[Float[Array, "B T D"], int]:
    """The prediction of one step that does best, for each sample, and the rewards that were computed for one.

    A candidate is c = step(z), plus the corrector's drift at c and at a uniform tau of `config.tau`, plus Gaussian
    noise of `config.noise[d]`, d steps ahead (the last entry stands for all further ones). It is worth its
    reward. With a horizon above 1 the best `beam` candidates take part in a choice by reward + discount x what
    the best continuation is worth, recursively; where the best candidate leads the next one by more than a
    positive `early_stop_margin`, it is chosen without. Without candidates, or with max_evaluations=0, the
    prediction is step(z) itself.

    Shapes are static: an early stop saves no time.

    Args:
      step, corrector, reward: of a batch of B samples, whatever the samples differ in besides.
      keys: (B,), of each sample. Candidate i has the same draws however many there are.
    """
    plan = draws(config)
    if not plan:
        return step(z), 0
    total = evaluations(config)

    def search(z: Array, tau: Array, noise: Array, depth: int) -> tuple[Array, Array]:
        """The best candidate (B, T, D) and what it is worth (B,); `tau` and `noise` are of all that it draws."""
        base, count = step(z), plan[depth]

        def candidate(tau: Array, noise: Array) -> Array:
            return base + corrector(base, tau) + deviations[depth] * noise

        found = jax.vmap(candidate, 1, 1)(tau[:, :count], noise[:, :count])  # (B, count, T, D)
        worth = jax.vmap(lambda after: reward(z, after), 1, 1)(found)
        worth = jnp.where(jnp.isnan(worth), -jnp.inf, worth)  # a broken candidate is not the best one
        if depth + 1 == len(plan):
            best = jnp.argmax(worth, axis=1)
            return _pick(found, best), _pick(worth, best)

        leading, leaders = lax.top_k(worth, min(config.beam, count))  # (B, width)
        states = jnp.take_along_axis(found, leaders[:, :, None, None], axis=1)
        taus, noises = (x[:, count:].reshape(*leaders.shape, -1, *x.shape[2:]) for x in (tau, noise))
        _, ahead = jax.vmap(functools.partial(search, depth=depth + 1), 1, 1)(states, taus, noises)
        worth = leading + config.discount * ahead
        best = jnp.argmax(worth, axis=1)
        if config.early_stop_margin > 0:
            best = jnp.where(leading[:, 0] - leading[:, 1] > config.early_stop_margin, 0, best)
        return _pick(states, best), _pick(worth, best)

    def drawn(key: Array) -> tuple[Array, Array]:
        """All that a sample needs at once, since a generator takes long to compile."""
        low, high = config.tau
        tau = jax.random.uniform(jax.random.fold_in(key, 0), (total,), minval=low, maxval=high)
        return tau, jax.random.normal(jax.random.fold_in(key, 1), (total, *z.shape[1:]))

    deviations = [*config.noise, *[config.noise[-1] if config.noise else 0.0] * len(plan)]
    tau, noise = jax.vmap(drawn)(keys)
    return search(z, tau, noise, depth=0)[0], total


def _pick(x: Array, which: Array) -> Array:
    """x[b, which[b]] of (B, candidates, …)."""
    return jax.vmap(lambda row, i: row[i])(x, which)
