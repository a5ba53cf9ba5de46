"""The record of a run while it trains: metrics.jsonl, perf.jsonl, and TensorBoard as a view of both.

`metrics.jsonl` is the source of truth and holds no time of any kind, so the file of a run that was killed and
resumed is byte for byte that of an undisturbed one. What depends on the clock goes to `perf.jsonl`. The event
file of TensorBoard is thrown away and written anew from these two at every start: that, and not the care of
each writer, is why a resume never shows a step twice.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxablate import disk, runstore
from jaxablate.config import Direction
from jaxablate.events import EventFile, HParam, session_end, session_start
from jaxablate.runstore import RunDir, State


@dataclasses.dataclass
class _Rows:
    """The rows of one file: what was kept of it, and where the next one goes."""

    path: Path
    kept: list[dict[str, Any]]
    fd: int
    last_step: int
    last_keys: set[str]  # of the rows of last_step

    @classmethod
    def open(cls, path: Path, resume_step: int, notes: list[str]) -> _Rows:
        """Drop the rows after `resume_step` (and a torn line), atomically, and open the file to go on."""
        rows, torn = runstore.read_steps(path)
        kept = [row for row in rows if row["step"] <= resume_step]
        if torn:
            notes.append(f"{path.name}: dropped a torn last line")
        if len(kept) < len(rows):
            span = f"after step {resume_step}, up to step {rows[-1]['step']}"
            notes.append(f"{path.name}: dropped {len(rows) - len(kept)} rows {span}")
        if torn or len(kept) < len(rows):
            disk.write_bytes(path, b"".join(map(disk.encode_row, kept)))
        last = kept[-1]["step"] if kept else -1
        keys = {key for row in kept if row["step"] == last for key in row} - {"step"}
        return cls(path, kept, disk.open_append(path), last, keys)

    def add(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Append a row; returns it. Steps never go back and a step never has a key twice."""
        if "step" in values:
            raise ValueError("values: 'step' is the name of the step itself")
        if step < max(self.last_step, 0):
            raise ValueError(f"{self.path.name}: step {step} after step {self.last_step}")
        if step == self.last_step and (again := self.last_keys & values.keys()):
            raise ValueError(f"{self.path.name}: {sorted(again)} written twice at step {step}")
        row = {"step": step, **{key: disk.plain(values[key]) for key in sorted(values)}}
        for key, value in row.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise TypeError(f"{key}: a metric is a number, not {value!r}")
        disk.write_row(self.fd, disk.encode_row(row))
        if step > self.last_step:
            self.last_step, self.last_keys = step, set()
        self.last_keys |= values.keys()
        return row


class MetricsLog:
    """Writes what a run measures. Construct it while holding the run's claim; a context manager.

    Args:
      run_dir: an existing run directory.
      resume_step: the step of the checkpoint that was restored; rows after it are dropped, because the run is
        about to compute them again. **-1 if nothing was restored**: then all rows go, also those of step 0.
      hparams: what the hparams page of TensorBoard shows of this run.
      group: name of the session group (arm); runs with the same group are averaged. Default: by `hparams`.

    The rows of step n must be written, and `flush()` called, before the checkpoint of step n is committed:
    a run resumed at n keeps its rows up to n and never computes them again. If the loop does compute one
    again (an evaluation at n that fell after the checkpoint), writing the identical row is no error.

    `notes` says in words what was dropped, for the attempt record.
    """

    def __init__(
        self,
        run_dir: RunDir,
        *,
        resume_step: int,
        hparams: Mapping[str, HParam],
        group: str | None = None,
    ):
        self.notes: list[str] = []
        started = time.time()
        self._metrics = _Rows.open(run_dir.metrics, resume_step, self.notes)
        self._perf = _Rows.open(run_dir.perf, resume_step, self.notes)
        self._restored = [row for row in self._metrics.kept if row["step"] == self._metrics.last_step]
        self._restored_perf_keys = set(self._perf.last_keys)
        # Only after the two files are right: a kill between the two leaves a stale view, and the next start
        # makes a new one.
        self._events = EventFile.start(run_dir.path, started)
        began = min((row["time"] for row in self._perf.kept if row.get("time")), default=started)
        self._events.summary(session_start(hparams, group, began), began)
        self._replay(started)
        self._metrics.kept = self._perf.kept = []
        self._closed = False

    def _replay(self, started: float) -> None:
        """Show the kept rows again, at the times that perf.jsonl has for their steps."""
        clock = [(row["step"], row.get("time") or started) for row in self._perf.kept]
        steps = [step for step, _ in clock]
        for row in sorted([*self._metrics.kept, *self._perf.kept], key=lambda row: row["step"]):
            at = bisect.bisect_right(steps, row["step"]) - 1
            wall_time = clock[max(at, 0)][1] if clock else started
            self._events.scalars(row["step"], _shown(row), wall_time)
        self._events.flush()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row of deterministic values to metrics.jsonl.

        Raises ValueError for a step that goes back or a key that the step has already, TypeError for a value
        that is not a number. NaN and infinities are written as null.
        """
        if step == self._metrics.last_step and {"step": step, **disk.plain(values)} in self._restored:
            return
        self._events.scalars(step, _shown(self._metrics.add(step, values)), time.time())
        self._events.flush_if_due()

    def write_perf(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row of timings (seconds, bytes, rates) to perf.jsonl, with the time of day as `time`.

        A value that the file has for the restored step stays the one that was measured first.
        """
        if step == self._perf.last_step:
            values = {key: value for key, value in values.items() if key not in self._restored_perf_keys}
            if not values:
                return
        else:
            self._restored_perf_keys = set()
        wall_time = time.time()
        extra = {} if step == self._perf.last_step else {"time": round(wall_time, 3)}
        self._events.scalars(step, _shown(self._perf.add(step, {**values, **extra})), wall_time)
        self._events.flush_if_due()

    def flush(self) -> None:
        """Bring both files to the disk (fsync), and the events to whoever is looking."""
        os.fsync(self._metrics.fd)
        os.fsync(self._perf.fd)
        self._events.flush()

    def finish(self, state: State, statistics: Mapping[str, Any]) -> None:
        """Close the session on the hparams page: success if `done`, else failure; still open if `preempted`.

        `statistics` (see the function of that name) gives the scalars `best/<name>`, at the step where the
        best value was reached, so that the page can rank runs by it: of a curve it shows the last value only.
        Of a run that did not get to its end there are none, since the page averages whatever it finds.
        """
        ended = time.time()
        for name, entry in statistics.items() if state == "done" else ():
            if isinstance(entry, Mapping) and entry.get("best") is not None:
                self._events.scalars(entry["best_step"], {f"best/{name}": entry["best"]}, ended)
        if state not in ("pending", "running", "preempted"):
            self._events.summary(session_end(state, ended), ended)
        self.flush()

    def close(self) -> None:
        """Close the files. Closing twice is no error."""
        if self._closed:
            return
        self._closed = True
        self._events.close()
        os.close(self._metrics.fd)
        os.close(self._perf.fd)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _shown(row: Mapping[str, Any]) -> dict[str, float | None]:
    return {key: value for key, value in row.items() if key not in ("step", "time")}


