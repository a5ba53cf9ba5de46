"""Bytes that a program takes of a device as its compiler lays them out, and the largest size that fits.

What an allocator loses between blocks, and libraries take for themselves, is not in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax

from jaxablate.errors import UserError
from jaxablate_kernels.errors import KernelUnsupported, PackageMissing

# An arm that these are raised for cannot be built on this machine; the others can.
NOT_HERE = (UserError, KernelUnsupported, PackageMissing)

RESOLUTION = 16  # the search ends when the next size is within a sixteenth
MOST = 2**20  # examples; nobody trains with more


def memory_of(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Bytes of one device that the compiler laid out for a program, by part; None if it does not say.

    The allocator's own high-water mark is of the whole process, where several programs' states may lie side by
    side, so it cannot be had for each.
    """
    found = compiled.memory_analysis()
    if found is None:
        return None
    parts = {
        part: int(getattr(found, f"{part}_size_in_bytes")) for part in ("argument", "output", "temp", "alias")
    }
    return {**parts, "peak": parts["argument"] + parts["output"] + parts["temp"] - parts["alias"]}


def out_of_memory(error: Exception) -> bool:
    """Whether an error of XLA or PyTorch says that something needs more memory than the device has.

    A kernel that wants more of a multiprocessor's own memory than there is has the same status in XLA, but
    is a fault of the kernel: a smaller batch would not help.
    """
    text = str(error)
    return ("RESOURCE_EXHAUSTED" in text or "CUDA out of memory" in text) and "hared memory" not in text


def device_memory(device: Any) -> tuple[int, str] | None:
    """Bytes that programs may have of a device that is here, and where the number is from; None if it does not say."""
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return int(limit), f"what jax may use of {device.device_kind}"
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "the host's RAM"
    return None


def search(
    peak: Callable[[int], int | None], limit: int, start: int, unit: int
) -> tuple[int | None, int | None]:
    """The largest size that fits, and the smallest known not to: doubled or halved from `start`, then bisected.

    Args:
      peak: bytes that a size needs, rising with it; None: more than there is.
      limit: bytes that there are.
      start: the first size to look at, a multiple of `unit`.
      unit: sizes are multiples of it.

    Returns:
      (fits, fails), within a sixteenth of each other, or one unit; fits is None if not even one unit fits, and
      fails is None if everything does.
    """
    fits: int | None = None
    fails: int | None = None
    size = start
    while fits is None or fails is None:
        needed = peak(size)
        if needed is not None and needed <= limit:
            fits = size
            if fits * 2 > MOST:
                return fits, fails
        else:
            fails = size
            if size == unit:
                return None, fails
        if fits is None or fails is None:
            size = size * 2 if fails is None else max(size // 2 // unit, 1) * unit
    while fails - fits > max(unit, fits // RESOLUTION):
        middle = (fits + fails) // 2 // unit * unit
        needed = peak(middle)
        if needed is not None and needed <= limit:
            fits = middle
        else:
            fails = middle
    return fits, fails
