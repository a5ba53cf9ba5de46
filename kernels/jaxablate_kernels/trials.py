"""Which configuration of a kernel is the fastest on this device: each is compiled, compared and timed in turn."""

import dataclasses
import math
import statistics
import time
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Timing:
    """What `tune` found for one configuration.

    Attributes:
        config: the configuration.
        seconds: median of one call; None if it is no choice.
        reason: why it is none, in one line; None if it is one.
    """

    config: Any
    seconds: float | None
    reason: str | None = None


def tune(
    make_call: Callable[[Any], Callable[..., Any]],
    arguments: Sequence[Any],
    candidates: Sequence[Any],
    *,
    repeats: int = 11,
    sample_seconds: float = 0.005,
) -> tuple[Timing, ...]:
    """Time each configuration on given arrays.

    Each is compiled first and checked against the first that compiles: no entry of its results may differ
    by more than the square root of the type's epsilon, as a share of the largest entry.  Then they are timed
    in turn (A B C A B C …), so that a drift of the machine meets all of them alike.

    Args:
        make_call: configuration -> the function of `arguments` to time; it is put under jit here.
        arguments: arrays.
        candidates: what to try, as `Implementation.candidates` gives it.
        repeats: samples per candidate; the median counts.
        sample_seconds: a sample is as many calls as take about this long, so that starting one is no part of it.

    Returns:
        One `Timing` per candidate, in their order.  A candidate that does not compile or run, or whose
        result differs, has no seconds but a reason.
    """
    runs: dict[int, tuple[Any, int]] = {}
    reasons: dict[int, str] = {}
    expected = None
    for i, config in enumerate(candidates):
        try:
            compiled = jax.jit(make_call(config)).lower(*arguments).compile()
            result = jax.block_until_ready(compiled(*arguments))
            once = _sample(compiled, arguments, 1)
        # Any: from our own check of the sizes to the GPU's compiler, each layer has errors of its own.
        except Exception as error:
            lines = str(error).splitlines() or ["no message"]
            reasons[i] = f"{type(error).__name__}: {lines[0]}"
            continue
        expected = result if expected is None else expected
        if difference := _difference(result, expected):
            reasons[i] = difference
        else:
            runs[i] = compiled, max(1, math.ceil(sample_seconds / once))
    samples: dict[int, list[float]] = {i: [] for i in runs}
    for _ in range(repeats):
        for i, (compiled, calls) in runs.items():
            samples[i].append(_sample(compiled, arguments, calls))
    return tuple(
        Timing(config, statistics.median(samples[i]) if i in samples else None, reasons.get(i))
        for i, config in enumerate(candidates)
    )


def best(timings: Sequence[Timing]) -> Timing | None:
    """The fastest; None if no candidate ran."""
    ran = [timing for timing in timings if timing.seconds is not None]
    return min(ran, key=lambda timing: typing.cast(float, timing.seconds), default=None)


def _difference(result: Any, expected: Any) -> str | None:
    for a, e in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        tolerance = float(jnp.finfo(e.dtype).eps) ** 0.5 if jnp.issubdtype(e.dtype, jnp.floating) else 0.0
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        unequal = ~np.isclose(a, e, rtol=0, atol=tolerance * np.max(np.abs(e), initial=0.0), equal_nan=True)
        if unequal.any():
            return (
                f"the result differs from the first candidate's in {int(unequal.sum())} of {e.size} entries"
            )
    return None


def _sample(compiled: Any, arguments: Sequence[Any], calls: int) -> float:
    """Seconds of one call, in a row of some."""
    result = None
    start = time.perf_counter()
    for _ in range(calls):
        result = compiled(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls
