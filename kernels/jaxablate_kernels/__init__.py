"""Fused and reference kernels of jaxablate: one folder per operation, one file per implementation.

    from jaxablate_kernels import attention, kernels_in, resolve

`attention` and `gated` here are *functions*.  Their folders have the same names, so reach the modules in
them with ``from jaxablate_kernels.attention import cases`` (``import jaxablate_kernels.attention.cases as
c`` would look the attribute up on the function and fail).

The package depends on jax, and on jaxtyping for its annotations; nothing else of jaxablate.
"""

from jaxablate_kernels.attention import QkNorm, Rotary, SegmentIds, attention
from jaxablate_kernels.cross_entropy import TokenLosses, linear_cross_entropy
from jaxablate_kernels.dispatch import (
    Implementation,
    Resolved,
    algorithms,
    implementations,
    kernel_names,
    kernels_in,
    load,
    operations,
    require,
    resolve,
)
from jaxablate_kernels.errors import KernelUnsupported
from jaxablate_kernels.gated import gated
from jaxablate_kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = [
    "Implementation",
    "KernelUnsupported",
    "QkNorm",
    "Resolved",
    "Rotary",
    "SegmentIds",
    "TokenLosses",
    "add_layer_norm",
    "add_rms_norm",
    "algorithms",
    "attention",
    "gated",
    "implementations",
    "kernel_names",
    "kernels_in",
    "layer_norm",
    "linear_cross_entropy",
    "load",
    "operations",
    "require",
    "resolve",
    "rms_norm",
]
