"""Normalisation: LayerNorm with and without bias, RMSNorm, none; alone or with the residual sum before it."""

from __future__ import annotations

from typing import Literal, get_args, overload

import flax.linen as nn
from jaxtyping import Array, Float

from jaxablate.nn.layout import on_each_device
from jaxablate.nn.linear import parameter
from jaxablate_kernels import add_layer_norm, add_rms_norm, layer_norm, rms_norm

NormKind = Literal["layernorm", "layernorm_nobias", "rmsnorm", "none"]


class Norm(nn.Module):
    """Normalises the last axis in float32 and scales it by a learned weight that starts at 1.

    Attributes:
      kind: `layernorm` (Ba et al. 2016), `layernorm_nobias`, `rmsnorm` (Zhang & Sennrich 2019) or `none`.
      eps: guards the division.
      eps_at: `inside` adds eps to the variance under the root; `outside` adds it to the root, so that
        tiny inputs still come out with unit size.
      impl: name of the kernel in `jaxablate_kernels.dispatch`; it never changes the function.
    """

    kind: NormKind
    eps: float = 1e-5
    eps_at: Literal["inside", "outside"] = "inside"
    impl: str = "reference"

    @overload
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]: ...
    @overload
    def __call__(
        self, x: Float[Array, "*batch dim"], residual: Float[Array, "*batch dim"]
    ) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch dim"]]: ...

    @nn.compact
    def __call__(self, x, residual=None):
        """The normalised `x`; with a `residual`, the normalised sum of the two, and the sum."""
        if self.kind not in get_args(NormKind):
            raise ValueError(f"norm kind {self.kind!r}: valid: {', '.join(get_args(NormKind))}")
        if self.kind == "none":
            total = x if residual is None else x + residual
            return total if residual is None else (total, total)
        arrays = {"x": x} if residual is None else {"x": x, "residual": residual}
        rows = ("batch",) + (None,) * (x.ndim - 1) if x.ndim > 1 else (None,)
        axes = dict.fromkeys(arrays, rows)
        arrays["scale"] = parameter(self, "scale", nn.initializers.ones, ("norm",), x.shape[-1:])
        if self.kind == "layernorm":
            arrays["bias"] = parameter(self, "bias", nn.initializers.zeros, ("norm",), x.shape[-1:])
        op = rms_norm if residual is None else add_rms_norm
        if self.kind != "rmsnorm":
            op = layer_norm if residual is None else add_layer_norm

        def normalise(**arrays: Array):
            return op(**arrays, eps=self.eps, eps_at=self.eps_at, impl=self.impl)

        axes |= {"scale": (None,), "bias": (None,)}
        return on_each_device(normalise, arrays, axes, rows if residual is None else (rows, rows))
