"""The gated product as it is written on paper, gradients by autodiff: the oracle of the other implementations.

XLA fuses each pass into the ideal number of bytes for what autodiff keeps; that is up to three arrays of
the width where h alone would do.
"""

import functools

import jax

from jaxablate_kernels.dispatch import Implementation
from jaxablate_kernels.gated.spec import Halves, Kind, Product, supports_by_xla


def gated(h: Halves, *, kind: Kind) -> Product:
    """As `jaxablate_kernels.gated`, which checks the arguments."""
    return gated_reference(h, kind=kind)


# The name of this function is the kernel name: jit puts it in the jaxpr and the lowered text, and
# autodiff keeps it on both halves of the gradient.
@functools.partial(jax.jit, static_argnames=("kind",))
def gated_reference(h: Halves, *, kind: Kind) -> Product:
    """The product, in h's type."""
    first, second = h[..., 0, :], h[..., 1, :]
    if kind == "geglu":
        return first * jax.nn.gelu(second, approximate=False)
    return jax.nn.silu(first) * second


IMPLEMENTATION = Implementation(
    op="gated",
    name="reference",
    kernel_name="gated_reference",
    supports=supports_by_xla,
    call=gated,
)
