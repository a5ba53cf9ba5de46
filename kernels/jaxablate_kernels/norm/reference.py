"""Normalisation as it is written on paper, gradients by autodiff: the oracle of the other implementations.

In low precision XLA may take the statistics of a sum with a residual before it is rounded; the others do not.

In bytes per element of x, with e the size of its type, XLA on a GPU moves the ideal 2e for the forward
pass, 1.25 times the ideal 4e with a residual, and 1.7 to 2.5 times the ideal in the backward pass, where
the sum over rows is a pass of its own.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxablate_kernels.dispatch import Implementation
from jaxablate_kernels.dtypes import accurate_dtype
from jaxablate_kernels.norm.spec import EpsAt, Kind, Rows, Static, Weight, supports_by_xla


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
    return norm_reference(x, residual, scale, bias, Static(kind, eps, eps_at))


# The name of this function is the kernel name: jit puts it in the jaxpr and the lowered text, and
# autodiff keeps it on both halves of the gradient.
@functools.partial(jax.jit, static_argnames=("static",))
def norm_reference(
    x: Rows, residual: Rows | None, scale: Weight, bias: Weight | None, static: Static
) -> tuple[Rows, Rows | None]:
    """(y, total)."""
    accurate = accurate_dtype(x.dtype)
    total = x if residual is None else x + residual
    y = total.astype(accurate)
    if static.kind == "layer":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    mean_square = jnp.mean(lax.square(y), axis=-1, keepdims=True)
    if static.eps_at == "inside":
        y = y * lax.rsqrt(mean_square + static.eps)
    else:
        y = y / (jnp.sqrt(jnp.maximum(mean_square, 1e-30)) + static.eps)
    along = (1,) * (x.ndim - 1) + scale.shape
    y = y * scale.astype(accurate).reshape(along)
    if bias is not None:
        y = y + bias.astype(accurate).reshape(along)
    return y.astype(x.dtype), None if residual is None else total


IMPLEMENTATION = Implementation(
    op="norm",
    name="reference",
    kernel_name="norm_reference",
    supports=supports_by_xla,
    call=norm,
)
