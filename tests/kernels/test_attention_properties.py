"""What must hold for every implementation, whatever the numbers: masks, order, transformations, memory."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import cast, differences, on_cpu, run
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxablate.xla import quick
from jaxablate_kernels import attention
from jaxablate_kernels.attention import Rotary, SegmentIds, blockwise, pallas_gpu
from jaxablate_kernels.attention.cases import Case
from jaxablate_kernels.attention.pallas_config import Config

pytestmark = pytest.mark.filterwarnings("error")

# Two blocks of keys, so that what happens between blocks is seen too.
CAUSAL = Case(
    "property_causal",
    150,
    150,
    4,
    2,
    16,
    batch=2,
    causal=True,
    bias="hts",
    softcap=2.0,
    qk_norm="l2",
    rotary="adjacent",
)
FULL = Case(
    "property_full", 60, 150, 4, 2, 16, batch=2, kv_mask="random", bias="bhts", softcap=3.0, qk_norm="rms"
)
PLAIN = {"bias": None, "softcap": None, "qk_norm": None, "rotary": None}
EVERYTHING = dataclasses.replace(
    CAUSAL, name="everything", q_len=40, kv_mask="empty", segments="random", softcap=1.0
)

each_implementation = pytest.mark.parametrize("impl", on_cpu(EVERYTHING))

# The kernels for GPUs, interpreted; in few tiles, since each costs time.
KERNELS = [
    pytest.param(functools.partial(pallas_gpu.attention, config=config, interpret=True), id=config.path)
    for config in (
        Config("short", 64, 16, 4, 1, 64, 16, 4, 1, prologue="inside"),
        Config("streaming", 64, 64, 4, 1, 64, 64, 4, 1),
    )
]
each_implementation_and_kernel = pytest.mark.parametrize("impl", [*on_cpu(EVERYTHING), *KERNELS])


def outputs(case, impl, x, **changes):
    """The output alone, with some of the inputs changed."""
    x = dataclasses.replace(x, **changes)
    arrays = case.keywords(x)
    static = tuple((name, arrays.pop(name)) for name in ("causal", "scale", "softcap"))
    return np.asarray(compiled(impl, static)(x.q, x.k, x.v, **arrays))


@functools.cache
def compiled(impl, static):
    """One jit for all tests, so that a shape is compiled once."""
    f = impl if callable(impl) else functools.partial(attention, impl=impl)
    return jax.jit(functools.partial(f, **dict(static)), compiler_options=quick())


@each_implementation_and_kernel
@pytest.mark.parametrize("changed", [70, 75, 149])
def test_a_later_key_changes_nothing_before_it(impl, changed):
    x = CAUSAL.inputs()
    before = outputs(CAUSAL, impl, x)
    after = outputs(CAUSAL, impl, x, k=x.k.at[:, changed].add(3.0), v=x.v.at[:, changed].add(3.0))
    assert np.array_equal(before[:, :changed], after[:, :changed])  # to the bit
    assert np.all(np.any(before[:, changed:] != after[:, changed:], axis=(2, 3)))


@each_implementation_and_kernel
def test_a_masked_key_changes_nothing_and_a_visible_one_does(impl):
    x = FULL.inputs()
    assert x.kv_mask is not None
    before = outputs(FULL, impl, x)
    for seen in (False, True):
        where = (x.kv_mask == seen)[:, :, None, None]
        after = outputs(FULL, impl, x, k=jnp.where(where, 1e4, x.k), v=jnp.where(where, -1e4, x.v))
        assert np.array_equal(before, after) is not seen


@each_implementation_and_kernel
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


@each_implementation_and_kernel
def test_a_bias_shared_by_all_keys_changes_nothing(impl):
    x = FULL.inputs()
    assert x.bias is not None
    raised = outputs(FULL, impl, x, bias=x.bias + 40.0)
    np.testing.assert_allclose(raised, outputs(FULL, impl, x), atol=2e-5)  # eps * 40 in the logits


@each_implementation_and_kernel
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


@each_implementation_and_kernel
@pytest.mark.parametrize("lowest", [float(np.finfo(np.float32).min), -3e38])
def test_a_bias_of_the_lowest_numbers_hides_a_key_but_not_all(impl, lowest):
    """The other way to write a mask: a row that has nothing else sees all its keys alike, it is not blind."""
    case = dataclasses.replace(FULL, **PLAIN, name="lowest", kv_mask="lengths")
    x = case.inputs()
    assert x.kv_mask is not None
    finite = dataclasses.replace(case, bias="bs")
    hidden = jnp.where(x.kv_mask, 0.0, lowest)[:, None, None, :].at[1].set(lowest)
    o = outputs(finite, impl, x, bias=hidden, kv_mask=None)
    np.testing.assert_allclose(o[0], outputs(case, impl, x)[0], atol=2e-6)
    mean = np.repeat(np.mean(x.v[1], axis=0), case.heads // case.kv_heads, axis=0)
    np.testing.assert_allclose(o[1], np.broadcast_to(mean, o[1].shape), atol=2e-6)
    blind = outputs(finite, impl, x, bias=jnp.full_like(hidden, -jnp.inf), kv_mask=None)
    assert not np.any(blind)  # the control


@pytest.mark.parametrize(
    "impl, size",
    [
        *itertools.product(on_cpu(EVERYTHING), (1e-20, 1e18)),
        # Beyond 2^30 the rounding of a logit overflows exp2 in a kernel.
        *(pytest.param(*kernel.values, 1e4, id=kernel.id) for kernel in KERNELS),
    ],
)
@pytest.mark.parametrize(
    "features", [PLAIN, {"bias": None}, {"qk_norm": None}], ids=["plain", "all", "softcap"]
)
def test_extreme_inputs_give_no_nan(impl, features, size):
    """Logits up to 1e36: the softmax is one-hot, and its gradient zero; nothing overflows on the way.

    And no weight is more than 1, in the backward pass neither, whatever the rounding of such logits.
    """
    case = dataclasses.replace(CAUSAL, **features)
    x = case.inputs()
    r = run(case, impl, dataclasses.replace(x, q=x.q * size, k=x.k * size))
    assert all(np.all(np.isfinite(a)) for _, a in r.items())
    group = case.heads // case.kv_heads
    most = np.abs(x.do).reshape(*x.do.shape[:2], -1, group, case.head_dim).sum(axis=(1, 3))  # (B, K, D)
    assert np.all(np.abs(r.dv) <= 1.01 * most[:, None])


@each_implementation_and_kernel
def test_a_packed_sequence_is_as_if_it_were_alone(impl):
    """Value and gradients of two sequences in one row, each with its own positions."""
    case = Case("packed", 150, 150, 4, 2, 16, causal=True, softcap=2.0, rotary="halves")
    x, cut = case.inputs(), 60
    assert x.rotary is not None
    ids = (jnp.arange(150, dtype=jnp.int32) >= cut)[None].astype(jnp.int32)
    positions = jnp.concatenate([jnp.arange(cut), jnp.arange(150 - cut)])
    cos, sin = (table[positions] for table in x.rotary.k)
    rotary = Rotary((cos, sin), (cos, sin), "halves")
    together = run(case, impl, dataclasses.replace(x, segment_ids=SegmentIds(ids, ids), rotary=rotary))

    def alone(part):
        q, k, v, do = (a[:, part] for a in (x.q, x.k, x.v, x.do))
        tables = cos[part], sin[part]
        own = dataclasses.replace(x, q=q, k=k, v=v, do=do, rotary=Rotary(tables, tables, "halves"))
        return run(dataclasses.replace(case, q_len=q.shape[1], kv_len=q.shape[1]), impl, own)

    for part in (slice(0, cut), slice(cut, 150)):
        for (name, a), (_, b) in zip(together.items(), alone(part).items(), strict=True):
            np.testing.assert_allclose(a[:, part], b, atol=5e-6, err_msg=name)
    # The control: without ids the second sequence sees the first.
    leaking = outputs(case, impl, x, rotary=rotary)
    assert np.abs(leaking - together.o)[:, cut:].max() > 0.1
    assert np.array_equal(leaking[:, :cut], together.o[:, :cut])


@each_implementation
def test_rotary_attention_depends_on_the_distance_of_positions_alone(impl):
    case = dataclasses.replace(CAUSAL, **PLAIN)
    x = case.inputs()

    def tables(first):
        angles = (first + np.arange(150))[:, None] * 10.0 ** -np.arange(8)[None, :]
        return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)

    def at(q_first, k_first):
        return outputs(case, impl, x, rotary=Rotary(tables(q_first), tables(k_first), "adjacent"))

    np.testing.assert_allclose(at(777, 777), at(0, 0), atol=5e-6)
    assert np.abs(at(1, 0) - at(0, 0)).max() > 0.1  # the control


@each_implementation
def test_there_is_no_gradient_to_rotary_tables(impl):
    case = dataclasses.replace(CAUSAL, q_len=7, kv_len=7)
    x = case.inputs()

    def loss(rotary):
        return jnp.vdot(attention(x.q, x.k, x.v, impl=impl, **{**case.keywords(x), "rotary": rotary}), x.do)

    both = jax.jit(jax.value_and_grad(loss), compiler_options=quick())
    value, gradients = both(x.rotary)
    assert all(not np.any(g) for g in jax.tree.leaves(gradients))
    backwards = jax.tree.map(jnp.negative, x.rotary)  # negated twice in the product: the same function
    assert both(backwards)[0] == value
    assert both(dataclasses.replace(backwards, k=x.rotary.k))[0] != value  # the control


@each_implementation
def test_softcap_bounds_the_weights(impl):
    """No weight is more than exp(2 softcap) times another, however large the products are."""
    keys = 16
    x = Case("bounded", 9, keys, 1, 1, keys).inputs()
    identity = jnp.eye(keys)[None, :, None, :]  # as values: the output is the weights

    def spread(softcap):
        p = attention(100 * x.q, x.k, identity, impl=impl, scale=1.0, softcap=softcap)
        assert np.allclose(p.sum(axis=-1), 1)
        return float((p.max(axis=-1) / jnp.maximum(p.min(axis=-1), 1e-30)).max())

    assert spread(1) == pytest.approx(math.exp(2), rel=1e-5)
    assert spread(None) > 1e20
    few = attention(x.q, x.k, identity, impl=impl, scale=1.0, softcap=1e4)
    np.testing.assert_allclose(few, attention(x.q, x.k, identity, impl=impl, scale=1.0), atol=1e-5)


@each_implementation
@pytest.mark.parametrize("kind", ["l2", "rms"])
def test_normalised_queries_and_keys_have_no_length(impl, kind):
    case = dataclasses.replace(FULL, name="lengths", qk_norm=kind)
    x = case.inputs()
    longer = outputs(case, impl, x, q=1000 * x.q, k=1000 * x.k)
    np.testing.assert_allclose(longer, outputs(case, impl, x), atol=5e-6)
    plain = dataclasses.replace(case, qk_norm=None)
    assert np.abs(outputs(plain, impl, x, qk_norm=None) - longer).max() > 0.1  # the control


@each_implementation
@pytest.mark.parametrize("kind", ["l2", "rms"])
def test_a_query_of_zeros_has_no_direction_and_a_finite_gradient(impl, kind):
    """What a zero-initialised projection gives at the first step: every key has the same weight."""
    case = dataclasses.replace(FULL, name="zeros", qk_norm=kind, bias=None)
    x = case.inputs()
    r = run(case, impl, dataclasses.replace(x, q=jnp.zeros_like(x.q)))
    assert all(np.all(np.isfinite(a)) for _, a in r.items())
    assert x.kv_mask is not None
    seen = np.asarray(x.kv_mask)[:, :, None, None]
    mean = np.sum(np.asarray(x.v) * seen, axis=1, keepdims=True) / np.sum(seen, axis=1, keepdims=True)
    expected = np.broadcast_to(np.repeat(mean, case.heads // case.kv_heads, axis=2), r.o.shape)
    np.testing.assert_allclose(r.o, expected, atol=2e-6)


@each_implementation_and_kernel
def test_nan_in_stays_visible(impl):
    """A diverged run must show: masking must not turn NaN into zero."""
    x = FULL.inputs()
    assert np.all(np.isnan(outputs(FULL, impl, x, q=x.q.at[0, 3, 1, 0].set(jnp.nan))[0, 3, 1]))


@each_implementation
@pytest.mark.parametrize("qk_norm, rotary", [("l2", "adjacent"), ("rms", "halves")])
def test_gradients_are_those_of_the_function(impl, qk_norm, rotary):
    """Against finite differences, in float64."""
    case = Case(
        "gradients",
        5,
        7,
        2,
        1,
        4,
        dtype="float64",
        causal=True,
        kv_mask="lengths",
        bias="hs",
        segments="random",
        softcap=1.5,
        qk_norm=qk_norm,
        rotary=rotary,
    )
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # check_grads promotes
        x = cast(case.inputs(), jnp.float64)
        function = (
            blockwise_in_blocks_of_3 if impl == "blockwise" else functools.partial(attention, impl=impl)
        )

        @jax.jit
        def f(q, k, v, bias, norm):
            return function(q, k, v, **{**case.keywords(x), "bias": bias, "qk_norm": norm})

        arrays = (x.q, x.k, x.v, x.bias, x.qk_norm)
        check = functools.partial(check_grads, order=1, modes=["rev"], atol=1e-7, rtol=1e-7, eps=1e-5)
        check(f, arrays)
        with pytest.raises(AssertionError):  # the control: a gradient that is wrong by a thousandth
            check(off_by_a_thousandth(f), arrays)


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


def value_and_gradients(impl, case, rotary):
    """Of everything that has a gradient; all other arrays after those, then the cotangent."""

    def both(q, k, v, bias, qk_norm, kv_mask, segment_ids, do):
        def f(q, k, v, bias, qk_norm):
            own = {"bias": bias, "qk_norm": qk_norm, "kv_mask": kv_mask, "segment_ids": segment_ids}
            static = {"causal": case.causal, "scale": case.scale, "softcap": case.softcap}
            return attention(q, k, v, impl=impl, **own, **static, rotary=rotary)

        o, pullback = jax.vjp(f, q, k, v, bias, qk_norm)
        return o, *pullback(do)

    return both


@each_implementation
def test_vmap_is_a_loop(impl):
    """Over members of a cohort: own arrays, masks, segments and norms, a shared bias; value and gradients."""
    members = [dataclasses.replace(EVERYTHING, name=f"vmap_{i}").inputs() for i in range(3)]
    bias = members[0].bias
    both = value_and_gradients(impl, EVERYTHING, members[0].rotary)
    each = [(x.q, x.k, x.v, bias, x.qk_norm, x.kv_mask, x.segment_ids, x.do) for x in members]
    stacked = [*jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)]
    stacked[3] = bias
    axes = tuple(None if i == 3 else 0 for i in range(8))
    together = jax.jit(jax.vmap(both, in_axes=axes), compiler_options=quick())(*stacked)
    alone = jax.jit(both, compiler_options=quick())
    for member, arrays in enumerate(each):
        pairs = zip(jax.tree.leaves(together), jax.tree.leaves(alone(*arrays)), strict=True)
        for a, b in pairs:
            np.testing.assert_allclose(a[member], b, atol=1e-5)


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

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), compiler_options=quick())(x.q, x.k, x.v, x.bias)
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
    case = dataclasses.replace(EVERYTHING, name="shard", batch=4, kv_mask="lengths")
    mesh = jax.make_mesh((2, 2), ("data", "member"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    inputs = [dataclasses.replace(case, name=f"shard_{i}").inputs() for i in range(max(members, 1))]
    rotary = inputs[0].rotary

    def call(q, k, v, bias, qk_norm, kv_mask, segment_ids):
        own = {"bias": bias, "qk_norm": qk_norm, "kv_mask": kv_mask, "segment_ids": segment_ids}
        static = {"causal": case.causal, "scale": case.scale, "softcap": case.softcap}
        return attention(q, k, v, impl=impl, **own, **static, rotary=rotary)

    def loss(function, *arrays):
        *arguments, do = arrays
        return jnp.vdot(function(*arguments), do)

    rows, shared = P("data"), P()
    each_device = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(rows, rows, rows, shared, shared, rows, rows),
        out_specs=rows,
        check_vma=not members,
    )
    gradient = jax.grad(functools.partial(loss, each_device), argnums=(0, 1, 2, 3, 4))
    gradient = jax.vmap(gradient, spmd_axis_name="member") if members else one_at_a_time(gradient)
    each = [(x.q, x.k, x.v, x.bias, x.qk_norm, x.kv_mask, x.segment_ids, x.do) for x in inputs]
    together = jax.jit(gradient, compiler_options=quick())(
        *jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)
    )
    plain = jax.jit(
        jax.grad(functools.partial(loss, call), argnums=(0, 1, 2, 3, 4)), compiler_options=quick()
    )
    for member, arrays in enumerate(each):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(plain(*arrays)), strict=True):
            assert np.abs(b).max() > 0.01  # there is something to compare
            np.testing.assert_allclose(a[member], b, atol=1e-5)


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
    return lambda *arrays: jax.tree.map(lambda x: x[None], f(*jax.tree.map(lambda x: x[0], arrays)))
