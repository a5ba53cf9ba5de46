"""The classifier of the LoRA weight-space study: a plain multilayer perceptron over an adapter's features."""

from __future__ import annotations

import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxablate.nn.linear import linear
from jaxablate.studies.lora_space.config import LoraSpaceModel


class Dropout(nn.Module):
    """Zeroes a value with probability `rate`, and scales it by 1 / (1 - rate) otherwise (Srivastava et al. 2014).

    The choice is a function of the example's key and of where the module stands, not of the batch around it.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"], keys: Array | None) -> Float[Array, "batch width"]:
        """`keys` has a key for each example; None to keep all, as in evaluation."""
        if keys is None or not self.rate:
            return x
        place = zlib.crc32("/".join(self.path).encode())

        def kept(key: Array) -> Array:
            return jax.random.bernoulli(jax.random.fold_in(key, place), 1 - self.rate, x.shape[1:])

        return jnp.where(jax.vmap(kept)(keys), x / (1 - self.rate), jnp.zeros((), x.dtype))


class Classifier(nn.Module):
    """`layers` x [Linear, BatchNorm, ReLU, Dropout], Linear; torch's initialisation of the linear layers.

    With `keys` it trains: a batch is normalised by its own mean and biased variance, which replace those in the
    mutable collection `batch_stats`. Without, it is normalised by what is there. The loop keeps the running
    averages (see `LoraSpaceTask.advance`), since only it knows which batches count.
    """

    config: LoraSpaceModel
    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch dim"], keys: Array | None) -> Float[Array, "batch classes"]:
        """Logits, in float32."""
        config = self.config
        for i in range(config.layers):
            width = x.shape[-1]
            x = self._linear(config.hidden, width, ("embed", "mlp"), f"linear_{i}")(x)
            x = nn.BatchNorm(
                use_running_average=keys is None,
                momentum=0.0,  # nothing is left of what was there before
                epsilon=config.norm_eps,
                use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where a mean is large
                dtype=self.dtype,
                name=f"norm_{i}",
            )(x)
            x = Dropout(config.dropout, name=f"dropout_{i}")(nn.relu(x), keys)
        head = self._linear(self.classes, x.shape[-1], ("embed", None), "head")
        return head(x).astype(jnp.float32)

    def _linear(self, features: int, inputs: int, axes: tuple[str | None, ...], name: str) -> nn.DenseGeneral:
        return linear(features, axes, name=name, dtype=self.dtype, bias_fan_in=inputs)
