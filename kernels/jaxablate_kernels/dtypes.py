"""What all operations say about the types of their arrays."""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp


@runtime_checkable
class Shaped(Protocol):
    """Anything with a shape and a dtype: an array, a tracer, a `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        ...

    @property
    def dtype(self) -> Any:
        """Type of the entries."""
        ...


def accurate_dtype(dtype: Any) -> Any:
    """The type of logits, softmax and sums: float32, except that float64 stays what it is."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


# XLA computes these; float64 (under jax_enable_x64) is there to check the others against.
XLA_DTYPES = ("float32", "bfloat16", "float16", "float64")
