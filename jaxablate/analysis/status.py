"""How far a study is: states, failures with the last lines of their logs, what is left and what it may cost.

Read from the run directories alone, 10,000 of them in a fraction of a second: of attempts.jsonl only the end,
of the runs that finished only a few. Imports neither jax nor numpy, pandas or matplotlib.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxablate import disk
from jaxablate.analysis.advice import ADVICE
from jaxablate.analysis.seen import END_OF_FILE, Count, Seen, look, printable
from jaxablate.analysis.terminal import as_text
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest, read_rates
from jaxablate.runstore import FAILURES, OUTCOMES, RunDir
from jaxablate.study import Phase, Run

COUNTS: tuple[Count, ...] = ("done", "running", "gone", "pending", "paused", "unlisted", "diverged", "oom",
                             "preempted", "timeout", "node_fail", "bug", "cancelled", "unreadable")  # fmt: skip
HEADINGS: Mapping[Count, str] = {
    "gone": "running (its process is gone)",
    "paused": "between stages",
    "unlisted": "after tuning",
    "node_fail": "node fail",
}
ALWAYS_SHOWN: tuple[Count, ...] = ("done", "running", "pending")
ENDED: tuple[Count, ...] = (*OUTCOMES, "cancelled")  # nothing of these is left to do
WORTH_A_LOOK: tuple[Count, ...] = ("diverged", "preempted", *FAILURES)  # these are listed with their reasons

_TIMED_RUNS = 9  # finished runs per arm whose time is looked up
_TAIL_LINES = 5
_SHOWN = 12


@dataclass(frozen=True)
class Row:
    """The runs of one arm in one phase."""

    arm: str
    phase: Phase
    counts: Mapping[Count, int]
    attempts: int  # over all runs: more than their number means that some were tried again
    left: int  # runs that have no result and were not cancelled
    hours: float | None  # estimate for those; None while no run of the arm has finished


@dataclass(frozen=True)
class Failure:
    """Runs of an arm that ended in the same way."""

    arm: str
    state: Count
    reason: str
    runs: tuple[str, ...]
    attempts: int  # of the one that was tried most often
    log: str  # of the last of them, relative to the study; empty if none is recorded
    tail: tuple[str, ...]  # its last lines
    advice: str = ""  # what a person can do about it, where that is known


@dataclass(frozen=True)
class Working:
    """The runs of an arm that one process trains."""

    arm: str
    phase: Phase
    host: str
    pid: int | None
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Status:
    """A study's state at one moment. `table` is for people, `to_dict` for programs."""

    study: str
    path: Path
    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]
    seconds_per_run: Mapping[str, float]  # arm -> median of its finished runs; a cohort's time is split
    notes: tuple[str, ...] = ()
    working: tuple[Working, ...] = ()
    seen: tuple[Seen, ...] = field(default=(), repr=False)  # every run, for who wants to know more of it

    @property
    def hours(self) -> float | None:
        """Estimate for all that is left, of the arms that have one; None if no arm has."""
        known = [row.hours for row in self.rows if row.hours is not None]
        return sum(known) if known else None

    @property
    def not_estimated(self) -> int:
        """Runs left in arms of which none has finished."""
        return sum(row.left for row in self.rows if row.hours is None)

    @property
    def total(self) -> Counter[Count]:
        """The runs by state."""
        return sum((Counter(row.counts) for row in self.rows), Counter())

    def to_dict(self) -> dict[str, Any]:
        """Plain data in JSON's types; hours are estimates."""
        return {
            "study": self.study,
            "path": str(self.path),
            "total": {state: self.total[state] for state in COUNTS if self.total[state]},
            "left": sum(row.left for row in self.rows),
            "hours_left_estimate": self.hours,
            "runs_left_not_in_estimate": self.not_estimated,
            "seconds_per_run": dict(self.seconds_per_run),
            "arms": [dataclasses.asdict(row) for row in self.rows],
            "working": [dataclasses.asdict(one) for one in self.working],
            "failures": [disk.plain(dataclasses.asdict(failure)) for failure in self.failures],
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """Arms by states, the remaining cost, and below them what failed and why."""
        from rich import box
        from rich.table import Table

        total, phases = self.total, len({row.phase for row in self.rows}) > 1
        shown: list[Count] = [state for state in COUNTS if total[state] or state in ALWAYS_SHOWN]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
        table.add_column("arm", footer="total", no_wrap=True)
        if phases:
            table.add_column("phase", no_wrap=True)
        for state in shown:
            table.add_column(HEADINGS.get(state, state), justify="right", footer=str(total[state]))
        table.add_column("attempts", justify="right", footer=str(sum(row.attempts for row in self.rows)))
        table.add_column("left", justify="right", footer=str(sum(row.left for row in self.rows)))
        table.add_column("time left (estimate)", justify="right", footer=_duration(self.hours))
        for row in self.rows:
            counts = (str(row.counts.get(state, 0) or "·") for state in shown)
            phase = [row.phase] if phases else []
            table.add_row(
                row.arm, *phase, *counts, str(row.attempts), str(row.left or "·"),
                _duration(row.hours) if row.left else "·",
            )  # fmt: skip
        return "\n".join([f"{self.study}   {self.path}", as_text(table), *self._below()])

    def _below(self) -> list[str]:
        lines = []
        if self.hours is not None:
            without = f"; {self.not_estimated} runs of arms that have finished none are not in it"
            lines.append(
                f"time left is an estimate: runs left x the median time of the arm's finished runs, on one worker"
                f"{without if self.not_estimated else ''}"
            )
        elif self.not_estimated:
            lines.append("no estimate of the time left: no run has finished yet")
        for one in self.working[:_SHOWN]:
            runs = one.runs[0] if len(one.runs) == 1 else f"{len(one.runs)} runs"
            lines.append(f"running: {one.arm}/{runs} ({one.phase}) on {one.host}, process {one.pid}")
        for failure in self.failures[:_SHOWN]:
            which = failure.runs[-1] if len(failure.runs) == 1 else f"{len(failure.runs)} runs"
            again = f", {failure.attempts} attempts" if failure.attempts > 1 else ""
            lines += [
                "",
                f"{failure.arm}/{which}: {failure.state}{again}: {failure.reason or 'no reason recorded'}",
            ]
            lines += [f"  advice: {failure.advice}"] if failure.advice else []
            lines += [f"  | {line}" for line in failure.tail]
            if failure.log:
                lines.append(f"  log: {self.path / failure.log}")
        if more := len(self.failures) - _SHOWN:
            lines += ["", f"and {more} more; --json lists all"] if more > 0 else []
        return [*lines, *(f"note: {note}" for note in self.notes)]


def status(manifest: Manifest, arms: Sequence[str] = ()) -> Status:
    """The state of a frozen study, or of some of its arms, from its run directories.

    Raises:
      UserError: an arm that the study does not have.
    """
    wanted = [arm.name for arm in manifest.study.select(arms=arms)]
    notes: list[str] = []
    seen = [look(manifest, run, notes) for run in manifest.runs if run.arm in wanted]
    seconds = _seconds_per_run(manifest, seen, notes)
    by_row: dict[tuple[str, Phase], list[Seen]] = defaultdict(list)
    for one in seen:
        by_row[one.run.arm, one.run.phase].append(one)
    unlisted = _unlisted(manifest, notes)
    phases: tuple[Phase, ...] = ("tuning", "confirm")
    rows = [
        _row(arm, phase, by_row[arm, phase], unlisted.get((arm, phase), 0), seconds.get(arm))
        for arm in wanted
        for phase in phases
        if by_row[arm, phase] or (arm, phase) in unlisted
    ]
    return Status(
        study=manifest.study.name,
        path=manifest.path,
        rows=tuple(rows),
        failures=_failures(manifest, seen, notes),
        seconds_per_run=seconds,
        notes=tuple(notes),
        working=_working(seen),
        seen=tuple(seen),
    )


# ------------------------------------------------------------------------------------- reading


def _unlisted(manifest: Manifest, notes: list[str]) -> dict[tuple[str, Phase], int]:
    """(arm, "confirm") -> runs that wait for the arm's learning rate."""
    study = manifest.study
    if study.learning_rate is None:
        return {}
    rates = read_rates(manifest.path)
    listed = {run.arm for run in manifest.runs if run.phase == "confirm"}
    hopeless = [arm for arm, found in rates.items() if found["learning_rate"] is None]
    notes += [f"arm '{arm}': no learning rate was stable, so it has no confirmatory runs" for arm in hopeless]
    waiting = [arm.name for arm in study.arms if arm.name not in listed and arm.name not in hopeless]
    return {(arm, "confirm"): len(study.seeds) for arm in waiting}


# -------------------------------------------------------------------------------------- summing up


def _row(arm: str, phase: Phase, seen: Sequence[Seen], unlisted: int, seconds: float | None) -> Row:
    counts: Counter[Count] = Counter(one.state for one in seen)
    if unlisted:
        counts["unlisted"] = unlisted
    left = counts.total() - sum(counts[state] for state in ENDED)
    return Row(
        arm=arm,
        phase=phase,
        counts={state: counts[state] for state in COUNTS if counts[state]},
        attempts=sum(one.attempts for one in seen),
        left=left,
        hours=None if seconds is None else left * seconds / 3600,
    )


def _seconds_per_run(manifest: Manifest, seen: Iterable[Seen], notes: list[str]) -> dict[str, float]:
    """arm -> median seconds of its newest finished runs."""
    finished: dict[str, list[Run]] = defaultdict(list)
    for one in seen:
        if one.state == "done":
            finished[one.run.arm].append(one.run)
    found: dict[str, float] = {}
    for arm, runs in finished.items():
        try:
            times = [_worked(manifest.run_dir(run)) for run in runs[-_TIMED_RUNS:]]
        except UserError as error:
            notes.append(str(error))
            continue
        if known := [seconds for seconds in times if seconds is not None]:
            found[arm] = statistics.median(known)
    return found


def _worked(where: RunDir) -> float | None:
    """Seconds that processes worked on a run, over all attempts; a cohort's time is split among its members.

    Only attempts whose end the same process recorded: another one learns of an end long after. None if there
    are none.
    """
    began: dict[int, Mapping[str, Any]] = {}
    parts = []
    for row in where.history():
        if row["state"] == "running":
            began[row["attempt"]] = row
        elif (start := began.pop(row["attempt"], None)) and start.get("pid") == row.get("pid"):
            times = [datetime.datetime.fromisoformat(r["time"]) for r in (start, row) if "time" in r]
            if len(times) == 2:
                parts.append((times[1] - times[0]).total_seconds() / start.get("members", 1))
    return sum(parts) if parts else None


def _working(seen: Iterable[Seen]) -> tuple[Working, ...]:
    """By process, in the order of the runs."""
    found: dict[tuple[str, Phase, str, int | None], list[str]] = defaultdict(list)
    for one in seen:
        if one.state == "running":
            host = printable(one.last.get("host", "an unknown host"))
            found[one.run.arm, one.run.phase, host, one.last.get("pid")].append(one.run.id)
    return tuple(Working(*key, tuple(runs)) for key, runs in found.items())


def _failures(manifest: Manifest, seen: Iterable[Seen], notes: list[str]) -> tuple[Failure, ...]:
    alike: dict[tuple[str, Count, str], list[Seen]] = defaultdict(list)
    for one in seen:
        if one.state in WORTH_A_LOOK:
            alike[one.run.arm, one.state, printable(one.last.get("reason", ""))].append(one)
    failures = []
    for (arm, state, reason), ones in alike.items():
        log, tail = "", ()
        if state in FAILURES:
            log = _log_of(manifest.run_dir(ones[-1].run), ones[-1].last)
            tail = _tail(manifest.path, log, notes) if log else ()
        runs, attempts = tuple(one.run.id for one in ones), max(one.attempts for one in ones)
        failures.append(Failure(arm, state, reason, runs, attempts, log, tail, ADVICE.get(state, "")))
    return tuple(failures)


def _log_of(where: RunDir, last: Mapping[str, Any]) -> str:
    """The log of the last attempt, which its first or its last row may name."""
    rows = [row for row in where.history() if row["attempt"] == last["attempt"]]
    return next((str(row["log"]) for row in reversed(rows) if row.get("log")), "")


def _tail(study: Path, log: str, notes: list[str]) -> tuple[str, ...]:
    """The last lines of a log in the study's directory, without colours and control characters."""
    path = study / log
    if not path.resolve().is_relative_to(study.resolve()):
        notes.append(f"{log}: this log lies outside the study and is not shown")
        return ()
    try:
        with path.open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - END_OF_FILE, 0))
            text = file.read().decode(errors="replace")
    except OSError as error:
        notes.append(f"{path}: cannot be read: {error.strerror}")
        return ()
    lines = [line for line in text.splitlines() if line.strip()][-_TAIL_LINES:]
    lines = [printable(line).rstrip() for line in lines]
    return tuple(line if len(line) <= 200 else f"{line[:197]}..." for line in lines)


# ----------------------------------------------------------------------------------------- words


def _duration(hours: float | None) -> str:
    if hours is None:
        return "–"
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:.1f} h"
