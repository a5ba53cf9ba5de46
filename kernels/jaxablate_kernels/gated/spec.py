"""The description of a gated product: shapes and types, without arrays.

Axis names used in this folder: N rows, all leading axes together; W the width of each half.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal, get_args

from jaxtyping import Array, Float

from jaxablate_kernels.dtypes import XLA_DTYPES, Shaped

Halves = Float[Array, "*rows 2 W"]
Product = Float[Array, "*rows W"]

Kind = Literal["swiglu", "geglu"]


@dataclasses.dataclass(frozen=True)
class GatedSpec:
    """A gated product, as `Implementation.supports` judges it.

    Attributes:
        kind: ``swiglu`` or ``geglu``.
        rows, width: N and W.
        dtype: of h.
    """

    # Which fields `tuning` may find another size in: for a configuration, and for a measurement.
    batch_fields: ClassVar[tuple[str, ...]] = ("rows",)
    size_fields: ClassVar[tuple[str, ...]] = ("rows", "width")

    kind: Kind
    rows: int
    width: int
    dtype: str

    @classmethod
    def of(cls, h: Shaped, *, kind: Any) -> "GatedSpec":
        """Describe the arguments and check that they make sense for *any* implementation.

        Raises:
            ValueError: an unknown kind, or an h that is not (..., 2, W).
        """
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        if len(h.shape) < 2 or h.shape[-2] != 2:
            raise ValueError(f"h must be (..., 2, W), the halves as an axis of their own, got {h.shape}")
        if 0 in h.shape:
            raise ValueError(f"no axis may be empty, got h {h.shape}")
        return cls(kind=kind, rows=math.prod(h.shape[:-2]), width=h.shape[-1], dtype=str(h.dtype))


def supports_by_xla(spec: GatedSpec, platform: str) -> str | None:
    """`Implementation.supports` of what is written in plain XLA: every platform and shape."""
    del platform
    return unsupported_dtype(spec, XLA_DTYPES)


def unsupported_dtype(spec: GatedSpec, supported: tuple[str, ...]) -> str | None:
    """Why h's type will not do, in one line; None if it will."""
    return None if spec.dtype in supported else f"h is {spec.dtype}, supported are {', '.join(supported)}"
