"""The compiled programs of a problem: forward, backward alone, and both.

A kernel at a study's shapes takes microseconds on a GPU, and a call from Python tens of them. There a program
repeats its work in a loop, so that what is timed is the device and not the calls.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from jaxablate.bench.limits import Limits
from jaxablate.bench.oracle import named
from jaxablate.bench.problems import Arrays, Call, Problem
from jaxablate.bench.timing import Clock, Memory, compile_timed, peak_memory, wall_clock
from jaxablate.bench.work import Direction, roof_seconds

DISPATCH_SECONDS = 2e-4  # of work for the device in one call of a program
MOST_REPEATS = 100  # each a few kernels of 2 µs or more, so that these too take that long


@dataclass(frozen=True)
class Program:
    """One implementation of a problem in one direction, ready to be checked and timed.

    Attributes:
      run: a call on arrays that are on the device.
      results: calls it, and gives results and gradients by the names of `oracle.named`.
      compile_seconds: to trace, lower and compile it, without a loop around it.
      memory: the peak while it runs, without a loop around it.
      clock: that times `run`.
      repeats: how many times `run` does the work, one after another.
    """

    run: Callable[[], Any]
    results: Callable[[], dict[str, jax.Array]]
    compile_seconds: float
    memory: Memory
    clock: Clock = wall_clock
    repeats: int = 1


def repeats(problem: Problem, direction: Direction, limits: Limits | None, platform: str) -> int:
    """How often a program should do its work in one call, so that it is long beside the call.

    The same for all implementations of a problem: by the least time that the machine's limits allow.

    Args:
      problem, direction: what is to be timed.
      limits: of this machine; None if unknown.
      platform: on a CPU a call is short, and takes no turn in a queue: once.
    """
    if limits is None or platform == "cpu":
        return 1
    least = roof_seconds(problem.passes.of(direction), limits.matmul[problem.dtype], limits.copy)
    return min(MOST_REPEATS, math.ceil(DISPATCH_SECONDS / least))


def repeated(function: Callable[..., Any], times: int) -> Callable[..., Any]:
    """A function that does the work of another `times` times, one after another, and gives the last result.

    The results are carried, so that none is dead, and the next arguments come through a barrier from the
    last results, so that XLA can neither hoist the work out of the loop nor begin it early. The number of
    turns is a constant: XLA does not ask the device whether to go on.
    """
    if times == 1:
        return function

    def loop(*args: Any) -> Any:
        def turn(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            args, _ = carry
            return jax.lax.optimization_barrier(_rows((args, function(*_rows(args)))))

        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *args))
        return jax.lax.fori_loop(0, times, turn, (args, nothing))[1]

    return loop


def _rows(tree: Any) -> Any:
    """Arrays in rows, as a program's arguments and results are: in a loop XLA would choose, and transpose once."""

    def pinned(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    return jax.tree.map(pinned, tree)


def build(
    problem: Problem, call: Call, gradients: Mapping[str, Any], direction: Direction, repeats: int = 1
) -> Program:
    """Compile one implementation, and run it once.

    Args:
      problem: with its arrays.
      call: `Implementation.call`, its configuration given.
      gradients: of the results, by name.
      direction: `backward` takes what the forward pass keeps as arguments, as a training step does; in
        `both` the gradients of the results are not there before the results are.
      repeats: how often a call of the program does the work.
    """
    if direction == "forward":
        return _program(
            lambda learned, fixed: problem.apply(call, learned, fixed),
            (problem.learned, problem.fixed),
            lambda results: named(results, {}),
            repeats,
        )
    if direction == "both":
        arguments = (problem.learned, problem.fixed, gradients)
        return _program(both(problem, call), arguments, lambda pair: named(*pair), repeats)
    pullback = jax.jit(functools.partial(_pullback, problem, call))
    kept, tree = jax.tree.flatten(pullback(problem.learned, problem.fixed)[1])
    return _program(
        lambda kept, gradients: tree.unflatten(kept)(gradients)[0],
        (kept, gradients),
        lambda found: named({}, found),
        repeats,
    )


def both(problem: Problem, call: Call) -> Callable[..., tuple[dict[str, Any], Any]]:
    """The function (learned, fixed, gradients of the results) -> results, gradients of `learned`."""

    def function(learned: Arrays, fixed: Arrays, gradients: Arrays) -> tuple[dict[str, Any], Any]:
        results, vjp = _pullback(problem, call, learned, fixed)
        # A backward pass begins when the forward pass is over; XLA shall not make one pass of the two.
        results, gradients = jax.lax.optimization_barrier((results, gradients))
        return results, vjp(gradients)[0]

    return function


def _pullback(problem: Problem, call: Call, learned: Arrays, fixed: Arrays) -> tuple[dict[str, Any], Any]:
    return jax.vjp(lambda learned: problem.apply(call, learned, fixed), learned)


def _program(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    name: Callable[[Any], dict[str, jax.Array]],
    repeats: int,
) -> Program:
    once, seconds = compile_timed(function, *args)
    memory = peak_memory(once, lambda: once(*args))
    timed = once if repeats == 1 else compile_timed(repeated(function, repeats), *args)[0]

    def run() -> Any:
        return timed(*args)

    jax.block_until_ready(run())
    return Program(run, lambda: name(run()), seconds, memory, repeats=repeats)
