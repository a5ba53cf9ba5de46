"""Attention by online softmax over blocks of keys, in plain XLA: no T x S matrix, on any platform.

Forward: Milakov & Gimelshein 2018 (arXiv:1805.02867), as in FlashAttention (Dao et al. 2022,
arXiv:2205.14135, algorithm 1).  A scan over blocks of keys carries, per query row, the maximum m of
the logits so far, the sum l of exp(logit - m), and the sum of exp(logit - m) v; a block with a larger
maximum rescales what was there.

Backward: recomputation (algorithm 4 there).  Kept from the forward are q, k, v, o and per row the
log-sum-exp of its logits.  With do the cotangent of o, per block of keys

    p = exp(logits - lse),   ds = p * (do v^T - rowsum(do * o)),
    dv = p^T do,   dk = scale ds'^T q,   dq += scale ds' k,   dbias = ds summed over the bias's broadcast axes,

where ds' = ds, or ds (1 - (capped / softcap)^2) with a soft cap, the derivative of its tanh.  QK-norm and
rotary positions come before all that and are differentiated by JAX: q and k above are what comes out of them.

The blocks are visited in order, each key's gradient is written once and each query's is summed in that
order, so the bits do not depend on anything but shapes and inputs.

Layout inside: query rows are (B, K, G*T, D), all queries that share a key/value head in one matrix, so
grouped-query attention is one batched product without repeating k or v; logits are (B, K, G, T, W) with W
the width of a block.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

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
from jaxablate_kernels.manual_axes import match_varying


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        block_k: at most so many keys at a time.  The keys are cut evenly: 129 keys are two blocks of
            72 (15 of them padding), not 128 and 1.

    Raises:
        ValueError: block_k < 1.
    """

    block_k: int = 128

    def __post_init__(self):
        if self.block_k < 1:
            raise ValueError(f"block_k must be at least 1, got {self.block_k}")


def attention(
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
    config: Config = Config(),
) -> Query:
    """Attention holding, beyond inputs and outputs, B*H*T*block_k logits at a time.

    Arguments and result as in `jaxablate_kernels.attention`, which checks them; `bias` has rank 4.
    """
    q, k = prepare(q, k, qk_norm, rotary)
    q_ids, kv_ids = (None, None) if segment_ids is None else segment_ids
    q, k, v, kv_mask, q_ids, kv_ids, bias = match_varying(q, k, v, kv_mask, q_ids, kv_ids, bias)
    static = _Static(causal, scale, softcap, config.block_k)
    return _attention(q, k, v, _Masks(kv_mask, q_ids, kv_ids), bias, static)


class _Static(NamedTuple):
    """What is fixed when the program is compiled."""

    causal: bool
    scale: float
    softcap: float | None
    block_k: int


class _Masks(NamedTuple):
    """What hides keys; None where there is none."""

    kv_mask: jax.Array | None  # bool (B, S)
    q_ids: jax.Array | None  # int32 (B, T)
    kv_ids: jax.Array | None  # int32 (B, S)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, masks: _Masks, bias, static: _Static):
    return attention_blockwise(q, k, v, masks, bias, static)[0]


def _attention_fwd(q, k, v, masks: _Masks, bias, static: _Static):
    o, lse = attention_blockwise(q, k, v, masks, bias, static)
    return o, (q, k, v, masks, bias, o, lse)


def _attention_bwd(static: _Static, residuals, do):
    dq, dk, dv, dbias = attention_blockwise_backward(*residuals, do, static)
    return dq, dk, dv, None, dbias  # masks are bool and int: no gradient


_attention.defvjp(_attention_fwd, _attention_bwd)


