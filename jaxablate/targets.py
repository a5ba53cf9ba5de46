"""GPUs that a program can be compiled for on a machine that has none.

XLA's CUDA compiler needs no GPU, only its description: `target_mesh` gives a mesh of such devices. A
program whose arguments are `jax.ShapeDtypeStruct`s with shardings on that mesh is lowered and compiled as
on the real thing, Pallas kernels included, so that the memory it takes, and a kernel that wants more of the
chip than there is, are known before a GPU is rented:

    mesh = target_mesh("h200")
    x = jax.ShapeDtypeStruct((8, 512), "bfloat16", sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):                      # by which a kernel learns what it is compiled for
        compiled = jax.jit(f).lower(x).compile()
    compiled.memory_analysis()

What it needs is jax's CUDA plugin (the extra `cuda`), and `JAX_PLATFORMS=cpu` where there is no GPU. The
time that a program takes is not known this way: XLA tunes nothing without a device. Nor are its FLOPs:
`cost_analysis()` of a program for such a device is None (jax 0.12.0).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxablate.errors import UserError, suggestion
from jaxablate_gpus import GPUS, Gpu

if TYPE_CHECKING:  # `plan` knows the names without jax
    import jax

TARGETS = GPUS
CPU = "cpu"  # the target that is no GPU: this machine's


def find(name: str) -> Gpu:
    """The target of a name.

    Raises:
        UserError: there is none; the message says which is near.
    """
    if name not in TARGETS:
        raise UserError(f"target {name!r} is unknown: {suggestion(name, TARGETS)}")
    return TARGETS[name]


def description(target: Gpu) -> str:
    """The target in the words of XLA: a `stream_executor.GpuTargetConfigProto` as text."""
    major, minor = target.capability
    # Code for 9.0 and 10.0 with their own matrix units (sm_90a, sm_100a), as XLA compiles on the device.
    features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  core_count: {target.cores}
  fpus_per_core: {target.lanes}
  clock_rate_ghz: {target.clock_ghz}
  device_memory_size: {target.memory_bytes}
  memory_bandwidth: {target.memory_bandwidth:.0f}
  l2_cache_size: {target.l2_bytes}
  shared_memory_per_core: {target.shared_bytes_per_core}
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_block_optin: {target.shared_bytes}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_core_limit: {target.threads_per_core}
  threads_per_block_limit: 1024
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{target.kind}"
"""


def target_devices(name: str, count: int = 1) -> list[Any]:
    """Devices to compile for, not to run on, one on each node.

    Raises:
        UserError: no such target, or jax's CUDA plugin is not installed.
    """
    target = find(name)
    if not has_cuda_compiler():
        raise UserError(
            f"target {name!r} needs jax's CUDA compiler, which runs without a GPU: pip install 'jaxablate[cuda]'"
        )
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=description(target), topology=f"1x1x{count}"
    )
    return list(topology.devices)


def target_mesh(name: str, axes: Mapping[str, int] | None = None) -> jax.sharding.Mesh:
    """A mesh of such devices.

    Args:
        name: a key of `TARGETS`.
        axes: the mesh's axes and their sizes; a single device without.

    Raises:
        UserError: no such target, or jax's CUDA plugin is not installed.
    """
    import jax
    import numpy as np

    axes = {"device": 1} if axes is None else axes
    devices = np.array(target_devices(name, math.prod(axes.values()))).reshape(tuple(axes.values()))
    return jax.sharding.Mesh(devices, tuple(axes))


def has_cuda_compiler() -> bool:
    """Whether jax's CUDA plugin is installed."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
