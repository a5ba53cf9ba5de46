"""A launcher's side of a plan: which job next, where, and in what company. A plan orders work, it makes none.

Jobs are formed from the run directories as ever. What a plan does not know, such as a retry with fewer members or
a tuning run beyond the grid, goes last.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jaxablate.errors import UserError
from jaxablate.estimate.share import memory_share
from jaxablate.schedule.cohorts import Job
from jaxablate.schedule.plan.packing import ROUNDING
from jaxablate.schedule.plan.plan import Plan, Scheduled
from jaxablate.schedule.retries import Outlook
from jaxablate.study import Run

_SLACK = 1.1  # by which an estimate of memory may be too small, where there is room for it
_LEAST = 0.01  # of a GPU's memory, that every process takes


def ordered(plan: Plan, jobs: Iterable[Job]) -> list[Job]:
    """The jobs in the order in which the plan starts them, those it does not know last."""

    def rank(job: Job) -> tuple[float, int]:
        element = element_of(plan, job)
        if element is None or element.start is None or element.gpu is None:
            return math.inf, 0
        return element.start, element.gpu

    return sorted(jobs, key=rank)


def element_of(plan: Plan, job: Job) -> Scheduled | None:
    """The element of the stage with which a job goes on; None if the plan has no such cohort."""
    return next(iter(_ahead(plan, job)), None)


def until(plan: Plan, job: Job) -> str:
    """The stage at whose end a job gives up its place, since the plan has the next elsewhere; empty for the last."""
    ahead = _ahead(plan, job)
    for one, next_one in itertools.pairwise(ahead):
        waits = (next_one.start or 0.0) > (one.end or 0.0) * (1 + ROUNDING)
        if waits or one.gpu != next_one.gpu:
            return one.stage
    return ""


def _ahead(plan: Plan, job: Job) -> list[Scheduled]:
    """The elements of the cohort that a job trains, in order, without those of stages that it has behind it."""
    same = (e for e in plan.elements if (e.members, e.split) == (len(job.runs), job.split))
    own = [element for element in same if all(_holds(element, run) for run in job.runs)]
    stages = [element.stage for element in own]
    return own[stages.index(job.behind) + 1 :] if job.behind and job.behind in stages else own


def company(plan: Plan, outlooks: Mapping[Run, Outlook]) -> dict[Run, Outlook]:
    """The outlooks with what the plan knows beforehand: how many members fit, and in how many micro-batches."""
    found = {}
    for run, look in outlooks.items():
        own = [e for e in plan.elements if (e.arm, e.phase) == (run.arm, run.phase)]
        if own:
            most = max(element.members for element in own)
            members = most if look.members is None else min(look.members, most)
            split = max(look.split, *(element.split for element in own))
            look = dataclasses.replace(look, members=members, split=split)
        found[run] = look
    return found


def assign(
    plan: Plan, jobs: Iterable[Job], devices: Sequence[str], at_work: Sequence[tuple[str, Job]]
) -> list[tuple[str, Job]]:
    """(device, job) of what can start now.

    In the plan's order, each where the plan has it if there is room, else anywhere. A job for which there is none
    holds up those behind it, which would take its room again and again.

    Args:
        plan: that is followed.
        jobs: that are ready.
        devices: of the workers: a GPU, as often as it may have workers; or "" for each process on a CPU.
        at_work: the devices of the workers that are busy, with their jobs.
    """
    slots, free = Counter(devices), Counter(devices)
    free.subtract(device for device, _ in at_work)
    loads: dict[str, list[tuple[float, float]]] = {device: [] for device in slots}
    slack = _slack(plan)
    for device, job in at_work:
        loads[device].append(_load(plan, job, slack))

    def has_room(device: str, own: tuple[float, float]) -> bool:
        """A GPU has 1 of all that it has; a CPU as much for each of its processes, whichever of them takes it."""
        whole = (1.0 if device else slots[device]) + ROUNDING
        return not loads[device] or all(
            sum(parts) <= whole for parts in zip(own, *loads[device], strict=True)
        )

    found = []
    for job in ordered(plan, jobs):
        own, element = _load(plan, job, slack), element_of(plan, job)
        room = [device for device in slots if free[device] > 0 and has_room(device, own)]
        if not room:
            break
        planned = [*slots][element.gpu % len(slots)] if element and element.gpu is not None else ""
        device = planned if planned in room else room[0]
        free[device] -= 1
        loads[device].append(own)
        found.append((device, job))
    return found


def workers_per_gpu(plan: Plan) -> int:
    """How many cohorts the plan has on one GPU at most."""
    return max(map(len, _beside(plan)), default=1)


def memory_fraction(plan: Plan, job: Job) -> float | None:
    """What of a GPU's memory a worker may take, so that others fit beside it; None where it is alone.

    Those of the jobs that `assign` has on one GPU are together no more than what jax would take of it by itself.

    Raises:
        UserError: the environment says that in a way that jax would not take.
    """
    if plan.request.on_cpu or workers_per_gpu(plan) < 2 or not plan.capacity:
        return None
    whole, _ = memory_share(os.environ)
    return math.floor(1000 * whole * _load(plan, job, _slack(plan))[1]) / 1000  # jax is told three digits


def devices(plan: Plan, gpus: Sequence[str]) -> list[str]:
    """A device for each worker that the plan has at a time; "" for those on a CPU.

    Raises:
        UserError: the plan is for more GPUs than there are, or the environment says badly how much memory to use.
    """
    if not gpus:
        return [""] * plan.request.gpus
    if plan.request.gpus > len(gpus):
        raise UserError(f"--gpus={plan.request.gpus}: this machine has {len(gpus)}")
    memory_share(os.environ)  # said badly, it is told now and not when the first worker starts
    return [*gpus[: plan.request.gpus]] * workers_per_gpu(plan)


def _load(plan: Plan, job: Job, slack: float) -> tuple[float, float]:
    """What a job takes of a GPU, or of a process's part of a CPU: of its time, and of its memory.

    All of it where the plan does not know.
    """
    element = element_of(plan, job)
    if element is None or not plan.capacity:
        return 1.0, 1.0
    held = _held(plan, element)
    return element.share, max(held, min(held * slack, 1.0))


def _held(plan: Plan, element: Scheduled) -> float:
    return max(element.memory / plan.capacity, 0.0 if plan.request.on_cpu else _LEAST)


def _slack(plan: Plan) -> float:
    """How much more than estimated every cohort may take, so that the fullest GPU of the plan still holds all.

    None on a CPU, where nobody is given a part of the memory beforehand.
    """
    if plan.request.on_cpu or not plan.capacity:
        return 1.0
    fullest = max((sum(_held(plan, e) for e in beside) for beside in _beside(plan)), default=1.0)
    return min(_SLACK, max(1 / fullest, 1.0))


def _beside(plan: Plan) -> Iterator[list[Scheduled]]:
    """What is at work together on a GPU, at the start of each cohort."""
    placed = [e for e in plan.elements if e.start is not None]
    for one in placed:
        yield [
            e for e in placed if e.gpu == one.gpu and (e.start or 0.0) <= (one.start or 0.0) < (e.end or 0.0)
        ]


def _holds(element: Scheduled, run: Run) -> bool:
    same = (element.arm, element.phase) == (run.arm, run.phase) and run.seed in element.seeds
    return same and (not element.rates or run.learning_rate in element.rates)
