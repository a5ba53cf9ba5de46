"""Stochastic depth: a residual branch is left out for some examples while training."""

from __future__ import annotations

import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class DropPath(nn.Module):
    """Zeroes a branch for an example with probability `rate`, and scales it by 1 / (1 - rate) otherwise.

    Huang et al. 2016; the choice is a function of the example's key and of where the module stands.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "batch ..."], keys: Array | None) -> Float[Array, "batch ..."]:
        """`keys` has a key for each example; None to keep all, as in evaluation."""
        if keys is None or not self.rate:
            return x
        place = zlib.crc32("/".join(self.path).encode())

        def kept(key: Array) -> Array:
            return jax.random.bernoulli(jax.random.fold_in(key, place), 1 - self.rate)

        keep = lax.expand_dims(jax.vmap(kept)(keys), range(1, x.ndim))
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros((), x.dtype))


def depth_rates(rate: float, depth: int) -> list[float]:
    """Rates of a stack's layers: from 0 at the first in equal steps to `rate` at the last."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
