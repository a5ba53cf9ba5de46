"""What of a study is left to submit, and in which elements: neither what is done, nor what is queued or trained."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxablate import runstore
from jaxablate.config import import_task
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.runstore import OUTCOMES
from jaxablate.schedule import workers
from jaxablate.schedule.asked import Launch
from jaxablate.schedule.cohorts import Job
from jaxablate.schedule.marks import make_pending
from jaxablate.schedule.plan import follow
from jaxablate.schedule.retries import PENDING
from jaxablate.schedule.slurm import chain, cluster, elements, queue
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm.cluster import Room
from jaxablate.schedule.slurm.elements import Work
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import Element, Submission
from jaxablate.schedule.survey import Selection, Survey, taken_by, without_rate
from jaxablate.study import Phase, Run

Mode = Literal["submit", "prepare", "dry run"]


@dataclass(frozen=True)
class SubmitOptions(Launch):
    """What of a study to submit, and in which pieces.

    Without `max_members` a cohort is all runs of an arm and phase that one element trains.
    """

    stages: Literal["whole", "chained"] = "whole"  # chained: an element for each stage of a run
    on_finish: tuple[str, ...] = ()


def room(site: Site, mode: Mode, notes: list[str]) -> Room:
    """What SLURM takes; a dry run and `prepare` also work where it does not say."""
    try:
        return cluster.room(site)
    except UserError as error:
        if mode == "submit":
            raise
        notes.append(f"{error}; arrays of up to {Room.array} elements, SLURM's default, are assumed")
        return Room(limit=site.max_submit or None)


def chains(resolved: Any, options: SubmitOptions) -> dict[str, Sequence[str]]:
    """arm -> its stages as elements; the last one is trained to its end, whatever its name."""
    if options.stages == "whole":
        return {}
    names = {
        arm: [stage.name for stage in import_task(run.task)(run, "cpu").stages()]
        for arm, run in resolved.items()
    }
    return {arm: (*own[:-1], "") for arm, own in names.items()}


def work(
    manifest: Manifest, selection: Selection, options: SubmitOptions, notes: list[str], mode: Mode
) -> Work:
    """The runs that are neither done nor failed for good nor anybody's, and the confirmations to come."""
    survey = Survey(runstore.now(), 0)  # a new launch: what interrupted earlier ones does not count
    selection = dataclasses.replace(selection, before=survey.failed(manifest))
    own = selection.runs(manifest)
    if options.only == "failed" and mode != "dry run":
        make_pending(manifest, own)
    looks = {run: survey.look(manifest, run) for run in manifest.runs}
    if options.only == "failed" and mode == "dry run":
        looks |= dict.fromkeys(own, PENDING)
    queued = Queued(manifest, mode, notes)
    queued.release(mode, notes)
    counts: Counter[str] = Counter()
    runs = []
    for run in own:
        if looks[run].state in OUTCOMES:
            counts["done"] += 1
        elif looks[run].next == "nothing":
            counts["failed for good: see `jaxablate status`, and `retry`"] += 1
        elif taken_by(manifest, run):
            counts["being trained now"] += 1
        elif queued.holder(run):
            counts["queued already"] += 1
        else:
            runs.append(run)
    notes += [f"{count} run{'s' * (count > 1)} left out: {why}" for why, count in counts.items()]
    if options.plan is not None and options.plan.dropped:
        notes.append(
            f"seeds left out of every arm for the deadline: {', '.join(map(str, options.plan.dropped))}"
        )
    if options.plan is not None:
        notes += options.plan.warnings
    later: list[Run] = []
    numbers = itertools.count(len(manifest.runs))
    if options.only != "failed":
        unrated = without_rate(manifest, selection)
        for arm in (arm.name for arm in manifest.study.arms if arm.name in unrated):
            tuned = [run for run in manifest.runs if (run.arm, run.phase) == (arm, "tuning")]
            seeds = [seed for seed in manifest.study.seeds if seed in selection.seeds]
            coming = [elements.confirmation(next(numbers), arm, seed) for seed in seeds]
            coming = [run for run in coming if not queued.holder(run)]
            waiting = [run for run in tuned if looks[run].state not in OUTCOMES and run not in runs]
            if not coming:
                notes.append(f"the confirmations of {arm} are queued already")
            elif waiting:
                notes.append(
                    f"{arm} has no confirmations yet: {len(waiting)} tuning runs were left out; submit again"
                )
            else:
                later += coming
    return Work(tuple(runs), looks, frozenset(later))


