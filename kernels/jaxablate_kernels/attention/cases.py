"""The attention problems that tests and benchmarks share.

Paper-scale shapes are those of the studies (`studies/*`), with batch 1 so that a test is quick; a
benchmark sets its own with ``dataclasses.replace(case, batch=64)``.  The others are small and awkward.
"""

import dataclasses
import zlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays for a case: arguments of `attention`, and a cotangent of its result.

    Attributes:
        q: (B, T, H, D); k, v: (B, S, K, D); do: (B, T, H, D), all of the case's dtype.
        kv_mask: bool (B, S) or None.
        bias: the case's dtype, rank 4, or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    do: jax.Array
    kv_mask: jax.Array | None
    bias: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem.

    Attributes:
        name: unique, for test ids and benchmark tables.
        q_len, kv_len, heads, kv_heads, head_dim, batch: T, S, H, K, D, B.
        dtype: of q, k, v and bias.
        causal: as for `attention`.
        kv_mask: which keys may be seen: no mask; ``lengths``: a prefix per sequence, of different lengths;
            ``random``: about two thirds; ``empty``: none in the last sequence, a prefix in the others.
        bias: which of the axes ``bhts`` the bias has in full, e.g. ``hts`` for (1, H, T, S), ``""`` for
            (1, 1, 1, 1); None for no bias.
    """

    name: str
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    causal: bool = False
    kv_mask: Literal["none", "lengths", "random", "empty"] = "none"
    bias: str | None = None

    @property
    def scale(self) -> float:
        """1 / sqrt(D)."""
        return self.head_dim**-0.5

    def inputs(self) -> Inputs:
        """Standard normal arrays and a mask, the same each time."""
        # Not hash(), which differs between processes.
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))

        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape), dtype=self.dtype)

        full = {"b": self.batch, "h": self.heads, "t": self.q_len, "s": self.kv_len}
        return Inputs(
            q=normal(self.batch, self.q_len, self.heads, self.head_dim),
            k=normal(self.batch, self.kv_len, self.kv_heads, self.head_dim),
            v=normal(self.batch, self.kv_len, self.kv_heads, self.head_dim),
            do=normal(self.batch, self.q_len, self.heads, self.head_dim),
            bias=None
            if self.bias is None
            else normal(*(size if axis in self.bias else 1 for axis, size in full.items())),
            kv_mask=self._mask(rng),
        )

    def _mask(self, rng: np.random.Generator) -> jax.Array | None:
        shape = (self.batch, self.kv_len)
        if self.kv_mask == "none":
            return None
        if self.kv_mask == "random":
            return jnp.asarray(rng.random(shape) < 2 / 3)
        lengths = rng.integers(1, self.kv_len, self.batch, endpoint=True)
        if self.kv_mask == "empty":
            lengths[-1] = 0
        return jnp.asarray(np.arange(self.kv_len)[None, :] < lengths[:, None])


PAPER = (
    Case("ctclip_spatial", 576, 576, 8, 8, 32),
    Case("ctclip_spatial_bias", 576, 576, 8, 8, 32, bias="hts"),
    Case("ctclip_temporal", 24, 24, 8, 8, 32, batch=4),
    Case("tinystories", 256, 256, 16, 16, 32, causal=True),
    Case("burgers_128", 128, 128, 6, 6, 64, batch=2),
    Case("burgers_256", 256, 256, 6, 6, 64),
    Case("bert_base", 512, 512, 12, 12, 64, kv_mask="lengths"),
)

SMALL = (
    Case("one_token", 1, 1, 2, 2, 8, batch=2, causal=True),
    Case("one_query", 1, 129, 4, 2, 16, batch=2, causal=True, kv_mask="lengths"),
    Case("length_7", 7, 7, 2, 2, 16, batch=2, bias="bhts"),
    Case("length_100", 100, 100, 2, 2, 32, batch=2, causal=True, bias="hts"),
    Case("length_129", 129, 129, 2, 2, 32, batch=2, causal=True, kv_mask="random"),
    Case("more_keys", 40, 200, 2, 2, 16, causal=True),
    Case("more_queries", 200, 40, 2, 2, 16, causal=True),
    Case("more_queries_blocks", 300, 270, 2, 1, 16, causal=True, bias="ts"),
    Case("grouped", 70, 150, 6, 2, 16, batch=2, causal=True, bias="bhts"),
    Case("multi_query", 65, 131, 4, 1, 32, batch=2, kv_mask="lengths", bias="h"),
    Case("empty_sequence", 33, 150, 2, 2, 16, batch=3, kv_mask="empty", bias="hts"),
    Case("empty_sequence_causal", 140, 140, 2, 2, 16, batch=2, causal=True, kv_mask="empty"),
    Case("head_dim_12", 50, 50, 4, 4, 12, batch=2, kv_mask="lengths", bias="hts"),
    Case("head_dim_80", 96, 160, 2, 2, 80, batch=2, causal=True),
    Case("bias_per_key", 30, 130, 2, 2, 16, batch=2, bias="bs"),
    Case("bias_per_query", 30, 130, 4, 2, 16, batch=2, bias="t"),
    Case("bias_scalar", 30, 130, 2, 2, 16, bias=""),
    Case("half", 60, 140, 4, 2, 32, batch=2, dtype="float16", causal=True, bias="hts"),
    Case("brain_half", 60, 140, 4, 2, 32, batch=2, dtype="bfloat16", causal=True, bias="hts"),
)

CASES = PAPER + SMALL
