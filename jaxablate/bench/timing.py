"""Times of several programs against each other, in turns, so that a drift of the machine cancels.

A machine gets warm, shares its cores and changes its clock. Programs that are timed one after another are
compared under different conditions; programs that take turns, round for round, are not.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

Call = Callable[[], Any]
Clock = Callable[[Call, int], float]  # (call, n) -> seconds of n calls, until the device has done them all

MAX_INNER = 10_000


@dataclass(frozen=True)
class Samples:
    """What one program took.

    Attributes:
      seconds: of one call, one sample for each round. Samples of the same round are pairs: those of two
        programs at the same index were taken one right after the other.
      inner: calls in each sample, over which it is the mean.
    """

    seconds: tuple[float, ...]
    inner: int

    @property
    def median(self) -> float:
        """Seconds of one call; the few samples that something disturbed do not move it."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the interquartile range, in seconds; the samples are mostly within `median ± spread`."""
        low, high = np.quantile(self.seconds, (0.25, 0.75))
        return float(high - low) / 2


@dataclass(frozen=True)
class Memory:
    """The most memory that one device needed for a program, its arguments and results included.

    Attributes:
      bytes: None where neither source knows.
      source: `device`: counted by the device's allocator while the program ran; `program`: what the compiler
        laid out for arguments, results and temporaries.
    """

    bytes: int | None
    source: Literal["device", "program"]


def wall_clock(call: Call, inner: int) -> float:
    """Seconds of `inner` calls, one after another, until the results are there.

    An accelerator takes its work in order, so the calls are queued and only the last result is waited for.
    A CPU may run two of them side by side, so each is waited for.
    """
    in_order = jax.default_backend() != "cpu"
    result = None
    began = time.perf_counter()
    for _ in range(inner):
        result = call()
        if not in_order:
            jax.block_until_ready(result)
    jax.block_until_ready(result)
    return time.perf_counter() - began


def time_interleaved(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    warmup: int = 1,
    sample_seconds: float = 0.01,
    budget: float = math.inf,
    least_rounds: int = 3,
    clocks: Mapping[str, Clock] | None = None,
) -> dict[str, Samples]:
    """Time programs in turns: A B C, B C A, C A B, then the same backwards, and so on.

    Every program has every place in a round equally often, and both neighbours, so that neither its place
    nor what ran before it favours one.

    Args:
      calls: by name; compiled already, or the first call compiles.
      rounds: samples of each program.
      warmup: calls of each that are not timed.
      sample_seconds: a sample is made of as many calls as take about this long, so that the clock's step and
        the wait for the device are small beside it. Calls that take longer are timed one by one.
      budget: seconds in all. When they are spent, no further round is begun, once there are `least_rounds`.
      least_rounds: see `budget`.
      clocks: for the programs whose calls `wall_clock` cannot time.

    Returns:
      Samples of each, in the order of `calls`, all with the same number of rounds.

    Raises:
      ValueError: no calls, or fewer than one round.
    """
    if not calls or rounds < 1 or least_rounds < 1:
        raise ValueError(
            f"{len(calls)} calls, {rounds} rounds, at least {least_rounds}: all must be 1 or more"
        )
    began = time.perf_counter()
    clocks = {name: (clocks or {}).get(name, wall_clock) for name in calls}
    for name, call in calls.items():
        clocks[name](call, max(warmup, 0))
    inner = {name: _calls_in_a_sample(call, clocks[name], sample_seconds) for name, call in calls.items()}

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with _no_garbage_collection():
        for number in range(rounds):
            if number >= least_rounds and time.perf_counter() - began > budget:
                break
            for name in _order(tuple(calls), number):
                seconds[name].append(clocks[name](calls[name], inner[name]) / inner[name])
    return {name: Samples(tuple(taken), inner[name]) for name, taken in seconds.items()}


def compile_timed(function: Callable[..., Any], *args: Any) -> tuple[jax.stages.Compiled, float]:
    """The compiled program of `function` at these arguments, and the seconds to trace, lower and compile it.

    Args:
      function: plain or jitted; all of its arguments are traced.
      *args: arrays, or `jax.ShapeDtypeStruct`s.

    With JAX's persistent compilation cache on, the time is that of finding the program there.
    """
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    return compiled, time.perf_counter() - began


def peak_memory(compiled: jax.stages.Compiled, run: Call, device: Any = None) -> Memory:
    """The peak memory of a program on one device; runs it once where the device counts.

    An allocator keeps the highest mark of the whole process and cannot be reset. It is used when this
    program raises it, for then the mark is this program's; else the compiler's figure is taken.

    Args:
      compiled: the program.
      run: calls it, with arguments that are on the device already.
      device: a `jax.Device`; the first one by default.
    """
    device = device or jax.devices()[0]
    planned = compiled.memory_analysis()
    before = device.memory_stats()
    if before and "peak_bytes_in_use" in before:
        jax.block_until_ready(run())
        peak = (device.memory_stats() or {})["peak_bytes_in_use"]
        if peak > before["peak_bytes_in_use"]:
            others = before["bytes_in_use"] - (planned.argument_size_in_bytes if planned else 0)
            return Memory(int(peak - max(others, 0)), "device")
    if planned is None:
        return Memory(None, "program")
    total = planned.argument_size_in_bytes + planned.output_size_in_bytes + planned.temp_size_in_bytes
    return Memory(int(total - planned.alias_size_in_bytes), "program")


def _calls_in_a_sample(call: Call, clock: Clock, target: float) -> int:
    """How many calls take about `target` seconds. A short pilot is mostly waiting, so it is repeated."""
    inner = 1
    while (seconds := clock(call, inner)) < 0.7 * target and inner < MAX_INNER:
        inner = min(MAX_INNER, max(inner + 1, math.ceil(inner * target / max(seconds, 1e-9))))
    return inner


def _order(names: tuple[str, ...], number: int) -> tuple[str, ...]:
    turn, cycle = number % len(names), number // len(names)
    rotated = names[turn:] + names[:turn]
    return rotated[::-1] if cycle % 2 else rotated


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection inside a sample would be charged to whoever's turn it is."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
