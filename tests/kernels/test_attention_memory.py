"""What an attention keeps in memory: the blockwise one never has the whole matrix, the reference has."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from jaxablate_kernels import attention
from jaxablate_kernels.attention.cases import Case
from jaxablate_kernels.dispatch import equations

pytestmark = pytest.mark.filterwarnings("error")


def largest_intermediate(f, *arguments) -> int:
    """Elements of the largest array any equation of the program returns, at any depth."""
    return max(
        math.prod(getattr(out.aval, "shape", ()))
        for eqn in equations(jax.make_jaxpr(f)(*arguments))
        for out in eqn.outvars
    )


LONG = Case(
    "memory",
    1024,
    1024,
    2,
    2,
    32,
    causal=True,
    kv_mask="lengths",
    segments="packed",
    softcap=2.0,
    qk_norm="l2",
)


def long_programs(impl, case):
    """Forward and gradient of a case, and their arguments."""
    x = case.inputs()

    def forward(q, k, v):
        return attention(q, k, v, impl=impl, **case.keywords(x))

    def gradient(q, k, v):
        return jax.grad(lambda *qkv: jnp.vdot(forward(*qkv), x.do), argnums=(0, 1, 2))(q, k, v)

    return forward, gradient, (x.q, x.k, x.v)


@pytest.mark.parametrize("bias", [None, "bs", "ht"])
def test_blockwise_never_builds_the_matrix(bias):
    case = dataclasses.replace(LONG, bias=bias)
    matrix = case.batch * case.heads * case.q_len * case.kv_len
    forward, gradient, arguments = long_programs("blockwise", case)
    assert largest_intermediate(forward, *arguments) <= matrix / 8
    assert largest_intermediate(gradient, *arguments) <= matrix / 8
    # The control: the same check finds it in the reference.
    forward, gradient, arguments = long_programs("reference", case)
    assert largest_intermediate(forward, *arguments) >= matrix
    assert largest_intermediate(gradient, *arguments) >= matrix


def test_blockwise_compiled_needs_less_memory_than_the_matrix():
    matrix_bytes = 4 * LONG.heads * LONG.q_len * LONG.kv_len
    needed = {}
    for impl in ("blockwise", "reference"):
        _, gradient, arguments = long_programs(impl, LONG)
        memory = jax.jit(gradient).lower(*arguments).compile().memory_analysis()
        assert memory is not None
        needed[impl] = memory.temp_size_in_bytes
    assert needed["blockwise"] < 0.75 * matrix_bytes < matrix_bytes <= needed["reference"]


@pytest.mark.parametrize("keys, scans", [(128, 0), (129, 1)])
def test_one_block_is_computed_without_a_loop(keys, scans):
    q, k = jnp.ones((1, 8, 1, 4)), jnp.ones((1, keys, 1, 4))
    jaxpr = jax.make_jaxpr(functools.partial(attention, impl="blockwise", scale=1.0))(q, k, k)
    assert sum(eqn.primitive.name == "scan" for eqn in equations(jaxpr)) == scans
