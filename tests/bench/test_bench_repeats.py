"""Short work is repeated inside a program, each time anew; a time that is all call is compared with nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate.bench import kernels, oracle, problems, programs
from jaxablate.bench.kernel_results import summaries
from jaxablate.bench.kernel_tuning import keep
from jaxablate.bench.kernels import bench_problem
from jaxablate.bench.kernels_report import Outcome
from jaxablate.bench.limits import Limits
from jaxablate.bench.problems import Problem, problem
from jaxablate.bench.timing import Samples
from jaxablate.bench.work import roof_seconds
from jaxablate_kernels import dispatch, tuning

LIMITS = Limits(copy=1e10, matmul={"float32": 1e11}, call=0.0, samples={"copy": Samples((1.0,), 1)})
H200 = dataclasses.replace(LIMITS, copy=4e12, matmul={"bfloat16": 7e14}, call=2e-5)


def small(op: str, name: str) -> Problem:
    return problem(op, *problems.cases(op)[name])


def turns(loop: Callable[[Callable], Callable]) -> int:
    """How often the work in a loop around it is really done."""
    done = []

    def count(x: np.ndarray) -> np.ndarray:
        done.append(1)
        return np.sin(x)

    def work(x: jax.Array) -> jax.Array:
        return jax.pure_callback(count, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    x = jnp.ones((4, 5))
    assert jnp.allclose(jax.jit(loop(work))(x), jnp.sin(x))
    return len(done)


def test_the_work_is_done_in_every_turn():
    assert turns(functools.partial(programs.repeated, times=5)) == 5
    assert turns(functools.partial(programs.repeated, times=1)) == 1

    def careless(work: Callable) -> Callable:  # the negative control: XLA does it once
        return lambda x: jax.lax.fori_loop(0, 5, lambda _, y: work(x), jnp.zeros_like(x))

    assert turns(careless) == 1


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize(("op", "case"), [("attention", "all_half"), ("cross_entropy", "everything")])
def test_a_repeated_program_has_the_results_of_one(op, case, direction):
    p = small(op, case)
    call = dispatch.load(op, "reference").call
    once, often = (programs.build(p, call, p.cotangents(), direction, n) for n in (1, 3))
    assert (once.repeats, often.repeats) == (1, 3)
    assert once.memory == often.memory
    found, expected = often.results(), once.results()
    assert found.keys() == expected.keys()
    assert all(jnp.allclose(found[name], expected[name], rtol=1e-2, atol=1e-2) for name in found)


def test_work_is_repeated_until_it_is_long_beside_a_call():
    group, case = problems.cases("attention")["ctclip_spatial"]
    p = problem("attention", group, case, batch=8, dtype="bfloat16")
    times = programs.repeats(p, "forward", H200, "gpu")
    least = roof_seconds(p.passes.forward, 7e14, 4e12)
    assert 1 < times < programs.MOST_REPEATS
    assert times * least >= programs.DISPATCH_SECONDS > (times - 1) * least
    slow = dataclasses.replace(H200, matmul={"bfloat16": 7e10})
    assert programs.repeats(p, "forward", slow, "gpu") == 1
    assert programs.repeats(p, "forward", H200, "cpu") == 1
    assert programs.repeats(p, "forward", None, "gpu") == 1
    tiny = problem("attention", *problems.cases("attention")["one_token"], dtype="bfloat16")
    assert programs.repeats(tiny, "forward", H200, "gpu") == programs.MOST_REPEATS


def bench(limits: Limits | None):
    p = small("gated", "width_100")
    found = {name: dispatch.load("gated", name) for name in ("reference", "recompute")}
    return p, bench_problem(p, found, ("both",), seconds=0.02, rounds=3, limits=limits)


def test_seconds_are_those_of_the_work_done_once(monkeypatch):
    monkeypatch.setattr(kernels, "repeats", lambda *_: 7)
    monkeypatch.setattr(
        kernels, "time_interleaved", lambda calls, **_: {n: Samples((14.0,), 1) for n in calls}
    )
    _, result = bench(LIMITS)
    assert result.seconds("both") == {"reference": 2.0, "recompute": 2.0}
    assert {entry.timed["both"].repeats for entry in result.entries} == {7}


def test_a_time_that_is_all_call_is_shown_and_compared_with_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXABLATE_TUNED", str(tmp_path))
    device = jax.devices()[0].device_kind
    slow_call = dataclasses.replace(LIMITS, call=10.0)
    for limits, counts in ((slow_call, False), (LIMITS, True)):
        p, result = bench(limits)
        rows = list(result.rows(limits))
        assert [row["counts"] for row in rows] == [counts, counts]
        assert [row["speedup_over_reference"] is not None for row in rows] == [counts, counts]
        assert bool(summaries((result,))) == counts
        keep(result, p, {})
        assert bool(tuning.fastest("gated", p.spec, device)) == counts
        table = Outcome(FACTS, limits, (result,), Path("k.json")).markdown()
        assert (" ! |" in table) != counts


FACTS = {
    "platform": "cpu",
    "packages": {"jax": "1", "jaxlib": "1"},
    "python": "3",
    "driver": None,
    "git": {"commit": None, "dirty": None},
    "date": "today",
    "devices": {"platform": "cpu", "kind": "cpu", "count": 1},
    "host": {"processor": "abacus", "cores": 1},
}


# ----------------------------------------------------------------------- what the problem is, what is right


def test_the_bias_of_the_spatial_study_is_float32_in_bfloat16_too():
    group, case = problems.cases("attention")["ctclip_spatial"]
    p = problem("attention", group, case, dtype="bfloat16")
    assert (p.learned["q"].dtype, p.learned["bias"].dtype) == (jnp.bfloat16, jnp.float32)
    assert p.spec.bias_dtype == "float32"
    other = problem("attention", *problems.cases("attention")["length_100"], dtype="bfloat16")
    assert other.learned["bias"].dtype == jnp.bfloat16 and other.spec.bias_dtype == "bfloat16"


def limit(op: str, *, dtype="float32", platform="gpu", of_reference: float | None = None) -> float:
    own = oracle.Error(of_reference or 0.0, of_reference or 0.0, 0.1)
    reference = {} if of_reference is None else {"y": own}
    y = {"y": jnp.ones((2, 3))}
    found = oracle.errors(y, y, op=op, dtype=dtype, platform=platform, reference=reference)
    return found["y"].limit


def test_only_matrix_products_have_the_tolerance_of_tf32():
    assert limit("attention") == limit("cross_entropy") == oracle.TF32_LIMIT
    assert limit("norm") == limit("gated") == oracle.LIMITS["float32"]
    assert limit("attention", platform="cpu") == oracle.LIMITS["float32"]


def test_an_error_of_the_reference_excuses_a_few_times_as_much_up_to_a_point():
    assert limit("norm", dtype="bfloat16", of_reference=1e-4) == 1e-2
    assert limit("norm", dtype="bfloat16", of_reference=6e-3) == pytest.approx(2.4e-2)
    assert limit("norm", dtype="bfloat16", of_reference=9e-2) == 5e-2
