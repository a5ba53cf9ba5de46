"""What a run is given besides its config: the opened data, and the base that its members share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from jaxablate import distributed, sharding
from jaxablate.errors import UserError
from jaxablate.task import Source, Task, Variables
from jaxablate.trees import Axes, digest, flat, is_boxed


@dataclass(frozen=True)
class Inputs:
    """The data of a task and the arrays of its base, which are empty for most."""

    source: Source
    base: Variables

    @classmethod
    def open(cls, task: Task[Any, Any], cache: Path) -> Inputs:
        """Opens the data, and loads the base.

        Raises:
          UserError: anything that is wrong with one of them.
        """
        return cls(task.open(cache), load_base(task, cache))

    @classmethod
    def open_everywhere(cls, task: Task[Any, Any], cache: Path) -> Inputs:
        """The same on every process.

        Raises:
          UserError: as `open` on any of them, or their bases differ, as those made in a cache for each machine may.
        """
        given = distributed.everywhere(lambda: cls.open(task, cache))
        if given.base and len(set(distributed.gather(given.fingerprint))) > 1:
            raise UserError(
                "config.host.cache: the processes have other bases in theirs; use one that all share"
            )
        return given

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the content of both: a run is never continued on other data or on another base."""
        if not self.base:
            return self.source.fingerprint
        return f"{self.source.fingerprint} with base {digest(flat(self.base))}"


def load_base(task: Task[Any, Any], cache: Path) -> Variables:
    """The arrays of a task's base.

    Raises:
      UserError: they cannot be had, or are not what `Task.abstract_base` says.
    """
    base = nn.unbox(task.base(cache))
    wanted, found = (
        {name: f"{x.dtype}{list(x.shape)}" for name, x in flat(tree).items()}
        for tree in (nn.unbox(task.abstract_base), base)
    )
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"base: {name} is {found.get(name, 'absent')}, and config.model asks for "
                f"{wanted.get(name, 'no such array')}; give the base of this model"
            )
    return base


def abstract_base(task: Task[Any, Any], mesh: Mesh) -> Variables:
    """Shapes, dtypes and shardings of a task's base on a mesh.

    Every member and every shard of the data has it whole; over fsdp and tensor it is split as parameters are.
    """
    boxed = task.abstract_base
    return jax.tree.map(
        lambda axes, x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding.shared_sharding(mesh, axes.names, x.shape)
        ),
        jax.tree.map(Axes.of, boxed, is_leaf=is_boxed),
        nn.unbox(boxed),
    )


def put_base(base: Variables, abstract: Variables) -> Variables:
    """The arrays of a base on the devices, as `abstract_base` says where."""

    def place(value: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        assert like.sharding is not None
        if isinstance(value, jax.Array) and not distributed.several():
            return jax.device_put(value, like.sharding)  # which makes no copy of what lies there already
        return distributed.put(value, like.sharding)

    return jax.tree.map(place, base, abstract)
