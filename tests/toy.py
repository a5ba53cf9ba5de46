"""A task small enough to train in a test: a two-layer network whose loss looks across the batch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxablate.data import Batch
from jaxablate.errors import UserError
from jaxablate.task import Stage, Task, Variables


@dataclass(frozen=True)
class ToyModel:
    width: int = 8
    noise: float = 0.0
    stages: Literal["one", "two"] = "one"


@dataclass(frozen=True)
class ToyData:
    count: int = 64
    problem: Literal["none", "broken", "kills"] = "none"  # kills: whoever opens it, by SIGKILL
    raises_at_seed: int = -1  # the evaluation of the run with this seed raises
    nan_at_seed: int = -1  # its loss is not a number
    nan_after: int = 0  # steps that it trains before
    lost: Literal["nan", "inf"] = "nan"  # what its loss is then
    memory: int = 0  # examples x members that fit in one micro-batch; 0: any number
    seconds: float = 0.0  # that it takes to read an example


class _Net(nn.Module):
    width: int
    noise: float

    @nn.compact
    def __call__(self, x: jax.Array, rngs: jax.Array | None = None) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        h = jnp.tanh(nn.Dense(self.width, kernel_init=init, name="hidden")(x))
        if rngs is not None:
            h = h + self.noise * jax.vmap(lambda key: jax.random.normal(key, (self.width,)))(rngs)
        self.variable("average", "input", lambda: jnp.zeros(x.shape[-1]))
        return nn.Dense(1, name="out")(h)[:, 0]


class ToyTask(Task[ToyModel, ToyData]):
    Model = ToyModel
    Data = ToyData
    response = "val/loss"
    directions = {"train/loss": "min", "val/loss": "min"}

    def __init__(self, config: Any, platform: str):
        super().__init__(config, platform)
        self.net = _Net(config.model.width, config.model.noise)

    def stages(self) -> tuple[Stage, ...]:
        training, optim = self.config.training, self.config.optim
        if self.config.model.stages == "one":
            return super().stages()
        return (Stage("first", training.steps // 2, optim), Stage("second", training.steps // 2, optim))

    def example(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {"x": jax.ShapeDtypeStruct((4,), jnp.float32), "y": jax.ShapeDtypeStruct((), jnp.float32)}

    def open(self, cache: Path) -> ToySource:
        if self.config.data.problem == "broken":
            raise UserError("toy.csv: is broken; mend it")
        if self.config.data.problem == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        return ToySource(self.config.data, self.config.training.batch_size // self.config.accumulation)

    def init(self, rng: jax.Array) -> Variables:
        variables = self.net.init(rng, jnp.zeros((1, 4)))
        seed = jax.random.key_data(rng)[-1].astype(jnp.int32)  # so that a fault can strike one member
        return {**variables, "average": {**variables["average"], "seed": seed, "steps": jnp.int32(0)}}

    def encode(self, variables: Variables, batch: Batch, rngs: jax.Array) -> tuple[Any, Any]:
        predicted: Any = self.net.apply(variables, batch["x"], rngs)
        return {"error": predicted - batch["y"], "predicted": predicted}, {"x": batch["x"].sum(0)}

    def loss(self, variables: Variables, features: Any) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        # The spread of the predictions couples the examples, as a contrastive loss does.
        spread = jnp.var(features["predicted"])
        decay = jnp.sum(jnp.square(variables["params"]["out"]["kernel"]))
        average, told = variables["average"], self.config.data
        struck = (average["seed"] == told.nan_at_seed) & (average["steps"] >= told.nan_after)
        lost = jnp.where(struck, float(told.lost), 0.0)
        return jnp.mean(jnp.square(features["error"])) + 0.1 * spread + 1e-3 * decay + lost, {
            "spread": spread
        }

    def advance(self, collections: Variables, sums: Any) -> Variables:
        average = collections["average"]
        return {"average": {**average, "input": average["input"] + sums["x"], "steps": average["steps"] + 1}}

    def predict(self, variables: Variables, batch: Batch) -> Any:
        error = self.net.apply(variables, batch["x"]) - batch["y"]
        return {"error": error, "seed": variables["average"]["seed"]}


@dataclass(frozen=True)
class ToySource:
    data: ToyData
    micro_batch: int
    _members: set[int] = field(default_factory=set)

    @property
    def fingerprint(self) -> str:
        return f"toy-{self.data.count}"

    @cached_property
    def train(self) -> ToyItems:
        return ToyItems(self.data.count, 0, self.data.seconds)

    @property
    def evaluation(self) -> Sequence[Batch]:
        items = ToyItems(16, 1)
        rows = [items[i] for i in range(16)]
        return [{key: np.stack([row[key] for row in rows]) for key in ("x", "y")}]

    def score(self, outputs: Sequence[Any]) -> dict[str, float]:
        self._fail(int(outputs[0].get("seed", -1)))
        return {"loss": float(np.mean(np.square(outputs[0]["error"])))}

    def _fail(self, seed: int) -> None:
        if seed >= 0 and seed == self.data.raises_at_seed:
            raise ValueError(f"the scan of seed {seed} is torn")
        self._members.add(seed)
        if self.data.memory and len(self._members) * self.micro_batch > self.data.memory:
            raise MemoryError("RESOURCE_EXHAUSTED: the toy's memory is full")

    def trivial(self, outputs: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        return {"zero": [{"error": -self.evaluation[0]["y"]}]}


class ToyItems:
    def __init__(self, count: int, split: int, seconds: float = 0.0):
        rng = np.random.default_rng(split)
        self._x = rng.normal(size=(count, 4)).astype(np.float32)
        self._y = np.sin(self._x.sum(1)).astype(np.float32)
        self._seconds = seconds

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int, /) -> Batch:
        time.sleep(self._seconds)
        return {"x": self._x[index], "y": self._y[index], "index": np.int32(index)}
