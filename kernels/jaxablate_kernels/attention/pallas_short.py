"""Attention on GPUs with all keys of a sequence on chip: the lengths of the studies (24 to 256).

Forward: a program has one tile of queries of one or several heads and all keys.  The softmax is that of
whole rows, once, without the running maximum and the rescaling of the streaming path.

Backward: one program has all queries of a batch row and key/value head.  Keys and values stay on chip, and so do
the float32 sums of dk and dv; per tile of queries

    p = softmax(logits),   dp = do v^T,   ds = p * (dp - rowsum(p * dp)),
    dv += p^T do,   dk += scale ds^T q,   dq = scale ds k:

five matrix products, each once.  With whole rows at hand neither the output nor its log-sum-exp is needed:
the forward pass saves nothing but its inputs, and the backward reads nothing else.  That is what counts at these
lengths, which are bound by memory.

QK-norm and rotary positions are applied to the tiles on chip (`pallas_prologue`), for the same reason: a
pass through memory before the kernel would cost about as much as the kernel.  The prepared keys are kept
on chip while a program goes through its queries; nothing prepared is ever written.
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
    Operands,
    Sizes,
    Span,
    Static,
    along,
    dot,
    features_inside,
    launch,
    load_rows,
    logits,
    padded,
    specs,
    specs_of_all,
    store_rows,
)
from jaxablate_kernels.attention.pallas_config import block_of
from jaxablate_kernels.attention.pallas_prologue import (
    prepare,
    prologue_of,
    saved_by,
    unprepare,
)
from jaxablate_kernels.attention.spec import Query
from jaxablate_kernels.manual_axes import shaped


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attention(operands: Operands, static: Static) -> Query:
    """The output (B, T, H, D); `static.config` is of the short path."""
    return attention_pallas(operands, static)


def _attention_fwd(operands: Operands, static: Static):
    return attention_pallas(operands, static), operands


def _attention_bwd(static: Static, operands: Operands, do: Query):
    return (attention_pallas_backward(operands, do, static),)


attention.defvjp(_attention_fwd, _attention_bwd)


# The names of the next two functions are the kernel names: jit puts them in jaxpr and lowered text.
@functools.partial(jax.jit, static_argnames=("static",))
def attention_pallas(operands: Operands, static: Static) -> Query:
    """The output (B, T, H, D)."""
    sizes, config = Sizes.of(operands), static.config
    heads = config.heads
    q_pad, k_pad = padded(sizes.q_len, config.block_q), block_of(sizes.kv_len)
    grid = (q_pad // config.block_q, sizes.kv_heads // heads, sizes.batch)
    in_specs = specs(
        operands,
        q_pad,
        k_pad,
        q_heads=heads * sizes.group,
        kv_heads=heads,
        where=lambda i, c, b: (b, c, c),
    )
    return launch(
        functools.partial(_forward_kernel, sizes=sizes, static=static),
        "attention_pallas_short",
        grid=grid,
        in_specs=(in_specs,),
        out_specs=in_specs.q,
        out_shape=shaped(operands.q.shape, operands.q.dtype, operands.q),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=static.interpret,
    )(operands)


def _forward_kernel(operands: Operands, o_ref: Any, *, sizes: Sizes, static: Static):
    block_q = static.config.block_q
    queries = Span(pl.program_id(0) * block_q, block_q, sizes.q_len)
    keys = _all_keys(sizes)
    for_q = prologue_of(operands.q_scale, operands.q_turn, queries, operands.q.dtype, static, sizes)
    for_k = prologue_of(operands.k_scale, operands.k_turn, keys, operands.k.dtype, static, sizes)

    def key_head(c, _):
        k, _ = prepare(load_rows(operands.k, keys, c, sizes), for_k, static, sizes)
        v = load_rows(operands.v, keys, c, sizes)

        def query_head(g, _):
            head = c * sizes.group + g
            q, _ = prepare(load_rows(operands.q, queries, head, sizes), for_q, static, sizes)
            tile = logits(q, k, operands, queries, keys, static, q_axis=0, edge=True, head=head)
            weights, inverse = _softmax(tile.value, q_axis=0)
            store_rows(o_ref, queries, head, sizes, dot(weights.astype(v.dtype), v) * inverse)

        return jax.lax.fori_loop(0, sizes.group, query_head, None)

    jax.lax.fori_loop(0, static.config.heads, key_head, None)


@functools.partial(jax.jit, static_argnames=("static",))
def attention_pallas_backward(operands: Operands, do: Query, static: Static) -> Operands:
    """The gradients of q, k, v, the bias and the scales of QK-norm, None in the place of the others."""
    sizes, config = Sizes.of(operands), static.config
    q, k, v = operands.q, operands.k, operands.v
    heads = config.heads
    q_pad, k_pad = padded(sizes.q_len, config.block_q_backward), block_of(sizes.kv_len)
    in_specs = specs(
        operands, q_pad, k_pad, q_heads=heads * sizes.group, kv_heads=heads, where=lambda c, b: (b, c, c)
    )
    out_shape = [shaped(x.shape, x.dtype, q) for x in (q, k, v)]
    out_specs = [in_specs.q, in_specs.k, in_specs.v]
    if static.norm is not None:  # a part per batch row and key/value head
        part = shaped((sizes.batch, sizes.kv_heads, sizes.head_dim), jnp.dtype(jnp.float32), q)
        out_shape += [part, part]
        out_specs += [pl.BlockSpec((None, heads, sizes.width), lambda c, b: (b, c, 0))] * 2
    results = launch(
        functools.partial(_backward_kernel, sizes=sizes, static=static),
        "attention_pallas_short_backward",
        grid=(sizes.kv_heads // heads, sizes.batch),
        in_specs=(in_specs, in_specs.q),
        out_specs=out_specs,
        out_shape=out_shape,
        num_warps=config.num_warps_backward,
        num_stages=config.num_stages_backward,
        interpret=static.interpret,
    )(operands, do)
    gradients = Operands(q=results[0], k=results[1], v=results[2])
    if static.norm is not None:
        q_scale, k_scale = (jnp.sum(part, axis=(0, 1)) for part in results[3:])
        gradients = gradients._replace(
            q_scale=q_scale.astype(operands.q_scale.dtype), k_scale=k_scale.astype(operands.k_scale.dtype)
        )
    if operands.bias is not None:
        gradients = gradients._replace(bias=_bias_gradient(operands, do, sizes, static))
    return gradients


def _backward_kernel(
    operands: Operands, do_ref, dq_ref, dk_ref, dv_ref, *scale_refs, sizes: Sizes, static: Static
):
    block_q = static.config.block_q_backward
    keys = _all_keys(sizes)
    for_k = prologue_of(operands.k_scale, operands.k_turn, keys, operands.k.dtype, static, sizes)
    zeros = jnp.zeros((keys.block, sizes.width), jnp.float32)

    def key_head(c, _):
        k, _ = prepare(load_rows(operands.k, keys, c, sizes), for_k, static, sizes)
        v = load_rows(operands.v, keys, c, sizes)

        def query_head(g, state):
            head = c * sizes.group + g

            def query_tile(i, state):
                dk, dv, dq_scale = state
                queries = Span(i * block_q, block_q, sizes.q_len)
                for_q = prologue_of(
                    operands.q_scale, operands.q_turn, queries, operands.q.dtype, static, sizes
                )
                q, q_saved = prepare(load_rows(operands.q, queries, head, sizes), for_q, static, sizes)
                do = load_rows(do_ref, queries, head, sizes)
                p, ds, slope = _softmax_gradient(
                    q, k, v, do, operands, queries, keys, static, q_axis=1, head=head
                )
                if slope is not None:
                    ds = ds * slope
                ds = ds.astype(q.dtype)
                dv += dot(p.astype(do.dtype), do)
                dk += dot(ds, q)
                dq = dot(ds, k, contract=(0, 0)) * static.scale
                dq, dscale = unprepare(dq, q_saved, for_q, static, sizes)
                store_rows(dq_ref, queries, head, sizes, dq)
                return dk, dv, dq_scale if dscale is None else dq_scale + dscale

            return jax.lax.fori_loop(0, pl.cdiv(sizes.q_len, block_q), query_tile, state)

        dq_scale = None if static.norm is None else jnp.zeros((sizes.width,), jnp.float32)
        dk, dv, dq_scale = jax.lax.fori_loop(0, sizes.group, query_head, (zeros, zeros, dq_scale))
        # Read and normalised once more: cheaper than the registers to keep it in during the loop.
        k_saved = saved_by(load_rows(operands.k, keys, c, sizes), static, sizes)
        dk, dk_scale = unprepare(dk * static.scale, k_saved, for_k, static, sizes)
        store_rows(dk_ref, keys, c, sizes, dk)
        store_rows(dv_ref, keys, c, sizes, dv)
        if dq_scale is not None and dk_scale is not None:
            for ref, part in zip(scale_refs, (dq_scale, dk_scale), strict=True):
                plgpu.store(ref.at[c, :], part, mask=features_inside(sizes))

    jax.lax.fori_loop(0, static.config.heads, key_head, None)


def _bias_gradient(operands: Operands, do: Query, sizes: Sizes, static: Static) -> jax.Array:
    config = static.config
    plan = Plan.of(operands.bias, sizes, config.block_q_backward, block_of(sizes.kv_len))
    q_pad, k_pad = padded(sizes.q_len, plan.block_q), plan.block_k
    in_specs = specs_of_all(operands, q_pad, k_pad)
    parts = launch(
        functools.partial(_bias_kernel, sizes=sizes, static=static, plan=plan),
        "attention_pallas_short_backward_bias",
        grid=plan.grid,
        in_specs=(in_specs, in_specs.q),
        out_specs=plan.out_spec(),
        out_shape=plan.out_shape(operands.q),
        num_warps=config.num_warps_backward,
        num_stages=config.num_stages_backward,
        interpret=static.interpret,
    )(operands, do)
    return plan.finish(parts, operands.bias.dtype)


def _bias_kernel(
    operands: Operands, do_ref: Any, parts_ref: Any, *, sizes: Sizes, static: Static, plan: Plan
):
    dtype = operands.q.dtype
    queries = Span(plan.tile()[0] * plan.block_q, plan.block_q, sizes.q_len)
    keys = _all_keys(sizes)

    problem = plan.problem()

    def add(turn, total):
        row, head = problem(turn)
        for_q = prologue_of(operands.q_scale, operands.q_turn, queries, dtype, static, sizes, row)
        for_k = prologue_of(operands.k_scale, operands.k_turn, keys, dtype, static, sizes, row)
        key_head = jax.lax.div(head, sizes.group)
        k, _ = prepare(load_rows(operands.k, keys, key_head, sizes, row), for_k, static, sizes)
        v = load_rows(operands.v, keys, key_head, sizes, row)
        q, _ = prepare(load_rows(operands.q, queries, head, sizes, row), for_q, static, sizes)
        do = load_rows(do_ref, queries, head, sizes, row)
        _, ds, _ = _softmax_gradient(
            q, k, v, do, operands, queries, keys, static, q_axis=0, head=head, row=(row,)
        )
        return total + ds

    zeros = jnp.zeros((queries.block, keys.block), jnp.float32)
    plan.store(parts_ref, jax.lax.fori_loop(*plan.turns(), add, zeros), queries, keys)


def _softmax_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    operands: Operands,
    queries: Span,
    keys: Span,
    static: Static,
    *,
    q_axis: int,
    head: Any,
    row: tuple[Any, ...] = (),
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Of a tile of whole rows: p, the gradient ds of its logits, and the slope of softcap (see `Logits`)."""
    tile = logits(q, k, operands, queries, keys, static, q_axis=q_axis, edge=True, head=head, row=row)
    weights, inverse = _softmax(tile.value, q_axis)
    p = weights * inverse
    dp = dot(do, v, contract=(1, 1)) if q_axis == 0 else dot(v, do, contract=(1, 1))
    delta = along(jnp.sum(p * dp, axis=1 - q_axis), q_axis)
    return p, p * (dp - delta), tile.slope


def _all_keys(sizes: Sizes) -> Span:
    return Span(0, block_of(sizes.kv_len), sizes.kv_len)


def _softmax(value: jax.Array, q_axis: int) -> tuple[jax.Array, jax.Array]:
    """exp2 of a tile of logits less the maximum of each row, and what makes the sum of each row 1.

    The second has shape (queries, 1) or (1, queries), and is 1 for a row that sees nothing.
    """
    k_axis = 1 - q_axis
    # Finite, which keeps -inf - (-inf) out of rows that see nothing.
    largest = jnp.maximum(jnp.max(value, axis=k_axis), FINITE_MIN)
    weights = jnp.exp2(value - along(largest, q_axis))
    total = jnp.sum(weights, axis=k_axis)
    return weights, along(1.0 / jnp.where(total == 0.0, 1.0, total), q_axis)
