"""What the attention kernels for GPUs share: operands, tiles in and out of memory, masks, logits, bias gradient.

Everything here runs inside a Pallas kernel unless it says otherwise.  A kernel sees its operands as
references to whole sequences of the batch row and heads that its grid position names, and takes tiles out
of them.  Three rules hold everywhere:

* Tiles are powers of two in both axes, at least 16, because Triton's matrix product asks for that.  The
  head dimension D is padded to W, the lengths T and S to whole tiles; what lies beyond the array is never
  read (in interpret mode it is NaN) but filled in by the load, and never written.
* A tile of logits has its queries on one axis and its keys on the other; `q_axis` says which axis the
  queries are on.  The forward pass and dQ want 0, dK and dV want 1: then the product that follows
  contracts over the columns of the tile, whose rows can stay in the registers they were computed in.
* Logits are in units of log 2: log2(e) is folded into the scale, and exp2 is one instruction.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxablate_kernels.attention.pallas_config import Config, head_width
from jaxablate_kernels.attention.spec import NormKind

LOG2E = math.log2(math.e)
FINITE_MIN = float(jnp.finfo(jnp.float32).min)


class Operands(NamedTuple):
    """The arrays of an attention, None where there is none; inside a kernel, references to them.

    Attributes:
        q: (B, T, H, D); k, v: (B, S, K, D).
        bias: (b, h, t, s), each axis 1 or full.
        q_scale, k_scale: (D,), of QK-norm.
        q_turn, k_turn: (cos, sin), see `turn_tables`, (T or S, D) or (B, T or S, D).
        kv_mask: bool (B, S).
        kv_end: int32 (B,), one more than the last key that kv_mask lets through, 0 if there is none.
        q_ids, kv_ids: int32 (B, T), (B, S), segments.
    """

    q: Any
    k: Any
    v: Any
    bias: Any = None
    q_scale: Any = None
    k_scale: Any = None
    q_turn: Any = None
    k_turn: Any = None
    kv_mask: Any = None
    kv_end: Any = None
    q_ids: Any = None
    kv_ids: Any = None


class Static(NamedTuple):
    """What is fixed when the program is compiled."""

    causal: bool
    scale: float
    softcap: float | None
    norm: tuple[NormKind, float] | None  # kind and eps of QK-norm inside the kernel
    pairing: str | None  # of rotary inside the kernel
    config: Config
    interpret: bool


@dataclasses.dataclass(frozen=True)
class Sizes:
    """B, T, S, H, K, G, D and W, the head dimension padded for the matrix unit."""

    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    group: int
    head_dim: int
    width: int

    @classmethod
    def of(cls, operands: Operands) -> "Sizes":
        """From arrays."""
        batch, q_len, heads, head_dim = operands.q.shape
        kv_len, kv_heads = operands.k.shape[1:3]
        return cls(batch, q_len, kv_len, heads, kv_heads, heads // kv_heads, head_dim, head_width(head_dim))

    @property
    def offset(self) -> int:
        """The last key that query 0 sees under a causal mask."""
        return self.kv_len - self.q_len


def launch(
    kernel: Callable[..., None],
    name: str,
    *,
    grid: tuple[int, ...],
    in_specs: Any,
    out_specs: Any,
    out_shape: Any,
    num_warps: int,
    num_stages: int,
    interpret: bool,
) -> Callable[..., Any]:
    """`pl.pallas_call` for the Triton lowering (outside of kernels).

    Of a grid of up to three axes, and one more for each vmap, the lowering puts as many as it must on the
    axis of a launch that may be 2^31 long; the first runs fastest.
    """
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
    )


def padded(length: int, block: int) -> int:
    """The length rounded up to whole blocks."""
    return pl.cdiv(length, block) * block


def specs(
    operands: Operands,
    q_pad: int,
    k_pad: int,
    *,
    q_heads: int,
    kv_heads: int,
    where: Callable[..., tuple[Any, Any, Any]],
) -> Operands:
    """Which part of each operand a program may look at: one batch row and some heads (outside of kernels).

    Args:
        operands: the arrays.
        q_pad, k_pad: T and S in whole tiles.
        q_heads, kv_heads: how many heads of each kind.
        where: grid position -> (batch row, block of query heads, block of key heads).
    """
    return _specs(operands, q_pad, k_pad, None, q_heads, kv_heads, where)


def specs_of_all(operands: Operands, q_pad: int, k_pad: int) -> Operands:
    """The same for programs that go through batch rows and heads themselves: references keep all axes."""
    batch, _, heads, _ = operands.q.shape
    return _specs(operands, q_pad, k_pad, batch, heads, operands.k.shape[2], lambda *at: (0, 0, 0))


def _specs(operands, q_pad, k_pad, batch, q_heads, kv_heads, where) -> Operands:
    width = head_width(operands.q.shape[3])

    def spec(x, block, index):
        return None if x is None else pl.BlockSpec(block, lambda *at: index(*where(*at)))

    def rows(x, pad):
        return spec(x, (batch, pad), lambda b, h, k: (b, 0))

    def turn(tables, pad):
        if tables is None:
            return None
        if tables[0].ndim == 3:
            one = spec(tables[0], (batch, pad, width), lambda b, h, k: (b, 0, 0))
        else:
            one = spec(tables[0], (pad, width), lambda b, h, k: (0, 0))
        return one, one

    bias = None
    if operands.bias is not None:
        b_full, h_full, t_full, s_full = (size > 1 for size in operands.bias.shape)
        block = (
            batch if b_full or batch is None else 1,
            q_heads if h_full else 1,
            q_pad if t_full else 1,
            k_pad if s_full else 1,
        )
        bias = spec(operands.bias, block, lambda b, h, k: (b if b_full else 0, h if h_full else 0, 0, 0))
    return Operands(
        q=spec(operands.q, (batch, q_pad, q_heads, width), lambda b, h, k: (b, 0, h, 0)),
        k=spec(operands.k, (batch, k_pad, kv_heads, width), lambda b, h, k: (b, 0, k, 0)),
        v=spec(operands.v, (batch, k_pad, kv_heads, width), lambda b, h, k: (b, 0, k, 0)),
        bias=bias,
        q_scale=spec(operands.q_scale, (width,), lambda b, h, k: (0,)),
        k_scale=spec(operands.k_scale, (width,), lambda b, h, k: (0,)),
        q_turn=turn(operands.q_turn, q_pad),
        k_turn=turn(operands.k_turn, k_pad),
        kv_mask=rows(operands.kv_mask, k_pad),
        kv_end=spec(operands.kv_end, (batch,), lambda b, h, k: (b,)),
        q_ids=rows(operands.q_ids, q_pad),
        kv_ids=rows(operands.kv_ids, k_pad),
    )


@dataclasses.dataclass(frozen=True)
class Span:
    """`block` consecutive queries or keys, from `start` on, of a sequence of `length`.

    Attributes:
        start: int32 scalar or Python int.
        block: a power of two.
        length: T or S.
    """

    start: Any
    block: int
    length: int

    @property
    def slice(self) -> Any:
        """For indexing a reference."""
        return pl.ds(self.start, self.block)

    @property
    def ragged(self) -> bool:
        """Whether some block of this size ends beyond the sequence."""
        return self.length % self.block != 0

    def index(self) -> jax.Array:
        """int32 (block,), positions in the sequence."""
        return self.start + jnp.arange(self.block, dtype=jnp.int32)

    def inside(self) -> jax.Array | None:
        """bool (block,), which positions exist; None for all."""
        return self.index() < self.length if self.ragged else None


def load_vector(ref: Any, span: Span, other: Any, *before: Any) -> jax.Array:
    """(block,) out of a reference whose last axis is the sequence; `other` beyond its end."""
    view = ref.at[(*before, span.slice)]
    inside = span.inside()
    return plgpu.load(view) if inside is None else plgpu.load(view, mask=inside, other=other)


def load_rows(ref: Any, span: Span, head: Any, sizes: Sizes, *before: Any, edge: bool = True) -> jax.Array:
    """(block, W) of one head out of (..., sequence, heads, W); zeros beyond the end and beyond D.

    Without `edge` the span is known to lie within the sequence.
    """
    view = ref.at[(*before, span.slice, head, slice(None))]
    mask = rows_inside(span, sizes, edge)
    return plgpu.load(view) if mask is None else plgpu.load(view, mask=mask, other=0.0)


def store_rows(ref: Any, span: Span, head: Any, sizes: Sizes, x: jax.Array) -> None:
    """Write (block, W) of one head, in the reference's type, less what is beyond the end and beyond D."""
    plgpu.store(ref.at[span.slice, head, :], x.astype(ref.dtype), mask=rows_inside(span, sizes))


