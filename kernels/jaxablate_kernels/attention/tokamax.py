"""Tokamax's attention: an adapter to our semantics.  An extra: ``pip install tokamax`` (0.0.12 wants jax >= 0.9.2).

On a GPU its kernels are asked for by name, Mosaic first (Hopper, Blackwell) and then Triton, and never the
XLA version that it would fall back to by itself; what neither takes raises.  On a CPU or TPU ``xla`` is what
is left to ask for, which builds the T x S matrix.  Its code needs JAX's default promotion rules.  Whether
its kernels sum in a fixed order it does not say.
"""

import functools

import jax
import tokamax  # pyright: ignore[reportMissingImports]
from absl import flags

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
from jaxablate_kernels.devices import target
from jaxablate_kernels.dispatch import Implementation

DTYPES = ("float32", "bfloat16", "float16")
KERNELS = {"gpu": ("mosaic", "triton"), "cpu": ("xla",), "tpu": ("xla",)}


def supports(spec: AttentionSpec, platform: str) -> str | None:
    """None if tokamax computes this, else the reason in one line."""
    if platform not in KERNELS:
        return f"platform is {platform}, supported are {', '.join(KERNELS)}"
    if spec.dtype not in DTYPES:
        return f"q, k and v are {spec.dtype}, supported are {', '.join(DTYPES)}"
    if spec.bias_dtype not in (None, *DTYPES):
        return f"bias is {spec.bias_dtype}, supported are {', '.join(DTYPES)}"
    if spec.causal and spec.q_len != spec.kv_len:
        # Its causal diagonal starts top left, ours ends bottom right.
        return f"causal with {spec.q_len} queries and {spec.kv_len} keys, supported are equal lengths"
    if spec.softcap and spec.bias is not None:
        return "softcap with bias, supported is one of them (it caps their sum)"
    if spec.softcap and platform == "gpu":
        return "softcap is given, supported is none on a gpu (its Triton kernel has no gradient with it)"
    return None


# The name of this function is the kernel name, on both halves of the gradient.
@functools.partial(jax.jit, static_argnames=("causal", "scale", "softcap"))
def attention_tokamax(
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
    """Attention by tokamax; arguments and result as in `jaxablate_kernels.attention`, `bias` of rank 4."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # else it takes the whole process's command line for its own flags
    q, k = prepare(q, k, qk_norm, rotary)
    mask = key_masks(kv_mask, segment_ids)
    o = tokamax.dot_product_attention(
        q,
        k,
        v,
        bias=finite(bias),
        mask=mask,
        scale=scale,
        is_causal=causal,
        logits_soft_cap=softcap,
        implementation=KERNELS[target()[0]],
    )
    return zero_where_blind(o, mask, bias, k.shape[1], causal=causal)


IMPLEMENTATION = Implementation(
    op="attention",
    name="tokamax",
    kernel_name="attention_tokamax",
    supports=supports,
    call=attention_tokamax,
)
