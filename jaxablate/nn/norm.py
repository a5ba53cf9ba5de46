"""Normalisation: LayerNorm with and without bias, RMSNorm, none."""

from __future__ import annotations

from typing import Literal, get_args

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxablate.nn.linear import parameter

NormKind = Literal["layernorm", "layernorm_nobias", "rmsnorm", "none"]


class Norm(nn.Module):
    """Normalises the last axis in float32 and scales it by a learned weight that starts at 1.

    Attributes:
      kind: `layernorm` (Ba et al. 2016), `layernorm_nobias`, `rmsnorm` (Zhang & Sennrich 2019) or `none`.
      eps: guards the division.
      eps_at: `inside` adds eps to the variance under the root; `outside` adds it to the root, so that
        tiny inputs still come out with unit size.
    """

    kind: NormKind
    eps: float = 1e-5
    eps_at: Literal["inside", "outside"] = "inside"

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        if self.kind == "none":
            return x
        if self.kind not in get_args(NormKind):
            raise ValueError(f"norm kind {self.kind!r}: valid: {', '.join(get_args(NormKind))}")
        y = x.astype(jnp.float32)
        if self.kind != "rmsnorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        mean_square = jnp.mean(lax.square(y), axis=-1, keepdims=True)
        if self.eps_at == "inside":
            y = y * lax.rsqrt(mean_square + self.eps)
        else:
            # The floor only keeps the gradient of the root finite where the input is exactly 0.
            y = y / (jnp.sqrt(jnp.maximum(mean_square, 1e-30)) + self.eps)
        dim = x.shape[-1]
        along = (1,) * (x.ndim - 1) + (dim,)
        y = y * parameter(self, "scale", nn.initializers.ones, ("norm",), (dim,)).reshape(along)
        if self.kind == "layernorm":
            y = y + parameter(self, "bias", nn.initializers.zeros, ("norm",), (dim,)).reshape(along)
        return y.astype(x.dtype)
