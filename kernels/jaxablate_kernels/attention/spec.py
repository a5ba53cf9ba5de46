"""The description of an attention problem: shapes and types, without arrays.

Axis names used in this folder: B batch, T queries, S keys, H query heads, K key/value heads (H a
multiple of K), G = H / K query heads per key/value head, D head dimension.
"""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Query = Float[Array, "B T H D"]
Key = Float[Array, "B S K D"]
KeyMask = Bool[Array, "B S"]
Bias = Float[Array, "..."]


@runtime_checkable
class Shaped(Protocol):
    """Anything with a shape and a dtype: an array, a tracer, a `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        ...

    @property
    def dtype(self) -> Any:
        """Type of the entries."""
        ...


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """An attention problem, as `Implementation.supports` judges it.

    Attributes:
        batch, q_len, kv_len, heads, kv_heads, head_dim: B, T, S, H, K, D.
        dtype: the common type of q, k and v.
        causal: whether a query sees only the keys up to its own position.
        has_kv_mask: whether there is a (B, S) mask of keys.
        bias: shape of the bias with leading ones up to rank 4, each axis 1 or full; None without bias.
        bias_dtype: None without bias.
    """

    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    causal: bool
    has_kv_mask: bool
    bias: tuple[int, int, int, int] | None
    bias_dtype: str | None

    @classmethod
    def of(
        cls,
        q: Shaped,
        k: Shaped,
        v: Shaped,
        *,
        causal: bool,
        kv_mask: Shaped | None,
        bias: Shaped | None,
        scale: Any,
    ) -> "AttentionSpec":
        """Describe the arguments of an attention and check that they make sense for *any* implementation.

        Raises:
            ValueError: shapes or dtypes that do not fit together, or a scale that is not a finite number.
        """
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ValueError(
                f"scale must be a finite Python number, got {scale!r}; fold a learned scale into q"
            )
        if len(q.shape) != 4 or len(k.shape) != 4:
            raise ValueError(f"q must be (B, T, H, D) and k (B, S, K, D), got {q.shape} and {k.shape}")
        batch, q_len, heads, head_dim = q.shape
        _, kv_len, kv_heads, _ = k.shape
        if v.shape != k.shape:
            raise ValueError(f"k and v must have one shape (B, S, K, D), got {k.shape} and {v.shape}")
        if k.shape[0] != batch or k.shape[3] != head_dim:
            raise ValueError(f"q {q.shape} and k {k.shape} must agree in batch (0) and head dimension (3)")
        if 0 in q.shape or 0 in k.shape:
            raise ValueError(f"no axis may be empty, got q {q.shape} and k {k.shape}")
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key/value heads")
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
        if kv_mask is not None and (kv_mask.shape != (batch, kv_len) or str(kv_mask.dtype) != "bool"):
            raise ValueError(
                f"kv_mask must be bool of shape {(batch, kv_len)}, got {kv_mask.dtype} of {kv_mask.shape}"
            )
        return cls(
            batch=batch,
            q_len=q_len,
            kv_len=kv_len,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=str(q.dtype),
            causal=bool(causal),
            has_kv_mask=kv_mask is not None,
            bias=None if bias is None else _bias_shape(bias, (batch, heads, q_len, kv_len)),
            bias_dtype=None if bias is None else str(bias.dtype),
        )


def accurate_dtype(dtype: Any) -> Any:
    """The type of logits, softmax and sums: float32, except that float64 stays what it is."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


# XLA computes these; float64 (under jax_enable_x64) is there to check the others against.
XLA_DTYPES = ("float32", "bfloat16", "float16", "float64")


def supports_by_xla(spec: AttentionSpec, platform: str) -> str | None:
    """`Implementation.supports` of what is written in plain XLA: every platform, shape and mask."""
    del platform
    if spec.dtype not in XLA_DTYPES:
        return f"q, k and v are {spec.dtype}, supported are {', '.join(XLA_DTYPES)}"
    if spec.bias_dtype is not None and spec.bias_dtype not in XLA_DTYPES:
        hint = " (use kv_mask for a mask)" if spec.bias_dtype == "bool" else ""
        return f"bias is {spec.bias_dtype}, supported are {', '.join(XLA_DTYPES)}{hint}"
    return None


def _bias_shape(bias: Shaped, full: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    rank = len(bias.shape)
    if rank <= 4:
        b, h, t, s = (1,) * (4 - rank) + tuple(bias.shape)
        if all(size in (1, whole) for size, whole in zip((b, h, t, s), full, strict=True)):
            return b, h, t, s
    raise ValueError(f"bias of shape {bias.shape} cannot be broadcast to (B, H, T, S) = {full}")
