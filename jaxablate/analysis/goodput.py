"""Goodput: which part of the time that a study took went into steps that count, and where the rest went.

From what every run leaves, attempts.jsonl and perf.jsonl, so it can be had of any study, and imports no jax.
Times of a cohort are split among its members, so that they add up to those of the processes.

    useful    training steps that the result rests on
    lost      steps that were computed, lost with a process before they were saved, and computed again
    compile   compilation of the training step, each time a process starts
    pause     evaluations and checkpoints, as long as they held up the training
    start     a process from its start to its first step: imports, data, restoring
    waiting   between an attempt and the next, or the submission and the first: queue, requeue, launcher
    other     the rest of an attempt: the evaluation before the first step, summaries, figures

The end of an attempt that was killed is known only to who noticed: such an attempt is taken to have ended with
the last step that it did, and what came after it to be waiting.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from jaxablate import runstore
from jaxablate.analysis.sentences import count, duration
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.runstore import RunDir, moment

Row = Mapping[str, Any]
_SPENT = {
    "useful": "useful", "lost": "redone", "compile": "compiling", "pause": "evaluating and saving",
    "start": "starting", "waiting": "waiting", "other": "on the rest",
}  # fmt: skip
_DROPPED = re.compile(r"perf\.jsonl: dropped (\d+) rows after step (-?\d+), up to step (\d+)")


@dataclass(frozen=True)
class Goodput:
    """Seconds of process time by what they were spent on; `waiting` is time without a process."""

    useful: float = 0.0
    lost: float = 0.0
    compile: float = 0.0
    pause: float = 0.0
    start: float = 0.0
    waiting: float = 0.0
    other: float = 0.0
    attempts: int = 0
    lost_steps: int = 0
    steps: int = 0  # useful ones, over all runs

    def __add__(self, other: Goodput) -> Goodput:
        return Goodput(
            *(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        )

    @property
    def seconds(self) -> dict[str, float]:
        """The breakdown, in the order above."""
        kinds = ("useful", "lost", "compile", "pause", "start", "waiting", "other")
        return {kind: getattr(self, kind) for kind in kinds}

    @property
    def share(self) -> float | None:
        """Useful time by all time; None if there was none."""
        total = sum(self.seconds.values())
        return self.useful / total if total else None

    @property
    def at_work(self) -> float | None:
        """Useful time by the time in which there was a process."""
        total = sum(self.seconds.values()) - self.waiting
        return self.useful / total if total else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data in JSON's types."""
        return {**dataclasses.asdict(self), "share": self.share, "at_work": self.at_work}

    def text(self) -> str:
        """In a line."""
        if self.share is None or self.at_work is None:
            return "goodput: nothing has been trained"
        parts = (f"{duration(s / 3600)} {_SPENT[kind]}" for kind, s in self.seconds.items() if s)
        without = f" ({100 * self.at_work:.1f} % without waiting)" if self.waiting else ""
        return (
            f"goodput {100 * self.share:.1f} %{without}: {', '.join(parts)}; {count(self.steps, 'step')} in "
            f"{count(self.attempts, 'attempt')}, {self.lost_steps} computed twice"
        )


def goodput(manifest: Manifest, arms: Collection[str] = (), submitted: float | None = None) -> Goodput:
    """Of all runs of a study that have begun; one that cannot be read is left out.

    Args:
      arms: only the runs of these; all if empty.
      submitted: seconds since the epoch at which the study was queued; what the first attempt of a run waited
        since then counts. None: nothing is known of a time before it.
    """
    total = Goodput()
    for run in manifest.runs:
        if arms and run.arm not in arms:
            continue
        try:
            total += of_run(manifest.run_dir(run), submitted)
        except UserError:  # which `status` reports
            continue
    return total


def of_run(where: RunDir, submitted: float | None = None) -> Goodput:
    """The share of one run in the time of its processes. Raises UserError if its files are damaged."""
    return account(where.history(), runstore.read_steps(where.perf)[0], submitted)


