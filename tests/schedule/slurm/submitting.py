"""Toy studies that are submitted to SLURM's played tools."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxablate import runstore
from jaxablate.manifest import Manifest
from jaxablate.schedule import local
from jaxablate.schedule.plan.packing import Item
from jaxablate.schedule.plan.plan import Plan, Scheduled
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm.left import SubmitOptions
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import Submission
from jaxablate.schedule.slurm.submit import Submitted, submit
from jaxablate.study import Study
from tests.frozen import write_run
from tests.schedule.plan.made_estimates import made_plan
from tests.schedule.toy_studies import STUDIES

TWO = {"study": "tuned"}  # of two arrays


def submitted(workdir: Path, study: str = "faults", site: Site | None = None, **options: Any) -> Submitted:
    return submit(STUDIES[study](str(workdir)), site or Site(), SubmitOptions(**options))


def frozen(workdir: Path, study: str, **states: runstore.State) -> Manifest:
    """A frozen study; `baseline="done"` gives the state of an arm's runs, the others never ran."""
    declared = STUDIES[study](str(workdir))
    manifest = Manifest.freeze(declared, local.resolve(declared))
    for run in manifest.runs:
        if state := states.get(run.arm):
            write_run(manifest, run, state)
    return manifest


def newest(workdir: Path) -> Submission:
    return records.submissions(workdir / "toy")[-1]


def option(argv: list[str], name: str) -> str:
    return next((word.partition("=")[2] for word in argv if word.startswith(f"--{name}=")), "")


def plan_of(study: Study, members: int, split: int = 1) -> Plan:
    """One whose confirmatory cohorts have so many members, in the reverse order of the arms."""
    size = len(study.seeds)
    parts = [study.seeds[n : n + members] for n in range(0, size, members)]
    scheduled = [
        Scheduled(
            name=f"{arm.name}/confirm/{n}", arm=arm.name, phase="confirm", stage="", seeds=seeds, rates=(),
            members=len(seeds), split=split, memory=1, share=1.0, after=(), hours=1.0, gpu=0, start=start,
            end=start + 1,
        )
        for start, (arm, (n, seeds)) in enumerate(
            (arm, part) for arm in reversed(study.arms) for part in enumerate(parts)
        )
    ]  # fmt: skip
    end = float(len(scheduled))
    item = Item("one", 1.0, 1)
    made = made_plan([item], 1)
    return dataclasses.replace(made, elements=tuple(scheduled), seeds=study.seeds, makespan=end)
