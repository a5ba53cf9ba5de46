"""Linear cross-entropy as it is written on paper: all N x V logits in memory, gradients by autodiff."""

import functools

import jax
import jax.numpy as jnp

from jaxablate_kernels.cross_entropy.spec import (
    Bias,
    Features,
    Static,
    Targets,
    TokenLosses,
    Weights,
    is_target,
    logits_of,
    losses_of,
    supports_by_xla,
)
from jaxablate_kernels.dispatch import Implementation


def linear_cross_entropy(
    x: Features, w: Weights, targets: Targets, *, bias: Bias | None, static: Static
) -> TokenLosses:
    """The losses with all logits in memory; arguments and result as in `jaxablate_kernels.cross_entropy`."""
    return cross_entropy_reference(x, w, targets, bias, static=static)


# The name of this function is the kernel name, on both halves of the gradient.
@functools.partial(jax.jit, static_argnames=("static",))
def cross_entropy_reference(
    x: Features, w: Weights, targets: Targets, bias: Bias | None, *, static: Static
) -> TokenLosses:
    """The losses, in one go."""
    logits_NxV = logits_of(x, w, bias, static.softcap)
    lse = jax.nn.logsumexp(logits_NxV, axis=1)
    picked = jnp.sum(logits_NxV, axis=1, where=is_target(targets, 0, w.shape[1]))
    return losses_of(lse, picked, targets, w.shape[1], static)


IMPLEMENTATION = Implementation(
    op="cross_entropy",
    name="reference",
    kernel_name="cross_entropy_reference",
    supports=supports_by_xla,
    call=linear_cross_entropy,
)
