"""What is done when a member's response no longer improves: it slows down, stops, and goes back to its best.

Each member has a `Control` of its own inside its state, so that it is saved with it and a resumed run decides as an
undisturbed one. The scores come from the host; what follows from them is computed with the state. A run that asks for
none of this has no such state, and its program and checkpoints are what they would be without this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxablate.config import Direction
from jaxablate.task import Stage, Task

THRESHOLD = 1e-4  # of its size, by which a response must be better for the rate to stay


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Control:
    """How one member stands in its stage.

    Attributes:
      best: float32, the best response so far; NaN before there is one.
      best_at: int32, the step it was reached at; that before the stage's first if there is none.
      waited: int32, evaluations since then.
      stopped_at: int32, the step after which the member rests; -1 while it trains.
      share: float32, what is left of the learning rate.
      reference, patience: float32 and int32, the same as `best` and `waited` for the rate alone.
      kept: the variables at the best evaluation, copies; empty if they are not to be restored.
    """

    best: Any
    best_at: Any
    waited: Any
    stopped_at: Any
    share: Any
    reference: Any
    patience: Any
    kept: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Judged:
    """What an evaluation changes for one member.

    Attributes:
      control: with what is `kept` as it was: copying variables takes long, and is for those alone who need it.
      better: bool, whether the variables are to be kept.
      ends: bool, whether those that are kept then are to come back.
    """

    control: Control
    better: Any
    ends: Any


@dataclass(frozen=True)
class Standing:
    """What of a member's control is recorded.

    Attributes:
      stopped_at: the step after which it rests; None while it trains.
      best_at, best: when it was at its best in this stage, and how good that was; NaN if no response was a number.
      first: the step that the stage begins after.
    """

    stopped_at: int | None
    best_at: int
    best: float
    first: int

    def remark(self, response: str) -> str:
        """What there is to say of a member that goes back to its best, if that is what the stage began with."""
        if self.best_at > self.first:
            return ""
        back = f"back to step {self.first}, with which the stage began"
        if math.isnan(self.best):
            return f"no evaluation gave a number for {response}: {back}"
        return f"no evaluation was better than {response}={self.best:g} of the start: {back}"


@dataclass(frozen=True)
class Policy:
    """What follows from the responses of a stage, which begins after step `first` and ends with step `end`."""

    direction: Direction
    early_stop: int
    restore: Literal["last", "best"]
    factor: float
    patience: int
    first: int
    end: int

    @classmethod
    def of(cls, task: Task[Any, Any], stage: Stage, first: int) -> Policy | None:
        """What the config asks for in a stage that begins after step `first`; None if that is nothing."""
        training, optim = task.config.training, stage.optim
        if not training.early_stop and training.restore == "last" and optim.plateau_factor == 1:
            return None
        return cls(
            direction=task.directions[task.response],
            early_stop=training.early_stop,
            restore=training.restore,
            factor=optim.plateau_factor,
            patience=optim.plateau_patience,
            first=first,
            end=first + stage.steps,
        )

    def start(self, variables: Any) -> Control:
        """Before the first step of the stage; the variables it begins with come back unless others score better."""
        return Control(
            best=jnp.float32(jnp.nan),
            best_at=jnp.int32(self.first),
            waited=jnp.int32(0),
            stopped_at=jnp.int32(-1),
            share=jnp.float32(1),
            reference=jnp.float32(jnp.nan),
            patience=jnp.int32(0),
            kept=jax.tree.map(jnp.array, variables) if self.restore == "best" else {},
        )

    def judge(self, control: Control, response: jax.Array, n: jax.Array) -> Judged:
        """What follows from an evaluation at step `n`.

        Better is better by any amount, in float32; NaN never is. With `early_stop` evaluations in a row that are
        not, the member stops. The variables of the best one come back when it stops and at the end of the stage.

        The rate follows torch.optim.lr_scheduler.ReduceLROnPlateau with threshold 1e-4, relative: after more than
        `patience` evaluations in a row none of which is better by that share of the best, it is multiplied by
        `factor`, and they are counted anew. As there, what the stage begins with does not count; unlike there, the
        share is of the size of a response that may be negative, and a rate has no least change.
        """
        better = self._ahead(response, control.best, 0.0)
        waited = jnp.where(better, 0, control.waited + 1)
        stops = (waited >= self.early_stop) & (n < self.end) if self.early_stop else jnp.array(False)
        clearly = self._ahead(response, control.reference, THRESHOLD)
        patience = jnp.where(clearly, 0, control.patience + 1)
        slows = patience > self.patience
        counts = n > self.first  # otherwise nothing has been trained yet
        after = replace(
            control,
            best=jnp.where(better, response, control.best),
            best_at=jnp.where(better, n, control.best_at),
            waited=waited,
            stopped_at=jnp.where(stops, n, control.stopped_at),
            share=jnp.where(counts & slows, control.share * self.factor, control.share),
            reference=jnp.where(counts & clearly, response, control.reference),
            patience=jnp.where(counts, jnp.where(slows, 0, patience), control.patience),
        )
        return Judged(after, better, stops | (n == self.end))

    def _ahead(self, response: jax.Array, best: jax.Array, share: float) -> jax.Array:
        """Whether it is better than the best by more than a share of that one's size, or the first of them."""
        sign = 1 if self.direction == "max" else -1
        first = jnp.isnan(best) & ~jnp.isnan(response)
        return first | (sign * response > sign * best + share * jnp.abs(best))
