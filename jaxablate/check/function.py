"""The rule at the heart of it: a factor changes what its kind says, and nothing else.

Every arm is compared with its parent, the same arm with that one factor at its reference; so a switch that
is ignored when another is on is found in the arm that has both.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxablate.check.case import Case, Parent, Said, fail, missing, note, ok, precision, under
from jaxablate.check.probes import Broken, Computed, Data, Probe
from jaxablate.check.rules import Saying
from jaxablate.check.values import CHANGED, SAME, Difference, difference


def function(case: Case) -> Saying:
    """Each factor of the arm against its kind."""
    fine = []
    for parent in case.parents:
        if isinstance(parent.probe, Broken):
            yield note(
                f"{parent.name}: nothing to compare with; without it the arm does not build: {parent.probe.reason}"
            )
            continue
        said = _KINDS[parent.factor.kind](case, parent, parent.probe)
        if said.verdict == "ok":
            fine.append(said)
        else:
            yield said
    if not fine:
        return None
    states = {said.values["function"] for said in fine}
    return ok("; ".join(said.reason for said in fine), function="changed" if "changed" in states else "same")


def _model(case: Case, parent: Parent, before: Probe) -> Said:
    """Outputs at shared parameters change; which parameters there are may change too.

    Or what the model is shown of the same things: such a factor sets `data.*`, and equal batches would hide it.
    """
    tree = _tree(case.probe, before)
    if not _ran(case.probe, before):
        return ok(f"{parent.name} {tree}", function="changed") if tree else _not_run(case, parent, before)
    d = difference(case.bench.draw(case.arm, 0), case.bench.draw(parent.label, 0))
    limit = CHANGED[precision(case.probe, before)]
    if tree and (d.nothing or d.beyond(limit)):
        return ok(f"{parent.name} {tree}; {d}", function="changed")
    if d.outputs is not None and d.outputs > limit:
        return ok(f"{parent.name}: {d}", function="changed")
    if d.beyond(limit):
        return note(
            f"{parent.name} changes the training and not the predictions ({d}); right for dropout alone"
        )
    if d.nothing:
        return note(f"{parent.name}: {d}")
    # To the bit the same predictions: so it is not their rounding that shows at the end.
    if d.outputs == 0 and case.bench.concluded(case.arm) != case.bench.concluded(parent.label):
        return ok(f"{parent.name} changes what is measured at the end alone; {d}", function="changed")
    if _shows_other_data(case, parent, before):
        return ok(f"{parent.name} changes what the model is shown; on equal batches {d}", function="changed")
    return fail(
        f"{parent.name} changes nothing that is computed: {f'it {tree}, but against' if tree else 'against'} "
        f"'{parent.label}' {d}",
        factor=parent.factor.name, parent=parent.label, function="same",
    )  # fmt: skip


def _implementation(case: Case, parent: Parent, before: Probe) -> Said:
    """Parameters, outputs and gradients stay as they are; the program does not."""
    if tree := _tree(case.probe, before):
        return fail(
            f"{parent.name} {tree}; it must leave the parameters as they are",
            parent=parent.label,
            function="changed",
        )
    same_program = case.probe.built.text == before.built.text
    if same_program and case.probe.built.task.kernels == before.built.task.kernels:
        return fail(
            f"{parent.name} is not used: the program is the one of '{parent.label}' to the letter",
            factor=parent.factor.name, parent=parent.label, function="same",
        )  # fmt: skip
    if not _ran(case.probe, before):
        return _not_run(case, parent, before)
    d, agrees = _agrees(case, parent, before)
    if not agrees:
        where = f" (most in {d.where})" if d.gradients else ""
        return fail(
            f"{parent.name} changes the function: against '{parent.label}' {d}{where}; "
            f"an implementation agrees within {SAME[precision(case.probe, before)]:g}",
            factor=parent.factor.name, parent=parent.label, function="changed",
        )  # fmt: skip
    if same_program:
        return note(
            f"{parent.name}: on this platform the program is the one of '{parent.label}' to the letter"
        )
    return ok(f"{parent.name}: {d}", function="same")


def _shows_other_data(case: Case, parent: Parent, before: Probe) -> bool:
    """Whether the factor says that it changes the data, and does."""
    own, theirs = case.probe.data, before.data
    declared = any(under(path, "data") for path in parent.factor.levels[parent.level])
    if not declared or not isinstance(own, Data) or not isinstance(theirs, Data):
        return False
    return (own.batches, own.evaluation) != (theirs.batches, theirs.evaluation)


def _data(case: Case, parent: Parent, before: Probe) -> Said:
    """Batches or the evaluation set change; the function does not."""
    if tree := _tree(case.probe, before):
        return fail(
            f"{parent.name} {tree}: it changes the model too", parent=parent.label, function="changed"
        )
    own, theirs = case.probe.data, before.data
    if not isinstance(own, Data) or not isinstance(theirs, Data):
        return missing(own, theirs)
    if (own.batches, own.evaluation) == (theirs.batches, theirs.evaluation):
        return fail(
            f"{parent.name} changes no data: the first {len(own.batches)} batches and the evaluation set are those of "
            f"'{parent.label}'",
            factor=parent.factor.name, parent=parent.label,
        )  # fmt: skip
    what = "the batches" if own.batches != theirs.batches else "the evaluation set"
    if not _ran(case.probe, before):
        return _not_run(case, parent, before)
    d, agrees = _agrees(case, parent, before)
    if not agrees:
        return fail(
            f"{parent.name} changes the function too: on equal batches {d}",
            parent=parent.label,
            function="changed",
        )
    return ok(f"{parent.name} changes {what}; on equal batches {d}", function="same")


def _training(case: Case, parent: Parent, before: Probe) -> Said:
    """The update changes; function and batches do not."""
    if tree := _tree(case.probe, before):
        return fail(
            f"{parent.name} {tree}; declare it as a model factor", parent=parent.label, function="changed"
        )
    own, theirs = case.probe.data, before.data
    sizes = case.probe.run.training.batch_size, before.run.training.batch_size
    moved = isinstance(own, Data) and isinstance(theirs, Data) and own.batches != theirs.batches
    if moved and sizes[0] == sizes[1]:
        return fail(f"{parent.name} changes the batches; declare it as a data factor", parent=parent.label)
    told = (
        case.probe.built.stages != before.built.stages
        or sizes[0] != sizes[1]
        or _ending(case.probe) != _ending(before)
    )
    if not _ran(case.probe, before):
        if told:
            return ok(f"{parent.name} {_TOLD}", function="same")
        return _not_run(case, parent, before)
    d, agrees = _agrees(case, parent, before, outputs_only=True)
    if not agrees:
        return fail(
            f"{parent.name} changes the function: outputs differ by {d.outputs:.1g}; declare it as a model factor",
            parent=parent.label, function="changed",
        )  # fmt: skip
    if told:
        return ok(f"{parent.name} {_TOLD}; {d}", function="same")
    assert isinstance(case.probe.computed, Computed)
    assert isinstance(before.computed, Computed)
    if case.probe.computed.init != before.computed.init:
        return ok(f"{parent.name} changes where training starts; {d}", function="same")
    limit = CHANGED[precision(case.probe, before)]
    if d.gradients is not None and d.gradients > limit:
        return ok(f"{parent.name}: {d}", function="same")
    values = {"factor": parent.factor.name, "parent": parent.label, "losses": d.losses}
    if d.loss is not None and d.loss > limit:
        return fail(
            f"{parent.name} moves the logged loss from {d.losses[1]:.4g} to {d.losses[0]:.4g} and gives no gradient: "
            f"it trains nothing",
            **values,
        )
    return fail(
        f"{parent.name} is set and has no effect: loss, gradient, optimiser, stages and init are those of "
        f"'{parent.label}'",
        **values,
    )


_TOLD = "changes the stages, the batch size or how a run ends"


def _ending(probe: Probe) -> tuple[int, str]:
    """When a run can stop early, 0 for never, and which parameters it ends with."""
    training = probe.run.training
    least = training.early_stop * training.eval_every
    return least if least < training.steps else 0, training.restore


_KINDS: dict[str, Callable[[Case, Parent, Probe], Said]] = {
    "model": _model,
    "implementation": _implementation,
    "data": _data,
    "training": _training,
}


def _tree(own: Probe, before: Probe) -> str:
    """How the parameters differ, in words; empty if they do not."""
    here, there = own.built.params, before.built.params
    added = [path for path in here if path not in there]
    removed = [path for path in there if path not in here]
    reshaped = [path for path in here if path in there and here[path].shape != there[path].shape]
    parts = [
        f"{verb} {len(paths)} parameter array{'s' * (len(paths) > 1)} ({paths[0]}{', …' * (len(paths) > 1)})"
        for verb, paths in (("adds", added), ("removes", removed), ("reshapes", reshaped))
        if paths
    ]
    return " and ".join(parts)


def _ran(*probes: Probe) -> bool:
    return all(isinstance(probe.computed, Computed) for probe in probes)


def _not_run(case: Case, parent: Parent, before: Probe) -> Said:
    if case.probe.built.text == before.built.text and parent.factor.kind != "data":
        return note(
            f"{parent.name}: one training step is the same program as that of '{parent.label}', to the letter"
        )
    return missing(case.probe.computed, before.computed)


def _agrees(
    case: Case, parent: Parent, before: Probe, *, outputs_only: bool = False
) -> tuple[Difference, bool]:
    """Whether the two compute the same, within the tolerance of their type.

    Rounding may tip a choice (the nearest code of a codebook, an argmax) at one draw of the parameters; so if
    one disagrees, two others must both agree.
    """
    limit = SAME[precision(case.probe, before)]

    def at(draw: int) -> tuple[Difference, bool]:
        d = difference(case.bench.draw(case.arm, draw), case.bench.draw(parent.label, draw))
        return d, (d.outputs or 0.0) <= limit if outputs_only else not d.beyond(limit)

    first = at(0)
    if first[1]:
        return first
    others = [at(1), at(2)]
    return others[0] if all(agrees for _, agrees in others) else first
