"""The rules that look at an arm beside the baseline; those on factors and responses have modules of their own."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

from jaxablate.check.case import Case, Rule, Said, fail, missing, note, ok
from jaxablate.check.probes import Broken, Computed, Data, Probe
from jaxablate_kernels import dispatch

Saying = Generator[Said, None, Said | None]


def size(case: Case) -> Saying:
    """Parameters and FLOPs side by side; equal where that is declared."""
    built = case.probe.built
    flops = built.task.flops_per_example
    for parent in case.parents:
        if isinstance(parent.probe, Broken):
            continue
        factor, before = parent.factor, parent.probe.built
        count = f"{before.parameters:,} -> {built.parameters:,}"
        change = (built.parameters - before.parameters) / max(before.parameters, 1)
        values = {"factor": factor.name, "parameters": built.parameters, "without": before.parameters}
        if factor.kind == "implementation" and change:
            yield fail(
                f"{parent.name} changes the number of parameters, {count}; it must keep them", **values
            )
        elif factor.same_parameters is not None and abs(change) > factor.same_parameters:
            yield fail(
                f"{parent.name} has {change:+.2%} parameters, {count}; declared is "
                f"same_parameters={factor.same_parameters:g}",
                **values,
            )
        if factor.kind == "implementation" and flops != before.task.flops_per_example:
            yield fail(
                f"{parent.name} changes the FLOPs of an example, {_giga(before.task.flops_per_example)} -> "
                f"{_giga(flops)}; they are of the definition, so every implementation has the same",
                factor=factor.name,
            )
    return ok(
        f"{built.parameters:,} parameters, {_giga(flops)} an example",
        parameters=built.parameters, flops_per_example=flops,
    )  # fmt: skip


def _giga(flops: float | None) -> str:
    return "FLOPs not counted" if flops is None else f"{flops / 1e9:.4g} GFLOP"


def kernel(case: Case) -> Saying:
    """Each declared kernel is in the program; of the others only references, in parts that nothing ablates."""
    built = case.probe.built
    found = {name.removesuffix("_backward") for name in built.kernels}
    declared: dict[str, str] = {}  # kernel -> slot
    for slot, (asked, got) in built.task.kernels.items():
        ops = [op for op in dispatch.operations() if got in dispatch.implementations(op)]
        ops = [op for op in ops if op in slot] or ops  # `reference` is a name of every operation
        names = sorted(dispatch.resolve(op, got, built.task.platform).kernel_name for op in ops)
        declared |= dict.fromkeys(names, slot)
        if not found & set(names):
            wanted = " or ".join(names) or f"'{got}', which no operation has"
            yield fail(
                f"slot '{slot}' declares '{asked}', which is {wanted}, and the program runs "
                f"{', '.join(sorted(found)) or 'no kernel'}",
                slot=slot, declared=names, found=sorted(found),
            )  # fmt: skip
    references = {
        dispatch.resolve(op, dispatch.implementations(op)[0], built.task.platform).kernel_name
        for op in dispatch.operations()
    }
    undeclared = sorted(found - declared.keys())
    if stray := [name for name in undeclared if name not in references]:
        yield fail(
            f"the program runs {', '.join(stray)}, which no slot of the arm declares", found=sorted(found)
        )
    said = ", ".join(f"{name} in {slot}" for name, slot in declared.items()) or "no slot to choose"
    also = f"; {', '.join(undeclared)} in parts that no slot names" if undeclared else ""
    return ok(said + also, found=sorted(found))


def schedule(case: Case) -> Saying:
    """Effective batch, tokens, and every stage's length, optimiser and trained part are the baseline's."""
    own, base = case.probe.built, case.base.built
    free = bool({"training", "data"} & case.kinds)
    for what, here, there, path in _schedule(case.probe, case.base):
        if here != there and not free and not (path and case.declares(path)):
            yield fail(
                f"{what} is {here}, the baseline's is {there}, and the arm declares no such change",
                what=what, arm=here, baseline=there,
            )  # fmt: skip
    tokens, theirs = own.task.tokens_per_example, base.task.tokens_per_example
    if tokens != theirs and not free and not case.declares("data", "training"):
        said = f"the model sees {tokens} tokens of an example, the baseline's {theirs}: their steps cost differently"
        yield note(said) if "model" in case.kinds else fail(said)
    for parent in case.parents:
        touched = [path for path in parent.factor.levels[parent.level] if path.startswith("optim.")]
        if touched and parent.factor.kind in ("model", "implementation"):
            said = f"{parent.name} sets {', '.join(touched)} too: the two effects cannot be told apart"
            yield note(said) if parent.factor.kind == "model" else fail(said)
    steps = " + ".join(f"{stage.name} {stage.steps}" for stage in own.stages)
    return ok(f"steps: {steps}; batch {own.run.training.batch_size}; {tokens or 'no'} tokens an example")


def _schedule(own: Probe, base: Probe) -> Iterator[tuple[str, Any, Any, str]]:
    """(what, the arm's, the baseline's, the config path that would declare it)."""
    sizes = own.run.training.batch_size, base.run.training.batch_size
    yield "the effective batch", sizes[0], sizes[1], "training.batch_size"
    ours, theirs = own.built.stages, base.built.stages
    names = [", ".join(stage.name for stage in stages) for stages in (ours, theirs)]
    yield "the list of stages", names[0], names[1], ""
    if names[0] != names[1]:
        return
    for here, there in zip(ours, theirs, strict=True):
        of = f" of stage '{here.name}'" if len(ours) > 1 else ""
        yield f"the number of steps{of}", here.steps, there.steps, "training.steps"
        yield f"the trained part{of}", " ".join(here.trainable), " ".join(there.trainable), ""
        for field in dataclasses.fields(here.optim):
            values = [getattr(stage.optim, field.name) for stage in (here, there)]
            yield f"{field.name}{of}", values[0], values[1], f"optim.{field.name}"


def init(case: Case) -> Saying:
    """Parameters that the arm shares with the baseline start from the same bits for the same seed."""
    own, base = case.probe.computed, case.base.computed
    if not isinstance(own, Computed) or not isinstance(base, Computed):
        yield missing(own, base)
        return None
    here, there = case.probe.built.params, case.base.built.params
    shared = [path for path in here if path in there and here[path].shape == there[path].shape]
    unlike = [path for path in shared if own.init[path] != base.init[path]]
    if unlike and "training" not in case.kinds:
        yield fail(
            f"{len(unlike)} of {len(shared)} shared parameters start from other numbers than the baseline's for the "
            f"same seed, such as {unlike[0]}: runs of one seed are no pair",
            shared=len(shared), unlike=unlike,
        )  # fmt: skip
    if not shared:
        yield note("shares no parameter with the baseline, so runs of one seed are no pair")
    return ok(
        f"{len(shared) - len(unlike)} of {len(here)} parameters start as the baseline's do",
        shared=len(shared), own=len(here) - len(shared),
    )  # fmt: skip


def data(case: Case) -> Saying:
    """Same batches, same evaluation set, and the order that the config says."""
    own, base = case.probe.data, case.base.data
    if not isinstance(own, Data) or not isinstance(base, Data):
        yield missing(own, base)
        return None
    declared = "data" in case.kinds or case.declares("data", "training.batch_size", "training.order")
    recut = case.declares("training.eval_batch_size")  # the same set in other batches has another digest
    for what, here, there in (
        ("trains on other data than the baseline", own.fingerprint, base.fingerprint),
        ("sees other batches than the baseline for the same seed", own.batches, base.batches),
        ("is evaluated on another set than the baseline", own.evaluation, base.evaluation),
    ):
        if here != there and not declared and not (recut and here == own.evaluation):
            yield fail(f"{what}, and no data factor declares it", arm=here, baseline=there)
    order = case.probe.run.training.order
    if own.ids is not None:
        epoch = own.ids[: own.count]
        rising, shown = list(epoch) == [*range(len(epoch))], ", ".join(map(str, epoch[:6]))
        if order == "file" and not rising:
            yield fail(
                f"training.order='file', and the first epoch begins with items {shown}, …: the data is shuffled",
                ids=epoch[:16],
            )
        if order == "shuffle" and rising and len(epoch) > 3:
            yield fail(
                f"training.order='shuffle', and the first epoch goes {shown}, …: nothing is shuffled",
                ids=epoch[:16],
            )
    elif order == "file":
        yield note("training.order='file', and the items carry no integer 'index' to see the order by")
    equal = (own.batches, own.evaluation) == (base.batches, base.evaluation)
    whose = "the baseline's" if equal else "its own, as declared"
    return ok(f"{own.count} training examples; batches and evaluation set are {whose}", data=own.fingerprint)


def trained(case: Case) -> Saying:
    """What no pattern of a stage matches keeps every bit; what is trained gets a gradient."""
    built, computed = case.probe.built, case.probe.computed
    for stage in built.stages:
        for pattern in stage.trainable:
            if not fnmatch.filter(built.params, pattern):
                tops = sorted({path.split("/")[0] for path in built.params})
                yield fail(
                    f"stage '{stage.name}' trains '{pattern}', which matches no parameter (of {', '.join(tops)})",
                    stage=stage.name, pattern=pattern,
                )  # fmt: skip
    if not isinstance(computed, Computed):
        yield missing(computed)
        return None
    ever = {path for stage in built.stages for path in built.params if stage.trains(path)}
    for update, stage in zip(computed.updates, built.stages, strict=True):
        of = f" in stage '{stage.name}'" if len(built.stages) > 1 else ""
        if update.moved_frozen:
            yield fail(
                f"frozen parameters change{of}: {_some(update.moved_frozen)}", moved=update.moved_frozen
            )
        if update.dead:
            decays = stage.optim.weight_decay and any(len(built.params[p].shape) > 1 for p in update.dead)
            yield fail(
                f"no gradient{of} reaches {_some(update.dead)}, which the stage trains"
                + (": only weight decay changes it" if decays else ""),
                dead=update.dead,
            )
        if stale := [path for path in update.moved_state if _in_frozen_module(path, built.params, ever)]:
            yield fail(
                f"the state of a frozen module changes{of}, as batch statistics do: {_some(stale)}",
                moved=stale,
            )
    frozen = len(built.params) - len(ever)
    kept = f", {frozen} frozen ones keep every bit" if frozen else ""
    return ok(f"a gradient reaches all {len(ever)} trained parameters{kept}")


def _some(paths: Iterable[str], most: int = 3) -> str:
    paths = list(paths)
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def _in_frozen_module(state: str, params: Mapping[str, Any], trained: set[str]) -> bool:
    """Whether the module of this state (`batch_stats/encoder/norm/mean`) has parameters, all of them frozen."""
    names = state.split("/")[1:-1]
    for depth in range(len(names), 0, -1):
        prefix = "/".join(names[:depth]) + "/"
        if inside := {path for path in params if path.startswith(prefix)}:
            return not trained & inside
    return False


def step(case: Case) -> Saying:
    """One training step of every stage is finite."""
    computed = case.probe.computed
    if not isinstance(computed, Computed):
        yield missing(computed)
        return None
    for update in computed.updates:
        wrong = [f"{key} is {value}" for key, value in update.metrics.items() if not math.isfinite(value)]
        if update.not_finite:
            wrong.append(f"the gradient of {_some(update.not_finite)} is not finite")
        if wrong:
            yield fail(f"the first step of stage '{update.stage}' is not finite: {'; '.join(wrong)}")
    first = computed.updates[0].metrics
    return ok(f"loss {first['train/loss']:.4g}, gradient norm {first['train/grad_norm']:.4g}", **first)


RULES: dict[str, Rule] = {
    "size": size,
    "kernel": kernel,
    "schedule": schedule,
    "init": init,
    "data": data,
    "trained": trained,
    "step": step,
}
