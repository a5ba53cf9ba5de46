"""Qwen3-VL: pictures and text to the logits, or the losses, of each next token; and a token at a time.

Axes: B rows, T tokens, I pictures of a row, P patches of a picture, D channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxablate.nn.block import Remat
from jaxablate.nn.head import VocabularyHead
from jaxablate.nn.position import Rope
from jaxablate.studies.vqa.qwen3vl import places
from jaxablate.studies.vqa.qwen3vl.config import Loop, Qwen3VlConfig
from jaxablate.studies.vqa.qwen3vl.text import Decoder, Turns
from jaxablate.studies.vqa.qwen3vl.vision import VisionTower

Variables = Mapping[str, Any]  # Flax collections


class Qwen3Vl(nn.Module):
    """The whole model.

    `patches` and `grids` are the pictures of each row as `images.batch` gives them; None for text alone. The
    tokens of a row hold `config.image_token` once for each of its visual tokens.

    Attributes:
      dtype: of the computation and of the residual stream; parameters keep their own.
      context: tokens that the cache holds, for `fill` and `extend`; 0 for none.
      loop: `scan` compiles one layer of each stack; its parameters are stacked.
    """

    config: Qwen3VlConfig
    dtype: Any = jnp.float32
    context: int = 0
    remat: Remat = "none"
    loop: Loop = "unrolled"

    def setup(self) -> None:
        vision, text = self.config.vision, self.config.text
        options = {"dtype": self.dtype, "remat": self.remat, "loop": self.loop}
        self.embedding = nn.Embed(
            text.vocab,
            text.dim,
            dtype=self.dtype,
            embedding_init=nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed")),
        )
        self.tower = VisionTower(vision, **options)
        rope = Rope.interleaved(text.head_dim, text.rope_sections, text.rope_base)
        self.turns = Turns(rope, self.context)
        self.decoder = Decoder(text, len(vision.deep), self.context, **options)
        self.head = VocabularyHead(
            text.dim,
            text.vocab,
            impl=text.loss_impl,
            kernel_init=nn.initializers.normal(0.02),
            embedding=self.embedding if text.head == "tied" else None,
            dtype=self.dtype,
        )

    def states(
        self,
        tokens: Int[Array, "B T"],
        patches: Float[Array, "B I P values"] | None = None,
        grids: Int[Array, "B I 2"] | None = None,
    ) -> Float[Array, "B T D"]:
        """What the head reads.

        Raises:
          ValueError: patches without grids, or grids without patches.
        """
        if (patches is None) != (grids is None):
            raise ValueError("qwen3vl: pictures need both their patches and their grids")
        x, added = self.embedding(tokens), []
        if patches is None or grids is None:
            at = places.text_only(tokens)
        else:
            rows, pictures, count, values = patches.shape
            per_picture = count // self.config.vision.merge**2
            at = places.in_row(
                tokens == self.config.image_token,
                grids,
                merge=self.config.vision.merge,
                per_picture=per_picture,
            )
            flat = patches.reshape(rows * pictures, count, values)
            seen, deep = self.tower(flat, grids.reshape(rows * pictures, 2))

            def to_tokens(visual: Array, elsewhere: Array) -> Array:
                of_row = visual.reshape(rows, pictures * per_picture, -1)
                there = jnp.take_along_axis(of_row, at.source[..., None], axis=1)
                return jnp.where(at.visual[..., None], there.astype(x.dtype), elsewhere)

            x, added = to_tokens(seen, x), [to_tokens(visual, jnp.zeros_like(x)) for visual in deep]
        return self.decoder(x, added, self.turns(at, None))

    def further(self, tokens: Int[Array, "B 1"], positions: Int[Array, "B 1"]) -> Float[Array, "B 1 D"]:
        """What the head reads of one more text token, at its place in the row; needs a cache."""
        return self.decoder(self.embedding(tokens), [], self.turns(None, positions), positions)

    def logits(self, states: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The head alone, in float32."""
        return self.head(states)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        patches: Float[Array, "B I P values"] | None = None,
        grids: Int[Array, "B I 2"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the token after each, float32."""
        return self.head(self.states(tokens, patches, grids))

    def losses(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        patches: Float[Array, "B I P values"] | None = None,
        grids: Int[Array, "B I 2"] | None = None,
    ) -> Float[Array, "B T"]:
        """Cross-entropy of each target in nats; 0 where it is -100."""
        return self.head.losses(self.states(tokens, patches, grids), targets).nll


def abstract(model: Qwen3Vl) -> Variables:
    """All that `init` makes, as shapes with the names of their axes; costs no memory."""
    vision = model.config.vision
    block = vision.merge**2
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    patches = jax.ShapeDtypeStruct((1, 1, block, vision.patch_size), jnp.float32)
    grids = jax.ShapeDtypeStruct((1, 1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens, patches, grids)


def shapes(model: Qwen3Vl) -> Any:
    """The model's parameters, as `abstract` gives them."""
    return abstract(model)["params"]


def fill(
    model: Qwen3Vl,
    variables: Variables,
    tokens: Int[Array, "B T"],
    last: Int[Array, " B"],
    patches: Float[Array, "B I P values"] | None = None,
    grids: Int[Array, "B I 2"] | None = None,
) -> tuple[Float[Array, "B V"], Any]:
    """Reads whole prompts, as `decoding.Fill`: logits behind each row's last token, and the cache."""
    states, updated = model.apply(variables, tokens, patches, grids, method="states", mutable=["cache"])
    behind = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
    return _logits(model, variables, behind), updated["cache"]


def extend(
    model: Qwen3Vl, variables: Variables, cache: Any, tokens: Int[Array, " B"], positions: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], Any]:
    """Reads one more token of each row, as `decoding.Extend`: logits behind it, and the cache."""
    now = {**variables, "cache": cache}
    states, updated = model.apply(
        now, tokens[:, None], positions[:, None], method="further", mutable=["cache"]
    )
    return _logits(model, variables, states[:, 0]), updated["cache"]


def _logits(model: Qwen3Vl, variables: Variables, states: Float[Array, "B D"]) -> Float[Array, "B V"]:
    found: Any = model.apply(variables, states, method="logits")
    return found
