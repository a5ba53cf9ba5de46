"""The job that this process is, as SLURM names it in the environment, and its way back into the queue."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxablate.errors import UserError
from jaxablate.schedule.slurm import queue
from jaxablate.schedule.slurm.queue import SlurmError, run_tool

_CONTROLLER_S = 600.0  # patience with one that is down; a job whose time is over is ended sooner


@dataclass(frozen=True)
class Job:
    """A task of a job array."""

    array: int
    task: int
    restart: int  # how often SLURM has started it before
    node: str
    cpus: str = ""  # of each process; empty if the job did not ask

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Job:
        """This process's own.

        Raises:
          UserError: it is no task of a job array.
        """
        try:
            array, task = (int(environment[f"SLURM_ARRAY_{name}_ID"]) for name in ("JOB", "TASK"))
        except (KeyError, ValueError):
            raise UserError(
                "SLURM_ARRAY_TASK_ID: not set; submit with `jaxablate submit`, or sbatch --array=0-N"
            ) from None
        node = environment.get("SLURMD_NODENAME") or environment.get("SLURM_JOB_NODELIST", "")
        restart = int(environment.get("SLURM_RESTART_COUNT") or 0)
        return cls(array, task, restart, node, environment.get("SLURM_CPUS_PER_TASK", ""))

    @property
    def starts(self) -> int:
        """How often it has been started, this time included."""
        return self.restart + 1

    def __str__(self) -> str:
        # Not SLURM_JOB_ID: that of the last task is the number of the whole array, and so would be requeued.
        return f"{self.array}_{self.task}"

    def fate(self) -> Literal["ours", "requeued", "cancelled"]:
        """What SLURM means to do with it once this process has ended; `ours` if nothing, or nothing is known.

        A job that SLURM is ending is COMPLETING, whatever for: one that it has put back into the queue counts
        a restart more, one at its time limit gives that as the reason, one that was cancelled neither
        (measured with SLURM 22.05).
        """
        try:
            shown = run_tool(["scontrol", "--oneliner", "show", "job", str(self)], timeout_s=20, retries=2)
        except SlurmError:
            return "ours"
        found = dict(re.findall(r"\b(JobState|Reason|Restarts)=(\S+)", shown))
        if int(found.get("Restarts", 0)) > self.restart:
            return "requeued"
        ending = found.get("JobState") in ("COMPLETING", "CANCELLED")
        return "cancelled" if ending and found.get("Reason") != "TimeLimit" else "ours"

    def requeue(self) -> str:
        """Puts it back into the queue, and only it; why that failed, or nothing."""
        try:
            queue.requeue(str(self), _CONTROLLER_S)
        except SlurmError as error:
            return str(error)
        return ""
