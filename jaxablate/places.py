"""Where a process stands among several that train one cohort, as its scheduler says. Imports no jax."""

from __future__ import annotations

import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxablate.errors import UserError

Processes = Literal["one", "slurm", "env"]

_PORTS = range(61440, 65536)  # above those that Linux gives to outgoing connections


def place_of(processes: Processes, environment: Mapping[str, str]) -> ProcessPlace | None:
    """The place of this process; None if it is the only one. Raises UserError where it cannot be told."""
    places = {"slurm": place_in_slurm, "env": place_in_env}
    return places[processes](environment) if processes in places else None


@dataclass(frozen=True)
class ProcessPlace:
    """Where a process stands among those of its job."""

    coordinator: str  # host:port, at which process 0 listens
    process: int
    processes: int
    devices: tuple[int, ...] | None = None  # its own, of those it sees; None: all


def place_in_slurm(environment: Mapping[str, str]) -> ProcessPlace:
    """The place of a task in a step of SLURM (`srun`), by the variables that SLURM sets.

    Process 0 listens on the first node, at a port that follows from the job and the step, so that two steps on
    a node do not meet; `JAX_COORDINATOR_ADDRESS`, with or without a port, wins. A step on one node does not
    leave it.

    Raises:
      UserError: this is no task of a step, or the GPUs cannot be shared out.
    """
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    port = _PORTS[zlib.crc32(f"{job}.{step}".encode()) % len(_PORTS)]
    nodes = _number(environment, "SLURM_STEP_NUM_NODES")
    host = environment.get("JAX_COORDINATOR_ADDRESS", "")
    if not host:
        host = "127.0.0.1" if nodes == 1 else _reachable(_first_host(environment["SLURM_STEP_NODELIST"]))
    return ProcessPlace(
        host if re.search(r":\d+$", host) else f"{host}:{port}",
        _number(environment, "SLURM_PROCID"),
        _number(environment, "SLURM_STEP_NUM_TASKS"),
        _own_gpus(environment),
    )


def place_in_env(environment: Mapping[str, str]) -> ProcessPlace:
    """The place that `JAXABLATE_COORDINATOR` (host:port), `_PROCESS` and `_PROCESSES` name.

    Raises:
      UserError: one of them is missing or no such thing.
    """
    coordinator = environment.get("JAXABLATE_COORDINATOR", "")
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"JAXABLATE_COORDINATOR={coordinator}: must be host:port of process 0")
    process, processes = (_number(environment, f"JAXABLATE_{name}") for name in ("PROCESS", "PROCESSES"))
    if process >= processes:
        raise UserError(f"JAXABLATE_PROCESS={process}: must be below JAXABLATE_PROCESSES={processes}")
    return ProcessPlace(coordinator, process, processes)


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        raise UserError(f"{name}={value}: must be a number; this process is none of several")
    return int(value)


def _first_host(nodes: str) -> str:
    """`rack1n[003-007,9],login` -> `rack1n003`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else nodes)


def _reachable(host: str) -> str:
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise UserError(
            f"SLURM_STEP_NODELIST: {host} has no address ({error.strerror}); set JAX_COORDINATOR_ADDRESS"
        ) from None
    if address.startswith("127."):
        raise UserError(
            f"SLURM_STEP_NODELIST: {host} is {address} here, where no other node can reach it; "
            "set JAX_COORDINATOR_ADDRESS"
        )
    return host


def _own_gpus(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """Which of the GPUs that a task sees are its own: an equal share, in the order of the node's tasks.

    SLURM shows every task all GPUs of the node (`--gpus-per-node`), or its own alone (`--gpus-per-task`).
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    seen = len([d for d in visible.split(",") if d]) if visible is not None else 0
    seen = seen or int(environment.get("SLURM_GPUS_ON_NODE", 0))
    if not seen:
        return None
    there = int(environment.get("SLURM_GPUS_ON_NODE", seen))
    tasks = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[_number(environment, "SLURM_NODEID")]
    if seen * tasks == there:
        return tuple(range(seen))
    if seen % tasks:
        raise UserError(f"SLURM_STEP_TASKS_PER_NODE: {tasks} tasks cannot share {seen} GPUs evenly")
    share, local = seen // tasks, _number(environment, "SLURM_LOCALID")
    return tuple(range(local * share, (local + 1) * share))


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]."""
    parts = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(","))
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
