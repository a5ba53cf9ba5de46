"""Low-rank adapters (Hu et al. 2022): what they are, and the trees of their parameters.

Beside a frozen kernel W stand A (inputs…, rank) and B (rank, outputs…), in the layout of the kernel, and the
projection gives W x + (alpha / rank) B(A(dropout(x))). `nn.projections` puts them there. Their names are those of
the projection with `lora_a/kernel` and `lora_b/kernel` behind it, so that `Stage(trainable=("*/lora_*",))` freezes
everything else.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from jaxablate.errors import UserError

A, B = "lora_a", "lora_b"
Tree = Mapping[str, Any]
Path = tuple[str, ...]


@dataclass(frozen=True)
class Lora:
    """Adapters of one model.

    Attributes:
      targets: glob patterns over the paths of projections, such as `*/attention/q`.
      dropout: of the adapter's input, in training.

    Raises:
      UserError: a value out of its range.
    """

    targets: tuple[str, ...]
    rank: int = 4
    alpha: float = 8.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.targets:
            raise UserError("lora: targets is empty; name projections, such as '*/attention/q'")
        if self.rank < 1:
            raise UserError(f"lora: rank={self.rank}; must be at least 1")
        if not self.alpha > 0:
            raise UserError(f"lora: alpha={self.alpha}; must be positive")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora: dropout={self.dropout}; must be at least 0 and below 1")

    @property
    def scale(self) -> float:
        """Factor of the low-rank product."""
        return self.alpha / self.rank

    def chooses(self, path: str) -> bool:
        """Whether the projection at `path` has an adapter."""
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.targets)


def split(params: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's parameters without its adapters, and the adapters alone."""
    flat = flatten_dict(dict(params))
    base = {path: value for path, value in flat.items() if not _is_adapter(path)}
    adapter = {path: value for path, value in flat.items() if _is_adapter(path)}
    return unflatten_dict(base), unflatten_dict(adapter)


def join(base: Tree, adapter: Tree) -> dict[str, Any]:
    """The parameters that `split` took apart. Adapters that the base has already are replaced."""
    ours, theirs = flatten_dict(dict(base)), flatten_dict(dict(adapter))
    return unflatten_dict(ours | theirs)


def merge(params: Tree, lora: Lora) -> dict[str, Any]:
    """The parameters of a model without adapters that computes the same: kernels plus their low-rank products.

    The sum is made in float32 and rounded once, to the kernel's dtype. It is the function that was trained only
    where the kernel is what the adapter was trained beside, so not for one that was stored quantised.

    Raises:
      UserError: a projection with an adapter has no kernel among the parameters.
    """
    base, adapter = split(params)
    return _add(base, adapter, lora.scale)


def unmerge(params: Tree, adapter: Tree, lora: Lora) -> dict[str, Any]:
    """Undoes `merge`: adapters again beside kernels, which return to within the rounding of the two sums.

    No float32 holds more of the sum than that. Who needs the kernels to the bit keeps them: `merge` changes nothing.
    """
    return join(_add(params, adapter, -lora.scale), adapter)


def low_rank_product(a: jax.Array, b: jax.Array, scale: float, stacked: int = 0) -> jax.Array:
    """scale A B in float32: (inputs…, rank) x (rank, outputs…) -> (inputs…, outputs…), for `stacked` leading axes."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        highest = lax.Precision.HIGHEST  # or a GPU rounds the factors to ten bits
        return scale * jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1, precision=highest)

    for _ in range(stacked):
        one = jax.vmap(one)
    return one(a, b)


def adapted(adapter: Tree) -> list[Path]:
    """Paths of the projections that an adapter's parameters belong to, sorted."""
    return sorted({path[:-2] for path in flatten_dict(dict(adapter))})


def _is_adapter(path: Path) -> bool:
    return len(path) > 1 and path[-2] in (A, B)


def _add(params: Tree, adapter: Tree, scale: float) -> dict[str, Any]:
    """Kernels plus `scale` times the products of their adapters."""
    flat, factors = flatten_dict(dict(params)), flatten_dict(dict(adapter))
    for module in adapted(adapter):
        a, b = (nn.unbox(factors[*module, name, "kernel"]) for name in (A, B))
        if (*module, "kernel") not in flat:
            raise UserError(
                f"lora: {'/'.join(module)} has no kernel to merge with; a quantised one stays apart from its adapter"
            )
        boxed = flat[*module, "kernel"]
        kernel = nn.unbox(boxed)
        stacked = a.ndim + b.ndim - 2 - kernel.ndim
        total = kernel.astype(jnp.float32) + low_rank_product(a, b, scale, stacked)
        flat[*module, "kernel"] = nn.meta.replace_boxed(boxed, total.astype(kernel.dtype))
    return unflatten_dict(flat)
