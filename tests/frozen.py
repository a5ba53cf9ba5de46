"""A small study frozen on disk, with run directories as training leaves them, for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxablate import disk
from jaxablate.config import RunConfig, new_config, resolve
from jaxablate.manifest import Manifest
from jaxablate.runstore import State
from jaxablate.study import Hypothesis, LearningRate, Response, Run, Study, factorial, switch
from tests.toy import ToyData, ToyModel

WIDE = switch("wide", "model", {"model.width": 16})
NOISY = switch("noisy", "model", {"model.noise": 0.1})
WIDE_BETTER = Hypothesis("wide_better", "superiority", factor="wide", text="width lowers the loss")
RULE = LearningRate(grid=(0.001, 0.01), tuning_seeds=(100, 101))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def toy_study(workdir: Path, **changes: Any) -> Study:
    """A 2^2 study of the toy task below `workdir`; `changes` replaces fields of it."""
    base = new_config(study="toy", task="tests.toy:ToyTask", model=ToyModel(), data=ToyData())
    base.scale, base.host.workdir = "tiny", str(workdir)
    fields: dict[str, Any] = {
        "name": "toy",
        "base": base,
        "factors": (WIDE, NOISY),
        "arms": factorial((WIDE, NOISY)),
        "seeds": (0, 1, 2),
        "responses": (Response("val/loss", "min"), Response("val/score", "max")),
        "hypotheses": (WIDE_BETTER,),
    }
    return Study(**(fields | changes))


def resolved(study: Study) -> dict[str, RunConfig[Any, Any]]:
    """The config of each arm, as `Manifest.freeze` wants them."""
    return {arm.name: resolve(study.config(arm.name)).runs[0] for arm in study.arms}


def freeze(study: Study) -> Manifest:
    """The study, frozen in its workdir."""
    return Manifest.freeze(study, resolved(study))


def write_run(
    manifest: Manifest,
    run: Run,
    state: State = "done",
    metrics: Mapping[str, float] | None = None,
    *,
    seconds: float = 60.0,
    members: int = 1,
    attempts: int = 1,
    reason: str = "",
    log: str = "",
) -> None:
    """The files of a run that was tried `attempts` times, and of which the last attempt ended in `state`.

    The attempts are later than any lock: those of a run that was begun before it would not be confirmatory.

    Args:
      metrics: its last validation row. seconds: that each attempt took. members: of its cohort.
      reason, log: of the last attempt.
    """
    where = manifest.run_dir(run)
    where.create({k: v for k, v in manifest.config_of(run).items() if k != "host"})
    rows = []
    for attempt in range(1, attempts + 1):
        minute, rest = divmod(seconds, 60)
        row = {"attempt": attempt, "host": "elsewhere", "pid": 7, "members": members}
        rows.append(row | {"state": "running", "time": f"2100-01-0{attempt}T00:00:00.000+00:00"})
        ended = "bug" if attempt < attempts else state
        if ended != "running":
            time = f"2100-01-0{attempt}T00:{int(minute):02}:{rest:06.3f}+00:00"
            rows.append(row | {"state": ended, "time": time, "reason": reason})
    rows[-1] |= {"log": log} if log else {}
    where.attempts.write_bytes(b"".join(map(disk.encode_row, rows)))
    git = {"commit": COMMIT, "dirty": False, "diff": ""}
    host = {"system": "Linux", "processor": "a processor", "cores": 2}
    devices = {"platform": "cpu", "kind": "cpu", "count": 1}
    provenance = {
        "git": git,
        "packages": {"jax": "0.10.2"},
        "python": "3.11.9",
        "host": host,
        "devices": devices,
    }
    where.provenance.write_text(json.dumps(provenance))
    if state not in ("done", "diverged"):
        return
    where.metrics.write_bytes(disk.encode_row({"step": 1000, **(metrics or {})}))
    where.perf.write_bytes(disk.encode_row({"step": 1000, "perf/steps_per_sec": 20.0}))
    summary = {
        "run_id": run.id,
        "state": state,
        "steps": 1000,
        "seed": run.seed,
        "perf": {"steps_per_sec": 20.0, "step_ms": 50.0, "peak_bytes": None},
        "parameters": {"total": 49},
        "kernels": {},
        "cohort_size": members,
        "hardware": "a processor (2 cores)",
        "diverged": {"step": 40, "last_loss": 9.0} if state == "diverged" else None,
    }
    where.summary.write_text(json.dumps(summary))
