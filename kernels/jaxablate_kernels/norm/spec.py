"""The description of a normalisation problem, and the arithmetic that every implementation shares.

Axis names used in this folder: D the normalised (last) axis, N rows, all leading axes together.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxablate_kernels.dtypes import XLA_DTYPES, Shaped

Rows = Float[Array, "*rows D"]
Weight = Float[Array, " D"]

Kind = Literal["rms", "layer"]
EpsAt = Literal["inside", "outside"]

# Keeps the gradient of the root finite where the input is exactly 0; far below any eps.
_FLOOR = 1e-30


class Static(NamedTuple):
    """What is fixed when the program is compiled: arguments of `jaxablate_kernels.norm`, as numbers and words."""

    kind: Kind
    eps: float
    eps_at: EpsAt


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """A normalisation problem, as `Implementation.supports` judges it.

    Attributes:
        kind: ``rms`` or ``layer``, which also subtracts the mean.
        rows, dim: N and D.
        dtype: of x and the residual.
        residual: whether a residual is added first.
        scale_dtype: of the learned scale.
        bias_dtype: of the learned bias; None without.
        eps_at: ``inside`` or ``outside`` of the root.
    """

    # Which fields `tuning` may find another size in: for a configuration, and for a measurement.
    batch_fields: ClassVar[tuple[str, ...]] = ("rows",)
    size_fields: ClassVar[tuple[str, ...]] = ("rows", "dim")

    kind: Kind
    rows: int
    dim: int
    dtype: str
    residual: bool
    scale_dtype: str
    bias_dtype: str | None
    eps_at: EpsAt

    @classmethod
    def of(
        cls,
        x: Shaped,
        residual: Shaped | None,
        scale: Shaped,
        bias: Shaped | None,
        *,
        kind: Kind,
        eps: Any,
        eps_at: Any,
    ) -> "NormSpec":
        """Describe the arguments of a norm and check that they make sense for *any* implementation.

        Raises:
            ValueError: shapes or dtypes that do not fit together, or an eps that is no positive number.
        """
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not (0 < eps < math.inf):
            raise ValueError(f"eps must be a positive, finite Python number, got {eps!r}")
        if eps_at not in get_args(EpsAt):
            raise ValueError(f"eps_at must be 'inside' or 'outside' of the root, got {eps_at!r}")
        if not x.shape:
            raise ValueError("x must be (..., D), got a scalar")
        if 0 in x.shape:
            raise ValueError(f"no axis may be empty, got x {x.shape}")
        if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
            raise ValueError(
                f"residual must be as x, {x.dtype} of {x.shape}, got {residual.dtype} of {residual.shape}"
            )
        for name, weight in (("scale", scale), ("bias", bias)):
            if weight is not None and weight.shape != x.shape[-1:]:
                raise ValueError(
                    f"{name} must have shape {x.shape[-1:]}, that of x's last axis, got {weight.shape}"
                )
        return cls(
            kind=kind,
            rows=math.prod(x.shape[:-1]),
            dim=x.shape[-1],
            dtype=str(x.dtype),
            residual=residual is not None,
            scale_dtype=str(scale.dtype),
            bias_dtype=None if bias is None else str(bias.dtype),
            eps_at=eps_at,
        )


def supports_by_xla(spec: NormSpec, platform: str) -> str | None:
    """`Implementation.supports` of what is written in plain XLA: every platform and shape."""
    del platform
    return unsupported_dtype(spec, XLA_DTYPES)


def unsupported_dtype(spec: NormSpec, supported: tuple[str, ...]) -> str | None:
    """The first argument whose type is not among the supported, in one line; None if all are."""
    for name, dtype in (("x", spec.dtype), ("scale", spec.scale_dtype), ("bias", spec.bias_dtype)):
        if dtype is not None and dtype not in supported:
            return f"{name} is {dtype}, supported are {', '.join(supported)}"
    return None


def inverse_root(mean_square: Array, static: Static) -> Array:
    """What a centred row is multiplied with: 1 / sqrt(mean_square + eps), or 1 / (sqrt(mean_square) + eps)."""
    if static.eps_at == "inside":
        return lax.rsqrt(mean_square + static.eps)
    return 1.0 / (_root(mean_square) + static.eps)


def inverse_root_slope(mean_square: Array, static: Static) -> Array:
    """k such that d inverse / d mean_square = -k inverse^3 / 2, with inverse from `inverse_root`.

    Inside, k = 1.  Outside, with s the root, k = (s + eps) / s, and 0 below the floor.
    """
    if static.eps_at == "inside":
        return jnp.ones_like(mean_square)
    root = _root(mean_square)
    return jnp.where(mean_square > _FLOOR, (root + static.eps) / root, jnp.zeros_like(root))


def _root(mean_square: Array) -> Array:
    # Not jnp.maximum: in Triton that turns NaN into the floor, and a diverged run must show.
    return jnp.sqrt(jnp.where(mean_square < _FLOOR, jnp.full_like(mean_square, _FLOOR), mean_square))
