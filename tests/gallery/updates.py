"""Updates that are not what the study says: weights without effect, frozen parts that move, silent rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxablate.config import new_config, parse_arg
from jaxablate.data import Batch
from jaxablate.study import Response, Study, one_factor_out, switch
from jaxablate.task import Stage, Variables
from tests.gallery.small import CLASSES, FEATURES, Exhibit, NoData, SmallTask, cross_entropy, short

EXHIBITS = {
    "dead_weight": Exhibit("rollout", "function", ("training factor 'rollout'", "has no effect")),
    "dead_in_all_stages": Exhibit("late", "function", ("training factor 'late'", "has no effect")),
    "no_gradient": Exhibit("inverse", "function", ("moves the logged loss", "gives no gradient", "trains nothing")),
    "rate_by_arm": Exhibit("relu", "schedule", ("learning_rate", "is 0.0003", "in the baseline it is 0.001")),
    "thawed_by_arm": Exhibit("relu", "schedule", ("the trained part of stage 'probe'", "is *", "head/*")),
    "longer_by_arm": Exhibit("relu", "schedule", ("number of steps of stage 'probe'", "is 15", "it is 10")),
    "frozen_by_hand": Exhibit("baseline", "trained", ("no gradient", "encoder/kernel", "only weight decay")),
    "statistics_move": Exhibit("baseline", "trained", ("state of a frozen module", "batch_stats/encoder/mean")),
    "unused_norm": Exhibit("baseline", "trained", ("no gradient", "norm/scale")),
    "wrong_pattern": Exhibit("baseline", "trained", ("trains 'haed/*'", "matches no parameter", "head")),
    "not_finite": Exhibit("relu", "step", ("first step of stage 'probe' is not finite", "train/loss is")),
    "mean_of_a_part": Exhibit("split", "function", ("accumulation=3", "changes the function", "gradients")),
    "uneven_shards": Exhibit("split", "batch", ("accumulation=3 micro-batches", "4 examples", "data x fsdp = 6")),
    "weight_is_an_architecture": Exhibit("rollout", "function", ("changes the function", "model factor")),
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    activation: Literal["tanh", "relu"] = "tanh"
    rollout: float = 0.0  # weight of a second loss, on noisy inputs
    inverse: float = 0.0  # weight of a penalty on the hidden state
    late: float = 0.0  # weight of a penalty on the logits in the second stage, and in no other
    defect: str = "none"


class _Encoder(nn.Module):
    """A layer behind a running mean of its inputs; `frozen` blocks its gradient by hand."""

    activation: str
    frozen: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(FEATURES))
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (FEATURES, 8))
        if self.frozen:
            kernel = jax.lax.stop_gradient(kernel)
        h = (x - mean.value[None]) @ kernel
        return jnp.tanh(h) if self.activation == "tanh" else nn.relu(h)


class _Net(nn.Module):
    activation: str
    defect: str

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = _Encoder(self.activation, self.defect == "frozen_by_hand", name="encoder")(x)
        if self.defect == "unused_norm":
            nn.LayerNorm(name="norm")(h)
        return nn.Dense(CLASSES, name="head")(h), h


class UpdatesTask(SmallTask):
    """First the head alone, then all of it."""

    Model, Data = Model, NoData

    def __init__(self, config: Any, platform: str):
        super().__init__(config, platform)
        self.defect, self.relu = config.model.defect, config.model.activation == "relu"
        self.net = _Net(config.model.activation, self.defect)

    def stages(self) -> tuple[Stage, ...]:
        steps, optim = self.config.training.steps // 2, self.config.optim
        frozen, all_of_it = ("head/*",), ("*",)
        probe = Stage("probe", steps, optim, frozen)
        if self.defect == "rate_by_arm" and self.relu:  # "relu needs a smaller one"
            probe = dataclasses.replace(probe, optim=dataclasses.replace(optim, learning_rate=3e-4))
        if self.defect == "thawed_by_arm" and self.relu:
            probe = dataclasses.replace(probe, trainable=all_of_it)
        if self.defect == "longer_by_arm" and self.relu:
            probe = dataclasses.replace(probe, steps=steps + 5)
        if self.defect == "wrong_pattern":
            probe = dataclasses.replace(probe, trainable=("haed/*", "head/bias"))
        if self.defect == "statistics_move":
            return (probe,)
        return (probe, Stage("whole", steps, optim, all_of_it))

    def encode(self, variables: Variables, batch: Batch, rngs: jax.Array) -> tuple[Any, Any]:
        batch = dict(batch)
        if self.defect == "mean_of_a_part":  # a mean over the batch, taken where only a part of it is seen
            batch["x"] = batch["x"] - batch["x"].mean(0, keepdims=True)
        logits, hidden = self._net(variables, batch["x"])
        noise = jax.vmap(lambda key: jax.random.normal(key, (FEATURES,)))(rngs)
        rolled, _ = self._net(variables, batch["x"] + 0.3 * noise)
        mean = {"mean": batch["x"].sum(0) if self.defect == "statistics_move" else jnp.zeros(FEATURES)}
        return {"logits": logits, "hidden": hidden, "rolled": rolled, "y": batch["y"]}, mean

    def _net(self, variables: Variables, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        made: Any = self.net.apply(variables, x)
        return made

    def loss(self, variables: Variables, features: Any) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        model, hidden = self.config.model, features["hidden"]
        if self.defect == "no_gradient":  # a second operator that is not the one that is trained
            hidden = jax.lax.stop_gradient(hidden)
        rollout = 0.0 if self.defect == "dead_weight" else model.rollout  # its horizon was never set
        loss = cross_entropy(features["logits"], features["y"])
        loss += rollout * cross_entropy(features["rolled"], features["y"])
        loss += model.inverse * jnp.mean(jnp.square(hidden - 1.0))
        second = "third" if self.defect == "dead_in_all_stages" else "whole"  # a name that no stage has
        if self.stage is not None and self.stage.name == second:
            loss += model.late * jnp.mean(jnp.square(features["logits"]))
        if self.defect == "not_finite" and self.relu:
            loss = jnp.log(jnp.min(features["hidden"]) - 1.0)  # the logarithm of a negative number
        return loss, {}

    def advance(self, collections: Variables, sums: Any) -> Variables:
        return {
            "batch_stats": {"encoder": {"mean": collections["batch_stats"]["encoder"]["mean"] + sums["mean"]}}
        }

    def predict(self, variables: Variables, batch: Batch) -> Any:
        logits, _ = self._net(variables, batch["x"])
        hotter = self.defect == "weight_is_an_architecture" and self.config.model.rollout
        return {"logits": 2 * logits if hotter else logits}


def get_study(arg: str = "") -> Study:
    defect = parse_arg(arg, defect=("none", *EXHIBITS))["defect"]
    config = new_config(
        study="updates", task="tests.gallery.updates:UpdatesTask", model=Model(defect=defect), data=NoData()
    )
    short(config)
    config.host.mesh.data = 6 if defect == "uneven_shards" else 2
    factors = (
        switch("relu", "model", {"model.activation": "relu"}),
        switch("rollout", "training", {"model.rollout": 0.1}),
        switch("inverse", "training", {"model.inverse": 0.1}),
        switch("late", "training", {"model.late": 0.1}),
        switch("smooth", "training", {"optim.ema_decay": 0.9}),
        switch("split", "implementation", {"training.accumulation": 3}),
    )
    return Study(
        name="updates",
        base=config,
        factors=factors,
        arms=one_factor_out(factors),
        seeds=(0, 1, 2),
        responses=(Response("val/accuracy", "max", chance=1 / 3),),
    )
