"""What the adapters to other libraries' attentions share: our masks in their terms, and our zeros in their results.

Other libraries mask with a large negative number, so that a query which may see nothing gets the mean of all
values, and their gradient.  Ours gives zeros.
"""

import jax
import jax.numpy as jnp

from jaxablate_kernels.attention.spec import Bias, KeyMask, Query, SegmentIds


def key_masks(kv_mask: KeyMask | None, segment_ids: SegmentIds | None) -> jax.Array | None:
    """The mask of keys and that of segments as one, bool and broadcastable to (B, H, T, S); None without."""
    mask = None if kv_mask is None else kv_mask[:, None, None, :]
    if segment_ids is not None:
        same = (segment_ids.q[:, :, None] == segment_ids.kv[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    return mask


def finite(bias: Bias | None) -> Bias | None:
    """The bias with its -inf as a very negative number: a row of -inf would be NaN elsewhere.

    Small enough to be no weight, and large enough to be added to a library's own such number.
    """
    if bias is None:
        return None
    return jnp.maximum(bias, max(float(jnp.finfo(bias.dtype).min) / 4, -(2.0**41)))


def zero_where_blind(
    o: Query, mask: jax.Array | None, bias: Bias | None, kv_len: int, *, causal: bool
) -> Query:
    """The output (B, T, H, D) with zeros for queries that see nothing; then no gradient passes there either.

    Args:
        o: the library's output.
        mask: from `key_masks`.
        bias: as given, rank 4; its -inf hides keys too.
        kv_len: S.
        causal: with T = S, so that every query sees itself unless mask or bias forbid it.
    """
    if mask is None and bias is None:
        return o
    q_len = o.shape[1]
    seen = jnp.ones((1, 1, 1, kv_len), bool) if mask is None else mask
    if bias is not None:
        seen = seen & (bias > -jnp.inf)
    if causal:
        seen = seen & jnp.tri(q_len, kv_len, dtype=bool)[None, None]
    sees_BxTxHx1 = jnp.any(seen, axis=-1, keepdims=True).swapaxes(1, 2)
    return jnp.where(sees_BxTxHx1, o, jnp.zeros_like(o))
