"""Attention on GPUs for long sequences: keys in blocks, online softmax (FlashAttention-2, arXiv:2307.08691).

Forward: a program has one tile of queries of one head and goes through the keys it can see, with the
running maximum and sum of each row.  Blocks that lie wholly inside are computed without a look at their
ends; only those on the causal diagonal or at the end of the keys are.  Blocks beyond the last visible key of
the batch row (`Operands.kv_end`) are not computed at all.  Saved for the backward: the output, and one
float32 log-sum-exp per row, in units of log 2, +inf for a row that sees nothing.

Backward: delta = rowsum(do * o) by XLA, then one kernel for dq, which goes through the keys of a tile of
queries, and one for dk and dv, which goes through the queries of a tile of keys and the heads of its group.
Seven matrix products instead of five, but each gradient has one writer: no atomics, the same bits each time.
The o of delta is the rounded output, except where there are few keys, see `_output_dtype`; `pallas_short` has
no such term.

QK-norm and rotary positions come before the kernel, from `prologue` in plain XLA, which fuses them into one
pass over q and k.  Beside a kernel bound by arithmetic that pass is small, and inside it would be repeated:
each key would be prepared once per tile of queries.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxablate_kernels.attention.pallas_bias import Plan
from jaxablate_kernels.attention.pallas_blocks import (
    FINITE_MIN,
    LOG2E,
    Logits,
    Operands,
    Sizes,
    Span,
    Static,
    along,
    dot,
    launch,
    load_rows,
    load_vector,
    logits,
    padded,
    specs,
    specs_of_all,
    store_rows,
)
from jaxablate_kernels.attention.spec import Query
from jaxablate_kernels.manual_axes import shaped

_FEW_KEYS = 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attention(operands: Operands, static: Static) -> Query:
    """The output (B, T, H, D); `static.config` is of the streaming path, q and k are prepared."""
    return attention_pallas(operands, static)[0].astype(operands.q.dtype)


def _attention_fwd(operands: Operands, static: Static):
    o, lse = attention_pallas(operands, static)
    return o.astype(operands.q.dtype), (operands, o, lse)


def _attention_bwd(static: Static, residuals, do: Query):
    return (attention_pallas_backward(*residuals, do, static),)


attention.defvjp(_attention_fwd, _attention_bwd)


# The names of the next two functions are the kernel names: jit puts them in jaxpr and lowered text.
@functools.partial(jax.jit, static_argnames=("static",))
def attention_pallas(operands: Operands, static: Static) -> tuple[Query, jax.Array]:
    """The output (B, T, H, D), see `_output_dtype`, and each row's log-sum-exp (B, H, T), in units of log 2."""
    sizes, config = Sizes.of(operands), static.config
    q_pad, k_pad = padded(sizes.q_len, config.block_q), padded(sizes.kv_len, config.block_k)
    in_specs = _specs_by_query_head(operands, sizes, q_pad, k_pad)
    return launch(
        functools.partial(_forward_kernel, sizes=sizes, static=static),
        "attention_pallas_streaming",
        grid=(q_pad // config.block_q, sizes.heads, sizes.batch),
        in_specs=(in_specs,),
        out_specs=(in_specs.q, _row_spec(q_pad)),
        out_shape=(
            shaped(operands.q.shape, _output_dtype(operands), operands.q),
            shaped((sizes.batch, sizes.heads, sizes.q_len), jnp.dtype(jnp.float32), operands.q),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=static.interpret,
    )(operands)


def _output_dtype(operands: Operands) -> jnp.dtype:
    """In what type the kernel writes the output, and the backward reads it.

    The queries' own, but float32 where the keys are few: there delta, a sum over features, is as large as
    each of the dp that it is taken from, and its rounding would be that of ds (at 7 keys in bfloat16 it made
    dk 4 times as far off as the reference's).  What a long row sees of it averages out.
    """
    few = operands.k.shape[1] < _FEW_KEYS
    return jnp.dtype(jnp.float32) if few else operands.q.dtype


def _forward_kernel(operands: Operands, o_ref: Any, lse_ref: Any, *, sizes: Sizes, static: Static):
    block_q, block_k = static.config.block_q, static.config.block_k
    queries = Span(pl.program_id(0) * block_q, block_q, sizes.q_len)
    head = _only_head()
    q = load_rows(operands.q, queries, head, sizes)

    def fold(j, state, *, edge):
        o, largest_before, total = state
        keys = Span(j * block_k, block_k, sizes.kv_len)
        k, v = (load_rows(ref, keys, head, sizes, edge=edge) for ref in (operands.k, operands.v))
        tile = logits(q, k, operands, queries, keys, static, q_axis=0, edge=edge, head=head)
        largest = jnp.maximum(largest_before, jnp.max(tile.value, axis=1))
        weights = jnp.exp2(tile.value - along(largest, 0))
        rescale = jnp.exp2(largest_before - largest)
        total = total * rescale + jnp.sum(weights, axis=1)
        o = o * along(rescale, 0) + dot(weights.astype(v.dtype), v)
        return o, largest, total

    state = (
        jnp.zeros((block_q, sizes.width), jnp.float32),
        # Finite, which keeps -inf - (-inf) out of rows that see nothing.
        jnp.full((block_q,), FINITE_MIN, jnp.float32),
        jnp.zeros((block_q,), jnp.float32),
    )
    o, largest, total = _through_keys(fold, state, queries, block_k, operands.kv_end, sizes, static)
    blind = total == 0.0
    safe = jnp.where(blind, 1.0, total)
    store_rows(o_ref, queries, head, sizes, o * along(1.0 / safe, 0))
    lse = jnp.where(blind, jnp.inf, largest + jnp.log(safe) * LOG2E)
    plgpu.store(lse_ref.at[queries.slice], lse, mask=queries.inside())


@functools.partial(jax.jit, static_argnames=("static",))
def attention_pallas_backward(
    operands: Operands, o: Query, lse: jax.Array, do: Query, static: Static
) -> Operands:
    """The gradients of q, k, v and the bias, None in the place of the others."""
    sizes = Sizes.of(operands)
    accurate = functools.partial(jnp.asarray, dtype=jnp.float32)
    delta = jnp.einsum("bthd,bthd->bht", accurate(do), accurate(o), precision="highest")
    rows = (do, lse, delta)
    dk, dv = _keys_gradient(operands, rows, sizes, static)
    return Operands(
        q=_queries_gradient(operands, rows, sizes, static),
        k=dk,
        v=dv,
        bias=None if operands.bias is None else _bias_gradient(operands, rows, sizes, static),
    )


def _queries_gradient(operands: Operands, rows: Any, sizes: Sizes, static: Static) -> jax.Array:
    config = static.config
    block_q, block_k = config.block_k_backward, config.block_q_backward
    q_pad, k_pad = padded(sizes.q_len, block_q), padded(sizes.kv_len, block_k)
    in_specs = _specs_by_query_head(operands, sizes, q_pad, k_pad)
    return launch(
        functools.partial(_queries_kernel, sizes=sizes, static=static, block_q=block_q, block_k=block_k),
        "attention_pallas_streaming_backward_q",
        grid=(q_pad // block_q, sizes.heads, sizes.batch),
        in_specs=(in_specs, (in_specs.q, _row_spec(q_pad), _row_spec(q_pad))),
        out_specs=in_specs.q,
        out_shape=shaped(operands.q.shape, operands.q.dtype, operands.q),
        num_warps=config.num_warps_backward,
        num_stages=config.num_stages_backward,
        interpret=static.interpret,
    )(operands, rows)


def _queries_kernel(
    operands: Operands, rows: Any, dq_ref: Any, *, sizes: Sizes, static: Static, block_q: int, block_k: int
):
    queries = Span(pl.program_id(0) * block_q, block_q, sizes.q_len)
    head = _only_head()
    do_ref, lse_ref, delta_ref = rows
    q, do = (load_rows(ref, queries, head, sizes) for ref in (operands.q, do_ref))
    lse, delta = load_vector(lse_ref, queries, jnp.inf), load_vector(delta_ref, queries, 0.0)
    # The left operand of a product is held in registers, which two tiles of the widest heads overflow.
    q_axis = 0 if sizes.width <= 128 else 1

    def add(j, dq, *, edge):
        keys = Span(j * block_k, block_k, sizes.kv_len)
        k, v = (load_rows(ref, keys, head, sizes, edge=edge) for ref in (operands.k, operands.v))
        tile = logits(q, k, operands, queries, keys, static, q_axis=q_axis, edge=edge, head=head)
        _, ds = _softmax_gradient(tile, do, v, lse, delta, q_axis)
        ds = ds if tile.slope is None else ds * tile.slope
        return dq + dot(ds.astype(k.dtype), k, contract=(1 - q_axis, 0))

    dq = jnp.zeros((block_q, sizes.width), jnp.float32)
    dq = _through_keys(add, dq, queries, block_k, operands.kv_end, sizes, static)
    store_rows(dq_ref, queries, head, sizes, dq * static.scale)


def _keys_gradient(
    operands: Operands, rows: Any, sizes: Sizes, static: Static
) -> tuple[jax.Array, jax.Array]:
    config = static.config
    q_pad, k_pad = padded(sizes.q_len, config.block_q_backward), padded(sizes.kv_len, config.block_k_backward)
    in_specs = specs(operands, q_pad, k_pad, q_heads=sizes.group, kv_heads=1, where=lambda j, c, b: (b, c, c))
    row_spec = pl.BlockSpec((None, sizes.group, q_pad), lambda j, c, b: (b, c, 0))
    dk, dv = launch(
        functools.partial(_keys_kernel, sizes=sizes, static=static),
        "attention_pallas_streaming_backward_kv",
        grid=(k_pad // config.block_k_backward, sizes.kv_heads, sizes.batch),
        in_specs=(in_specs, (in_specs.q, row_spec, row_spec)),
        out_specs=(in_specs.k, in_specs.v),
        out_shape=tuple(shaped(x.shape, x.dtype, operands.q) for x in (operands.k, operands.v)),
        num_warps=config.num_warps_backward,
        num_stages=config.num_stages_backward,
        interpret=static.interpret,
    )(operands, rows)
    return dk, dv


def _keys_kernel(operands: Operands, rows: Any, dk_ref: Any, dv_ref: Any, *, sizes: Sizes, static: Static):
    block_q, block_k = static.config.block_q_backward, static.config.block_k_backward
    keys = Span(pl.program_id(0) * block_k, block_k, sizes.kv_len)
    key_head = _only_head()
    k, v = (load_rows(ref, keys, key_head, sizes) for ref in (operands.k, operands.v))
    do_ref, lse_ref, delta_ref = rows
    first, inner, count = _query_blocks(keys, block_q, operands.kv_end, sizes, static)

    def query_head(head, state):
        def add(i, state, *, edge):
            dk, dv = state
            queries = Span(i * block_q, block_q, sizes.q_len)
            q, do = (load_rows(ref, queries, head, sizes) for ref in (operands.q, do_ref))
            lse = load_vector(lse_ref, queries, jnp.inf, head)
            delta = load_vector(delta_ref, queries, 0.0, head)
            tile = logits(q, k, operands, queries, keys, static, q_axis=1, edge=edge, head=head)
            p, ds = _softmax_gradient(tile, do, v, lse, delta, 1)
            ds = ds if tile.slope is None else ds * tile.slope
            return dk + dot(ds.astype(q.dtype), q), dv + dot(p.astype(do.dtype), do)

        if static.causal:
            state = jax.lax.fori_loop(first, inner, functools.partial(add, edge=True), state)
        return jax.lax.fori_loop(inner, count, functools.partial(add, edge=False), state)

    zeros = jnp.zeros((block_k, sizes.width), jnp.float32)
    dk, dv = jax.lax.fori_loop(0, sizes.group, query_head, (zeros, zeros))
    store_rows(dk_ref, keys, key_head, sizes, dk * static.scale)
    store_rows(dv_ref, keys, key_head, sizes, dv)


def _bias_gradient(operands: Operands, rows: Any, sizes: Sizes, static: Static) -> jax.Array:
    config = static.config
    plan = Plan.of(operands.bias, sizes, config.block_q_backward, config.block_k_backward)
    q_pad, k_pad = padded(sizes.q_len, plan.block_q), padded(sizes.kv_len, plan.block_k)
    in_specs = specs_of_all(operands, q_pad, k_pad)
    row_spec = pl.BlockSpec((sizes.batch, sizes.heads, q_pad), lambda *at: (0, 0, 0))
    parts = launch(
        functools.partial(_bias_kernel, sizes=sizes, static=static, plan=plan),
        "attention_pallas_streaming_backward_bias",
        grid=plan.grid,
        in_specs=(in_specs, (in_specs.q, row_spec, row_spec)),
        out_specs=plan.out_spec(),
        out_shape=plan.out_shape(operands.q),
        num_warps=config.num_warps_backward,
        num_stages=config.num_stages_backward,
        interpret=static.interpret,
    )(operands, rows)
    return plan.finish(parts, operands.bias.dtype)


def _bias_kernel(operands: Operands, rows: Any, parts_ref: Any, *, sizes: Sizes, static: Static, plan: Plan):
    i, j = plan.tile()
    queries = Span(i * plan.block_q, plan.block_q, sizes.q_len)
    keys = Span(j * plan.block_k, plan.block_k, sizes.kv_len)
    do_ref, lse_ref, delta_ref = rows
    problem = plan.problem()

    def add(turn, total):
        row, head = problem(turn)
        key_head = jax.lax.div(head, sizes.group)
        q, do = (load_rows(ref, queries, head, sizes, row) for ref in (operands.q, do_ref))
        k, v = (load_rows(ref, keys, key_head, sizes, row) for ref in (operands.k, operands.v))
        lse = load_vector(lse_ref, queries, jnp.inf, row, head)
        delta = load_vector(delta_ref, queries, 0.0, row, head)
        tile = logits(q, k, operands, queries, keys, static, q_axis=0, edge=True, head=head, row=(row,))
        return total + _softmax_gradient(tile, do, v, lse, delta, 0)[1]

    first, end = plan.turns()
    if static.causal:  # nothing to add up in a tile that no query sees
        end = jnp.where(queries.start + queries.block + sizes.offset > keys.start, end, first)
    total = jnp.zeros((queries.block, keys.block), jnp.float32)
    plan.store(parts_ref, jax.lax.fori_loop(first, end, add, total), queries, keys)


def _softmax_gradient(
    tile: Logits, do: jax.Array, v: jax.Array, lse: jax.Array, delta: jax.Array, q_axis: int
) -> tuple[jax.Array, jax.Array]:
    """Of a tile of logits: p, and the gradient ds of the logits.

    A query beyond the end has lse = inf, so p = 0 whatever its bias is.
    """
    # At most 1, also where logits are so large that they are not the forward pass's to the last bits.
    power = tile.value - along(lse, q_axis)
    p = jnp.exp2(jnp.where(power > 0.0, 0.0, power))  # not minimum, which on a GPU would drop a NaN
    dp = dot(do, v, contract=(1, 1)) if q_axis == 0 else dot(v, do, contract=(1, 1))
    return p, p * (dp - along(delta, q_axis))


def _specs_by_query_head(operands: Operands, sizes: Sizes, q_pad: int, k_pad: int) -> Operands:
    return specs(
        operands,
        q_pad,
        k_pad,
        q_heads=1,
        kv_heads=1,
        where=lambda i, h, b: (b, h, jax.lax.div(h, jnp.int32(sizes.group))),
    )


def _row_spec(q_pad: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, q_pad), lambda i, h, b: (b, h, 0))


def _only_head() -> jax.Array:
    """Index 0; computed, since interpret mode (of jax 0.10 to 0.12) does not take a constant as an index."""
    return pl.program_id(0) * 0


def _through_keys(
    body: Any, state: Any, queries: Span, block_k: int, kv_end: Any, sizes: Sizes, static: Static
) -> Any:
    """``body(j, state, edge=...)`` over the blocks of keys that a tile of queries sees, in their order.

    First the blocks that all its queries see in full, then those with the diagonal or the end of the keys.
    """
    count = pl.cdiv(sizes.kv_len, block_k)
    inner, stop = jnp.int32(sizes.kv_len // block_k), jnp.int32(count)
    if static.causal:
        first_end = jnp.maximum(queries.start + (sizes.offset + 1), 0)
        last_end = jnp.maximum(queries.start + (queries.block + sizes.offset), 0)
        inner = jnp.minimum(inner, jax.lax.div(first_end, block_k))
        stop = jnp.minimum(stop, jax.lax.div(last_end + (block_k - 1), block_k))
    if kv_end is not None:
        stop = jnp.minimum(stop, jax.lax.div(kv_end[...] + (block_k - 1), block_k))
        inner = jnp.minimum(inner, stop)
    state = jax.lax.fori_loop(0, inner, functools.partial(body, edge=False), state)
    if not static.causal and sizes.kv_len % block_k == 0:
        return state
    return jax.lax.fori_loop(inner, stop, functools.partial(body, edge=True), state)


def _query_blocks(
    keys: Span, block_q: int, kv_end: Any, sizes: Sizes, static: Static
) -> tuple[Any, Any, Any]:
    """The blocks of queries that see a tile of keys: the first, the first that sees it in full, and the count.

    With the same number for all three where the keys are hidden from everyone.
    """
    count = jnp.int32(pl.cdiv(sizes.q_len, block_q))
    first = inner = jnp.int32(0)
    if static.causal:
        sees_first = jnp.maximum(keys.start - sizes.offset, 0)
        sees_all = jnp.maximum(keys.start + (keys.block - 1 - sizes.offset), 0)
        first = jnp.minimum(jax.lax.div(sees_first, block_q), count)
        inner = jnp.minimum(jax.lax.div(sees_all + (block_q - 1), block_q), count)
    if kv_end is not None:
        hidden = keys.start >= kv_end[...]
        first, inner = jnp.where(hidden, count, first), jnp.where(hidden, count, inner)
    return first, inner, count
