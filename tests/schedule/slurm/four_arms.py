"""A study of four arms, submitted as an element for each."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxablate import disk, runstore
from jaxablate.claims import Holder
from jaxablate.manifest import Manifest
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import Array, Element, Submission
from jaxablate.study import Run
from tests.frozen import write_run


def arm_of(manifest: Manifest, n: int) -> str:
    return manifest.study.arms[n].name


def of(manifest: Manifest, n: int) -> list[Run]:
    return [run for run in manifest.runs if run.arm == arm_of(manifest, n)]


def submit(manifest: Manifest, job: int | None = 7, **changes: Any) -> Submission:
    """A submission of an element for each arm, in one array."""
    arms = [arm.name for arm in manifest.study.arms]
    parts = tuple(
        Element(n, arm, "confirm", tuple(run.id for run in of(manifest, n)), manifest.study.seeds)
        for n, arm in enumerate(arms)
    )
    fields: dict[str, Any] = {
        "id": records.new_id(), "time": runstore.now(), "site": Site().to_dict(), "elements": parts,
        "arrays": (Array(job, 0, len(parts)),), "state": "submitted", "folder": str(manifest.path),
    }  # fmt: skip
    record = Submission(**fields | changes)
    records.write(manifest.path, record)
    return record


def row(
    manifest: Manifest, record: Submission, index: int, state: str, reason: str = "", **info: Any
) -> None:
    about = {"restart": 0, "job": f"7_{index}", "node": "n1"}
    records.log_row(manifest.path, record.id, index, state=state, reason=reason, **about | info)


def at_work(manifest: Manifest, n: int) -> None:
    """This process holds the claims of an arm's runs."""
    for run in of(manifest, n):
        write_run(manifest, run, "running")
        claim = manifest.run_dir(run).claim
        claim.write_bytes(disk.encode_row(dataclasses.asdict(Holder.me())))
