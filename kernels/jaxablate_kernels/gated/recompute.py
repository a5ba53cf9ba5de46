"""The gated product in plain XLA, keeping h alone for the backward pass, which computes the rest again.

With s the logistic function, Phi and phi the normal distribution and its density,

    swiglu:  dh0 = dy h1 s(h0) (1 + h0 (1 - s(h0))),   dh1 = dy h0 s(h0)
    geglu:   dh0 = dy h1 Phi(h1),                      dh1 = dy h0 (Phi(h1) + h1 phi(h1))

Bytes per row of a width W, with e the size of an element: 3 W e forward, 5 W e backward, both the ideal.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxablate_kernels.dispatch import Implementation
from jaxablate_kernels.dtypes import accurate_dtype
from jaxablate_kernels.gated.spec import Halves, Kind, Product, supports_by_xla


def gated(h: Halves, *, kind: Kind) -> Product:
    """As `jaxablate_kernels.gated`, which checks the arguments."""
    return _gated(h, kind)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gated(h, kind: Kind):
    return gated_recompute(h, kind)


def _gated_fwd(h, kind: Kind):
    return gated_recompute(h, kind), h


def _gated_bwd(kind: Kind, h, dy):
    return (gated_recompute_backward(h, dy, kind),)


_gated.defvjp(_gated_fwd, _gated_bwd)


# The names of the next two functions are the kernel names: jit puts them in jaxpr and lowered text.
@functools.partial(jax.jit, static_argnames=("kind",))
def gated_recompute(h: Halves, kind: Kind) -> Product:
    """The product, in h's type."""
    first, second = _halves(h)
    product = (
        first * jax.nn.gelu(second, approximate=False) if kind == "geglu" else jax.nn.silu(first) * second
    )
    return product.astype(h.dtype)


@functools.partial(jax.jit, static_argnames=("kind",))
def gated_recompute_backward(h: Halves, dy: Product, kind: Kind) -> Halves:
    """The gradient of h."""
    first, second = _halves(h)
    dy = dy.astype(first.dtype)
    if kind == "geglu":
        below = 0.5 * jax.lax.erfc(second * -math.sqrt(0.5))
        density = jnp.exp(-0.5 * jax.lax.square(second)) * (1 / math.sqrt(2 * math.pi))
        dfirst, dsecond = second * below, first * (below + second * density)
    else:
        gate = jax.nn.sigmoid(first)
        dfirst, dsecond = second * gate * (1.0 + first * (1.0 - gate)), first * gate
    return jnp.stack([dy * dfirst, dy * dsecond], axis=-2).astype(h.dtype)


def _halves(h):
    h = h.astype(accurate_dtype(h.dtype))
    return h[..., 0, :], h[..., 1, :]


IMPLEMENTATION = Implementation(
    op="gated",
    name="recompute",
    kernel_name="gated_recompute",
    supports=supports_by_xla,
    call=gated,
)
