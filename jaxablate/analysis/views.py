"""The views of one finished run: its metrics as tables, its learning rate and its curves as figures.

They can be made again at any time from metrics.jsonl and perf.jsonl, so what hinders one is no error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from jaxablate.analysis import plots, runtable
from jaxablate.analysis.results import Results
from jaxablate.errors import UserError
from jaxablate.runstore import OUTCOMES, RunDir


def write(run: RunDir, *, title: str, response: str, which: Literal["all", "missing"] = "all") -> list[str]:
    """Writes the views of a run, each by itself, tables first; returns what could not be written, and why."""
    views: Mapping[Path, Callable[[], None]] = {
        run.metrics_csv: lambda: runtable.write_csv(run),
        run.metrics_json: lambda: runtable.write_json(run),
        run.schedule: lambda: plots.lr_schedule(run, run.schedule, title=title),
        run.curves: lambda: plots.loss_curves(run, run.curves, title=title, response=response),
    }
    notes = []
    for path, make in views.items():
        if which == "missing" and path.exists():
            continue
        try:
            make()
        except (OSError, UserError) as error:
            notes.append(f"{path}: cannot be written: {error}")
    return notes


def complete(results: Results) -> list[str]:
    """Writes the views that finished runs of a study lack, as after a kill; returns what could not be written."""
    notes = []
    for run in results.runs:
        if run.dir is None or run.state not in OUTCOMES or run.unread:
            continue
        title = f"{run.arm}, seed {run.seed}"
        notes += write(run.dir, title=title, response=run.response, which="missing")
    return notes
