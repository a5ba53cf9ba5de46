"""Channel-separated attention: groups of channels attend by themselves, all by the same small matrices."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxablate.nn.layout import Names, on_each_device
from jaxablate.nn.linear import linear
from jaxablate.nn.norm import Norm
from jaxablate_kernels import attention


class ChannelSeparatedAttention(nn.Module):
    """Splits the channels into contiguous groups of `group` and runs the same attention in each.

    With X one group: Q = rms(X) Wq + b, K = rms(X) Wk + b, V = X Wv + b; heads of group / heads channels; the
    output projection is of one group, too. Channels of different groups meet only outside.

    Attributes:
      group: channels of a group; must divide those of the input, and `heads` must divide it.
      impl: name of the kernel in `jaxablate_kernels.dispatch`; it never changes the function.
    """

    heads: int
    group: int
    impl: str = "reference"
    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        context: Any = None,
        *,
        mask: Bool[Array, "batch length"] | None = None,
        logit_bias: None = None,
        positions: None = None,
    ) -> Float[Array, "batch length dim"]:
        """Attends within `x`. The signature is that of `Attention`, of which it has no context, bias, positions."""
        if not (context is None or context is x) or logit_bias is not None or positions is not None:
            raise ValueError(
                "channel-separated attention is from tokens to themselves, without bias or positions"
            )
        batch, length, dim = x.shape
        if dim % self.group or self.group % self.heads:
            raise ValueError(
                f"channel-separated attention: groups of {self.group} channels must divide {dim}, and "
                f"{self.heads} heads a group"
            )
        groups = dim // self.group
        # Groups become rows of the batch: one call of the kernel serves them all.
        parts = x.reshape(batch, length, groups, self.group).transpose(0, 2, 1, 3)
        rows = parts.reshape(batch * groups, length, self.group)

        def project(name: str, inputs: Array) -> Array:
            shape = (self.heads, self.group // self.heads)
            axes = ("embed", "heads", None)
            return linear(shape, axes, name=name, dtype=self.dtype, bias_fan_in=self.group)(inputs)

        def norm(name: str) -> Array:
            return Norm("rmsnorm", eps=self.eps, name=name)(rows)

        q, k, v = project("q", norm("q_norm")), project("k", norm("k_norm")), project("v", rows)
        heads: Names = ("batch", None, "heads", None)
        arrays: dict[str, Array] = {"q": q, "k": k, "v": v}
        axes: dict[str, Names] = dict.fromkeys(arrays, heads)
        if mask is not None:
            arrays["kv_mask"], axes["kv_mask"] = jnp.repeat(mask, groups, axis=0), ("batch", None)
        kernel = functools.partial(attention, impl=self.impl, scale=(self.group // self.heads) ** -0.5)
        mixed = on_each_device(kernel, arrays, axes, heads)
        out = linear(
            self.group,
            ("heads", None, "embed"),
            name="out",
            dtype=self.dtype,
            bias_fan_in=self.group,
            contract=2,
        )(mixed)
        return out.reshape(batch, groups, length, self.group).transpose(0, 2, 1, 3).reshape(x.shape)
