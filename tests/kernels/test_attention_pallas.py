"""The attention kernels for GPUs, interpreted on a CPU: values, gradients, transformations, and what they refuse."""

import dataclasses
import functools
import os
import re

import cuda
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import allowed_keys, differences, oracle, rms_error, run
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxablate.xla import quick
from jaxablate_kernels import attention as public_attention
from jaxablate_kernels import kernels_in
from jaxablate_kernels.attention import pallas_blocks, pallas_gpu
from jaxablate_kernels.attention.cases import CASES, LIBRARY, PAPER, Case
from jaxablate_kernels.attention.pallas_config import Config, candidates, heuristic

pytestmark = pytest.mark.filterwarnings("error")

BY_NAME = {case.name: case for case in CASES}
# Small tiles, so that there are several even in a small case.
SHORT = Config("short", 16, 16, 4, 1, 16, 16, 4, 1, prologue="inside")
STREAMING = Config("streaming", 16, 32, 4, 2, 16, 32, 4, 2)
each_path = pytest.mark.parametrize("config", [SHORT, STREAMING], ids=lambda config: config.path)


def pallas(config=None):
    """The implementation, interpreted."""
    return functools.partial(pallas_gpu.attention, config=config, interpret=True)


@st.composite
def any_case(draw):
    kv_heads = draw(st.sampled_from((1, 2)))
    # The wide and the long are slow: one in ten or so.
    head_dim = draw(st.sampled_from((1, 8, 12, 16, 20, 32, 40) * 5 + (64, 80, 128, 256)))
    lengths = st.sampled_from((1, 7, 16, 24, 33, 48, 64, 70, 100) * 4 + (129, 577))
    dtype = draw(st.sampled_from(("float32", "float32", "float32", "bfloat16", "float16")))
    # A bias that all keys share has no gradient but rounding: nothing to compare in low precision.
    keyless = ("bh", "t", "") if dtype == "float32" else ()
    return Case(
        name=f"drawn_{draw(st.integers(0, 10**6))}",
        q_len=draw(lengths),
        kv_len=draw(lengths),
        heads=kv_heads * draw(st.sampled_from((1, 2, 3))),
        kv_heads=kv_heads,
        head_dim=head_dim,
        batch=draw(st.integers(1, 3)),
        dtype=dtype,
        causal=draw(st.booleans()),
        kv_mask=draw(st.sampled_from(("none", "lengths", "random", "empty"))),
        bias=draw(st.sampled_from((None, None, "bhts", "hts", "bts", "bs", "ts", "s", *keyless))),
        segments=draw(st.sampled_from(("none", "none", "packed", "random"))),
        softcap=draw(st.sampled_from((None, None, 2.0))),
        # A single feature of unit length has no gradient but rounding.
        qk_norm=None if head_dim == 1 else draw(st.sampled_from((None, "l2", "rms"))),
        rotary=None if head_dim % 2 else draw(st.sampled_from((None, "adjacent", "halves"))),
    )


@st.composite
def any_config(draw, case):
    tile, warps = st.sampled_from((16, 32, 64)), st.sampled_from((1, 4))
    # Short has all keys in one tile.
    path = "streaming" if case.kv_len > 256 else draw(st.sampled_from(("short", "streaming")))
    return Config(
        path,
        *(draw(tile), draw(tile), draw(warps), 1),
        *(draw(tile), draw(tile), draw(warps), 1),
        heads=draw(st.sampled_from((1, case.kv_heads))) if path == "short" else 1,
        prologue=draw(st.sampled_from(("inside", "outside"))) if path == "short" else "outside",
    )


@settings(
    max_examples=int(os.environ.get("JAXABLATE_CASES", "30")),
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # a smaller case costs minutes of compilation to find
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)
@given(data=st.data())
def test_equals_the_oracle_for_any_problem_and_config(data):
    """Value and all gradients: float32 to 1e-5, lower precision as accurate as the reference to a factor."""
    case = data.draw(any_case())
    config = data.draw(any_config(case))
    expected, mine = oracle(case), run(case, pallas(config))
    if case.dtype == "float32":
        assert differences(mine, expected) == {}
    else:
        assert less_accurate(mine, run(case, "reference"), expected) == {}


