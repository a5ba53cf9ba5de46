"""Timing in turns: fair places, samples long enough for the clock, drift that cancels; memory says its source."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxablate.bench.timing import (
    Memory,
    Samples,
    compile_timed,
    peak_memory,
    time_interleaved,
    wall_clock,
)


class Machine:
    """A machine with a clock of its own: programs take known seconds, and it slows down as it goes."""

    def __init__(self, costs: dict[str, float], drift: float = 0.0):
        self.costs, self.drift = costs, drift
        self.now = 0.0
        self.order: list[str] = []

    def calls(self):
        return {name: lambda name=name: name for name in self.costs}

    def clock(self, call, inner):
        name = call()
        self.order.append(name)
        seconds = inner * self.costs[name] * (1 + self.drift * self.now)
        self.now += seconds
        return seconds

    def time(self, **options):
        return time_interleaved(self.calls(), clocks=dict.fromkeys(self.costs, self.clock), **options)


def test_every_program_has_every_place_and_both_neighbours_equally_often():
    machine = Machine({"a": 0.1, "b": 0.1, "c": 0.1})
    machine.time(rounds=6)
    order = machine.order[-18:]
    rounds = [tuple(order[i : i + 3]) for i in range(0, 18, 3)]
    assert sorted(rounds) == sorted(itertools.permutations("abc"))
    assert Counter(name for r in rounds for name in r[:1]) == {"a": 2, "b": 2, "c": 2}


def test_drift_of_the_machine_cancels():
    costs = {"a": 1.0, "b": 1.0}
    in_turns = Machine(costs, drift=0.01).time(rounds=20)
    assert in_turns["a"].median == pytest.approx(in_turns["b"].median, rel=0.03)
    machine = Machine(costs, drift=0.01)  # one after another, the second seems slower
    first, second = ([machine.clock(call, 1) for _ in range(20)] for call in machine.calls().values())
    assert sum(second) / sum(first) > 1.15


def test_a_sample_is_as_many_calls_as_the_clock_needs():
    found = Machine({"short": 2e-6, "long": 0.5}).time(rounds=3, sample_seconds=0.01)
    assert 3_000 <= found["short"].inner <= 10_000
    assert found["long"].inner == 1
    assert found["short"].median == pytest.approx(2e-6)  # of one call
    assert found["long"].median == pytest.approx(0.5)


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 4), (math.inf, 9)])
def test_when_the_time_is_up_no_round_is_begun(budget, rounds):
    found = Machine({"a": 0.1, "b": 0.1}).time(rounds=9, least_rounds=4, budget=budget)
    assert [len(samples.seconds) for samples in found.values()] == [rounds, rounds]


def test_nothing_to_time_is_an_error():
    with pytest.raises(ValueError, match="0 calls"):
        time_interleaved({}, rounds=1)
    with pytest.raises(ValueError, match="0 rounds"):
        Machine({"a": 1.0}).time(rounds=0)


def test_median_and_spread():
    samples = Samples((1.0, 2.0, 3.0, 4.0, 100.0), inner=1)
    assert samples.median == 3.0
    assert samples.spread == 1.0  # quartiles 2 and 4; the outlier does not count


def test_the_clock_counts_every_call():
    calls = []

    def call():
        calls.append(len(calls))
        return jnp.zeros(())

    assert wall_clock(call, 5) > 0
    assert len(calls) == 5


def test_compiled_program_computes_and_says_what_it_needs():
    x = jnp.arange(1024, dtype=jnp.float32)
    compiled, seconds = compile_timed(lambda x: x + 1, x)
    assert seconds > 0
    assert (compiled(x) == x + 1).all()
    assert peak_memory(compiled, lambda: compiled(x)) == Memory(2 * 4 * 1024, "program")  # in and out


@pytest.mark.parametrize(
    ("high_mark", "expected"),
    [
        # 5000 bytes were in use before, 4096 of them the argument; the program raised the mark.
        (20_000, Memory(20_000 - (5000 - 4096), "device")),
        (9000, Memory(2 * 4 * 1024, "program")),  # the mark is of an earlier program, and says nothing
    ],
)
def test_the_device_is_asked_only_when_this_program_is_the_largest(high_mark, expected):
    marks = iter([9000, high_mark])
    device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": next(marks), "bytes_in_use": 5000})
    x = jnp.zeros(1024, jnp.float32)
    compiled = jax.jit(lambda x: x + 1).lower(x).compile()
    assert peak_memory(compiled, lambda: compiled(x), device) == expected
