"""Logical names on the axes of activations.

A block says what an axis means; whoever compiles the program says where that lies on its mesh. Outside of
such a program the names do nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax
from jax import lax

Names = tuple[str | None, ...]
Layout = Callable[[Names, tuple[int, ...]], jax.sharding.Sharding]

_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def laid_out_by(layout: Layout) -> Iterator[None]:
    """Places what is traced inside: `layout` maps axis names and a shape to a sharding."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, kept where the axes of these names belong; an axis without a name goes where the compiler likes."""
    layout = _layout.get()
    return x if layout is None else lax.with_sharding_constraint(x, layout(names, x.shape))
