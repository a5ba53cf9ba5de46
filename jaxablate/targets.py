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

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxablate.errors import UserError, suggestion

if TYPE_CHECKING:  # `plan` knows the names without jax
    import jax

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU by its data sheet.

    Attributes:
        name: what a user types.
        kind: `jax.Device.device_kind`.
        capability: compute capability, major and minor.
        cores: streaming multiprocessors.
        lanes: float32 units of one core.
        clock_ghz: boost clock of the cores.
        memory_bytes: what CUDA reports as the device's memory; the box says a few per cent more.
        memory_bandwidth: bytes per second.
        l2_bytes: second-level cache.
        shared_bytes_per_core: shared memory of a core.
        shared_bytes: the most that one block may have of it, by opt-in.
    """

    name: str
    kind: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    clock_ghz: float
    memory_bytes: int
    memory_bandwidth: float
    l2_bytes: int
    shared_bytes_per_core: int
    shared_bytes: int


# Cores, lanes, clock, bandwidth: NVIDIA's data sheets and architecture white papers of the A100, H100, H200
# (all SXM) and B200. Shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability". Memory and L2 as `cudaGetDeviceProperties` reports them, which is what a program can have.
TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="a100",
            kind="NVIDIA A100-SXM4-80GB",
            capability=(8, 0),
            cores=108,
            lanes=64,
            clock_ghz=1.41,
            memory_bytes=81_158 * MIB,
            memory_bandwidth=2.039e12,
            l2_bytes=40 * MIB,
            shared_bytes_per_core=164 * 1024,
            shared_bytes=163 * 1024,
        ),
        Target(
            name="h100",
            kind="NVIDIA H100 80GB HBM3",
            capability=(9, 0),
            cores=132,
            lanes=128,
            clock_ghz=1.98,
            memory_bytes=81_008 * MIB,
            memory_bandwidth=3.352e12,
            l2_bytes=50 * MIB,
            shared_bytes_per_core=228 * 1024,
            shared_bytes=227 * 1024,
        ),
        Target(
            name="h200",
            kind="NVIDIA H200",
            capability=(9, 0),
            cores=132,
            lanes=128,
            clock_ghz=1.98,
            memory_bytes=143_156 * MIB,
            memory_bandwidth=4.8e12,
            l2_bytes=60 * MIB,
            shared_bytes_per_core=228 * 1024,
            shared_bytes=227 * 1024,
        ),
        Target(
            name="b200",
            kind="NVIDIA B200",
            capability=(10, 0),
            cores=148,
            lanes=128,
            clock_ghz=1.965,
            memory_bytes=182_642 * MIB,
            memory_bandwidth=7.672e12,
            l2_bytes=126 * MIB,
            shared_bytes_per_core=228 * 1024,
            shared_bytes=227 * 1024,
        ),
    )
}


def find(name: str) -> Target:
    """The target of a name.

    Raises:
        UserError: there is none; the message says which is near.
    """
    if name not in TARGETS:
        raise UserError(f"target {name!r} is unknown: {suggestion(name, TARGETS)}")
    return TARGETS[name]


def description(target: Target) -> str:
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
  threads_per_core_limit: 2048
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


def target_mesh(name: str, axes: Mapping[str, int] | None = None) -> jax.sharding.Mesh:
    """A mesh of devices to compile for, not to run on.

    Args:
        name: a key of `TARGETS`.
        axes: the mesh's axes and their sizes, one device on each node; a single device without.

    Raises:
        UserError: no such target, or jax's CUDA plugin is not installed.
    """
    target = find(name)
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise UserError(
            f"target {name!r} needs jax's CUDA compiler, which runs without a GPU: pip install 'jaxablate[cuda]'"
        )
    from jax.experimental import topologies

    axes = {"device": 1} if axes is None else axes
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=description(target), topology=f"1x1x{math.prod(axes.values())}"
    )
    return topologies.make_mesh(topology, tuple(axes.values()), tuple(axes))
