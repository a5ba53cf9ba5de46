"""`validate`: every rule of a config with its verdict, and whether this machine is ready to train it.

The rules are those that training itself enforces (of the config's sections and of the task), the ranges that a
study advises, and what can be seen here without training: kernels, devices, folders, data files, the runs so far.
Nothing is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from jaxablate import config, disk, runstore
from jaxablate.checkpoint import Checkpoints, identity
from jaxablate.claims import claim_alive
from jaxablate.config import Cohort, HostConfig, OptimConfig, RunConfig, TrainingConfig, import_task
from jaxablate.errors import UserError
from jaxablate.rules import Broken, Rule
from jaxablate.runstore import RunDir
from jaxablate.structure import convert
from jaxablate.task import Task

Look = Literal["everything", "static"]
CADENCES = ("training.eval_every", "host.checkpoint_every", "host.log_every")


@dataclass(frozen=True)
class Validation:
    """What was looked at, in order, and what could not be, in words."""

    spec: str
    look: Look
    rules: tuple[Rule, ...]
    unseen: tuple[str, ...]  # what was not looked at, since a broken rule stands before it

    @property
    def broken(self) -> tuple[Rule, ...]:
        """The rules that do not hold."""
        return tuple(rule for rule in self.rules if not rule.holds)

    @property
    def exit_code(self) -> int:
        return 1 if self.broken else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data in JSON's types."""
        rules = [
            {"rule": r.name, "value": r.value, "holds": r.holds, "kind": r.kind, "detail": r.detail}
            for r in self.rules
        ]
        counts = {"rules": len(self.rules), "broken": len(self.broken)}
        about = {"config": self.spec, "looked_at": self.look, "valid": not self.broken, **counts}
        return disk.plain({**about, "unseen": self.unseen, "list": rules})

    def text(self) -> str:
        """A line for each rule, the counts, and the verdict."""
        lines = [self.spec]
        for title, kinds in (("the config", ("static", "advice")), ("this machine", ("host",))):
            asked = [rule for rule in self.rules if rule.kind in kinds]
            lines += ["", title] if asked else []
            for rule in asked:
                advice = " (advice)" if rule.kind == "advice" and not rule.holds else ""
                lines.append(f"  {'✅' if rule.holds else '❌'} {rule}{advice}")
        lines += ["", *(f"not looked at: {what}" for what in self.unseen)]
        lines.append(f"{len(self.rules) - len(self.broken)} of {len(self.rules)} rules hold")
        if self.broken:
            lines.append(f"not valid: {len(self.broken)} ❌ above")
        else:
            lines.append("valid and ready" if self.look == "everything" else "valid; not asked: this machine")
        return "\n".join(lines)


def validate(
    spec: str, overrides: Iterable[tuple[str, str]] = (), *, look: Look = "everything"
) -> Validation:
    """Holds the config that `spec` (`file.py:arg`) and the overrides describe to all its rules.

    Args:
      look: `static` leaves out what depends on this machine: another may be the one to train.

    Raises:
      UserError: there is no such file, or it gives no config; everything else is a broken rule.
    """
    declared = config.load_config_dict(spec)
    config.override(declared, overrides)
    rules, unseen = list(_read(declared)), ["the task's own rules", "kernels, devices, folders, runs"]
    if all(rule.holds for rule in rules):
        try:
            cohort = config.resolve(declared)
        except UserError as error:
            rules += error.rules if isinstance(error, Broken) else [_said(error)]
        else:
            unseen.clear()
            rules += _of_task(cohort, look, unseen)
    return Validation(spec, look, tuple(rules), tuple(unseen))


# ----------------------------------------------------------------------------- the config by itself


def _read(declared: ConfigDict) -> Iterator[Rule]:
    """The task is there, and each section has its fields, their types, and holds its rules."""
    values = declared.to_dict()
    try:
        name = convert(str, values.get("task", ""), "config.task")
        task = import_task(name)
    except UserError as error:
        yield _said(error)
        return
    yield Rule("task", name, True, "can be imported")
    kinds = {"model": task.Model, "data": task.Data, "optim": OptimConfig, "training": TrainingConfig}
    for section, kind in {**kinds, "host": HostConfig}.items():
        try:
            read = convert(kind, values.get(section), f"config.{section}")
        except Broken as broken:
            yield from broken.rules
        except UserError as error:
            yield _said(error)
        else:
            yield Rule(section, None, True, "has all its fields and no others, of the right types")
            yield from _choices(read, section)
            yield from read.rules() if hasattr(read, "rules") else ()
            yield from read.mesh.rules() if isinstance(read, HostConfig) else ()


