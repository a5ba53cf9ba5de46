"""Gathering the runs of an arm from their directories."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from jaxablate import runstore


def summaries(arm_dir: Path) -> list[dict[str, Any]]:
    """The summaries of an arm's finished runs, by run id."""
    return [runstore.read_json(path) for path in sorted(arm_dir.glob("*/summary.json"))]


def write_arm_summary(arm_dir: Path, run_id: str) -> dict[str, Any]:
    """Writes `<arm>/summary.json`, the arm over the seeds of one run's config, and returns it.

    Each number under `statistics` is the mean over the runs that finished; `<name>_sd` is their standard
    deviation (ddof 1; null for one run). Runs that diverged are counted, never averaged in; runs with
    another config than `run_id`'s, but for the seed, are listed and left out.
    """
    found = {run["run_id"]: run for run in summaries(arm_dir)}
    config = _but_seed(found[run_id])
    runs = [run for run in found.values() if _but_seed(run) == config]
    done = [run for run in runs if run["state"] == "done"]
    summary = {
        "experiment_name": found[run_id]["experiment_name"],
        "runs": {run["run_id"]: run["state"] for run in runs},
        "seeds": sorted(run["seed"] for run in runs),
        "done": len(done),
        "diverged": sum(run["state"] == "diverged" for run in runs),
        "other_configs": [run["run_id"] for run in found.values() if _but_seed(run) != config],
        "statistics": {
            metric: _over(done, metric) for metric in sorted({m for r in done for m in r["statistics"]})
        },
        "config": config,
    }
    runstore.write_json(arm_dir / "summary.json", summary)
    return summary


def _but_seed(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run["config"].items() if key != "seed"}


def _over(runs: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for name in ("first", "final", "min", "max", "best"):
        values = [run["statistics"].get(metric, {}).get(name) for run in runs]
        known = [value for value in values if value is not None]
        if known:
            entry[name] = statistics.fmean(known)
            entry[f"{name}_sd"] = statistics.stdev(known) if len(known) > 1 else None
            entry[f"{name}_n"] = len(known)
    return entry
