"""A 2 x 2 study of the toy task: a wider network, and gradient accumulation, which must change nothing."""

from ml_collections import ConfigDict

from jaxablate.config import new_config, parse_arg
from jaxablate.study import Hypothesis, Response, Study, factorial, switch
from tests.toy import ToyData, ToyModel

FACTORS = (
    switch("wide", "model", {"model.width": 16}),
    switch("split", "implementation", {"training.accumulation": 2}),
)
ARMS = factorial(FACTORS)


def get_study(arg: str = "") -> Study:
    steps = int(parse_arg(arg, steps=("40", "200", "2"))["steps"])
    config = new_config(study="toy", task="tests.toy:ToyTask", model=ToyModel(), data=ToyData())
    config.scale = "tiny"
    config.optim.update(learning_rate=0.01, warmup_steps=2)
    config.training.update(steps=steps, batch_size=8, eval_every=max(steps // 4, 1))
    config.host.update(log_every=1, checkpoint_every=max(steps // 4, 1))
    return Study(
        name="toy",
        base=config,
        factors=FACTORS,
        arms=ARMS,
        seeds=(0, 1, 2),
        responses=(Response("val/loss", "min", scale="log"),),
        hypotheses=(
            Hypothesis("wide_helps", "superiority", factor="wide", scale="ratio"),
            Hypothesis("split_equal", "equivalence", "split", scale="ratio", margin=0.05),
        ),
        groups={"narrow": ("baseline", "split")},
    )


def get_config(arg: str = "") -> ConfigDict:
    return get_study().config(parse_arg(arg, arm=tuple(a.name for a in ARMS))["arm"])
