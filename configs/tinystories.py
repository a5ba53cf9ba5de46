"""TinyStories: what a small language model loses without its norm, position, gate, or with the norm moved.

    jaxablate run configs/tinystories.py                      # five arms, rates tuned, at tiny scale
    jaxablate run configs/tinystories.py:arms=all             # and five more
    python -m jaxablate.main --config=configs/tinystories.py:baseline,scale=low_resource

Scales: `tiny` trains on generated stories on two CPU cores; `low_resource` (40 M tokens) and `paper` (327.68 M)
want a GPU. Stories are generated unless `data=text` or `data=tokens` says otherwise, with --config.data.train and .val:

    jaxablate run configs/tinystories.py:scale=paper,data=tokens --config.data.train=train.npy --config.data.val=val.npy

Steps, warm-up and cadences follow from data.tokens, batch size and context.
"""

import functools

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from jaxablate.config import new_config, parse_arg
from jaxablate.studies.tinystories.config import LmData, LmModel
from jaxablate.study import Arm, Expectation, Factor, Hypothesis, LearningRate, Response, Study

FACTORS = (
    Factor(
        "norm",
        "model",
        {"rmsnorm": {}, "none": {"model.norm": "none"}, "layernorm": {"model.norm": "layernorm"}},
    ),
    Factor("placement", "model", {"pre": {}, "post": {"model.placement": "post"}}, same_parameters=0.0),
    Factor(
        "position",
        "model",
        {
            "rope": {},
            "none": {"model.position": "none"},
            "learned": {"model.position": "learned"},
            "sinusoidal": {"model.position": "sinusoidal"},
        },
    ),
    Factor(
        "ffn",
        "model",
        {"swiglu": {}, "silu": {"model.ffn": "silu"}, "gelu": {"model.ffn": "gelu"}},
        same_parameters=0.01,
    ),
    Factor("qk_norm", "model", {"off": {}, "on": {"model.qk_norm": "rms"}}),
)

DOCUMENT = (
    Arm("baseline"),
    Arm("no_layer_norm", {"norm": "none"}),
    Arm("post_norm", {"placement": "post"}),
    Arm("no_position_emb", {"position": "none"}),
    Arm("silu_ffn", {"ffn": "silu"}),
)
FURTHER = (
    Arm("layer_norm", {"norm": "layernorm"}),
    Arm("learned_position", {"position": "learned"}),
    Arm("sinusoidal_position", {"position": "sinusoidal"}),
    Arm("gelu_ffn", {"ffn": "gelu"}),
    Arm("qk_norm", {"qk_norm": "on"}),
)
ARMS = {"document": DOCUMENT, "all": DOCUMENT + FURTHER}

LOSS = Response("val/loss", "min", reduce="best", scale="log")
RESPONSES = (LOSS, Response("val/loss", "min", scale="log"), Response("val/perplexity", "min", scale="log"))
# Only of generated stories, where it is known what makes a token hard.
OF_STORIES = tuple(Response(f"val/{kind}_loss", "min", scale="log") for kind in ("copy", "recall", "other"))

helps = functools.partial(Hypothesis, claim="superiority", treatment="baseline", scale="ratio")
HYPOTHESES = (
    helps("norm_helps", control="no_layer_norm", text="normalisation lowers the loss"),
    helps("pre_norm_helps", control="post_norm", text="pre-norm beats post-norm"),
    helps("position_helps", control="no_position_emb", text="RoPE beats no positions"),
    helps("gate_helps", control="silu_ffn", text="the gate lowers the loss"),
)

# The document's, of the real stories and the full budget.
expect = functools.partial(Expectation, response="loss_best")
EXPECTATIONS = (
    expect("no normalisation: 15 to 30 % worse (real stories)", arm="no_layer_norm", low=1.15, high=1.3),
    expect("post-norm: up to 10 % worse (real stories)", arm="post_norm", low=1.0, high=1.1),
    expect("no positions: 5 to 15 % worse (real stories)", arm="no_position_emb", low=1.05, high=1.15),
    expect("SiLU: up to 5 % worse (real stories)", arm="silu_ffn", low=1.0, high=1.05),
)
# These are nats a token of the real stories with 10,000 ids, so nothing that other data could meet.
OF_REAL_STORIES = {
    "tiny": (),
    "low_resource": (
        expect("baseline: about 1.8", arm="baseline", against="nothing", low=1.7, high=1.9),
        Expectation("10 to 20 minutes an arm on an H100"),
    ),
    "paper": (
        expect("baseline: 1.32, at most 1.45", arm="baseline", against="nothing", high=1.45),
        Expectation("1 to 1.5 hours an arm on an H100, 2 to 4 on a consumer GPU"),
    ),
}

