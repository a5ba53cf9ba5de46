"""What the exhibits share: a classifier of a second's compilation, and the form in which a defect is shown.

Each file of this folder is a study with a switch `defect`: `none` is the study as it should be, every other
value breaks it in one way that was found in a real one. `EXHIBITS` says what `check` must make of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxablate.data import ArraySource, Batch
from jaxablate.task import Task, Variables

CLASSES, FEATURES, TRAINING, HELD_OUT = 3, 4, 60, 30


@dataclass(frozen=True)
class Exhibit:
    """Where a defect shows, and the words of the message that names it."""

    arm: str
    check: str
    words: tuple[str, ...]
    verdict: str = "fail"
    beside: tuple[str, ...] = ()  # arms to check with it


@dataclass(frozen=True)
class NoData:
    """The section of a study whose data has no options."""


def points(count: int, seed: int) -> dict[str, np.ndarray]:
    """Three clouds of points, as many of each; `index` says where an item lies in the file."""
    rng = np.random.default_rng(seed)
    label = np.arange(count) % CLASSES
    x = np.eye(CLASSES, FEATURES)[label] + 0.5 * rng.normal(size=(count, FEATURES))
    return {"x": x.astype(np.float32), "y": label.astype(np.int32), "index": np.arange(count, dtype=np.int32)}


def accuracy(logits: np.ndarray, label: np.ndarray) -> float:
    return float(np.mean(logits.argmax(-1) == label))


def guesses(answer: int) -> dict[str, np.ndarray]:
    """The same answer to everything."""
    return {"logits": np.tile(np.eye(CLASSES, dtype=np.float32)[answer], (HELD_OUT, 1))}


class Classifier(nn.Module):
    """One hidden layer."""

    activation: str = "tanh"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.Dense(8, name="encoder")(x)
        return nn.Dense(CLASSES, name="head")(jnp.tanh(h) if self.activation == "tanh" else nn.relu(h))


class SmallTask(Task[Any, Any]):
    """Classifies the points. Exhibits override what is wrong with them."""

    response = "val/accuracy"
    directions = {"train/loss": "min", "val/loss": "min", "val/accuracy": "max"}
    net: nn.Module = Classifier()

    def example(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {
            "x": jax.ShapeDtypeStruct((FEATURES,), jnp.float32),
            "y": jax.ShapeDtypeStruct((), jnp.int32),
        }

    def open(self, cache: Path) -> ArraySource:
        return self.source(points(TRAINING, 0), points(HELD_OUT, 1))

    def source(self, training: Mapping[str, np.ndarray], held_out: Mapping[str, np.ndarray]) -> ArraySource:
        asked = {key: held_out[key] for key in ("x", "y")}
        size = self.config.training.eval_batch_size
        know_nothing = {f"always {answer}": guesses(answer) for answer in range(CLASSES)}
        return ArraySource(training, asked, size, lambda o: self.score(o, held_out["y"]), know_nothing)

    def score(self, outputs: Mapping[str, np.ndarray], label: np.ndarray) -> dict[str, float]:
        losses = -np.asarray(jax.nn.log_softmax(outputs["logits"]))[np.arange(len(label)), label]
        return {"accuracy": accuracy(outputs["logits"], label), "loss": float(losses.mean())}

    def init(self, rng: jax.Array) -> Variables:
        return self.net.init(rng, jnp.zeros((1, FEATURES)))

    def encode(self, variables: Variables, batch: Batch, rngs: jax.Array) -> tuple[Any, Any]:
        return {"logits": self.net.apply(variables, batch["x"]), "y": batch["y"]}, {}

    def loss(self, variables: Variables, features: Any) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        return cross_entropy(features["logits"], features["y"]), {}

    def predict(self, variables: Variables, batch: Batch) -> Any:
        return {"logits": self.net.apply(variables, batch["x"])}


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), label[..., None], axis=-1))


def short(config: Any) -> None:
    """Twenty steps, evaluated four times."""
    config.scale = "tiny"
    config.training.update(steps=20, batch_size=12, eval_every=5, eval_batch_size=15)