def account(history: Sequence[Row], perf: Sequence[Row], submitted: float | None = None) -> Goodput:
    """What the rows of attempts.jsonl and perf.jsonl say of one run."""
    begins = [row for row in history if row["state"] == "running"]
    step_s = _median(row.get("perf/step_ms") for row in perf) / 1000
    compile_s = _median(row.get("perf/compile_sec") for row in perf)
    free_at, total = submitted, Goodput()
    for number, begin in enumerate(begins):
        later = next((row for row in begins[number + 1 :] if not _idle(history, row)), None)
        own = [] if _idle(history, begin) else _rows_of(perf, begin, later)
        one, ended = _attempt(begin, _end(history, begin), own, _dropped(later), step_s, compile_s)
        began, age = moment(begin["time"]) or 0.0, begin.get("age") or 0.0
        gap = max(began - free_at, 0.0) if free_at is not None else age
        start = min(age, gap)
        one = dataclasses.replace(one, start=start, waiting=gap - start)
        total += _split(one, begin.get("members", 1))
        free_at = ended
    return total


def _attempt(
    begin: Row, end: Row | None, own: Sequence[Row], dropped: int, step_s: float, compile_s: float
) -> tuple[Goodput, float]:
    """What happened in one attempt after its start, and when it ended."""
    steps = own[-1]["step"] - begin.get("step", 0) if own else 0
    useful = 0.0
    for before, row in zip((begin, *own), own, strict=False):
        length = row["step"] - (before.get("step") or 0)
        useful += length * (row.get("perf/step_ms") or 1000 * step_s) / 1000
    pause = sum(row.get("perf/pause_sec") or 0.0 for row in own)
    compiled = sum(row.get("perf/compile_sec") or 0.0 for row in own)
    if not compiled and (own or dropped):  # its row was dropped with the steps
        compiled = compile_s
    lost = dropped * (step_s + (pause / steps if steps else 0.0))
    known = useful + pause + compiled + lost
    began = moment(begin["time"]) or 0.0
    if end is None:  # killed
        ended = began + known
    else:
        ended = max(moment(end["time"]) or 0.0, began)
        known = min(known, ended - began)
    found = Goodput(
        useful=useful, lost=lost, compile=compiled, pause=pause, other=ended - began - known,
        attempts=1, lost_steps=dropped, steps=steps,
    )  # fmt: skip
    return found, ended


def _split(one: Goodput, members: int) -> Goodput:
    """A member's share of the seconds of a cohort; steps and attempts are its own."""
    return dataclasses.replace(one, **{kind: seconds / members for kind, seconds in one.seconds.items()})


def _end(history: Sequence[Row], begin: Row) -> Row | None:
    """The row with which the process of an attempt ended it; None if it was another's, who came to know later."""
    ends = (row for row in history if row["attempt"] == begin["attempt"] and row["state"] != "running")
    return next(
        (row for row in ends if (row.get("host"), row.get("pid")) == (begin.get("host"), begin.get("pid"))),
        None,
    )


def _idle(history: Sequence[Row], begin: Row) -> bool:
    """Whether an attempt ended before it had read a checkpoint, as its launcher says: its step is not the run's."""
    end = _end(history, begin)
    if end is None or "step" not in begin or "notes" in begin:  # notes come with what was read
        return False
    return end.get("step", begin["step"]) == begin["step"]


def _rows_of(perf: Sequence[Row], begin: Row, later: Row | None) -> list[Row]:
    """The rows of perf.jsonl that an attempt wrote and that were kept: by their steps, which only ever grow."""
    first = begin.get("step", 0)
    last = later.get("step", 0) if later is not None else None
    return [row for row in perf if first < row["step"] and (last is None or row["step"] <= last)]


def _dropped(later: Row | None) -> int:
    """Steps that the next attempt found done and could not keep."""
    notes = " ".join(later.get("notes") or ()) if later is not None else ""
    return sum(int(last) - max(int(kept), 0) for _, kept, last in _DROPPED.findall(notes))


def _median(values: Iterable[float | None]) -> float:
    found = [value for value in values if value is not None]
    return median(found) if found else 0.0