# The names of the next two functions are the kernel names: jit puts them in jaxpr and lowered text.
@functools.partial(jax.jit, static_argnames=("static",))
def attention_blockwise(
    q: Query, k: Key, v: Key, masks: _Masks, bias: Bias | None, static: _Static
) -> tuple[Query, jax.Array]:
    """The output (B, T, H, D) and the log-sum-exp (B, K, G, T) of each row, 0 where it sees nothing."""
    sizes = _Sizes.of(q, k, static)
    q_rows = _query_rows(q, sizes)
    blocks, shared = _key_blocks(k, v, masks, bias, sizes)

    rows = (sizes.batch, sizes.kv_heads, sizes.group, sizes.q_len)
    _, m, total, o_rows = match_varying(
        q_rows,
        # Finite, which keeps -inf - (-inf) out of rows that see nothing.
        jnp.full(rows, jnp.finfo(sizes.accurate).min, sizes.accurate),
        jnp.zeros(rows, sizes.accurate),
        jnp.zeros(q_rows.shape, sizes.accurate),
    )

    def fold(state, block: _Block):
        """Add a block of keys to m and l, both (B, K, G, T), and the unnormalised output (B, K, G*T, D)."""
        m_before, total, o_rows = state
        scores = _scores(q_rows, block, sizes, static)
        logits = _logits(scores, block, shared, sizes, static)
        m = jnp.maximum(m_before, jnp.max(logits, axis=-1))
        p = jnp.exp(logits - m[..., None])
        rescale = jnp.exp(m_before - m)
        total = total * rescale + jnp.sum(p, axis=-1)
        o_rows = o_rows * rescale.reshape(*o_rows.shape[:3], 1)
        o_rows = o_rows + _matmul(_as_rows(p, sizes, block.v.dtype), block.v)
        return (m, total, o_rows), None

    (m, total, o_rows), _ = _for_each(fold, (m, total, o_rows), blocks)
    sees_nothing = total == 0
    total = jnp.where(sees_nothing, jnp.ones_like(total), total)
    lse = jnp.where(sees_nothing, jnp.zeros_like(total), m + jnp.log(total))
    o_rows = o_rows / total.reshape(*o_rows.shape[:3], 1)
    return _from_query_rows(o_rows, sizes).astype(q.dtype), lse


@functools.partial(jax.jit, static_argnames=("static",))
def attention_blockwise_backward(
    q: Query,
    k: Key,
    v: Key,
    masks: _Masks,
    bias: Bias | None,
    o: Query,
    lse: jax.Array,
    do: Query,
    static: _Static,
) -> tuple[Query, Key, Key, Bias | None]:
    """The gradients of q, k, v and, if there is one, bias, given the forward's results and do."""
    sizes = _Sizes.of(q, k, static)
    q_rows, o_rows, do_rows = (_query_rows(x, sizes) for x in (q, o, do))
    blocks, shared = _key_blocks(k, v, masks, bias, sizes)
    along = (sizes.batch, sizes.kv_heads, sizes.group, sizes.q_len, 1)
    delta = jnp.sum(do_rows.astype(sizes.accurate) * o_rows.astype(sizes.accurate), axis=-1).reshape(along)

    _, dq_rows, dshared = match_varying(
        q_rows,
        jnp.zeros(q_rows.shape, sizes.accurate),
        None if shared.bias is None else jnp.zeros(shared.bias.shape, sizes.accurate),
    )

    def add(state, block: _Block):
        """Add a block's share to the sums over keys; return the gradients of its own keys."""
        dq_rows, dshared = state
        scores = _scores(q_rows, block, sizes, static)
        logits = _logits(scores, block, shared, sizes, static)
        p = jnp.exp(logits - lse[..., None])  # a row that sees nothing: exp(-inf - 0) = 0
        dp = _matmul(do_rows, block.v, transpose_right=True).reshape(logits.shape)
        ds = p * (dp - delta)
        ds_rows = _as_rows(_through_softcap(ds, scores, static), sizes, q.dtype)
        dv = _matmul(_as_rows(p, sizes, do.dtype), do_rows, transpose_left=True)
        dk = _matmul(ds_rows, q_rows, transpose_left=True) * static.scale
        own = dk.astype(k.dtype), dv.astype(v.dtype), _sum_to(ds, block.bias)
        dq_rows = dq_rows + _matmul(ds_rows, block.k)
        if shared.bias is not None:
            dshared = dshared + _sum_to(ds, shared.bias.astype(sizes.accurate))
        return (dq_rows, dshared), own

    (dq_rows, dshared), (dk, dv, dbias_blocks) = _for_each(add, (dq_rows, dshared), blocks)
    dbias = None
    if bias is not None:
        dbias = dshared if shared.bias is not None else _join(dbias_blocks, 4, sizes)
        dbias = dbias.reshape(bias.shape).astype(bias.dtype)
    return (
        _from_query_rows(dq_rows * static.scale, sizes).astype(q.dtype),
        _join(dk, 2, sizes).swapaxes(1, 2),
        _join(dv, 2, sizes).swapaxes(1, 2),
        dbias,
    )