def rows_inside(span: Span, sizes: Sizes, edge: bool = True) -> jax.Array | None:
    """bool (block, W), what of a tile exists; None for all."""
    rows, columns = span.inside() if edge else None, features_inside(sizes)
    if rows is None:
        return None if columns is None else jnp.broadcast_to(columns[None, :], (span.block, sizes.width))
    if columns is None:
        return jnp.broadcast_to(rows[:, None], (span.block, sizes.width))
    return rows[:, None] & columns[None, :]


def features_inside(sizes: Sizes) -> jax.Array | None:
    """bool (W,), which features exist; None for all."""
    if sizes.head_dim == sizes.width:
        return None
    return jnp.arange(sizes.width, dtype=jnp.int32) < sizes.head_dim


def along(x: jax.Array, axis: int) -> jax.Array:
    """A vector as a column (axis 0) or as a row (axis 1)."""
    return x[:, None] if axis == 0 else x[None, :]


def dot(a: jax.Array, b: jax.Array, *, contract: tuple[int, int] = (1, 0), exact: bool = False) -> jax.Array:
    """The product of two matrices over the given axis of each, summed in float32.

    float32 operands follow ``jax_default_matmul_precision``, unless the product is to be `exact`.
    """
    precision = jax.lax.Precision.HIGHEST if exact and a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


