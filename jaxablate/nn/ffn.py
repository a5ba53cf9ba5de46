"""Feed-forward layers, gated and not, and the widths that make them comparable."""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxablate.nn.layout import constrain, on_each_device
from jaxablate.nn.linear import MatrixInit, linear, torch_linear
from jaxablate_kernels import gated

FfnKind = Literal["gelu", "gelu_tanh", "silu", "geglu", "swiglu"]
GATED = ("geglu", "swiglu")
UNGATED = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),  # Hendrycks & Gimpel 2016, section 2
    "silu": jax.nn.silu,
}


class Ffn(nn.Module):
    """dim -> width -> dim. A gated kind projects to two halves of `width` each.

    Attributes:
      kind: activation; `gelu`, its approximation `gelu_tanh` and `silu` are ungated.
      width: hidden width; see `gated_width` and `matching_width`.
      bias: whether the projections have biases.
      gate_impl: name of the kernel of the gated product in `jaxablate_kernels.dispatch`; it never changes
        the function, and an ungated kind has none.
      matrix_init: of the matrices, from their fans; the halves of a gated layer are two matrices.
    """

    kind: FfnKind
    width: int
    bias: Literal["none", "all"] = "none"
    gate_impl: str = "reference"
    matrix_init: MatrixInit = torch_linear
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        if self.kind not in get_args(FfnKind):
            raise ValueError(f"ffn kind {self.kind!r}: valid: {', '.join(get_args(FfnKind))}")
        dim = x.shape[-1]
        with_bias = self.bias == "all"
        fan_in = dim * with_bias
        into = functools.partial(
            linear,
            name="wi",
            dtype=self.dtype,
            bias_fan_in=fan_in,
            kernel_init=self.matrix_init(dim, self.width),
        )
        if self.kind in GATED:
            # Halves as an axis of their own, so that the width can be split over devices.
            h = self._gated(into((2, self.width), ("embed", None, "mlp"))(x))
        else:
            h = UNGATED[self.kind](into(self.width, ("embed", "mlp"))(x))
        h = constrain(h, "batch", *(None,) * (h.ndim - 2), "mlp")
        out_init = self.matrix_init(self.width, dim)
        fan_in = self.width * with_bias
        return linear(
            dim, ("mlp", "embed"), name="wo", dtype=self.dtype, bias_fan_in=fan_in, kernel_init=out_init
        )(h)

    def _gated(self, h: Float[Array, "*batch 2 width"]) -> Float[Array, "*batch width"]:
        batch = ("batch",) + (None,) * (h.ndim - 3) if h.ndim > 2 else ()
        kind = "swiglu" if self.kind == "swiglu" else "geglu"
        kernel = functools.partial(gated, kind=kind, impl=self.gate_impl)
        return on_each_device(kernel, {"h": h}, {"h": (*batch, None, "mlp")}, (*batch, "mlp"))


def gated_width(dim: int, mult: float) -> int:
    """Width of a gated layer with the matrices of an ungated one of `mult * dim`: two thirds of it."""
    return int(mult * 2 / 3 * dim)


def ffn_params(kind: FfnKind, dim: int, width: int, bias: Literal["none", "all"] = "none") -> int:
    """Number of parameters of `Ffn`."""
    hidden = (2 if kind in GATED else 1) * width
    return dim * hidden + width * dim + (hidden + dim) * (bias == "all")


def ffn_flops(kind: FfnKind, dim: int, width: int) -> int:
    """Multiply-add FLOPs of one token's forward pass: 2 per matrix element, 1 per gate product."""
    hidden = (2 if kind in GATED else 1) * width
    return 2 * (dim * hidden + width * dim) + (width if kind in GATED else 0)


def matching_width(
    kind: FfnKind, other: FfnKind, other_width: int, dim: int, rule: Literal["params", "flops"]
) -> int:
    """The largest width at which `kind` has no more parameters (or FLOPs) than `other` at `other_width`."""
    cost = ffn_params if rule == "params" else ffn_flops
    return cost(other, dim, other_width) // cost(kind, dim, 1)
