"""Multi-head attention with its ablated slots: kernel, QK-norm, rotary positions, grouped key/value heads.

For generation it remembers keys and values in the collection `cache`.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxablate.nn.layout import Names, constrain, on_each_device
from jaxablate.nn.linear import MatrixInit, linear, parameter, torch_linear
from jaxablate.nn.position import rotary_tables
from jaxablate_kernels import QkNorm, Rotary, attention

QK_NORM_EPS = {"l2": 1e-12, "rms": 1e-6}


class Attention(nn.Module):
    """Attention from `x` to `context` (itself if none is given).

    Attributes:
      impl: name of the kernel in `jaxablate_kernels.dispatch`; it never changes the function.
      kv_heads: heads of keys and values; 0 for as many as `heads` (Ainslie et al. 2023).
      qk_norm: `l2` brings queries and keys to unit length and scales them by learned weights per
        feature (Henry et al. 2020); the logits are then multiplied by `scale`. `rms` divides
        them by their root mean square instead (as Qwen3 does) and leaves `scale` at its default.
      scale: factor of the logits; 0 for 1/sqrt(head_dim).
      position: `rope` turns queries and keys by their index; for other rotary positions, hand them to the call.
      cache_length: tokens that the cache holds; 0 for none. A call without `positions` starts the cache, one
        with them adds a token for each row and attends to those before it.
      matrix_init: of the matrices, from their fans.
    """

    heads: int
    head_dim: int
    impl: str
    kv_heads: int = 0
    causal: Literal["causal", "full"] = "full"
    qk_norm: Literal["l2", "rms", "none"] = "none"
    scale: float = 0.0
    position: Literal["rope", "none"] = "none"
    bias: Literal["none", "all"] = "none"
    cache_length: int = 0
    matrix_init: MatrixInit = torch_linear
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        context: Float[Array, "batch keys context_dim"] | None = None,
        *,
        mask: Bool[Array, "batch keys"] | None = None,
        logit_bias: Float[Array, "#batch #heads #length #keys"] | None = None,
        positions: Int[Array, "batch 1"] | None = None,
        rotary: Rotary | None = None,
    ) -> Float[Array, "batch length dim"]:
        """`mask` is true at the keys that may be seen; `logit_bias` is added to the scaled logits.

        `positions` (only with a cache) says where in its row each of the tokens stands. `rotary` turns queries
        and keys, by tables of each row; of a token that continues a cache, those of all keys that this holds.
        """
        if rotary is not None and self.position != "none":
            raise ValueError("attention: rotary tables are given, so position must be none")
        context = x if context is None else context
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            raise ValueError(f"attention: {self.heads} heads do not divide into kv_heads={kv_heads} groups")
        dim = x.shape[-1]

        def project(name: str, inputs: Array, heads: int) -> Array:
            fan_in = inputs.shape[-1] if self.bias == "all" else 0
            split = linear(
                (heads, self.head_dim),
                ("embed", "heads", None),
                name=name,
                dtype=self.dtype,
                bias_fan_in=fan_in,
                kernel_init=self.matrix_init(inputs.shape[-1], heads * self.head_dim),
            )
            return constrain(split(inputs), "batch", None, "heads", None)

        q = project("q", x, self.heads)
        k = project("k", context, kv_heads)
        v = project("v", context, kv_heads)
        if self.cache_length:
            k, v, mask = self._remember(k, v, mask, positions)
        mixed = self._mix(q, k, v, mask, logit_bias, positions, rotary)
        inner = self.heads * self.head_dim
        return linear(
            dim,
            ("heads", None, "embed"),
            name="out",
            dtype=self.dtype,
            bias_fan_in=inner if self.bias == "all" else 0,
            contract=2,
            kernel_init=self.matrix_init(inner, dim),
        )(mixed)

    def _remember(
        self, k: Array, v: Array, mask: Array | None, positions: Array | None
    ) -> tuple[Array, Array, Array | None]:
        """Puts keys and values into the cache; those to attend to, and which of them may be seen."""
        shape = (k.shape[0], self.cache_length, *k.shape[2:])
        keys = self.variable("cache", "keys", jnp.zeros, shape, k.dtype)
        values = self.variable("cache", "values", jnp.zeros, shape, v.dtype)
        if positions is None:
            keys.value = keys.value.at[:, : k.shape[1]].set(k)
            values.value = values.value.at[:, : v.shape[1]].set(v)
            return k, v, mask
        if mask is not None:
            raise ValueError("attention: with a cache it is the positions that say which keys may be seen")
        rows = jnp.arange(k.shape[0])[:, None]
        keys.value, values.value = (
            keys.value.at[rows, positions].set(k),
            values.value.at[rows, positions].set(v),
        )
        return keys.value, values.value, jnp.arange(self.cache_length)[None] <= positions

    def _mix(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None,
        bias: Array | None,
        positions: Array | None,
        given: Rotary | None,
    ) -> Array:
        """The kernel on each device's examples and heads. QK-norm and positions go in: it may fuse them."""
        heads: Names = ("batch", None, "heads", None)
        arrays = {"q": q, "k": k, "v": v}
        axes: dict[str, Names] = dict.fromkeys(arrays, heads)
        if mask is not None:
            arrays["kv_mask"], axes["kv_mask"] = mask, ("batch", None)
        if positions is not None:
            arrays["positions"], axes["positions"] = positions, ("batch", None)
        if bias is not None:
            names = ("batch", "heads", None, None)
            arrays["bias"] = bias
            axes["bias"] = tuple(
                name if size > 1 else None for name, size in zip(names, bias.shape, strict=True)
            )
        if given is not None:
            tables = {"q_cos": given.q[0], "q_sin": given.q[1], "k_cos": given.k[0], "k_sin": given.k[1]}
            arrays |= tables
            axes |= dict.fromkeys(tables, ("batch", None, None))
        for name in ("q_scale", "k_scale") if self.qk_norm != "none" else ():
            arrays[name] = parameter(self, name, nn.initializers.ones, (None,), (self.head_dim,))
            axes[name] = (None,)

        def kernel(
            *,
            q_scale: Array | None = None,
            k_scale: Array | None = None,
            positions: Array | None = None,
            q_cos: Array | None = None,
            q_sin: Array | None = None,
            k_cos: Array | None = None,
            k_sin: Array | None = None,
            **arrays: Any,
        ) -> Array:
            qk_norm = rotary = None
            if q_scale is not None and k_scale is not None:
                assert self.qk_norm != "none"
                qk_norm = QkNorm(q_scale, k_scale, kind=self.qk_norm, eps=QK_NORM_EPS[self.qk_norm])
            if self.position == "rope":
                at = jnp.arange(q.shape[1]) if positions is None else positions
                tables = (rotary_tables(where, self.head_dim) for where in (at, jnp.arange(k.shape[1])))
                rotary = Rotary(*tables, pairing="adjacent")
            elif given is not None:
                rotary = Rotary((q_cos, q_sin), (k_cos, k_sin), pairing=given.pairing)
            return attention(
                **arrays,
                impl=self.impl,
                causal=self.causal == "causal" and positions is None,  # else the mask says so
                scale=self.scale or self.head_dim**-0.5,
                qk_norm=qk_norm,
                rotary=rotary,
            )

        return on_each_device(kernel, arrays, axes, heads)
