"""The device mesh `member x data x fsdp x tensor`, and where each logical axis lies on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxablate.config import MeshConfig
from jaxablate.errors import UserError

AXES = ("member", "data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # examples are split over both: fsdp shards parameters between data-parallel devices

# Logical axis of a parameter or an activation -> mesh axes. A parameter's axis that is absent is replicated.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": BATCH,
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
}


def make_mesh(config: MeshConfig, members: int, rows: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the devices; axes given as 0 are chosen: members first, then data.

    Args:
      members: runs in the cohort; the member axis must divide it.
      rows: examples of a micro-batch; data x fsdp must divide it.

    Raises:
      UserError: the axes need more devices than there are, or do not divide.
    """
    available = list(jax.devices() if devices is None else devices)
    shape = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(n for n in shape.values() if n)
    free = max(len(available) // fixed, 1)
    shape["member"] = shape["member"] or math.gcd(members, free)
    if not shape["data"]:
        free = max(len(available) // math.prod(n for n in shape.values() if n), 1)
        shape["data"] = math.gcd(rows // math.gcd(rows, shape["fsdp"]), free)
    total = math.prod(shape.values())
    spelled = " x ".join(f"{axis}={n}" for axis, n in shape.items())
    if total > len(available):
        raise UserError(f"config.host.mesh: {spelled} needs {total} devices, there are {len(available)}")
    if members % shape["member"]:
        raise UserError(
            f"config.host.mesh.member={shape['member']}: must divide the {members} members of the cohort"
        )
    if rows % (shape["data"] * shape["fsdp"]):
        raise UserError(
            f"config.host.mesh: data x fsdp = {shape['data'] * shape['fsdp']} must divide {rows} examples"
        )
    return Mesh(np.array(available[:total]).reshape(tuple(shape.values())), AXES)


def state_sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """Sharding of one leaf of the cohort's state, whose first axis is the member.

    A dimension that its mesh axis does not divide is replicated.

    Args:
      axes: logical names of the axes after the first.
      shape: of the leaf, member axis included.
    """
    return NamedSharding(mesh, PartitionSpec("member", *_split(mesh, axes, shape[1:])))


def shared_sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """Sharding of an array that all members share: split as a member's own would be."""
    return NamedSharding(mesh, PartitionSpec(*_split(mesh, axes, shape)))


def _split(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> list[Any]:
    spec: list[Any] = []
    for name, size in zip(axes, shape, strict=False):
        mesh_axis = RULES.get(name or "")
        taken = mesh_axis in spec
        spec.append(
            mesh_axis if mesh_axis and not taken and size % devices_along(mesh, mesh_axis) == 0 else None
        )
    return spec


def activation_sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """Sharding of one member's activation; axes without a name, or that do not divide, are the compiler's."""
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * len(shape)
    for i, (name, size) in enumerate(zip(axes, shape, strict=True)):
        if name is not None and size % devices_along(mesh, RULES[name]) == 0:
            spec[i] = RULES[name]
    return NamedSharding(mesh, PartitionSpec(*spec))


def devices_along(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    """Number of devices along one or several mesh axes."""
    return math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes))


def batch_sharding(mesh: Mesh, rows: int, *, per_member: bool) -> NamedSharding:
    """Examples over data and fsdp; replicated where they do not divide (an odd last evaluation batch)."""
    split = BATCH if rows % devices_along(mesh, BATCH) == 0 else None
    return NamedSharding(mesh, PartitionSpec("member", split) if per_member else PartitionSpec(split))
