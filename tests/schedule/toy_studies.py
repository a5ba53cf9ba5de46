"""Toy studies to run in a few seconds, one of them full of faults; and a launcher in a process of its own.

python -m tests.schedule.toy_studies STUDY WORKDIR '{"only": "failed"}'
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxablate.config import new_config
from jaxablate.errors import UserError
from jaxablate.schedule import local
from jaxablate.study import Arm, LearningRate, Response, Study, factorial, one_factor_out, switch
from tests.toy import ToyData, ToyModel

WIDE = switch("wide", "model", {"model.width": 16})
LOSS = Response("val/loss", "min", scale="log")
SLOW = {"data.seconds": 0.01}  # 8 examples a step: 12 steps a second at most


def base(workdir: str, **training: Any) -> Any:
    config = new_config(study="toy", task="tests.toy:ToyTask", model=ToyModel(), data=ToyData())
    config.scale, config.host.workdir = "tiny", workdir
    config.optim.update(learning_rate=0.01, warmup_steps=2)
    config.training.update(steps=4, batch_size=8, eval_every=4)
    config.training.update(**training)
    config.host.update(log_every=1, checkpoint_every=2)
    return config


def faults(workdir: str) -> Study:
    """An arm for each way to fail, of two seeds each."""
    factors = (
        switch("raises", "data", {"data.raises_at_seed": 1}),
        switch("diverges", "data", {"data.nan_at_seed": 1}),
        # Fits one member with half a batch: 2 x 8 > 4, 8 > 4, 4 <= 4.
        switch("tight", "data", {"data.memory": 4}),
        switch("hopeless", "data", {"data.memory": -1, "training.accumulation": 8}),
        switch("killed", "data", {**SLOW, "training.steps": 40}),
    )
    return Study("toy", factors, one_factor_out(factors), (0, 1), (LOSS,), base(workdir))


def tuned(workdir: str) -> Study:
    """Two arms; the highest rate of the grid is the best, so that it is extended once."""
    rule = LearningRate(grid=(0.0005, 0.002), tuning_seeds=(100, 101), extend=1)
    arms = factorial((WIDE,))
    return Study("toy", (WIDE,), arms, (0, 1), (LOSS,), base(workdir, steps=12), learning_rate=rule)


def slow(workdir: str) -> Study:
    """One arm of two seeds that takes a few seconds."""
    config = base(workdir, steps=60, eval_every=30)
    config.data.update(seconds=0.01)
    return Study("toy", (WIDE,), (Arm("baseline"),), (0, 1), (LOSS,), config)


def crashes(workdir: str) -> Study:
    """Two arms, one of which kills every process that opens its data."""
    factors = (switch("crashes", "data", {"data.problem": "kills"}),)
    return Study("toy", factors, one_factor_out(factors), (0,), (LOSS,), base(workdir))


STUDIES: Mapping[str, Any] = {"faults": faults, "tuned": tuned, "slow": slow, "crashes": crashes}


def main(argv: Sequence[str]) -> int:
    name, workdir, *more = argv
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    values = {
        key: tuple(v) if isinstance(v, list) else v
        for key, v in json.loads(more[0] if more else "{}").items()
    }
    try:
        outcome = local.run_study(STUDIES[name](workdir), local.RunOptions(**values))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(outcome.to_dict()))
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
