"""A study whose elements take long enough to be struck: that of `slow` more than a minute, `staged` has two."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxablate.config import new_config, parse_arg
from jaxablate.study import Response, Study, one_factor_out, switch
from tests.toy import ToyData, ToyModel

FACTORS = (
    switch("wide", "model", {"model.width": 16}),
    switch("wider", "model", {"model.width": 24}),
    switch("noisy", "model", {"model.noise": 0.1}),
    switch("staged", "model", {"model.stages": "two"}),
    switch("slow", "data", {"data.seconds": 0.08}),  # 8 examples a step, read by several threads
)


def get_study(arg: str = "") -> Study:
    steps = int(parse_arg(arg, steps=("120", "40"))["steps"])
    config = new_config(study="storm", task="tests.toy:ToyTask", model=ToyModel(), data=ToyData(seconds=0.01))
    config.scale = "tiny"
    config.optim.update(learning_rate=0.01, warmup_steps=2)
    config.training.update(steps=steps, batch_size=8, eval_every=20)
    config.host.update(log_every=1, checkpoint_every=2)
    return Study(
        "storm", FACTORS, one_factor_out(FACTORS), (0, 1), (Response("val/loss", "min", scale="log"),), config
    )


def get_config(arg: str = "") -> ConfigDict:
    return get_study().config("baseline")
