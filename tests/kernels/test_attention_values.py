"""Every implementation, over every case: the right value and the right gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import allowed_keys, cast, differences, on_cpu, oracle, rms_error, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxablate_kernels import attention
from jaxablate_kernels.attention import AttentionSpec, SegmentIds, blockwise
from jaxablate_kernels.attention.cases import CASES, LIBRARY, PAPER, Case
from jaxablate_kernels.attention.prologue import normalize, rotate

pytestmark = pytest.mark.filterwarnings("error")

BY_NAME = {case.name: case for case in CASES}
FLOAT32 = tuple(case for case in CASES if case.dtype == "float32")
LOW = tuple(case for case in CASES if case.dtype != "float32")
# Of the paper's shapes those that differ in what low precision sees, and the smallest reductions.
LOW_PRECISION = ("ctclip_spatial", "bert_base", "grouped", "head_dim_80")

# The shapes of the papers are compiled as users do.  Computed once: three tests look at the results.
results = functools.cache(lambda case, impl: run(case, impl, fast_compile=case not in PAPER))
truth = functools.cache(lambda case: oracle(case))


def each_implementation_of(cases, others_than=()):
    """Parameters `case` and `impl`: what takes a case on a CPU."""
    pairs = [(case, impl) for case in cases for impl in on_cpu(case) if impl not in others_than]
    ids = [f"{case.name}-{case.dtype}-{impl}" for case, impl in pairs]
    return pytest.mark.parametrize("case, impl", pairs, ids=ids)


def test_case_names_are_unique_and_cover_the_papers():
    everything = CASES + LIBRARY
    assert len({case.name for case in everything}) == len(everything)
    shapes = {(c.q_len, c.heads, c.head_dim, c.causal, c.qk_norm, c.rotary) for c in PAPER}
    assert shapes >= {
        (576, 8, 32, False, "l2", None),
        (24, 8, 32, False, "l2", None),
        (256, 16, 32, True, None, "adjacent"),
        (128, 6, 32, False, "rms", None),
        (256, 6, 64, False, "rms", None),
        (512, 12, 64, False, None, None),
    }


def test_library_cases_have_one_number_of_tokens_and_one_width():
    assert {(c.batch * c.q_len, c.heads * c.head_dim, c.dtype) for c in LIBRARY} == {
        (16_384, 2048, "bfloat16")
    }
    assert {(c.q_len // 1024, c.head_dim, c.causal) for c in LIBRARY} == {
        (length, dim, causal) for length in (2, 4, 8, 16) for dim in (64, 128) for causal in (True, False)
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_describes_its_inputs(case):
    x = case.inputs()
    assert case.spec == AttentionSpec.of(x.q, x.k, x.v, **case.keywords(x))


def test_case_inputs_are_the_same_each_time():
    first, second = BY_NAME["grouped"].inputs(), BY_NAME["grouped"].inputs()
    assert np.array_equal(first.q, second.q)
    assert not np.array_equal(first.k, first.v)


@pytest.mark.parametrize("case", FLOAT32, ids=lambda case: case.name)
def test_reference_equals_numpy_oracle(case):
    assert differences(results(case, "reference"), truth(case)) == {}


@each_implementation_of(FLOAT32, others_than=("reference",))
def test_equals_reference(case, impl):
    assert differences(results(case, impl), results(case, "reference")) == {}


@each_implementation_of(FLOAT32)
def test_rows_that_see_nothing_are_zero_and_pass_no_gradient(case, impl):
    allowed = allowed_keys(case, case.inputs())
    blind, unseen = ~allowed.any(axis=2), ~allowed.any(axis=1)  # (B, T), (B, S)
    r = results(case, impl)
    assert np.all(r.o[blind] == 0)
    assert np.all(r.dq[blind] == 0)
    assert np.all(r.dk[unseen] == 0)
    assert np.all(r.dv[unseen] == 0)
    assert np.all(np.any(r.o[~blind] != 0, axis=(1, 2)))  # the control: the other rows are not zero
    assert all(np.all(np.isfinite(x)) for _, x in r.items())


def test_some_cases_do_have_rows_that_see_nothing():
    blind = {c.name for c in FLOAT32 if not allowed_keys(c, c.inputs()).any(axis=2).all()}
    assert {"more_queries", "empty_sequence", "empty_sequence_causal", "segments_random"} <= blind


@each_implementation_of(
    [*(dataclasses.replace(BY_NAME[name], dtype="bfloat16") for name in LOW_PRECISION), *LOW],
    others_than=("reference",),
)
def test_low_precision_is_as_accurate_as_the_reference(case, impl):
    """Root mean square error against float64 on the same rounded inputs; the maximum has outliers."""
    expected = truth(case)
    mine, reference = results(case, impl), results(case, "reference")
    for (name, e), (_, a), (_, r) in zip(expected.items(), mine.items(), reference.items(), strict=True):
        own = {"dq_scale": "float32", "dk_scale": "float32", "dbias": case.spec.bias_dtype}
        dtype = own.get(name, case.dtype)
        assert a.dtype == r.dtype == jnp.dtype(dtype), name
        assert rms_error(a, e) <= 1.5 * rms_error(r, e), name


def test_low_precision_check_notices_sums_in_low_precision():
    """The negative control of the test above: the same formula, everything in bfloat16."""
    case = dataclasses.replace(BY_NAME["head_dim_80"], dtype="bfloat16")
    x = case.inputs()
    logits = jnp.einsum("bthd,bshd->bhts", x.q, x.k) * jnp.asarray(case.scale, jnp.bfloat16)
    allowed = jnp.asarray(allowed_keys(case, x))[:, None]
    p = jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf), axis=-1)
    careless = jnp.einsum("bhts,bshd->bthd", p, x.v)
    expected = truth(case).o
    assert rms_error(np.asarray(careless), expected) > 1.5 * rms_error(results(case, "reference").o, expected)


def reference(q, k, v, **arguments):
    return attention(q, k, v, impl="reference", **arguments)


def hidden_by_bias(q, k, v, late, *, bias, causal, **others):
    del causal
    hidden = jnp.where(late, -jnp.inf, 0.0)[None, None].astype(q.dtype)
    return reference(q, k, v, bias=hidden if bias is None else bias + hidden, **others)


def causal_off_by_one(q, k, v, **arguments):
    t, s = q.shape[1], k.shape[1]
    late = jnp.arange(s)[None, :] > jnp.arange(t)[:, None] + (s - t) + 1
    return hidden_by_bias(q, k, v, late, **arguments)


def causal_top_left(q, k, v, **arguments):
    late = jnp.arange(k.shape[1])[None, :] > jnp.arange(q.shape[1])[:, None]
    return hidden_by_bias(q, k, v, late, **arguments)


def without_scale(q, k, v, *, scale, **others):
    del scale
    return reference(q, k, v, scale=1.0, **others)


def swapped_keys_and_values(q, k, v, **arguments):
    return reference(q, v, k, **arguments)


def without_bias(q, k, v, *, bias, **others):
    del bias
    return reference(q, k, v, **others)


def without_segments(q, k, v, *, segment_ids, **others):
    del segment_ids
    return reference(q, k, v, **others)


def segments_of_keys_reversed(q, k, v, *, segment_ids, **others):
    return reference(q, k, v, segment_ids=SegmentIds(segment_ids.q, segment_ids.kv[:, ::-1]), **others)


def without_softcap(q, k, v, *, softcap, **others):
    del softcap
    return reference(q, k, v, **others)


def softcap_by_hand(add_bias):
    """An attention without grouping or causality; `add_bias` has products, bias and cap, and returns logits."""

    def attend(q, k, v, *, kv_mask, bias, scale, softcap, **others):
        assert not others["causal"]
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        products = jnp.einsum("bthd,bshd->bhts", q, k) * scale
        logits = add_bias(products, bias, lambda x: softcap * jnp.tanh(x / softcap))
        p = jax.nn.softmax(jnp.where(kv_mask[:, None, None, :], logits, -jnp.inf), axis=-1)
        return jnp.einsum("bhts,bshd->bthd", p, v)

    return attend


softcap_right = softcap_by_hand(lambda x, bias, cap: cap(x) + bias)
softcap_after_the_bias = softcap_by_hand(lambda x, bias, cap: cap(x + bias))
softcap_without_slope = softcap_by_hand(lambda x, bias, cap: x + jax.lax.stop_gradient(cap(x) - x) + bias)


def other_pairing(q, k, v, *, rotary, **others):
    pairing = "halves" if rotary.pairing == "adjacent" else "adjacent"
    return reference(q, k, v, rotary=dataclasses.replace(rotary, pairing=pairing), **others)


def turned_backwards(q, k, v, *, rotary, **others):
    """Only the queries: turning both backwards is the same function where positions are offsets."""
    cos, sin = rotary.q
    return reference(q, k, v, rotary=dataclasses.replace(rotary, q=(cos, -sin)), **others)


def without_norm(q, k, v, *, qk_norm, **others):
    del qk_norm
    return reference(q, k, v, **others)


def norm_without_scales(q, k, v, *, qk_norm, **others):
    ones = jax.tree.map(jnp.ones_like, qk_norm)
    return reference(q, k, v, qk_norm=ones, **others)


def norm_with_swapped_scales(q, k, v, *, qk_norm, **others):
    """The same function if there are no rotary positions: the logits know the scales' product only."""
    swapped = dataclasses.replace(qk_norm, q_scale=qk_norm.k_scale, k_scale=qk_norm.q_scale)
    return reference(q, k, v, qk_norm=swapped, **others)


