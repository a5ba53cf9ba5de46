"""What a person sees while a study runs: a table on a terminal, one line per event anywhere else. On stderr.

It shows no scores: to look after each seed and stop at will makes false positives (statistics, "Seeds").
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jaxablate.disk import parse_row
from jaxablate.manifest import Manifest
from jaxablate.schedule.workers import Worker, readable, tail

COLUMNS = ("pending", "running", "done", "diverged", "failed")


@dataclass(frozen=True)
class Progress:
    """How far a worker has come."""

    label: str
    runs: int
    step: int
    steps: int  # 0: not known yet
    rate: float | None  # steps per second
    elapsed: float  # seconds

    @classmethod
    def of(cls, manifest: Manifest, worker: Worker) -> Progress:
        """Read from the newest rows of the runs it has begun; the slowest counts."""
        found: list[tuple[int, int, float | None]] = []
        for run in worker.job.runs:
            where = manifest.run_dir(run)
            begun = [row for row in readable(where) if row.get("log") == worker.log]
            if begun:
                rows = [row for line in tail(where.perf, 20) if (row := parse_row(line.encode()))]
                rates = [row["perf/steps_per_sec"] for row in rows if "perf/steps_per_sec" in row]
                step = rows[-1]["step"] if rows else begun[-1].get("step", 0)
                found.append((step, begun[-1].get("steps", 0), rates[-1] if rates else None))
        step, steps, rate = min(found, default=(0, 0, None), key=lambda f: f[0])
        elapsed = time.monotonic() - worker.began
        return cls(str(worker.job), len(worker.job.runs), step, steps, rate, elapsed)

    @property
    def fraction(self) -> float:
        """Of its steps, from 0 to 1."""
        return self.step / self.steps if self.steps else 0.0

    def __str__(self) -> str:
        if not self.steps:
            return f"{self.label}: starting, {self.elapsed:.0f} s"
        rate = f", {self.rate:.1f} steps/s" if self.rate else ""
        return f"{self.label}: step {self.step} of {self.steps}{rate}"


def seconds_left(
    finished: Iterable[tuple[float, int]], running: Sequence[Progress], waiting: int, slots: int
) -> float | None:
    """Estimate of the wall time that is left; None while there is nothing to estimate it from.

    Args:
      finished: (seconds, runs) of the cohorts that this launch has finished.
      running: those at work.
      waiting: runs that nobody has begun.
      slots: cohorts at a time.
    """
    finished = list(finished) or [
        (p.elapsed / p.fraction, p.runs) for p in running if p.step > 0 and p.fraction > 0.02
    ]
    if not finished:
        return None
    each = sum(seconds for seconds, _ in finished) / sum(runs for _, runs in finished)
    begun = sum(each * p.runs * (1 - p.fraction) for p in running)
    return (each * waiting + begun) / slots


def in_words(seconds: float | None) -> str:
    """`, about 5 min left`, or nothing where there is no estimate or nothing left."""
    if not seconds:
        return ""
    if seconds < 90:
        return f", about {max(round(seconds / 10) * 10, 10)} s left"
    if seconds < 5400:
        return f", about {seconds / 60:.0f} min left"
    return f", about {seconds / 3600:.1f} h left"


class View:
    """Says on stderr what happens; on a terminal with a table below it that is kept up to date."""

    def __init__(self, title: str):
        self.title = title
        self.console: Console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._muted = False

    @property
    def live(self) -> bool:
        """Whether there is a table to update."""
        return self._live is not None and not self._muted

    def event(self, text: str) -> None:
        """Says one thing that happened."""
        if not self._muted:
            self.console.print(Text(text))

    def mute(self) -> None:
        """Says nothing more: the terminal has gone."""
        self._muted = True

    def update(
        self, arms: Mapping[str, Mapping[str, int]], running: Sequence[Progress], left: float | None
    ) -> None:
        """Shows arm -> column -> count, the cohorts at work, and the time left in seconds."""
        if self._live is None or self._muted:
            return
        table = Table(title=self.title, title_justify="left", box=None, pad_edge=False)
        table.add_column("arm")
        for column in COLUMNS:
            table.add_column(column, justify="right")
        for arm, counts in arms.items():
            table.add_row(arm, *(str(counts.get(column) or "–") for column in COLUMNS))
        ended = sum(counts.get(c, 0) for counts in arms.values() for c in ("done", "diverged", "failed"))
        total = sum(sum(counts.values()) for counts in arms.values())
        foot = Text(f"{ended} of {total} runs{in_words(left)}")
        self._live.update(Group(table, *(Text(str(p)) for p in running), foot), refresh=True)

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None and not self._muted:
            self._live.stop()
