"""A launcher's side of a plan: which job next, where, and in what company. A plan orders work, it makes none.

Jobs are formed from the run directories as ever. What a plan does not know, such as a retry with fewer members or
a tuning run beyond the grid, goes last.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from jaxablate.errors import UserError
from jaxablate.schedule.cohorts import Job
from jaxablate.schedule.plan.plan import Element, Plan
from jaxablate.schedule.retries import Outlook
from jaxablate.study import Run

_ROUNDING = 1e-9  # of shares that add up to a whole GPU
_WHOLE = 0.75  # of a GPU's memory, that jax takes by itself
_SLACK = 1.1  # by which an estimate of memory may be too small


def ordered(plan: Plan, jobs: Iterable[Job]) -> list[Job]:
    """The jobs in the order in which the plan starts them, those it does not know last."""

    def rank(job: Job) -> tuple[float, int]:
        element = element_of(plan, job)
        if element is None or element.start is None or element.gpu is None:
            return math.inf, 0
        return element.start, element.gpu

    return sorted(jobs, key=rank)


def arms_in_order(plan: Plan, arms: Iterable[str]) -> list[str]:
    """The arms in the order in which the plan starts their confirmatory cohorts, those it does not know last."""
    known = list(dict.fromkeys(element.arm for element in plan.elements if element.phase == "confirm"))
    return sorted(arms, key=lambda arm: known.index(arm) if arm in known else len(known))


def element_of(plan: Plan, job: Job) -> Element | None:
    """The first element of the cohort that a job trains; None if the plan has no such cohort."""
    own = (e for e in plan.elements if (e.members, e.split) == (len(job.runs), job.split))
    return next((element for element in own if all(_holds(element, run) for run in job.runs)), None)


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
    gpus = list(dict.fromkeys(devices))
    free = Counter(devices)
    free.subtract(device for device, _ in at_work)
    loads: dict[str, list[tuple[float, int]]] = {gpu: [] for gpu in gpus}
    for device, job in at_work:
        loads[device].append(_load(plan, job))
    found = []
    for job in ordered(plan, jobs):
        own, element = _load(plan, job), element_of(plan, job)
        room = [gpu for gpu in gpus if free[gpu] > 0 and (not gpu or _fit([*loads[gpu], own], plan.capacity))]
        if not room:
            break
        planned = gpus[element.gpu % len(gpus)] if element and element.gpu is not None else ""
        gpu = planned if planned in room else room[0]
        free[gpu] -= 1
        loads[gpu].append(own)
        found.append((gpu, job))
    return found


def workers_per_gpu(plan: Plan) -> int:
    """How many cohorts the plan has on one GPU at most."""
    starts = [(e.gpu, e.start) for e in plan.elements if e.start is not None]
    beside = [
        sum(e.gpu == gpu and (e.start or 0.0) <= start < (e.end or 0.0) for e in plan.elements)
        for gpu, start in starts
    ]
    return max(beside, default=1)


def memory_fraction(plan: Plan, job: Job) -> float | None:
    """What of a GPU's memory a worker may take, so that others fit beside it; None where it is alone."""
    if plan.request.target == "cpu" or workers_per_gpu(plan) < 2 or not plan.capacity:
        return None
    # What all of them may take, which the plan's capacity stands for: jax's own share, unless the user says otherwise.
    whole = float(os.environ.get("XLA_CLIENT_MEM_FRACTION") or _WHOLE)
    return min(whole, whole * _SLACK * _load(plan, job)[1] / plan.capacity)


def devices(plan: Plan, gpus: Sequence[str]) -> list[str]:
    """A device for each worker that the plan has at a time; "" for those on a CPU.

    Raises:
        UserError: the plan is for more GPUs than there are.
    """
    if not gpus:
        return [""] * plan.request.gpus
    if plan.request.gpus > len(gpus):
        raise UserError(f"--gpus={plan.request.gpus}: this machine has {len(gpus)}")
    return [*gpus[: plan.request.gpus]] * workers_per_gpu(plan)


def _load(plan: Plan, job: Job) -> tuple[float, int]:
    """(share, bytes) of a GPU; all of it for what the plan does not know."""
    element = element_of(plan, job)
    return (element.share, element.memory) if element else (1.0, plan.capacity)


def _fit(loads: Sequence[tuple[float, int]], capacity: int) -> bool:
    shares, memory = sum(share for share, _ in loads), sum(held for _, held in loads)
    return len(loads) == 1 or (shares <= 1 + _ROUNDING and memory <= capacity)


def _holds(element: Element, run: Run) -> bool:
    same = (element.arm, element.phase) == (run.arm, run.phase) and run.seed in element.seeds
    return same and (not element.rates or run.learning_rate in element.rates)
