"""A run's metrics as one table, `metrics.csv` and `metrics.json`: views of metrics.jsonl and perf.jsonl.

Rows are those of metrics.jsonl, so that training and evaluation are apart; a training row has the timings of
its step as well. A cell is empty (in JSON: null) where its row has no such value, or one that was not finite.

    step
    wallclock_time   seconds since the epoch at which the step was logged
    elapsed_time     minutes that the run took up to the step, see `elapsed`; not in metrics.json
    train_loss  val_loss  val_perplexity  learning_rate  tokens_per_sec
    …                whatever else was recorded, by name: train/x is train_x, val/x val_x, perf/x x
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxablate import disk, runstore
from jaxablate.analysis.curves import Rows
from jaxablate.runstore import RunDir

COLUMNS = ("step", "wallclock_time", "elapsed_time", "train_loss", "val_loss", "val_perplexity", "learning_rate",
           "tokens_per_sec")  # fmt: skip
_NAMES = {"train/lr": "learning_rate", "time": "wallclock_time"}


def elapsed(perf: Rows) -> list[tuple[int, float]]:
    """(step, seconds that the run took up to it), over all of its attempts; it begins with (0, 0).

    Counted are compilation, steps at the recorded rates, and the evaluations and checkpoints between them; not
    what was lost in an interruption, the time in a queue, and the evaluation after the last step.
    """
    points, seconds, timed = [(0, 0.0)], 0.0, 0
    for row in perf:
        seconds += (row.get("perf/compile_sec") or 0.0) + (row.get("perf/pause_sec") or 0.0)
        if rate := row.get("perf/steps_per_sec"):  # of the stretch since the row before that has one
            seconds += (row["step"] - timed) / rate
            timed = row["step"]
        points.append((row["step"], seconds))
    return points


def table(metrics: Rows, perf: Rows) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns, and the rows with a value in each of them."""
    timings: dict[int, dict[str, Any]] = {}
    for row in perf:
        timings.setdefault(row["step"], {}).update(row)
    steps, seconds = zip(*elapsed(perf), strict=True)
    rows = []
    for row in metrics:
        at = timings.get(row["step"], {})
        timed = at if any(key.startswith("train/") for key in row) else {"time": at.get("time")}
        found = {_name(key): value for key, value in {**timed, **row}.items()}
        found["elapsed_time"] = float(np.interp(row["step"], steps, seconds)) / 60 if perf else None
        rows.append(disk.plain(found))
    further = sorted({name for row in rows for name in row} - {*COLUMNS})
    columns = [*COLUMNS, *further]
    return columns, [{name: row.get(name) for name in columns} for row in rows]


def _name(key: str) -> str:
    return _NAMES.get(key, key.removeprefix("perf/").replace("/", "_"))


def write_csv(run: RunDir) -> None:
    """Writes metrics.csv of a run, as a whole. Raises OSError."""
    disk.write_bytes(run.metrics_csv, _csv(*_of(run)).encode())


def write_json(run: RunDir) -> None:
    """Writes metrics.json of a run, as a whole. Raises OSError."""
    rows = _of(run)[1]
    without = [{name: value for name, value in row.items() if name != "elapsed_time"} for row in rows]
    disk.write_json(run.metrics_json, without)


def _of(run: RunDir) -> tuple[list[str], list[dict[str, Any]]]:
    return table(runstore.read_steps(run.metrics)[0], runstore.read_steps(run.perf)[0])


def _csv(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)  # None is an empty cell
    return buffer.getvalue()
