"""Study directories with made-up runs: the files that training would have left, without the training.

manifest = made_study_dir(tmp_path, made_study(3), effects={"swiglu": 0.02}, diverged={"rms_only": (2,)})
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxablate import disk, runstore
from jaxablate.analysis import runtable
from jaxablate.analysis.results import Result, Results
from jaxablate.manifest import FORMAT, Manifest
from jaxablate.metrics import gaps, statistics
from jaxablate.study import Phase, Run, Study
from tests.analysis.made import made_results

Row = dict[str, Any]
COMMIT = "1a2b3c4d5e6f7a8b9c0d1a2b3c4d5e6f7a8b9c0d"
DIRECTIONS = {"train/loss": "min", "val/loss": "min", "val/macro_auroc": "max"}


def made_study_dir(
    workdir: Path,
    study: Study,
    *,
    rows: int = 60,
    commits: Mapping[str, str] | None = None,
    spikes: Mapping[str, int] | None = None,
    default_rate: float | None = None,
    **about: Any,
) -> Manifest:
    """A frozen and locked study with its runs.

    Args:
      workdir: where `<study>/` is made.
      study: what is run.
      rows: of metrics.jsonl in each run.
      commits: arm -> another commit than `COMMIT`.
      spikes: arm -> spikes of the loss in each of its runs, others have none; without it nobody counted them.
      default_rate: of the study's config; without it the study has no configs.
      about: arguments of `made_results`, which says how good each run is.
    """
    results = made_results(study, **about)
    path = workdir / study.name
    disk.make_private(path)
    runs = tuple(
        _run(index, result.arm, result.phase, result.seed, result.learning_rate or 1e-3)
        for index, result in enumerate(results.runs)
    )
    lines = b"".join(disk.encode_row(dataclasses.asdict(run)) for run in runs)
    disk.write_bytes(path / "runs.jsonl", lines)
    disk.write_json(
        path / "study.json",
        {
            "format": FORMAT,
            "plan_hash": study.plan_hash,
            "locked": results.locked,
            "amendments": list(results.amendments),
            "runs_sha256": [hashlib.sha256(lines).hexdigest()],
            "study": study.to_dict(),
            "host": {},
            "configs": {a.name: {"optim": {"learning_rate": default_rate}} for a in study.arms}
            if default_rate
            else {},
        },
    )
    manifest = Manifest.load(path)
    if results.rates:
        disk.write_json(path / "rates.json", results.rates)
    for run, result in zip(manifest.runs, results.runs, strict=True):
        if result.state != "pending":
            counted = None if spikes is None else spikes.get(result.arm, 0)
            _write(manifest, run, result, results, rows, (commits or {}).get(result.arm, COMMIT), counted)
    return manifest


def _run(index: int, arm: str, phase: Phase, seed: int, rate: float) -> Run:
    fingerprint = f"{index:010d}"
    return Run(index, arm, phase, seed, rate, fingerprint, runstore.run_id(seed, rate, fingerprint))


def _write(
    manifest: Manifest,
    run: Run,
    result: Result,
    results: Results,
    count: int,
    commit: str,
    spikes: int | None,
) -> None:
    where = manifest.run_dir(run)
    where.path.mkdir(parents=True)
    last = result.steps or 30
    metrics = _curve(result, results, count)
    if spikes is not None:
        _spike([row for row in metrics if row.get("train/loss")], spikes)
    where.metrics.write_bytes(b"".join(map(disk.encode_row, metrics)))
    rate = result.perf.get("steps_per_sec")
    perf: list[Row] = [{"step": step, "perf/steps_per_sec": rate} for step in (1, last // 2, last)]
    perf[0]["perf/compile_sec"] = 10.0
    where.perf.write_bytes(b"".join(map(disk.encode_row, perf)))
    attempts = [{"attempt": 1, "state": "running"}, {"attempt": 1, "state": result.state, "reason": ""}]
    where.attempts.write_bytes(b"".join(map(disk.encode_row, attempts)))
    packages = {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8", "numpy": "2.4.0", "jaxablate": "0.1.0"}
    provenance = {
        "git": {"commit": commit, "dirty": False, "diff": ""},
        "packages": packages,
        "python": "3.11.9",
        "host": {"system": "Linux", "processor": "a processor", "cores": 2},
        "devices": {"platform": "gpu", "kind": "NVIDIA H200", "count": 1},
        "xla_flags": "",
    }
    where.provenance.write_text(json.dumps(provenance))
    if result.state not in ("done", "diverged"):
        return
    seconds = runtable.elapsed(perf)[-1][1]
    summary = {
        "experiment_name": f"{manifest.study.name}/{run.arm}",
        "run_id": run.id,
        "state": result.state,
        "steps": result.steps,
        "seed": run.seed,
        "statistics": {
            **statistics(metrics, DIRECTIONS),  # pyright: ignore[reportArgumentType]
            "generalization_gap": gaps(metrics),
            "total_steps": result.steps,
            "total_wallclock_time": seconds,
            "total_wallclock_hours": seconds / 3600,
        },
        "perf": dict(result.perf),
        "parameters": {"total": result.parameters},
        "kernels": dict(result.kernels),
        "cohort_size": result.cohort_size,
        "hardware": result.hardware,
        "diverged": {"step": result.diverged_at, "last_loss": 9.0} if result.state == "diverged" else None,
        "config": {"seed": run.seed},
    }
    where.summary.write_text(json.dumps(disk.plain(summary)))


def _curve(result: Result, results: Results, count: int) -> list[Row]:
    """Losses and an AUROC that come up to what `made_results` says the run scores, in `count` rows."""
    draw = np.random.default_rng([result.seed, *map(ord, result.arm)])
    quality = _quality(result, results)
    last = result.steps or 30
    steps = sorted({max(1, round(last * (i + 1) / count)) for i in range(count)})
    rows: list[Row] = []
    for i, step in enumerate(steps):
        t = step / 300
        progress = (1 - math.exp(-4 * t)) / (1 - math.exp(-4))
        loss = 2.7 - 1.2 * progress * (1 + (quality - 0.7)) + 0.06 * draw.standard_normal()
        row: Row = {"step": step, "train/loss": loss, "train/grad_norm": 1.0}
        if result.state == "diverged" and i == len(steps) - 1:
            row["train/loss"] = None
        rows.append(row)
        if (i + 1) % max(count // 12, 1) == 0 and row["train/loss"] is not None:
            noise = 0.004 * draw.standard_normal() * (1 - progress)
            rows.append(
                {
                    "step": step,
                    "val/loss": 2.5 * math.exp(-3 * (quality - 0.7)) * (1 + 0.9 * math.exp(-4 * t)),
                    "val/macro_auroc": 0.5 + (quality - 0.5) * progress + noise,
                    "val/macro_auprc": 0.2 + (quality - 0.5) * progress,
                }
            )
    return rows


def _spike(rows: list[Row], spikes: int) -> None:
    """Makes the loss jump in that many rows, evenly over the run, and counts."""
    at = [round((i + 1) * len(rows) / (spikes + 1)) - 1 for i in range(spikes)]
    for i, row in enumerate(rows):
        row["train/loss"] *= 3 if i in at else 1
        row["train/spikes"] = sum(place <= i for place in at)
        row["train/largest_grad_norm"] = 40.0 if row["train/spikes"] else 1.0


def _quality(result: Result, results: Results) -> float:
    value = result.values.get(results.study.response().name)
    return value if value is not None else 0.6
