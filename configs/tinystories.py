"""TinyStories: what a small language model loses without its norm, position, gate, or with the norm moved.

    jaxablate run configs/tinystories.py                      # five arms, rates tuned, at tiny scale
    jaxablate run configs/tinystories.py:arms=all             # and five more
    python -m jaxablate.main --config=configs/tinystories.py:baseline,scale=low_resource

Scales: `tiny` trains on generated stories on two CPU cores; `low_resource` (40 M tokens) and `paper` (327.68 M)
want a GPU, and the tokens of the real stories in --config.data.train and .val (see `jaxablate data tokenize`), or
train on generated ones. Steps, warm-up and cadences follow from data.tokens, batch size and context.
"""

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

HYPOTHESES = (
    Hypothesis(
        "norm_helps", "superiority", "baseline", control="no_layer_norm", text="normalisation lowers the loss"
    ),
    Hypothesis(
        "pre_norm_helps", "superiority", "baseline", control="post_norm", text="pre-norm beats post-norm"
    ),
    Hypothesis(
        "position_helps", "superiority", "baseline", control="no_position_emb", text="RoPE beats no positions"
    ),
    Hypothesis("gate_helps", "superiority", "baseline", control="silu_ffn", text="the gate lowers the loss"),
)

# The document's, for the loss after its full budget of real stories.
EXPECTATIONS = (
    Expectation(
        "no normalisation: 15 to 30 % worse", arm="no_layer_norm", response="loss_best", low=1.15, high=1.3
    ),
    Expectation("post-norm: up to 10 % worse", arm="post_norm", response="loss_best", low=1.0, high=1.1),
    Expectation(
        "no positions: 5 to 15 % worse", arm="no_position_emb", response="loss_best", low=1.05, high=1.15
    ),
    Expectation("SiLU: up to 5 % worse", arm="silu_ffn", response="loss_best", low=1.0, high=1.05),
)
GATES = {
    "low_resource": Expectation(
        "baseline: about 1.8", arm="baseline", response="loss_best", against="nothing", high=1.8
    ),
    "paper": Expectation(
        "baseline: 1.32, at most 1.45", arm="baseline", response="loss_best", against="nothing", high=1.45
    ),
}

DEFAULT_RATE = {"tiny": 1e-3, "low_resource": 3e-4, "paper": 3e-4}
# Without a norm the document's sweep goes down from the default; elsewhere the grid lies around it.
LOWER = (1e-5, 2e-5, 5e-5, 1e-4, 3e-4)
RATES = {
    "tiny": LearningRate((1e-3, 3e-3, 1e-2), tuning_seeds=(100, 101)),
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
    del config  # what the config is by default


SCALES = {"tiny": tiny, "low_resource": low_resource, "paper": paper}


def base_config(scale: str) -> ConfigDict:
    """The config of a scale. Its cadences follow the budget, also when the command line changes that."""
    config = new_config(
        study="tinystories",
        task="jaxablate.studies.tinystories.task:LmTask",
        model=LmModel(loss_impl="chunked"),
        data=LmData(),
    )
    config.training.update(batch_size=32, eval_batch_size=32, order="random")
    SCALES[scale](config)
    config.scale = scale
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
    choice = parse_arg(arg, scale=SCALES, arms=ARMS)
    scale, arms = choice["scale"], ARMS[choice["arms"]]
    base = base_config(scale)
    return Study(
        name="tinystories",
        title="TinyStories: norm, its place, positions, gate",
        base=base,
        factors=FACTORS,
        arms=arms,
        seeds=SEEDS[scale],
        learning_rate=RATES[scale],
        responses=RESPONSES + OF_STORIES,
        hypotheses=HYPOTHESES,
        expectations=EXPECTATIONS + tuple(GATES[s] for s in GATES if s == scale),
    )


def get_config(arg: str = "") -> ConfigDict:
    choice = parse_arg(arg, arm=[arm.name for arm in ARMS["all"]], scale=SCALES, arms=ARMS)
    study = get_study(f"scale={choice['scale']},arms=all")
    config = study.config(choice["arm"])
    config.seeds = study.seeds[:1]
    return config
