"""A progress line on a terminal; nothing anywhere else."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class StepProgress:
    """Bar with step, loss, speed and time left of one cohort, on stderr if that is a terminal."""

    def __init__(self, label: str, steps: int, done: int):
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(label, total=steps, completed=done, note="compiling")

    def update(self, step: int, note: str) -> None:
        """Shows that `step` is done, with a few words of what it gave."""
        self._progress.update(self._task, completed=step, note=note)

    def __enter__(self) -> StepProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
