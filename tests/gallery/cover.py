"""What a declared change must not cover: the same arm changes something else, which nothing in it declares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxablate.config import new_config, parse_arg
from jaxablate.data import ArraySource
from jaxablate.study import Arm, Response, Study, one_factor_out, switch
from jaxablate.task import Stage, Variables
from tests.gallery.small import (
    HELD_OUT,
    TRAINING,
    Classifier,
    Exhibit,
    SmallTask,
    cross_entropy,
    points,
    short,
)

EXHIBITS = {
    "rate_under_weight": Exhibit("relu_weight", "schedule", ("rate is 0.0003", "it is 0.001", "optim.learning_rate")),
    "rate_under_rate": Exhibit("relu_rate", "schedule", ("learning_rate is 0.0009", "in 'rate' it is 0.003")),
    "decay_under_rate": Exhibit("rate", "schedule", ("weight_decay is 0.1", "optim.learning_rate declares no such")),
    "steps_under_weight": Exhibit("weight", "schedule", ("number of steps is 25", "it is 20", "training.steps would")),
    "rate_under_stages": Exhibit("staged", "schedule", ("learning_rate of stage 'main' is 0.0003",)),
    "batches_under_weight": Exhibit("weight", "data", ("sees other batches for the same", "model.weight declares")),
    "evaluation_under_order": Exhibit("ordered", "data", ("evaluated on another set", "training.order declares")),
    "data_under_batch": Exhibit("large", "data", ("trains on other data", "training.batch_size declares")),
    "mix_without_a_field": Exhibit("mixed", "data", ("sees other batches", "model.mix declares no such thing")),
    "init_under_weight": Exhibit("weight", "init", ("2 of 4 shared parameters", "no pair")),
    "init_under_rate": Exhibit("rate", "init", ("2 of 4 shared parameters", "no pair")),
    "init_under_init": Exhibit("relu_start", "init", ("2 of 4 shared parameters", "than in 'start'", "no pair")),
    "restart": Exhibit("staged", "schedule", ("learning rate rises again", "from 1e-05 to 0.001"), "note"),
    "endless_warmup": Exhibit("baseline", "schedule", ("20 steps long and warms up for 30", "only rises"), "note"),
    "average_is_not_kept": Exhibit("smooth", "function", ("training factor 'smooth'", "has no effect")),
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    activation: Literal["tanh", "relu"] = "tanh"
    weight: float = 0.0  # of a penalty on the logits
    start: Literal["random", "known"] = "random"  # where the parameters come from
    stages: Literal["one", "two"] = "one"
    mix: Literal["as_is", "balanced"] = "as_is"
    defect: str = "none"


@dataclass(frozen=True)
class Data:
    mix: Literal["as_is", "balanced"] = "as_is"


class CoverTask(SmallTask):
    Model, Data = Model, Data

    def __init__(self, config: Any, platform: str):
        super().__init__(config, platform)
        self.defect = config.model.defect
        self.net = Classifier(config.model.activation)
        self.relu, self.weighs = config.model.activation == "relu", config.model.weight > 0
        self.quick = config.optim.learning_rate > 1e-3

    def stages(self) -> tuple[Stage, ...]:
        model, optim, steps = self.config.model, self.config.optim, self.config.training.steps
        if self.defect == "rate_under_weight" and self.relu:  # "relu needs a smaller one"
            optim = dataclasses.replace(optim, learning_rate=3e-4)
        if self.defect == "rate_under_rate" and self.relu and self.quick:
            optim = dataclasses.replace(optim, learning_rate=0.3 * optim.learning_rate)
        if self.defect == "rate_under_stages" and model.stages == "two":
            optim = dataclasses.replace(optim, learning_rate=3e-4)
        if self.defect == "decay_under_rate" and self.quick:
            optim = dataclasses.replace(optim, weight_decay=0.1)
        if self.defect == "average_is_not_kept":
            optim = dataclasses.replace(optim, ema_decay=0.0)
        if self.defect == "steps_under_weight" and self.weighs:
            steps += 5
        if model.stages == "one":
            return (Stage("main", steps, optim),)
        first = ("*",) if self.defect == "restart" else ("head/*",)
        return (Stage("head", steps // 2, optim, first), Stage("main", steps // 2, optim))

    def open(self, cache: Path) -> ArraySource:
        model, training = self.config.model, points(TRAINING, 0)
        if "balanced" in (model.mix, self.config.data.mix):
            training["x"], training["y"] = training["x"][::-1], training["y"][::-1]
        if self.defect == "batches_under_weight" and self.weighs:
            training = {key: column[::-1] for key, column in training.items()}
        if self.defect == "data_under_batch" and self.config.training.batch_size > 12:
            training = points(TRAINING, 2)
        other = self.defect == "evaluation_under_order" and self.config.training.order == "file"
        return self.source(training, points(HELD_OUT, 3 if other else 1))

    def init(self, rng: jax.Array) -> Variables:
        model = self.config.model
        elsewhere = {
            "init_under_weight": self.weighs,
            "init_under_rate": self.quick,
            "init_under_init": self.relu and model.start == "known",
        }.get(self.defect, False)
        variables = super().init(jax.random.fold_in(rng, 1) if elsewhere else rng)
        return jax.tree.map(lambda x: 0.5 * x + 0.01, variables) if model.start == "known" else variables

    def loss(self, variables: Variables, features: Any) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        penalty = jnp.mean(jnp.square(features["logits"]))
        return cross_entropy(features["logits"], features["y"]) + self.config.model.weight * penalty, {}


def get_study(arg: str = "") -> Study:
    defect = parse_arg(arg, defect=("none", *EXHIBITS))["defect"]
    config = new_config(
        study="cover", task="tests.gallery.cover:CoverTask", model=Model(defect=defect), data=Data()
    )
    short(config)
    if defect == "endless_warmup":
        config.optim.warmup_steps = 30
    in_the_model = defect == "mix_without_a_field"
    factors = (
        switch("relu", "model", {"model.activation": "relu"}),
        switch("weight", "training", {"model.weight": 0.1}),
        switch("rate", "training", {"optim.learning_rate": 3e-3}),
        switch("smooth", "training", {"optim.ema_decay": 0.9}),
        switch("large", "training", {"training.batch_size": 20}),
        switch("start", "training", {"model.start": "known"}),
        switch("staged", "training", {"model.stages": "two"}),
        switch("ordered", "data", {"training.order": "file"}),
        switch("mixed", "data", {"model.mix" if in_the_model else "data.mix": "balanced"}),
    )
    both = [Arm(f"relu_{name}", {"relu": "on", name: "on"}) for name in ("weight", "rate", "start")]
    return Study(
        name="cover",
        base=config,
        factors=factors,
        arms=(*one_factor_out(factors), *both),
        seeds=(0, 1, 2),
        responses=(Response("val/accuracy", "max", chance=1 / 3),),
    )
