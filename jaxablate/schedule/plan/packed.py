"""A planned study on one node as a batch job: `python -m jaxablate.schedule.plan.packed STUDY --gpus=4 --deadline=6h`.

Called by launch/packed.sbatch. It is `jaxablate run` with these arguments; stopped by a signal it puts exactly its
own job back into the queue, where the next start goes on with what is left. `--on-finish` is called when it does not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from jaxablate.errors import UserError
from jaxablate.schedule import on_finish
from jaxablate.schedule.signals import Signals
from jaxablate.schedule.slurm.job import Job
from jaxablate.stopping import EXIT_AGAIN

RESTARTS = 20  # of one job at most
_TICK_S = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jaxablate run` with the arguments; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        job = Job.here()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return supervise([sys.executable, "-P", "-m", "jaxablate.cli", "run", *arguments], job)


def supervise(command: Sequence[str], job: Job) -> int:
    """Runs a command that exits with 75 when it was stopped and has work left; then requeues the job.

    The first signal is passed on, once: a batch system sends several and means the same by all of them. A command
    that it ends at once, since it was still planning and listened to none, has work left too. Nothing of the
    command's own process group outlives it, such as the estimates of such a plan; workers have groups of their own.

    Returns:
        The command's exit code, which is 75 if it was stopped.
    """
    with Signals("first") as signals, on_finish.deferred() as finish:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env=finish.environment, start_new_session=True
        )
        told = False
        while child.poll() is None:
            if signals.received and not told:
                child.send_signal(signal.SIGTERM)
                told = True
            time.sleep(_TICK_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        code = child.returncode if child.returncode >= 0 else 128 - child.returncode
        if told and child.returncode == -signal.SIGTERM:
            code = EXIT_AGAIN
        if code != EXIT_AGAIN or not _again(job):
            finish.call(code)
    return code


def _again(job: Job) -> bool:
    """Back into the queue, unless somebody meant it to end, or it was there too often; whether it will start again."""
    if job.restart >= RESTARTS:
        sys.stderr.write(f"error: stopped {job.restart + 1} times, and not requeued again; submit it again\n")
        return False
    fate = job.fate()
    if fate == "ours" and (problem := job.requeue()):
        sys.stderr.write(f"error: not requeued: {problem}; submit it again\n")
        return False
    return fate != "cancelled"


if __name__ == "__main__":
    sys.exit(main())
