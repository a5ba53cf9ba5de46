"""Arms written by hand: what `get_config` trains is not what `get_study` declares."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxablate.config import new_config, parse_arg
from jaxablate.errors import UserError
from jaxablate.study import Factor, Response, Study, one_factor_out, switch
from tests.gallery.pairing import Model
from tests.gallery.small import Exhibit, NoData, short

EXHIBITS = {
    "other_rate": Exhibit("relu", "config", ("optim.learning_rate=0.0003", "get_study() has 0.001")),
    "other_batch": Exhibit("relu", "config", ("training.batch_size=6", "get_study() has 12")),
    "other_scale": Exhibit("relu", "config", ("scale='paper'", "get_study() has 'tiny'")),
    "more_than_declared": Exhibit("relu", "config", ("optim.b2=0.95", "get_study() has 0.99")),
    "empty_file": Exhibit("relu", "config", ("get_config fails", "no such arm yet")),
    "wrong_arm": Exhibit("relu", "config", ("arm='baseline'", "get_study() has 'relu'")),
    "declares_nothing_new": Exhibit("relu", "config", ("declares model.activation='tanh'", "already")),
    "twins": Exhibit("again", "config", ("the same run as arm 'relu'",), beside=("relu",)),
}  # fmt: skip
DEFECTS = ("none", *EXHIBITS)


def get_study(arg: str = "") -> Study:
    defect = parse_arg(arg, defect=DEFECTS)["defect"]
    config = new_config(study="files", task="tests.gallery.pairing:PairingTask", model=Model(), data=NoData())
    short(config)
    to = "tanh" if defect == "declares_nothing_new" else "relu"
    factors: tuple[Factor, ...] = (switch("relu", "model", {"model.activation": to}),)
    if defect == "twins":
        factors += (switch("again", "model", {"model.activation": "relu"}),)
    return Study(
        name="files",
        base=config,
        factors=factors,
        arms=one_factor_out(factors),
        seeds=(0, 1, 2),
        responses=(Response("val/accuracy", "max", chance=1 / 3),),
    )


def get_config(arg: str = "") -> ConfigDict:
    choice = parse_arg(arg, arm=("baseline", "relu", "again"), defect=DEFECTS)
    arm, defect = choice["arm"], choice["defect"]
    config = get_study(f"defect={defect}").config("baseline" if defect == "wrong_arm" else arm)
    config.seeds = (0,)
    if arm == "relu":
        match defect:
            case "other_rate":
                config.optim.learning_rate = 3e-4
            case "other_batch":
                config.training.batch_size = 6
            case "other_scale":
                config.scale = "paper"
            case "more_than_declared":
                config.optim.b2 = 0.95
            case "empty_file":
                raise UserError("no such arm yet")
    return config
