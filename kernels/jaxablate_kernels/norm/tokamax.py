"""Tokamax's layer norm: an adapter to our semantics.  An extra: ``pip install tokamax`` (Python >= 3.12).

On a GPU its Triton kernel is asked for by name, and never the XLA version that it would fall back to by
itself; on a CPU or TPU ``xla`` is what is left to ask for.  A residual is added before, in XLA.  Whether
its kernels' sums have a fixed order it does not say.
"""

import functools

import jax
import tokamax  # pyright: ignore[reportMissingImports]

from jaxablate_kernels.devices import target
from jaxablate_kernels.dispatch import Implementation
from jaxablate_kernels.norm.spec import EpsAt, Kind, NormSpec, Rows, Weight, unsupported_dtype

DTYPES = ("float32", "bfloat16", "float16")
KERNELS = {"gpu": "triton", "cpu": "xla", "tpu": "xla"}


def supports(spec: NormSpec, platform: str) -> str | None:
    """None if tokamax computes this, else the reason in one line."""
    if platform not in KERNELS:
        return f"platform is {platform}, supported are {', '.join(KERNELS)}"
    if spec.eps_at != "inside":
        return f"eps_at is {spec.eps_at}, supported is inside"
    return unsupported_dtype(spec, DTYPES)


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
    """(y, total), as the functions of `jaxablate_kernels.norm`, which check the arguments."""
    del eps_at
    return norm_tokamax(x, residual, scale, bias, kind=kind, eps=eps, kernel=KERNELS[target()[0]])


# The name of this function is the kernel name, on both halves of the gradient.
@functools.partial(jax.jit, static_argnames=("kind", "eps", "kernel"))
def norm_tokamax(
    x: Rows, residual: Rows | None, scale: Weight, bias: Weight | None, *, kind: Kind, eps: float, kernel: str
) -> tuple[Rows, Rows | None]:
    """(y, total)."""
    total = x if residual is None else x + residual
    # It checks and promotes by rules of its own.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        y = tokamax.layer_norm(
            total, scale, bias, epsilon=eps, subtract_mean=kind == "layer", implementation=kernel
        )
    return y, None if residual is None else total


IMPLEMENTATION = Implementation(
    op="norm",
    name="tokamax",
    kernel_name="norm_tokamax",
    supports=supports,
    call=norm,
)
