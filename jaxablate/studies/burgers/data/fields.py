"""Windows for training and a fixed few for evaluation, with the scores of what is predicted for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxablate.data import Batch
from jaxablate.studies.burgers import metrics
from jaxablate.studies.burgers.data.trajectories import Windows

EVALUATION_KEY = 7  # of the draw of the evaluation windows


@dataclass(frozen=True)
class Fields:
    """The opened data of Burgers (a `task.Source`).

    Attributes:
      train: windows of the training trajectories, of as many steps as the loss looks at.
      val: windows of the held-out ones, as long as an evaluated roll-out.
      mean, std: of the training fields; all windows are standardised by them.
      viscosities: of the held-out trajectories, ascending.
      fingerprint: of all values of both sides, however they are filed, and of mean and std.
      eval_windows: of an evaluation, equally many of each viscosity.
      eval_batch_size: the last batch may be smaller.
    """

    train: Windows
    val: Windows
    mean: float
    std: float
    viscosities: tuple[float, ...]
    fingerprint: str
    eval_windows: int
    eval_batch_size: int

    @property
    def description(self) -> str:
        """How much there is, in a few words."""
        rows, held_out = (sum(part.count for part in side.parts) for side in (self.train, self.val))
        return (
            f"{rows:,} training trajectories ({len(self.train):,} windows), {held_out:,} held out, viscosity "
            f"{', '.join(f'{viscosity:g}' for viscosity in self.viscosities)}; mean {self.mean:.6g}, deviation "
            f"{self.std:.6g}"
        )

    @cached_property
    def evaluation(self) -> list[Batch]:
        """`u` (B, 1 + rollout, cells), `viscosity` (B,) and `dt` (B,), float32.

        The windows are drawn without replacement, by a key that depends on nothing, and the viscosities take
        turns, so that all batches are alike.
        """
        each = self.eval_windows // len(self.viscosities)
        chosen = []
        for number, viscosity in enumerate(self.viscosities):
            rng = np.random.Generator(np.random.Philox(key=[EVALUATION_KEY, number]))
            chosen.append(rng.permutation(self.val.of(viscosity))[:each])
        order = np.stack(chosen, axis=1).ravel()
        return [
            self.val.batch(order[start : start + self.eval_batch_size].tolist())
            for start in range(0, len(order), self.eval_batch_size)
        ]

    def score(self, outputs: Sequence[Any]) -> dict[str, float]:
        """Metrics of one member, in physical units, from its `predict` outputs (see `metrics.evaluate`)."""
        return metrics.evaluate(outputs, self.evaluation, self.mean, self.std)

    def trivial(self, outputs: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """Nothing moves; everything is the mean of the training fields; everything is zero."""
        fields = {"mean": 0.0, "zero": -self.mean / self.std}
        return {
            "persistence": [_still(*pair) for pair in zip(outputs, self.evaluation, strict=True)],
            **{name: [_constant(given, value) for given in outputs] for name, value in fields.items()},
        }


def _still(given: Any, batch: Batch) -> dict[str, Any]:
    """What `predict` would give, had it returned each window's first frame for every other one."""
    first = batch["u"][:, 0]
    still = {name: first for name in given if name not in ("latent", "rollout")}
    if "rollout" in given:
        still["rollout"] = np.broadcast_to(first[:, None], np.shape(given["rollout"]))
    if "latent" in given:
        known = {name: given["latent"][name] for name in ("before", "after")}
        still["latent"] = {name: known.get(name, known["before"]) for name in given["latent"]}
    return still


def _constant(given: Any, value: float) -> dict[str, Any]:
    """What `predict` would give, had it one value for every cell, and nought for every token."""
    same: dict[str, Any] = {
        name: np.full(np.shape(field), value) for name, field in given.items() if name != "latent"
    }
    if "latent" in given:
        known = {name: given["latent"][name] for name in ("before", "after")}
        same["latent"] = {
            name: known.get(name, np.zeros(np.shape(tokens))) for name, tokens in given["latent"].items()
        }
    return same