class Logits(NamedTuple):
    """A tile of logits.

    Attributes:
        value: in units of log 2, -inf where a query may not look.
        slope: the derivative of softcap * tanh(x / softcap) at each, None without softcap.
    """

    value: jax.Array
    slope: jax.Array | None


def logits(
    q: jax.Array,
    k: jax.Array,
    operands: Operands,
    queries: Span,
    keys: Span,
    static: Static,
    *,
    q_axis: int,
    edge: bool,
    head: Any = 0,
    row: tuple[Any, ...] = (),
) -> Logits:
    """The logits of a tile of prepared queries and keys, (block, W) each, as the specification orders them.

    Args:
        q, k: the tiles.
        operands: bias, masks and segments are read from here.
        queries, keys: where the tiles are.
        static: scale, softcap and causal.
        q_axis: the axis of the queries in the result.
        edge: whether the tile may cross the causal diagonal or the end of the keys.  What kv_mask and
            segments hide is always looked up.
        head: position of the query head among those of the references.
        row: (batch row,) where the references keep that axis, see `specs_of_all`.
    """
    product = dot(q, k, contract=(1, 1)) if q_axis == 0 else dot(k, q, contract=(1, 1))
    slope = None
    if static.softcap is None:
        value = product * (static.scale * LOG2E)
    else:
        bounded = jnp.tanh(product * (static.scale / static.softcap))
        value = bounded * (static.softcap * LOG2E)
        slope = 1.0 - bounded * bounded
    if operands.bias is not None:
        # Times 0, not 0: interpret mode (of jax 0.10 to 0.12) does not take a constant as an index.
        lead = zip((*row, head), operands.bias.shape, strict=False)
        at = tuple(index if size > 1 else index * 0 for index, size in lead)
        tile = _load_bias(operands.bias, at, queries, keys)
        value = value + (tile if q_axis == 0 else tile.T)
    seen = _visible(operands, queries, keys, static, q_axis, edge, row)
    if seen is not None:
        value = jnp.where(seen, value, -jnp.inf)
    return Logits(value, slope)


def _load_bias(ref: Any, at: tuple[Any, ...], queries: Span, keys: Span) -> jax.Array:
    """A float32 tile of the bias in units of log 2, (queries, keys), an axis being 1 where it is broadcast.

    Finite stays finite: a mask made of the lowest number there is must not become one of -inf, which a row
    that has nothing else sees as nothing at all.
    """
    q_full, k_full = (size > 1 for size in ref.shape[-2:])
    view = ref.at[(*at, queries.slice if q_full else pl.ds(0, 1), keys.slice if k_full else pl.ds(0, 1))]
    shape = (queries.block if q_full else 1, keys.block if k_full else 1)
    mask = None
    for span, full, axis in ((queries, q_full, 0), (keys, k_full, 1)):
        inside = span.inside() if full else None
        if inside is not None:
            inside = jnp.broadcast_to(along(inside, axis), shape)
            mask = inside if mask is None else mask & inside
    tile = plgpu.load(view) if mask is None else plgpu.load(view, mask=mask, other=0.0)
    tile = tile.astype(jnp.float32)
    return jnp.where(tile > -jnp.inf, jnp.maximum(tile * LOG2E, FINITE_MIN), tile)


def _visible(
    operands: Operands,
    queries: Span,
    keys: Span,
    static: Static,
    q_axis: int,
    edge: bool,
    row: tuple[Any, ...],
) -> jax.Array | None:
    """Which query of a tile may see which key, broadcastable to the tile; None for all.

    Queries that do not exist may look anywhere: whoever loads them makes them harmless.
    """
    k_axis = 1 - q_axis
    conditions = []
    if edge and static.causal:
        last_seen = queries.index() + (keys.length - queries.length)
        conditions.append(along(keys.index(), k_axis) <= along(last_seen, q_axis))
    if operands.kv_mask is not None:
        mask = load_vector(operands.kv_mask, keys, False, *row)
        conditions.append(along(mask, k_axis))
    elif edge and keys.ragged:
        # Under a causal mask too: it stops existing queries only at the last key.
        conditions.append(along(keys.index() < keys.length, k_axis))
    if operands.q_ids is not None:
        q_ids = load_vector(operands.q_ids, queries, 0, *row)
        kv_ids = load_vector(operands.kv_ids, keys, 0, *row)
        conditions.append(along(q_ids, q_axis) == along(kv_ids, k_axis))
    return functools.reduce(jnp.logical_and, conditions) if conditions else None
