"""Burgers: does a U-shaped latent operator beat a plain stack, at two numbers of tokens, and does attention within
channel groups do as well as attention over all channels?

    jaxablate run configs/burgers.py                    # 2^3, controlled: arms differ in the declared factors alone
    jaxablate run configs/burgers.py:arms=faithful      # the document's own runs, which differ in much else

Scales: `tiny` generates 128 cells and trains on two CPU cores; `small` wants a GPU or an evening; `paper` is the
document's size on PDEBench files (give --config.data.train).
"""

import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxablate.config import new_config, parse_arg, set_path
from jaxablate.studies.burgers.config import BurgersData, BurgersModel
from jaxablate.study import Arm, Factor, Hypothesis, Response, Study, product, switch

TOKENS = {"tiny": (32, 64), "small": (64, 128), "paper": (128, 256)}

NRMSE = Response("val/nrmse", "min", scale="log")
RESPONSES = (
    NRMSE,
    *(
        Response(f"val/{name}", "min", scale="log")
        for name in (
            "nrmse_operator",
            "rollout_nrmse",
            "crmse",
            "brmse",
            "frmse_low",
            "frmse_middle",
            "frmse_high",
        )
    ),
)


def factors(scale: str) -> tuple[Factor, ...]:
    few, many = TOKENS[scale]
    return (
        Factor("tokens", "model", {str(few): {}, str(many): {"model.encoder.tokens": many}}),
        switch("unet", "model", {"model.core.kind": "pdet_unet"}),
        switch("channel_sep", "model", {"model.core.attention": "channel_separated"}),
    )


def name_of(levels: Mapping[str, str]) -> str:
    """The document's names, as far as it has any."""
    parts = [f"{levels['tokens']}tokens"]
    parts += ["unet"] if levels["unet"] == "on" else [] if levels["channel_sep"] == "on" else ["pure"]
    parts += ["channel_sep"] if levels["channel_sep"] == "on" else []
    return "_".join(parts)


def hypotheses(few: int, many: int) -> tuple[Hypothesis, ...]:
    pure, unet, separated = (f"{few}tokens_{shape}" for shape in ("pure", "unet", "channel_sep"))
    five = functools.partial(Hypothesis, treatment=pure, margin=0.05, scale="ratio")
    return (
        five("H1", "equivalence", control=unet, text="H1: the pure stack is within 5 % of the U"),
        five("H1_one_sided", "non_inferiority", control=unet, primary=False, text="H1, one-sided: at most 5 % worse"),
        Hypothesis(
            "H2", "superiority", f"{many}tokens_pure", control=f"{many}tokens_unet", margin=0.1, scale="ratio",
            text="H2: with more tokens the stack is at least 10 % better than the U",
        ),
        five("H3", "equivalence", control=separated, text="H3: standard attention is within 5 % of the separated one"),
        five(
            "H3_one_sided", "non_inferiority", control=separated, primary=False,
            text="H3, one-sided: standard is no more than 5 % worse",
        ),
    )  # fmt: skip


def run_of_the_document(
    kind: str, attention: str, tokens: int, dim: int, hidden: int, heads: int, group: int, **others: object
) -> dict[str, object]:
    """The config paths in which the document's runs differ, with one run's values."""
    return {
        "model.core.kind": kind,
        "model.core.attention": attention,
        "model.encoder.tokens": tokens,
        "model.encoder.dim": dim,
        "model.core.hidden": hidden,
        "model.core.heads": heads,
        "model.core.group": group,
        "model.core.depths": (3, 3, 2),
        **others,
    }


FAITHFUL = {
    "128tokens_unet": run_of_the_document("pdet_unet", "channel_separated", 128, 128, 256, 8, 32),
    "256tokens_unet": run_of_the_document(
        "pdet_unet", "channel_separated", 256, 256, 512, 8, 32, **{"model.core.depths": (3, 3, 3)}
    ),
    "128tokens_pure": run_of_the_document("pdet_stack", "standard", 128, 64, 192, 6, 24),
    "256tokens_pure": run_of_the_document("pdet_stack", "standard", 256, 192, 384, 6, 24),
    "128tokens_channel_sep": run_of_the_document("pdet_stack", "channel_separated", 128, 64, 192, 6, 24),
}


