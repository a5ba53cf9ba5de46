"""The gated products that tests and benchmarks share.

`PAPER` has the widths of the studies (`studies/*`) and of language models, few rows so that a test is
quick.  `LARGE` has the same at their batches, for benchmarks: most are beyond a GPU's last cache.
`SMALL` is small and awkward.
"""

import dataclasses
import zlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxablate_kernels.gated.spec import GatedSpec, Kind


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays for a case.

    Attributes:
        h: (*lead, 2, W), the argument; dy: (*lead, W), a cotangent of the result.
    """

    h: jax.Array
    dy: jax.Array


@dataclasses.dataclass(frozen=True)
class Case:
    """One gated product.

    Attributes:
        name: unique, for test ids and benchmark tables.
        lead: the leading axes; their product is N.
        width: W.
        kind: ``swiglu`` or ``geglu``.
        dtype: of h.
        size: standard deviation of h.
    """

    name: str
    lead: tuple[int, ...]
    width: int
    kind: Kind = "swiglu"
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    size: float = 2.0

    def inputs(self) -> Inputs:
        """Normal arrays, the same each time."""
        # Not hash(), which differs between processes.
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        h = rng.standard_normal((*self.lead, 2, self.width)) * self.size
        dy = rng.standard_normal((*self.lead, self.width))
        return Inputs(h=jnp.asarray(h, self.dtype), dy=jnp.asarray(dy, self.dtype))

    @property
    def spec(self) -> GatedSpec:
        """What `Implementation.supports` is asked; makes no arrays."""
        h = jax.ShapeDtypeStruct((*self.lead, 2, self.width), self.dtype)
        return GatedSpec.of(h, kind=self.kind)


PAPER = (
    Case("ctclip_geglu", (4, 24), 1365, "geglu"),
    Case("ctclip_swiglu", (4, 24), 1365),
    Case("tinystories", (1, 64), 1344),
    Case("width_4864", (1, 24), 4864),
    Case("width_9728", (1, 12), 9728),
    Case("width_12288", (1, 8), 12288),
)

SMALL = (
    Case("one_unit", (3,), 1, "geglu"),
    Case("one_row", (), 7),
    Case("seven_units", (1000,), 7, "geglu"),
    Case("width_100", (2, 3), 100),
    Case("width_129", (5, 2, 3), 129, "geglu"),
    Case("width_513", (33,), 513),
    Case("width_5120", (3,), 5120, "geglu"),
    Case("far_out_swiglu", (40,), 64, size=60.0),
    Case("far_out_geglu", (40,), 64, "geglu", size=60.0),
    Case("half", (70,), 96, "geglu", dtype="float16"),
    Case("brain_half", (70,), 96, dtype="bfloat16"),
    Case("brain_half_geglu", (70,), 96, "geglu", dtype="bfloat16"),
)

LARGE = (
    Case("ctclip_batch_4", (4, 24, 576), 1365, "geglu", dtype="bfloat16"),
    Case("tinystories_batch_64", (64, 256), 1344, dtype="bfloat16"),
    Case("swiglu_5632", (8, 2048), 5632, dtype="bfloat16"),
    Case("swiglu_9728", (8, 2048), 9728, dtype="bfloat16"),
    Case("swiglu_12288", (8, 2048), 12288, dtype="bfloat16"),
    Case("geglu_5632_float32", (4, 2048), 5632, "geglu"),
)

CASES = PAPER + SMALL
