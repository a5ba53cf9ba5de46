"""What a person may change of a study's runs: let failed ones be tried again, cancel what has not ended."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterable, Sequence

from jaxablate.claims import Claim, Claimed, claim_alive
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.runstore import FAILURES, INTERRUPTED, OUTCOMES, RunDir, State
from jaxablate.study import Run

logger = logging.getLogger(__name__)


def chosen(manifest: Manifest, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Run]:
    """The runs of these arms and seeds; of all where none is named.

    Raises:
      UserError: no such arm, or no run has such a seed.
    """
    names = {manifest.study.arm(arm).name for arm in arms}
    known = sorted({run.seed for run in manifest.runs})
    for seed in seeds:
        if seed not in known:
            raise UserError(f"--seeds={seed}: no run of study {manifest.study.name} has it; valid: {known}")
    return [
        run for run in manifest.runs if (not arms or run.arm in names) and (not seeds or run.seed in seeds)
    ]


def retry(manifest: Manifest, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Run]:
    """Makes failed, stopped and cancelled runs pending again, each with a fresh budget; returns those.

    Never one that is done or diverged, which are outcomes, and never one that a process works on.
    """
    return make_pending(manifest, chosen(manifest, arms, seeds))


def make_pending(manifest: Manifest, runs: Iterable[Run]) -> list[Run]:
    """Those of `runs` that it made pending: see `retry`."""
    again = (*FAILURES, *INTERRUPTED, "cancelled")
    return [
        run
        for run in runs
        if _mark(manifest.run_dir(run), again, "pending", lambda state: f"to be tried again after {state}")
    ]


def cancel(manifest: Manifest, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Run]:
    """Cancels runs that have not ended; returns those.

    A process that works on one stops at its next step, and its launcher goes on with the others of that cohort:
    one of this machine is asked to, one on another machine by its launcher, which looks for such marks.
    """
    found: list[Run] = []
    processes: set[int] = set()
    for run in chosen(manifest, arms, seeds):
        where = manifest.run_dir(run)
        holder = claim_alive(where.claim)
        if holder is None:
            where.create(manifest.config_of(run))
            not_ended: tuple[State, ...] = ("pending", "preempted", "running")
            if _mark(where, not_ended, "cancelled", lambda state: f"cancelled while {state}"):
                found.append(run)
        elif where.state() not in (*OUTCOMES, "cancelled"):
            # The rows come first: whoever ends the attempts sees them, and ends them as cancelled.
            where.mark("cancelled", f"cancelled while process {holder.pid} on {holder.host} worked on it")
            found.append(run)
            if holder.near():
                processes.add(holder.pid)
            else:
                logger.info("%s/%s: is trained by %s, which will stop", run.arm, run.id, holder)
    for pid in sorted(processes):
        logger.info("asking process %d to stop at its next step", pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    return found


def _mark(where: RunDir, states: Sequence[State], to: State, reason: Callable[[State], str]) -> bool:
    """Marks a run that is in one of `states` and that nobody works on; whether it did."""
    if not where.path.is_dir() and "pending" not in states:
        return False
    try:
        with Claim(where.claim):
            state = where.state()
            if state not in states:
                return False
            where.mark(to, reason(state))
            return True
    except Claimed as claimed:
        logger.info("%s", claimed)
        return False
    except UserError as error:  # its files are damaged, which is no reason to leave the others
        logger.warning("%s", error)
        return False
    except OSError as error:
        raise UserError(f"{where.path}: cannot be written: {error.strerror}") from None
