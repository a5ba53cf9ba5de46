"""Normalisation in plain XLA that keeps, for the backward pass, its input and one number per row.

Autodiff keeps what the formula passes through, in float32: for a bfloat16 input twice its size, and more
for LayerNorm.  Here the backward pass starts from the input (or the total, which the program has anyway)
and the mean square of each row, and computes the rest again.  With u the centred row, r its inverse root
(`spec.inverse_root`), k that one's slope, h = u r, and g = scale dy,

    dx = r (g - k h mean(g h)),   for LayerNorm less its mean,  r mean(g);
    dscale = sum over rows of dy h,   dbias = sum over rows of dy.

Any platform, any sharding: no axes are merged.  XLA makes several passes of it; `pallas_gpu` makes one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxablate_kernels.dispatch import Implementation
from jaxablate_kernels.dtypes import accurate_dtype
from jaxablate_kernels.manual_axes import match_varying
from jaxablate_kernels.norm.spec import (
    EpsAt,
    Kind,
    Rows,
    Static,
    Weight,
    inverse_root,
    inverse_root_slope,
    supports_by_xla,
)


def norm(
    x: Rows,
    residual: Rows | None,
    scale: Weight,
    bias: Weight | None,
    *,
    kind: Kind,
    eps: float,
    eps_at: EpsAt,
) -> tuple[Rows, Rows | None]:
    """(y, total), as the functions of `jaxablate_kernels.norm`, which check the arguments.

    Without a residual the total is None.
    """
    x, residual, scale, bias = match_varying(x, residual, scale, bias)
    bias_dtype = None if bias is None else str(bias.dtype)
    return _norm(x, residual, scale, bias, Static(kind, eps, eps_at), bias_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _norm(x, residual, scale, bias, static: Static, bias_dtype: str | None):
    del bias_dtype
    y, total, _ = norm_recompute(x, residual, scale, bias, static)
    return y, total


def _norm_fwd(x, residual, scale, bias, static: Static, bias_dtype: str | None):
    del bias_dtype
    y, total, mean_square = norm_recompute(x, residual, scale, bias, static)
    return (y, total), (x if total is None else total, mean_square, scale)


def _norm_bwd(static: Static, bias_dtype: str | None, kept, cotangents):
    dy, dtotal = cotangents
    dx, dscale, dbias = norm_recompute_backward(*kept, dy, dtotal, static, bias_dtype)
    return dx, None if dtotal is None else dx, dscale, dbias


_norm.defvjp(_norm_fwd, _norm_bwd)


# The names of the next two functions are the kernel names: jit puts them in jaxpr and lowered text.
@functools.partial(jax.jit, static_argnames=("static",))
def norm_recompute(
    x: Rows, residual: Rows | None, scale: Weight, bias: Weight | None, static: Static
) -> tuple[Rows, Rows | None, Float[Array, "*rows 1"]]:
    """y, total (None without a residual) and the mean square of each centred row."""
    total = x
    if residual is not None:
        # XLA may leave out a rounding that it need not keep, and take the statistics of a sum that is not
        # the total; it does not leave out this one.
        accurate, bits = accurate_dtype(x.dtype), jnp.finfo(x.dtype)
        total = lax.reduce_precision(x.astype(accurate) + residual.astype(accurate), bits.nexp, bits.nmant)
    centred = _centred(total, static)
    mean_square = jnp.mean(lax.square(centred), axis=-1, keepdims=True)
    y = centred * inverse_root(mean_square, static) * _along(scale, total)
    if bias is not None:
        y = y + _along(bias, total)
    return y.astype(x.dtype), None if residual is None else total.astype(x.dtype), mean_square


@functools.partial(jax.jit, static_argnames=("static", "bias_dtype"))
def norm_recompute_backward(
    total: Rows,
    mean_square: Float[Array, "*rows 1"],
    scale: Weight,
    dy: Rows,
    dtotal: Rows | None,
    static: Static,
    bias_dtype: str | None,
) -> tuple[Rows, Weight, Weight | None]:
    """The gradients of x (and of the residual, the same), scale and, if there is one, bias."""
    inverse = inverse_root(mean_square, static)
    normed = _centred(total, static) * inverse
    dy = dy.astype(normed.dtype)
    g = dy * _along(scale, total)
    slope = inverse_root_slope(mean_square, static)
    dx = g - slope * normed * jnp.mean(g * normed, axis=-1, keepdims=True)
    if static.kind == "layer":
        dx = dx - jnp.mean(g, axis=-1, keepdims=True)
    dx = dx * inverse
    if dtotal is not None:
        dx = dx + dtotal.astype(dx.dtype)
    dscale, dbias = weight_gradients(total, mean_square, dy, scale.dtype, static, bias_dtype)
    return dx.astype(total.dtype), dscale, dbias


def weight_gradients(
    total: Rows,
    mean_square: Float[Array, "*rows 1"],
    dy: Rows,
    scale_dtype: Any,
    static: Static,
    bias_dtype: str | None,
) -> tuple[Weight, Weight | None]:
    """The gradients of scale and, if it has a type, bias: sums over all rows."""
    normed = _centred(total, static) * inverse_root(mean_square, static)
    dy = dy.astype(normed.dtype)
    rows = tuple(range(total.ndim - 1))
    dscale = jnp.sum(dy * normed, axis=rows).astype(scale_dtype)
    return dscale, None if bias_dtype is None else jnp.sum(dy, axis=rows).astype(bias_dtype)


def _centred(total, static: Static):
    """What is normalised, in the type of the statistics."""
    total = total.astype(accurate_dtype(total.dtype))
    return total - jnp.mean(total, axis=-1, keepdims=True) if static.kind == "layer" else total


def _along(weight, x):
    """A weight (D,) with x's rank, in the type of the statistics."""
    return weight.astype(accurate_dtype(x.dtype)).reshape((1,) * (x.ndim - 1) + weight.shape)


IMPLEMENTATION = Implementation(
    op="norm",
    name="recompute",
    kernel_name="norm_recompute",
    supports=supports_by_xla,
    call=norm,
)
