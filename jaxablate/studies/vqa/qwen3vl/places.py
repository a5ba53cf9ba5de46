"""Where the pictures of a row stand: their patches in the picture, their visual tokens in the row, its positions.

All of it follows from a row's tokens and its pictures' sizes, so nothing else has to be carried around.
Axes: B rows, T tokens, I pictures of a row, P patches of a picture, M = P / merge² visual tokens of one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Places(NamedTuple):
    """Of each token of a row.

    Attributes:
      visual: whether a visual token stands there.
      source: which of the row's I * M visual tokens, counted through its pictures.
      positions: time, row and column, for rotary positions.
      shift: what a later token's position is above its place in the row.
    """

    visual: Bool[Array, "B T"]
    source: Int[Array, "B T"]
    positions: Int[Array, "B T 3"]
    shift: Int[Array, " B"]


def in_row(visual: Bool[Array, "B T"], grids: Int[Array, "B I 2"], *, merge: int, per_picture: int) -> Places:
    """The places of a row's tokens.

    Text takes one step of all three positions per token. A picture begins one step after what stands before it and
    stays at that time, while row and column run over its merged grid; what follows goes on one step after the
    largest of them (Qwen2-VL, arXiv:2409.12191, section 2.1).

    Args:
      visual: the places of visual tokens; as many in a row as its pictures have, in their order.
      grids: rows and columns of patches of each picture, multiples of `merge`; 0 x 0 for none, behind the others.
      per_picture: M of the array of visual tokens.
    """
    merged = grids // merge
    ends = jnp.cumsum(jnp.prod(merged, axis=-1), axis=-1)  # (B, I), in visual tokens
    before = jnp.cumsum(visual, axis=-1) - visual
    # A picture lies behind a token once all its visual tokens do, so at a visual token this counts up to its own.
    picture = jnp.sum(ends[:, None, :] <= before[..., None], axis=-1)
    own = jnp.minimum(picture, grids.shape[1] - 1)
    started = jnp.pad(ends, ((0, 0), (1, 0)))
    inside = before - jnp.take_along_axis(started, own, axis=1)
    width = jnp.maximum(jnp.take_along_axis(merged[..., 1], own, axis=1), 1)

    extents = jnp.max(merged, axis=-1)
    passed = jnp.take_along_axis(jnp.pad(jnp.cumsum(extents, axis=-1), ((0, 0), (1, 0))), picture, axis=1)
    start = jnp.arange(visual.shape[1])[None] - before + passed
    offsets = jnp.stack([jnp.zeros_like(inside), inside // width, inside % width], axis=-1)
    return Places(
        visual=visual,
        source=jnp.where(visual, own * per_picture + inside, 0),
        positions=start[..., None] + jnp.where(visual[..., None], offsets, 0),
        shift=jnp.sum(extents, axis=-1) - ends[:, -1],
    )


def text_only(tokens: Int[Array, "B T"]) -> Places:
    """The places of rows without pictures."""
    rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length)[None, :, None], (rows, length, 3))
    nothing = jnp.zeros_like(tokens)
    return Places(nothing.astype(bool), nothing, positions, nothing[:, 0])


class Patches(NamedTuple):
    """Of each patch of a picture: whether there is one, and its row and column."""

    there: Bool[Array, "N P"]
    rows: Int[Array, "N P"]
    columns: Int[Array, "N P"]


def in_picture(grids: Int[Array, "N 2"], count: int, *, merge: int) -> Patches:
    """The places of `count` patches, which come in blocks of merge x merge: those of one visual token together."""
    index = jnp.arange(count)[None]
    block, inside = index // merge**2, index % merge**2
    across = jnp.maximum(grids[:, 1:] // merge, 1)
    return Patches(
        there=index < jnp.prod(grids, axis=-1)[:, None],
        rows=block // across * merge + inside // merge,
        columns=block % across * merge + inside % merge,
    )


def table_weights(
    at: Int[Array, "N P"], size: Int[Array, " N"], side: int
) -> tuple[Int[Array, "N P 2"], Float[Array, "N P 2"]]:
    """Linear interpolation between the `side` entries of a table stretched over `size` places, ends on ends.

    Gives the two entries next to each place, and their weights.
    """
    steps = jnp.maximum(size - 1, 1).astype(jnp.float32)[:, None]
    exact = at.astype(jnp.float32) * ((side - 1) / steps)
    low = jnp.clip(exact.astype(jnp.int32), 0, side - 1)
    fraction = exact - low.astype(jnp.float32)
    return (
        jnp.stack([low, jnp.minimum(low + 1, side - 1)], axis=-1),
        jnp.stack([1 - fraction, fraction], axis=-1),
    )
