"""Multi-head attention with its ablated slots: kernel, QK-norm, rotary positions, grouped key/value heads."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxablate.nn.layout import constrain
from jaxablate.nn.linear import linear, parameter
from jaxablate.nn.position import rope
from jaxablate_kernels import attention


class Attention(nn.Module):
    """Attention from `x` to `context` (itself if none is given).

    Attributes:
      impl: name of the kernel in `jaxablate_kernels.dispatch`; it never changes the function.
      kv_heads: heads of keys and values; 0 for as many as `heads` (Ainslie et al. 2023).
      qk_norm: `l2` brings queries and keys to unit length and scales them by learned weights per
        feature (Henry et al. 2020); the logits are then multiplied by `scale`.
      scale: factor of the logits; 0 for 1/sqrt(head_dim).
      position: `rope` turns queries and keys by their index.
    """

    heads: int
    head_dim: int
    impl: str
    kv_heads: int = 0
    causal: Literal["causal", "full"] = "full"
    qk_norm: Literal["l2", "none"] = "none"
    scale: float = 0.0
    position: Literal["rope", "none"] = "none"
    bias: Literal["none", "all"] = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        context: Float[Array, "batch keys context_dim"] | None = None,
        *,
        mask: Bool[Array, "batch keys"] | None = None,
        logit_bias: Float[Array, "#batch #heads #length #keys"] | None = None,
    ) -> Float[Array, "batch length dim"]:
        """`mask` is true at the keys that may be seen; `logit_bias` is added to the scaled logits."""
        context = x if context is None else context
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            raise ValueError(f"attention: {self.heads} heads do not divide into kv_heads={kv_heads} groups")
        dim = x.shape[-1]

        def project(name: str, inputs: Array, heads: int) -> Array:
            fan_in = inputs.shape[-1] if self.bias == "all" else 0
            features, axes = (heads, self.head_dim), ("embed", "heads", None)
            split = linear(features, axes, name=name, dtype=self.dtype, bias_fan_in=fan_in)(inputs)
            return constrain(split, "batch", None, "heads", None)

        q = project("q", x, self.heads)
        k = project("k", context, kv_heads)
        v = project("v", context, kv_heads)
        if self.qk_norm == "l2":
            q, k = self._unit(q, "q_scale"), self._unit(k, "k_scale")
        if self.position == "rope":
            q, k = rope(q, jnp.arange(q.shape[1])), rope(k, jnp.arange(k.shape[1]))
        mixed = attention(
            q,
            k,
            v,
            impl=self.impl,
            causal=self.causal == "causal",
            kv_mask=mask,
            bias=logit_bias,
            scale=self.scale or self.head_dim**-0.5,
        )
        fan_in = self.heads * self.head_dim if self.bias == "all" else 0
        axes = ("heads", None, "embed")
        return linear(dim, axes, name="out", dtype=self.dtype, bias_fan_in=fan_in, contract=2)(mixed)

    def _unit(self, x: Float[Array, "batch length heads features"], name: str) -> Array:
        """x / max(|x|, 1e-12) times the learned scale, in float32; the floor keeps the gradient at 0 finite."""
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.maximum(jnp.sum(lax.square(y), axis=-1, keepdims=True), 1e-24))
        scale = parameter(self, name, nn.initializers.ones, (None,), (self.head_dim,))
        return (y * scale[None, None, None, :]).astype(x.dtype)
