"""The decoder-only language model, put together from the ablated slots of `nn`.

Axes in comments and types: B rows, T tokens, C channels, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from jaxablate.nn.attention import Attention
from jaxablate.nn.block import Block, Remat, Stack
from jaxablate.nn.ffn import GATED, Ffn
from jaxablate.nn.head import VocabularyHead
from jaxablate.nn.linear import glorot_truncated
from jaxablate.nn.norm import Norm
from jaxablate.nn.position import PositionEmbedding
from jaxablate.studies.tinystories.config import LmModel, feed_forward_width

NORM_EPS = 1e-5


def ffn_width(config: LmModel) -> int:
    """Hidden width of the feed-forward layers: 8/3 of `dim` where gated, else 4, unless the config says."""
    return config.ffn_width or feed_forward_width(config.dim, 8 / 3 if config.ffn in GATED else 4.0)


class DecoderLm(nn.Module):
    """Tokens to the logits, or to the losses, of their successors.

    Attributes:
      context: tokens of the longest row.
      cache: `kept` keeps keys and values for generation, see `nn.attention`.
    """

    config: LmModel
    vocab: int
    context: int
    dtype: Any = jnp.float32
    remat: Remat = "none"
    cache: str = "none"

    def setup(self) -> None:
        config = self.config
        self.embedding = nn.Embed(
            self.vocab,
            config.dim,
            embedding_init=nn.with_logical_partitioning(
                initializers.truncated_normal(1.0, lower=-3.0, upper=3.0), ("vocab", "embed")
            ),
        )
        norm = functools.partial(Norm, kind=config.norm, eps=NORM_EPS, impl=config.norm_impl)
        layer = functools.partial(
            _Layer,
            attention=functools.partial(
                Attention,
                heads=config.heads,
                head_dim=config.dim // config.heads,
                impl=config.attention_impl,
                causal="causal",
                qk_norm=config.qk_norm,
                position="rope" if config.position in ("rope", "faithful_none") else "none",
                cache_length=self.context if self.cache == "kept" else 0,
                matrix_init=glorot_truncated,
                dtype=self.dtype,
            ),
            ffn=functools.partial(
                Ffn,
                kind=config.ffn,
                width=ffn_width(config),
                gate_impl=config.ffn_impl,
                matrix_init=glorot_truncated,
                dtype=self.dtype,
            ),
            norm=norm,
            placement=config.placement,
        )
        table = config.position if config.position in ("learned", "sinusoidal") else "none"
        self.positions = PositionEmbedding(table, self.context)
        self.layers = Stack(layer, config.layers, remat=self.remat)
        if config.final_norm == "on":
            self.final_norm = norm()
        self.head = VocabularyHead(
            config.dim,
            self.vocab,
            impl=config.loss_impl,
            kernel_init=glorot_truncated(config.dim, self.vocab),
            dtype=self.dtype,
        )

    def states(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T C"]:
        """What the head reads; the residual stream is float32."""
        x = self.positions(self.embedding(tokens), positions)
        x = self.layers(x, positions)
        return self.final_norm(x) if self.config.final_norm == "on" else x

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of the token after each, float32; `positions` are for a token that continues a cache."""
        return self.head(self.states(tokens, positions))

    def losses(self, tokens: Int[Array, "B T"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """Cross-entropy of each target in nats."""
        return self.head.losses(self.states(tokens), targets).nll


class _Layer(nn.Module):
    """A block that takes the positions as a positional argument, as `Stack` hands them on."""

    attention: Any
    ffn: Any
    norm: Any
    placement: Any

    @nn.compact
    def __call__(self, x: Array, positions: Array | None) -> Array:
        block = Block(self.attention, self.ffn, self.norm, placement=self.placement, name="block")
        return block(x, positions=positions)
