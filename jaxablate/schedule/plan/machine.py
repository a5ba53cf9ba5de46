"""What this machine is to a plan: the kind of its devices, and how many cohorts it trains at a time."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Sequence

from jaxablate.errors import UserError
from jaxablate.schedule import workers
from jaxablate.targets import CPU, find

_DRIVER_S = 30.0  # in which a driver that works has long answered
CPU_PROCESSES = 2  # two cohorts at a time gain a fifth on two cores: one compiles or evaluates, one trains


def kind() -> str:
    """`cpu`, or the kind of the GPUs as jax names it, such as `NVIDIA H200`."""
    devices = workers.gpus()
    if not devices:
        return CPU
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise UserError(
            "CUDA_VISIBLE_DEVICES names GPUs, and nvidia-smi, which knows their kind, is not on PATH"
        )
    asked = [tool, "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=_DRIVER_S)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{tool}: no answer in {_DRIVER_S:g} s; mend the driver, or plan for a GPU by name: --target=h200"
        ) from None
    rows = [[part.strip() for part in line.split(",", 2)] for line in told.stdout.splitlines()]
    kinds = {device: {row[2] for row in rows if len(row) == 3 and _names(device, row)} for device in devices}
    if unknown := [device for device, own in kinds.items() if not own]:
        raise UserError(f"CUDA_VISIBLE_DEVICES: {tool} knows no GPU {unknown[0]}; name those that it lists")
    found = sorted(set().union(*kinds.values()))
    if len(found) != 1:
        raise UserError(f"GPUs of this machine: {', '.join(found)}; name alike ones in CUDA_VISIBLE_DEVICES")
    return found[0]


def _names(device: str, row: Sequence[str]) -> bool:
    """Whether an entry of CUDA_VISIBLE_DEVICES is this GPU, by its index or the beginning of its UUID."""
    index, uuid, _ = row
    return device == index or (device.startswith("GPU-") and uuid.startswith(device))


def matches(target: str, host: str) -> bool:
    """Whether a plan for that target holds on this machine; one for a CPU is for that of a host."""
    here = kind()
    if CPU in (target, here):
        return target == here and host == socket.gethostname()
    return _kind_of(target) == here


def places() -> int:
    """Cohorts at a time if nobody says how many: one for each GPU, or two on a CPU."""
    return len(workers.gpus()) or CPU_PROCESSES


def _kind_of(target: str) -> str:
    try:
        return find(target).kind
    except UserError:  # the kind of some other machine's devices
        return target
