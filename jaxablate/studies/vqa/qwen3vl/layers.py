"""What tower and decoder have in common: the layer of their stacks, and where the stacks are cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import flax.linen as nn
from jaxtyping import Array

from jaxablate.nn.block import Block
from jaxablate_kernels import Rotary

NORM_EPS = 1e-6  # of all norms
PAIRING = "halves"  # of the features that rotary positions turn


def small_normal(fan_in: int, fan_out: int) -> nn.initializers.Initializer:
    """N(0, 0.02²) whatever the fans, as all published matrices began (`initializer_range` of config.json)."""
    del fan_in, fan_out
    return nn.initializers.normal(0.02)


class Layer(nn.Module):
    """A pre-norm block whose extra arguments are positional, as `Stack` hands them on."""

    attention: Callable[..., nn.Module]
    ffn: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, rotary: Rotary, positions: Array | None = None) -> Array:
        block = Block(self.attention, self.ffn, self.norm, name="block")
        return block(x, mask=mask, rotary=rotary, positions=positions)


def cut(depth: int, behind: Sequence[int]) -> tuple[int, ...]:
    """Depths of the stacks that `depth` layers fall into when they are cut behind some of them, counted from 0.

    There is always one more stack than cuts; the last may be empty.
    """
    edges = [0, *(i + 1 for i in behind), depth]
    return tuple(end - start for start, end in itertools.pairwise(edges))


def layer_at(stage: int, inside: int, depth: int, behind: Sequence[int]) -> int:
    """The number of a layer, from 0, that is the `inside`-th of a stack."""
    return sum(cut(depth, behind)[:stage]) + inside
