"""The device that an estimate is about: one that is here, or a GPU that a program can only be compiled for."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax

from jaxablate import targets, xla
from jaxablate.disk import make_private
from jaxablate.errors import UserError, suggestion
from jaxablate.estimate.share import memory_share
from jaxablate.footprint import device_memory

logger = logging.getLogger(__name__)

HERE = "here"
NAMES = (HERE, "cpu", *targets.TARGETS)

# Nothing is tuned without a device, and what a tuned product of matrices would need beside itself is not known.
ABSENT = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
MOST_KEPT = 2**26  # bytes of kernels; a program has some megabytes of them


@dataclass(frozen=True)
class Place:
    """Where a program would run.

    Attributes:
      name: the target as it was asked for.
      kind: `jax.Device.device_kind`.
      platform: `cpu` or `gpu`: which implementations carry an algorithm.
      devices: to make a mesh of; they may not be there.
      capacity: bytes of one device that a program may have.
      reserve: how that comes about, in words.
      source: what its memory figures are, in words.
      presence: whether the devices are there, or can only be compiled for.
      options: `compiler_options` beyond those of the program.
    """

    name: str
    kind: str
    platform: str
    devices: tuple[Any, ...]
    capacity: int
    reserve: str
    source: str
    presence: Literal["present", "absent"]
    options: Mapping[str, Any]

    def around(self, mesh: jax.sharding.Mesh) -> contextlib.AbstractContextManager[Any]:
        """To trace and compile in: kernels learn from the mesh what they are traced for."""
        return contextlib.nullcontext() if self.presence == "present" else jax.set_mesh(mesh)


@contextlib.contextmanager
def place(name: str, count: int, cache: Path) -> Iterator[Place]:
    """The place of a target.

    Args:
      name: `here`, `cpu`, or a GPU of `targets`.
      count: devices that the run needs.
      cache: where the kernels of programs for absent GPUs are kept: arms have most of theirs in common.

    Raises:
      UserError: there is no such target, or a device that is here does not say how much memory it has.
    """
    if name not in NAMES:
        raise UserError(f"--target={name}: unknown target; {suggestion(name, NAMES)}")
    if name not in targets.TARGETS:
        yield present(name)
    elif targets.has_cuda_compiler():
        gpu, (capacity, reserve) = targets.find(name), _share_of(name)
        with _kept_kernels(cache / "estimates" / f"{name}-{jax.__version__}.kernels") as kernels:
            yield Place(
                name,
                gpu.kind,
                "gpu",
                tuple(targets.target_devices(name, count)),
                capacity,
                reserve,
                f"compiled for {gpu.kind}",
                "absent",
                {**ABSENT, "xla_gpu_kernel_cache_file": str(kernels)},
            )
    else:
        logger.warning("jax's CUDA compiler is not installed: memory is estimated from the program for a CPU")
        if count > 1:  # as many as the run needs, which jax must know before it looks for any
            jax.config.update("jax_num_cpu_devices", count)
        capacity, reserve = _share_of(name)
        yield replace(
            present("cpu"),
            name=name,
            kind=targets.find(name).kind,
            capacity=capacity,
            reserve=reserve,
            source="estimate from the CPU program",
        )


def present(name: str) -> Place:
    """The devices that are here; `here` are those that jax takes of itself."""
    devices = jax.devices("cpu") if name == "cpu" else jax.devices()
    device = devices[0]
    found = device_memory(device)
    if found is None:
        raise UserError(f"--target={name}: {device.device_kind} does not say how much memory it has")
    on_cpu = device.platform == "cpu"
    source = f"compiled for {'this CPU' if on_cpu else device.device_kind}"
    options = xla.quick() if on_cpu else {}  # the memory is the same to some hundred bytes
    return Place(
        name, device.device_kind, device.platform, tuple(devices), *found, source, "present", options
    )


def shared(place: Place, processes: int) -> Place:
    """What each of so many processes at a time has of a place: on a CPU its part of the host's RAM.

    Of a GPU it is jax's own share, which whoever starts several there divides.
    """
    if processes == 1 or place.platform != "cpu" or place.name in targets.TARGETS:
        return place
    reserve = f"{place.reserve}, shared by {processes} processes"
    return replace(place, capacity=place.capacity // processes, reserve=reserve)


@contextlib.contextmanager
def _kept_kernels(shared: Path) -> Iterator[Path]:
    """A file from which XLA takes kernels that it has compiled before, and to which it adds others.

    Each process works on a copy, since XLA does not write the file at one stroke; the last one's is kept.
    """
    make_private(shared.parent)
    with tempfile.TemporaryDirectory(dir=shared.parent) as folder:
        own = Path(folder) / shared.name
        if shared.exists() and shared.stat().st_size < MOST_KEPT:
            shutil.copyfile(shared, own)
        yield own
        if own.exists():
            own.replace(shared)


def _share_of(name: str) -> tuple[int, str]:
    """Of a GPU's memory, what jax may use, and why."""
    gpu, (share, said) = targets.find(name), memory_share(os.environ)
    reserve = f"{share:.0%} of the {gpu.memory_bytes / 2**30:.1f} GiB of {gpu.kind}: {said}"
    return int(gpu.memory_bytes * share), reserve
