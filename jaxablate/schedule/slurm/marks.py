"""`cancel` and `retry` of a study that was submitted: the run directories first, then exactly the elements meant."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from jaxablate.analysis.seen import look
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.runstore import OUTCOMES
from jaxablate.schedule import marks
from jaxablate.schedule.slurm import queue
from jaxablate.schedule.slurm.submission import Submission, by_arm, submissions
from jaxablate.study import Run

logger = logging.getLogger(__name__)


def cancel(manifest: Manifest, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Run]:
    """Cancels runs that have not ended, as `schedule.marks.cancel` does, and then their elements; returns the runs.

    An element that has nothing else to do is taken out of SLURM's queue. One that has goes on: it finds the marks
    by itself, stops, and takes up the others. (A signal could not do that: where elements of an array have not
    begun yet, scancel signals those as soon as they begin, besides the one that is meant.)

    Raises:
      UserError: no such arm or seed, or SLURM does not cancel; the runs are marked then all the same.
    """
    found = marks.cancel(manifest, arms, seeds)
    chosen = {arm.name for arm in manifest.study.select(arms=arms)}
    runs, tasks = by_arm(manifest), []
    for record in _open(manifest):
        own = record.tasks()
        tasks += [
            own[element.index]
            for element in record.elements
            if element.arm in chosen and element.index in own
            if not seeds or set(element.seeds) <= set(seeds)
            if _over(manifest, element.among(runs[element.arm, element.phase]))
        ]
    try:
        queue.scancel(_queued(tasks))
    except queue.SlurmError as error:
        raise UserError(
            f"{error}; {len(found)} runs are marked as cancelled, call `jaxablate cancel` again for their jobs"
        ) from None
    return found


def retry(manifest: Manifest, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Run]:
    """Makes runs pending again, as `schedule.marks.retry` does; those that were submitted, it submits again.

    Each with the site of its newest submission, and none that an element in SLURM's queue will find: it says
    which one that is. Runs that no submission had wait for `run` or `submit`, as they do without SLURM, and so do
    the confirmations behind tuning runs. Elements that SLURM has put aside are released.

    Raises:
      UserError: no such arm or seed, or SLURM does not take them; the runs are pending then all the same.
    """
    found = marks.retry(manifest, arms, seeds)
    by_record: dict[str, tuple[Submission, list[Run]]] = {}
    runs, newest = by_arm(manifest), {}
    for record in _open(manifest):
        for element in record.elements:
            newest |= dict.fromkeys(element.among(runs[element.arm, element.phase]), record)
    for run in found:
        if record := newest.get(run):
            by_record.setdefault(record.id, (record, []))[1].append(run)
    if newest and (alone := sum(run not in newest for run in found)):
        logger.info("%d runs were in no submission: `jaxablate submit` takes them up", alone)
    if by_record:
        from jaxablate.schedule.slurm.submit import resubmit

        for record, own in by_record.values():
            notes: list[str] = []
            try:
                again = resubmit(manifest, own, record, notes)
            except UserError as error:
                raise UserError(
                    f"{error}; {len(own)} runs are pending, `jaxablate submit` takes them up"
                ) from None
            _say(notes)
            if again is not None:
                jobs = ", ".join(map(str, again.jobs()))
                count = sum(len(element.runs) for element in again.elements)
                logger.info("submission %s: %d runs, jobs %s", again.id, count, jobs)
    elif newest:  # nothing has failed, but something may be held
        from jaxablate.schedule.slurm.left import Queued

        notes = []
        Queued(manifest, "dry run", notes).release("submit", notes)
        _say(notes)
    return found


def _say(notes: Sequence[str]) -> None:
    for note in notes:
        logger.info("%s", note)


def _open(manifest: Manifest) -> list[Submission]:
    """The submissions that SLURM has accepted, the newest last."""
    return [one for one in submissions(manifest.path) if one.state in ("submitting", "submitted")]


def _over(manifest: Manifest, runs: Sequence[Run]) -> bool:
    """Whether none of these is to be trained; true as well if there are none, since none is listed yet."""
    return all(look(manifest, run, []).state in (*OUTCOMES, "cancelled") for run in runs)


def _queued(tasks: Sequence[str]) -> list[str]:
    """Those of them that SLURM has in its queue; all if it does not say, since to cancel what is over does nothing."""
    if not tasks:
        return []
    found, silent = queue.queued(tasks)
    return list(tasks) if silent else [task for task in tasks if task in found]