# At `tiny` the largest at which the baseline has no spike of its loss: there one sees what a norm is for.
DEFAULT_RATE = {"tiny": 2e-2, "low_resource": 3e-4, "paper": 3e-4}
# Without a norm the document's sweep goes down from the default; elsewhere the grid lies around it.
LOWER = (1e-5, 2e-5, 5e-5, 1e-4, 3e-4)
RATES = {
    "tiny": LearningRate((2e-3, 6e-3, 2e-2), tuning_seeds=(100, 101)),
    "low_resource": LearningRate(
        (1e-4, 3e-4, 1e-3, 3e-3), (100, 101, 102, 103), grids={"no_layer_norm": LOWER}
    ),
    "paper": LearningRate((1e-4, 3e-4, 1e-3), (100, 101), grids={"no_layer_norm": LOWER}),
}
SEEDS = {"tiny": (0, 1, 2, 3, 4), "low_resource": (42, 43, 44, 45, 46), "paper": (42, 43, 44)}


def tiny(config: ConfigDict) -> None:
    config.model.update(dim=96, layers=2, heads=4)
    config.data.update(vocab_size=512, context=64, tokens=400 * 16 * 64)
    config.training.batch_size = config.training.eval_batch_size = 16


def low_resource(config: ConfigDict) -> None:
    config.data.update(tokens=40_000_000, stories_characters=160_000_000)


def paper(config: ConfigDict) -> None:
    config.data.stories_characters = 160_000_000  # of generated ones; the document's are ten times as long


SOURCES = ("stories", "text", "tokens")
SCALES = {"tiny": tiny, "low_resource": low_resource, "paper": paper}


def base_config(scale: str, source: str) -> ConfigDict:
    """The config of a scale. Its cadences follow the budget, also when the command line changes that."""
    config = new_config(
        study="tinystories",
        task="jaxablate.studies.tinystories.task:LmTask",
        model=LmModel(loss_impl="chunked"),
        data=LmData(),
    )
    config.training.update(batch_size=32, eval_batch_size=32, order="random")
    SCALES[scale](config)
    config.scale, config.data.source = scale, source
    if source != "stories":
        config.data.update(stories_characters=LmData.stories_characters)
    config.optim.update(learning_rate=DEFAULT_RATE[scale], weight_decay=0.1, decay="all", decay_at="after")
    config.optim.update(b1=0.9, b2=0.999, eps=1e-8, clip_norm=1.0, end_fraction=0.1)

    tokens, context, batch = (  # references: what is made of them follows an override
        section.get_ref(name)
        for section, name in (
            (config.data, "tokens"),
            (config.data, "context"),
            (config.training, "batch_size"),
        )
    )
    steps = at_least(1, tokens // (batch * context))
    warmup = at_least(100, steps // 100)
    config.training.steps = steps
    config.optim.warmup_steps = warmup
    config.training.eval_every = 50 if scale == "tiny" else at_least(200, warmup)
    config.host.checkpoint_every = 100 if scale == "tiny" else at_least(1000, steps // 10)
    config.host.log_every = 10 if scale == "tiny" else 50
    return config


def at_least(least: int, value: FieldReference) -> FieldReference:
    """max(least, value) in the operations that a reference has."""
    return (value + least + abs(value - least)) // 2


def get_study(arg: str = "") -> Study:
    choice = parse_arg(arg, scale=SCALES, arms=ARMS, data=SOURCES)
    scale, source = choice["scale"], choice["data"]
    generated = source == "stories"
    return Study(
        name="tinystories",
        title="TinyStories: norm, its place, positions, gate",
        base=base_config(scale, source),
        factors=FACTORS,
        arms=ARMS[choice["arms"]],
        seeds=SEEDS[scale],
        learning_rate=RATES[scale],
        responses=RESPONSES + (OF_STORIES if generated else ()),
        hypotheses=HYPOTHESES,
        expectations=EXPECTATIONS + (() if generated else OF_REAL_STORIES[scale]),
    )


def get_config(arg: str = "") -> ConfigDict:
    names = [arm.name for arm in ARMS["all"]]
    choice = parse_arg(arg, arm=names, scale=SCALES, data=SOURCES, arms=ARMS)
    study = get_study(f"scale={choice['scale']},data={choice['data']},arms=all")
    config = study.config(choice["arm"])
    config.seeds = study.seeds[:1]
    return config
