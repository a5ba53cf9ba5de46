"""What an attention takes and refuses: shapes alone will do, and what does not fit is one line."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import pytest
from attention_oracle import on_cpu

from jaxablate_kernels import attention
from jaxablate_kernels.attention import AttentionSpec, QkNorm, Rotary, SegmentIds, blockwise
from jaxablate_kernels.attention.cases import PAPER, SMALL

pytestmark = pytest.mark.filterwarnings("error")


def test_a_case_is_accepted_by_shape_alone():
    """A plan asks for memory before there are arrays."""
    everything = [case for case in SMALL if case.name in ("all", "all_other_kinds")]
    for case in (*PAPER, *everything):
        x = case.inputs()
        names = ("kv_mask", "segment_ids", "bias", "qk_norm", "rotary")
        arrays = {name: getattr(x, name) for name in names}
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), ((x.q, x.k, x.v), arrays))
        for impl in on_cpu(case):
            f = functools.partial(
                attention, impl=impl, causal=case.causal, scale=case.scale, softcap=case.softcap
            )
            o = jax.eval_shape(lambda qkv, others, f=f: f(*qkv, **others), *shapes)
            assert (o.shape, o.dtype) == (x.q.shape, x.q.dtype)


def test_block_must_hold_a_key():
    with pytest.raises(ValueError, match="block_k must be at least 1, got 0"):
        blockwise.Config(block_k=0)


# As users have it: only in the tests a type checker looks at the arguments first.
unchecked = inspect.unwrap

IDS, TABLE = jnp.zeros((2, 5), jnp.int32), jnp.ones((5, 4))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            {"segment_ids": SegmentIds(IDS, IDS)},
            r"segment_ids.kv must be int32 of shape \(2, 7\), .* \(2, 5\)",
        ),
        ({"segment_ids": SegmentIds(IDS.astype(jnp.float32), IDS)}, r"segment_ids.q must be int32.*float32"),
        ({"segment_ids": (IDS, IDS)}, "segment_ids must be a SegmentIds, got tuple"),
        ({"softcap": 0}, "softcap must be a positive Python number or None, got 0"),
        ({"softcap": math.inf}, "softcap must be a positive .* got inf"),
        ({"softcap": jnp.ones(())}, "softcap must be a positive Python number"),
        ({"qk_norm": "l2"}, "qk_norm must be a QkNorm, got str"),
        (
            {"qk_norm": QkNorm(jnp.ones(8), jnp.ones(1), "l2", 1e-12)},
            r"qk_norm.k_scale must be floating of shape \(8,\), got float32 of \(1,\)",
        ),
        (
            {"rotary": Rotary((TABLE, TABLE), (TABLE, TABLE), "halves")},
            r"rotary.k must be .*\(7, 4\) or \(2, 7, 4\)",
        ),
        (
            {"rotary": Rotary((TABLE.astype(jnp.bfloat16),) * 2, (TABLE, TABLE), "halves")},
            "rotary.q must be float32, got bfloat16 and bfloat16",
        ),
    ],
)
def test_arguments_that_do_not_fit_raise_in_one_line(wrong, message):
    q, k = jnp.ones((2, 5, 2, 8)), jnp.ones((2, 7, 2, 8))
    rest = {"causal": False, "kv_mask": None, "bias": None, "scale": 1.0}
    with pytest.raises(ValueError, match=message) as caught:
        unchecked(AttentionSpec.of.__func__)(AttentionSpec, q, k, k, **{**rest, **wrong})
    assert "\n" not in str(caught.value)


def test_rotary_needs_pairs_of_features():
    q, table = jnp.ones((2, 5, 2, 3)), jnp.ones((5, 1))
    rotary = Rotary((table, table), (table, table), "halves")
    with pytest.raises(ValueError, match="rotary turns pairs of features, got an odd head dimension 3"):
        attention(q, q, q, impl="reference", scale=1.0, rotary=rotary)


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        (QkNorm, (None, None, "l1", 1e-6), "qk_norm kind must be 'l2' or 'rms', got 'l1'"),
        (QkNorm, (None, None, "l2", 0.0), "qk_norm eps must be from 1e-18 to 1, got 0.0"),
        (Rotary, ((), (), "interleaved"), "rotary pairing must be 'adjacent' or 'halves', got 'interleaved'"),
    ],
)
def test_formulas_have_names(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        unchecked(kind.__init__)(object.__new__(kind), *fields)