def less_accurate(mine, reference, expected) -> dict[str, float]:
    """Where the root mean square error is more than 1.5 times the reference's: name -> times.

    An rms of n values is known to 1 / sqrt(2n) of itself, a ratio of two to 1 / sqrt(n): three times that is
    allowed on top.  An error below a tenth of the type's epsilon counts as that: a gradient that is zero but for
    rounding has no accuracy to compare.
    """
    found = {}
    for (name, e), (_, a), (_, r) in zip(expected.items(), mine.items(), reference.items(), strict=True):
        assert a.dtype == r.dtype
        floor = 0.1 * float(jnp.finfo(mine.o.dtype).eps) * max(1.0, float(np.abs(e).max()))
        times = rms_error(a, e) / max(rms_error(r, e), floor)
        if not times <= 1.5 * (1 + 3 / e.size**0.5):
            found[name] = times
    return found


@pytest.mark.parametrize(
    "name, config",
    [
        ("ctclip_temporal", dataclasses.replace(SHORT, block_q=32, block_q_backward=32, heads=8)),
        ("length_100", SHORT),
        ("length_100", STREAMING),
        ("more_queries", SHORT),
        ("more_queries_blocks", dataclasses.replace(STREAMING, block_q=64, block_k=64)),
        ("head_dim_256", None),
        ("head_dim_80", None),
        ("softcap_577", None),
        ("all", None),
        ("all_one_query", None),
    ],
)
def test_equals_the_oracle_where_others_fail(name, config):
    """Odd lengths in training, T = 100, more queries than keys, head dimensions that are no power of two."""
    case = BY_NAME[name]
    r = results(case, config)
    assert differences(r, truth(case)) == {}
    assert all(np.all(np.isfinite(x)) for _, x in r.items())


results = functools.cache(lambda case, config: run(case, pallas(config)))
truth = functools.cache(oracle)


@each_path
@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_see_nothing_are_zero_and_pass_no_gradient(config, causal):
    name = "empty_sequence_causal" if causal else "empty_sequence"
    case = dataclasses.replace(BY_NAME[name], q_len=60, kv_len=40, bias=None, segments="random")
    allowed = allowed_keys(case, case.inputs())
    blind, unseen = ~allowed.any(axis=2), ~allowed.any(axis=1)  # (B, T), (B, S)
    assert blind.any()
    assert unseen.any()
    r = results(case, config)
    assert np.all(r.o[blind] == 0)
    assert np.all(r.dq[blind] == 0)
    assert np.all(r.dk[unseen] == 0)
    assert np.all(r.dv[unseen] == 0)
    assert np.all(np.any(r.o[~blind] != 0, axis=(1, 2)))  # the control: the other rows are not zero
    assert differences(r, oracle(case)) == {}


def test_few_keys_in_low_precision_are_as_accurate_as_the_reference():
    """Streaming's delta is made of the output before it was rounded; after, dk is twice as far off."""
    case = dataclasses.replace(BY_NAME["length_7"], dtype="bfloat16")
    mine, reference, expected = run(case, pallas(STREAMING)), run(case, "reference"), oracle(case)
    for name in ("dq", "dk", "dbias"):
        own, others = (rms_error(getattr(r, name), getattr(expected, name)) for r in (mine, reference))
        assert own <= 1.25 * others, name


PLAIN = Case("pallas_plain", 40, 50, 2, 1, 16, batch=2, causal=True, kv_mask="lengths", bias="hts")


def causal_off_by_one(q, k, v, *, kv_mask, bias, **arguments):
    last = slice(None, -1)
    return pallas(STREAMING)(
        q, k[:, last], v[:, last], kv_mask=kv_mask[:, last], bias=bias[..., last], **arguments
    )


def without_scale(q, k, v, *, scale, **arguments):
    return pallas(SHORT)(q, k, v, scale=1.0, **arguments)


def wrong_mask(q, k, v, *, kv_mask, **arguments):
    return pallas(STREAMING)(q, k, v, kv_mask=jnp.roll(kv_mask, 1, axis=1), **arguments)


