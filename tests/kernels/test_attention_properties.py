"""What must hold for every implementation, whatever the numbers: masks, order, transformations, memory."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import FAST_COMPILE, differences, run
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxablate_kernels import attention, implementations
from jaxablate_kernels.attention import blockwise
from jaxablate_kernels.attention.cases import CASES, Case
from jaxablate_kernels.dispatch import equations

pytestmark = pytest.mark.filterwarnings("error")

each_implementation = pytest.mark.parametrize("impl", implementations("attention"))

# Two blocks of keys, so that what happens between blocks is seen too.
CAUSAL = Case("property_causal", 150, 150, 4, 2, 16, batch=2, causal=True, bias="hts")
FULL = Case("property_full", 60, 150, 4, 2, 16, batch=2, kv_mask="random", bias="bhts")


def outputs(case, impl, x, **changes):
    """The output alone, with some of the inputs changed."""
    x = dataclasses.replace(x, **changes)
    return np.asarray(compiled(impl, case.causal, case.scale)(x.q, x.k, x.v, kv_mask=x.kv_mask, bias=x.bias))


@functools.cache
def compiled(impl, causal, scale):
    """One jit for all tests, so that a shape is compiled once."""
    f = functools.partial(attention, impl=impl, causal=causal, scale=scale)
    return jax.jit(f, compiler_options=FAST_COMPILE)


@each_implementation
@pytest.mark.parametrize("changed", [70, 75, 149])
def test_a_later_key_changes_nothing_before_it(impl, changed):
    x = CAUSAL.inputs()
    before = outputs(CAUSAL, impl, x)
    after = outputs(CAUSAL, impl, x, k=x.k.at[:, changed].add(3.0), v=x.v.at[:, changed].add(3.0))
    assert np.array_equal(before[:, :changed], after[:, :changed])  # to the bit
    assert np.all(np.any(before[:, changed:] != after[:, changed:], axis=(2, 3)))


@each_implementation
def test_a_masked_key_changes_nothing_and_a_visible_one_does(impl):
    x = FULL.inputs()
    assert x.kv_mask is not None
    before = outputs(FULL, impl, x)
    for seen in (False, True):
        where = (x.kv_mask == seen)[:, :, None, None]
        after = outputs(FULL, impl, x, k=jnp.where(where, 1e4, x.k), v=jnp.where(where, -1e4, x.v))
        assert np.array_equal(before, after) is not seen


@each_implementation
def test_order_of_keys_does_not_matter_and_order_of_queries_carries_over(impl):
    x = FULL.inputs()
    assert x.kv_mask is not None
    assert x.bias is not None
    before = outputs(FULL, impl, x)
    rng = np.random.default_rng(0)
    keys, queries = rng.permutation(FULL.kv_len), rng.permutation(FULL.q_len)
    moved = {"k": x.k[:, keys], "v": x.v[:, keys], "kv_mask": x.kv_mask[:, keys], "bias": x.bias[..., keys]}
    np.testing.assert_allclose(outputs(FULL, impl, x, **moved), before, atol=2e-6)
    turned = outputs(FULL, impl, x, q=x.q[:, queries], bias=x.bias[:, :, queries])
    np.testing.assert_allclose(turned, before[:, queries], atol=2e-6)
    # The control: keys moved without their values give something else.
    assert np.abs(outputs(FULL, impl, x, k=x.k[:, keys]) - before).max() > 0.1


@each_implementation
def test_a_bias_shared_by_all_keys_changes_nothing(impl):
    x = FULL.inputs()
    assert x.bias is not None
    raised = outputs(FULL, impl, x, bias=x.bias + 40.0)
    np.testing.assert_allclose(raised, outputs(FULL, impl, x), atol=2e-5)  # eps * 40 in the logits


@each_implementation
def test_bias_of_minus_infinity_is_a_mask(impl):
    case = dataclasses.replace(FULL, kv_mask="empty")
    x = case.inputs()
    assert x.kv_mask is not None
    hidden = jnp.where(x.kv_mask, 0.0, -jnp.inf)[:, None, None, :]
    by_mask = run(dataclasses.replace(case, bias=None), impl, dataclasses.replace(x, bias=None))
    by_bias = run(
        dataclasses.replace(case, bias="bs"), impl, dataclasses.replace(x, bias=hidden, kv_mask=None)
    )
    assert np.all(by_bias.o[-1] == 0)
    assert by_bias.dbias is not None
    assert np.all(np.isfinite(by_bias.dbias))
    assert differences(dataclasses.replace(by_bias, dbias=None), by_mask) == {}


@each_implementation
@pytest.mark.parametrize("size", [1e-20, 1e18])
def test_extreme_logits_give_no_nan(impl, size):
    """Logits up to 1e36: the softmax is one-hot, and its gradient zero; nothing overflows on the way."""
    case = dataclasses.replace(CAUSAL, bias=None)
    x = case.inputs()
    r = run(case, impl, dataclasses.replace(x, q=x.q * size, k=x.k * size))
    assert all(np.all(np.isfinite(a)) for _, a in r.items())


@each_implementation
def test_nan_in_stays_visible(impl):
    """A diverged run must show: masking must not turn NaN into zero."""
    x = FULL.inputs()
    assert np.all(np.isnan(outputs(FULL, impl, x, q=x.q.at[0, 3, 1, 0].set(jnp.nan))[0, 3, 1]))


@each_implementation
def test_gradients_are_those_of_the_function(impl):
    """Against finite differences, in float64."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # check_grads promotes
        case = Case("gradients", 5, 7, 2, 1, 3, dtype="float64", causal=True, kv_mask="lengths", bias="hs")
        x = case.inputs()
        function = (
            blockwise_in_blocks_of_3 if impl == "blockwise" else functools.partial(attention, impl=impl)
        )

        def f(q, k, v, bias):
            q, k, v, bias = map(jnp.asarray, (q, k, v, bias))  # check_grads passes numpy arrays
            return function(q, k, v, causal=True, kv_mask=x.kv_mask, bias=bias, scale=case.scale)

        check_grads(f, (x.q, x.k, x.v, x.bias), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)
        with pytest.raises(AssertionError):  # the control: a gradient that is wrong by a thousandth
            check_grads(off_by_a_thousandth(f), (x.q, x.k, x.v, x.bias), order=1, modes=["rev"], rtol=1e-7)


