"""Numbers that two arms are compared by: where they are taken, and how far apart they are."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxablate.trees import flat

Flat = Mapping[str, np.ndarray]  # path -> value

# Of the largest value of an array. Where two arms should agree, they agree within SAME: reorderings of
# float32 sums stay below 1e-4 in a deep model, a forgotten scale or norm is above 1e-2. Where they should
# differ, what is not beyond CHANGED is rounding.
SAME = {"float32": 1e-3, "bfloat16": 5e-2}
CHANGED = {"float32": 2e-5, "bfloat16": 1e-2}


def perturbed(path: str, start: np.ndarray, draw: int) -> np.ndarray:
    """An initial value with noise that depends on (path, draw) alone, so that two arms get the same.

    At the init itself arms look alike that are not: gates at 0, scales at 1 and biases at 0 hide what they
    multiply and add, and behind a zero matrix (LoRA's B) nothing has a gradient.
    """
    if not np.issubdtype(start.dtype, np.floating):
        return start
    noise = np.random.default_rng([zlib.crc32(path.encode()), draw]).normal(size=start.shape)
    root_mean_square = float(np.sqrt(np.mean(np.square(start.astype(np.float64))))) if start.size else 0.0
    fan_in = max(int(np.prod(start.shape[:-1])), 1)
    spread = 0.25 * root_mean_square or min(0.1, fan_in**-0.5)
    return (start + spread * noise).astype(start.dtype)


@dataclass(frozen=True)
class Draw:
    """What an arm's program gave at one draw of the parameters, on the batch that all arms share."""

    batch: str  # digest of the training batch: losses and gradients of another are not comparable
    losses: Mapping[str, float]  # of each stage
    gradients: Flat  # of each stage, whose name precedes the path where there are several
    outputs: Mapping[str, Flat]  # digest of an evaluation batch -> `predict`'s outputs on it


@dataclass(frozen=True)
class Difference:
    """How far two arms are apart, relative to the size of the values; None: nothing to compare."""

    outputs: float | None
    loss: float | None
    gradients: float | None
    losses: tuple[float, float] = (0.0, 0.0)
    where: str = field(default="", compare=False)  # the gradient that differs most

    def beyond(self, limit: float) -> bool:
        """Whether anything differs by more."""
        return any(d is not None and d > limit for d in (self.outputs, self.loss, self.gradients))

    @property
    def nothing(self) -> bool:
        """Whether there was nothing to compare."""
        return self.outputs is None and self.gradients is None

    def __str__(self) -> str:
        if self.nothing:
            return "nothing to compare, since the examples have other shapes"
        parts = (("outputs", self.outputs), ("gradients", self.gradients))
        return ", ".join(f"{name} {_words(d)}" for name, d in parts if d is not None)


def difference(one: Draw, other: Draw) -> Difference:
    """Compares two draws on what they share: evaluation batches, and parameters if the batch is the same."""
    common = one.outputs.keys() & other.outputs.keys()
    outputs = max((_apart(one.outputs[key], other.outputs[key]) for key in common), default=None)
    if one.batch != other.batch:
        return Difference(outputs, None, None)
    paths = [
        p for p, g in one.gradients.items() if p in other.gradients and other.gradients[p].shape == g.shape
    ]
    # A gradient that is 0 in theory (a bias that softmax cancels) is rounding: the largest one bounds it.
    largest = max((_size(d.gradients[p]) for d in (one, other) for p in paths), default=0.0)
    gradients = {p: _relative(one.gradients[p], other.gradients[p], 1e-3 * largest) for p in paths}
    worst = max(gradients, key=lambda p: gradients[p], default="")
    losses = [(one.losses[stage], other.losses[stage]) for stage in one.losses if stage in other.losses]
    apart = [_relative(np.asarray(mine), np.asarray(theirs)) for mine, theirs in losses]
    loss, pair = max(zip(apart, losses, strict=True), default=(None, (0.0, 0.0)))
    return Difference(outputs, loss, gradients.get(worst), pair, worst)


def host(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree of arrays by their path, on the host."""
    return {path: np.asarray(leaf) for path, leaf in flat(jax.device_get(tree)).items()}


def digest(arrays: Mapping[str, Any]) -> str:
    """16 hex digits over names, dtypes, shapes and bits."""
    h = hashlib.blake2b(digest_size=8)
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        h.update(f"{name}:{value.dtype}:{value.shape}".encode())
        h.update(value.tobytes())
    return h.hexdigest()


def _words(apart: float) -> str:
    if apart == float("inf"):
        return "have other shapes, or are not finite in one alone"
    return f"differ by {apart:.1g}" if apart else "are equal"


def _apart(one: Flat, other: Flat) -> float:
    if one.keys() != other.keys():
        return float("inf")
    return max((_relative(one[k], other[k]) for k in one), default=0.0)


def _size(x: np.ndarray) -> float:
    return float(np.max(np.abs(x.astype(np.float64)), initial=0.0))


def _relative(a: np.ndarray, b: np.ndarray, floor: float = 0.0) -> float:
    """Largest difference over the largest value; infinite for other shapes, or if only one is finite."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.astype(np.float64), b.astype(np.float64)
    known = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return float("inf")
    size = max(_size(a[known]), _size(b[known]), floor)
    return _size(a[known] - b[known]) / size if size else 0.0
