"""What of a study is left to submit, and in which elements: neither what is done, nor what is queued or trained."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxablate import runstore
from jaxablate.config import import_task
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.runstore import OUTCOMES
from jaxablate.schedule.cohorts import Job
from jaxablate.schedule.launcher import without_rate
from jaxablate.schedule.marks import make_pending
from jaxablate.schedule.plan import follow
from jaxablate.schedule.plan.plan import Plan
from jaxablate.schedule.retries import PENDING
from jaxablate.schedule.slurm import cluster, elements, queue
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm.cluster import Room
from jaxablate.schedule.slurm.elements import Work
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import Element
from jaxablate.schedule.survey import Only, Selection, Survey, taken_by
from jaxablate.study import Phase

Mode = Literal["submit", "prepare", "dry run"]


@dataclass(frozen=True)
class Options:
    """What of a study to submit, and in which pieces."""

    group: str = ""
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    only: Only = "all"
    max_members: int = 0  # of a cohort; 0: all runs of an arm and phase that one element trains
    stages: Literal["whole", "chained"] = "whole"  # chained: an element for each stage of a run
    on_finish: tuple[str, ...] = ()
    plan: Plan | None = None  # to follow: its seeds, its order, the members that fit

    def __post_init__(self) -> None:
        if self.max_members < 0:
            raise UserError(f"--max-members={self.max_members}: must be 0 or more")


def room(site: Site, mode: Mode, notes: list[str]) -> Room:
    """What SLURM takes; a dry run and `prepare` also work where it does not say."""
    try:
        return cluster.room(site)
    except UserError as error:
        if mode == "submit":
            raise
        notes.append(f"{error}; arrays of up to {Room.array} elements, SLURM's default, are assumed")
        return Room(limit=site.max_submit or None)


def chains(resolved: Any, options: Options) -> dict[str, Sequence[str]]:
    """arm -> its stages as elements; the last one is trained to its end, whatever its name."""
    if options.stages == "whole":
        return {}
    names = {
        arm: [stage.name for stage in import_task(run.task)(run, "cpu").stages()]
        for arm, run in resolved.items()
    }
    return {arm: (*own[:-1], "") for arm, own in names.items()}


def work(manifest: Manifest, selection: Selection, options: Options, notes: list[str], mode: Mode) -> Work:
    """The runs that are neither done nor failed for good nor anybody's, and the confirmations to come."""
    survey = Survey(runstore.now(), 0)  # a new launch: what interrupted earlier ones does not count
    selection = dataclasses.replace(selection, before=survey.failed(manifest))
    own = selection.runs(manifest)
    if options.only == "failed" and mode != "dry run":
        make_pending(manifest, own)
    looks = {run: survey.look(manifest, run) for run in manifest.runs}
    if options.only == "failed" and mode == "dry run":
        looks |= dict.fromkeys(own, PENDING)
    queued = Queued(manifest.path, mode, notes)
    counts: Counter[str] = Counter()
    runs = []
    for run in own:
        if looks[run].state in OUTCOMES:
            counts["done"] += 1
        elif looks[run].next == "nothing":
            counts["failed for good: see `jaxablate status`, and `retry`"] += 1
        elif taken_by(manifest, run):
            counts["being trained now"] += 1
        elif queued.holds(run.arm, run.phase, run.id, run.seed):
            counts["queued already"] += 1
        else:
            runs.append(run)
    notes += [f"{count} run{'s' * (count > 1)} left out: {why}" for why, count in counts.items()]
    if options.plan is not None and options.plan.dropped:
        notes.append(
            f"seeds left out of every arm for the deadline: {', '.join(map(str, options.plan.dropped))}"
        )
    later: dict[str, tuple[int, ...]] = {}
    if options.only != "failed":
        for arm in sorted(without_rate(manifest, selection)):
            tuned = [run for run in manifest.runs if (run.arm, run.phase) == (arm, "tuning")]
            seeds = tuple(s for s in sorted(selection.seeds) if not queued.holds(arm, "confirm", "", s))
            waiting = [run for run in tuned if looks[run].state not in OUTCOMES and run not in runs]
            if not seeds:
                notes.append(f"the confirmations of {arm} are queued already")
            elif waiting:
                notes.append(
                    f"{arm} has no confirmations yet: {len(waiting)} tuning runs were left out; submit again"
                )
            else:
                later[arm] = seeds
    return Work(tuple(runs), looks, later)


class Queued:
    """The elements of earlier submissions that SLURM has in its queue."""

    def __init__(self, study: Path, mode: Mode, notes: list[str]):
        earlier = [one for one in records.submissions(study) if one.state == "submitted"]
        self.elements: list[Element] = []
        seen, silent = queue.look([job for one in earlier for job in one.jobs()])
        if silent and mode == "submit":
            raise UserError(f"what is queued of {study} cannot be told: {silent}; try again")
        if silent:
            notes.append(f"what is queued of it cannot be told: {silent}")
        live = {task for task, job in seen.items() if job.queued}
        for one in earlier:
            self.elements += [one.elements[i] for i, task in one.tasks().items() if task in live]

    def holds(self, arm: str, phase: Phase, id: str, seed: int) -> bool:
        """Whether one of them works on the run, by its id, or by its seed where the rate was to be chosen."""
        return any(
            (one.arm, one.phase) == (arm, phase) and (id in one.runs if one.runs else seed in one.seeds)
            for one in self.elements
        )


def levels(
    todo: Work, site: Site, options: Options, chained: Mapping[str, Sequence[str]], room: Room
) -> list[elements.Level]:
    """The elements: one for each cohort that a GPU trains, or fewer if the queue does not take as many."""

    def stages(arm: str, phase: Phase) -> Sequence[str]:
        return chained.get(arm, ("",)) if phase == "confirm" else ("",)

    ordered: Callable[[list[Job]], list[Job]] = list
    if (planned := options.plan) is not None:
        outlooks = follow.company(planned, todo.outlooks)
        later = {arm: todo.later[arm] for arm in follow.arms_in_order(planned, todo.later)}
        todo, ordered = Work(todo.runs, outlooks, later), lambda jobs: follow.ordered(planned, jobs)
    left = None if room.left is None else room.left - bool(options.on_finish)
    found: list[elements.Level] = []
    for most in (options.max_members * elements.places(site), 0):  # 0: an arm's cohorts one after another
        found = elements.form(todo, most, stages, ordered)
        if left is None or sum(map(len, found)) <= left:
            return found
    raise UserError(
        f"{sum(map(len, found))} elements, and SLURM takes {room.left} more of this user's jobs (limit "
        f"{room.limit}, queued {room.queued}); submit fewer arms with --group or --arm, the others later"
    )
