"""GPUs by their data sheets: the one table that kernels, compilers, benchmarks and plans read.

Imports nothing, so that a plan knows the GPUs without jax. A device that is here is found by its kind:

    gpu = find("NVIDIA H200")            # None: not in the table
    capability("NVIDIA H20")             # (9, 0): also of kin of which no more is known
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    Attributes:
        name: what a user types; in capitals a part of every kind of it.
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
        threads_per_core: the most that are resident on a core.
        bf16_flops, tf32_flops: dense FLOP/s of its matrix units, in bfloat16 and of float32 rounded to TF32.
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
    threads_per_core: int
    bf16_flops: float
    tf32_flops: float


# Cores, lanes, clock, bandwidth, FLOP/s: NVIDIA's data sheets and architecture white papers of the L4, A100, H100,
# H200 (all SXM) and B200. Shared memory and threads: CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability". Memory and L2 as `cudaGetDeviceProperties` reports them, which is what a program can have.
GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="l4",
            kind="NVIDIA L4",
            capability=(8, 9),
            cores=58,
            lanes=128,
            clock_ghz=2.04,
            memory_bytes=22_518 * MIB,
            memory_bandwidth=0.3e12,
            l2_bytes=48 * MIB,
            shared_bytes_per_core=100 * 1024,
            shared_bytes=99 * 1024,
            threads_per_core=1536,
            bf16_flops=121e12,
            tf32_flops=60e12,
        ),
        Gpu(
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
            threads_per_core=2048,
            bf16_flops=312e12,
            tf32_flops=156e12,
        ),
        Gpu(
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
            threads_per_core=2048,
            bf16_flops=989e12,
            tf32_flops=494e12,
        ),
        Gpu(
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
            threads_per_core=2048,
            bf16_flops=989e12,
            tf32_flops=494e12,
        ),
        Gpu(
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
            threads_per_core=2048,
            bf16_flops=2250e12,
            tf32_flops=1125e12,
        ),
    )
}

# Of GPUs that are not in the table.
_KIN = {"h20": (9, 0), "h800": (9, 0), "b100": (10, 0), "b300": (10, 3)}


def find(kind: str) -> Gpu | None:
    """The GPU of a `jax.Device.device_kind`; None if the table has none like it: an L40S is no L4."""
    return next((gpu for name, gpu in GPUS.items() if re.search(rf"{name.upper()}(?!\d)", kind)), None)


def capability(kind: str) -> tuple[int, int] | None:
    """The compute capability of a `jax.Device.device_kind`; None if its name tells nothing."""
    if (gpu := find(kind)) is not None:
        return gpu.capability
    return next((known for name, known in _KIN.items() if name.upper() in kind), None)


def is_hopper_or_later(kind: str) -> bool:
    """Whether a `jax.Device.device_kind` is known to have compute capability 9.0 or more."""
    return (capability(kind) or (0, 0)) >= (9, 0)


def peak_flops(kind: str, compute_dtype: str) -> float | None:
    """Peak FLOP/s of one device in a dtype; None where none is known, as on a CPU.

    Of float32 it is that of TF32, to which XLA rounds the factors of a matrix product on these GPUs by default.
    """
    gpu = find(kind)
    known = {"bfloat16": "bf16_flops", "float32": "tf32_flops"}
    return getattr(gpu, known[compute_dtype]) if gpu is not None and compute_dtype in known else None
