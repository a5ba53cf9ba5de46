"""RMSNorm through jax-triton, an extra: ``pip install jax-triton==0.3.1`` and JAX 0.10 or 0.11 with CUDA.

The same passes as `pallas_gpu`, by the Triton that is installed instead of the one inside XLA, so that one
can be checked against the other.  What it cannot: a residual, LayerNorm, eps outside of the root (`supports`
says so).  jax-triton has no batching rule, so under ``jax.vmap`` the kernels run once per member of the cohort,
one after the other: each has its own scale, and its own sum of gradients.

Bytes per element of x of size e: 2 e forward and 3 e backward, the ideal, and a few percent for the sums.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax_triton  # pyright: ignore[reportMissingImports]
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float

from jaxablate_kernels.devices import target
from jaxablate_kernels.dispatch import Implementation
from jaxablate_kernels.norm.pallas_config import WIDEST_WITH_SUMS, Config, block_width, heuristic
from jaxablate_kernels.norm.spec import EpsAt, Kind, NormSpec, Rows, Weight, unsupported_dtype
from jaxablate_kernels.norm.triton_kernels import rms_backward, rms_forward

DTYPES = ("float32", "bfloat16", "float16")


def supports(spec: NormSpec, platform: str) -> str | None:
    """`Implementation.supports`: RMSNorm alone, on GPUs."""
    if platform != "gpu":
        return f"platform is {platform}, supported is gpu"
    if spec.kind != "rms":
        return f"kind is {spec.kind}, supported is rms"
    if spec.residual:
        return "residual is given, supported is none"
    if spec.eps_at != "inside":
        return f"eps_at is {spec.eps_at}, supported is inside"
    if spec.dim > WIDEST_WITH_SUMS:
        return f"x has {spec.dim} features, supported are at most {WIDEST_WITH_SUMS}"
    return unsupported_dtype(spec, DTYPES)


class _Static(NamedTuple):
    """What is fixed when the program is compiled."""

    eps: float
    config: Config


def norm(
    x: Rows,
    residual: None,
    scale: Weight,
    bias: None,
    *,
    kind: Kind,
    eps: float,
    eps_at: EpsAt,
) -> tuple[Rows, None]:
    """(y, None), as `jaxablate_kernels.rms_norm`, which checks the arguments against `supports`."""
    spec = NormSpec.of(x, residual, scale, bias, kind=kind, eps=eps, eps_at=eps_at)
    return _rms_norm(x, scale, _Static(eps, heuristic(spec, target()[1]))), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x, scale, static: _Static):
    return norm_triton(x, scale, static)[0]


def _rms_norm_fwd(x, scale, static: _Static):
    y, mean_square = norm_triton(x, scale, static)
    return y, (x, mean_square, scale)


def _rms_norm_bwd(static: _Static, kept, dy):
    return norm_triton_backward(*kept, dy, static)


_rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


# The names of the next two functions are the kernel names: jit puts them in jaxpr and lowered text.
@functools.partial(jax.jit, static_argnames=("static",))
def norm_triton(x: Rows, scale: Weight, static: _Static) -> tuple[Rows, Float[Array, " N"]]:
    """y and the mean square of each row."""
    count, dim = math.prod(x.shape[:-1]), x.shape[-1]
    call = functools.partial(
        jax_triton.triton_call,
        kernel=rms_forward,
        name="norm_triton",
        out_shape=(jax.ShapeDtypeStruct((count, dim), x.dtype), jax.ShapeDtypeStruct((count,), jnp.float32)),
        grid=-(-count // static.config.rows),
        num_warps=static.config.warps,
        num_stages=1,
        COUNT=count,
        DIM=dim,
        EPS=static.eps,
        ROWS=static.config.rows,
        WIDTH=block_width(dim),
    )
    y, mean_square = sequential_vmap(call)(x.reshape(count, dim), scale)
    return y.reshape(x.shape), mean_square


@functools.partial(jax.jit, static_argnames=("static",))
def norm_triton_backward(
    x: Rows, mean_square: Float[Array, " N"], scale: Weight, dy: Rows, static: _Static
) -> tuple[Rows, Weight]:
    """The gradients of x and scale."""
    count, dim = math.prod(x.shape[:-1]), x.shape[-1]
    rows = static.config.backward_rows
    steps = -(-count // (static.config.groups * rows))
    groups = -(-count // (steps * rows))
    call = functools.partial(
        jax_triton.triton_call,
        kernel=rms_backward,
        name="norm_triton_backward",
        out_shape=(
            jax.ShapeDtypeStruct((count, dim), x.dtype),
            jax.ShapeDtypeStruct((groups, dim), jnp.float32),
        ),
        grid=groups,
        num_warps=static.config.backward_warps,
        num_stages=1,
        COUNT=count,
        DIM=dim,
        EPS=static.eps,
        ROWS=rows,
        WIDTH=block_width(dim),
        STEPS=steps,
    )
    dx, dscale = sequential_vmap(call)(x.reshape(count, dim), mean_square, scale, dy.reshape(count, dim))
    return dx.reshape(x.shape), jnp.sum(dscale, axis=0).astype(scale.dtype)


IMPLEMENTATION = Implementation(
    op="norm",
    name="triton",
    kernel_name="norm_triton",
    supports=supports,
    call=norm,
)
