"""The linear cross-entropy problems that tests and benchmarks share.

`PAPER` has the shapes of the studies, one sequence long so that a test is quick; a benchmark sets its own
with ``dataclasses.replace(case, tokens=32 * 256)``.  `LONG` is the ground of large language models, for
benchmarks only.  The others are small and awkward.
"""

import dataclasses
import zlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxablate_kernels.dtypes import accurate_dtype

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays for a case: arguments of `linear_cross_entropy`, and cotangents of its two losses.

    Attributes:
        x: (N, D); w: (D, V); targets: int32 (N,); bias: (V,) or None.
        dnll, dz: (N,), float32, or float64 if x is.
    """

    x: jax.Array
    w: jax.Array
    targets: jax.Array
    bias: jax.Array | None
    dnll: jax.Array
    dz: jax.Array


@dataclasses.dataclass(frozen=True)
class Case:
    """One linear cross-entropy problem.

    Attributes:
        name: unique, for test ids and benchmark tables.
        tokens, dim, vocab: N, D, V.
        dtype: of x; w_dtype: of w and the bias.
        bias: whether there is one.
        ignored: which targets are `ignore_index`: none, about a third, or all.
        ignore_index, z_loss, softcap: as for `linear_cross_entropy`.
    """

    name: str
    tokens: int
    dim: int
    vocab: int
    dtype: Dtype = "float32"
    w_dtype: Dtype = "float32"
    bias: Literal["none", "per_word"] = "none"
    ignored: Literal["none", "some", "all"] = "none"
    ignore_index: int = -100
    z_loss: float = 0.0
    softcap: float | None = None

    def inputs(self) -> Inputs:
        """Standard normal features, weights that give logits of about unit size; the same each time."""
        # Not hash(), which differs between processes.
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        targets = rng.integers(0, self.vocab, self.tokens)
        accurate = accurate_dtype(jnp.dtype(self.dtype))
        share = {"none": 0.0, "some": 1 / 3, "all": 1.0}[self.ignored]
        targets = np.where(rng.random(self.tokens) < share, self.ignore_index, targets)
        return Inputs(
            x=jnp.asarray(rng.standard_normal((self.tokens, self.dim)), self.dtype),
            w=jnp.asarray(rng.standard_normal((self.dim, self.vocab)) * self.dim**-0.5, self.w_dtype),
            targets=jnp.asarray(targets, jnp.int32),
            bias=None if self.bias == "none" else jnp.asarray(rng.standard_normal(self.vocab), self.w_dtype),
            dnll=jnp.asarray(rng.standard_normal(self.tokens), accurate),
            dz=jnp.asarray(rng.standard_normal(self.tokens), accurate),
        )


PAPER = (
    Case("tinystories", 256, 512, 10_000),
    Case("tinystories_mixed", 256, 512, 10_000, dtype="bfloat16", ignored="some", z_loss=1e-4),
)

SMALL = (
    Case("one_token", 1, 8, 5),
    Case("one_word", 7, 8, 1, z_loss=0.1),
    Case("uneven", 100, 24, 577, ignored="some"),
    Case("everything", 130, 40, 1000, bias="per_word", ignored="some", z_loss=0.1, softcap=3.0),
    Case("ignore_a_word", 64, 16, 100, bias="per_word", ignored="some", ignore_index=7, z_loss=0.01),
    Case("all_ignored", 50, 16, 300, bias="per_word", ignored="all", z_loss=0.1, softcap=5.0),
    Case("brain_half", 200, 64, 900, "bfloat16", "bfloat16", "per_word", "some", z_loss=0.01, softcap=10.0),
    Case("half_and_float", 200, 64, 900, "float16", "float32", "per_word", z_loss=0.01),
    Case("float_and_brain_half", 96, 32, 400, "float32", "bfloat16", "per_word"),
)

LONG = (
    Case("llama_8k", 8192, 2048, 32_000, dtype="bfloat16"),
    Case("large_vocabulary", 8192, 2048, 128_256, dtype="bfloat16"),
)

CASES = PAPER + SMALL
