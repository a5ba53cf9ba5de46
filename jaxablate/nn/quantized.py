"""Matrices stored in blocks of few bits: NF4 with double quantisation, and int8.

NF4 is the format of QLoRA (Dettmers et al. 2023, section 3) as bitsandbytes stores it: blocks of 64 weights,
row by row in torch's layout (outputs, inputs), each weight the nearest of 16 levels times its block's largest
magnitude. Those magnitudes, less their mean, are themselves stored in 8 bits, in groups of 256: the nearest
of the 256 numbers of `dynamic_levels` times the group's largest magnitude. That is 4 + 8/64 + 32/(64 * 256) =
4.127 bits a weight, and one float32 more, the mean.

int8 is symmetric and linear: whole numbers up to 127 and a float32 scale for each block of 64, 8.5 bits a weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

Kind = Literal["nf4", "int8"]
COLLECTION = "quantized"  # of Flax: apart from `params`, so without a gradient or an optimiser's state

BLOCK = 64
GROUP = 256  # blocks whose magnitudes share a scale

# Quantiles of the standard normal distribution, half of them on each side of an exact zero, the largest of
# them 1. The numbers are bitsandbytes'.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@functools.cache
def dynamic_levels() -> np.ndarray:
    """The 256 numbers of dynamic tree quantisation (Dettmers 2015, signed, seven exponents), ascending, float32.

    Zero, one, and in each of the decades up to 10^-6, ..., 1 twice as many numbers of either sign as in the one
    below it: the middles of 2^i equal parts of [0.1, 1], scaled.
    """
    decades = []
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        decades.append(10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = np.concatenate(decades)
    return np.sort(np.concatenate([-positive, [0.0], positive, [1.0]])).astype(np.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Nf4:
    """A matrix in NF4; of stacked layers every array has a leading axis."""

    codes: Any  # uint8 (blocks, 32): which level, two to a byte, the first in the high half
    absmax: Any  # uint8 (blocks,): which of `dynamic_levels`
    scale: Any  # float32 (groups,)
    offset: Any  # float32 (): the mean of the blocks' magnitudes
    shape: tuple[int, int] = field(metadata={"static": True})  # (outputs, inputs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """A matrix in int8; of stacked layers every array has a leading axis."""

    codes: Any  # int8 (blocks, 64)
    scale: Any  # float32 (blocks,)
    shape: tuple[int, int] = field(metadata={"static": True})  # (outputs, inputs)


Stored = Nf4 | Int8


def kind_of(stored: Stored) -> Kind:
    """How a matrix is stored."""
    return "nf4" if isinstance(stored, Nf4) else "int8"


def quantize(weight: Float[Array, "outputs inputs"], kind: Kind) -> Stored:
    """A matrix in torch's layout, stored. The last block and group are filled up with zeros."""
    n_out, n_in = weight.shape
    blocks = _in_rows(weight.astype(jnp.float32).reshape(-1), BLOCK)
    absmax = jnp.abs(blocks).max(axis=1)
    if kind == "int8":
        scale = absmax / 127
        codes = jnp.round(_over(blocks, scale)).astype(jnp.int8)
        return Int8(codes, scale, (n_out, n_in))
    nibbles = _nearest(_over(blocks, absmax), np.asarray(NF4_LEVELS, np.float32))
    offset = absmax.mean()
    centred = _in_rows(absmax - offset, GROUP)
    scale = jnp.abs(centred).max(axis=1)
    seconds = _nearest(_over(centred, scale), dynamic_levels()).reshape(-1)[: len(absmax)]
    return Nf4(_pack(nibbles), seconds, scale, offset, (n_out, n_in))


