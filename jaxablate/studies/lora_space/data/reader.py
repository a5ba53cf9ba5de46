"""What every layout of adapters gives: names and shapes, labels, and the weights of a stretch of adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from jaxablate.errors import UserError
from jaxablate.studies.lora_space.data.names import Shape
from jaxablate.studies.lora_space.data.split import Split

_ALIGNED = 64  # bytes
Weights = dict[str, npt.NDArray[np.float32]]  # of each tensor, those of several adapters: (N, *shape)


@dataclass(frozen=True)
class Described:
    """What is known of adapters before any weight is read.

    Attributes:
      tensors: the chosen ones' shapes, by name, sorted.
      among: those that would be chosen of all layers.
      categories: names of the labels, in order.
    """

    tensors: Mapping[str, Shape]
    among: Mapping[str, Shape]
    categories: tuple[str, ...]


@runtime_checkable  # so that tests can check what functions are given
class Reader(Protocol):
    """Adapters of one layout."""

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the labels."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """(N,), of all adapters."""
        ...

    @property
    def parts(self) -> Split | None:
        """The parts that the data came in, if it did."""
        ...

    def digest(self) -> str:
        """Of all weights and labels, whatever their place."""
        ...

    def read(self, start: int, stop: int, names: Sequence[str], workers: int) -> Weights:
        """The named tensors of adapters start to stop - 1. Raises UserError, one line, if they cannot be had."""
        ...

    def where(self, row: int) -> str:
        """What an adapter is called in messages."""
        ...


def room(shapes: Mapping[str, Shape], names: Sequence[str], count: int) -> Weights:
    """Arrays (count, *shape) to be filled. They begin where XLA takes them as they are, without a copy of its own."""
    made = {}
    for name in names:
        shape = (count, *shapes[name])
        held = np.empty(4 * math.prod(shape) + _ALIGNED, np.uint8)
        first = -held.ctypes.data % _ALIGNED
        made[name] = held[first : first + 4 * math.prod(shape)].view(np.float32).reshape(shape)
    return made


def check_finite(weights: Weights, reader: Reader, start: int) -> None:
    """Raises UserError, naming adapter and tensor, if a weight is NaN or infinite."""
    for name, values in weights.items():
        if np.isfinite(values).all():
            continue
        at = np.unravel_index(int(np.argmin(np.isfinite(values))), values.shape)
        raise UserError(
            f"{reader.where(start + int(at[0]))}: tensor '{name}' has {values[at]} among its weights; leave "
            f"that adapter out"
        )


def sorted_categories(names: Sequence[str], where: str) -> tuple[str, ...]:
    """The distinct ones in alphabetical order. Raises UserError if there is one alone."""
    found = tuple(sorted(set(names)))
    if len(found) < 2:
        raise UserError(
            f"{where}: has adapters of one category, '{names[0]}'; there is nothing to tell apart, give two or more"
        )
    return found


def different_shape(where: str, name: str, has: Shape, needs: Shape) -> UserError:
    """What is said when adapters do not agree."""
    return UserError(
        f"{where}: tensor '{name}' has the shape {has} and the first adapter's has {needs}; give adapters of one "
        f"rank and one model"
    )
