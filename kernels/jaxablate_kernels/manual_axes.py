"""Types of arrays inside `jax.shard_map`."""

from typing import Any, TypeVarTuple

import jax

Arrays = TypeVarTuple("Arrays")


def match_varying(*arrays: *Arrays) -> tuple[*Arrays]:
    """Give arrays inside a `jax.shard_map` one type: all vary over each mesh axis that any varies over.

    JAX does this by itself for ordinary operations, but not for the two things our kernels consist
    of: the gradient rule of a `jax.custom_vjp` must return types equal to its arguments' (a bias that
    all devices share would get a gradient that differs by device), and a `lax.scan` must return the
    types of its initial carry.  Called *outside* the custom_vjp, the cast's own transpose then sums the
    shared argument's gradient over the devices.  Outside of a shard_map nothing happens.

    Args:
        arrays: arrays, or None for an argument that is absent.

    Returns:
        The same, in the same order.
    """
    types = [None if x is None else jax.typeof(x) for x in arrays]
    axes = frozenset().union(*(t.mat.varying for t in types if t is not None))

    def cast(x, t):
        missing = () if t is None else tuple(sorted(axes - t.mat.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return tuple(cast(x, t) for x, t in zip(arrays, types, strict=True))  # pyright: ignore[reportReturnType]


def shaped(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """What a `pallas_call` returns, varying over the same axes of a `jax.shard_map` as `like`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).mat)
