"""QK-norm and rotary positions of a tile on chip, and their gradients: `prologue` for the short kernels.

A pair of features is turned by ``x * cos + swap(x) * sin``, where `swap` exchanges the two features of each
pair and the sign is in the table.  Features lie across threads, so the exchange is a product with a
permutation matrix: exact in any type, a few per cent of the work of the logits, and the same code for both
pairings.  The permutation is its own inverse, and so its own transpose in the backward pass.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from jaxablate_kernels.attention.pallas_blocks import (
    Sizes,
    Span,
    Static,
    dot,
    features_inside,
    rows_inside,
)
from jaxablate_kernels.attention.spec import Pairing


class Saved(NamedTuple):
    """What the gradient of QK-norm needs of a tile.

    Attributes:
        unit: float32 (block, W), the normalised rows before the learned scale.
        inverse: float32 (block, 1), what the rows were multiplied with.
        moving: bool (block, 1), whether that depends on the row: not below the floor of l2; None for always.
    """

    unit: jax.Array
    inverse: jax.Array
    moving: jax.Array | None


class Prologue(NamedTuple):
    """What is done to the queries, or to the keys: a scale, tables and a swap, each None without.

    Attributes:
        scale: float32 (W,).
        cos, sin: float32 (block, W), of one tile.
        swap: (W, W) in the type of q and k.
    """

    scale: Any
    cos: Any
    sin: Any
    swap: Any


def turn_tables(tables: tuple[jax.Array, jax.Array], pairing: Pairing) -> tuple[jax.Array, jax.Array]:
    """Tables (cos, sin) per feature, with the sign of each: (..., D/2) to (..., D); outside of kernels."""
    cos, sin = tables
    if pairing == "adjacent":
        shape = (*cos.shape[:-1], 2 * cos.shape[-1])
        return jnp.stack([cos, cos], axis=-1).reshape(shape), jnp.stack([-sin, sin], axis=-1).reshape(shape)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def prologue_of(
    scale_ref: Any, turn_refs: Any, span: Span, dtype: Any, static: Static, sizes: Sizes, *row: Any
) -> Prologue:
    """The prologue of a tile of queries or keys of a type; `row` where the references keep the batch axis."""
    scale = cos = sin = swap = None
    if scale_ref is not None:
        inside = features_inside(sizes)
        scale = plgpu.load(scale_ref) if inside is None else plgpu.load(scale_ref, mask=inside, other=0.0)
        scale = scale.astype(jnp.float32)
    if turn_refs is not None:
        cos, sin = (_load_turn(ref, span, sizes, *row) for ref in turn_refs)
        swap = _swap_matrix(static, sizes, dtype)
    return Prologue(scale, cos, sin, swap)


def _load_turn(ref: Any, span: Span, sizes: Sizes, *row: Any) -> jax.Array:
    view = ref.at[(*row, span.slice, slice(None))] if len(ref.shape) == 3 else ref.at[span.slice, :]
    mask = rows_inside(span, sizes)
    return plgpu.load(view) if mask is None else plgpu.load(view, mask=mask, other=0.0)


def _swap_matrix(static: Static, sizes: Sizes, dtype: Any) -> jax.Array:
    """(W, W), one where row and column are the two features of a pair."""
    row = jax.lax.broadcasted_iota(jnp.int32, (sizes.width, sizes.width), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (sizes.width, sizes.width), 1)
    if static.pairing == "adjacent":
        paired = (row ^ 1) == column
    else:
        half = sizes.head_dim // 2
        paired = ((row - column == half) | (column - row == half)) & (row < 2 * half) & (column < 2 * half)
    return paired.astype(dtype)


def saved_by(x: jax.Array, static: Static, sizes: Sizes) -> Saved | None:
    """What `unprepare` needs of a tile (block, W); None without QK-norm."""
    if static.norm is None:
        return None
    kind, eps = static.norm
    rows = x.astype(jnp.float32)
    squares = jnp.sum(rows * rows, axis=1)[:, None]
    if kind == "l2":
        inverse = jax.lax.rsqrt(jnp.maximum(squares, eps**2))
        return Saved(rows * inverse, inverse, squares > eps**2)
    inverse = jax.lax.rsqrt(squares * (1.0 / sizes.head_dim) + eps)
    return Saved(rows * inverse, inverse, None)


def prepare(x: jax.Array, prologue: Prologue, static: Static, sizes: Sizes) -> tuple[jax.Array, Saved | None]:
    """A tile (block, W) as it enters the logits, and what `unprepare` needs."""
    saved = saved_by(x, static, sizes)
    if saved is not None:
        x = (saved.unit * prologue.scale[None, :]).astype(x.dtype)
    if static.pairing is not None:
        turned = x.astype(jnp.float32) * prologue.cos + dot(x, prologue.swap, exact=True) * prologue.sin
        x = turned.astype(x.dtype)
    return x, saved


def unprepare(
    dy: jax.Array, saved: Saved | None, prologue: Prologue, static: Static, sizes: Sizes
) -> tuple[jax.Array, jax.Array | None]:
    """From the float32 gradient of `prepare`'s result to those of the tile and, summed over it, of the scale (W,)."""
    if static.pairing is not None:
        crossed = (dy * prologue.sin).astype(prologue.swap.dtype)
        dy = dy * prologue.cos + dot(crossed, prologue.swap, exact=True)
    if saved is None:
        return dy, None
    assert static.norm is not None
    kind, _ = static.norm
    dscale = jnp.sum(dy * saved.unit, axis=0)
    dunit = dy * prologue.scale[None, :]
    radial = jnp.sum(dunit * saved.unit, axis=1)[:, None]
    if kind == "rms":
        radial = radial * (1.0 / sizes.head_dim)
    if saved.moving is not None:
        radial = jnp.where(saved.moving, radial, 0.0)
    return (dunit - saved.unit * radial) * saved.inverse, dscale
