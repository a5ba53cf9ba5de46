"""What must hold of a VQA config: lengths that follow from the questions, stages that there are, a base to adapt.

Imports no jax.
"""

from __future__ import annotations

from collections.abc import Iterator

from jaxablate.config import RunConfig
from jaxablate.rules import Rule, at_least, there
from jaxablate.studies.vqa.config import STAGES, VqaData, VqaModel, epoch_steps, warmup_steps


def rules(run: RunConfig[VqaModel, VqaData]) -> Iterator[Rule]:
    """All rules of a run, by section."""
    yield from _base(run.model)
    yield from _adapter(run.model)
    yield from _questions(run.data)
    yield from _regimen(run.data)
    yield from _lengths(run.data)
    yield from _schedule(run)
    model, data = run.model, run.data
    yield from there(
        {"model.base_path": model.base_path, "data.path": data.path, "data.image_root": data.image_root}
    )


def _base(model: VqaModel) -> Iterator[Rule]:
    small = model.size == "tiny"
    fits = (model.base == "pretrained") == small or model.base == "random"
    kind = "'pretrained' on captions" if small else "read from a 'folder'"
    yield Rule("model.base", model.base, fits, f"of size '{model.size}' must be {kind}, or 'random'")
    if model.base == "folder":
        yield Rule(
            "model.base_path",
            model.base_path,
            bool(model.base_path),
            "must name the checkpoint's folder",
            "host",
        )
    else:
        dead = f"is not read with model.base='{model.base}'; leave it empty"
        yield Rule("model.base_path", model.base_path, not model.base_path, dead)
    for name in ("base_steps", "base_batch_size"):
        yield at_least(1, f"model.{name}", getattr(model, name))
    rate = model.base_learning_rate
    yield Rule("model.base_learning_rate", rate, rate > 0, "must be more than 0")


def _adapter(model: VqaModel) -> Iterator[Rule]:
    yield at_least(1, "model.lora_rank", model.lora_rank)
    yield Rule("model.lora_alpha", model.lora_alpha, model.lora_alpha > 0, "must be more than 0")
    share = model.lora_dropout
    yield Rule("model.lora_dropout", share, 0 <= share < 1, "must be in [0, 1)")
    yield Rule("model.lora_targets", model.lora_targets, bool(model.lora_targets), "must name projections")
    yield at_least(1, "model.answer_tokens", model.answer_tokens)


def _questions(data: VqaData) -> Iterator[Rule]:
    for stage in STAGES:
        yield at_least(0, f"data.questions.stage_{stage}", data.questions.of(stage))
    total = data.questions.total
    yield Rule("data.questions", total, total > 0, "must be some, in one stage at least")
    for name in ("epochs", "evaluations", "image_tokens"):
        yield at_least(1, f"data.{name}", getattr(data, name))
    yield at_least(0, "data.max_samples", data.max_samples)
    if data.source == "synthetic":
        for name in ("path", "image_root"):
            dead = f"is not read by data.source='synthetic'; choose 'folder', or leave data.{name} empty"
            yield Rule(f"data.{name}", getattr(data, name), not getattr(data, name), dead)
        yield at_least(1, "data.scenes", data.scenes)
    else:
        yield Rule("data.path", data.path, bool(data.path), "must name the folder of train.jsonl", "host")


def _regimen(data: VqaData) -> Iterator[Rule]:
    stages = data.stages
    rising = bool(stages) and list(stages) == sorted(set(stages) & set(STAGES))
    yield Rule("data.stages", stages, rising, f"must be some of {STAGES}, in rising order")
    if data.regimen == "single":
        dead = "has no effect on data.regimen='single', which trains on all questions; leave it at (1, 2, 3)"
        yield Rule("data.stages", stages, stages == STAGES, dead)
    kept = data.optimizer_state == "fresh" or data.regimen == "curriculum"
    yield Rule(
        "data.optimizer_state", data.optimizer_state, kept,
        "has no effect but in data.regimen='curriculum'; leave it at 'fresh'",
    )  # fmt: skip


def _lengths(data: VqaData) -> Iterator[Rule]:
    buckets = data.buckets
    rising = bool(buckets) and list(buckets) == sorted(set(buckets)) and buckets[0] > 0
    yield Rule("data.buckets", buckets, rising, "must be lengths in rising order")
    if buckets:
        last = buckets[-1] == data.max_text
        yield Rule("data.buckets", buckets, last, f"must end with data.max_text={data.max_text}")


def _schedule(run: RunConfig[VqaModel, VqaData]) -> Iterator[Rule]:
    data, training = run.data, run.training
    drawn = training.order != "random"
    yield Rule("training.order", training.order, drawn, "must be 'shuffle' or 'file': epochs are counted")
    ratio = data.warmup_ratio
    yield Rule("data.warmup_ratio", ratio, 0 <= ratio < 1, "must be in [0, 1)")
    steps = data.epochs * epoch_steps(data.questions.total, training.batch_size)
    yield Rule(
        "training.steps", training.steps, training.steps == steps,
        f"{data.epochs} epochs of {data.questions.total} questions, {training.batch_size} at a time, are {steps}; "
        f"set data.epochs or data.questions, which it follows",
    )  # fmt: skip
    warmup = warmup_steps(steps, ratio)
    yield Rule(
        "optim.warmup_steps", run.optim.warmup_steps, run.optim.warmup_steps == warmup,
        f"must be {warmup}, {ratio:g} of the steps; set data.warmup_ratio, which it follows",
    )  # fmt: skip