@pytest.mark.parametrize("wrong", [causal_off_by_one, without_scale, wrong_mask])
def test_comparison_notices(wrong):
    """The negative controls of the tests above."""
    assert set(differences(run(PLAIN, wrong), truth(PLAIN))) == {"o", "dq", "dk", "dv", "dbias"}


@each_path
@pytest.mark.parametrize("forgotten", ["inside", "features_inside"])
def test_a_load_beyond_the_end_is_noticed(config, forgotten, monkeypatch):
    """Interpreted, what lies beyond an array is NaN; a kernel without its masks shows it."""
    case = dataclasses.replace(PLAIN, name=f"forgotten_{forgotten}", q_len=41, head_dim=12, bias=None)
    assert differences(run(case, pallas(config)), oracle(case)) == {}
    jax.clear_caches()
    if forgotten == "inside":
        monkeypatch.setattr(pallas_blocks.Span, "inside", lambda span: None)
    else:
        monkeypatch.setattr(pallas_blocks, "features_inside", lambda sizes: None)
    wrong = run(case, pallas(config))
    jax.clear_caches()
    assert any(np.any(np.isnan(x)) for _, x in wrong.items())


def test_blocks_of_keys_that_nobody_sees_are_not_computed():
    """What is in them does not matter, not even NaN: padding at the end is skipped, not masked."""
    case = Case("skipped", 40, 200, 2, 2, 16, batch=2, kv_mask="lengths", bias="hts")
    x = case.inputs()
    visible = jnp.asarray([[70], [33]]) > jnp.arange(200)[None, :]
    x = dataclasses.replace(x, kv_mask=visible)
    poison = (jnp.arange(200) >= 96)[None, :, None, None]  # 70 keys end in a block up to 96
    poisoned = dataclasses.replace(x, k=jnp.where(poison, jnp.nan, x.k), v=jnp.where(poison, jnp.nan, x.v))
    # Less the bias: its gradient is a sum over the whole batch, computed for every tile.
    case, x, poisoned = (
        dataclasses.replace(case, bias=None),
        *(dataclasses.replace(each, bias=None) for each in (x, poisoned)),
    )
    assert differences(run(case, pallas(STREAMING), poisoned), run(case, pallas(STREAMING), x)) == {}
    # The control: in the last block that is seen, it does matter.
    near = dataclasses.replace(x, v=x.v.at[0, 80].set(jnp.nan))
    assert np.isnan(run(case, pallas(STREAMING), near).o[0]).any()


# Everything that has a gradient or a batch axis.
BUSY = Case(
    "pallas_busy",
    20,
    40,
    4,
    2,
    16,
    batch=2,
    causal=True,
    kv_mask="empty",
    bias="hts",
    segments="packed",
    qk_norm="l2",
    rotary="adjacent",
)


def arguments_of(case):
    """The differentiated and the other arguments of a case."""
    x = case.inputs()
    return (x.q, x.k, x.v, x.bias, x.qk_norm), (x.kv_mask, x.segment_ids, x.rotary, x.do)


def call(config, case, differentiated, others):
    """The output, given `arguments_of`."""
    (q, k, v, bias, qk_norm), (kv_mask, segment_ids, rotary, _) = differentiated, others
    return pallas(config)(
        q,
        k,
        v,
        bias=bias,
        qk_norm=qk_norm,
        kv_mask=kv_mask,
        segment_ids=segment_ids,
        rotary=rotary,
        causal=case.causal,
        scale=case.scale,
    )


def value_and_gradients(config, case, differentiated, others, wrap=lambda f: f):
    """The output and the gradients of all that have one."""
    o, pullback = jax.vjp(wrap(lambda each: call(config, case, each, others)), differentiated)
    return o, pullback(others[3])[0]


def compiled(f):
    return jax.jit(f, compiler_options=quick())


