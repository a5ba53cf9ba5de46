"""RMSNorm and LayerNorm, alone or after a residual add: four functions over one set of implementations.

The specification lives in the docstring of `rms_norm`; `reference` is the oracle of the others, `cases`
the shapes that tests and benchmarks share.  An implementation is chosen by name:

* ``reference``: the formula as written, gradients by autodiff; what is kept for the backward pass is up to it.
* ``recompute``: plain XLA, any platform; keeps its input, or the sum, and one float32 per row.
* ``pallas``: one pass forward and one backward on a GPU; keeps the same.
* ``triton``: RMSNorm through jax-triton, an extra.
* ``tokamax``: that library's, when installed.
* ``fused``: the algorithm of ``recompute`` and ``pallas``; the second on a GPU, the first elsewhere.
"""

from jaxablate_kernels import dispatch
from jaxablate_kernels.norm.spec import EpsAt, Kind, NormSpec, Rows, Weight

__all__ = ["NormSpec", "add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]


def rms_norm(x: Rows, scale: Weight, *, eps: float, eps_at: EpsAt = "inside", impl: str) -> Rows:
    """Root-mean-square normalisation of the last axis (Zhang & Sennrich 2019, eq. 4).

        y = scale * x / sqrt(mean(x^2) + eps)              eps_at="inside"
        y = scale * x / (sqrt(max(mean(x^2), 1e-30)) + eps)   eps_at="outside"

    Whatever the type of x, statistics, products and the sums of the gradients are float32 (float64 stays
    float64); y is rounded to x's type once.  The same program gives the same bits on every call: the sum
    over rows in scale's gradient has an order that the shapes fix.

    Reverse-mode differentiable in x and scale, including under vmap, jit, remat and shard_map (``triton``:
    see its module); implementations other than ``reference`` have no forward mode and no second derivative.

    Args:
        x: (..., D), float32, bfloat16 or float16; any number of leading axes.
        scale: (D,), any float type; its gradient has that type.
        eps: a positive Python number; a constant of the program.
        eps_at: whether eps is added under the root or to it.
        impl: an implementation or an algorithm, see the module; an algorithm is resolved for
            `devices.target()`.

    Returns:
        y, of x's shape and type.

    Raises:
        ValueError: shapes or types that do not fit together, or an unknown `impl`.
        KernelUnsupported: the named implementation cannot run this problem.
    """
    return _norm(x, None, scale, None, kind="rms", eps=eps, eps_at=eps_at, impl=impl)[0]


def add_rms_norm(
    x: Rows, residual: Rows, scale: Weight, *, eps: float, eps_at: EpsAt = "inside", impl: str
) -> tuple[Rows, Rows]:
    """`rms_norm` of the sum with a residual, and the sum: one pass over both instead of two.

    Args:
        x, residual: (..., D) of one type.  They are exchangeable.
        scale, eps, eps_at, impl: as for `rms_norm`.

    Returns:
        (y, total): total = x + residual rounded to their type, and y = `rms_norm` of that.

    Raises:
        ValueError, KernelUnsupported: as `rms_norm`.
    """
    return _norm(x, residual, scale, None, kind="rms", eps=eps, eps_at=eps_at, impl=impl)


def layer_norm(
    x: Rows, scale: Weight, bias: Weight | None = None, *, eps: float, eps_at: EpsAt = "inside", impl: str
) -> Rows:
    """Layer normalisation of the last axis (Ba et al. 2016, eq. 4): `rms_norm` of x - mean(x), plus a bias.

    Args:
        x, scale, eps, eps_at, impl: as for `rms_norm`; eps is added to the variance, or to its root.
        bias: (D,), any float type, or None; its gradient has that type.

    Returns:
        y, of x's shape and type.

    Raises:
        ValueError, KernelUnsupported: as `rms_norm`.
    """
    return _norm(x, None, scale, bias, kind="layer", eps=eps, eps_at=eps_at, impl=impl)[0]


def add_layer_norm(
    x: Rows,
    residual: Rows,
    scale: Weight,
    bias: Weight | None = None,
    *,
    eps: float,
    eps_at: EpsAt = "inside",
    impl: str,
) -> tuple[Rows, Rows]:
    """`layer_norm` of the sum with a residual, and the sum; see `add_rms_norm`.

    Returns:
        (y, total).

    Raises:
        ValueError, KernelUnsupported: as `rms_norm`.
    """
    return _norm(x, residual, scale, bias, kind="layer", eps=eps, eps_at=eps_at, impl=impl)


def _norm(x, residual, scale, bias, *, kind: Kind, eps: float, eps_at: EpsAt, impl: str):
    spec = NormSpec.of(x, residual, scale, bias, kind=kind, eps=eps, eps_at=eps_at)
    return dispatch.choose("norm", impl, spec).call(
        x, residual, scale, bias, kind=kind, eps=float(eps), eps_at=eps_at
    )
