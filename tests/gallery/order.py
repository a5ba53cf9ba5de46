"""A curriculum: the order of the examples is what is varied, and it has to be an order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxablate.config import new_config, parse_arg
from jaxablate.data import ArraySource, Batch
from jaxablate.study import Response, Study, one_factor_out, switch
from jaxablate.task import Variables
from tests.gallery.small import HELD_OUT, TRAINING, Exhibit, SmallTask, points, short

EXHIBITS = {
    "shuffled_anyway": Exhibit("ordered", "data", ("order='file'", "first epoch begins with items", "shuffled")),
    "ordered_is_random": Exhibit("balanced", "function", ("data factor 'balanced'", "changes no data")),
    "changes_the_loss": Exhibit("balanced", "function", ("data factor 'balanced'", "changes the function too")),
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    defect: str = "none"


@dataclass(frozen=True)
class Data:
    mix: Literal["as_is", "balanced"] = "as_is"


class OrderTask(SmallTask):
    Model, Data = Model, Data

    def open(self, cache: Path) -> ArraySource:
        training, defect = points(TRAINING, 0), self.config.model.defect
        if self.config.data.mix == "balanced" and defect != "ordered_is_random":
            training = {key: np.concatenate([column[:30], column[:30]]) for key, column in training.items()}
            training["index"] = np.arange(TRAINING, dtype=np.int32)
        if defect == "shuffled_anyway":  # a trainer that shuffles whatever it is given
            order = np.random.default_rng(0).permutation(TRAINING)
            training = {key: column[order] for key, column in training.items()}
        return self.source(training, points(HELD_OUT, 1))

    def predict(self, variables: Variables, batch: Batch) -> Any:
        logits = super().predict(variables, batch)["logits"]
        sharper = self.config.model.defect == "changes_the_loss" and self.config.data.mix == "balanced"
        return {"logits": 2 * logits if sharper else logits}


def get_study(arg: str = "") -> Study:
    defect = parse_arg(arg, defect=("none", *EXHIBITS))["defect"]
    config = new_config(study="order", task="tests.gallery.order:OrderTask", model=Model(defect), data=Data())
    short(config)
    factors = (
        switch("ordered", "data", {"training.order": "file"}),
        switch("balanced", "data", {"data.mix": "balanced"}),
    )
    return Study(
        name="order",
        base=config,
        factors=factors,
        arms=one_factor_out(factors),
        seeds=(0, 1, 2),
        responses=(Response("val/accuracy", "max", chance=1 / 3),),
    )