def assert_close(actual, expected, tolerance=5e-6):
    """To a share of the largest entry of each array, at least of 1."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        largest = np.abs(e).max()
        assert largest > 0.01  # there is something to compare
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(1.0, largest))


@each_path
def test_vmap_is_a_loop(config):
    """Over members of a cohort, which share the bias; value and gradients."""
    members = [arguments_of(dataclasses.replace(BUSY, name=f"pallas_vmap_{i}")) for i in range(2)]
    shared = members[0][0][3]
    members = [((*own[:3], shared, own[4]), others) for own, others in members]
    f = functools.partial(value_and_gradients, config, BUSY)
    stacked, others = jax.tree.map(lambda *x: jnp.stack(x), *members)
    together = compiled(jax.vmap(f, in_axes=((0, 0, 0, None, 0), 0)))(
        (*stacked[:3], shared, stacked[4]), others
    )
    alone = compiled(f)
    for i, member in enumerate(members):
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone(*member))


@each_path
def test_remat_changes_nothing(config):
    f = functools.partial(value_and_gradients, config, BUSY)
    again = functools.partial(value_and_gradients, config, BUSY, wrap=jax.checkpoint)
    own, others = arguments_of(BUSY)
    assert_close(compiled(again)(own, others), compiled(f)(own, others))


@pytest.mark.alone
@each_path
def test_shard_map_over_data_members_and_heads(config):
    """On eight devices, a cohort by vmap: the same as one call, with gradients of what the devices share.

    With check_vma, JAX cannot interpret a kernel; the test below looks at the types.
    """
    mesh = jax.make_mesh((2, 2, 2), ("data", "member", "head"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    in_specs, out_specs = shard_specs()
    sharded = jax.shard_map(
        functools.partial(call, config, BUSY),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )

    def loss(function, own, others):
        return jnp.vdot(function(own, others), others[3])

    members = [arguments_of(dataclasses.replace(BUSY, name=f"pallas_shard_{i}")) for i in range(2)]
    gradient = jax.grad(functools.partial(loss, sharded))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    together = compiled(jax.vmap(gradient, spmd_axis_name="member"))(*stacked)
    plain = compiled(jax.grad(functools.partial(loss, functools.partial(call, config, BUSY))))
    for i, member in enumerate(members):
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), plain(*member))


def shard_specs():
    rows, per_head, everywhere = P("data", None, "head"), P(None, "head"), P()
    own = (rows, rows, rows, per_head, everywhere)
    # Packed sequences have a table of positions per sequence.
    return (own, (P("data"), P("data"), P("data"), rows)), rows


@each_path
def test_types_inside_shard_map_are_those_of_the_arguments(config):
    """With check_vma, JAX compares what varies between devices: traced and lowered for a GPU."""
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "head"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    in_specs, out_specs = shard_specs()
    f = functools.partial(pallas_gpu.attention, config=config)

    def on_device(own, others):
        (q, k, v, bias, qk_norm), (kv_mask, segment_ids, rotary, _) = own, others
        return f(
            q,
            k,
            v,
            bias=bias,
            qk_norm=qk_norm,
            kv_mask=kv_mask,
            segment_ids=segment_ids,
            rotary=rotary,
            causal=True,
            scale=1.0,
        )

    sharded = jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    gradient = jax.grad(lambda own, others: jnp.vdot(sharded(own, others), others[3]))
    jaxpr = jax.make_jaxpr(gradient)(*arguments_of(BUSY))
    assert kernels_in(jaxpr) == {"attention_pallas", "attention_pallas_backward"}


@each_path
def test_the_same_bits_each_time_also_when_compiled_again(config):
    f = functools.partial(value_and_gradients, config, BUSY)
    first = compiled(f)(*arguments_of(BUSY))
    jax.clear_caches()
    compiled_again = compiled(f)
    for again in (compiled_again(*arguments_of(BUSY)) for _ in range(2)):
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            assert np.array_equal(a, b)


@each_path
def test_both_halves_lower_for_cuda_by_name(config):
    """Not interpreted: the program for a GPU has both kernels, in every precision."""
    for dtype in ("float32", "bfloat16", "float16"):
        case = dataclasses.replace(BUSY, name="lowered", dtype=dtype)
        x = case.inputs()
        keywords = {**case.keywords(x), "softcap": 3.0}
        del keywords["bias"], keywords["qk_norm"]

        def program(q, k, v, bias, qk_norm, keywords=keywords):
            f = functools.partial(pallas_gpu.attention, config=config, **keywords)
            o, pullback = jax.vjp(
                lambda *own: f(*own[:3], bias=own[3], qk_norm=own[4]), q, k, v, bias, qk_norm
            )
            return o, pullback(o)

        text = cuda.lower(program, x.q, x.k, x.v, x.bias, x.qk_norm)
        assert set(re.findall(r"@(attention\w*?)(?:_\d+)?\(", text)) == {
            "attention_pallas",
            "attention_pallas_backward",
        }
        names = set(re.findall(rf"attention_pallas_{config.path}\w*", text))
        assert f"attention_pallas_{config.path}" in names
        assert {f"attention_pallas_{config.path}_backward_bias"} < names


@pytest.mark.parametrize("case", [*CASES, *LIBRARY], ids=lambda case: case.name)
def test_every_case_has_legal_configs_on_every_device(case):
    """Made without an error, fitting the problem, the heuristic's first, none twice."""
    for device in ("NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200", "cpu"):
        configs = candidates(case.spec, device)
        assert configs[0] == heuristic(case.spec, device)
        assert len(set(configs)) == len(configs)
        assert all(case.kv_heads % config.heads == 0 for config in configs)
        assert "streaming" in {config.path for config in configs}


