"""What `submit` needs of the controller: its bounds, that it accepts an array, and to find one again."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxablate.errors import UserError
from jaxablate.schedule.slurm import queue
from jaxablate.schedule.slurm.queue import SlurmError, run_tool
from jaxablate.schedule.slurm.site import Site

TOOLS = ("sbatch", "squeue", "scontrol", "scancel")

_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 8.0)  # after each time that an array was handed over and nobody answered


@dataclass(frozen=True)
class Room:
    """How much SLURM takes now."""

    array: int = 1001  # elements of one array; SLURM's own default
    limit: int | None = None  # jobs of this user; None: nothing says so
    queued: int = 0  # of those, already there

    @property
    def left(self) -> int | None:
        """Elements that may be submitted; None: any number."""
        return None if self.limit is None else max(self.limit - self.queued, 0)


def missing() -> str:
    """The first of SLURM's tools that is not on PATH; empty if all are."""
    return next((name for name in TOOLS if shutil.which(name) is None), "")


def room(site: Site) -> Room:
    """What SLURM says, or the site's profile where it gives the number of jobs.

    Raises:
      UserError: SLURM is not here, or its controller does not answer.
    """
    if name := missing():
        raise UserError(
            f"{name}: not on PATH; call `jaxablate submit` where SLURM is, or `jaxablate run` to train here"
        )
    bounds = queue.bounds(site.account, site.qos)
    limit = site.max_submit or bounds.jobs
    if limit is None:
        return Room(bounds.array)
    mine = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    return Room(bounds.array, limit, len(run_tool(mine, timeout_s=20, retries=3).split()))


def accept(argv: Sequence[str], comment: str) -> int:
    """Hands an array over; returns its job.

    What got no answer is handed over again, unless it was accepted and only the answer was lost: `comment` tells.

    Raises:
      SlurmError: it was refused; or, with the kind `silent`, nobody knows: it may be in the queue all the same.
    """
    for attempt, pause in enumerate(_PAUSES_S, 1):
        try:
            return _job(run_tool(argv, timeout_s=60))
        except SlurmError as error:
            if error.kind != "silent":
                raise
            unanswered = error
        time.sleep(pause)
        try:
            found = numbers([comment])
        except SlurmError as error:
            raise SlurmError(
                f"{unanswered}; whether it was accepted cannot be told: {error}", "silent"
            ) from None
        if comment in found:
            return found[comment]
        if attempt == len(_PAUSES_S):
            raise unanswered
    raise AssertionError("the last attempt returns or raises")


def _job(answer: str) -> int:
    """The job in the last line that names one, as JOB or JOB;CLUSTER: a site's wrapper may print more."""
    for line in reversed(answer.splitlines()):
        if found := re.fullmatch(r"(\d+)(;.*)?", line.strip()):
            return int(found[1])
    raise SlurmError(f"sbatch: its answer {answer.strip()[:80]!r} names no job", "silent")


def numbers(comments: Iterable[str]) -> dict[str, int]:
    """comment -> the job that has it, of those that SLURM still knows."""
    wanted = set(comments)
    mine = ["squeue", "--me", "--noheader", "--states=all", "--format=%F|%k"]
    pairs = (line.partition("|") for line in run_tool(mine, timeout_s=20, retries=3).splitlines())
    return {comment.strip(): int(job) for job, _, comment in pairs if comment.strip() in wanted}
