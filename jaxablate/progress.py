"""What is said while a cohort trains: a few lines in the log, and a progress line on a terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from types import TracebackType

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jaxablate.config import Cohort
from jaxablate_kernels import Resolved

logger = logging.getLogger(__name__)


def announce(cohort: Cohort, kernels: Mapping[str, Resolved], mesh: Mesh, steps: int, resume: int) -> None:
    """Logs what is about to be trained, and on what; `resume` is the step it continues from, -1 for none."""
    base = cohort.base
    seeds = ", ".join(str(run.seed) for run in cohort.runs)
    spelled = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
    logger.info("%s/%s (%s): seeds %s, %d steps, %s", base.study, base.arm, base.scale, seeds, steps, spelled)
    for slot, kernel in kernels.items():
        carried = "" if kernel.name == kernel.requested else f" -> {kernel.name}"
        logger.info("kernel of %s: %s%s", slot, kernel.requested, carried)
    if mesh.size < jax.device_count():
        logger.warning("using %d of %d devices", mesh.size, jax.device_count())
    if resume >= 0:
        logger.info("continues from step %d", resume)


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