def _for_each(body, state, blocks: "_Block") -> tuple[Any, Any]:
    """`lax.scan` of ``body(state, block) -> (state, result)``, without a loop if there is one block.

    The state must not be a mere constant where the results are none: inside a shard_map the loop would
    change its type, see `match_varying`.
    """
    if blocks.start.shape[0] > 1:
        return jax.lax.scan(body, state, blocks)
    state, result = body(state, jax.tree.map(lambda x: x[0], blocks))
    return state, jax.tree.map(lambda x: x[None], result)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    batch: int
    q_len: int
    kv_len: int
    kv_heads: int
    group: int  # G, query heads per key/value head
    head_dim: int
    count: int  # blocks of keys
    width: int  # keys in a block
    accurate: Any  # the dtype of logits, softmax and sums

    @classmethod
    def of(cls, q, k, static: _Static) -> "_Sizes":
        batch, q_len, heads, head_dim = q.shape
        kv_len, kv_heads = k.shape[1:3]
        count = -(-kv_len // static.block_k)
        width = -(-kv_len // count)
        if count > 1:  # whole vectors, where that is not more than was asked for
            width = min(-(-width // 8) * 8, static.block_k)
            count = -(-kv_len // width)
        group, accurate = heads // kv_heads, accurate_dtype(q.dtype)
        return cls(batch, q_len, kv_len, kv_heads, group, head_dim, count, width, accurate)

    @property
    def padding(self) -> int:
        return self.count * self.width - self.kv_len


class _Block(NamedTuple):
    """A block of W keys; all blocks together have one more axis in front."""

    start: jax.Array  # index of its first key
    k: jax.Array  # (B, K, W, D)
    v: jax.Array  # (B, K, W, D)
    kv_mask: jax.Array | None  # (B, W)
    kv_ids: jax.Array | None  # (B, W)
    bias: jax.Array | None  # (b, k, g, t, W), if there is one with a value per key


class _Shared(NamedTuple):
    """What all blocks share."""

    q_ids: jax.Array | None  # (B, T)
    bias: jax.Array | None  # (b, k, g, t, 1), if there is one without a value per key


def _query_rows(x, sizes: _Sizes):
    """(B, T, H, D) -> (B, K, G*T, D)."""
    x = x.reshape(sizes.batch, sizes.q_len, sizes.kv_heads, sizes.group, sizes.head_dim)
    x = x.transpose(0, 2, 3, 1, 4)
    return x.reshape(sizes.batch, sizes.kv_heads, sizes.group * sizes.q_len, sizes.head_dim)


def _from_query_rows(x, sizes: _Sizes):
    """(B, K, G*T, D) -> (B, T, H, D)."""
    x = x.reshape(sizes.batch, sizes.kv_heads, sizes.group, sizes.q_len, sizes.head_dim)
    x = x.transpose(0, 3, 1, 2, 4)
    return x.reshape(sizes.batch, sizes.q_len, sizes.kv_heads * sizes.group, sizes.head_dim)


def _key_blocks(k, v, masks: _Masks, bias, sizes: _Sizes) -> tuple[_Block, _Shared]:
    """All blocks, and what they share.

    The blocks are cut here, not sliced inside the scan: under vmap a dynamic slice is a gather and its
    update a scatter.  The price is one copy of k, v and the bias, each in its own type.
    """
    own_bias = shared_bias = None
    if bias is not None:
        b, h, t, s = bias.shape
        heads = (1, 1) if h == 1 else (sizes.kv_heads, sizes.group)
        bias = bias.reshape(b, *heads, t, s)
        own_bias, shared_bias = (bias, None) if s == sizes.kv_len else (None, bias)
    blocks = _Block(
        start=jnp.arange(sizes.count, dtype=jnp.int32) * sizes.width,
        k=_split(k.swapaxes(1, 2), 2, sizes),
        v=_split(v.swapaxes(1, 2), 2, sizes),
        kv_mask=None if masks.kv_mask is None else _split(masks.kv_mask, 1, sizes),
        kv_ids=None if masks.kv_ids is None else _split(masks.kv_ids, 1, sizes),
        bias=None if own_bias is None else _split(own_bias, 4, sizes),
    )
    return blocks, _Shared(masks.q_ids, shared_bias)


def _split(x, axis: int, sizes: _Sizes):
    """(..., S, ...) -> (count, ..., W, ...), the last block padded with zeros."""
    if sizes.padding:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, sizes.padding)
        x = jnp.pad(x, widths)
    x = x.reshape(*x.shape[:axis], sizes.count, sizes.width, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(blocks, axis: int, sizes: _Sizes):
    """(count, ..., W, ...) -> (..., S, ...), without the padding."""
    x = jnp.moveaxis(blocks, 0, axis)
    x = x.reshape(*x.shape[:axis], sizes.count * sizes.width, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, sizes.kv_len, axis=axis)


def _scores(q_rows, block: _Block, sizes: _Sizes, static: _Static):
    """Scaled and capped products (B, K, G, T, W) of a block, before bias and masks."""
    scores = _matmul(q_rows, block.k, transpose_right=True) * static.scale
    scores = scores.reshape(sizes.batch, sizes.kv_heads, sizes.group, sizes.q_len, sizes.width)
    return scores if static.softcap is None else static.softcap * jnp.tanh(scores / static.softcap)


def _through_softcap(ds, scores, static: _Static):
    """From the gradient of the scores to that of the products before the cap: times 1 - tanh^2."""
    return ds if static.softcap is None else ds * (1 - jnp.square(scores / static.softcap))


def _logits(scores, block: _Block, shared: _Shared, sizes: _Sizes, static: _Static):
    """Scores with the bias, -inf where a query may not look; (B, K, G, T, W)."""
    logits = scores
    bias = block.bias if shared.bias is None else shared.bias
    if bias is not None:
        logits = logits + bias.astype(sizes.accurate)

    if block.kv_mask is not None:
        logits = jnp.where(block.kv_mask[:, None, None, None, :], logits, -jnp.inf)
    if block.kv_ids is not None and shared.q_ids is not None:
        own_BxTxW = shared.q_ids[:, :, None] == block.kv_ids[:, None, :]
        logits = jnp.where(own_BxTxW[:, None, None], logits, -jnp.inf)
    key = jnp.arange(sizes.width, dtype=jnp.int32) + block.start
    # One comparison bounds both: a query's own position, and the end of the keys before the padding.
    last = jnp.full((sizes.q_len,), sizes.kv_len - 1, jnp.int32)
    if static.causal:
        position = jnp.arange(sizes.q_len, dtype=jnp.int32) + (sizes.kv_len - sizes.q_len)
        last = jnp.minimum(last, position)
    if static.causal or sizes.padding:
        allowed_TxW = key[None, :] <= last[:, None]
        logits = jnp.where(allowed_TxW[None, None, None], logits, -jnp.inf)
    return logits


def _sum_to(ds, like):
    """Sum over the axes along which a bias is broadcast, in the bias's type; None without."""
    if like is None:
        return None
    shared = tuple(axis for axis in range(ds.ndim) if like.shape[axis] == 1)
    return jnp.sum(ds, axis=shared, keepdims=True).astype(like.dtype)


def _matmul(left, right, *, transpose_left: bool = False, transpose_right: bool = False):
    """Batched product over the axes (B, K) with sums in at least float32, whatever the operands are."""
    contract = ((2 if transpose_left else 3,), (3 if transpose_right else 2,))
    accurate = accurate_dtype(left.dtype)
    return jax.lax.dot_general(left, right, (contract, ((0, 1), (0, 1))), preferred_element_type=accurate)


def _as_rows(x, sizes: _Sizes, dtype):
    """(B, K, G, T, W) -> (B, K, G*T, W), in the type of the operand it is multiplied with."""
    return x.reshape(sizes.batch, sizes.kv_heads, sizes.group * sizes.q_len, sizes.width).astype(dtype)


IMPLEMENTATION = Implementation(
    op="attention",
    name="blockwise",
    kernel_name="attention_blockwise",
    supports=supports_by_xla,
    call=attention,
)
