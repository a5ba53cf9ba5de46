"""The vision tower: patches of pictures of any size to visual tokens, behind the last block and behind earlier ones.

Axes: N pictures, P patches, M = P / merge² visual tokens, C channels of the tower, D of the decoder.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxablate.nn.attention import Attention
from jaxablate.nn.block import Remat, Stack
from jaxablate.nn.ffn import Ffn
from jaxablate.nn.linear import linear, parameter
from jaxablate.nn.norm import Norm
from jaxablate.nn.position import Rope
from jaxablate.studies.vqa.qwen3vl import places
from jaxablate.studies.vqa.qwen3vl.config import Loop, VisionConfig
from jaxablate.studies.vqa.qwen3vl.layers import NORM_EPS, PAIRING, Layer, cut, small_normal
from jaxablate_kernels import Rotary


class VisionTower(nn.Module):
    """Patches to visual tokens.

    Each picture is a row of its own, padded to P patches, and sees nothing of the others.
    """

    config: VisionConfig
    dtype: Any = jnp.float32
    remat: Remat = "none"
    loop: Loop = "unrolled"

    @nn.compact
    def __call__(
        self, patches: Float[Array, "N P values"], grids: Int[Array, "N 2"]
    ) -> tuple[Float[Array, "N M D"], tuple[Float[Array, "N M D"], ...]]:
        """The visual tokens of each picture, and those for the decoder's first layers, one array per layer.

        Args:
          patches: in blocks of merge x merge, numbers about -1 to 1; see `images`.
          grids: rows and columns of patches of each picture; 0 x 0 for none.
        """
        config = self.config
        at = places.in_picture(grids, patches.shape[1], merge=config.merge)
        embed = linear(
            config.dim,
            (None, "embed"),
            name="patches",
            dtype=self.dtype,
            bias_fan_in=config.patch_size,
            kernel_init=small_normal(config.patch_size, config.dim),
        )
        x = embed(patches)
        x = x + self._table(at, grids).astype(x.dtype)
        layer = functools.partial(
            Layer,
            attention=functools.partial(
                Attention,
                heads=config.heads,
                head_dim=config.dim // config.heads,
                impl=config.attention_impl,
                bias="all",
                matrix_init=small_normal,
                dtype=self.dtype,
            ),
            ffn=functools.partial(
                Ffn,
                kind="gelu_tanh",
                width=config.ffn_dim,
                bias="all",
                matrix_init=small_normal,
                dtype=self.dtype,
            ),
            norm=functools.partial(Norm, kind="layernorm", eps=NORM_EPS, impl=config.norm_impl),
        )
        tables = Rope.grid(config.dim // config.heads).tables(jnp.stack([at.rows, at.columns], axis=-1))
        rotary = Rotary(tables, tables, pairing=PAIRING)
        deep = []
        for stage, depth in enumerate(cut(config.depth, config.deep)):
            x = Stack(layer, depth, self.remat, self.loop, name=f"stage_{stage}")(x, at.there, rotary)
            if stage < len(config.deep):
                deep.append(self._merge(x, f"deep_merger_{stage}", norm="merged"))
        return self._merge(x, "merger", norm="patches"), tuple(deep)

    def _table(self, at: places.Patches, grids: Int[Array, "N 2"]) -> Float[Array, "N P C"]:
        """The learned positions: a square table, stretched over each picture, bilinear in between."""
        config = self.config
        shape = (config.positions, config.dim)
        table = parameter(self, "positions", nn.initializers.normal(0.02), (None, "embed"), shape)
        (row, row_weight), (column, column_weight) = (
            places.table_weights(of, grids[:, axis], config.side)
            for axis, of in enumerate((at.rows, at.columns))
        )
        index = row[..., :, None] * config.side + column[..., None, :]
        weight = row_weight[..., :, None] * column_weight[..., None, :]
        return jnp.sum(table[index] * weight[..., None], axis=(2, 3))

    def _merge(self, x: Float[Array, "N P C"], name: str, norm: str) -> Float[Array, "N M D"]:
        config = self.config
        return _Merger(config.out_dim, config.merge**2, norm, config.norm_impl, self.dtype, name=name)(x)


class _Merger(nn.Module):
    """`count` neighbouring patches to one visual token; normalised one by one (`patches`) or together (`merged`)."""

    out_dim: int
    count: int
    norm: str
    norm_impl: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "N P C"]) -> Float[Array, "N M D"]:
        pictures, patches, dim = x.shape
        wide = self.count * dim
        normalise = Norm("layernorm", NORM_EPS, impl=self.norm_impl, name="norm")
        if self.norm == "patches":
            x = normalise(x)
        x = x.reshape(pictures, patches // self.count, wide)
        if self.norm == "merged":
            x = normalise(x)
        project = functools.partial(
            linear, dtype=self.dtype, bias_fan_in=wide, kernel_init=small_normal(wide, wide)
        )
        x = jax.nn.gelu(project(wide, ("embed", "mlp"), name="wi")(x), approximate=False)
        return project(self.out_dim, ("mlp", "embed"), name="wo")(x)
