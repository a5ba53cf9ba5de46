"""Burgers: does a U-shaped latent operator beat a plain stack, at two numbers of tokens, and does attention within
channel groups do as well as attention over all channels?

    jaxablate run configs/burgers.py                    # 2^3, controlled: arms differ in the declared factors alone
    jaxablate run configs/burgers.py:arms=faithful      # the document's own runs, which differ in much else
    jaxablate run configs/burgers.py:encoder=faithful_random    # on upstream's encoder, which is never trained

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

TOKENS = {"tiny": (16, 32), "small": (64, 128), "paper": (128, 256)}
NARROWER = {"tiny": 4, "small": 2, "paper": 1}  # the document's own runs are, by this factor

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
    scale: str,
    *,
    kind: str,
    attention: str,
    tokens: int,
    dim: int,
    hidden: int,
    heads: int,
    group: int,
    depths: tuple[int, ...] = (3, 3, 2),
) -> dict[str, object]:
    """The config paths in which the document's runs differ, with one run's values.

    A smaller scale has fewer tokens, and narrower and shallower models; the numbers of heads and of levels stay.
    """
    factor, fewer = NARROWER[scale], TOKENS["paper"][0] // TOKENS[scale][0]
    return {
        "model.core.kind": kind,
        "model.core.attention": attention,
        "model.encoder.tokens": tokens // fewer,
        "model.encoder.dim": dim // factor,
        "model.core.hidden": hidden // factor,
        "model.core.heads": heads,
        "model.core.group": group // factor,
        "model.core.depths": tuple(-(-depth // factor) for depth in depths),
    }


def trained_longer(scale: str) -> dict[str, object]:
    """How the document's stack of 256 tokens was trained: 30 epochs, not 25, at 0.8 of the rate.

    Its 48 trajectories of an update were six times eight, not eight times six.
    """
    config = base_config(scale)
    found: dict[str, object] = {
        "optim.learning_rate": 0.8 * config.optim.learning_rate,
        "training.steps": config.training.steps * 30 // 25,
    }
    return {**found, "training.accumulation": 8} if scale == "paper" else found


def faithful(scale: str) -> dict[str, dict[str, object]]:
    """The document's runs by name, the reference first; at `paper` they have its values."""
    few, many = TOKENS[scale]
    run = functools.partial(run_of_the_document, scale)
    unet: dict[str, Any] = {"kind": "pdet_unet", "attention": "channel_separated", "heads": 8, "group": 32}
    stack: dict[str, Any] = {"kind": "pdet_stack", "attention": "standard", "heads": 6, "group": 24}
    separated: dict[str, Any] = {**stack, "attention": "channel_separated"}
    return {
        f"{few}tokens_unet": run(**unet, tokens=128, dim=128, hidden=256),
        f"{many}tokens_unet": run(**unet, tokens=256, dim=256, hidden=512, depths=(3, 3, 3)),
        f"{few}tokens_pure": run(**stack, tokens=128, dim=64, hidden=192),
        f"{many}tokens_pure": {**run(**stack, tokens=256, dim=192, hidden=384), **trained_longer(scale)},
        f"{few}tokens_channel_sep": run(**separated, tokens=128, dim=64, hidden=192),
    }


# Upstream's encoder keeps its random start, so nothing decodes its tokens: all scores are of tokens, what
# conditions a step is upstream's reward on a decoder that is random too, and arms of another width are in a space
# of their own.
RANDOM_ENCODER = {
    "model.encoder.kind": "faithful_random",
    "model.encoder.cells": "pooled",
    "model.autoencoder.steps": 0,
    "model.conditioning.reward": "faithful",
}


def tiny(config: ConfigDict) -> None:
    config.model.encoder.update(tokens=16, dim=24, stem=8)
    config.model.loss.rollout = 0.0  # it would double the time
    config.model.decoder.update(hidden=32, layers=1, heads=4, ffn=64)
    config.model.core.update(hidden=32, depth=2, depths=(1, 1), heads=4, group=8)
    config.model.core.drop_path = 0.0
    config.model.residual_gain = "zero"
    config.model.conditioning.noise = ()
    config.data.update(
        cells=128, time_stride=10, frames=100, trajectories=512, held_out=16, starts="every_frame"
    )
    config.optim.update(learning_rate=4e-3, warmup_steps=20, ema_decay=0.98)
    config.training.update(steps=1500, batch_size=32, eval_batch_size=64, eval_every=500)
    config.model.autoencoder.update(steps=400, learning_rate=5e-3)
    config.model.corrector.update(steps=100, learning_rate=1e-3)
    config.model.distill.update(steps=50, learning_rate=3e-4)
    config.host.update(checkpoint_every=250)


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
ARMS = ("controlled", "faithful")
ENCODERS = ("trained", "faithful_random")


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
    choice = parse_arg(arg, scale=SCALES, arms=ARMS, encoder=ENCODERS)
    scale, base = choice["scale"], base_config(choice["scale"])
    name, title = "burgers", "Burgers: a U or a stack, and attention within channel groups"
    study: dict[str, Any] = {"responses": RESPONSES}
    study["extra_report"] = "jaxablate.studies.burgers.report:write"
    study["seeds"] = (0, 1, 2, 3, 4) if scale == "tiny" else (42, 43, 44, 45, 46)
    if choice["arms"] == "controlled":
        varied = factors(scale)
        study |= {"factors": varied, "arms": product(*varied, names=name_of)}
        study["hypotheses"] = hypotheses(*TOKENS[scale])
    else:
        name, title = f"{name}_faithful", "Burgers: the document's own runs"
        runs = faithful(scale)
        reference, *others = runs
        _set(base, runs[reference])
        levels = {run: _differing(runs[run], runs[reference]) for run in others}
        study["factors"] = (Factor("run", "model", {reference: {}, **levels}),)
        study["arms"] = (Arm(reference), *(Arm(run, {"run": run}) for run in others))
    if choice["encoder"] == "faithful_random":
        name, title = f"{name}_random", f"{title}, on an encoder that is never trained"
        _set(base, RANDOM_ENCODER)
        study |= {"responses": (NRMSE,), "hypotheses": ()}  # which are about fields
    return Study(name=name, title=title, base=base, **study)


def _differing(values: Mapping[str, object], reference: Mapping[str, object]) -> dict[str, object]:
    """At a smaller scale more is alike than in the document."""
    return {
        path: value for path, value in values.items() if path not in reference or value != reference[path]
    }


def _set(config: ConfigDict, values: Mapping[str, object]) -> None:
    for path, value in values.items():
        set_path(config, path, value)


def get_config(arg: str = "") -> ConfigDict:
    names = [arm.name for scale in SCALES for arm in product(*factors(scale), names=name_of)]
    choice = parse_arg(arg, arm=("", *names), scale=SCALES, arms=ARMS, encoder=ENCODERS)
    study = get_study(",".join(f"{key}={value}" for key, value in choice.items() if key != "arm"))
    config = study.config(choice["arm"] or study.arms[0].name)
    config.seeds = study.seeds[:1]
    return config
