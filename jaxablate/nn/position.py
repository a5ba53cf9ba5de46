"""Positions: rotary, learned, sinusoidal, the depthwise-convolution PEG, and a learned bias of offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxablate.nn.linear import bias_uniform, linear, parameter

PositionKind = Literal["rope", "learned", "sinusoidal", "none"]


def rotary_tables(
    positions: Int[Array, "*batch length"], dim: int, base: float = 10_000.0
) -> tuple[Float[Array, "*batch length half"], Float[Array, "*batch length half"]]:
    """Cosines and sines of rotary position embedding (Su et al. 2021): pair i at position p turns by
    `p * base**(-2i/dim)` radians. `dim` must be even; `jaxablate_kernels.attention` does the turning.
    """
    if dim % 2:
        raise ValueError(f"rotary positions need an even head dimension, got {dim}")
    frequencies = jnp.asarray(base ** (-np.arange(0, dim, 2) / dim), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies.reshape(*(1,) * positions.ndim, -1)
    return jnp.cos(angles), jnp.sin(angles)


@dataclass(frozen=True)
class Rope:
    """Rotary positions on several axes, such as time, row and column: of each pair of features, which it follows.

    Attributes:
      frequencies: radians that pair i turns by per step along its axis.
      axes: the axis of pair i.
    """

    frequencies: tuple[float, ...]
    axes: tuple[int, ...]

    @classmethod
    def interleaved(cls, dim: int, sections: Sequence[int], base: float) -> Rope:
        """One row of dim/2 frequencies, `base**(-2i/dim)`, whose pairs the axes take in turn: 0 1 2 0 1 2 …

        Axis a gets `sections[a]` pairs, so that each sees high and low frequencies; what is left of the row when
        the later axes have theirs is axis 0's (Qwen3-VL, arXiv:2511.21631).
        """
        if dim % 2 or sum(sections) != dim // 2:
            raise ValueError(f"rotary sections {tuple(sections)} must share {dim}/2 pairs of features")
        count = len(sections)
        turns = [(i, i % count) for i in range(dim // 2)]
        return cls(
            tuple(base ** (-2 * i / dim) for i, _ in turns),
            tuple(axis if i < count * sections[axis] else 0 for i, axis in turns),
        )

    @classmethod
    def grid(cls, dim: int, axes: int = 2, base: float = 10_000.0) -> Rope:
        """Each axis has the same frequencies, those of a head of dim/axes features, and its pairs in one piece."""
        each = dim // axes
        if dim % (2 * axes):
            raise ValueError(
                f"rotary positions on {axes} axes need a head dimension of {2 * axes}n, got {dim}"
            )
        row = tuple(base ** (-i / each) for i in range(0, each, 2))
        return cls(row * axes, tuple(axis for axis in range(axes) for _ in row))

    def tables(
        self, positions: Int[Array, "*batch length axes"]
    ) -> tuple[Float[Array, "*batch length half"], Float[Array, "*batch length half"]]:
        """Cosines and sines, as `rotary_tables` gives them for one axis."""
        steps = positions[..., np.array(self.axes)].astype(jnp.float32)
        frequencies = np.array(self.frequencies, np.float32)
        angles = steps * frequencies.reshape(*(1,) * (positions.ndim - 1), -1)
        return jnp.cos(angles), jnp.sin(angles)


def sinusoidal(length: int, dim: int, base: float = 10_000.0) -> np.ndarray:
    """Table (length, dim) of Vaswani et al. 2017, section 3.5: sines at even, cosines at odd features."""
    angles = np.arange(length)[:, None] * base ** (-np.arange(0, dim, 2) / dim)[None, :]
    table = np.zeros((length, dim), np.float32)
    table[:, 0::2] = np.sin(angles)
    table[:, 1::2] = np.cos(angles)[:, : dim // 2]
    return table


class PositionEmbedding(nn.Module):
    """Adds a table of positions to embedded tokens. `rope` and `none` add nothing here: rope acts in attention."""

    kind: PositionKind
    max_length: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length dim"], positions: Int[Array, "batch length"] | None = None
    ) -> Float[Array, "batch length dim"]:
        """`positions` are those of the tokens; by default they stand at 0, 1, …"""
        _, length, dim = x.shape
        if length > self.max_length:
            raise ValueError(f"{length} tokens, but the table holds {self.max_length} positions")
        if self.kind == "learned":
            init = nn.initializers.normal(0.02)
            table = parameter(self, "table", init, (None, "embed"), (self.max_length, dim))
        elif self.kind == "sinusoidal":
            table = jnp.asarray(sinusoidal(self.max_length, dim))
        elif self.kind in ("rope", "none"):
            return x
        else:
            raise ValueError(f"position kind {self.kind!r}: valid: rope, learned, sinusoidal, none")
        rows = table[None, :length] if positions is None else table[positions]
        return x + rows.astype(x.dtype)


class Peg(nn.Module):
    """Positional encoding generator: a depthwise 3x3x3 convolution over the token grid (Chu et al. 2021).

    Zero padding is (1, 1) in height and width and (2, 0) in time, so that it is causal in time.
    Written as 27 shifted multiply-adds, which XLA fuses to one pass; its grouped 3-D convolution is
    far slower on a CPU, above all under `vmap`.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time height width dim"]
    ) -> Float[Array, "batch time height width dim"]:
        _, time, height, width, dim = x.shape
        init = bias_uniform(27)  # inputs of one output: the window
        kernel = parameter(self, "kernel", init, (None, None, None, "norm"), (3, 3, 3, dim)).astype(
            self.dtype
        )
        bias = parameter(self, "bias", init, ("norm",), (dim,)).astype(self.dtype)
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), (2, 0), (1, 1), (1, 1), (0, 0)))
        y = jnp.broadcast_to(bias, x.shape)
        for t, h, w in np.ndindex(3, 3, 3):
            window = padded[:, t : t + time, h : h + height, w : w + width]
            y = y + window * kernel[t, h, w][None, None, None, None, :]
        return y.astype(x.dtype)


class OffsetBias(nn.Module):
    """Additive attention bias from the offset of two grid cells, by a small perceptron.

    Offsets enter as sign(d) * ln(1 + |d|) per axis (the continuous bias of Swin v2, Liu et al. 2022),
    then two layers of `hidden` with LeakyReLU(0.1) and a projection to heads.
    """

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, height: int, width: int) -> Float[Array, "1 heads cells cells"]:
        rows, columns = np.arange(-height + 1, height), np.arange(-width + 1, width)
        offsets = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).astype(np.float32)
        x = jnp.asarray(np.sign(offsets) * np.log1p(np.abs(offsets)))
        for layer, fan_in in enumerate((2, self.hidden)):
            axes = (None, "norm")
            x = linear(self.hidden, axes, name=f"hidden_{layer}", dtype=jnp.float32, bias_fan_in=fan_in)(x)
            x = jax.nn.leaky_relu(x, 0.1)
        table = linear(self.heads, (None, "heads"), name="out", dtype=jnp.float32, bias_fan_in=self.hidden)(x)
        cell_rows, cell_columns = np.divmod(np.arange(height * width), width)
        row = cell_rows[:, None] - cell_rows[None, :] + height - 1
        column = cell_columns[:, None] - cell_columns[None, :] + width - 1
        return table[row, column].transpose(2, 0, 1)[None]
