"""cuDNN's fused attention, through `jax.nn.dot_product_attention`: an adapter to our semantics.

What it does not do in our sense is refused by `supports`, from the checks in JAX's own source
(``jax/_src/cudnn/fused_attention_stablehlo.py``, 0.10 to 0.12).  Our masks become cuDNN's additive bias, a
(B or 1, 1, T or 1, S) array expanded to all T and S.  Under vmap JAX asks for a bias of the whole shape (B, H, T, S)
and raises for any other, also for one that came from a mask.

Its backward pass sums with atomics, unless the process runs with
``XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true`` (openxla/xla #14125): without it this
implementation alone of all does not give the same bits each time.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxablate_kernels.attention.library import finite, key_masks, zero_where_blind
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
from jaxablate_kernels.dispatch import Implementation

DTYPES = ("bfloat16", "float16")


def supports(spec: AttentionSpec, platform: str) -> str | None:
    """None if cuDNN computes this, also its gradient, else the reason in one line."""
    if platform != "gpu":
        return f"platform is {platform}, supported is gpu"
    if spec.dtype not in DTYPES:
        return f"q, k and v are {spec.dtype}, supported are {', '.join(DTYPES)}"
    if spec.bias_dtype not in (None, spec.dtype):
        return f"bias is {spec.bias_dtype}, supported is the type of q, {spec.dtype}"
    largest = _largest_head_dim()
    if spec.head_dim % 8 or spec.head_dim > largest:
        return f"head dimension is {spec.head_dim}, supported are multiples of 8 up to {largest}"
    if spec.softcap:
        return "softcap is given, supported is none"
    if spec.causal and spec.q_len != spec.kv_len:
        # Its causal diagonal starts top left, ours ends bottom right.
        return f"causal with {spec.q_len} queries and {spec.kv_len} keys, supported are equal lengths"
    if spec.q_len % 2 or spec.kv_len % 2:
        # JAX refuses them when a gradient is taken, with a bias or without; here that cannot be known.
        return f"{spec.q_len} queries and {spec.kv_len} keys, supported are even lengths (odd ones have no gradient)"
    return None


def _largest_head_dim() -> int:
    """256 from compute capability 9.0 (Hopper) on, else 128; 128 where there is no GPU to ask."""
    device = jax.devices()[0]
    return 256 if device.platform == "gpu" and float(device.compute_capability) >= 9.0 else 128


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
    softcap: None = None,
    qk_norm: QkNorm | None = None,
    rotary: Rotary | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Query:
    """Attention by cuDNN; arguments and result as in `jaxablate_kernels.attention`, `bias` of rank 4.

    `implementation` is for tests: with ``xla`` JAX computes the same function where there is no cuDNN.
    """
    del softcap  # refused by `supports`
    return attention_cudnn(
        q,
        k,
        v,
        kv_mask,
        segment_ids,
        bias,
        qk_norm,
        rotary,
        causal=causal,
        scale=scale,
        implementation=implementation,
    )


# The name of this function is the kernel name, on both halves of the gradient.
@functools.partial(jax.jit, static_argnames=("causal", "scale", "implementation"))
def attention_cudnn(
    q: Query,
    k: Key,
    v: Key,
    kv_mask: KeyMask | None,
    segment_ids: SegmentIds | None,
    bias: Bias | None,
    qk_norm: QkNorm | None,
    rotary: Rotary | None,
    *,
    causal: bool,
    scale: float,
    implementation: Literal["cudnn", "xla"],
) -> Query:
    """The output (B, T, H, D)."""
    q, k = prepare(q, k, qk_norm, rotary)
    q_len, kv_len = q.shape[1], k.shape[1]

    def whole(x):
        """JAX passes a bias on as it is, and cuDNN wants its last two axes in full."""
        return None if x is None else jnp.broadcast_to(x, (*x.shape[:2], q_len, kv_len))

    mask = key_masks(kv_mask, segment_ids)
    o = jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias=whole(finite(bias)),
        mask=whole(mask),
        scale=scale,
        is_causal=causal,
        implementation=implementation,
    )
    return zero_where_blind(o, mask, bias, kv_len, causal=causal)


IMPLEMENTATION = Implementation(
    op="attention",
    name="cudnn",
    kernel_name="attention_cudnn",
    supports=supports,
    call=attention,
)
