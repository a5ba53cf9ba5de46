"""The description of a linear cross-entropy problem: shapes and types, without arrays.

Axis names used in this folder: N tokens, D features, V vocabulary.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxablate_kernels.dtypes import XLA_DTYPES, Shaped, accurate_dtype

Features = Float[Array, "N D"]
Weights = Float[Array, "D V"]
Targets = Int32[Array, "N"]
Bias = Float[Array, "V"]
PerToken = Float[Array, "N"]


class TokenLosses(NamedTuple):
    """What a token costs, in float32; 0 where its target is the ignored one.

    Attributes:
        nll: negative log-likelihood of the target (N,), in nats.
        z: the z-loss (N,).
    """

    nll: PerToken
    z: PerToken


class Static(NamedTuple):
    """What is fixed when the program is compiled; as for `linear_cross_entropy`."""

    ignore_index: int
    z_loss: float
    softcap: float | None


@dataclasses.dataclass(frozen=True)
class CrossEntropySpec:
    """A linear cross-entropy problem, as `Implementation.supports` judges it.

    Attributes:
        tokens, dim, vocab: N, D, V.
        dtype: of x; w_dtype: of w; bias_dtype: None without bias.
        softcap: whether the logits are capped.
    """

    # Which fields `tuning` may find another size in: for a configuration, and for a measurement.
    batch_fields: ClassVar[tuple[str, ...]] = ("tokens",)
    size_fields: ClassVar[tuple[str, ...]] = ("tokens", "dim", "vocab")

    tokens: int
    dim: int
    vocab: int
    dtype: str
    w_dtype: str
    bias_dtype: str | None
    softcap: bool

    @classmethod
    def of(
        cls,
        x: Shaped,
        w: Shaped,
        targets: Shaped,
        *,
        bias: Shaped | None,
        ignore_index: Any,
        z_loss: Any,
        softcap: Any,
    ) -> "CrossEntropySpec":
        """Describe the arguments and check that they make sense for *any* implementation.

        Raises:
            ValueError: shapes or dtypes that do not fit together, or an option that is no number of its kind.
        """
        if len(x.shape) != 2 or len(w.shape) != 2 or x.shape[1] != w.shape[0]:
            raise ValueError(
                f"x must be (N, D) and w (D, V), got {x.shape} and {w.shape}; reshape x to two axes"
            )
        (tokens, dim), vocab = x.shape, w.shape[1]
        if 0 in (tokens, dim, vocab):
            raise ValueError(f"no axis may be empty, got x {x.shape} and w {w.shape}")
        if targets.shape != (tokens,) or str(targets.dtype) != "int32":
            raise ValueError(
                f"targets must be int32 of shape {(tokens,)}, got {targets.dtype} of {targets.shape}"
            )
        if bias is not None and bias.shape != (vocab,):
            raise ValueError(f"bias must have shape (V,) = {(vocab,)}, got {bias.shape}")
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise ValueError(f"ignore_index must be a Python integer, got {ignore_index!r}")
        if not _is_number(z_loss) or z_loss < 0:
            raise ValueError(f"z_loss must be a Python number of at least 0, got {z_loss!r}")
        if softcap is not None and not (_is_number(softcap) and softcap > 0):
            raise ValueError(f"softcap must be a positive Python number or None, got {softcap!r}")
        return cls(
            tokens=tokens,
            dim=dim,
            vocab=vocab,
            dtype=str(x.dtype),
            w_dtype=str(w.dtype),
            bias_dtype=None if bias is None else str(bias.dtype),
            softcap=softcap is not None,
        )


def supports_by_xla(spec: CrossEntropySpec, platform: str) -> str | None:
    """`Implementation.supports` of what is written in plain XLA: every platform and shape."""
    del platform
    for name, dtype in (("x", spec.dtype), ("w", spec.w_dtype), ("bias", spec.bias_dtype)):
        if dtype is not None and dtype not in XLA_DTYPES:
            return f"{name} is {dtype}, supported are {', '.join(XLA_DTYPES)}"
    return None


def logits_of(x: Features, w: Weights, bias: Bias | None, softcap: float | None) -> Float[Array, "N V"]:
    """Logits of some tokens for some of the vocabulary, summed in float32; w takes part in x's type."""
    logits = jnp.dot(x, w.astype(x.dtype), preferred_element_type=accurate_dtype(x.dtype))
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)[None, :]
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def is_target(targets: Targets, start: Any, width: int) -> Bool[Array, "N W"]:
    """Which of the words ``start`` to ``start + width`` is each token's target.

    By comparison: the gradient of reading a logit by its index would be a scatter.
    """
    words = jnp.arange(width, dtype=jnp.int32) + start
    return targets[:, None] == words[None, :]


def losses_of(lse: PerToken, picked: PerToken, targets: Targets, vocab: int, static: Static) -> TokenLosses:
    """The losses, given the log-sum-exp of each token's logits and its target's logit."""
    ignored = targets == static.ignore_index
    # A factor and no sum: a target outside of the vocabulary makes the gradient NaN as well.
    nll = (lse - picked) * sound(targets, vocab, static, lse.dtype)
    zero = jnp.zeros_like(lse)
    z = static.z_loss * jax.lax.square(lse) if static.z_loss else zero  # 0 * inf of a large lse is NaN
    return TokenLosses(nll=jnp.where(ignored, zero, nll), z=jnp.where(ignored, zero, z))


def sound(targets: Targets, vocab: int, static: Static, dtype: Any) -> PerToken:
    """1 where the target is a word of the vocabulary or the ignored one, else NaN."""
    expected = (targets >= 0) & (targets < vocab) | (targets == static.ignore_index)
    return jnp.where(expected, jnp.ones((), dtype), jnp.full((), jnp.nan, dtype))


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
