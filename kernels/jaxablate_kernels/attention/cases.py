"""The attention problems that tests and benchmarks share.

`PAPER` has the shapes of the studies (`studies/*`) at paper scale, with batch 1 so that a test is quick; a
benchmark sets its own with ``dataclasses.replace(case, batch=64)``.  `SMALL` is small and awkward.
`LIBRARY` is the ground on which the libraries are fast: for benchmarks on GPUs, too large for a CPU.
"""

import dataclasses
import itertools
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxablate_kernels.attention.spec import AttentionSpec, NormKind, Pairing, QkNorm, Rotary, SegmentIds

DType = Literal["float32", "bfloat16", "float16", "float64"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays for a case: arguments of `attention`, and a cotangent of its result.

    Attributes:
        q: (B, T, H, D); k, v: (B, S, K, D); do: (B, T, H, D), all of the case's dtype.
        kv_mask: bool (B, S) or None.
        bias: the case's bias dtype, rank 4, or None.
        segment_ids: int32, or None.
        qk_norm: float32 scales from 0.5 to 1.5, or None.
        rotary: float32 tables, or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    do: jax.Array
    kv_mask: jax.Array | None
    bias: jax.Array | None
    segment_ids: SegmentIds | None = None
    qk_norm: QkNorm | None = None
    rotary: Rotary | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem.

    Attributes:
        name: unique, for test ids and benchmark tables.
        q_len, kv_len, heads, kv_heads, head_dim, batch: T, S, H, K, D, B.
        dtype: of q, k and v.
        causal: as for `attention`.
        kv_mask: which keys may be seen: no mask; ``lengths``: a prefix per sequence, of different lengths;
            ``random``: about two thirds; ``empty``: none in the last sequence, a prefix in the others.
        bias: which of the axes ``bhts`` the bias has in full, e.g. ``hts`` for (1, H, T, S), ``""`` for
            (1, 1, 1, 1); None for no bias.
        bias_dtype: of the bias; None for that of q, k and v.
        segments: no segment ids; ``packed``: runs of up to three sequences, the same for queries and keys
            if T = S; ``random``: three, in no order, and queries of a fourth that has no keys.
        softcap: as for `attention`.
        qk_norm: its kind, or None.
        rotary: its pairing, or None.  The last query is at the last key's position; in packed sequences
            positions begin again with each, so there is a table per sequence.
    """

    name: str
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    dtype: DType = "float32"
    causal: bool = False
    kv_mask: Literal["none", "lengths", "random", "empty"] = "none"
    bias: str | None = None
    bias_dtype: DType | None = None
    segments: Literal["none", "packed", "random"] = "none"
    softcap: float | None = None
    qk_norm: NormKind | None = None
    rotary: Pairing | None = None

    @property
    def scale(self) -> float:
        """1 / sqrt(D); 8, as in the CT-CLIP study, for queries and keys of unit length."""
        return 8.0 if self.qk_norm == "l2" else self.head_dim**-0.5

    @property
    def spec(self) -> AttentionSpec:
        """The description of the problem, without making arrays."""
        return AttentionSpec(
            batch=self.batch,
            q_len=self.q_len,
            kv_len=self.kv_len,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            causal=self.causal,
            has_kv_mask=self.kv_mask != "none",
            bias=self._bias_shape,
            bias_dtype=None if self.bias is None else self.bias_dtype or self.dtype,
            segments=self.segments != "none",
            softcap=self.softcap is not None,
            qk_norm=self.qk_norm,
            rotary=self.rotary,
        )

    def keywords(self, inputs: Inputs) -> dict[str, Any]:
        """The arguments of `attention` beside q, k, v and impl."""
        return {
            "causal": self.causal,
            "kv_mask": inputs.kv_mask,
            "segment_ids": inputs.segment_ids,
            "bias": inputs.bias,
            "scale": self.scale,
            "softcap": self.softcap,
            "qk_norm": inputs.qk_norm,
            "rotary": inputs.rotary,
        }

    def inputs(self) -> Inputs:
        """Standard normal arrays and the masks, the same each time."""
        # Not hash(), which differs between processes.
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))

        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape, np.float32), dtype=self.dtype)

        q = normal(self.batch, self.q_len, self.heads, self.head_dim)
        k = normal(self.batch, self.kv_len, self.kv_heads, self.head_dim)
        v = normal(self.batch, self.kv_len, self.kv_heads, self.head_dim)
        do = normal(self.batch, self.q_len, self.heads, self.head_dim)
        bias = None
        if self._bias_shape is not None:
            bias = jnp.asarray(rng.standard_normal(self._bias_shape, np.float32), self.spec.bias_dtype)
        kv_mask = self._mask(rng)
        segment_ids = self._segment_ids(rng)
        qk_norm, rotary = self._qk_norm(rng), self._rotary(segment_ids)
        return Inputs(q, k, v, do, kv_mask, bias, segment_ids, qk_norm, rotary)

    @property
    def _bias_shape(self) -> tuple[int, int, int, int] | None:
        if self.bias is None:
            return None
        full = {"b": self.batch, "h": self.heads, "t": self.q_len, "s": self.kv_len}
        b, h, t, s = (size if axis in self.bias else 1 for axis, size in full.items())
        return b, h, t, s

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

    def _segment_ids(self, rng: np.random.Generator) -> SegmentIds | None:
        if self.segments == "none":
            return None
        kv = rng.integers(3, size=(self.batch, self.kv_len), dtype=np.int32)
        q = rng.integers(4 if self.segments == "random" else 3, size=(self.batch, self.q_len), dtype=np.int32)
        if self.segments == "packed":
            kv = np.sort(kv, axis=1)
            q = kv if self.q_len == self.kv_len else np.sort(q, axis=1)
        return SegmentIds(jnp.asarray(q), jnp.asarray(kv))

    def _qk_norm(self, rng: np.random.Generator) -> QkNorm | None:
        if self.qk_norm is None:
            return None
        q_scale, k_scale = jnp.asarray(rng.uniform(0.5, 1.5, (2, self.head_dim)), jnp.float32)
        return QkNorm(q_scale, k_scale, self.qk_norm, eps=1e-12 if self.qk_norm == "l2" else 1e-6)

    def _rotary(self, segment_ids: SegmentIds | None) -> Rotary | None:
        if self.rotary is None:
            return None
        q, k = np.arange(self.q_len) + self.kv_len - self.q_len, np.arange(self.kv_len)
        if self.segments == "packed" and segment_ids is not None:
            q, k = (np.stack([*map(_positions_in_runs, np.asarray(ids))]) for ids in segment_ids)
        frequencies = 10_000.0 ** (-np.arange(0, self.head_dim, 2) / self.head_dim)

        def tables(positions: np.ndarray) -> tuple[jax.Array, jax.Array]:
            angles = positions[..., None] * frequencies
            return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)

        return Rotary(tables(q), tables(k), self.rotary)


def _positions_in_runs(ids: np.ndarray) -> np.ndarray:
    """Index of each entry of a sorted array within its run of equal ones."""
    return np.arange(len(ids)) - np.searchsorted(ids, ids)


PAPER = (
    # `OffsetBias` is float32 whatever the compute type is.
    Case("ctclip_spatial", 576, 576, 8, 8, 32, bias="hts", bias_dtype="float32", qk_norm="l2"),
    Case("ctclip_spatial_plain", 576, 576, 8, 8, 32),  # the arm with upstream's flash attention
    Case("ctclip_temporal", 24, 24, 8, 8, 32, batch=4, qk_norm="l2"),
    Case("tinystories", 256, 256, 16, 16, 32, causal=True, rotary="adjacent"),
    Case("burgers_128", 128, 128, 6, 6, 32, batch=2, qk_norm="rms"),
    Case("burgers_256", 256, 256, 6, 6, 64, qk_norm="rms"),
    Case("bert_base", 512, 512, 12, 12, 64, kv_mask="lengths"),
)

_ALL = Case(
    "all",
    60,
    140,
    4,
    2,
    32,
    batch=2,
    causal=True,
    kv_mask="lengths",
    bias="hts",
    segments="packed",
    softcap=2.0,
    qk_norm="l2",
    rotary="adjacent",
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
    Case("segments_packed", 129, 129, 2, 2, 16, batch=2, causal=True, segments="packed"),
    Case("segments_random", 65, 150, 4, 2, 16, batch=3, kv_mask="random", segments="random", bias="bhts"),
    Case("softcap", 70, 150, 4, 2, 16, batch=2, kv_mask="lengths", bias="hts", softcap=1.0),
    Case("softcap_577", 577, 577, 2, 1, 16, causal=True, softcap=2.0),
    Case("unit_queries", 33, 130, 4, 2, 96, batch=2, bias="hts", qk_norm="l2"),
    Case("rms_queries", 100, 100, 2, 2, 80, batch=2, causal=True, qk_norm="rms"),
    Case("rotary_adjacent", 7, 7, 4, 2, 20, batch=2, rotary="adjacent"),
    Case("rotary_halves", 50, 130, 4, 2, 96, causal=True, rotary="halves"),
    Case("rotary_packed", 140, 140, 2, 2, 16, batch=2, causal=True, segments="packed", rotary="halves"),
    Case("head_dim_256", 40, 70, 2, 1, 256, causal=True, qk_norm="rms", rotary="halves"),
    _ALL,
    dataclasses.replace(
        _ALL,
        name="all_other_kinds",
        kv_len=60,
        kv_mask="random",
        segments="random",
        qk_norm="rms",
        rotary="halves",
    ),
    dataclasses.replace(_ALL, name="all_one_token", q_len=1, kv_len=1),
    dataclasses.replace(_ALL, name="all_one_query", q_len=1, kv_len=577, segments="none"),
    dataclasses.replace(_ALL, name="all_half", dtype="float16"),
    dataclasses.replace(_ALL, name="all_brain_half", dtype="bfloat16", qk_norm="rms", rotary="halves"),
)

# 16384 tokens in a batch, and a model of width 2048, as is the custom for such tables.
LIBRARY = tuple(
    Case(
        f"{'causal' if causal else 'full'}_{length // 1024}k_{head_dim}",
        length,
        length,
        2048 // head_dim,
        2048 // head_dim,
        head_dim,
        batch=16_384 // length,
        dtype="bfloat16",
        causal=causal,
    )
    for length, head_dim, causal in itertools.product((2048, 4096, 8192, 16_384), (64, 128), (True, False))
)

CASES = PAPER + SMALL
