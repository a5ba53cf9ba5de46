"""Multi-head attention with its ablated slots: kernel, QK-norm, rotary positions, grouped key/value heads."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxablate.nn.layout import Names, constrain, on_each_device
from jaxablate.nn.linear import linear, parameter
from jaxablate.nn.position import rotary_tables
from jaxablate_kernels import QkNorm, Rotary, attention


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
        mixed = self._mix(q, k, v, mask, logit_bias)
        fan_in = self.heads * self.head_dim if self.bias == "all" else 0
        axes = ("heads", None, "embed")
        return linear(dim, axes, name="out", dtype=self.dtype, bias_fan_in=fan_in, contract=2)(mixed)

    def _mix(self, q: Array, k: Array, v: Array, mask: Array | None, bias: Array | None) -> Array:
        """The kernel on each device's examples and heads. QK-norm and positions go in: it may fuse them."""
        heads: Names = ("batch", None, "heads", None)
        arrays = {"q": q, "k": k, "v": v}
        axes: dict[str, Names] = dict.fromkeys(arrays, heads)
        if mask is not None:
            arrays["kv_mask"], axes["kv_mask"] = mask, ("batch", None)
        if bias is not None:
            names = ("batch", "heads", None, None)
            arrays["bias"] = bias
            axes["bias"] = tuple(
                name if size > 1 else None for name, size in zip(names, bias.shape, strict=True)
            )
        for name in ("q_scale", "k_scale") if self.qk_norm != "none" else ():
            arrays[name] = parameter(self, name, nn.initializers.ones, (None,), (self.head_dim,))
            axes[name] = (None,)

        def kernel(*, q_scale: Array | None = None, k_scale: Array | None = None, **arrays: Any) -> Array:
            qk_norm = rotary = None
            if q_scale is not None and k_scale is not None:
                qk_norm = QkNorm(q_scale, k_scale, kind="l2", eps=1e-12)
            if self.position == "rope":
                tables = (rotary_tables(jnp.arange(x.shape[1]), self.head_dim) for x in (q, k))
                rotary = Rotary(*tables, pairing="adjacent")
            return attention(
                **arrays,
                impl=self.impl,
                causal=self.causal == "causal",
                scale=self.scale or self.head_dim**-0.5,
                qk_norm=qk_norm,
                rotary=rotary,
            )

        return on_each_device(kernel, arrays, axes, heads)
