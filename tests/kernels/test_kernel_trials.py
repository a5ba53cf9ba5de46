"""Timing the configurations of a kernel: each that runs and is right has a time, the others a reason."""

import jax
import jax.numpy as jnp
import pytest

from jaxablate_kernels import trials
from jaxablate_kernels.trials import Timing

pytestmark = pytest.mark.filterwarnings("error")


def blocks_of(size):
    """A sum in blocks; the configuration is the size of a block."""
    return lambda x: jnp.sum(jnp.sum(x.reshape(-1, size), axis=1), axis=0)


X = jnp.arange(64, dtype=jnp.float32)


def test_each_candidate_is_timed():
    timings = trials.tune(blocks_of, [X], [8, 2, 32], repeats=3, sample_seconds=1e-4)
    assert [timing.config for timing in timings] == [8, 2, 32]
    assert all(timing.seconds and timing.reason is None for timing in timings)
    assert trials.best(timings).seconds == min(timing.seconds for timing in timings)


@pytest.mark.parametrize("error", [1e-2, float("nan")])
def test_a_candidate_with_another_result_is_refused(error):
    def make_call(wrong):
        return lambda x: {"y": x + wrong, "n": jnp.sum(x)}

    timings = trials.tune(make_call, [X / 64], [0.0, error, 1e-5], repeats=1, sample_seconds=1e-4)
    assert timings[1].seconds is None
    assert timings[1].reason == "the result differs from the first candidate's in 64 of 64 entries"
    assert [timing.seconds is None for timing in timings] == [False, True, False]  # 1e-5 is rounding
    assert trials.best(timings).config in (0.0, 1e-5)


def test_a_candidate_too_large_for_the_device_is_recorded():
    too_large = (
        "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 524288, available: 232448\nmore"
    )

    def make_call(size):
        if size == 2:
            raise jax.errors.JaxRuntimeError(too_large)
        return blocks_of(size)

    timings = trials.tune(make_call, [X], [2, 8], repeats=1, sample_seconds=1e-4)
    assert timings[0] == Timing(2, None, f"JaxRuntimeError: {too_large.splitlines()[0]}")
    assert trials.best(timings).config == 8
    assert trials.best(timings[:1]) is None


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("INTERNAL: ptxas\nmore"),
        ValueError("no such block"),
        NotImplementedError(),
    ],
    ids=repr,
)
def test_a_candidate_that_fails_leaves_the_others(error):
    def make_call(size):
        if size == 2:
            raise error
        return blocks_of(size)

    timings = trials.tune(make_call, [X], [2, 8], repeats=1, sample_seconds=1e-4)
    line = str(error).splitlines()[0] if str(error) else "no message"
    assert timings[0] == Timing(2, None, f"{type(error).__name__}: {line}")
    assert trials.best(timings) == timings[1]
    assert timings[1].seconds


def test_an_interruption_is_no_reason():
    def make_call(size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trials.tune(make_call, [X], [2, 8])
