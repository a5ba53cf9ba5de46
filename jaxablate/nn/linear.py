"""Projections and the initialiser they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what torch gives Linear and Conv (He et al. 2015 with a = sqrt(5)).
fan_in_uniform = initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# What gives the initialiser of a matrix from its numbers of inputs and outputs.
MatrixInit = Callable[[int, int], initializers.Initializer]


def torch_linear(fan_in: int, fan_out: int) -> initializers.Initializer:
    """torch's rule, whatever the fans: the initialiser reads them off the matrix."""
    del fan_in, fan_out
    return fan_in_uniform


def glorot_truncated(fan_in: int, fan_out: int) -> initializers.Initializer:
    """N(0, 2 / (fan_in + fan_out)) cut at three standard deviations (Glorot & Bengio 2010 gives the variance)."""
    return initializers.truncated_normal((2 / (fan_in + fan_out)) ** 0.5, lower=-3.0, upper=3.0)


def bias_uniform(fan_in: int) -> initializers.Initializer:
    """torch's bias initialiser for a layer of `fan_in` inputs: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Any, dtype: Any = None, **_: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def parameter(
    module: nn.Module,
    name: str,
    init: initializers.Initializer,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
) -> jax.Array:
    """A float32 parameter of `module` whose axes have logical names."""
    value: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    return value


def linear(
    features: int | Sequence[int],
    axes: tuple[str | None, ...],
    *,
    name: str | None,
    dtype: Any,
    bias_fan_in: int = 0,
    contract: int = 1,
    kernel_init: initializers.Initializer = fan_in_uniform,
) -> nn.DenseGeneral:
    """A projection with float32 parameters that computes in `dtype`.

    Args:
      features: output axes.
      axes: logical name of each kernel axis, inputs first.
      name: of the module; None where `setup` names it.
      bias_fan_in: number of inputs if there is a bias; 0 for none.
      contract: how many trailing input axes are contracted.
    """
    outputs = (features,) if isinstance(features, int) else tuple(features)
    return nn.DenseGeneral(
        features=outputs,
        axis=tuple(range(-contract, 0)),
        use_bias=bias_fan_in > 0,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, axes),
        bias_init=nn.with_logical_partitioning(bias_uniform(max(bias_fan_in, 1)), axes[-len(outputs) :]),
        name=name,
    )