def blockwise_in_blocks_of_3(*arrays, **arguments):
    return blockwise.attention(*arrays, **arguments, config=blockwise.Config(block_k=3))


def off_by_a_thousandth(f):
    @jax.custom_vjp
    def wrong(*arguments):
        return f(*arguments)

    def forward(*arguments):
        return jax.vjp(f, *arguments)

    def backward(pullback, do):
        return jax.tree.map(lambda g: 1.001 * g, pullback(do))

    wrong.defvjp(forward, backward)
    return wrong


@each_implementation
def test_vmap_is_a_loop(impl):
    """Over members of a cohort: own arrays and mask, a shared bias; value and gradients."""
    case = Case("vmap", 40, 150, 4, 2, 16, batch=2, causal=True, kv_mask="empty", bias="hts")
    members = [dataclasses.replace(case, name=f"vmap_{i}").inputs() for i in range(3)]
    bias = members[0].bias

    def value_and_gradients(q, k, v, kv_mask, do, bias):
        def f(q, k, v, bias):
            return attention(q, k, v, impl=impl, causal=True, kv_mask=kv_mask, bias=bias, scale=case.scale)

        o, pullback = jax.vjp(f, q, k, v, bias)
        return o, *pullback(do)

    each = [(x.q, x.k, x.v, x.kv_mask, x.do) for x in members]
    stacked = [jnp.stack(arrays) for arrays in zip(*each, strict=True)]
    together = jax.jit(
        jax.vmap(value_and_gradients, in_axes=(0,) * 5 + (None,)), compiler_options=FAST_COMPILE
    )(*stacked, bias)
    alone = jax.jit(value_and_gradients, compiler_options=FAST_COMPILE)
    for member, arrays in enumerate(each):
        for a, b in zip(together, alone(*arrays, bias), strict=True):
            np.testing.assert_allclose(a[member], b, atol=5e-6)


@each_implementation
def test_gradient_through_vmap_and_remat(impl):
    """grad of vmap of remat equals the plain gradient."""
    case = Case("remat", 40, 150, 2, 2, 16, batch=3, bias="bhts")
    x = case.inputs()
    assert x.bias is not None

    def one(q, k, v, bias):
        return attention(q[None], k[None], v[None], impl=impl, bias=bias[None], scale=case.scale)[0]

    def loss(q, k, v, bias):
        return jnp.vdot(jax.vmap(jax.checkpoint(one))(q, k, v, bias), x.do)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), compiler_options=FAST_COMPILE)(
        x.q, x.k, x.v, x.bias
    )
    expected = run(case, impl)
    for (name, e), g in zip(expected.items()[1:], gradients, strict=True):
        np.testing.assert_allclose(g, e, atol=5e-6, err_msg=name)


