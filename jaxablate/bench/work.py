"""The useful work of each operation: the FLOPs that its formula asks for, and the fewest bytes.

Declared, not counted in a program: what an implementation computes twice, or writes and reads again, is not
useful, so that rates of different implementations can be compared. The bytes are those of the arguments,
each read once, and of the results, each written once. A backward pass reads the arguments again and the
gradients of the results, and writes the gradients; what a forward pass could keep for it beyond its
arguments and results (a log-sum-exp, the reciprocal of a norm) is never needed, and small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

Direction = Literal["forward", "backward", "both"]
MATMULS = ("attention", "cross_entropy")  # the operations whose work is matrix products


class Shaped(Protocol):
    """An array, or a `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        ...

    @property
    def dtype(self) -> Any:
        """Type of the entries."""
        ...


@dataclass(frozen=True)
class Work:
    """Useful floating-point operations, and the fewest bytes moved to and from the device's memory."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Passes:
    """The work of a forward and a backward pass."""

    forward: Work
    backward: Work

    def of(self, direction: Direction) -> Work:
        """`both` is the sum: a training step has other layers between the two, so all is read again."""
        return {
            "forward": self.forward,
            "backward": self.backward,
            "both": self.forward + self.backward,
        }[direction]


def attention(
    q: Shaped,
    k: Shaped,
    *,
    causal: bool,
    learned: Iterable[Shaped] = (),
    fixed: Iterable[Shaped] = (),
) -> Passes:
    """Attention of q (B, T, H, D) and k, v (B, S, K, D).

    Forward 4 * B * H * D FLOPs for each query-key pair: a product and a sum in either matrix product.
    Backward 2.5 times that: five products instead of two, with the logits computed again (Dao 2023,
    arXiv:2307.08691, section 4.1). Pairs: T * S; with a causal mask half of them, or for T != S the area
    below its diagonal, which ends in the last corner. Masks that are data take nothing off. The softmax and
    what is done to q and k before the product are not counted.

    Args:
      q, k: v is as k, and the result as q.
      causal: whether there is a causal mask.
      learned: further arguments with a gradient: bias, scales of a QK-norm.
      fixed: further arguments without one: masks, segment ids, tables.
    """
    batch, q_len, heads, head_dim = q.shape
    kv_len = k.shape[1]
    seen = min(q_len, kv_len)
    pairs = seen * kv_len - seen**2 / 2 if causal else q_len * kv_len
    flops = 4 * batch * heads * head_dim * pairs
    learned = [q, k, k, *learned]
    return _passes(
        forward_flops=flops, backward_flops=2.5 * flops, learned=learned, fixed=[*fixed], results=[q]
    )


def norm(
    x: Shaped,
    parameters: Iterable[Shaped],
    *,
    kind: Literal["rms", "layer"],
    residual: Literal["none", "added"],
) -> Passes:
    """RMSNorm or LayerNorm of x (..., D), with a residual added before or without.

    An element costs an RMSNorm 4 operations forward (square, sum, times the root, times the scale) and 8
    backward (the normalised x, two terms of the gradient, one sum for each and for the scale's); a LayerNorm
    3 more either way for the mean. They are few beside the bytes, which decide. The sum with the residual is
    a result of the forward pass, and the backward pass needs nothing but it; the gradients to x and to the
    residual are one array.

    Args:
      x: the residual and both results are as it.
      parameters: scale, and bias if there is one, each (D,).
      kind: which of the two.
      residual: whether the forward pass adds one.
    """
    parameters = [*parameters]
    added = [x] if residual == "added" else []
    mean = 3 if kind == "layer" else 0
    n = math.prod(x.shape)
    forward = Work(n * (4 + mean + len(added)), _bytes(x, *added, *parameters, x, *added))
    gradients = [x, *added]  # of the results
    backward = Work(n * (8 + mean + len(added)), _bytes(x, *parameters, *gradients, x, *parameters))
    return Passes(forward, backward)


def gated(h: Shaped) -> Passes:
    """The gated product of h (..., 2, W).

    An element of the result costs 5 operations forward (the gate's exponential, sum, quotient and product,
    and the product of the halves) and 10 backward. They are few beside the bytes, which decide.
    """
    n = math.prod(h.shape) // 2
    y = np.empty(0, h.dtype).itemsize * n
    return Passes(Work(5 * n, _bytes(h) + y), Work(10 * n, _bytes(h) + y + _bytes(h)))


def cross_entropy(x: Shaped, w: Shaped, targets: Shaped, bias: Shaped | None = None) -> Passes:
    """Linear layer x (N, D) by w (D, V), and the cross entropy of its logits.

    2 * N * D * V FLOPs forward, 4 * N * D * V backward (one product for each of the gradients of x and w);
    logits that are computed again instead of kept are not counted. Results are two float32 numbers a row.
    """
    rows, dim = x.shape
    flops = 2 * rows * dim * w.shape[1]
    learned = [x, w] if bias is None else [x, w, bias]
    results = np.broadcast_to(np.float32(0), (rows, 2))
    return _passes(
        forward_flops=flops, backward_flops=2 * flops, learned=learned, fixed=[targets], results=[results]
    )


def roof_seconds(work: Work, flops_per_second: float, bytes_per_second: float) -> float:
    """The least time for this work within two limits (Williams et al. 2009): the longer of the two it needs."""
    return max(work.flops / flops_per_second, work.bytes / bytes_per_second)


def _passes(
    *,
    forward_flops: float,
    backward_flops: float,
    learned: list[Shaped],
    fixed: list[Shaped],
    results: list[Shaped],
) -> Passes:
    moved = _bytes(*learned, *fixed, *results)  # backward: the gradients of the results instead of these
    return Passes(Work(forward_flops, moved), Work(backward_flops, moved + _bytes(*learned)))


def _bytes(*arrays: Shaped) -> float:
    return float(sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in arrays))
