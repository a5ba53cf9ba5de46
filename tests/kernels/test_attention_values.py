"""Every implementation, over every case: the right value and the right gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import allowed_keys, cast, differences, oracle, rms_error, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxablate_kernels import attention, implementations
from jaxablate_kernels.attention import blockwise
from jaxablate_kernels.attention.cases import CASES, PAPER, Case

pytestmark = pytest.mark.filterwarnings("error")

BY_NAME = {case.name: case for case in CASES}
FLOAT32 = tuple(case for case in CASES if case.dtype == "float32")
LOW = tuple(case for case in CASES if case.dtype != "float32")
OTHERS = tuple(name for name in implementations("attention") if name != "reference")
# Of the paper's shapes those that differ in what low precision sees, and the smallest reductions.
LOW_PRECISION = ("ctclip_spatial_bias", "bert_base", "grouped", "head_dim_80")

# The shapes of the papers are compiled as users do.  Computed once: three tests look at the results.
results = functools.cache(lambda case, impl: run(case, impl, fast_compile=case not in PAPER))
truth = functools.cache(lambda case: oracle(case))

each_case = pytest.mark.parametrize("case", FLOAT32, ids=lambda case: case.name)


def test_case_names_are_unique_and_cover_the_papers():
    assert len(BY_NAME) == len(CASES)
    shapes = {(c.q_len, c.heads, c.head_dim, c.causal) for c in PAPER}
    assert shapes >= {(576, 8, 32, False), (24, 8, 32, False), (256, 16, 32, True), (512, 12, 64, False)}


def test_case_inputs_are_the_same_each_time():
    first, second = BY_NAME["grouped"].inputs(), BY_NAME["grouped"].inputs()
    assert np.array_equal(first.q, second.q)
    assert not np.array_equal(first.k, first.v)


@each_case
def test_reference_equals_numpy_oracle(case):
    assert differences(results(case, "reference"), truth(case)) == {}


@pytest.mark.parametrize("impl", OTHERS)
@each_case
def test_equals_reference(case, impl):
    assert differences(results(case, impl), results(case, "reference")) == {}


@pytest.mark.parametrize("impl", implementations("attention"))
@each_case
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
    assert {"more_queries", "empty_sequence", "empty_sequence_causal"} <= blind


@pytest.mark.parametrize("impl", OTHERS)
@pytest.mark.parametrize(
    "case",
    [*(dataclasses.replace(BY_NAME[name], dtype="bfloat16") for name in LOW_PRECISION), *LOW],
    ids=lambda case: f"{case.name}-{case.dtype}",
)
def test_low_precision_is_as_accurate_as_the_reference(case, impl):
    """Root mean square error against float64 on the same rounded inputs; the maximum has outliers."""
    expected = truth(case)
    mine, reference = results(case, impl), results(case, "reference")
    for (name, e), (_, a), (_, r) in zip(expected.items(), mine.items(), reference.items(), strict=True):
        assert a.dtype == r.dtype == jnp.dtype(case.dtype), name
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


def causal_off_by_one(q, k, v, *, causal, kv_mask, bias, scale):
    del causal
    t, s = q.shape[1], k.shape[1]
    late = jnp.arange(s)[None, :] > jnp.arange(t)[:, None] + (s - t) + 1
    hidden = jnp.where(late, -jnp.inf, 0.0)[None, None].astype(q.dtype)
    bias = hidden if bias is None else bias + hidden
    return attention(q, k, v, impl="reference", kv_mask=kv_mask, bias=bias, scale=scale)


def causal_top_left(q, k, v, *, causal, kv_mask, bias, scale):
    del causal
    late = jnp.arange(k.shape[1])[None, :] > jnp.arange(q.shape[1])[:, None]
    hidden = jnp.where(late, -jnp.inf, 0.0)[None, None].astype(q.dtype)
    bias = hidden if bias is None else bias + hidden
    return attention(q, k, v, impl="reference", kv_mask=kv_mask, bias=bias, scale=scale)


def without_scale(q, k, v, *, causal, kv_mask, bias, scale):
    del scale
    return attention(q, k, v, impl="reference", causal=causal, kv_mask=kv_mask, bias=bias, scale=1.0)


def swapped_keys_and_values(q, k, v, **arguments):
    return attention(q, v, k, impl="reference", **arguments)


def without_bias(q, k, v, *, bias, **arguments):
    return attention(q, k, v, impl="reference", **arguments) + 0.0 * jnp.sum(bias)


def heads_interleaved(q, k, v, **arguments):
    """Head h reads key/value head h mod K instead of h // G."""
    batch, t, heads, d = q.shape
    kv_heads = k.shape[2]

    def swap(x, outer, inner):
        return x.reshape(batch, t, outer, inner, d).swapaxes(2, 3).reshape(batch, t, heads, d)

    arguments["bias"] = None
    o = attention(swap(q, heads // kv_heads, kv_heads), k, v, impl="reference", **arguments)
    return swap(o, kv_heads, heads // kv_heads)


@pytest.mark.parametrize(
    "wrong, name, noticed_in",
    [
        (causal_off_by_one, "length_129", {"o", "dq", "dk", "dv"}),
        (causal_top_left, "more_keys", {"o", "dq", "dk", "dv"}),
        (without_scale, "burgers_128", {"o", "dq", "dk", "dv"}),
        (swapped_keys_and_values, "burgers_128", {"o", "dq", "dk", "dv"}),
        (without_bias, "length_100", {"o", "dq", "dk", "dv", "dbias"}),
    ],
)
def test_comparison_notices(wrong, name, noticed_in):
    """The negative controls of the comparison that the tests above rely on."""
    case = BY_NAME[name]
    assert set(differences(run(case, wrong), results(case, "reference"))) == noticed_in


def test_comparison_notices_heads_read_in_the_wrong_order():
    case = dataclasses.replace(BY_NAME["grouped"], bias=None)
    found = differences(run(case, heads_interleaved), truth(case))
    assert set(found) == {"o", "dq", "dk", "dv"}


def test_comparison_notices_a_relative_error_of_a_ten_thousandth():
    case = BY_NAME["burgers_128"]
    right = results(case, "reference")
    assert set(differences(dataclasses.replace(right, dk=right.dk * 1.0001), right)) == {"dk"}


@st.composite
def any_case(draw):
    kv_heads = draw(st.sampled_from((1, 2, 3)))
    return Case(
        name=f"drawn_{draw(st.integers(0, 10**6))}",
        q_len=draw(st.integers(1, 70)),
        kv_len=draw(st.integers(1, 70)),
        heads=kv_heads * draw(st.sampled_from((1, 2, 3))),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from((1, 3, 8, 12))),
        batch=draw(st.integers(1, 3)),
        causal=draw(st.booleans()),
        kv_mask=draw(st.sampled_from(("none", "lengths", "random", "empty"))),
        bias=draw(st.sampled_from((None, "bhts", "hts", "bs", "bh", "t", "s", ""))),
    )


@settings(
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(case=any_case(), block_k=st.integers(1, 80))
def test_blockwise_equals_oracle_for_any_shape_and_block(case, block_k):
    impl = functools.partial(blockwise.attention, config=blockwise.Config(block_k))
    assert differences(run(case, impl), oracle(case)) == {}


@pytest.mark.parametrize("name", ["empty_sequence", "more_queries_blocks"])
def test_blockwise_is_the_same_formula_as_reference_in_float64(name):
    """What is left of a difference in float64 is no rounding error."""
    with jax.enable_x64(True):
        case = dataclasses.replace(BY_NAME[name], dtype="float64")
        inputs = cast(case.inputs(), jnp.float64)
        mine, reference = run(case, "blockwise", inputs), run(case, "reference", inputs)
        assert mine.o.dtype == np.float64
        assert differences(mine, reference, tolerance=1e-13) == {}
        assert differences(reference, oracle(case, inputs), tolerance=1e-13) == {}