@each_implementation
@pytest.mark.parametrize("members", [0, 2])
def test_shard_map_over_data_with_a_shared_bias(impl, members):
    """The batch is split over devices; the bias's gradient is summed over them.

    Without a cohort JAX checks the types of what varies between devices; with one (vmap over another
    mesh axis) it cannot, see the docstring of `attention`.
    """
    case = Case("shard", 40, 150, 4, 2, 16, batch=4, causal=True, kv_mask="lengths", bias="hts")
    mesh = jax.make_mesh((2, 2), ("data", "member"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    inputs = [dataclasses.replace(case, name=f"shard_{i}").inputs() for i in range(max(members, 1))]

    def call(q, k, v, kv_mask, bias):
        return attention(q, k, v, impl=impl, causal=True, kv_mask=kv_mask, bias=bias, scale=case.scale)

    def loss(function, q, k, v, bias, kv_mask, do):
        return jnp.vdot(function(q, k, v, kv_mask, bias), do)

    rows = P("data")
    each_device = jax.shard_map(
        call, mesh=mesh, in_specs=(rows, rows, rows, rows, P()), out_specs=rows, check_vma=not members
    )
    sharded = functools.partial(loss, each_device)
    gradient = jax.grad(sharded, argnums=(0, 1, 2, 3))
    gradient = jax.vmap(gradient, spmd_axis_name="member") if members else one_at_a_time(gradient)
    each = [(x.q, x.k, x.v, x.bias, x.kv_mask, x.do) for x in inputs]
    together = jax.jit(gradient, compiler_options=FAST_COMPILE)(
        *(jnp.stack(arrays) for arrays in zip(*each, strict=True))
    )
    plain = jax.jit(
        jax.grad(functools.partial(loss, call), argnums=(0, 1, 2, 3)), compiler_options=FAST_COMPILE
    )
    for member, arrays in enumerate(each):
        for a, b in zip(together, plain(*arrays), strict=True):
            assert np.abs(b).max() > 0.01  # there is something to compare
            np.testing.assert_allclose(a[member], b, atol=5e-6)


@each_implementation
def test_the_same_bits_each_time_also_when_compiled_again(impl):
    first = run(CAUSAL, impl, fast_compile=False)
    jax.clear_caches()
    again = run(CAUSAL, impl, fast_compile=False)
    for (name, a), (_, b) in zip(first.items(), again.items(), strict=True):
        assert np.array_equal(a, b), name
    for _ in range(5):
        assert np.array_equal(outputs(CAUSAL, impl, CAUSAL.inputs()), outputs(CAUSAL, impl, CAUSAL.inputs()))


def one_at_a_time(f):
    """``vmap`` of one member, without vmap."""
    return lambda *arrays: jax.tree.map(lambda x: x[None], f(*(x[0] for x in arrays)))


def largest_intermediate(f, *arguments) -> int:
    """Elements of the largest array any equation of the program returns, at any depth."""
    return max(
        math.prod(getattr(out.aval, "shape", ()))
        for eqn in equations(jax.make_jaxpr(f)(*arguments))
        for out in eqn.outvars
    )


LONG = Case("memory", 1024, 1024, 2, 2, 32, causal=True, kv_mask="lengths")


def long_programs(impl, case):
    """Forward and gradient of a case, and their arguments."""
    x = case.inputs()

    def forward(q, k, v):
        return attention(q, k, v, impl=impl, causal=True, kv_mask=x.kv_mask, bias=x.bias, scale=case.scale)

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


def test_block_must_hold_a_key():
    with pytest.raises(ValueError, match="block_k must be at least 1, got 0"):
        blockwise.Config(block_k=0)


def test_every_case_is_accepted_by_shape_alone():
    """A plan asks for memory before there are arrays."""
    for case in CASES:
        q = jax.ShapeDtypeStruct((case.batch, case.q_len, case.heads, case.head_dim), case.dtype)
        k = jax.ShapeDtypeStruct((case.batch, case.kv_len, case.kv_heads, case.head_dim), case.dtype)
        for impl in implementations("attention"):
            f = functools.partial(attention, impl=impl, causal=case.causal, scale=case.scale)
            o = jax.eval_shape(f, q, k, k)
            assert (o.shape, o.dtype) == (q.shape, q.dtype)
