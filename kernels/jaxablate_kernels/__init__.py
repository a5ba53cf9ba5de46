"""Fused and reference kernels of jaxablate: one folder per operation, one file per implementation.

    from jaxablate_kernels import attention, kernels_in, resolve

`attention` here is the *function*.  Its folder has the same name, so reach the modules in it with
``from jaxablate_kernels.attention import cases`` (``import jaxablate_kernels.attention.cases as c``
would look the attribute up on the function and fail).

The package depends on jax, and on jaxtyping for its annotations; nothing else of jaxablate.
"""

from jaxablate_kernels.attention import attention
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

__all__ = [
    "Implementation",
    "KernelUnsupported",
    "Resolved",
    "algorithms",
    "attention",
    "implementations",
    "kernel_names",
    "kernels_in",
    "load",
    "operations",
    "require",
    "resolve",
]
