"""Arms that are not paired: init, batches or evaluation set depend on the arm and not on the seed alone."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxablate.config import new_config, parse_arg
from jaxablate.data import ArraySource
from jaxablate.study import Response, Study, one_factor_out, switch
from jaxablate.task import Variables
from tests.gallery.small import (
    HELD_OUT,
    TRAINING,
    Classifier,
    Exhibit,
    NoData,
    SmallTask,
    points,
    short,
)

Defect = Literal["none", "init_by_arm", "batches_by_arm", "evaluation_by_arm", "less_data"]
EXHIBITS = {
    "init_by_arm": Exhibit("relu", "init", ("2 of 4 shared parameters", "same seed", "no pair")),
    "batches_by_arm": Exhibit("relu", "data", ("sees other batches", "same seed")),
    "evaluation_by_arm": Exhibit("relu", "data", ("evaluated on another set",)),
    "less_data": Exhibit("relu", "data", ("trains on other data",)),
}


@dataclass(frozen=True)
class Model:
    activation: Literal["tanh", "relu"] = "tanh"
    defect: Defect = "none"


class PairingTask(SmallTask):
    Model, Data = Model, NoData

    def __init__(self, config: Any, platform: str):
        super().__init__(config, platform)
        self.net = Classifier(config.model.activation)
        self.defect = config.model.defect
        self.of_the_arm = zlib.crc32(config.arm.encode())

    def init(self, rng: jax.Array) -> Variables:
        return super().init(jax.random.fold_in(rng, self.of_the_arm) if self.defect == "init_by_arm" else rng)

    def open(self, cache: Path) -> ArraySource:
        training, held_out = points(TRAINING, 0), points(HELD_OUT, 1)
        if self.defect == "batches_by_arm":  # "reproducible": every arm has a generator of its own
            order = np.random.default_rng(self.of_the_arm).permutation(TRAINING)
            training = {key: column[order] for key, column in training.items()}
        if self.defect == "evaluation_by_arm":
            held_out = points(HELD_OUT, self.of_the_arm)
        if self.defect == "less_data" and self.config.model.activation == "relu":
            training = points(TRAINING // 2, 0)
        return self.source(training, held_out)


def get_study(arg: str = "") -> Study:
    model = Model(defect=parse_arg(arg, defect=("none", *EXHIBITS))["defect"])  # pyright: ignore[reportArgumentType]
    config = new_config(study="pairing", task="tests.gallery.pairing:PairingTask", model=model, data=NoData())
    short(config)
    factors = (switch("relu", "model", {"model.activation": "relu"}),)
    return Study(
        name="pairing",
        base=config,
        factors=factors,
        arms=one_factor_out(factors),
        seeds=(0, 1, 2),
        responses=(Response("val/accuracy", "max", chance=1 / 3), Response("val/loss", "min", chance=1.0986)),
    )
