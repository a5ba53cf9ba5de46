"""What must hold of a Burgers config: sizes that fit, stages that follow from one another, weights that act.

Imports no jax. The bounds called advice are the document's: a sweep may leave them, and `validate` says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from jaxablate.config import RunConfig
from jaxablate.rules import Rule, at_least, divides, there, within
from jaxablate.studies.burgers.budget import draws
from jaxablate.studies.burgers.config import (
    BurgersData,
    BurgersModel,
    ConditioningConfig,
    CoreConfig,
    LossConfig,
)

STAGES = ("autoencoder", "corrector", "distill")


def rules(run: RunConfig[BurgersModel, BurgersData]) -> Iterator[Rule]:
    """All rules of a run, by section."""
    model, data = run.model, run.data
    yield from _tokens(model, data)
    yield from _core(model.core, model.encoder.tokens)
    yield from _loss(model.loss)
    yield from _inverse(model, run.training.steps)
    yield from _stages(model)
    yield from _optimisers(run)
    yield from _conditioning(model.conditioning, model)
    steps = model.loss.rollout_steps if model.loss.rollout else 1
    yield from data_rules(data, steps=steps)
    yield from _epochs(run, steps)
    yield from _files(data)


def _tokens(model: BurgersModel, data: BurgersData) -> Iterator[Rule]:
    encoder, decoder = model.encoder, model.decoder
    for name in ("dim", "stem"):
        yield at_least(1, f"model.encoder.{name}", getattr(encoder, name))
    yield divides("model.encoder.tokens", encoder.tokens, "data.cells", data.cells)
    for name in ("hidden", "layers", "ffn"):
        yield at_least(1, f"model.decoder.{name}", getattr(decoder, name))
    yield divides("model.decoder.heads", decoder.heads, "model.decoder.hidden", decoder.hidden)


def _core(core: CoreConfig, tokens: int) -> Iterator[Rule]:
    yield at_least(1, "model.core.hidden", core.hidden)
    if core.kind == "pdet_stack":
        yield at_least(1, "model.core.depth", core.depth)
    else:
        layers = bool(core.depths) and all(depth > 0 for depth in core.depths)
        yield Rule(
            "model.core.depths", core.depths, layers, "must be layers for each level, 1 or more of them"
        )
        least = 2 ** max(len(core.depths) - 1, 0)
        yield Rule(
            "model.encoder.tokens", tokens, tokens >= least,
            f"must be {least} or more, for the {len(core.depths)} levels of model.core.depths={core.depths}",
        )  # fmt: skip
    if core.attention == "channel_separated":
        yield divides("model.core.group", core.group, "model.core.hidden", core.hidden)
        yield divides("model.core.heads", core.heads, "model.core.group", core.group)
    else:
        yield divides("model.core.heads", core.heads, "model.core.hidden", core.hidden)
    yield Rule("model.core.drop_path", core.drop_path, 0 <= core.drop_path < 1, "must be in [0, 1)")


def _loss(loss: LossConfig) -> Iterator[Rule]:
    for name in ("spectral", "rollout", "inverse", "inverse_warmup", "inverse_cap"):
        yield at_least(0, f"model.loss.{name}", getattr(loss, name))
    if loss.rollout:
        far = loss.rollout_steps > 1
        dead = (
            "has no effect of its own after one step; set model.loss.rollout_steps to 2 or more, or it to 0"
        )
        acts = f"acts after {loss.rollout_steps} steps"
        yield Rule("model.loss.rollout", loss.rollout, far, acts if far else dead)


def _inverse(model: BurgersModel, steps: int) -> Iterator[Rule]:
    loss = model.loss
    if loss.inverse:
        decodes = model.encoder.kind == "trained"
        begins = (
            not loss.inverse_warmup or loss.inverse_warmup + 1 < steps
        )  # it is still 0 at the warm-up's end
        dead = (
            "has no trained decoder to go through; set it to 0"
            if not decodes
            else f"begins after model.loss.inverse_warmup={loss.inverse_warmup} of {steps} steps: it never acts"
        )
        acts = decodes and begins and loss.inverse_cap > 0
        if decodes and begins:
            dead = "is cut to model.loss.inverse_cap=0; raise that, or set it to 0"
        yield Rule("model.loss.inverse", loss.inverse, acts, "acts" if acts else dead)
    elif loss.inverse_warmup:
        yield Rule(
            "model.loss.inverse_warmup", loss.inverse_warmup, False,
            "is the warm-up of model.loss.inverse=0; give that, or set it to 0",
        )  # fmt: skip


def _stages(model: BurgersModel) -> Iterator[Rule]:
    for name in STAGES:
        yield at_least(0, f"model.{name}.steps", getattr(model, name).steps)
    kind, steps = model.encoder.kind, model.autoencoder.steps
    if kind == "trained":
        yield Rule(
            "model.autoencoder.steps", steps, steps > 0,
            "must be 1 or more to train model.encoder.kind='trained'; kind='faithful_random' needs none",
        )  # fmt: skip
    else:
        yield Rule(
            "model.autoencoder.steps", steps, steps == 0,
            f"must be 0: model.encoder.kind='{kind}' keeps its random start",
        )  # fmt: skip
    if model.distill.steps:
        follows = model.corrector.steps > 0
        dead = "has no corrector to distil: give model.corrector.steps, or set it to 0"
        yield Rule(
            "model.distill.steps", model.distill.steps, follows, "follow a corrector" if follows else dead
        )


def _optimisers(run: RunConfig[BurgersModel, BurgersData]) -> Iterator[Rule]:
    model, optim = run.model, run.optim
    yield within(1e-5, 1e-2, "optim.learning_rate", optim.learning_rate)
    yield within(0, 0.1, "optim.weight_decay", optim.weight_decay)
    clips = optim.clip_norm == 0 or 0.1 <= optim.clip_norm <= 10
    yield Rule("optim.clip_norm", optim.clip_norm, clips, "must be from 0.1 to 10, or 0 for none", "advice")
    for name in STAGES:
        stage = getattr(model, name)
        for rate in ("learning_rate", "weight_decay"):
            yield at_least(0, f"model.{name}.{rate}", getattr(stage, rate))
        fraction = stage.end_fraction
        yield Rule(f"model.{name}.end_fraction", fraction, 0 <= fraction <= 1, "must be in [0, 1]")
        if stage.steps:
            highest = 1e-2 if name == "autoencoder" else 1e-3
            yield within(1e-6, highest, f"model.{name}.learning_rate", stage.learning_rate)
            yield within(0, 0.1, f"model.{name}.weight_decay", stage.weight_decay)


def _conditioning(ttc: ConditioningConfig, model: BurgersModel) -> Iterator[Rule]:
    path = "model.conditioning"
    for name in ("candidates", "early_stop_margin"):
        yield at_least(0, f"{path}.{name}", getattr(ttc, name))
    if not ttc.candidates:
        return
    for name in ("beam", "horizon", "max_evaluations"):
        yield at_least(1, f"{path}.{name}", getattr(ttc, name))
    yield _horizon(ttc, path)
    margin = (
        "acts on a look-ahead" if ttc.horizon > 1 else "must be 0: horizon=1 has no look-ahead to leave out"
    )
    acts = not ttc.early_stop_margin or ttc.horizon > 1
    yield Rule(f"{path}.early_stop_margin", ttc.early_stop_margin, acts, margin)
    yield Rule(f"{path}.discount", ttc.discount, 0 < ttc.discount <= 1, "must be in (0, 1]")
    low, high = ttc.tau
    yield Rule(f"{path}.tau", ttc.tau, 0 <= low <= high <= 1, "must be a range in [0, 1]")
    yield Rule(f"{path}.noise", ttc.noise, all(s >= 0 for s in ttc.noise), "must be 0 or more, each")
    used = ttc.weights[:1] if ttc.reward == "mass" else ttc.weights
    yield Rule(
        f"{path}.weights", ttc.weights, all(w >= 0 for w in ttc.weights) and any(used),
        f"must be 0 or more, and not all of those 0 that reward='{ttc.reward}' looks at",
    )  # fmt: skip
    enough = ttc.max_evaluations >= ttc.candidates
    few = f"is below {path}.candidates={ttc.candidates}, of which fewer are drawn then; raise it"
    most = f"is enough for {ttc.candidates} candidates"
    yield Rule(f"{path}.max_evaluations", ttc.max_evaluations, enough, most if enough else few, "advice")
    corrected = model.corrector.steps > 0
    dead = "are drawn around a corrector: give model.corrector.steps, or set it to 0"
    drawn = "are drawn around the corrector"
    yield Rule(f"{path}.candidates", ttc.candidates, corrected, drawn if corrected else dead, "advice")
    measures = ttc.reward != "mass" or model.encoder.kind == "trained"
    blind = (
        f"measures the mass of decoded fields, which model.encoder.kind='{model.encoder.kind}' has none of; "
        f"set it to 'faithful', or candidates=0"
    )
    sees = "measures fields that are decoded"
    yield Rule(f"{path}.reward", ttc.reward, measures, sees if measures else blind, "advice")


def _horizon(ttc: ConditioningConfig, path: str) -> Rule:
    """All of the steps that the reward is to look ahead are looked at."""
    reached = max(len(draws(ttc)), 1)
    for name in ("beam", "candidates"):
        if ttc.horizon > 1 and (few := getattr(ttc, name)) < 2:
            dead = f"looks ahead from the best of several: {path}.{name}={few} must be 2 or more for that"
            break
    else:
        cap = f"{path}.max_evaluations={ttc.max_evaluations}"
        dead = f"is cut to {reached} by {cap}; raise that, or set it to {reached}"
    sees = reached >= ttc.horizon
    return Rule(f"{path}.horizon", ttc.horizon, sees, "fits beam and max_evaluations" if sees else dead)


def data_rules(data: BurgersData, *, steps: int) -> Iterator[Rule]:
    """Of the data section: numbers that make windows of 1 + `steps` frames, and of 1 + rollout to evaluate."""
    for name in ("cells", "space_stride", "time_stride", "rollout", "eval_windows"):
        yield at_least(1, f"data.{name}", getattr(data, name))
    if data.source != "generated":
        yield within(1, 4, "data.time_stride", data.time_stride)
        return
    for name in ("train", "val"):
        detail = f"is not read by data.source=generated; choose another source, or leave data.{name} empty"
        yield Rule(f"data.{name}", getattr(data, name), not getattr(data, name), detail)
    for name in ("frames", "trajectories", "held_out"):
        yield at_least(1, f"data.{name}", getattr(data, name))
    seeded = 0 <= data.seed < 2**31 - 1  # the next one is that of the held-out trajectories
    yield Rule("data.seed", data.seed, seeded, f"must be from 0 to {2**31 - 2}")
    yield Rule(
        "data.interval", data.interval, 0 < data.interval < math.inf, "must be more than 0, and finite"
    )
    each = data.viscosities
    positive = bool(each) and all(0 < nu < math.inf for nu in each) and len(set(each)) == len(each)
    yield Rule("data.viscosities", each, positive, "must be positive, one or more, none of them twice")
    if each:
        fair = data.eval_windows % len(each) == 0
        yield Rule(
            "data.eval_windows", data.eval_windows, fair,
            f"must be a multiple of {len(each)}, for as many of each of data.viscosities",
        )  # fmt: skip
    longest = max(steps, data.rollout) * data.time_stride
    yield Rule(
        "data.frames", data.frames, data.frames >= longest,
        f"must be {longest} or more: {max(steps, data.rollout)} steps of data.time_stride={data.time_stride}",
    )  # fmt: skip
    dt = data.time_stride * data.interval
    detail = f"makes a step of {dt:g}; must be 0.1 or less"
    yield Rule("data.time_stride", data.time_stride, dt < 0.1 + 1e-9, detail, "advice")


def _epochs(run: RunConfig[BurgersModel, BurgersData], steps: int) -> Iterator[Rule]:
    data = run.data
    last = data.frames - steps * data.time_stride  # frame at which a window can start
    if data.source != "generated" or data.time_stride < 1 or last < 0:
        return  # of files nobody knows how many there are before they are opened
    # As the document counts them, whatever `starts` says: of windows that begin at every frame most overlap.
    windows = (last // data.time_stride + 1) * data.trajectories * len(data.viscosities)
    epochs = run.training.steps * run.training.batch_size / max(windows, 1)
    detail = f"makes {epochs:.2g} epochs of {windows} windows a stride apart; must be 1 to 100 of them"
    yield Rule("training.steps", run.training.steps, 1 <= epochs <= 100, detail, "advice")


def _files(data: BurgersData) -> Iterator[Rule]:
    if data.source == "generated":
        return
    for name in ("train",) if data.source == "pdebench" else ("train", "val"):
        value = getattr(data, name)
        detail = f"must name what data.source='{data.source}' reads"
        yield Rule(f"data.{name}", value, bool(value), detail, "host")
    yield from there({"data.train": data.train, "data.val": data.val})
