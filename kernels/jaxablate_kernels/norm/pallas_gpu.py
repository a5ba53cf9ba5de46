"""Normalisation on a GPU: one pass over memory forward and one backward (Pallas, for Triton).

Forward, a program holds some rows, adds the residual, rounds, normalises and writes both results.  Kept
for the backward pass are the total (x without a residual) and one float32 per row, its mean square; the
mean of LayerNorm is computed again, since the row is at hand.

Backward, each of a fixed number of programs goes through a run of rows.  For each row it computes the
gradient of x, adds the cotangent of the total in the same pass, and adds the row's share to the gradients
of scale and bias, which stay in registers until the run is over.  XLA then sums what the programs have.  No
order depends on which program is first, and there are no atomics.  Formulas as in `recompute`.

Bytes per element of x, with e the size of its type, G groups and N rows; in brackets with a residual:

    forward    2 e [4 e]   + 4/D for the mean square:   the ideal [the ideal]
    backward   3 e [4 e]   + 4/D + 8 G/N for the sums of each weight:   the ideal and a few percent

Beyond a width of 8192 registers hold no sums; there XLA makes them from x and dy in a pass of its own: 2 e more.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from jaxablate_kernels import tuning
from jaxablate_kernels.devices import target
from jaxablate_kernels.dispatch import Implementation
from jaxablate_kernels.manual_axes import match_varying, shaped
from jaxablate_kernels.norm import recompute
from jaxablate_kernels.norm.pallas_config import (
    WIDEST,
    WIDEST_WITH_SUMS,
    Config,
    block_width,
    candidates,
    heuristic,
)
from jaxablate_kernels.norm.spec import (
    EpsAt,
    Kind,
    NormSpec,
    Rows,
    Static,
    Weight,
    inverse_root,
    inverse_root_slope,
    unsupported_dtype,
)

DTYPES = ("float32", "bfloat16", "float16")


class _Static(NamedTuple):
    """What is fixed when the program is compiled."""

    formula: Static
    bias_dtype: str | None
    config: Config
    interpret: bool


def norm(
    x: Rows,
    residual: Rows | None,
    scale: Weight,
    bias: Weight | None,
    *,
    kind: Kind,
    eps: float,
    eps_at: EpsAt,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Rows, Rows | None]:
    """(y, total), as the functions of `jaxablate_kernels.norm`, which check the arguments.

    Args:
        x, residual, scale, bias, kind, eps, eps_at: as there.  Without a residual the total is None.
        config: by default the tuned one, or else the heuristic's.
        interpret: run the kernels as JAX operations, on any platform; for tests.
    """
    if config is None:
        _, device = target()
        spec = NormSpec.of(x, residual, scale, bias, kind=kind, eps=eps, eps_at=eps_at)
        config = tuning.config_for("norm", "pallas", spec, device, Config) or heuristic(spec, device)
    bias_dtype = None if bias is None else str(bias.dtype)
    static = _Static(Static(kind, eps, eps_at), bias_dtype, config, interpret)
    return _norm(*match_varying(x, residual, scale, bias), static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _norm(x, residual, scale, bias, static: _Static):
    y, total, _ = norm_pallas(x, residual, scale, bias, static)
    return y, total


def _norm_fwd(x, residual, scale, bias, static: _Static):
    y, total, mean_square = norm_pallas(x, residual, scale, bias, static)
    return (y, total), (x if total is None else total, mean_square, scale)


def _norm_bwd(static: _Static, kept, cotangents):
    dy, dtotal = cotangents
    dx, dscale, dbias = norm_pallas_backward(*kept, dy, dtotal, static)
    return dx, None if dtotal is None else dx, dscale, dbias


_norm.defvjp(_norm_fwd, _norm_bwd)


# The names of the next two functions are the kernel names: jit puts them in jaxpr and lowered text.
@functools.partial(jax.jit, static_argnames=("static",))
def norm_pallas(
    x: Rows, residual: Rows | None, scale: Weight, bias: Weight | None, static: _Static
) -> tuple[Rows, Rows | None, Float[Array, " N"]]:
    """y, total (None without a residual) and the mean square of each centred row."""
    count, dim = math.prod(x.shape[:-1]), x.shape[-1]
    rows, width = static.config.rows, block_width(dim)
    block = pl.BlockSpec((rows, width), lambda i: (i, 0))
    weight = pl.BlockSpec((width,), lambda i: (0,))
    y = shaped((count, dim), x.dtype, x)
    y, total, mean_square = pl.pallas_call(
        functools.partial(_forward_kernel, formula=static.formula, sizes=(count, dim)),
        name="norm_pallas",
        grid=(pl.cdiv(count, rows),),
        in_specs=(block, _if(residual, block), weight, _if(bias, weight)),
        out_specs=(block, _if(residual, block), pl.BlockSpec((rows,), lambda i: (i,))),
        out_shape=(y, _if(residual, y), shaped((count,), jnp.float32, x)),
        compiler_params=plgpu.CompilerParams(num_warps=static.config.warps, num_stages=1),
        interpret=static.interpret,
    )(x.reshape(count, dim), None if residual is None else residual.reshape(count, dim), scale, bias)
    return y.reshape(x.shape), None if total is None else total.reshape(x.shape), mean_square


@functools.partial(jax.jit, static_argnames=("static",))
def norm_pallas_backward(
    total: Rows,
    mean_square: Float[Array, " N"],
    scale: Weight,
    dy: Rows,
    dtotal: Rows | None,
    static: _Static,
) -> tuple[Rows, Weight, Weight | None]:
    """The gradients of x (and of the residual, the same), scale and, if there is one, bias."""
    config = static.config
    count, dim = math.prod(total.shape[:-1]), total.shape[-1]
    width, sums_in_kernel = block_width(dim), block_width(dim) <= WIDEST_WITH_SUMS
    # Equal runs of whole blocks, and no more programs than have one.
    steps = pl.cdiv(count, config.groups * config.backward_rows)
    groups = pl.cdiv(count, steps * config.backward_rows)
    run = pl.BlockSpec((steps * config.backward_rows, width), lambda g: (g, 0))
    sums = pl.BlockSpec((None, width), lambda g: (g, 0))
    has_sums = (sums_in_kernel or None, (sums_in_kernel and static.bias_dtype) or None)
    partial = shaped((groups, dim), jnp.float32, total)
    dx, dscale, dbias = pl.pallas_call(
        functools.partial(
            _backward_kernel, formula=static.formula, sizes=(count, dim), config=config, steps=steps
        ),
        name="norm_pallas_backward",
        grid=(groups,),
        in_specs=(
            run,
            pl.BlockSpec((steps * config.backward_rows,), lambda g: (g,)),
            pl.BlockSpec((width,), lambda g: (0,)),
            run,
            _if(dtotal, run),
        ),
        out_specs=(run, *(_if(has, sums) for has in has_sums)),
        out_shape=(shaped((count, dim), total.dtype, total), *(_if(has, partial) for has in has_sums)),
        compiler_params=plgpu.CompilerParams(num_warps=config.backward_warps, num_stages=1),
        interpret=static.interpret,
    )(
        total.reshape(count, dim),
        mean_square,
        scale,
        dy.reshape(count, dim),
        None if dtotal is None else dtotal.reshape(count, dim),
    )
    if sums_in_kernel:
        dscale = jnp.sum(dscale, axis=0).astype(scale.dtype)
        dbias = None if static.bias_dtype is None else jnp.sum(dbias, axis=0).astype(static.bias_dtype)
    else:
        along = mean_square.reshape(*total.shape[:-1], 1)
        dscale, dbias = recompute.weight_gradients(
            total, along, dy, scale.dtype, static.formula, static.bias_dtype
        )
    return dx.reshape(total.shape), dscale, dbias


def _forward_kernel(
    x_ref, residual_ref, scale_ref, bias_ref, y_ref, total_ref, mean_square_ref, *, formula: Static, sizes
):
    rows, width = x_ref.shape
    inside = _Inside.of(pl.program_id(0) * rows, (rows, width), sizes, whole=sizes[0] % rows == 0)
    total = _load(x_ref, inside.both)
    if residual_ref is not None:
        # The sum in float32, rounded: the same as a sum in the type itself, which not every GPU has.
        total = total.astype(jnp.float32) + _load(residual_ref, inside.both).astype(jnp.float32)
        total = total.astype(x_ref.dtype)
        plgpu.store(total_ref, total, mask=inside.both)
    centred = _centred(total, inside, sizes, formula)
    mean_square = _row_mean(lax.square(centred), sizes)
    y = centred * inverse_root(mean_square, formula)[:, None] * _load_weight(scale_ref, inside)
    if bias_ref is not None:
        y = y + _load_weight(bias_ref, inside)
    plgpu.store(y_ref, y.astype(y_ref.dtype), mask=inside.both)
    plgpu.store(mean_square_ref, mean_square, mask=inside.rows)


def _backward_kernel(
    total_ref,
    mean_square_ref,
    scale_ref,
    dy_ref,
    dtotal_ref,
    dx_ref,
    dscale_ref,
    dbias_ref,
    *,
    formula: Static,
    sizes: tuple[int, int],
    config: Config,
    steps: int,
):
    rows, width = config.backward_rows, scale_ref.shape[0]
    first_row = pl.program_id(0) * (steps * rows)

    def inside_of(i: Any) -> "_Inside":
        # The last run may end in blocks of which nothing exists.
        return _Inside.of(first_row + i * rows, (rows, width), sizes, whole=sizes[0] % (steps * rows) == 0)

    def load(i: Any) -> tuple[Any, ...]:
        """What the pass needs of block i of the run; zeros where there is none."""
        inside, at = inside_of(i), pl.ds(i * rows, rows)
        blocks = (
            _load(ref.at[at, :], inside.both) for ref in (total_ref, dy_ref, dtotal_ref) if ref is not None
        )
        return _load(mean_square_ref.at[at], inside.rows), *blocks

    def work(i: Any, loaded: tuple[Any, ...], sums: tuple[Any, ...]) -> tuple[Any, ...]:
        """Write block i's gradient and add its shares to the sums."""
        mean_square, total, dy, *dtotal = loaded
        inside = inside_of(i)
        inverse = inverse_root(mean_square, formula)[:, None]
        normed = _centred(total, inside, sizes, formula) * inverse
        dy = dy.astype(jnp.float32)
        g = dy * (_load_weight(scale_ref, inside) if scale is None else scale)
        slope = inverse_root_slope(mean_square, formula)
        dx = g - normed * (slope * _row_mean(g * normed, sizes))[:, None]
        if formula.kind == "layer":
            dx = dx - _row_mean(g, sizes)[:, None]
        dx = dx * inverse
        for cotangent in dtotal:
            dx = dx + cotangent.astype(jnp.float32)
        plgpu.store(dx_ref.at[pl.ds(i * rows, rows), :], dx.astype(dx_ref.dtype), mask=inside.both)
        # Where there are no rows, dy is zero.
        shares = (dy * normed, dy)
        return tuple(total + share for total, share in zip(sums, shares, strict=False))

    partials = [ref for ref in (dscale_ref, dbias_ref) if ref is not None]
    # Read once, except beside the widest row, which leaves no registers for it.
    scale = _load_weight(scale_ref, inside_of(0)) if partials else None
    sums = tuple(jnp.zeros((rows, width), jnp.float32) for _ in partials)
    if config.stages == 1:
        sums = _repeat(steps, lambda i, sums: work(i, load(i), sums), sums)
    else:
        loaded, sums = _repeat(steps - 1, lambda i, state: (load(i + 1), work(i, *state)), (load(0), sums))
        sums = work(steps - 1, loaded, sums)
    inside = inside_of(0)
    for ref, total in zip(partials, sums, strict=True):
        plgpu.store(ref, jnp.sum(total, axis=0), mask=inside.columns)


