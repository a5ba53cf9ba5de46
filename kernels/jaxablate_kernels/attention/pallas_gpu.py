"""Fused attention for GPUs in Pallas (Triton lowering): one function, two paths, see `Config.path`.

`pallas_short` holds all keys of a sequence on chip; `pallas_streaming` goes through them in blocks.  Both
take q, k, v and the output as they are, (B, T, H, D), by strides, without a transposition in memory, any
length and head dimension up to 256, and are deterministic: no atomics, and every sum in an order that the
shapes and the config fix.  Products of q and k may be as large as 2^30: beyond, their rounding shows as inf or NaN.

Memory beyond inputs and outputs: the short path nothing; streaming a float32 number per query and head,
and copies of q and k where QK-norm or rotary positions change them.  A bias: see `pallas_bias`.
"""

import jax
import jax.numpy as jnp

from jaxablate_kernels import tuning
from jaxablate_kernels.attention import pallas_short, pallas_streaming
from jaxablate_kernels.attention.pallas_blocks import Operands, Static
from jaxablate_kernels.attention.pallas_config import Config, candidates, heuristic, path_reason
from jaxablate_kernels.attention.pallas_prologue import turn_tables
from jaxablate_kernels.attention.prologue import prepare
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
from jaxablate_kernels.devices import target
from jaxablate_kernels.dispatch import Implementation
from jaxablate_kernels.manual_axes import match_varying

_DTYPES = ("float32", "bfloat16", "float16")
_WIDEST = 256


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
    config: Config | None = None,
    interpret: bool = False,
) -> Query:
    """Attention as `jaxablate_kernels.attention`, which checks the arguments; `bias` has rank 4.

    Args:
        q, k, v, causal, kv_mask, segment_ids, bias, scale, softcap, qk_norm, rotary: as there.
        config: by default the tuned one, or else the heuristic's.
        interpret: run the kernels as JAX operations, on any platform; for tests.

    Raises:
        ValueError: a config that does not fit the problem.
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
    if config is None:
        _, device = target()
        config = tuning.config_for("attention", "pallas", spec, device, Config) or heuristic(spec, device)
    if reason := path_reason(config, spec):
        raise ValueError(reason)
    if config.prologue == "outside":
        q, k = prepare(q, k, qk_norm, rotary)
        qk_norm = rotary = None
    operands = Operands(
        q,
        k,
        v,
        bias=bias,
        q_scale=None if qk_norm is None else qk_norm.q_scale,
        k_scale=None if qk_norm is None else qk_norm.k_scale,
        q_turn=None if rotary is None else turn_tables(rotary.q, rotary.pairing),
        k_turn=None if rotary is None else turn_tables(rotary.k, rotary.pairing),
        kv_mask=kv_mask,
        kv_end=None if kv_mask is None or config.path == "short" else _end_of_keys(kv_mask),
        q_ids=None if segment_ids is None else segment_ids.q,
        kv_ids=None if segment_ids is None else segment_ids.kv,
    )
    leaves, tree = jax.tree.flatten(operands)
    operands = jax.tree.unflatten(tree, match_varying(*leaves))
    static = Static(
        causal=causal,
        scale=scale,
        softcap=softcap,
        norm=None if qk_norm is None else (qk_norm.kind, qk_norm.eps),
        pairing=None if rotary is None else rotary.pairing,
        config=config,
        interpret=interpret,
    )
    path = pallas_short if config.path == "short" else pallas_streaming
    return path.attention(operands, static)


def supports(spec: AttentionSpec, platform: str) -> str | None:
    """`Implementation.supports`: GPUs, types of up to 32 bits, head dimensions up to 256."""
    if platform != "gpu":
        return f"platform is {platform}, supported is gpu"
    if spec.dtype not in _DTYPES:
        return f"q, k and v are {spec.dtype}, supported are {', '.join(_DTYPES)}"
    if spec.bias_dtype is not None and spec.bias_dtype not in _DTYPES:
        hint = " (use kv_mask for a mask)" if spec.bias_dtype == "bool" else ""
        return f"bias is {spec.bias_dtype}, supported are {', '.join(_DTYPES)}{hint}"
    if spec.head_dim > _WIDEST:
        return f"the head dimension is {spec.head_dim}, supported are 1 to {_WIDEST}"
    return None


def _end_of_keys(kv_mask: KeyMask) -> jax.Array:
    """int32 (B,), one more than the last visible key: what makes padding at the end cheap."""
    number = jnp.arange(1, kv_mask.shape[1] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(kv_mask, number[None, :], 0), axis=1)


IMPLEMENTATION = Implementation(
    op="attention",
    name="pallas",
    kernel_name="attention_pallas",
    supports=supports,
    call=attention,
    candidates=candidates,
)
