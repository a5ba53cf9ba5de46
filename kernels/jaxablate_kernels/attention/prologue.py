"""What happens to queries and keys before their product: QK-norm, then rotary positions.

In plain XLA, for the implementations that have it outside of their kernel; autodiff gives the gradients.
Both steps compute in float32 (float64 stays) and round to the input's type, one after the other.
"""

import jax
import jax.numpy as jnp

from jaxablate_kernels.attention.spec import Key, NormKind, Pairing, QkNorm, Query, Rotary
from jaxablate_kernels.dtypes import accurate_dtype


def prepare(q: Query, k: Key, qk_norm: QkNorm | None, rotary: Rotary | None) -> tuple[Query, Key]:
    """The queries and keys whose products are the logits, in the types they came in.

    Args:
        q: (B, T, H, D).
        k: (B, S, K, D).
        qk_norm: differentiated in both scales; None for none.
        rotary: constants, no gradient; None for none.
    """
    if qk_norm is not None:
        q = normalize(q, qk_norm.q_scale, qk_norm.kind, qk_norm.eps)
        k = normalize(k, qk_norm.k_scale, qk_norm.kind, qk_norm.eps)
    if rotary is not None:
        q = rotate(q, rotary.q, rotary.pairing)
        k = rotate(k, rotary.k, rotary.pairing)
    return q, k


def normalize(x: Query, scale: jax.Array, kind: NormKind, eps: float) -> Query:
    """x (B, T, H, D) of unit length or unit mean square over D, times scale (D,); see `QkNorm`."""
    y = x.astype(accurate_dtype(x.dtype))
    squares = jnp.square(y)
    if kind == "l2":
        # A floor under the square, not the root: the gradient at x = 0 stays finite.
        inverse = jax.lax.rsqrt(jnp.maximum(jnp.sum(squares, axis=-1, keepdims=True), eps**2))
    else:
        inverse = jax.lax.rsqrt(jnp.mean(squares, axis=-1, keepdims=True) + eps)
    return (y * inverse * scale.astype(y.dtype)[None, None, None, :]).astype(x.dtype)


def rotate(x: Query, tables: tuple[jax.Array, jax.Array], pairing: Pairing) -> Query:
    """x (B, T, H, D) with its pairs of features turned by the tables (cos, sin); see `Rotary`."""
    y = x.astype(accurate_dtype(x.dtype))
    cos, sin = (jax.lax.stop_gradient(table).astype(y.dtype) for table in tables)
    per_head = (slice(None), slice(None), None) if cos.ndim == 3 else (None, slice(None), None)
    cos, sin = cos[per_head], sin[per_head]  # (B or 1, T, 1, D/2)
    if pairing == "adjacent":
        a, b = y[..., 0::2], y[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
    else:
        a, b = jnp.split(y, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.astype(x.dtype)
