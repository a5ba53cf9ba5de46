"""The gated product of a feed-forward layer: one function, several implementations, one set of cases.

The specification lives in the docstring of `gated`; `reference` is the oracle of the others, `cases` the
shapes that tests and benchmarks share.
"""

from jaxablate_kernels import dispatch
from jaxablate_kernels.gated.spec import GatedSpec, Halves, Kind, Product

__all__ = ["GatedSpec", "gated"]


def gated(h: Halves, *, kind: Kind = "swiglu", impl: str) -> Product:
    """The product of one half of a projection with an activation of the other (Shazeer 2020, arXiv:2002.05202).

        swiglu:  silu(h0) * h1          geglu:  h0 * gelu(h1),  the exact GELU

    with h0 = h[..., 0, :] and h1 = h[..., 1, :]; which half is the gate follows the code that the studies
    reproduce.  ``reference`` computes in h's type and leaves to autodiff what is kept for the backward pass
    (in general h, the activation and its derivative); the others compute in float32, round once and keep h
    alone.  Deterministic; reverse-mode differentiable, including under vmap, jit, remat and shard_map;
    implementations other than ``reference`` have no forward mode and no second derivative.

    Args:
        h: (..., 2, W), float32, bfloat16 or float16; any number of leading axes.
        kind: see above.
        impl: an implementation (``reference``, ``recompute``, ``pallas``) or the algorithm ``fused``
            (``pallas`` on a GPU, ``recompute`` elsewhere), resolved for `devices.target()`.

    Returns:
        (..., W) in h's type.

    Raises:
        ValueError: an h or a kind that makes no sense, or an unknown `impl`.
        KernelUnsupported: the named implementation cannot run this problem.
    """
    spec = GatedSpec.of(h, kind=kind)
    return dispatch.choose("gated", impl, spec).call(h, kind=kind)
