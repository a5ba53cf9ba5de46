"""The ablation linter: every arm changes what it says and nothing else, seen on a CPU before anything is spent."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxablate import config, xla
from jaxablate.check import configs
from jaxablate.check.batch import batch
from jaxablate.check.case import Case, Parent
from jaxablate.check.function import function
from jaxablate.check.probes import Bench, Broken, Execute, Probe
from jaxablate.check.report import Finding, Report, Row
from jaxablate.check.responses import response
from jaxablate.check.rules import RULES
from jaxablate.config import RunConfig
from jaxablate.errors import UserError
from jaxablate.study import Study

__all__ = ["Finding", "Report", "check_study"]

logger = logging.getLogger(__name__)


def check_study(
    study: Study,
    *,
    spec: str = "",
    arms: Sequence[str] | None = None,
    execute: Execute = "auto",
    jobs: int = 2,
) -> Report:
    """Holds every arm to what the study declares.

    Args:
      study: the declaration, with its base config.
      spec: the `file.py:arg` it came from, for its `get_config` to be compared with; "" compares nothing.
      arms: those to report on; None for all, and an empty selection is an error. The baseline and what the
        arms are compared with is built too.
      execute: whether to run the arms: `auto` runs them if all are small (see `probes`), `no` looks at
        shapes, configs and programs alone.
      jobs: threads that trace and compile, 1 or more.

    Raises:
      UserError: the study's base config or its baseline does not resolve, or an arm is unknown,
        no arm is chosen, or `jobs` is no number of threads.
    """
    began = time.perf_counter()
    if jobs < 1:
        raise UserError(f"--jobs={jobs}: must be 1 or more; leave it out for 2")
    if arms is not None and not arms:
        raise UserError(
            f"check {study.name}: no arm is selected; name one of {', '.join(a.name for a in study.arms)}"
        )
    chosen = [arm.name for arm in study.select(arms=arms or ())]
    plan = _Plan(study, chosen)
    cache = config.cache_dir(plan.reference.host)
    xla.keep_compiled(cache)
    logger.info("check %s: %d arms, %d programs to build", study.name, len(chosen), len(plan.runs))
    bench = Bench(cache, execute, jobs)
    probes = bench.probe(plan.runs)
    findings = [*configs.declared(study, plan.of(chosen), plan.reference)]
    if spec:
        findings += configs.from_file(study, spec, chosen)
    for arm in chosen:
        findings += _judged(plan, arm, probes, bench)
    rows = tuple(_row(study, arm, probes.get(arm), [f for f in findings if f.arm == arm]) for arm in chosen)
    order = {arm: number for number, arm in enumerate(chosen)}
    findings.sort(key=lambda finding: order[finding.arm])
    return Report(study.name, study.baseline, rows, tuple(findings), time.perf_counter() - began)


class _Plan:
    """Which configs are needed: the arms, the baseline, and each arm without one of its factors."""

    def __init__(self, study: Study, arms: Sequence[str]) -> None:
        self.study = study
        self.reference = config.resolve(study.combine("reference", {})).base
        self.broken: dict[str, str] = {}  # arm -> why it does not resolve
        self.runs: dict[str, RunConfig[Any, Any]] = {}
        self._resolved: dict[str, RunConfig[Any, Any]] = {}  # every arm, chosen or not
        self._label: dict[str, str] = {}  # fingerprint -> the label it is built under
        for arm in study.arms:
            self._resolve(arm.name, study.set_levels(arm.name))
        for arm in dict.fromkeys((study.baseline, *arms)):
            if arm in self._resolved:
                self.runs[arm] = self._resolved[arm]
        self.parents = {
            arm: {factor: self._without(arm, factor) for factor in study.set_levels(arm)} for arm in arms
        }

    def of(self, arms: Sequence[str]) -> dict[str, RunConfig[Any, Any]]:
        """The arms that resolve."""
        return {arm: self.runs[arm] for arm in arms if arm in self.runs}

    def _without(self, arm: str, factor: str) -> str:
        """The label of the arm with one factor at its reference: another arm's name, if it is one."""
        levels = {name: level for name, level in self.study.set_levels(arm).items() if name != factor}
        label = self._resolve(f"{arm}-without-{factor}", levels)
        if label in self._resolved:
            self.runs.setdefault(label, self._resolved[label])
        return label

    def _resolve(self, label: str, levels: Mapping[str, str]) -> str:
        """Resolves a combination of levels; the label under which it is known, if it is known already."""
        try:
            run = config.resolve(self.study.combine(label, levels)).base
        except UserError as error:
            self.broken[label] = str(error)
            return label
        known = self._label.setdefault(run.fingerprint, label)
        named = label in (arm.name for arm in self.study.arms)  # an arm keeps its name, also if it is a twin
        self._resolved.setdefault(label if named else known, run)
        return known


def _judged(plan: _Plan, arm: str, probes: Mapping[str, Probe | Broken], bench: Bench) -> Iterator[Finding]:
    if arm in plan.broken:
        yield Finding(arm, "config", "fail", plan.broken[arm])
        return
    probe, base = probes[arm], probes[plan.study.baseline]
    if isinstance(probe, Broken):
        yield Finding(arm, "build", "fail", f"the arm does not build: {probe.reason}")
        return
    yield Finding(
        arm, "build", "ok", f"{len(probe.built.params)} parameter arrays, {len(probe.built.stages)} stages"
    )
    if isinstance(base, Broken):
        yield Finding(
            arm,
            "build",
            "skipped",
            f"the baseline '{plan.study.baseline}' does not build",
        )
        return
    parents = []
    for factor, label in plan.parents[arm].items():
        there = probes[label] if label in probes else Broken(plan.broken[label], "input")
        parents.append(Parent(plan.study.factor(factor), plan.study.set_levels(arm)[factor], label, there))
    case = Case(plan.study, arm, probe, base, tuple(parents), bench)
    for check, rule in {"function": function, **RULES, "batch": batch, "response": response}.items():
        yield from case.judge(check, rule)


def _row(study: Study, arm: str, probe: Probe | Broken | None, findings: Sequence[Finding]) -> Row:
    changes = study.changes(study.set_levels(arm))
    if not isinstance(probe, Probe):
        return Row(arm, changes, "", None, None, "")
    wrong = [
        f.values["function"]
        for f in findings
        if f.check == "function" and f.verdict == "fail" and "function" in f.values
    ]
    right = [f.values["function"] for f in findings if f.check == "function" and f.verdict == "ok"]
    shown = wrong[0].upper() if wrong else right[0] if right else ""
    names = dict.fromkeys(kernel.name for kernel in probe.built.task.kernels.values())
    carried = ", ".join([name for name in names if name != "reference"] or names)
    built = probe.built
    return Row(arm, changes, shown, built.parameters, built.task.flops_per_example, carried)
