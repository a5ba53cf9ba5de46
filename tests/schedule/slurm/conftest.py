"""What the tests of `jaxablate.schedule.slurm` run against: SLURM's tools played, or real clusters."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxablate.manifest import Manifest
from jaxablate.schedule import workers
from jaxablate.schedule.cohorts import Job
from jaxablate.schedule.slurm import cluster
from jaxablate.schedule.workers import Command, Worker
from jaxablate.stopping import EXIT_PAUSED
from tests.schedule.slurm.fake_slurm import FakeSlurm
from tests.schedule.slurm.one_element import Started, finish
from tests.slurm_fixtures import (
    slurm,
    slurm_cluster,
    slurm_with_accounting,
    slurm_with_accounting_cluster,
)

__all__ = ["slurm", "slurm_cluster", "slurm_with_accounting", "slurm_with_accounting_cluster"]


@pytest.fixture
def fake(tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """SLURM's tools, on PATH, in the repository; nobody waits between two attempts."""
    found = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("PATH", found.path)
    monkeypatch.chdir(repo)
    monkeypatch.setattr(cluster, "_PAUSES_S", (0.0, 0.0, 0.0))
    return found


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Workers that are done at once; with what they were started."""
    found: Started = []

    def start(manifest: Manifest, job: Job, device: str, command: Command, memory: object) -> Worker:
        found.append((job, command))
        for run in job.runs:
            finish(manifest, run, command.until)
        code = f"raise SystemExit({EXIT_PAUSED if command.until else 0})"
        child = subprocess.Popen([sys.executable, "-S", "-c", code])
        return Worker(job, child, "logs/a.log", device, time.monotonic(), 0, command)

    monkeypatch.setattr(workers, "start", start)
    return found
