"""Fewer or more tokens: pooling and linear interpolation along the token axis."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def halve(x: Float[Array, "batch tokens dim"]) -> Float[Array, "batch half dim"]:
    """Means of neighbouring pairs; of an odd number the last token is its own pair."""
    if x.shape[1] % 2:
        x = jnp.concatenate([x, x[:, -1:]], axis=1)
    return (x[:, 0::2] + x[:, 1::2]) / 2


def interpolate(x: Float[Array, "batch tokens dim"], length: int) -> Float[Array, "batch length dim"]:
    """Linear interpolation between cell centres, flat beyond the outer ones (`align_corners=False` of torch)."""
    tokens = x.shape[1]
    at = np.clip((np.arange(length) + 0.5) * tokens / length - 0.5, 0, tokens - 1)
    low = np.minimum(at.astype(int), tokens - 1)
    high = np.minimum(low + 1, tokens - 1)
    share = jnp.asarray((at - low)[None, :, None], x.dtype)
    return x[:, low] * (1 - share) + x[:, high] * share


def pool(x: Float[Array, "batch cells dim"], tokens: int) -> Float[Array, "batch tokens dim"]:
    """Means over bins floor(i n / tokens) … ceil((i + 1) n / tokens), as torch's adaptive average pool.

    A matrix product with the bins' weights: where `tokens` divides the cells it is a mean of equal parts.
    """
    cells = x.shape[1]
    if cells % tokens == 0:
        return x.reshape(x.shape[0], tokens, cells // tokens, x.shape[2]).mean(axis=2)
    weights = np.zeros((tokens, cells), np.float32)
    for i in range(tokens):
        first, last = i * cells // tokens, -(-(i + 1) * cells // tokens)
        weights[i, first:last] = 1 / (last - first)
    return jnp.einsum("tc,bcd->btd", jnp.asarray(weights, x.dtype), x)
