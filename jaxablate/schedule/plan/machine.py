"""What this machine is to a plan: the kind of its devices, and how many cohorts it trains at a time."""

from __future__ import annotations

import shutil
import socket
import subprocess

from jaxablate.errors import UserError
from jaxablate.schedule import workers
from jaxablate.targets import find

CPU = "cpu"
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
    asked = [tool, "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split("\n")
    kinds = sorted({name.strip() for name in names if name.strip()})
    if len(kinds) != 1:
        raise UserError(
            f"GPUs of this machine: {', '.join(kinds) or 'none'}; name alike ones in CUDA_VISIBLE_DEVICES"
        )
    return kinds[0]


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
