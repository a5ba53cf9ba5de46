"""The text decoder: grouped-query attention with RMS-normalised queries and keys, gated feed-forward layers.

Axes: B rows, T tokens, D channels, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxablate.nn.attention import Attention
from jaxablate.nn.block import Remat, Stack
from jaxablate.nn.ffn import Ffn
from jaxablate.nn.norm import Norm
from jaxablate.nn.position import Rope
from jaxablate.studies.vqa.qwen3vl.config import Loop, TextConfig
from jaxablate.studies.vqa.qwen3vl.layers import NORM_EPS, PAIRING, Layer, cut, small_normal
from jaxablate.studies.vqa.qwen3vl.places import Places
from jaxablate_kernels import Rotary


class Decoder(nn.Module):
    """Embedded tokens to what the head reads.

    Attributes:
      deep: how many of the first layers are followed by visual tokens of their own (DeepStack, arXiv:2406.04334).
      context: tokens that the cache holds; 0 for none.
    """

    config: TextConfig
    deep: int
    context: int = 0
    dtype: Any = jnp.float32
    remat: Remat = "none"
    loop: Loop = "unrolled"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        added: Sequence[Float[Array, "B T D"]],
        rotary: Rotary,
        positions: Int[Array, "B 1"] | None = None,
    ) -> Float[Array, "B T D"]:
        """`added` goes onto the stream behind the first layers, one each; `positions` are for a further token."""
        config = self.config
        norm = functools.partial(Norm, kind="rmsnorm", eps=NORM_EPS, impl=config.norm_impl)
        layer = functools.partial(
            Layer,
            attention=functools.partial(
                Attention,
                heads=config.heads,
                head_dim=config.head_dim,
                impl=config.attention_impl,
                kv_heads=config.kv_heads,
                causal="causal",
                qk_norm="rms",
                cache_length=self.context,
                matrix_init=small_normal,
                dtype=self.dtype,
            ),
            ffn=functools.partial(
                Ffn,
                kind="swiglu",
                width=config.ffn_dim,
                gate_impl=config.ffn_impl,
                matrix_init=small_normal,
                dtype=self.dtype,
            ),
            norm=norm,
        )
        for stage, depth in enumerate(cut(config.depth, range(self.deep))):
            stack = Stack(layer, depth, self.remat, self.loop, name=f"stage_{stage}")
            x = stack(x, None, rotary, positions)
            if stage < len(added):
                x = x + added[stage].astype(x.dtype)
        return norm(name="final_norm")(x)


class Turns(nn.Module):
    """The rotary tables of a row's tokens. With a cache it keeps their positions, for the keys of later tokens."""

    rope: Rope
    context: int

    @nn.compact
    def __call__(self, at: Places | None, positions: Int[Array, "B 1"] | None) -> Rotary:
        """`at` is where whole rows stand; None for a token that continues a cache at `positions`."""
        if at is not None:
            tables = self.rope.tables(at.positions)
            rotary = Rotary(tables, tables, pairing=PAIRING)
            if not self.context:
                return rotary
            rows, length, axes = at.positions.shape
            kept = self.variable("cache", "positions", jnp.zeros, (rows, self.context, axes), jnp.int32)
            shift = self.variable("cache", "shift", jnp.zeros, (rows,), jnp.int32)
            kept.value = kept.value.at[:, :length].set(at.positions)
            shift.value = at.shift
            return rotary
        if positions is None or not self.has_variable("cache", "positions"):
            raise ValueError(
                "turns: a further token needs its position, and a cache that whole rows have begun"
            )
        kept, shift = self.variable("cache", "positions"), self.variable("cache", "shift")
        here = jnp.broadcast_to(
            (positions + shift.value[:, None])[..., None], (*positions.shape, kept.value.shape[-1])
        )
        kept.value = kept.value.at[jnp.arange(positions.shape[0])[:, None], positions].set(here)
        return Rotary(self.rope.tables(here), self.rope.tables(kept.value), pairing=PAIRING)