class Queued:
    """The elements of earlier submissions that SLURM has in its queue."""

    def __init__(self, manifest: Manifest, mode: Mode, notes: list[str]):
        self.manifest = manifest
        self.elements: dict[str, tuple[Submission, Element]] = {}  # by job, such as 123_4
        self._lost: dict[str, list[Run]] = {}  # of each of these, what comes before it does not bring about
        earlier = [one for one in records.submissions(manifest.path) if one.state == "submitted"]
        self.seen, silent = queue.queued(job for one in earlier for job in one.jobs())
        if silent and mode == "submit":
            raise UserError(f"what is queued of {manifest.path} cannot be told: {silent}; try again")
        if silent:
            notes.append(f"what is queued of it cannot be told: {silent}")
        for one in earlier:
            tasks = one.tasks().items()
            self.elements |= {task: (one, one.elements[i]) for i, task in tasks if task in self.seen}

    def holder(self, run: Run) -> str:
        """The job that trains a run or will, by its id, or by its seed where the rate is to be chosen; else empty."""
        return next((task for task in self.elements if self._brings(task, run)), "")

    def _takes_up(self, task: str, run: Run) -> bool:
        """Whether an element that has a run will find it ready: what comes before may have lost it for good."""
        submission, element = self.elements[task]
        if not element.after:
            return True
        tasks = submission.tasks()
        before = [queued for i in element.after if (queued := tasks.get(i, "")) in self.elements]
        if task not in self._lost:
            lost = chain.lost(self.manifest, submission, element)
            self._lost[task] = [
                one for one in lost if not any(self._brings(queued, one) for queued in before)
            ]
        if not any(one == run or one.phase != run.phase for one in self._lost[task]):
            return all(self._takes_up(queued, run) for queued in before if self.elements[queued][1].has(run))
        return self.seen[task].state != "PENDING" and self._began(task, run)

    def _brings(self, task: str, run: Run) -> bool:
        return self.elements[task][1].has(run) and self._takes_up(task, run)

    def _began(self, task: str, run: Run) -> bool:
        """Whether the last attempt at a run was this job's, which then has it among its own."""
        began = [row for row in workers.readable(self.manifest.run_dir(run)) if row["state"] == "running"]
        return bool(began) and began[-1].get("slurm", {}).get("job") == task

    def release(self, mode: Mode, notes: list[str]) -> None:
        """Lets those start that SLURM has put aside, for which else all behind them wait; a person's hold stays."""
        of_ours = {task: seen for task, seen in self.seen.items() if seen.held}
        by_slurm = [task for task, seen in of_ours.items() if seen.held == "by slurm"]
        by_hand = [task for task, seen in of_ours.items() if seen.held == "by hand"]
        if by_hand:
            notes.append(f"held by hand, and left so: `scontrol release {','.join(by_hand)}` lets them start")
        if by_slurm and mode == "submit":
            queue.release(by_slurm)
            notes.append(f"released, since SLURM held them: {', '.join(by_slurm)}")
        elif by_slurm:
            notes.append(f"held by SLURM: {', '.join(by_slurm)}; `jaxablate submit` releases them")


def levels(
    todo: Work, site: Site, options: SubmitOptions, chained: Mapping[str, Sequence[str]], room: Room
) -> list[elements.Level]:
    """The elements: one for each cohort that a GPU trains, or fewer if the queue does not take as many."""

    def stages(arm: str, phase: Phase) -> Sequence[str]:
        return chained.get(arm, ("",)) if phase == "confirm" else ("",)

    ordered: Callable[[list[Job]], list[Job]] = list
    if (planned := options.plan) is not None:
        looks = follow.company(planned, {**dict.fromkeys(todo.later, PENDING), **todo.outlooks})
        todo, ordered = dataclasses.replace(todo, outlooks=looks), lambda jobs: follow.ordered(planned, jobs)
    left = None if room.left is None else room.left - bool(options.on_finish)
    found: list[elements.Level] = []
    for together in (elements.places(site), 0):  # 0: an arm's cohorts one after another
        found = elements.form(todo, options.max_members, together, stages, ordered)
        if left is None or sum(map(len, found)) <= left:
            return found
    raise UserError(
        f"{sum(map(len, found))} elements, and SLURM takes {room.left} more of this user's jobs (limit "
        f"{room.limit}, queued {room.queued}); submit fewer arms with --group or --arm, the others later"
    )
