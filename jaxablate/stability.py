"""How steadily a run trains. Kept inside the compiled step, so that every step counts and a resumed run counts on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

WINDOW = 100  # losses that the median is taken over
FEWEST = 10  # of them before it means anything
SPIKE = 1.5  # times the median
METRICS = ("train/spikes", "train/largest_grad_norm")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stability:
    """Of the steps so far that were finite.

    Attributes:
      recent: float32 (WINDOW,), the newest losses in a ring; infinite where there is none yet.
      spikes: int32, steps whose loss was more than SPIKE times the median of the losses before it.
      largest_grad_norm: float32, of the gradient before clipping.
    """

    recent: Any
    spikes: Any
    largest_grad_norm: Any

    @classmethod
    def start(cls) -> Stability:
        """Before the first step."""
        return cls(jnp.full(WINDOW, jnp.inf, jnp.float32), jnp.int32(0), jnp.float32(0))

    def after(self, n: jax.Array, loss: jax.Array, grad_norm: jax.Array) -> Stability:
        """With the finite step `n`, counted from 1."""
        known = jnp.sum(jnp.isfinite(self.recent))
        ordered = jnp.sort(self.recent)  # what is not there comes last
        median = (ordered[(known - 1) // 2] + ordered[known // 2]) / 2
        spiked = (known >= FEWEST) & (loss > SPIKE * median)
        return replace(
            self,
            recent=self.recent.at[n % WINDOW].set(loss.astype(jnp.float32)),
            spikes=self.spikes + spiked,
            largest_grad_norm=jnp.maximum(self.largest_grad_norm, grad_norm.astype(jnp.float32)),
        )

    def metrics(self) -> dict[str, jax.Array]:
        """What is recorded with each logged step."""
        return dict(zip(METRICS, (self.spikes, self.largest_grad_norm), strict=True))
