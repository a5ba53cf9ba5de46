"""Trees of arrays: their leaves by path, what they amount to, and the names of their axes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np


def flat(tree: Any) -> dict[str, Any]:
    """Leaves by their path, `params/text/words/embedding`, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of jax as `text/words/embedding`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def digest(arrays: dict[str, Any]) -> str:
    """32 hex digits over names, dtypes, shapes and bits: equal exactly if the arrays are."""
    h = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        value = np.asarray(arrays[name])
        h.update(f"{name}:{value.dtype}:{value.shape}".encode())
        h.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return h.hexdigest()


def count(params: Any) -> int:
    """Number of parameters of one member."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))


def nbytes(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@dataclass(frozen=True)
class Axes:
    """Logical names of a leaf's axes; a class of its own, since jax takes tuples apart."""

    names: tuple[str | None, ...]

    @classmethod
    def of(cls, leaf: Any) -> Axes:
        """Those of a leaf; without a box they have none."""
        return cls(leaf.names if is_boxed(leaf) else (None,) * leaf.ndim)


def is_boxed(x: Any) -> bool:
    """Whether a leaf carries the logical names of its axes."""
    return isinstance(x, nn.Partitioned)
