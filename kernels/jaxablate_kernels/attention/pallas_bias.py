"""The gradient of a bias: sums of ds over the axes along which it is broadcast, without a B x H x T x S array.

A program computes the tile (queries, keys) of one entry of the bias's own batch and head axes.  It goes
through the problems (batch row, head) that share the entry, adds their ds up on chip, sums over an axis
of the tile if the bias has it in one piece, and writes the rest.  Where there are few tiles and many
problems, they are split over several programs.  XLA adds the parts up in the order of their numbers: no
atomics, the same bits each time.

Memory beyond the gradient itself: with a bias that has T and S in full and enough tiles to fill the device,
none but a float32 copy of the gradient; else at most `_PROGRAMS` parts of a tile each (8 MB for tiles of
64 x 64).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxablate_gpus import GPUS
from jaxablate_kernels.attention.pallas_blocks import Sizes, Span, along
from jaxablate_kernels.manual_axes import shaped

# Programs that fill a device: four on each multiprocessor of an H200.
_PROGRAMS = 4 * GPUS["h200"].cores


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who adds up what.

    Attributes:
        bias: the shape of the bias.
        shared_batch, shared_heads: how many batch rows and heads share an entry of the bias.
        tiles_q, tiles_k: tiles along T and S.
        block_q, block_k: their sizes.
        parts: programs among which the problems that share an entry are split.
    """

    bias: tuple[int, int, int, int]
    shared_batch: int
    shared_heads: int
    tiles_q: int
    tiles_k: int
    block_q: int
    block_k: int
    parts: int

    @classmethod
    def of(cls, bias: jax.Array, sizes: Sizes, block_q: int, block_k: int) -> "Plan":
        """For a bias of rank 4 and tiles of the given sizes."""
        b, h, t, s = bias.shape
        tiles_q, tiles_k = pl.cdiv(sizes.q_len, block_q), pl.cdiv(sizes.kv_len, block_k)
        shared_batch = sizes.batch if b == 1 else 1
        shared_heads = sizes.heads if h == 1 else 1
        parts = min(shared_batch * shared_heads, max(1, _PROGRAMS // (b * h * tiles_q * tiles_k)))
        return cls((b, h, t, s), shared_batch, shared_heads, tiles_q, tiles_k, block_q, block_k, parts)

    @property
    def problems(self) -> int:
        """How many (batch row, head) share an entry."""
        return self.shared_batch * self.shared_heads

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tiles, entries of the bias along (b, h), parts."""
        b, h, _, _ = self.bias
        return self.tiles_q * self.tiles_k, b * h, self.parts

    def out_shape(self, like: jax.Array) -> jax.ShapeDtypeStruct:
        """float32 (parts, b, h, rows, columns): T rows or one per tile of queries, columns likewise."""
        b, h, t, s = self.bias
        rows = t if t > 1 else self.tiles_q
        columns = s if s > 1 else self.tiles_k
        return shaped((self.parts, b, h, rows, columns), jnp.dtype(jnp.float32), like)

    def out_spec(self) -> pl.BlockSpec:
        """A program sees the whole (rows, columns) of its part and entry."""
        _, h, t, s = self.bias
        rows = self.tiles_q * self.block_q if t > 1 else self.tiles_q
        columns = self.tiles_k * self.block_k if s > 1 else self.tiles_k
        return pl.BlockSpec(
            (None, None, None, rows, columns), lambda i, e, p: (p, jax.lax.div(e, h), jax.lax.rem(e, h), 0, 0)
        )

    def tile(self) -> tuple[Any, Any]:
        """Which tile of queries and which of keys this program has."""
        i = pl.program_id(0)
        return jax.lax.div(i, self.tiles_k), jax.lax.rem(i, self.tiles_k)

    def entry(self) -> tuple[Any, Any]:
        """The index (b, h) of this program's entry of the bias."""
        e, h = pl.program_id(1), self.bias[1]
        return jax.lax.div(e, h), jax.lax.rem(e, h)

    def turns(self) -> tuple[Any, Any]:
        """The first of this program's problems, and the one after its last."""
        each = pl.cdiv(self.problems, self.parts)
        first = pl.program_id(2) * each
        return first, jnp.minimum(first + each, self.problems)

    def problem(self) -> Callable[[Any], tuple[Any, Any]]:
        """turn -> batch row and query head."""
        b, h = self.entry()

        def of(turn):
            row = jax.lax.div(turn, self.shared_heads) if self.bias[0] == 1 else b
            head = jax.lax.rem(turn, self.shared_heads) if self.bias[1] == 1 else h
            return row, head

        return of

    def store(self, ref: Any, ds: jax.Array, queries: Span, keys: Span) -> None:
        """Write the tile (queries, keys), summed as the bias asks for; entries beyond the ends are not counted."""
        i, j = self.tile()
        _, _, t, s = self.bias
        inside = [along(x, axis) for axis, x in enumerate((queries.inside(), keys.inside())) if x is not None]
        mask = None
        for condition in inside:
            condition = jnp.broadcast_to(condition, ds.shape)
            mask = condition if mask is None else mask & condition
        if t > 1 and s > 1:
            plgpu.store(ref.at[queries.slice, keys.slice], ds, mask=mask)
            return
        if mask is not None:
            ds = jnp.where(mask, ds, 0.0)
        if t > 1:
            plgpu.store(ref.at[queries.slice, j], jnp.sum(ds, axis=1), mask=queries.inside())
        elif s > 1:
            plgpu.store(ref.at[i, keys.slice], jnp.sum(ds, axis=0), mask=keys.inside())
        else:
            plgpu.store(ref.at[i, j], jnp.sum(jnp.sum(ds, axis=1), axis=0))

    def finish(self, parts: jax.Array, dtype: Any) -> jax.Array:
        """The gradient in the bias's shape and type from what the programs wrote (outside of kernels)."""
        total = jnp.sum(parts, axis=0)
        for axis, size in ((2, self.bias[2]), (3, self.bias[3])):
            if size == 1:
                total = jnp.sum(total, axis=axis, keepdims=True)
        return total.astype(dtype)
