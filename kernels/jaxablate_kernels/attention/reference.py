"""Attention as it is written on paper: the T x S matrix in memory, gradients by autodiff.

The oracle of the other implementations, and the baseline ("standard") arm of a speed ablation.
"""

import functools

import jax
import jax.numpy as jnp

from jaxablate_kernels.attention.prologue import prepare
from jaxablate_kernels.attention.spec import (
    Bias,
    Key,
    KeyMask,
    QkNorm,
    Query,
    Rotary,
    SegmentIds,
    supports_by_xla,
)
from jaxablate_kernels.dispatch import Implementation
from jaxablate_kernels.dtypes import accurate_dtype


# The name of this function is the kernel name: jit puts it in the jaxpr and the lowered text, and
# autodiff keeps it on both halves of the gradient.
@functools.partial(jax.jit, static_argnames=("causal", "scale", "softcap"))
def attention_reference(
    q: Query,
    k: Key,
    v: Key,
    *,
    causal: bool = False,
    kv_mask: KeyMask | None = None,
    segment_ids: SegmentIds | None = None,
    bias: Bias | None = None,
    scale: float,
    softcap: float | None = None,
    qk_norm: QkNorm | None = None,
    rotary: Rotary | None = None,
) -> Query:
    """Attention with the whole (B, H, T, S) matrix of probabilities in memory.

    Arguments and result as in `jaxablate_kernels.attention`, which checks them; `bias` has rank 4.
    """
    q, k = prepare(q, k, qk_norm, rotary)
    batch, q_len, heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    accurate = accurate_dtype(q.dtype)

    q_BxTxKxGxD = q.reshape(batch, q_len, kv_heads, heads // kv_heads, head_dim)
    logits = jnp.einsum("btkgd,bskd->bkgts", q_BxTxKxGxD, k, preferred_element_type=accurate) * scale
    logits_BxHxTxS = logits.reshape(batch, heads, q_len, kv_len)
    if softcap is not None:
        logits_BxHxTxS = softcap * jnp.tanh(logits_BxHxTxS / softcap)
    if bias is not None:
        logits_BxHxTxS = logits_BxHxTxS + bias.astype(accurate)
    if kv_mask is not None:
        logits_BxHxTxS = jnp.where(kv_mask[:, None, None, :], logits_BxHxTxS, -jnp.inf)
    if segment_ids is not None:
        own_BxTxS = segment_ids.q[:, :, None] == segment_ids.kv[:, None, :]
        logits_BxHxTxS = jnp.where(own_BxTxS[:, None], logits_BxHxTxS, -jnp.inf)
    if causal:
        last_seen = jnp.arange(q_len)[:, None] + (kv_len - q_len)
        seen_TxS = jnp.arange(kv_len)[None, :] <= last_seen
        logits_BxHxTxS = jnp.where(seen_TxS[None, None], logits_BxHxTxS, -jnp.inf)

    # The softmax does not depend on the shift, so neither does its gradient.  A finite shift keeps
    # -inf - (-inf) out of rows that see nothing: there every weight is exp(-inf) = 0, and so is the sum.
    shift = jnp.max(jax.lax.stop_gradient(logits_BxHxTxS), axis=-1, keepdims=True)
    shift = jnp.maximum(shift, jnp.finfo(accurate).min)
    weights = jnp.exp(logits_BxHxTxS - shift)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    p_BxHxTxS = weights / jnp.where(total == 0, jnp.ones_like(total), total)

    p_BxKxGxTxS = p_BxHxTxS.reshape(batch, kv_heads, heads // kv_heads, q_len, kv_len).astype(v.dtype)
    o = jnp.einsum("bkgts,bskd->btkgd", p_BxKxGxTxS, v, preferred_element_type=accurate)
    return o.reshape(batch, q_len, heads, head_dim).astype(q.dtype)


IMPLEMENTATION = Implementation(
    op="attention",
    name="reference",
    kernel_name="attention_reference",
    supports=supports_by_xla,
    call=attention_reference,
)