def tiny(config: ConfigDict) -> None:
    config.model.encoder.update(tokens=32, dim=16, stem=8)
    config.model.decoder.update(hidden=32, layers=1, heads=4, ffn=64)
    config.model.core.update(hidden=32, depth=2, depths=(1, 1), heads=4, group=8)
    config.model.core.drop_path = 0.0
    config.model.residual_gain = "zero"
    config.model.conditioning.noise = ()
    config.data.update(
        cells=128, time_stride=10, frames=100, trajectories=512, held_out=16, starts="every_frame"
    )
    config.optim.update(learning_rate=4e-3, warmup_steps=20, ema_decay=0.98)
    config.training.update(steps=600, batch_size=64, eval_batch_size=64, eval_every=200)
    config.model.autoencoder.update(steps=500, learning_rate=5e-3)
    config.model.corrector.update(steps=100, learning_rate=1e-3)
    config.model.distill.update(steps=50, learning_rate=3e-4)
    config.host.update(checkpoint_every=50)


def small(config: ConfigDict) -> None:
    config.model.encoder.update(tokens=64, dim=32)
    config.model.core.update(hidden=96, depth=4, depths=(2, 2))
    config.data.update(cells=256, time_stride=10, trajectories=512, held_out=64)
    config.optim.update(warmup_steps=200)
    config.training.update(steps=5000, batch_size=128, eval_every=500)
    config.model.autoencoder.steps = 3000
    config.model.corrector.steps = config.model.distill.steps = 1500


def paper(config: ConfigDict) -> None:
    config.data.source = "pdebench"
    # Eight trajectories of 100 pairs, accumulated six times; 25, 8 and 8 epochs of 9,000 trajectories.
    config.training.update(steps=4688, batch_size=4800, accumulation=6, eval_every=188)
    config.model.autoencoder.steps = 1880
    config.model.corrector.steps = config.model.distill.steps = 1500
    config.host.update(checkpoint_every=188, workers=8)


SCALES = {"tiny": tiny, "small": small, "paper": paper}


def base_config(scale: str) -> ConfigDict:
    config = new_config(
        study="burgers",
        task="jaxablate.studies.burgers.task:BurgersTask",
        model=BurgersModel(),
        data=BurgersData(),
    )
    config.optim.update(learning_rate=1e-3, weight_decay=0.03, b2=0.999, clip_norm=1.0, ema_decay=0.999)
    config.training.update(eval_batch_size=64)
    SCALES[scale](config)
    config.scale = scale
    return config


def get_study(arg: str = "") -> Study:
    choice = parse_arg(arg, scale=SCALES, arms=("controlled", "faithful"))
    scale, base = choice["scale"], base_config(choice["scale"])
    study: dict[str, Any] = {"base": base, "responses": RESPONSES}
    study["extra_report"] = "jaxablate.studies.burgers.report:write"
    study["seeds"] = (0, 1, 2, 3, 4) if scale == "tiny" else (42, 43, 44, 45, 46)
    if choice["arms"] == "faithful":
        reference, *others = FAITHFUL
        for path, value in FAITHFUL[reference].items():
            set_path(base, path, value)
        run = Factor("run", "model", {reference: {}, **{name: FAITHFUL[name] for name in others}})
        arms = (Arm(reference), *(Arm(name, {"run": name}) for name in others))
        return Study(
            name="burgers_faithful",
            title="Burgers: the document's own runs",
            factors=(run,),
            arms=arms,
            **study,
        )
    varied = factors(scale)
    return Study(
        name="burgers",
        title="Burgers: a U or a stack, and attention within channel groups",
        factors=varied,
        arms=product(*varied, names=name_of),
        hypotheses=hypotheses(*TOKENS[scale]),
        **study,
    )


def get_config(arg: str = "") -> ConfigDict:
    names = [arm.name for scale in SCALES for arm in product(*factors(scale), names=name_of)]
    choice = parse_arg(arg, arm=("", *names), scale=SCALES, arms=("controlled", "faithful"))
    study = get_study(f"scale={choice['scale']},arms={choice['arms']}")
    config = study.config(choice["arm"] or study.arms[0].name)
    config.seeds = study.seeds[:1]
    return config
