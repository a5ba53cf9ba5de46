"""The rules that look at an arm beside the baseline; those on factors and responses have modules of their own."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxablate import optim
from jaxablate.check.case import Beside, Case, Rule, Said, fail, missing, note, ok, precision, under
from jaxablate.check.probes import Broken, Computed, Data, Probe
from jaxablate.check.values import CHANGED, difference
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
    declared: dict[str, list[str]] = {}  # kernel -> slots
    for slot, kernel in built.task.kernels.items():
        declared.setdefault(kernel.kernel_name, []).append(slot)
        if kernel.kernel_name not in found:
            yield fail(
                f"slot '{slot}' declares '{kernel.requested}', which is {kernel.kernel_name}, and the program "
                f"runs {', '.join(sorted(found)) or 'no kernel'}",
                slot=slot, declared=kernel.kernel_name, found=sorted(found),
            )  # fmt: skip
    references = {dispatch.kernel_name(op, dispatch.implementations(op)[0]) for op in dispatch.operations()}
    undeclared = sorted(found - declared.keys())
    if stray := [name for name in undeclared if name not in references]:
        yield fail(
            f"the program runs {', '.join(stray)}, which no slot of the arm declares", found=sorted(found)
        )
    said = (
        ", ".join(f"{name} in {', '.join(slots)}" for name, slots in declared.items()) or "no slot to choose"
    )
    also = f"; {', '.join(undeclared)} in parts that no slot names" if undeclared else ""
    return ok(said + also, found=sorted(found))


def schedule(case: Case) -> Saying:
    """Tokens, and every stage's length, optimiser and trained part are the baseline's.

    A factor may change what its config paths name, such as `optim.b2`, and nothing besides. No path names the
    list of stages, how they share the steps, and what each trains: these a training or data factor may change
    with a field of the study's own (`model.*`, `data.*`), and a model factor with one of `data.*`; a person is told.
    """
    told: set[str] = set()
    for beside in case.beside:
        for setting in _settings(case.probe, beside.probe):
            said = _setting(setting, beside)
            if said is not None and setting.what not in told:
                yield said
                if said.verdict == "fail":  # in arms with several factors the same shows in several ways
                    told.add(setting.what)
    for parent in case.parents:
        touched = [path for path in parent.factor.levels[parent.level] if path.startswith("optim.")]
        if touched and parent.factor.kind in ("model", "implementation"):
            said = f"{parent.name} sets {', '.join(touched)} too: the two effects cannot be told apart"
            yield note(said) if parent.factor.kind == "model" else fail(said)
    yield from _rates(case)
    own = case.probe.built
    steps = " + ".join(f"{stage.name} {stage.steps}" for stage in own.stages)
    tokens = own.task.tokens_per_example
    return ok(f"steps: {steps}; {tokens or 'no'} tokens an example")


class _Setting(NamedTuple):
    """Something of the schedule that an arm and another one have, with what may declare that it differs."""

    what: str
    here: Any
    there: Any
    path: str  # in the config; "" if no path of the program's own sections names it


def _setting(setting: _Setting, beside: Beside) -> Said | None:
    """What to say of it, if it differs; nothing if that is declared."""
    what, here, there, path = setting
    if here == there or (path and beside.declares(path)):
        return None
    said = f"{what} is {here}, in {beside.name} it is {there}"
    values = {"what": what, "arm": here, "beside": there}
    kinds = {factor.kind for factor in beside.factors}
    if path == "data":  # tokens
        said += ": their steps cost differently"
        return note(said, **values) if "model" in kinds else fail(said, **values)
    of_stages = kinds & {"training", "data"} and beside.declares("model", "data")
    if not path and (of_stages or ("model" in kinds and beside.declares("data"))):
        return note(f"{said}; right if one of {', '.join(beside.paths)} means it", **values)
    declared = f"the change of {', '.join(beside.paths)} declares no such thing"
    return fail(f"{said}, and {declared}" + (f": {path} would" if path else ""), **values)


def _settings(own: Probe, other: Probe) -> Iterator[_Setting]:
    tokens = own.built.task.tokens_per_example, other.built.task.tokens_per_example
    yield _Setting("the number of tokens an example", *tokens, "data")
    ours, theirs = own.built.stages, other.built.stages
    total = [sum(stage.steps for stage in stages) for stages in (ours, theirs)]
    names = [", ".join(stage.name for stage in stages) for stages in (ours, theirs)]
    yield _Setting("the list of stages", names[0], names[1], "")
    if names[0] != names[1]:  # other stages, of which each may be as long as what it trains on asks for
        declared = "" if own.run.training.steps == other.run.training.steps else "training.steps"
        yield _Setting("the number of steps", total[0], total[1], declared)
    like = {stage.name: stage for stage in theirs}
    for here in ours:
        # A stage that the other lacks is held to the other's last: what it has of its own belongs to the list.
        there, known = like.get(here.name, theirs[-1]), here.name in like
        of = f" of stage '{here.name}'" if len(ours) > 1 else ""
        if names[0] == names[1]:
            length = "" if total[0] == total[1] else "training.steps"
            yield _Setting(f"the number of steps{of}", here.steps, there.steps, length)
        if known:
            yield _Setting(f"the trained part{of}", " ".join(here.trainable), " ".join(there.trainable), "")
        for field in dataclasses.fields(here.optim):
            values = getattr(here.optim, field.name), getattr(there.optim, field.name)
            yield _Setting(f"{field.name}{of}", *values, f"optim.{field.name}" if known else "")


def _rates(case: Case) -> Iterator[Said]:
    """A learning rate rises while it warms up, then falls: within a stage the program sees to that."""
    stages = case.probe.built.stages
    for stage in stages:
        if stage.optim.warmup_steps >= stage.steps:
            yield note(
                f"stage '{stage.name}' is {stage.steps} steps long and warms up for {stage.optim.warmup_steps}: "
                f"its learning rate only rises"
            )
    for before, after in itertools.pairwise(stages):
        share = float(optim.schedule(before.optim, before.steps)(before.steps))
        last, peak = share * before.optim.learning_rate, after.optim.learning_rate
        if peak > last and before.trainable == after.trainable:
            yield note(
                f"stage '{after.name}' trains what stage '{before.name}' trained, and its learning rate rises again, "
                f"from {last:.3g} to {peak:.3g}; right if a restart is meant",
                last=last, peak=peak,
            )  # fmt: skip


def init(case: Case) -> Saying:
    """Parameters that the arm shares with another start from the same bits for the same seed.

    One factor may start them elsewhere: a training factor with a field of the model's (pretrained weights, a
    scheme of initialisation) that changes nothing else, loss and gradient at equal parameters being equal.
    """
    own = case.probe.computed
    if not isinstance(own, Computed) or not isinstance(case.base.computed, Computed):
        yield missing(own, case.base.computed)
        return None
    moved = {beside.label: _moved(case.probe, beside.probe) for beside in case.beside}
    starts = [b for b in case.beside if moved[b.label] and _starts_elsewhere(case, b)]
    excused = {factor.name for beside in starts for factor in beside.factors}
    told: set[str] = set()
    for beside in case.beside:
        unlike = [path for path in moved[beside.label] if path not in told]
        if not unlike or excused & {factor.name for factor in beside.factors}:
            continue
        shared = _shared(case.probe, beside.probe)
        said = (
            f"{len(unlike)} of {len(shared)} shared parameters start from other numbers than in {beside.name} for the "
            f"same seed, such as {unlike[0]}: runs of one seed are no pair"
        )
        values = {"shared": len(shared), "unlike": unlike}
        # Of a baseline with factors that the arm lacks, no parent tells which of them it is.
        mixed = len(beside.factors) > 1 and _may_start_elsewhere(case, beside)
        if mixed:
            yield note(f"{said}; right if that is what {mixed} does", **values)
        else:
            told.update(unlike)
            yield fail(said, **values)
    shared, unlike = _shared(case.probe, case.base), _moved(case.probe, case.base)
    if not shared:
        yield note("shares no parameter with the baseline, so runs of one seed are no pair")
    return ok(
        f"{len(shared) - len(unlike)} of {len(case.probe.built.params)} parameters start as the baseline's do"
        + (f"; others as {', '.join(sorted(excused))} has them" if unlike else ""),
        shared=len(shared), own=len(case.probe.built.params) - len(shared),
    )  # fmt: skip


def _shared(own: Probe, other: Probe) -> list[str]:
    """Parameters of both, but those of a module of which one has another shape: a bias may start by its fan-in."""
    here, there = own.built.params, other.built.params
    both = [path for path in here if path in there]
    reshaped = {_module(path) for path in both if here[path].shape != there[path].shape}
    return [path for path in both if _module(path) not in reshaped]


def _module(path: str) -> str:
    return path.rpartition("/")[0]


def _moved(own: Probe, other: Probe) -> list[str]:
    """Shared parameters that start from other numbers."""
    here, there = own.computed, other.computed
    if not isinstance(here, Computed) or not isinstance(there, Computed):
        return []
    return [path for path in _shared(own, other) if here.init[path] != there.init[path]]


def _starts_elsewhere(case: Case, beside: Beside) -> bool:
    """Whether where training starts is all that sets the two apart, by the one factor between them."""
    kinds = [factor.kind for factor in beside.factors]
    if kinds != ["training"] or not beside.declares("model"):
        return False
    d = difference(case.bench.draw(case.arm, 0), case.bench.draw(beside.label, 0))
    return d.gradients is not None and not d.beyond(CHANGED[precision(case.probe, beside.probe)])


def _may_start_elsewhere(case: Case, beside: Beside) -> str:
    """The factors between the two that may do so, and that no parent shows alone."""
    alone = {parent.factor.name for parent in case.parents}
    fields = {f.name: [path for level in f.levels.values() for path in level] for f in beside.factors}
    may = [
        f.name
        for f in beside.factors
        if f.kind == "training" and any(under(p, "model") for p in fields[f.name])
    ]
    return ", ".join(name for name in may if name not in alone)


def data(case: Case) -> Saying:
    """Same batches, same evaluation set, and the order that the config says.

    Only a change of `data.*` may change the examples and what is evaluated, and besides it only batch size and
    order may change the batches.
    """
    own = case.probe.data
    if not isinstance(own, Data) or not isinstance(case.base.data, Data):
        yield missing(own, case.base.data)
        return None
    told: set[str] = set()
    for beside in case.beside:
        other = beside.probe.data
        if not isinstance(other, Data):
            continue  # said of the arm that it is
        # The same set in other batches has another digest.
        recut = ("training.eval_batch_size",) if own.fingerprint == other.fingerprint else ()
        for what, here, there, paths in (
            ("trains on other data than", own.fingerprint, other.fingerprint, ()),
            ("sees other batches for the same seed than", own.batches, other.batches,
             ("training.batch_size", "training.order")),
            ("is evaluated on another set than", own.evaluation, other.evaluation, recut),
        ):  # fmt: skip
            if here != there and what not in told and not beside.declares("data", *paths):
                told.add(what)
                yield fail(
                    f"{what} {beside.name}, and the change of {', '.join(beside.paths)} declares no such thing",
                    arm=here, beside=there,
                )  # fmt: skip
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
    base = case.base.data
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
    if base := built.task.base_parameters:
        kept += f"; a base of {base:,} parameters is only read"
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
