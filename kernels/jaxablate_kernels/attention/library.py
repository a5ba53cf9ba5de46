"""What the adapters to other libraries' attentions share: our masks in their terms, and our zeros in their results.

Other libraries mask with a large negative number, so that a query which may see nothing gets the mean of all
values, and their gradient.  Ours gives zeros.  And they have no batching rule, or one that holds only if all
arrays have the axis: `mapped_alike`.
"""

from typing import Any

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


@jax.custom_vjp
def mapped_alike(arrays: Any) -> Any:
    """The same arrays; under `jax.vmap` those without the mapped axis get it too, as their first.

    So does the gradient on its way back.  Not under vmap this is nothing.

    Args:
        arrays: a tree of floating arrays.
    """
    return _mapped_alike(arrays)


def _mapped_alike_fwd(arrays):
    # One entry of each says in the backward pass what is mapped.
    return _mapped_alike(arrays), jax.tree.map(lambda x: x[(slice(1),) * x.ndim], arrays)


def _mapped_alike_bwd(entries, cotangents):
    return (_mapped_alike((cotangents, entries))[0],)


mapped_alike.defvjp(_mapped_alike_fwd, _mapped_alike_bwd)


@jax.custom_batching.custom_vmap
def _mapped_alike(arrays):
    return arrays


@_mapped_alike.def_vmap
def _mapped_alike_rule(axis_size, is_mapped, arrays):
    def with_axis(x, has):
        return x if has else jnp.broadcast_to(x, (axis_size, *x.shape))

    arrays = jax.tree.map(with_axis, arrays, is_mapped[0])
    # For a vmap around this one.
    return _mapped_alike(arrays), jax.tree.map(lambda _: True, arrays)
