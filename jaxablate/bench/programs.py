"""The compiled programs of a problem: forward, backward alone, and both."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxablate.bench.oracle import named
from jaxablate.bench.problems import Arrays, Call, Problem
from jaxablate.bench.timing import Clock, Memory, compile_timed, peak_memory, wall_clock
from jaxablate.bench.work import Direction


@dataclass(frozen=True)
class Program:
    """One implementation of a problem in one direction, ready to be checked and timed.

    Attributes:
      run: a call on arrays that are on the device.
      results: calls it, and gives results and gradients by the names of `oracle.named`.
      compile_seconds: to trace, lower and compile it.
      memory: the peak while it runs.
      clock: that times it.
    """

    run: Callable[[], Any]
    results: Callable[[], dict[str, jax.Array]]
    compile_seconds: float
    memory: Memory
    clock: Clock = wall_clock


def build(problem: Problem, call: Call, gradients: Mapping[str, Any], direction: Direction) -> Program:
    """Compile one implementation, and run it once.

    Args:
      problem: with its arrays.
      call: `Implementation.call`, its configuration given.
      gradients: of the results, by name.
      direction: `backward` takes what the forward pass keeps as arguments, as a training step does; in
        `both` the gradients of the results are not there before the results are.
    """
    if direction == "forward":
        return _program(
            lambda learned, fixed: problem.apply(call, learned, fixed),
            (problem.learned, problem.fixed),
            lambda results: named(results, {}),
        )
    if direction == "both":
        arguments = (problem.learned, problem.fixed, gradients)
        return _program(both(problem, call), arguments, lambda pair: named(*pair))
    pullback = jax.jit(functools.partial(_pullback, problem, call))
    kept, tree = jax.tree.flatten(pullback(problem.learned, problem.fixed)[1])
    return _program(
        lambda kept, gradients: tree.unflatten(kept)(gradients)[0],
        (kept, gradients),
        lambda found: named({}, found),
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
    function: Callable[..., Any], args: tuple[Any, ...], name: Callable[[Any], dict[str, jax.Array]]
) -> Program:
    compiled, seconds = compile_timed(function, *args)

    def run() -> Any:
        return compiled(*args)

    memory = peak_memory(compiled, run)
    jax.block_until_ready(run())
    return Program(run, lambda: name(run()), seconds, memory)