def norm_of_the_other_kind(q, k, v, *, qk_norm, **others):
    kind = "rms" if qk_norm.kind == "l2" else "l2"
    return reference(q, k, v, qk_norm=dataclasses.replace(qk_norm, kind=kind), **others)


def norm_after_rotary(q, k, v, *, qk_norm, rotary, **others):
    q = normalize(rotate(q, rotary.q, rotary.pairing), qk_norm.q_scale, qk_norm.kind, qk_norm.eps)
    k = normalize(rotate(k, rotary.k, rotary.pairing), qk_norm.k_scale, qk_norm.kind, qk_norm.eps)
    return reference(q, k, v, **others)


def heads_interleaved(q, k, v, **arguments):
    """Head h reads key/value head h mod K instead of h // G."""
    batch, t, heads, d = q.shape
    kv_heads = k.shape[2]

    def swap(x, outer, inner):
        return x.reshape(batch, t, outer, inner, d).swapaxes(2, 3).reshape(batch, t, heads, d)

    return swap(
        reference(swap(q, heads // kv_heads, kv_heads), k, v, **arguments), kv_heads, heads // kv_heads
    )


ALL = {"o", "dq", "dk", "dv"}
SCALES = {"dq_scale", "dk_scale"}


@pytest.mark.parametrize(
    "wrong, name, noticed_in",
    [
        (causal_off_by_one, "length_129", ALL),
        (causal_top_left, "more_keys", ALL),
        (without_scale, "head_dim_80", ALL),
        (swapped_keys_and_values, "head_dim_80", ALL),
        (without_bias, "length_100", ALL | {"dbias"}),
        (without_segments, "segments_packed", ALL),
        (segments_of_keys_reversed, "segments_random", ALL | {"dbias"}),
        (without_softcap, "softcap", ALL | {"dbias"}),
        (softcap_after_the_bias, "softcap", ALL | {"dbias"}),
        (softcap_right, "softcap", set()),  # the control of the two around it
        (softcap_without_slope, "softcap", {"dq", "dk"}),
        (other_pairing, "rotary_adjacent", ALL),
        (other_pairing, "rotary_halves", ALL),
        (turned_backwards, "rotary_halves", ALL),
        (without_norm, "unit_queries", ALL | SCALES | {"dbias"}),
        (norm_without_scales, "rms_queries", ALL | SCALES),
        (norm_with_swapped_scales, "head_dim_256", ALL | SCALES),
        (norm_of_the_other_kind, "unit_queries", ALL | SCALES | {"dbias"}),
        (norm_after_rotary, "head_dim_256", ALL | SCALES),
    ],
)
def test_comparison_notices(wrong, name, noticed_in):
    """The negative controls of the comparison that the tests above rely on."""
    case = BY_NAME[name]
    assert set(differences(run(case, wrong), results(case, "reference"))) == noticed_in


def test_norm_after_rotary_is_noticed_by_the_learned_scales_alone():
    """Turning keeps lengths: with scales of one, as they are at the start, only their gradients tell."""
    case = dataclasses.replace(BY_NAME["all"], name="norm_after_rotary")
    x = case.inputs()
    x = dataclasses.replace(x, qk_norm=jax.tree.map(jnp.ones_like, x.qk_norm))
    assert set(differences(run(case, norm_after_rotary, x), oracle(case, x))) == SCALES


def test_comparison_notices_heads_read_in_the_wrong_order():
    case = dataclasses.replace(BY_NAME["grouped"], bias=None)
    found = differences(run(case, heads_interleaved), truth(case))
    assert set(found) == {"o", "dq", "dk", "dv"}


def test_comparison_notices_a_relative_error_of_a_ten_thousandth():
    case = BY_NAME["grouped"]
    right = results(case, "reference")
    assert set(differences(dataclasses.replace(right, dk=right.dk * 1.0001), right)) == {"dk"}


@st.composite
def any_case(draw):
    kv_heads = draw(st.sampled_from((1, 2, 3)))
    head_dim = draw(st.sampled_from((1, 3, 8, 12)))
    return Case(
        name=f"drawn_{draw(st.integers(0, 10**6))}",
        q_len=draw(st.integers(1, 70)),
        kv_len=draw(st.integers(1, 70)),
        heads=kv_heads * draw(st.sampled_from((1, 2, 3))),
        kv_heads=kv_heads,
        head_dim=head_dim,
        batch=draw(st.integers(1, 3)),
        causal=draw(st.booleans()),
        kv_mask=draw(st.sampled_from(("none", "lengths", "random", "empty"))),
        bias=draw(st.sampled_from((None, "bhts", "hts", "bs", "bh", "t", "s", ""))),
        segments=draw(st.sampled_from(("none", "packed", "random"))),
        softcap=draw(st.sampled_from((None, 0.5, 3.0))),
        qk_norm=draw(st.sampled_from((None, "rms", "l2"))) if head_dim > 1 else None,
        rotary=draw(st.sampled_from((None, "adjacent", "halves"))) if head_dim % 2 == 0 else None,
    )


@settings(
    max_examples=20,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(case=any_case(), block_k=st.integers(1, 80))
def test_blockwise_equals_oracle_for_any_shape_and_block(case, block_k):
    impl = functools.partial(blockwise.attention, config=blockwise.Config(block_k))
    assert differences(run(case, impl), oracle(case)) == {}


@pytest.mark.parametrize("name", ["more_queries_blocks", "all", "all_other_kinds"])
def test_blockwise_is_the_same_formula_as_reference_in_float64(name):
    """What is left of a difference in float64 is no rounding error."""
    with jax.enable_x64(True):
        case = dataclasses.replace(BY_NAME[name], dtype="float64")
        inputs = cast(case.inputs(), jnp.float64)
        mine, reference = run(case, "blockwise", inputs), run(case, "reference", inputs)
        assert mine.o.dtype == np.float64
        assert differences(mine, reference, tolerance=1e-13) == {}
        assert differences(reference, oracle(case, inputs), tolerance=1e-13) == {}
