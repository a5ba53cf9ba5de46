"""The projection to a vocabulary, and the loss of its targets."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxablate.nn.layout import on_each_device
from jaxablate.nn.linear import fan_in_uniform, parameter
from jaxablate_kernels import TokenLosses, linear_cross_entropy


class VocabularyHead(nn.Module):
    """Logits of each token, or the cross-entropy of its target, for which the logits need not exist.

    Attributes:
      impl: name of the kernel of `losses` in `jaxablate_kernels.dispatch`; it never changes the function.
      z_loss: factor of logsumexp^2 (Chowdhery et al. 2022, section 5), which keeps logits from drifting.
      softcap: bounds the logits to softcap * tanh(logits / softcap); None for no bound.
      kernel_init: of the (dim, vocab) matrix.
      embedding: whose table, transposed, is the matrix (Press & Wolf 2017); None for a matrix of its own.
    """

    dim: int
    vocab: int
    impl: str = "reference"
    z_loss: float = 0.0
    softcap: float | None = None
    kernel_init: nn.initializers.Initializer = fan_in_uniform
    embedding: nn.Embed | None = None
    dtype: Any = jnp.float32

    def setup(self) -> None:
        if self.embedding is not None:
            self.kernel = self.embedding.embedding.T
        else:
            shape = (self.dim, self.vocab)
            self.kernel = parameter(self, "kernel", self.kernel_init, ("embed", "vocab"), shape)

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
        """The logits, in float32."""
        product = jnp.matmul(
            x.astype(self.dtype), self.kernel.astype(self.dtype), preferred_element_type=jnp.float32
        )
        return product if self.softcap is None else self.softcap * jnp.tanh(product / self.softcap)

    def losses(self, x: Float[Array, "batch length dim"], targets: Int[Array, "batch length"]) -> TokenLosses:
        """Both losses of each token, (batch, length) in float32; 0 where the target is -100."""
        kernel = functools.partial(
            linear_cross_entropy, impl=self.impl, z_loss=self.z_loss, softcap=self.softcap
        )

        def of_tokens(x: Array, w: Array, targets: Array) -> tuple[Array, Array]:
            found = kernel(x.reshape(-1, self.dim), w, targets.reshape(-1))
            return found.nll.reshape(targets.shape), found.z.reshape(targets.shape)

        # The weights stay float32: the kernel rounds them for the product and their gradient not at all.
        arrays = {"x": x.astype(self.dtype), "w": self.kernel, "targets": targets}
        tokens = ("batch", None)
        axes = {"x": (*tokens, None), "w": (None, None), "targets": tokens}
        return TokenLosses(*on_each_device(of_tokens, arrays, axes, (tokens, tokens)))
