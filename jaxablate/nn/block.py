"""The transformer block, and the stack that repeats a layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxablate.nn.drop_path import DropPath
from jaxablate.nn.layout import constrain
from jaxablate.nn.quantized import COLLECTION as QUANTIZED
from jaxablate_kernels import Rotary

Remat = Literal["none", "block"]


class Block(nn.Module):
    """Attention and feed-forward, each with a residual connection.

    The parts are given as factories that take a name, so that the block knows none of their options.

    Attributes:
      placement: `pre` normalises what goes into a part (Xiong et al. 2020), `post` the sum that comes out.
      kv_input: whether keys and values see the `normed` or the `raw` residual stream (pre-norm only).
      drop_path: rate at which an example skips each part in training, see `nn.drop_path`.
    """

    attention: Callable[..., nn.Module]
    ffn: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    placement: Literal["pre", "post"] = "pre"
    kv_input: Literal["normed", "raw"] = "normed"
    ffn_norm: Callable[..., nn.Module] | None = None  # where it differs from `norm`
    drop_path: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        *,
        mask: Bool[Array, "batch length"] | None = None,
        logit_bias: Float[Array, "#batch #heads #length #length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
        keys: Array | None = None,
        rotary: Rotary | None = None,
    ) -> Float[Array, "batch length dim"]:
        """`keys` are those of the examples' noise; None in evaluation. The others are the attention's."""
        attention_norm = self.norm(name="attention_norm")
        ffn_norm = (self.ffn_norm or self.norm)(name="ffn_norm")
        attention = functools.partial(
            self.attention(name="attention"),
            mask=mask,
            logit_bias=logit_bias,
            positions=positions,
            **({} if rotary is None else {"rotary": rotary}),
        )
        ffn = self.ffn(name="ffn")

        def branch(part: str, y: Array) -> Array:
            return DropPath(self.drop_path, name=f"{part}_drop")(y.astype(x.dtype), keys)

        x = constrain(x, "batch", None, None)
        if self.placement == "post":
            x, _ = attention_norm(branch("attention", attention(x)), x)
            return ffn_norm(branch("ffn", ffn(x)), x)[0]
        h = attention_norm(x)
        context = x if self.kv_input == "raw" else h
        # The sum and the norm after it in one call, so that a kernel can make it one pass over memory.
        h, x = ffn_norm(branch("attention", attention(h, context)), x)
        return x + branch("ffn", ffn(h))


class Stack(nn.Module):
    """`depth` layers one after another, with the same extra arguments to each.

    Attributes:
      layer: class of the layer and its arguments; its call takes the stream and then `args`.
      remat: `block` recomputes a layer in the backward pass instead of keeping what is inside it.
      loop: `unrolled` gives each layer its own name; `scan` compiles one layer and stacks the parameters.
    """

    layer: Callable[..., nn.Module]
    depth: int
    remat: Remat = "none"
    loop: Literal["unrolled", "scan"] = "unrolled"

    @nn.compact
    def __call__(self, x: Array, *args: Any) -> Array:
        def body(layer: nn.Module, x: Array, args: tuple[Any, ...]) -> tuple[Array, None]:
            return layer(x, *args), None

        # Inside a scan XLA cannot undo the recomputation, so only there may it be left unprotected.
        run = body if self.remat == "none" else nn.remat(body, prevent_cse=self.loop == "unrolled")
        if self.loop == "scan" and self.depth:
            run = nn.scan(
                run,
                variable_axes={"params": 0, "cache": 0, QUANTIZED: 0},
                split_rngs={"params": True, "dropout": True},
                length=self.depth,
                in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return run(self.layer(name="layers"), x, args)[0]
        for i in range(self.depth):
            x, _ = run(self.layer(name=f"layer_{i}"), x, args)
        return x
