"""The description of an attention problem: shapes and types, without arrays.

Axis names used in this folder: B batch, T queries, S keys, H query heads, K key/value heads (H a
multiple of K), G = H / K query heads per key/value head, D head dimension.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxablate_kernels.dtypes import XLA_DTYPES, Shaped

Query = Float[Array, "B T H D"]
Key = Float[Array, "B S K D"]
KeyMask = Bool[Array, "B S"]
Bias = Float[Array, "..."]

NormKind = Literal["l2", "rms"]
Pairing = Literal["adjacent", "halves"]

# The leaves of the classes below are not annotated as arrays: jax rebuilds pytrees with whatever a
# transformation puts in the place of a leaf.  `AttentionSpec.of` checks shapes and types.


class SegmentIds(NamedTuple):
    """Several sequences in one row: a query sees only the keys that have its own id.

    Attributes:
        q: int32 (B, T).
        kv: int32 (B, S).
    """

    q: Any
    kv: Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["q_scale", "k_scale"], meta_fields=["kind", "eps"]
)
@dataclasses.dataclass(frozen=True)
class QkNorm:
    """Normalised queries and keys, with a learned factor per feature; each over D, in float32.

        l2:   x / max(|x|, eps) * scale                  (Henry et al. 2020, arXiv:2010.04245)
        rms:  x / sqrt(mean(x^2) + eps) * scale          (Zhang & Sennrich 2019, arXiv:1910.07467)

    Attributes:
        q_scale, k_scale: (D,), any float type; all heads share them.  Both have gradients.
        kind: which formula.
        eps: from 1e-18 (its square must be a float32) to 1.

    Raises:
        ValueError: unknown kind, or eps out of range.
    """

    q_scale: Any
    k_scale: Any
    kind: NormKind
    eps: float

    def __post_init__(self):
        _check_one_of("qk_norm kind", self.kind, get_args(NormKind))
        if not 1e-18 <= self.eps <= 1:
            raise ValueError(f"qk_norm eps must be from 1e-18 to 1, got {self.eps!r}")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["q", "k"], meta_fields=["pairing"])
@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): pairs of features turned by given angles, in float32.

        (a, b)  ->  (a cos - b sin, a sin + b cos)

    Attributes:
        q: the tables (cos, sin) of the queries, each float32 (T, D/2) or (B, T, D/2).  No gradient.
        k: the same of the keys, (S, D/2) or (B, S, D/2).
        pairing: pair i is of the features (2i, 2i+1), ``adjacent``, or (i, i + D/2), ``halves``.

    Raises:
        ValueError: unknown pairing.
    """

    q: tuple[Any, Any]
    k: tuple[Any, Any]
    pairing: Pairing

    def __post_init__(self):
        _check_one_of("rotary pairing", self.pairing, get_args(Pairing))


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
        segments: whether there are segment ids.
        softcap: whether the logits are soft-capped.
        qk_norm: its kind; None without.
        rotary: its pairing; None without.
    """

    # Which fields `tuning` may find another size in: for a configuration, and for a measurement.
    batch_fields: ClassVar[tuple[str, ...]] = ("batch", "bias")
    size_fields: ClassVar[tuple[str, ...]] = ("batch", "q_len", "kv_len", "heads", "kv_heads", "bias")

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
    segments: bool = False
    softcap: bool = False
    qk_norm: NormKind | None = None
    rotary: Pairing | None = None

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
        segment_ids: SegmentIds | None = None,
        softcap: Any = None,
        qk_norm: QkNorm | None = None,
        rotary: Rotary | None = None,
    ) -> "AttentionSpec":
        """Describe the arguments of an attention and check that they make sense for *any* implementation.

        Raises:
            ValueError: shapes or dtypes that do not fit together, a scale that is not a finite number, or a
                softcap that is not a positive one.
        """
        if not _is_finite_number(scale):
            raise ValueError(
                f"scale must be a finite Python number, got {scale!r}; fold a learned scale into q"
            )
        if softcap is not None and not (_is_finite_number(softcap) and softcap > 0):
            raise ValueError(f"softcap must be a positive Python number or None, got {softcap!r}")
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
        for name, x, kind in (
            ("segment_ids", segment_ids, SegmentIds),
            ("qk_norm", qk_norm, QkNorm),
            ("rotary", rotary, Rotary),
        ):
            if not isinstance(x, kind | None):
                raise ValueError(f"{name} must be a {kind.__name__}, got {type(x).__name__}")
        if segment_ids is not None:
            _check_segment_ids(segment_ids, batch, q_len, kv_len)
        if qk_norm is not None:
            _check_qk_norm(qk_norm, head_dim)
        if rotary is not None:
            _check_rotary(rotary, batch, q_len, kv_len, head_dim)
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
            segments=segment_ids is not None,
            softcap=softcap is not None,
            qk_norm=None if qk_norm is None else qk_norm.kind,
            rotary=None if rotary is None else rotary.pairing,
        )


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


def _check_segment_ids(ids: SegmentIds, batch: int, q_len: int, kv_len: int) -> None:
    for name, x, length in (("q", ids.q, q_len), ("kv", ids.kv, kv_len)):
        if tuple(x.shape) != (batch, length) or str(x.dtype) != "int32":
            raise ValueError(
                f"segment_ids.{name} must be int32 of shape {(batch, length)}, got {x.dtype} of {x.shape}"
            )


def _check_qk_norm(norm: QkNorm, head_dim: int) -> None:
    for name, x in (("q_scale", norm.q_scale), ("k_scale", norm.k_scale)):
        if tuple(x.shape) != (head_dim,) or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"qk_norm.{name} must be floating of shape {(head_dim,)}, got {x.dtype} of {x.shape}"
            )


def _check_rotary(rotary: Rotary, batch: int, q_len: int, kv_len: int, head_dim: int) -> None:
    if head_dim % 2:
        raise ValueError(f"rotary turns pairs of features, got an odd head dimension {head_dim}")
    for name, tables, length in (("q", rotary.q, q_len), ("k", rotary.k, kv_len)):
        shape = (length, head_dim // 2)
        cos, sin = tables
        if cos.shape != sin.shape or tuple(cos.shape) not in (shape, (batch, *shape)):
            raise ValueError(
                f"rotary.{name} must be (cos, sin), both {shape} or {(batch, *shape)}, "
                f"got {cos.shape} and {sin.shape}"
            )
        if not str(cos.dtype) == str(sin.dtype) == "float32":
            raise ValueError(f"rotary.{name} must be float32, got {cos.dtype} and {sin.dtype}")


def _check_one_of(what: str, x: Any, valid: tuple[str, ...]) -> None:
    if x not in valid:
        raise ValueError(f"{what} must be {' or '.join(map(repr, valid))}, got {x!r}")


def _is_finite_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
