"""What one tensor of every adapter is described by: matrices (N, a, b) of N adapters to features (N, F).

The formulas are those of the study's document. Two of them keep more digits in single precision than they would
as written there (the entropy of a spectrum with one value, and singular values, which a Gram matrix would square).
Axes: N adapters, a x b the matrix, V its values in any order, F features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

VERSION = 1  # part of the cache key: raise it when the same weights give other features

EPS = 1e-8
TOP = 10  # singular values, and magnitudes of frequencies, that are kept
BINS = 50
RANK_QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
DISTRIBUTION_QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)

Matrices = Float[Array, "N a b"]
Features = Float[Array, "N F"]
Values = Float[Array, "N V"]
PerAdapter = Float[Array, " N"]
Variant = Literal["original", "optimized"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tensors:
    """One tensor of N adapters, of numpy or of jax.

    Attributes:
      x: float (N, a, b), as matrices; a column lies here as a row, so that both are one program.
      stood: bool (), whether it did so: only the sums of rows and of columns are not the same for the two.
      ordered: float (N, V), the values in ascending order; None if XLA is to sort them.
    """

    x: Any
    stood: Any
    ordered: Any = None


def _flat(x: Matrices) -> Values:
    return x.reshape(len(x), -1)


def _columns(*columns: PerAdapter) -> Features:
    return jnp.stack(columns, axis=-1)


def _norm(x: Float[Array, "N ..."]) -> PerAdapter:
    return jnp.sqrt(jnp.sum(x * x, axis=tuple(range(1, x.ndim))))


def _mean_and_std(values: Values) -> tuple[PerAdapter, PerAdapter, Values]:
    """Mean, unbiased standard deviation, and what is left without the mean."""
    mean = jnp.mean(values, axis=-1)
    centred = values - mean[:, None]
    return mean, jnp.sqrt(jnp.sum(centred * centred, axis=-1) / (values.shape[-1] - 1)), centred


def _skew_and_kurtosis(centred: Values, std: PerAdapter) -> tuple[PerAdapter, PerAdapter]:
    z = centred / (std + EPS)[:, None]
    squares = z * z
    return jnp.mean(squares * z, axis=-1), jnp.mean(squares * squares, axis=-1)


def _ascending(t: Tensors) -> Values:
    return jnp.sort(_flat(t.x), stable=False) if t.ordered is None else t.ordered


def _quantiles(ordered: Values, at: Sequence[float]) -> Features:
    """By linear interpolation between the two neighbours, of sorted values."""
    places = np.asarray(at) * (ordered.shape[-1] - 1)
    below = np.floor(places).astype(int)
    above = np.minimum(below + 1, ordered.shape[-1] - 1)
    share = jnp.asarray(places - below, ordered.dtype)[None]
    low, high = ordered[:, below], ordered[:, above]
    return low + share * (high - low)


# ------------------------------------------------------------------------------------ representations


def simple_stats(t: Tensors) -> Features:
    """Norm, mean, unbiased standard deviation, largest, smallest."""
    values = _flat(t.x)
    mean, std, _ = _mean_and_std(values)
    return _columns(_norm(values), mean, std, jnp.max(values, axis=-1), jnp.min(values, axis=-1))


def rank_based(t: Tensors) -> Features:
    """Nine quantiles, and the widths between the quartiles and between the outermost two."""
    found = _quantiles(_ascending(t), RANK_QUANTILES)
    widths = (found[:, 5] - found[:, 3], found[:, 8] - found[:, 0])
    return jnp.concatenate([found, _columns(*widths)], axis=-1)


def stats(t: Tensors) -> Features:
    """Mean, deviation, lower median, smallest, largest, skewness, kurtosis (3 for a normal distribution)."""
    ordered = _ascending(t)
    mean, std, centred = _mean_and_std(_flat(t.x))
    median = ordered[:, (ordered.shape[-1] - 1) // 2]
    return _columns(mean, std, median, ordered[:, 0], ordered[:, -1], *_skew_and_kurtosis(centred, std))


def singular_values(x: Matrices) -> Float[Array, "N S"]:
    """All min(a, b) of them, falling. One row has its norm; a few have those of the small R of x^T = Q R."""
    if min(x.shape[1:]) == 1:
        return _norm(x)[:, None]
    return jnp.linalg.svd(
        _triangle(x if x.shape[1] > x.shape[2] else jnp.swapaxes(x, 1, 2)), compute_uv=False
    )


def _triangle(tall: Float[Array, "N a b"]) -> Float[Array, "N c b"]:
    """R of tall = Q R, c = min(a, b); of a single column its norm, with no decomposition."""
    return _norm(tall)[:, None, None] if tall.shape[-1] == 1 else jnp.linalg.qr(tall, mode="r")


def of_spectrum(singular: Float[Array, "N S"], variant: Variant) -> Features:
    """32 features of singular values: the first ten, their shares, the gaps, entropy, condition number, sum.

    The condition number of fewer than ten values is taken with a zero (`original`) or with the last (`optimized`).
    """
    kept = min(TOP, singular.shape[-1])
    top = jnp.pad(singular[:, :kept], ((0, 0), (0, TOP - kept)))
    total = jnp.sum(top, axis=-1)[:, None]
    share = top / (total + EPS)
    gaps = (top[:, :-1] - top[:, 1:]) / (top[:, :-1] + EPS)
    # ln(p + e) of a p near 1 is what p lacks; p itself is rounded to a grid wider than e.
    lacking = (jnp.maximum(total - top, 0) + EPS) / (total + EPS)
    near_one = jnp.log1p(EPS - jnp.minimum(lacking, 0.5))
    entropy = -jnp.sum(share * jnp.where(lacking < 0.5, near_one, jnp.log(share + EPS)), axis=-1)
    last = top[:, TOP - 1] if variant == "original" else top[:, kept - 1]
    condition = top[:, 0] / (last + EPS)
    return jnp.concatenate([top, share, gaps, _columns(entropy, condition, total[:, 0])], axis=-1)


def spectral(t: Tensors, variant: Variant) -> Features:
    """`of_spectrum` of the tensor itself."""
    return of_spectrum(singular_values(t.x), variant)


def matrix_norms(t: Tensors) -> Features:
    """Frobenius, nuclear, spectral, largest column sum, largest row sum of |x|, and the two ratios to the first."""
    singular, size = singular_values(t.x), jnp.abs(t.x)
    frobenius, nuclear, largest = _norm(t.x), jnp.sum(singular, axis=-1), singular[:, 0]
    down, along = (jnp.max(jnp.sum(size, axis=axis), axis=-1) for axis in (1, 2))
    column, row = jnp.where(t.stood, along, down), jnp.where(t.stood, down, along)
    ratios = (nuclear / (frobenius + EPS), largest / (frobenius + EPS))
    return _columns(frobenius, nuclear, largest, column, row, *ratios)


def distribution(t: Tensors) -> Features:
    """Seven quantiles, quartile width, mean distance from the mean, relative deviation, skewness, kurtosis."""
    values = _flat(t.x)
    found = _quantiles(_ascending(t), DISTRIBUTION_QUANTILES)
    mean, std, centred = _mean_and_std(values)
    distance = jnp.mean(jnp.abs(centred), axis=-1)
    relative = std / (jnp.abs(mean) + EPS)
    rest = (found[:, 4] - found[:, 2], distance, relative, *_skew_and_kurtosis(centred, std))
    return jnp.concatenate([found, _columns(*rest)], axis=-1)


def frequency(t: Tensors) -> Features:
    """Of |F|, F = FFT2(x): ten largest, mean, biased deviation, largest, share of the ten in the energy.

    Real input has each frequency twice, but for those that are their own mirror images, so half is computed.
    """
    x = t.x
    wide = x if x.shape[1] <= x.shape[2] else jnp.swapaxes(x, 1, 2)  # the same magnitudes
    rows, columns = wide.shape[1:]
    size = jnp.abs(jnp.fft.rfft2(wide))
    twice = np.ones(size.shape[-1], bool)
    twice[0] = False
    if columns % 2 == 0:
        twice[-1] = False
    weight = jnp.asarray(np.where(twice, 2, 1), x.dtype)[None, None]
    count = rows * columns
    mean = jnp.sum(weight * size, axis=(1, 2)) / count
    spread = size - mean[:, None, None]
    std = jnp.sqrt(jnp.sum(weight * spread * spread, axis=(1, 2)) / count)
    mirrored = _largest(_flat(size[:, :, twice]))
    top = _largest(jnp.concatenate([_largest(_flat(size[:, :, ~twice])), mirrored, mirrored], axis=-1))
    energy = jnp.sum(weight * size * size, axis=(1, 2))
    share = jnp.sum(top * top, axis=-1) / (energy + EPS)
    return jnp.concatenate([top, _columns(mean, std, top[:, 0], share)], axis=-1)


def _largest(values: Values) -> Features:
    """The ten largest, falling, with zeros behind if there are fewer."""
    kept = min(TOP, values.shape[-1])
    return jnp.pad(lax.top_k(values, kept)[0], ((0, 0), (0, TOP - kept)))


def info_theoretic(t: Tensors) -> Features:
    """Entropy of a histogram of 50 bins from the smallest to the largest value, in nats and as a share of ln 50."""
    values = _flat(t.x)
    low, high = jnp.min(values, axis=-1)[:, None], jnp.max(values, axis=-1)[:, None]
    width = jnp.where(high > low, high - low, 1)
    bins = jnp.minimum(jnp.floor((values - low) / width * BINS), BINS - 1).astype(jnp.int32)
    counts = jax.vmap(functools.partial(jnp.bincount, length=BINS))(bins).astype(values.dtype)
    share = counts / (values.shape[-1] + EPS)
    entropy = -jnp.sum(share * jnp.log(share + EPS), axis=-1)
    return _columns(entropy, entropy / math.log(BINS))


def product(down: Float[Array, "N r i"], up: Float[Array, "N o r"], variant: Variant) -> Features:
    """36 features of W = up @ down, which is never formed: those of its spectrum, mean, deviation, and the largest
    norm of a row and of a column.

    With up = Q R and down^T = P T, the singular values of W are those of the small R T^T, the norms of its rows those
    of up T^T and those of its columns those of down^T R^T. No feature changes when up is multiplied by a matrix
    and down by its inverse.
    """
    tall = jnp.swapaxes(down, 1, 2)
    left, right = _triangle(up), _triangle(tall)
    core = left @ jnp.swapaxes(right, 1, 2)
    singular = jnp.abs(core[:, :, 0]) if core.shape[1:] == (1, 1) else jnp.linalg.svd(core, compute_uv=False)
    count = up.shape[1] * down.shape[2]
    mean = jnp.sum(jnp.sum(up, axis=1) * jnp.sum(down, axis=2), axis=-1) / count
    squares = jnp.sum(singular * singular, axis=-1)
    std = jnp.sqrt(jnp.maximum(squares - count * mean * mean, 0) / (count - 1))
    row, column = (
        jnp.sqrt(jnp.max(jnp.sum(jnp.square(factor @ jnp.swapaxes(other, 1, 2)), axis=-1), axis=-1))
        for factor, other in ((up, right), (tall, left))
    )
    return jnp.concatenate([of_spectrum(singular, variant), _columns(mean, std, row, column)], axis=-1)


# Of one tensor: how many features, and which.
OF_TENSOR: dict[str, tuple[int, Callable[..., Features]]] = {
    "simple_stats": (5, simple_stats),
    "rank_based": (11, rank_based),
    "stats": (7, stats),
    "spectral": (32, spectral),
    "matrix_norms": (7, matrix_norms),
    "distribution": (12, distribution),
    "frequency": (14, frequency),
    "info_theoretic": (2, info_theoretic),
}
SORTED = ("rank_based", "stats", "distribution")  # look at the values in ascending order
ENSEMBLE = ("spectral", "matrix_norms", "distribution", "frequency", "info_theoretic")  # in a row
PRODUCT_DIM = 36


def of_tensor(t: Tensors, representation: str, variant: Variant) -> Features:
    """The features of a tensor under one of the names in `OF_TENSOR`."""
    function = OF_TENSOR[representation][1]
    return function(t, variant) if representation == "spectral" else function(t)
