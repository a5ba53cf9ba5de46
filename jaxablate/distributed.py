"""One cohort over several processes: `jax.distributed`, and what its processes must agree on.

All processes run the same loop. Arrays are global, and each process holds the shards of its devices. What is
said and decided on the host is process 0's alone: it claims, reads and writes the run directories, and `first`
hands the others what it found. With one process everything here is what it would be without.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax._src.distributed import global_state  # the key-value store has no public door
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxablate.claims import Claimed
from jaxablate.errors import StorageError, UserError, is_storage
from jaxablate.places import ProcessPlace
from jaxablate.runstore import State
from jaxablate.stopping import EXIT_DISK, Paused, Stopped, StopRequest

T = TypeVar("T")

HEARTBEAT_S = 20  # without a sign of life, after which jax ends the processes that are left
START_S = 180  # for the slowest process to import jax and come in
LEAVE_S = 20  # for the others, when one has ended well
PATIENCE_S = 3.0  # for the words of a process that failed, once the connection to it is gone
ABORTED = "Terminating process because the JAX distributed service detected fatal errors"  # before SIGABRT
_ANY_S = 7 * 24 * 3600  # a wait that the heartbeat ends, if the process waited for is gone
_SHARED = (UserError, StorageError, Claimed, Stopped)  # errors that all processes end with
_LOST = re.compile(r"gloo|nccl|coordination|heartbeat|barrier|connection", re.IGNORECASE)


@contextlib.contextmanager
def joined(place: ProcessPlace) -> Iterator[None]:
    """Makes this process one of several. Before anything else of jax, and once in a process.

    The processes leave together; one that fails does not wait for the others, which end within half a minute.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=START_S,
        heartbeat_timeout_seconds=HEARTBEAT_S,
        shutdown_timeout_seconds=LEAVE_S,
        coordinator_bind_address=place.coordinator,  # not all interfaces, as is jax's default
    )
    try:
        yield
    except (UserError, Stopped, Paused):  # which all of them meet
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        abandon(error)
        raise
    jax.distributed.shutdown()


def abandon(error: BaseException) -> None:
    """Ends this process at once if it is one of several: all that would follow waits for the others."""
    if several():
        traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(EXIT_DISK if is_storage(error) else 1)


# ----------------------------------------------------------------------------------- arrays, global


def several() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def leads() -> bool:
    """Whether this is process 0, which reads and writes the run directories."""
    return jax.process_index() == 0


def put(tree: T, placed: Sharding) -> T:
    """Host arrays, the same on every process, as global ones: each process places its own shards."""

    def place(value: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(np.shape(value), placed, lambda index: np.asarray(value)[index])

    return jax.tree.map(place, tree)


def fetch(tree: Any) -> Any:
    """Whole host copies of global arrays. All processes must ask for the same at the same point."""
    return jax.device_get(jax.tree.map(_whole, tree))


def _whole(array: jax.Array) -> jax.Array:
    if array.is_fully_addressable or array.is_fully_replicated:
        return array
    assert isinstance(array.sharding, NamedSharding)
    return _replicate(array.sharding.mesh)(array)


@functools.cache
def _replicate(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, PartitionSpec()))


def check_mesh(mesh: Mesh) -> Mesh:
    """`mesh`, if every process has a device in it.

    Raises:
      UserError: one has none, so it would have nothing to do.
    """
    idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if idle:
        raise UserError(
            f"config.host.mesh: {mesh.size} of {jax.device_count()} devices are used, none of process "
            f"{min(idle)}; start fewer processes, or a cohort that spreads over all"
        )
    return mesh


# -------------------------------------------------------------------------------------- agreements

_numbers = itertools.count()  # of agreements, which all processes come to in the same order


def first(work: Callable[[], T]) -> T:
    """What `work` gives on process 0, on all of them; an error that ends it there ends all.

    The others get it through JSON: lists for tuples, and text for the keys of a dict.
    """
    if not several():
        return work()
    key = f"jaxablate/first/{next(_numbers)}"
    if not leads():
        found = json.loads(_store().blocking_key_value_get(key, _ANY_S * 1000))
        if "error" not in found:
            return found["value"]
        raise {kind.__name__: kind for kind in _SHARED}.get(found["error"], RuntimeError)(found["text"])
    try:
        value = work()
    # Any: the others wait for a word, whatever went wrong; here it goes on as it was.
    except Exception as error:
        kind = type(error).__name__
        text = str(error) if isinstance(error, _SHARED) else f"process 0: {kind}: {error}"
        _store().key_value_set(key, json.dumps({"error": kind, "text": text}))
        raise
    _store().key_value_set(key, json.dumps({"value": value}))
    return value


def everywhere(work: Callable[[], T]) -> T:
    """What `work` gives on this process; bad input on one of them (a file that its machine lacks) ends all."""
    if not several():
        return work()
    value, word = None, ""
    try:
        value = work()
    except UserError as error:
        word = str(error)
    for process, said in enumerate(gather(word)):
        if said:
            raise UserError(f"{said} (process {process})")
    return cast("T", value)


def gather(word: str) -> list[str]:
    """The words of all processes, in their order."""
    if not several():
        return [word]
    key = f"jaxablate/gather/{next(_numbers)}"
    _store().key_value_set(f"{key}/{jax.process_index()}", word)
    return [_store().blocking_key_value_get(f"{key}/{i}", _ANY_S * 1000) for i in range(jax.process_count())]


def blame(error: Exception) -> tuple[State, str]:
    """State and reason of a cohort that `error` ended here.

    Of several processes one that loses the connection to another asks what became of it: an error of its own,
    or none, and then it was killed, or its machine is gone.
    """
    words = f"{type(error).__name__}: {error}"
    if several() and isinstance(error, RuntimeError | ValueError) and _LOST.search(str(error)):
        return _heard() or ("node_fail", f"a process of the cohort is gone: {words}")
    state: State = "bug"
    if is_storage(error):  # the machine's fault, so the runs go on once it is mended
        state = "node_fail"
    elif "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        state = "oom"
    if several():
        said = json.dumps([state, f"process {jax.process_index()}: {words}"])
        _store().key_value_set(f"jaxablate/failed/{jax.process_index()}", said)
    return state, words


def _heard() -> tuple[State, str] | None:
    """What another process said that ended it."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        for _, said in _store().key_value_dir_get("jaxablate/failed/"):
            state, words = json.loads(said)
            return state, words
        time.sleep(0.1)
    return None


def _store() -> Any:
    return global_state.client


# ----------------------------------------------------------------------------------------- stopping


class StopTogether(StopRequest):
    """A signal to any process stops all of them after the same step.

    jax carries the notice: its own handler of SIGTERM, which must stay, tells all processes, and these settle
    on the first step that none of them has reached. `due` is called by all, equally often.
    """

    signals = (signal.SIGINT, signal.SIGUSR2)

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        super()._on_signal(number, frame)
        signal.raise_signal(signal.SIGTERM)

    def due(self) -> str:
        self._asked += 1
        if not multihost_utils.reached_preemption_sync_point(self._asked):
            return ""
        return next((name for name in gather(self.signal) if name), signal.SIGTERM.name)


def stop_request() -> StopRequest:
    """The listener for the signals that stop this process, and with it the others of its cohort."""
    return StopTogether() if several() else StopRequest()
