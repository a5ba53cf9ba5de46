"""The toy task as a config file, for tests that go through the command line."""

from ml_collections import ConfigDict

from jaxablate.config import new_config
from tests.toy import ToyData, ToyModel


def get_config() -> ConfigDict:
    config = new_config(study="toy", task="tests.toy:ToyTask", model=ToyModel(), data=ToyData())
    config.arm, config.scale = "base", "tiny"
    config.optim.update(learning_rate=0.01, warmup_steps=5)
    config.training.update(steps=40, batch_size=8, eval_every=10)
    config.host.update(log_every=1, checkpoint_every=5)
    return config