def test_few_programs_do_not_go_through_many_queries():
    """The short path's backward has a program for each batch row and key/value head, whatever T is."""
    few = Case("long_queries", 16_384, 64, 8, 8, 64, dtype="bfloat16").spec
    for spec, path in (
        (few, "streaming"),
        (dataclasses.replace(few, q_len=512), "short"),
        (dataclasses.replace(few, batch=64), "short"),
    ):
        assert heuristic(spec, "NVIDIA H200").path == path


def test_the_studies_take_the_path_that_is_made_for_them():
    paths = {
        case.name: heuristic(dataclasses.replace(case, dtype="bfloat16").spec, "NVIDIA H200")
        for case in PAPER
    }
    short = {name for name, config in paths.items() if config.path == "short"}
    assert short == {"ctclip_temporal", "tinystories", "burgers_128", "burgers_256"}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dtype": "float64"}, "q, k and v are float64, supported are float32, bfloat16, float16"),
        ({"bias_dtype": "bool"}, r"bias is bool, supported are .* \(use kv_mask for a mask\)"),
        ({"head_dim": 257}, "the head dimension is 257, supported are 1 to 256"),
    ],
)
def test_what_it_does_not_support_is_said_in_one_line(changes, reason):
    spec = dataclasses.replace(PLAIN.spec, **changes)
    found = pallas_gpu.supports(spec, "gpu")
    assert re.fullmatch(reason, found)
    assert pallas_gpu.supports(PLAIN.spec, "gpu") is None
    assert pallas_gpu.supports(PLAIN.spec, "cpu") == "platform is cpu, supported is gpu"


def test_it_is_refused_on_a_cpu_by_name():
    x = PLAIN.inputs()
    with pytest.raises(ValueError, match=r"'pallas' cannot run this: platform is cpu.*choose 'reference'"):
        public_attention(x.q, x.k, x.v, impl="pallas", scale=1.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"block_q": 48}, "block_q must be a power of two from 16 on, got 48"),
        ({"block_k_backward": 8}, "block_k_backward must be a power of two from 16 on, got 8"),
        ({"num_warps": 3}, "num_warps must be 1, 2, 4, 8 or 16, got 3"),
        ({"num_stages_backward": 0}, "num_stages_backward must be at least 1, got 0"),
        ({"path": "streaming"}, "the streaming path has its prologue outside"),
    ],
)
def test_configs_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHORT, **changes)


def test_a_config_that_does_not_fit_the_problem():
    x = PLAIN.inputs()
    with pytest.raises(ValueError, match="heads is 2, which does not divide the 1 key/value heads"):
        pallas(dataclasses.replace(SHORT, heads=2))(x.q, x.k, x.v, scale=1.0)
