"""Cohorts of the toy task for the tests that train them, and what they leave."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jaxablate import config, disk, runstore
from jaxablate.train import Loop, train


def cohort_of(workdir: Path, **overrides: Any) -> config.Cohort:
    """The toy cohort; `mesh` is one device unless given, since most tests are not about meshes."""
    pairs = {"host.workdir": str(workdir), "host.mesh.member": "1", "host.mesh.data": "1"}
    pairs |= {key.replace("__", "."): str(value) for key, value in overrides.items()}
    return config.load("tests/configs/toy.py", pairs.items())


def with_rates(cohort: config.Cohort, *rates: float) -> config.Cohort:
    """A cohort of the first run at several learning rates."""
    base = cohort.base
    runs = [dataclasses.replace(base, optim=dataclasses.replace(base.optim, learning_rate=r)) for r in rates]
    return config.Cohort(tuple(runs))


def run_dir(workdir: Path, summary: dict[str, Any]) -> Path:
    return workdir / summary["experiment_name"] / summary["run_id"]


def timeless(summary: dict[str, Any]) -> dict[str, Any]:
    """The statistics without those of the clock."""
    return {k: v for k, v in summary["statistics"].items() if not k.startswith("total_wallclock")}


def metrics(workdir: Path, summary: dict[str, Any]) -> list[dict[str, Any]]:
    return disk.read_jsonl(run_dir(workdir, summary) / "metrics.jsonl")[0]


def history(workdir: Path) -> list[dict[str, Any]]:
    (where,) = workdir.glob("toy/base/*/")
    return runstore.RunDir(where).history()


class Killed(BaseException):
    """Stands for a kill: nothing in the program catches it."""


def killed_at(cohort: config.Cohort, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains until a step is logged, and drops everything there."""
    log = Loop._log

    def dying(self: Loop, n: int, *args: Any) -> None:
        log(self, n, *args)
        if n >= step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_log", dying)
        with pytest.raises(Killed):
            train(cohort)
