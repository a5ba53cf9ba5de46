"""A frozen study with a submission, and the start of one of its elements as SLURM starts it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxablate.manifest import Manifest
from jaxablate.runstore import State, now
from jaxablate.schedule import local
from jaxablate.schedule.cohorts import Job
from jaxablate.schedule.slurm import element as elements
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import Array, Element, Submission
from jaxablate.schedule.workers import Command
from jaxablate.study import Run
from tests.frozen import write_run
from tests.schedule.toy_studies import STUDIES

ID = "20250102T030405-0a1b2c"
Started = list[tuple[Job, Command]]


def finish(manifest: Manifest, run: Run, until: str = "", state: State = "done") -> None:
    """Leaves what training to the end, or to the end of a stage, leaves."""
    if until:
        where = manifest.run_dir(run)
        where.create(manifest.config_of(run))
        where.end_attempt(where.begin_attempt(log="logs/a.log"), "preempted", "as asked", paused=until)
        return
    loss = {0.0005: 0.6, 0.002: 0.5, 0.008: 0.7}.get(run.learning_rate, 0.5)
    write_run(manifest, run, state, {"val/loss": loss})
    if state == "done":
        summary = manifest.run_dir(run).summary
        rest = {"statistics": {"val_loss": {"final": loss}}, "config": manifest.config_of(run)}
        summary.write_text(json.dumps(json.loads(summary.read_text()) | rest))


def frozen(workdir: Path, study: str, *of: Callable[[Manifest], Element], **changes: Any) -> Manifest:
    """A frozen study with a submission of these elements."""
    declared = STUDIES[study](str(workdir))
    manifest = Manifest.freeze(declared, local.resolve(declared))
    own = [dataclasses.replace(make(manifest), index=n) for n, make in enumerate(of)]
    fields = {"site": Site().to_dict(), "state": "submitted", "folder": os.getcwd(), **changes}
    whole = Array(12, 0, len(own), ())
    records.write(manifest.path, Submission(ID, now(), elements=tuple(own), arrays=(whole,), **fields))
    return manifest


def part(arm: str = "baseline", phase: Any = "confirm", **changes: Any) -> Callable[[Manifest], Element]:
    """An element with all listed runs of an arm and phase."""

    def make(manifest: Manifest) -> Element:
        runs = [run for run in manifest.runs if (run.arm, run.phase) == (arm, phase)]
        seeds = tuple(sorted({run.seed for run in runs})) or manifest.study.seeds
        return dataclasses.replace(Element(0, arm, phase, tuple(run.id for run in runs), seeds), **changes)

    return make


def in_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of task 0 of job 12."""
    about = {"ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "0", "JOB_ID": "13", "RESTART_COUNT": "0"}
    for name, value in about.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def work(manifest: Manifest, *options: str, **slurm: str) -> int:
    for name, value in slurm.items():
        os.environ[f"SLURM_{name.upper()}"] = value  # which `in_task` restores
    return elements.main([str(manifest.path), ID, *options])


def rows(manifest: Manifest, index: int = 0) -> list[dict[str, Any]]:
    submission = records.read(manifest.path, ID)
    return records.element_log(manifest.path, submission, submission.elements[index])


def states(manifest: Manifest, index: int = 0) -> list[str]:
    return [row["state"] for row in rows(manifest, index)]
