"""Logical names on the axes of activations.

A block says what an axis means; whoever compiles the program says on which mesh. Outside of such a program
the names do nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxablate.sharding import RULES, activation_sharding, devices_along

Names = tuple[str | None, ...]

_mesh: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


@contextlib.contextmanager
def laid_out_on(mesh: Mesh) -> Iterator[None]:
    """Places what is traced inside on `mesh`, by the rules of `jaxablate.sharding`."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, kept where the axes of these names belong; an axis without a name goes where the compiler likes."""
    mesh = _mesh.get()
    return x if mesh is None else lax.with_sharding_constraint(x, activation_sharding(mesh, names, x.shape))


def traced_once(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` of arrays, traced once for their shapes however often a program, or several of them, call it.

    What calls it is optimised as if it were not there. On another mesh it is traced again, since names of axes act
    while tracing.
    """
    traced = jax.jit(lambda mesh, *arrays: f(*arrays), static_argnums=0)
    return lambda *arrays: traced(_mesh.get(), *arrays)


def on_each_device(
    f: Callable[..., Any], arrays: Mapping[str, jax.Array], axes: Mapping[str, Names], out: Any
) -> Any:
    """`f(**arrays)`, called on each device of the mesh with its own part of the arrays.

    The compiler cannot split a kernel: left to itself it would gather the arrays on every device. A name is
    used only where it divides in all arrays, so that heads of queries and of keys never part.

    Args:
      f: takes and returns arrays; along named axes its parts must not depend on each other.
      axes: logical names of each array's axes; what has no name is whole on every device.
      out: names of the result's axes, or a tuple of names for several results.
    """
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return f(**arrays)

    def divides(name: str) -> bool:
        devices = devices_along(mesh, RULES[name])
        sizes = (s for key, x in arrays.items() for s, n in zip(x.shape, axes[key], strict=True) if n == name)
        return all(size % devices == 0 for size in sizes)

    def spec(names: Names) -> PartitionSpec:
        return PartitionSpec(*(RULES[n] if n is not None and divides(n) else None for n in names))

    several = isinstance(out[0], tuple)
    # Under vmap jax (0.10 to 0.12) loses track of what varies over the mesh inside a scan, hence no check.
    split = jax.shard_map(
        lambda arrays: f(**arrays),
        mesh=mesh,
        in_specs=({key: spec(axes[key]) for key in arrays},),
        out_specs=tuple(spec(names) for names in out) if several else spec(out),
        check_vma=False,
    )
    return split(dict(arrays))
