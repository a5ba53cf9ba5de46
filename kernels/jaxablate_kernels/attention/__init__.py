"""Softmax attention: one function, several implementations, one set of cases.

The specification lives in the docstring of `attention`; `reference` is the oracle of the others,
`cases` the shapes that tests and benchmarks share.
"""

from jaxablate_kernels import dispatch
from jaxablate_kernels.attention.spec import (
    AttentionSpec,
    Bias,
    Key,
    KeyMask,
    QkNorm,
    Query,
    Rotary,
    SegmentIds,
)

__all__ = ["AttentionSpec", "QkNorm", "Rotary", "SegmentIds", "attention"]


def attention(
    q: Query,
    k: Key,
    v: Key,
    *,
    impl: str,
    causal: bool = False,
    kv_mask: KeyMask | None = None,
    segment_ids: SegmentIds | None = None,
    bias: Bias | None = None,
    scale: float | int,
    softcap: float | int | None = None,
    qk_norm: QkNorm | None = None,
    rotary: Rotary | None = None,
) -> Query:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1); grouped (Ainslie et al. 2023) if K < H.

        o[b,t,h] = sum_s p[b,h,t,s] v[b,s,h // G],   G = H / K
        p[b,h,t,:] = softmax over the allowed s of  cap(scale * <q'[b,t,h], k'[b,s,h // G]>) + bias[b,h,t,s]
        cap(x) = softcap * tanh(x / softcap),  or x without softcap
        q', k' = q, k after `qk_norm`, then `rotary`

    Which key s a query t may see: all, less those with ``kv_mask[b, s] == False``, less those of another
    segment than its own, less, if `causal`, those with ``s > t + (S - T)``.  The causal diagonal thus
    ends in the bottom right corner of the whole row, whatever its segments (as in FlashAttention since
    2.1, and as decoding with a cache needs): the last query sees the last key.  With T > S the first
    T - S queries see nothing.  A query that sees nothing, be it by mask or by a bias of -inf, gives
    zeros, and passes zero gradient to everything.  No gradient is ever NaN for finite inputs.

    The logits, the softmax and all sums are float32 whatever the inputs are; the matrix products take
    their operands in the input's type, at JAX's default precision (on a GPU, float32 operands may use
    TF32 unless ``jax_default_matmul_precision`` says otherwise).  float64 stays float64.  The same
    program gives the same bits on every call.

    Reverse-mode differentiable in q, k, v, bias and the scales of `qk_norm`, including under vmap, jit,
    remat and shard_map; implementations other than ``reference`` have no forward mode and no second
    derivative.  A cohort, ``jax.vmap(..., spmd_axis_name="member")`` of a shard_map, needs
    ``shard_map(..., check_vma=False)``: JAX (0.10 to 0.12) loses track of varying axes when it batches a
    scan, and refuses right programs.

    Args:
        q: queries (B, T, H, D), float32, bfloat16 or float16.
        k: keys (B, S, K, D), of q's type; H must be a multiple of K.
        v: values (B, S, K, D), of q's type.
        impl: an implementation (``reference``, ``blockwise``), an algorithm (``flash``) or ``auto``; the
            latter two are resolved for `devices.target()`: JAX's first device, or the mesh's.  To compile
            for another, trace inside `devices.compiling_for`.
        causal: mask the keys that come after the query.
        kv_mask: bool (B, S), True where a key may be seen.
        segment_ids: a query sees only the keys of its own segment; see `SegmentIds`.
        bias: added to the scaled and capped logits; any shape that broadcasts to (B, H, T, S), any float
            type.  Its gradient has its own shape and type, summed (in float32) over the broadcast axes.
        scale: a Python number, usually ``D ** -0.5``; a constant of the program.
        softcap: bound of the logits before bias and masks (Gemma 2, arXiv:2408.00118), a positive Python
            number; None for no bound.
        qk_norm: normalise queries and keys; see `QkNorm`.
        rotary: turn queries and keys by their positions; see `Rotary`.

    Returns:
        (B, T, H, D) in q's type.

    Raises:
        ValueError: shapes or types that do not fit together, or an unknown `impl`.
        KernelUnsupported: the named implementation cannot run this problem.
    """
    spec = AttentionSpec.of(
        q,
        k,
        v,
        causal=causal,
        kv_mask=kv_mask,
        segment_ids=segment_ids,
        bias=bias,
        scale=scale,
        softcap=softcap,
        qk_norm=qk_norm,
        rotary=rotary,
    )
    implementation = dispatch.choose("attention", impl, spec)
    if bias is not None and spec.bias is not None:
        bias = bias.reshape(spec.bias)  # implementations see rank 4
    return implementation.call(
        q,
        k,
        v,
        causal=spec.causal,
        kv_mask=kv_mask,
        segment_ids=segment_ids,
        bias=bias,
        scale=float(scale),
        softcap=None if softcap is None else float(softcap),
        qk_norm=qk_norm,
        rotary=rotary,
    )
