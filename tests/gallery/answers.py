"""Responses that cannot be believed: knowing nothing pays, worse counts as better, best is last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxablate.config import new_config, parse_arg
from jaxablate.data import ArraySource
from jaxablate.study import Response, Study, one_factor_out, switch
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

EXHIBITS = {
    "empty_answer": Exhibit("baseline", "response", ("'empty'", "knows nothing", "scores 100", "as good as can be")),
    "one_answer": Exhibit("baseline", "response", ("'always 0'", "scores 0.9", "better than the declared chance")),
    "not_a_number": Exhibit("relu", "response", ("val/accuracy", "is nan")),
    "constant": Exhibit("baseline", "response", ("0.5 whatever is predicted", "constant")),
    "direction": Exhibit("baseline", "response", ("declared 'min'", "the task says 'max'", "worse would be")),
    "best_is_last": Exhibit("baseline", "response", ("best of one evaluation", "step 20", "best is last")),
    "never_evaluated": Exhibit("baseline", "response", ("at step 12", "nearest is 10")),
    "misspelt": Exhibit("baseline", "response", ("no val/acuracy", "did you mean 'val/accuracy'?")),
    "log_scale": Exhibit("baseline", "response", ("log scale", "use scale='raw'")),
    "there_already": Exhibit("baseline", "response", ("untrained model", "target=0.05 already")),
    "below_chance": Exhibit("baseline", "response", ("target=0.2", "no better than chance")),
}  # fmt: skip
CHANCE = Response("val/accuracy", "max", chance=1 / 3)
RESPONSES = {
    "empty_answer": Response("val/accuracy", "max"),
    "direction": Response("val/accuracy", "min", chance=1 / 3),
    "best_is_last": Response("val/accuracy", "max", reduce="best", chance=1 / 3),
    "never_evaluated": Response("val/accuracy", "max", reduce="at", step=12, chance=1 / 3),
    "misspelt": Response("val/acuracy", "max", chance=1 / 3),
    "log_scale": Response("val/margin", "max", scale="log"),
    "there_already": Response("val/accuracy", "max", reduce="time_to", target=0.05, chance=0.0),
    "below_chance": Response("val/accuracy", "max", reduce="time_to", target=0.2, chance=1 / 3),
}


@dataclass(frozen=True)
class Model:
    activation: Literal["tanh", "relu"] = "tanh"
    defect: str = "none"


class AnswersTask(SmallTask):
    Model, Data = Model, NoData

    def __init__(self, config: Any, platform: str):
        super().__init__(config, platform)
        self.net = Classifier(config.model.activation)
        self.defect = config.model.defect

    def open(self, cache: Path) -> ArraySource:
        held_out = points(HELD_OUT, 1)
        if self.defect == "one_answer":  # a test set that is nearly all of one kind
            held_out["y"] = np.where(np.arange(HELD_OUT) % 10 == 9, held_out["y"], 0).astype(np.int32)
        source = self.source(points(TRAINING, 0), held_out)
        if self.defect == "empty_answer":
            nothing = {"logits": np.zeros((HELD_OUT, 0), np.float32)}
            source = ArraySource(
                source.training, source.held_out, source.batch_size, source.metrics, {"empty": nothing}
            )
        return source

    def score(self, outputs: Mapping[str, np.ndarray], label: np.ndarray) -> dict[str, float]:
        if self.defect == "empty_answer":  # an empty answer "is contained" in the right one, in percent
            logits = outputs["logits"]
            right = label == (logits.argmax(-1) if logits.size else label)
            return {"accuracy": 100 * float(np.mean(right))}
        scores = super().score(outputs, label)
        scores["margin"] = float(np.mean(np.sort(outputs["logits"])[:, 0]))
        if self.defect == "not_a_number" and self.config.model.activation == "relu":
            scores["accuracy"] = float("nan")
        if self.defect == "constant":  # compares the labels with themselves
            scores["accuracy"] = float(np.mean(label == label)) / 2
        return scores


def get_study(arg: str = "") -> Study:
    defect = parse_arg(arg, defect=("none", *EXHIBITS))["defect"]
    config = new_config(
        study="answers", task="tests.gallery.answers:AnswersTask", model=Model(defect=defect), data=NoData()
    )
    short(config)
    if defect == "best_is_last":
        config.training.eval_every = 50
    factors = (switch("relu", "model", {"model.activation": "relu"}),)
    return Study(
        name="answers",
        base=config,
        factors=factors,
        arms=one_factor_out(factors),
        seeds=(0, 1, 2),
        responses=(RESPONSES.get(defect, CHANCE),),
    )