def dequantize(stored: Stored, dtype: Any) -> Float[Array, "outputs inputs"]:
    """The matrix that is stored, computed in float32 and rounded once, to `dtype`."""
    if isinstance(stored, Int8):
        values = stored.codes.astype(jnp.float32) * stored.scale[:, None]
    else:
        steps = jnp.asarray(dynamic_levels())[stored.absmax]
        scale = jnp.repeat(stored.scale, GROUP)[: len(steps)]
        absmax = steps * scale + stored.offset
        values = jnp.asarray(NF4_LEVELS, jnp.float32)[_unpack(stored.codes)] * absmax[:, None]
    return values.reshape(-1)[: math.prod(stored.shape)].reshape(stored.shape).astype(dtype)


def product(x: Array, stored: Stored, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Array:
    """`x`, whose last axes are `inputs`, times the stored matrix, in the dtype of `x`; its last axes become `outputs`.

    The matrix is unpacked again for the backward pass: what that keeps is the stored one, which is there anyway.
    """
    n_in = len(inputs)

    @jax.checkpoint
    def run(x: Array, stored: Stored) -> Array:
        kernel = dequantize(stored, x.dtype).reshape(*outputs, *inputs)
        axes = tuple(range(x.ndim - n_in, x.ndim)), tuple(range(len(outputs), kernel.ndim))
        return lax.dot_general(x, kernel, (axes, ((), ())))

    return run(x, stored)


def bits(stored: Any) -> float:
    """Bits a weight: of a stored matrix, of stacked ones, or of their shapes."""
    arrays = jax.tree.leaves(stored)
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    layers = math.prod(stored.codes.shape[:-2])
    return 8 * size / (layers * math.prod(stored.shape))


# ----------------------------------------------------------------------------------------- whole trees


def quantize_like(kernel: Array, like: Stored) -> Stored:
    """A kernel in Flax's layout (layers…, inputs…, outputs…), stored as `like` is, whose shapes alone are used.

    Raises:
      ValueError: the kernel is not of that matrix's size.
    """
    n_out, n_in = like.shape
    stack = like.codes.shape[:-2]
    if kernel.size != math.prod(stack) * n_out * n_in:
        raise ValueError(f"a kernel {kernel.shape} is no stack {stack} of matrices {n_in} x {n_out}")
    run = functools.partial(quantize, kind=kind_of(like))
    for _ in stack:
        run = jax.vmap(run)
    return run(kernel.reshape(*stack, n_in, n_out).swapaxes(-1, -2))


def quantize_params(
    params: Mapping[str, Any], like: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of a model whose kernels are not stored, for the model in which they are.

    Args:
      params: with a `kernel` wherever `like` has one.
      like: the collection `quantized` of that model, of which the shapes are used.

    Returns:
      The parameters that stay, and the collection.
    """
    rest: dict[Any, Any] = flatten_dict(nn.unbox(params))
    targets: dict[Any, Any] = flatten_dict(nn.unbox(like))
    stored = {path: quantize_like(rest.pop(path), target) for path, target in targets.items()}
    return unflatten_dict(rest), unflatten_dict(stored)


# ---------------------------------------------------------------------------------------------- blocks


def _in_rows(x: Array, length: int) -> Float[Array, "rows length"]:
    return jnp.pad(x, (0, -len(x) % length)).reshape(-1, length)


def _over(x: Float[Array, "rows n"], by: Array) -> Float[Array, "rows n"]:
    """Rows divided by their magnitudes; a row of zeros stays one."""
    return jnp.where(by[:, None] > 0, x / by[:, None], 0.0)


def _nearest(x: Float[Array, "rows n"], levels: np.ndarray) -> UInt8[Array, "rows n"]:
    """Index of the nearest level; of two that are equally near, the lower one."""
    middles = (levels[1:] + levels[:-1]) / 2
    return jnp.searchsorted(jnp.asarray(middles), x, side="left", method="compare_all").astype(jnp.uint8)


def _pack(codes: UInt8[Array, "rows n"]) -> UInt8[Array, "rows half"]:
    return codes[:, 0::2] << 4 | codes[:, 1::2]


def _unpack(packed: UInt8[Array, "rows half"]) -> Int[Array, "rows n"]:
    codes = jnp.stack([packed >> 4, packed & 15], axis=-1)
    return codes.reshape(len(packed), -1).astype(jnp.int32)
