"""The features of many adapters at once: one compiled program for each shape of a tensor, and threads over tensors."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxablate.studies.lora_space.data.names import Shape, pairs
from jaxablate.studies.lora_space.features import descriptors
from jaxablate.studies.lora_space.features.descriptors import Variant

Weights = Mapping[str, np.ndarray]  # of each tensor, those of all adapters: (N, *shape)
Found = dict[str, np.ndarray]  # representation -> float (N, dim)


def dim_of_tensor(representation: str, shape: Shape) -> int:
    """How many features a representation makes of one tensor; of a pair of them if it is `product`."""
    if representation == "flat_vec":
        return math.prod(shape)
    if representation == "product":
        return descriptors.PRODUCT_DIM
    parts = descriptors.PARTS if representation == "ensemble" else (representation,)
    return sum(descriptors.OF_TENSOR[part][0] for part in parts)


def feature_dim(shapes: Mapping[str, Shape], representation: str) -> int:
    """How many features a representation makes of an adapter with tensors of these names and shapes.

    Raises:
      UserError: `product` of a factor that stands alone.
    """
    if representation == "product":
        return len(pairs(shapes)) * descriptors.PRODUCT_DIM
    return sum(dim_of_tensor(representation, shape) for shape in shapes.values())


def features(
    weights: Weights, representations: Sequence[str], *, variant: Variant = "optimized", workers: int = 1
) -> Found:
    """Several representations of N adapters; what they have in common (sorted values, spectra) is computed once.

    Args:
      weights: float (N, *shape) of each tensor, by name; double precision wants one worker, and jax's x64.
      representations: names of the config.
      variant: of the condition number in `spectral`, `ensemble` and `product`.
      workers: threads, each with a tensor.

    Returns:
      (N, dim) of each representation: the features of one tensor after another, in the order of their names.

    Raises:
      UserError: `product` of a factor that stands alone.
      ValueError: double precision that would be lost.
    """
    names = sorted(weights)
    count, dtype = len(weights[names[0]]), weights[names[0]].dtype
    if dtype == np.float64 and not (workers == 1 and jax.config.read("jax_enable_x64")):
        raise ValueError("float64 weights need workers=1 and jax_enable_x64")
    shapes = {name: weights[name].shape[1:] for name in names}
    places = {one: _places(shapes, one) for one in representations}
    found = {one: np.empty((count, feature_dim(shapes, one)), dtype) for one in representations}
    compiled = tuple(one for one in representations if one not in ("flat_vec", "product"))
    factors = pairs(names) if "product" in representations else {}

    def put(representation: str, what: str, columns: Array | np.ndarray) -> None:
        start = places[representation][what]
        found[representation][:, start : start + columns.shape[1]] = columns

    def describe(name: str) -> None:
        for representation, columns in _of_tensor(_as_matrices(weights[name]), compiled, variant).items():
            put(representation, name, columns)

    def multiply(name: str) -> None:
        down, up = (weights[factor] for factor in factors[name])
        put("product", name, _of_pair(_as_matrices(down), _as_factor(up), variant))

    def copy(name: str) -> None:
        put("flat_vec", name, weights[name].reshape(count, -1))

    jobs = [(multiply, common) for common in factors]
    jobs += [(describe, name) for name in names if compiled]
    jobs += [(copy, name) for name in names if "flat_vec" in representations]
    if workers == 1:  # here, where the caller's settings of jax hold
        for work, what in jobs:
            work(what)
        return found
    with ThreadPoolExecutor(workers) as threads:
        for job in [threads.submit(work, what) for work, what in jobs]:
            job.result()
    return found


def _places(shapes: Mapping[str, Shape], representation: str) -> dict[str, int]:
    """In which column the features of each tensor (of each pair, for `product`) begin."""
    if representation == "product":
        return {common: i * descriptors.PRODUCT_DIM for i, common in enumerate(pairs(shapes))}
    names = sorted(shapes)
    dims = [dim_of_tensor(representation, shapes[name]) for name in names]
    return dict(zip(names, itertools.accumulate([0, *dims]), strict=False))


def _as_matrices(x: np.ndarray) -> np.ndarray:
    """(N, a, b): a kernel (out, in, h, w) as a matrix with a row for each output, a vector as one row."""
    return x.reshape(len(x), 1, -1) if x.ndim == 2 else x.reshape(len(x), x.shape[1], -1)


def _as_factor(x: np.ndarray) -> np.ndarray:
    """(N, o, r) of the second factor of a product: a vector is a column."""
    return x[:, :, None] if x.ndim == 2 else _as_matrices(x)


@functools.partial(jax.jit, static_argnames=("representations", "variant"))
def _of_tensor(
    x: Float[Array, "N a b"], representations: tuple[str, ...], variant: Variant
) -> dict[str, Float[Array, "N F"]]:
    return {one: descriptors.of_tensor(x, one, variant) for one in representations}


@functools.partial(jax.jit, static_argnames=("variant",))
def _of_pair(down: Float[Array, "N r i"], up: Float[Array, "N o r"], variant: Variant) -> Float[Array, "N F"]:
    return descriptors.product(down, up, variant)