def statistics(
    rows: Iterable[Mapping[str, Any]], directions: Mapping[str, Direction], since: int = -1
) -> dict[str, dict[str, Any]]:
    """What each metric did over a run, for summary.json.

    Args:
      rows: of metrics.jsonl: `{"step": n, key: number or null, …}`.
      directions: key -> whether less or more is better.
      since: the best value is one of those after this step: up to it they are of other data.

    Returns key (with `/` as `_`) -> `{initial, final, final_step, min, max, mean, nonfinite}`, and `best,
    best_step` where a direction is given. Null and non-finite values are counted in `nonfinite` and left out
    of the rest, which is None if nothing remains. Of equal best values the earliest counts.
    """
    if odd := [f"{key}={value!r}" for key, value in directions.items() if value not in ("min", "max")]:
        raise ValueError(f"directions: {odd[0]} is not 'min' or 'max'")
    points: dict[str, list[tuple[int, float]]] = {}
    nonfinite: dict[str, int] = {}
    for row in rows:
        for key, value in row.items():
            if key == "step":
                continue
            kept = points.setdefault(key, [])
            nonfinite.setdefault(key, 0)
            if value is None or not math.isfinite(value):
                nonfinite[key] += 1
            else:
                kept.append((row["step"], value))
    result: dict[str, dict[str, Any]] = {}
    for key, kept in points.items():
        name = key.replace("/", "_")
        if name in result:
            raise ValueError(f"two metrics have the statistics name {name!r}")
        values = [value for _, value in kept]
        entry: dict[str, Any] = {
            "initial": values[0] if values else None,
            "final": values[-1] if values else None,
            "final_step": kept[-1][0] if kept else None,
            "min": min(values, default=None),
            "max": max(values, default=None),
            "mean": mean(values),
            "nonfinite": nonfinite[key],
        }
        if key in directions:
            best = min if directions[key] == "min" else max
            late = [(step, value) for step, value in kept if step > since]
            entry["best"] = best((value for _, value in late), default=None)
            entry["best_step"] = next((step for step, value in late if value == entry["best"]), None)
        result[name] = entry
    return result


def mean(values: Sequence[float]) -> float | None:
    """The mean of finite numbers, also of ones whose sum is not finite; None of none."""
    if not values:
        return None
    return math.fsum(value / len(values) for value in values)


def gaps(rows: Iterable[Mapping[str, Any]]) -> dict[str, float] | None:
    """How far training loss lies from validation loss at the end of a run; None without one of the two.

    `final_train_minus_best_val` holds one noisy batch against a minimum; `late_train_minus_final_val` the mean
    of the last 5 % of the logged training losses against the last validation loss. Below 0: it generalises
    worse than it fits.
    """
    found: dict[str, list[float]] = {"train/loss": [], "val/loss": []}
    for row in rows:
        for key, values in found.items():
            if (value := row.get(key)) is not None and math.isfinite(value):
                values.append(value)
    train, val = found.values()
    if not train or not val:
        return None
    late = train[-math.ceil(len(train) / 20) :]
    return {
        "final_train_minus_best_val": train[-1] - min(val),
        "late_train_minus_final_val": math.fsum(value / len(late) for value in late) - val[-1],
    }