def _choices(section: Any, path: str) -> Iterator[Rule]:
    """Each field below a section that is one of a few words, which reading it has seen to."""
    hints = typing.get_type_hints(type(section))
    for field in dataclasses.fields(section):
        value, where = getattr(section, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _choices(value, where)
        elif typing.get_origin(hints[field.name]) is Literal:
            words = ", ".join(map(str, typing.get_args(hints[field.name])))
            yield Rule(where, value, True, f"must be one of {words}")


def _said(error: UserError, kind: Literal["static", "host"] = "static") -> Rule:
    """A broken rule of an error that names its field itself."""
    name, colon, detail = str(error).removeprefix("config.").partition(": ")
    return Rule(name, None, False, detail, kind) if colon else Rule("config", None, False, name, kind)


# ------------------------------------------------------------------------------- with its task


def _of_task(cohort: Cohort, look: Look, unseen: list[str]) -> Iterator[Rule]:
    run = cohort.base
    for member in cohort.runs:
        yield from (rule for rule in member.rules() if member is run or rule.name == "seeds")
    own = list(import_task(run.task).rules(run))
    yield from (rule for rule in own if rule.kind != "host")
    if any(rule.kind == "static" and not rule.holds for rule in own):
        unseen.append("cadences and kernels")
    else:
        yield from _of_made_task(run, look, unseen)
    if look == "everything":
        yield from (rule for rule in own if rule.kind == "host")
        yield from _machine(cohort)
        for member in cohort.runs:
            yield _run_so_far(member)


def _of_made_task(run: RunConfig[Any, Any], look: Look, unseen: list[str]) -> Iterator[Rule]:
    task = _made(run, look)
    if isinstance(task, Rule):
        unseen.append("cadences")
        yield from [task] if look == "everything" else ()
        return
    yield from _cadences(run, task)
    yield from _kernels(task) if look == "everything" else ()


def _made(run: RunConfig[Any, Any], look: Look) -> Task[Any, Any] | Rule:
    """The task on this machine's devices, or why it cannot be made: a kernel that is not for them."""
    import jax

    try:
        return import_task(run.task)(run, jax.default_backend() if look == "everything" else "cpu")
    except UserError as error:
        return _said(error, "host")


def _cadences(run: RunConfig[Any, Any], task: Task[Any, Any]) -> Iterator[Rule]:
    """Something is evaluated, saved and logged before the end, in each of a run's stages together."""
    stages = task.stages()
    steps = sum(stage.steps for stage in stages)
    parts = f" ({' + '.join(f'{s.name} {s.steps}' for s in stages)})" if len(stages) > 1 else ""
    for path in CADENCES:
        section, name = path.split(".")
        every = getattr(getattr(run, section), name)
        yield Rule(path, every, every <= steps, f"must be within the {steps} steps of the run{parts}")


def _kernels(task: Task[Any, Any]) -> Iterator[Rule]:
    for slot, kernel in task.kernels.items():
        yield Rule(slot, kernel.requested, True, f"is {kernel.name} on {task.platform}", "host")


# ------------------------------------------------------------------------------- this machine


def _machine(cohort: Cohort) -> Iterator[Rule]:
    run, host = cohort.base, cohort.base.host
    yield _writable("host.workdir", Path(host.workdir))
    yield _writable("host.cache", config.cache_dir(host))
    cores = os.cpu_count() or 1
    yield Rule(
        "host.workers", host.workers, host.workers <= cores, f"must be the {cores} cores at most", "host"
    )
    yield _devices(cohort, rows=run.training.batch_size // run.accumulation)


def _writable(name: str, folder: Path) -> Rule:
    """Whether files can be made in a folder, or the folder itself where it is not there yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        return Rule(name, str(folder), False, f"{there} is a file; give another folder", "host")
    if not os.access(there, os.W_OK | os.X_OK):
        return Rule(name, str(folder), False, f"{there} cannot be written; give another folder", "host")
    if there != folder:
        return Rule(name, str(folder), True, f"is not there yet and can be made in {there}", "host")
    held = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return Rule(name, str(folder), True, f"can be written; holds {', '.join(held) or 'nothing yet'}", "host")


def _devices(cohort: Cohort, rows: int) -> Rule:
    from jaxablate import sharding

    try:
        mesh = sharding.make_mesh(cohort.base.host.mesh, len(cohort.runs), rows)
    except UserError as error:
        return _said(error, "host")
    kind, used = mesh.devices.flat[0].device_kind, mesh.size
    return Rule("host.mesh", None, True, f"{len(cohort.runs)} runs on {used} x {kind}", "host")


def _run_so_far(run: RunConfig[Any, Any]) -> Rule:
    """Whether a run can begin, or go on from where it is."""
    name = runstore.run_id(run.seed, run.optim.learning_rate, run.fingerprint)
    where = RunDir(Path(run.host.workdir) / run.study / run.arm / name)
    try:
        holds, detail = _state(where, run)
    except UserError as error:
        holds, detail = False, str(error)
    return Rule(f"run {name}", None, holds, detail, "host")


def _state(where: RunDir, run: RunConfig[Any, Any]) -> tuple[bool, str]:
    if not where.path.is_dir():
        return True, "has not begun"
    disk.read_json(where.config)
    state = where.state()
    if holder := claim_alive(where.claim):
        return False, f"{state}: {holder} works on it; wait for it or stop it"
    if state in runstore.OUTCOMES:
        disk.read_json(where.summary)
        return True, f"{state}; nothing is left to train"
    # What is read is the manifests and digests alone, so that the identity does not matter.
    with contextlib.closing(Checkpoints(where.checkpoints, identity(run.fingerprint, ""), 1)) as store:
        problems = {step: store.verify(step) for step in store.steps()}
        sound = [step for step in store.regular_steps() if not problems[step]]
    bad = [f"that of step {step} is damaged ({why})" for step, why in problems.items() if why]
    goes_on = f"goes on from step {max(sound)}" if sound else "starts anew"
    said = f"{state}; {goes_on}" + "".join(f"; {what}" for what in bad)
    return not bad, said
