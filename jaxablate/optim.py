"""The optimiser: clipping, AdamW with decay masks, warm-up and decay schedules, parameter averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxablate.config import OptimConfig


def schedule(config: OptimConfig, steps: int) -> Callable[[Any], jax.Array]:
    """Learning rate as a share of its peak, at update 1..steps.

    Linear warm-up from 0, reaching the peak at update `warmup_steps`; then a cosine (Loshchilov & Hutter
    2017) or a line down to `end_fraction` at update `steps`, or constant. With `first_update` 0 every update has
    the rate of the one before.
    """
    rest = max(steps - config.warmup_steps, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(1.0, rest, alpha=config.end_fraction),
        "linear": optax.linear_schedule(1.0, config.end_fraction, rest),
        "constant": optax.constant_schedule(1.0),
    }[config.schedule]
    warmup = optax.linear_schedule(0.0, 1.0, config.warmup_steps)
    joined = optax.join_schedules([warmup, after], [config.warmup_steps])
    at = joined if config.first_update else lambda update: joined(update - 1)
    return lambda update: jnp.asarray(at(update), jnp.float32)


def decay_mask(config: OptimConfig, axes: Any) -> Any:
    """Which parameters decay: a tree of bools from a tree of parameter ranks.

    `matrices` leaves out whatever has fewer than two axes: biases, norm weights, temperatures.
    """
    return jax.tree.map(lambda rank: config.decay == "all" or rank >= 2, axes)


def transform(
    config: OptimConfig,
    decays: Any,
    learning_rate: jax.Array | float,
    weight_decay: jax.Array | float,
    trained: Any = True,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019), or Adam with decay in its gradient, after clipping by the global norm.

    The rates may be traced, so that the members of a cohort have their own; the state's structure does
    not depend on them.

    Args:
      decays: tree of bools, which parameters decay.
      trained: tree of bools, which parameters are trained; the others keep no state and get no update.
        Their gradients must be zero, so that they do not count in the norm.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    decay = optax.add_decayed_weights(weight_decay, decays)
    adamw = optax.chain(
        # The clipped gradient is the loss's own, as where torch clips before its optimiser adds the decay.
        optax.chain(clip, decay) if config.decay_at == "gradient" else clip,
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        decay if config.decay_at == "before" else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
        _decay_after(learning_rate * weight_decay, decays)
        if config.decay_at == "after"
        else optax.identity(),
    )
    # An update of a masked leaf is its gradient, which is zero.
    return adamw if trained is True else optax.masked(adamw, trained)


def _decay_after(share: jax.Array | float, decays: Any) -> optax.GradientTransformation:
    """Takes `share` off the parameters as the update leaves them, not as it found them; the last of a chain."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, p: u - share * (p + u), updates, params), state

    shrink = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.masked(shrink, decays)


def average(config: OptimConfig, ema: Any, params: Any) -> Any:
    """Exponential moving average of the parameters; an empty tree stays empty."""
    if not config.ema_decay:
        return ema
    return jax.tree.map(lambda e, p: config.ema_decay * e + (1 - config.ema_decay) * p, ema, params)
