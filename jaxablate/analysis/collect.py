"""Gathering the runs of an arm from their directories."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from jaxablate import runstore


def summaries(arm_dir: Path) -> list[dict[str, Any]]:
    """The summaries of an arm's finished runs, by run id."""
    return [runstore.read_json(path) for path in sorted(arm_dir.glob("*/summary.json"))]


def write_arm_summary(arm_dir: Path) -> dict[str, Any]:
    """Writes `<arm>/summary.json`, the arm over its runs, and returns it.

    Each number under `statistics` is the mean over the runs that finished; `<name>_sd` is their standard
    deviation (ddof 1; null for one run). Runs that diverged are counted, never averaged in.
    """
    runs = summaries(arm_dir)
    done = [run for run in runs if run["state"] == "done"]
    merged: dict[str, dict[str, Any]] = {}
    for metric in sorted({metric for run in done for metric in run["statistics"]}):
        entry: dict[str, Any] = {}
        for name in ("first", "final", "min", "max", "best"):
            values = [run["statistics"].get(metric, {}).get(name) for run in done]
            known = [value for value in values if value is not None]
            if known:
                entry[name] = statistics.fmean(known)
                entry[f"{name}_sd"] = statistics.stdev(known) if len(known) > 1 else None
                entry[f"{name}_n"] = len(known)
        merged[metric] = entry
    summary = {
        "experiment_name": runs[0]["experiment_name"] if runs else arm_dir.name,
        "runs": [run["run_id"] for run in runs],
        "states": {run["run_id"]: run["state"] for run in runs},
        "seeds": sorted({run["seed"] for run in runs}),
        "done": len(done),
        "diverged": sum(run["state"] == "diverged" for run in runs),
        "statistics": merged,
    }
    runstore.write_json(arm_dir / "summary.json", summary)
    return summary
