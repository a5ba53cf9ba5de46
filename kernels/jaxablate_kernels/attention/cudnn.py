"""cuDNN's fused attention, through `jax.nn.dot_product_attention`: an adapter to our semantics.

What it does not do in our sense is refused by `supports`, from the checks in JAX's own source
(``jax/_src/cudnn/fused_attention_stablehlo.py``, 0.10 to 0.12).  Our masks become cuDNN's additive bias, a
(B or 1, 1, T or 1, S) array expanded to (B, H, T, S): less is refused under vmap, where all operands must also
have the mapped axis (`library.mapped_alike`).  So a mask costs as much memory as a bias, and a bias twice: JAX asks
cuDNN for its gradient too.

Its backward pass sums with atomics, unless the process runs with
``XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true`` (openxla/xla #14125): without it this
implementation alone of all does not give the same bits each time.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxablate_gpus import is_hopper_or_later
from jaxablate_kernels.attention.library import finite, key_masks, mapped_alike, zero_where_blind
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
    """256 from compute capability 9.0 (Hopper) on, else 128; a GPU that is not here is known by its name."""
    (_, kind), device = target(), jax.devices()[0]
    if device.platform == "gpu" and device.device_kind == kind:
        return 256 if float(device.compute_capability) >= 9.0 else 128
    return 256 if is_hopper_or_later(kind) else 128


# The name of this function is the kernel name, on both halves of the gradient.
@functools.partial(jax.jit, static_argnames=("causal", "scale", "softcap", "implementation"))
def attention_cudnn(
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
    q, k = prepare(q, k, qk_norm, rotary)
    mask, added = key_masks(kv_mask, segment_ids), bias
    if mask is not None:
        visible = jnp.zeros((), q.dtype) if bias is None else bias
        added = jnp.where(mask, visible, jnp.asarray(-jnp.inf, visible.dtype))
    added = finite(added)
    if added is not None:
        added = jnp.broadcast_to(added, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    q, k, v, added = mapped_alike((q, k, v, added))
    o = jax.nn.dot_product_attention(
        q, k, v, bias=added, scale=scale, is_causal=causal, implementation=implementation
    )
    (o,) = mapped_alike((o,))
    return zero_where_blind(o, mask, bias, k.shape[1], causal=causal)


IMPLEMENTATION = Implementation(
    op="attention",
    name="cudnn",
    kernel_name="attention_cudnn",
    supports=supports,
    call=attention_cudnn,
)
