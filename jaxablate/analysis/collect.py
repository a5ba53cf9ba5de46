"""Gathering the runs of an arm from their directories."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxablate import disk


def summaries(arm_dir: Path) -> list[dict[str, Any]]:
    """The summaries of an arm's finished runs, by run id."""
    return [disk.read_json(path) for path in sorted(arm_dir.glob("*/summary.json"))]


def same_config(arm_dir: Path, run_id: str) -> list[str]:
    """The ids of an arm's finished runs that have the config of `run_id`, but for the seed.

    For runs outside a frozen study, which has a list of the runs that it reports.
    """
    found = {run["run_id"]: _but_seed(run) for run in summaries(arm_dir)}
    return [id for id, config in found.items() if config == found[run_id]]


def write_arm_summary(arm_dir: Path, run_ids: Iterable[str]) -> dict[str, Any]:
    """Writes `<arm>/summary.json`, the arm over those of `run_ids` that have finished, and returns it.

    Each number under `statistics` is the mean over the runs that are done; `<name>_sd` is their standard
    deviation (ddof 1; null for one run), `<name>_n` how many have one. Runs that diverged are counted, never
    averaged in; the arm's other finished runs, such as those that tuned its learning rate, are listed under
    `left_out`.
    """
    found = {run["run_id"]: run for run in summaries(arm_dir)}
    runs = [found.pop(id) for id in run_ids if id in found]
    done = [run for run in runs if run["state"] == "done"]
    summary = {
        "experiment_name": f"{arm_dir.parent.name}/{arm_dir.name}",
        "runs": {run["run_id"]: run["state"] for run in runs},
        "seeds": sorted(run["seed"] for run in runs),
        "done": len(done),
        "diverged": sum(run["state"] == "diverged" for run in runs),
        "left_out": list(found),
        "statistics": _over([run["statistics"] for run in done]),
        "config": _but_seed(runs[0]) if runs else None,
    }
    disk.write_json(arm_dir / "summary.json", summary)
    return summary


def _but_seed(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run["config"].items() if key != "seed"}


_NO_MEASURE = ("final_step", "best_step", "nonfinite")  # of a metric: where a value was, not what it was


def _over(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over runs of all numbers in mappings that are alike, at any depth."""
    entry: dict[str, Any] = {}
    for name in sorted({name for run in runs for name in run} - {*_NO_MEASURE}):
        known = [run[name] for run in runs if run.get(name) is not None]
        if inner := [value for value in known if isinstance(value, Mapping)]:
            entry[name] = _over(inner)
        elif known:
            entry[name] = statistics.fmean(known)
            entry[f"{name}_sd"] = statistics.stdev(known) if len(known) > 1 else None
            entry[f"{name}_n"] = len(known)
    return entry
