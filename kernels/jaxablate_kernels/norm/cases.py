"""The normalisation problems that tests and benchmarks share.

`PAPER` has the widths of the studies (`studies/*`) and of language models, a sequence long so that a test
is quick.  `LARGE` has the same at their batches, for benchmarks: most are beyond a GPU's last cache.
`SMALL` is small and awkward.
"""

import dataclasses
import zlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxablate_kernels.norm.spec import EpsAt, Kind, NormSpec

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays for a case: arguments of a norm, and cotangents of its results; None where there is none.

    Attributes:
        x, residual: (*lead, D).
        scale, bias: (D,).
        dy, dtotal: (*lead, D).
    """

    x: jax.Array
    residual: jax.Array | None
    scale: jax.Array
    bias: jax.Array | None
    dy: jax.Array
    dtotal: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Case:
    """One normalisation problem.

    Attributes:
        name: unique, for test ids and benchmark tables.
        lead: the leading axes; their product is N.
        dim: D.
        kind: ``rms`` or ``layer``.
        add: ``residual`` for the sum with one first, or ``nothing``.
        bias: whether LayerNorm has one.
        dtype: of x; weight_dtype: of scale and bias.
        eps, eps_at: as for `rms_norm`.
        size: standard deviation of x and the residual, whose mean is twice that.
    """

    name: str
    lead: tuple[int, ...]
    dim: int
    kind: Kind = "rms"
    add: Literal["residual", "nothing"] = "nothing"
    bias: Literal["none", "per_feature"] = "none"
    dtype: Dtype = "float32"
    weight_dtype: Dtype = "float32"
    eps: float = 1e-5
    eps_at: EpsAt = "inside"
    size: float = 1.0

    def inputs(self) -> Inputs:
        """Normal arrays with a mean, scales from 0.5 to 1.5; the same each time."""
        # Not hash(), which differs between processes.
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        shape = (*self.lead, self.dim)

        def features() -> jax.Array:
            return jnp.asarray((rng.standard_normal(shape) + 2) * self.size, self.dtype)

        def cotangent() -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape), self.dtype)

        adds = self.add == "residual"
        return Inputs(
            x=features(),
            residual=features() if adds else None,
            scale=jnp.asarray(rng.uniform(0.5, 1.5, self.dim), self.weight_dtype),
            bias=None
            if self.bias == "none"
            else jnp.asarray(rng.standard_normal(self.dim), self.weight_dtype),
            dy=cotangent(),
            dtotal=cotangent() if adds else None,
        )

    @property
    def spec(self) -> NormSpec:
        """What `Implementation.supports` is asked; makes no arrays."""
        x = jax.ShapeDtypeStruct((*self.lead, self.dim), self.dtype)
        weight = jax.ShapeDtypeStruct((self.dim,), self.weight_dtype)
        residual, bias = (x if self.add == "residual" else None), (None if self.bias == "none" else weight)
        return NormSpec.of(x, residual, weight, bias, kind=self.kind, eps=self.eps, eps_at=self.eps_at)


PAPER = (
    Case("ctclip_layer", (1, 576), 512, "layer", bias="per_feature"),
    Case("ctclip_add_layer", (1, 576), 512, "layer", "residual", "per_feature"),
    Case("ctclip_rms", (1, 576), 512),
    Case("ctclip_add_rms", (1, 576), 512, add="residual", eps=1e-12, eps_at="outside"),
    Case("tinystories", (1, 256), 512, add="residual", eps=1e-6),
    Case("burgers", (2, 128), 384, "layer", "residual"),
    Case("bert", (1, 512), 768, "layer", "residual", "per_feature", eps=1e-12),
    Case("width_2048", (1, 64), 2048, add="residual", eps=1e-6),
    Case("width_2560", (1, 64), 2560, add="residual", eps=1e-6),
    Case("width_4096", (1, 64), 4096, add="residual", eps=1e-6),
)

SMALL = (
    Case("one_feature", (3,), 1),
    Case("one_row", (), 7, "layer", "residual", "per_feature"),
    Case("seven_features", (1000,), 7, add="residual"),
    Case("width_100", (2, 3), 100, "layer", bias="per_feature"),
    Case("width_129", (5, 2, 3), 129, "layer", "residual", eps_at="outside"),
    Case("width_513", (33,), 513),
    Case("width_5120", (3,), 5120, "layer", "residual", "per_feature"),
    Case("width_16384", (3,), 16384, add="residual"),
    Case("tiny_inside", (40,), 64, add="residual", size=1e-8),
    Case("tiny_outside", (40,), 64, "layer", eps_at="outside", size=1e-8),
    Case("zeros_outside", (40,), 64, add="residual", eps_at="outside", size=0.0),
    Case("low_weights", (70,), 96, "layer", "residual", "per_feature", weight_dtype="bfloat16"),
    Case("half", (70,), 96, "layer", "residual", "per_feature", dtype="float16"),
    Case("brain_half", (70,), 96, add="residual", dtype="bfloat16"),
    Case("all_low", (70,), 96, "layer", "residual", "per_feature", dtype="bfloat16", weight_dtype="bfloat16"),
)

LARGE = (
    Case("ctclip_batch_4", (4, 24, 576), 512, "layer", "residual", "per_feature", dtype="bfloat16"),
    Case("ctclip_rms_batch_4", (4, 24, 576), 512, add="residual", dtype="bfloat16"),
    Case("tinystories_batch_64", (64, 256), 512, add="residual", eps=1e-6, dtype="bfloat16"),
    Case("bert_batch_32", (32, 512), 768, "layer", "residual", "per_feature", dtype="bfloat16", eps=1e-12),
    Case("rms_2048", (32, 2048), 2048, eps=1e-6, dtype="bfloat16"),
    Case("add_rms_2048", (32, 2048), 2048, add="residual", eps=1e-6, dtype="bfloat16"),
    Case("add_rms_2560", (16, 2048), 2560, add="residual", eps=1e-6, dtype="bfloat16"),
    Case("add_rms_4096", (16, 2048), 4096, add="residual", eps=1e-6, dtype="bfloat16"),
    Case("add_rms_4096_float32", (8, 2048), 4096, add="residual", eps=1e-6),
    Case("add_layer_4096", (16, 2048), 4096, "layer", "residual", "per_feature", dtype="bfloat16"),
    Case("add_rms_5120", (8, 2048), 5120, add="residual", eps=1e-6, dtype="bfloat16"),
    Case("add_rms_8192", (8, 2048), 8192, add="residual", eps=1e-6, dtype="bfloat16"),
)

CASES = PAPER + SMALL