class _Inside(NamedTuple):
    """Which rows, columns and entries of a block exist; None where all blocks are whole."""

    rows: Array | None
    columns: Array | None
    both: Array | None

    @classmethod
    def of(cls, first_row: Any, block: tuple[int, int], sizes: tuple[int, int], *, whole: bool) -> "_Inside":
        """Of a block from `first_row` on, in an array of the given sizes; `whole` if all have all their rows."""
        rows, width = block
        row = column = both = None
        if not whole:
            row = first_row + jnp.arange(rows, dtype=jnp.int32) < sizes[0]
            both = jnp.broadcast_to(row[:, None], (rows, width))
        if sizes[1] != width:
            column = jnp.arange(width, dtype=jnp.int32) < sizes[1]
            along = jnp.broadcast_to(column[None, :], (rows, width))
            both = along if both is None else both & along
        return cls(row, column, both)


def _load(ref: Any, mask: Array | None) -> Array:
    """What a reference holds, zeros where there is nothing."""
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=0.0)


def _load_weight(ref: Any, inside: _Inside) -> Array:
    """(1, width) in float32."""
    return _load(ref, inside.columns).astype(jnp.float32)[None, :]


def _centred(total: Array, inside: _Inside, sizes: tuple[int, int], formula: Static) -> Array:
    """What is normalised, in float32; zeros in columns that do not exist."""
    total = total.astype(jnp.float32)
    if formula.kind == "rms":
        return total
    centred = total - _row_mean(total, sizes)[:, None]
    return centred if inside.columns is None else jnp.where(inside.columns[None, :], centred, 0.0)


def _row_mean(block: Array, sizes: tuple[int, int]) -> Array:
    return jnp.sum(block, axis=1) * (1 / sizes[1])


def _repeat(count: int, body: Callable[[Any, Any], Any], state: Any) -> Any:
    """``state = body(i, state)`` for i below `count`; no loop for none or one."""
    if count <= 1:
        return body(0, state) if count else state
    return lax.fori_loop(0, count, body, state)


def _if(present: Any, value: Any) -> Any:
    """The value, or None where what it belongs to is None."""
    return None if present is None else value


def supports(spec: NormSpec, platform: str) -> str | None:
    """`Implementation.supports`: GPUs; any number of rows."""
    if platform != "gpu":
        return f"platform is {platform}, supported is gpu"
    if spec.dim > WIDEST[spec.kind]:
        return f"x has {spec.dim} features, supported are at most {WIDEST[spec.kind]} for kind {spec.kind!r}"
    return unsupported_dtype(spec, DTYPES)


IMPLEMENTATION = Implementation(
    op="norm",
    name="pallas",
    kernel_name="norm_pallas",
    supports=supports,
    call=norm,
    candidates=candidates,
)
