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
from jaxablate.studies.lora_space.features.descriptors import Tensors, Variant

Weights = Mapping[str, np.ndarray]  # of each tensor, those of all adapters: (N, *shape)
Found = dict[str, np.ndarray]  # representation -> float (N, dim)


def dim_of_tensor(representation: str, shape: Shape) -> int:
    """How many features a representation makes of one tensor; of a pair of them if it is `product`."""
    if representation == "flat_vec":
        return math.prod(shape)
    if representation == "product":
        return descriptors.PRODUCT_DIM
    return sum(descriptors.OF_TENSOR[part][0] for part in parts(representation))


def parts(representation: str) -> tuple[str, ...]:
    """Of which entries of `descriptors.OF_TENSOR` the features of a tensor are made, one after another."""
    return descriptors.ENSEMBLE if representation == "ensemble" else (representation,)


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
    places = {one: columns_of(shapes, one) for one in representations}
    found = {one: np.empty((count, feature_dim(shapes, one)), dtype) for one in representations}
    made_of = {one: parts(one) for one in representations if one not in ("flat_vec", "product")}
    needed = tuple(part for part in descriptors.OF_TENSOR if any(part in own for own in made_of.values()))
    factors = pairs(names) if "product" in representations else {}

    def describe(name: str) -> None:
        described = _of_tensor(_tensors(weights[name], needed), needed, variant)
        columns = {part: np.asarray(of_part) for part, of_part in described.items()}
        for one, own in made_of.items():
            np.concatenate([columns[part] for part in own], axis=1, out=found[one][:, places[one][name]])

    def multiply(name: str) -> None:
        down, up = (weights[factor] for factor in factors[name])
        found["product"][:, places["product"][name]] = _of_pair(_as_matrices(down), _as_factor(up), variant)

    def copy(name: str) -> None:
        found["flat_vec"][:, places["flat_vec"][name]] = weights[name].reshape(count, -1)

    jobs = [(multiply, common) for common in factors]
    jobs += [(describe, name) for name in names if needed]
    jobs += [(copy, name) for name in names if "flat_vec" in representations]
    if workers == 1:  # here, where the caller's settings of jax hold
        for work, what in jobs:
            work(what)
        return found
    with ThreadPoolExecutor(workers) as threads:
        for job in [threads.submit(work, what) for work, what in jobs]:
            job.result()
    return found


def columns_of(shapes: Mapping[str, Shape], representation: str) -> dict[str, slice]:
    """Where among the features those of each tensor are; of each pair, for `product`."""
    if representation == "product":
        dims = dict.fromkeys(pairs(shapes), descriptors.PRODUCT_DIM)
    else:
        dims = {name: dim_of_tensor(representation, shapes[name]) for name in sorted(shapes)}
    ends = list(itertools.accumulate(dims.values(), initial=0))
    return {name: slice(*ends[i : i + 2]) for i, name in enumerate(dims)}


def _tensors(x: np.ndarray, needed: Sequence[str]) -> Tensors:
    """As the descriptors take them. numpy sorts the rows of a matrix five times as fast as XLA does on a CPU."""
    matrices = _as_matrices(x)
    stood = matrices.shape[2] == 1
    if stood:
        matrices = matrices.reshape(len(x), 1, -1)
    sorts = jax.default_backend() == "cpu" and any(part in descriptors.SORTED for part in needed)
    ordered = np.sort(x.reshape(len(x), -1), axis=1) if sorts else None
    return Tensors(matrices, np.bool_(stood), ordered)


def _as_matrices(x: np.ndarray) -> np.ndarray:
    """(N, a, b): a kernel (out, in, h, w) as a matrix with a row for each output, a vector as one row."""
    return x.reshape(len(x), 1, -1) if x.ndim == 2 else x.reshape(len(x), x.shape[1], -1)


def _as_factor(x: np.ndarray) -> np.ndarray:
    """(N, o, r) of the second factor of a product: a vector is a column."""
    return x[:, :, None] if x.ndim == 2 else _as_matrices(x)


@functools.partial(jax.jit, static_argnames=("parts", "variant"))
def _of_tensor(tensors: Tensors, parts: tuple[str, ...], variant: Variant) -> dict[str, Float[Array, "N F"]]:
    return {one: descriptors.of_tensor(tensors, one, variant) for one in parts}


@functools.partial(jax.jit, static_argnames=("variant",))
def _of_pair(down: Float[Array, "N r i"], up: Float[Array, "N o r"], variant: Variant) -> Float[Array, "N F"]:
    return descriptors.product(down, up, variant)
