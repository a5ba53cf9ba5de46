"""Makes a plan: cohorts from the study, hours and memory from estimates, an order and places from the packing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from jaxablate.analysis import sentences
from jaxablate.estimate.facts import Estimate
from jaxablate.runstore import now
from jaxablate.schedule.cohorts import Job
from jaxablate.schedule.plan import drop
from jaxablate.schedule.plan.estimates import Cohort, Problem
from jaxablate.schedule.plan.hours import Known
from jaxablate.schedule.plan.packing import Item, Placed, lower_bound, makespan, pack
from jaxablate.schedule.plan.plan import FORMAT, ArmPlan, Element, Plan, Request, SeedsNeeded
from jaxablate.schedule.plan.work import TO_BE_CHOSEN, Room, Work

Ask = Callable[[Iterable[Cohort]], Mapping[Cohort, Estimate | Problem]]


def make(
    work: Work,
    request: Request,
    ask: Ask,
    needed: Callable[[int, float | None], Sequence[SeedsNeeded]] = lambda seeds, hours: (),
) -> Plan:
    """The plan of what is left of a study.

    Args:
        work: what is left.
        request: what is asked; `request.seeds` are those to keep if the deadline allows.
        ask: for estimates of cohorts.
        needed: what each hypothesis needs, given the seeds that are kept and the GPU-hours of one more seed.
    """
    planner = _Planner(work, request, ask)
    seeds, dropped, short = request.seeds, (), ""
    planner.learn(seeds)
    by_pilot = max((need.seeds or 0 for need in needed(len(seeds), None)), default=0)
    if request.deadline is not None and planner.timed:
        fewest = min(max(drop.FEWEST, by_pilot), len(seeds))
        while (
            True
        ):  # to drop a seed makes smaller cohorts, of which the hours are not known before they are asked for
            kept = drop.keep(seeds, work.begun, fewest, request.deadline, planner.makespan)
            if kept == seeds:
                break
            seeds = kept
            planner.learn(seeds)
        dropped = tuple(seed for seed in request.seeds if seed not in seeds)
        place, most = (
            "process" if planner.on_cpu else "GPU",
            sum(len(job.runs) for job in planner.jobs(seeds)),
        )
        short = drop.shortfall(seeds, request.gpus, place, most, request.deadline, planner.makespan)
    jobs = planner.jobs(seeds)
    placed = planner.pack(jobs) if planner.timed else ()
    arms = tuple(planner.arm(arm, jobs) for arm in work.arms)
    confirm = [planner.known.hours(job) for job in jobs if job.phase == "confirm"]
    each = None if None in confirm or not seeds else sum(hours for hours in confirm if hours) / len(seeds)
    return Plan(
        format=FORMAT,
        study=work.manifest.study.name,
        made=now(),
        request=request,
        arms=arms,
        elements=planner.elements(jobs, placed),
        seeds=seeds,
        dropped=dropped,
        makespan=makespan(placed) if planner.timed else None,
        bound=lower_bound([p.item for p in placed], request.gpus, planner.capacity)
        if planner.timed
        else None,
        capacity=planner.capacity,
        short=short,
        hypotheses=tuple(needed(len(seeds), each)),
        notes=tuple(planner.notes(jobs)),
    )


@dataclass
class _Planner:
    """What is known while a plan is made."""

    work: Work
    request: Request
    ask: Ask
    estimates: dict[Cohort, Estimate] = field(default_factory=dict)
    rooms: dict[str, Room] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def known(self) -> Known:
        return Known(self.estimates)

    @property
    def on_cpu(self) -> bool:
        return self.request.target == "cpu"

    @property
    def capacity(self) -> int:
        """Bytes of one place; processes on a CPU share the host's memory alike."""
        whole = max((found.memory.capacity for found in self.estimates.values()), default=0)
        return whole // self.request.gpus if self.on_cpu else whole

    @property
    def timed(self) -> bool:
        """Whether the hours of all that can be planned are known, and there is something."""
        found = [e for cohort, e in self.estimates.items() if cohort.arm not in self.problems]
        return bool(found) and all(e.time is not None for e in found)

    # -------------------------------------------------------------------------------------- learning

    def learn(self, seeds: tuple[int, ...]) -> None:
        """Asks for estimates until every cohort fits, with fewer members or smaller micro-batches where it must.

        By the launcher's own rule after running out of memory: half the members down to one, then twice as many
        micro-batches.
        """
        while True:
            sizes: dict[tuple[str, str], int] = {}
            for job in self.jobs(seeds):
                sizes[job.arm, job.phase] = max(len(job.runs), sizes.get((job.arm, job.phase), 0))
            wanted = {Cohort(arm, members) for (arm, _), members in sizes.items() if arm not in self.problems}
            for cohort, found in self.ask(sorted(wanted - self.estimates.keys())).items():
                if isinstance(found, Problem):
                    self.problems[cohort.arm] = found.reason
                else:
                    self.estimates[cohort] = found
            before = dict(self.rooms)
            for cohort in sorted(wanted):
                if cohort.arm not in self.problems:
                    self._make_room(cohort)
            if self.rooms == before:
                return

    def _make_room(self, cohort: Cohort) -> None:
        """Gives a cohort that does not fit less to hold."""
        estimate, room = self.estimates[cohort], self.rooms.get(cohort.arm, Room())
        if estimate.memory.peak <= self.capacity:
            return
        if cohort.members > 1:
            self.rooms[cohort.arm] = dataclasses.replace(room, members=cohort.members // 2)
            return
        micro, fits, split = estimate.batch.micro, estimate.memory.largest_micro_batch or 0, 1
        while micro % split == 0 and micro // split > fits > 0:
            split *= 2
        if not fits or micro % split:
            peak, whole = (sentences.gigabytes(n) for n in (estimate.memory.peak, self.capacity))
            self.problems[cohort.arm] = f"does not fit: takes {peak} of {whole}"
        else:
            self.rooms[cohort.arm] = dataclasses.replace(room, split=split)

    # ------------------------------------------------------------------------------------ scheduling

    def jobs(self, seeds: tuple[int, ...], gpus: int | None = None) -> list[Job]:
        places = 1 if self.on_cpu else gpus or self.request.gpus
        return self.work.jobs(seeds, places, self.request.max_members, self.rooms)

    def makespan(self, seeds: tuple[int, ...], gpus: int | None = None) -> float:
        return makespan(self.pack(self.jobs(seeds, gpus), gpus))

    def pack(self, jobs: Sequence[Job], gpus: int | None = None) -> tuple[Placed, ...]:
        return pack([item for _, item in self._items(jobs)], gpus or self.request.gpus, self.capacity)

    def _items(self, jobs: Sequence[Job]) -> list[tuple[Job, Item]]:
        """The cohorts that can be planned, each after the tuning of its arm."""
        found: list[tuple[Job, Item]] = []
        numbers: dict[tuple[str, str], Iterable[int]] = {}
        for job in jobs:
            hours = self.known.hours(job)
            if job.arm in self.problems or hours is None:
                continue
            number = next(iter(numbers.setdefault((job.arm, job.phase), count(1))))
            tuning = [
                i.name for j, i in found if (j.arm, j.phase) == (job.arm, "tuning") and job.phase == "confirm"
            ]
            seeds = {run.seed for run in job.runs}
            item = Item(
                name=f"{job.arm}/{job.phase}/{number}",
                hours=hours,
                memory=min(self.known.memory(job), self.capacity),
                share=self.request.share,
                after=tuple(tuning),
                block=seeds.pop() if len(seeds) == 1 else None,
            )
            found.append((job, item))
        return found

    def elements(self, jobs: Sequence[Job], placed: Sequence[Placed]) -> tuple[Element, ...]:
        """The stages of the cohorts, in the order of their starts. A cohort goes through them in one process."""
        places = {p.item.name: p for p in placed}
        found: list[Element] = []
        for job, item in self._items(jobs):
            estimate, place = self.known.of(job), places[item.name]
            assert estimate is not None, "an item has hours"
            after, begins, done = item.after, place.start, 0
            for stage in estimate.stages:
                several = len(estimate.stages) > 1
                name = f"{item.name}/{stage.name}" if several else item.name
                done += stage.steps
                ends = place.start + item.hours * done / max(estimate.steps, 1) if several else place.end
                rates = sorted({run.learning_rate for run in job.runs} - {TO_BE_CHOSEN})
                found.append(
                    Element(
                        name=name,
                        arm=job.arm,
                        phase=job.phase,
                        stage=stage.name if several else "",
                        seeds=tuple(dict.fromkeys(run.seed for run in job.runs)),
                        rates=tuple(rates),
                        members=len(job.runs),
                        split=job.split,
                        memory=item.memory,
                        share=item.share,
                        after=tuple(after),
                        hours=ends - begins,
                        gpu=place.gpu,
                        start=begins,
                        end=ends,
                    )
                )
                after, begins = (name,), ends
        return tuple(sorted(found, key=lambda e: (e.start or 0.0, e.gpu or 0)))

    # --------------------------------------------------------------------------------------- in words

    def arm(self, arm: str, jobs: Sequence[Job]) -> ArmPlan:
        own = [job for job in jobs if job.arm == arm]
        runs, members = sum(len(job.runs) for job in own), max((len(job.runs) for job in own), default=0)
        plain = ArmPlan(arm, runs, len(own), members, problem=self.problems.get(arm, ""))
        largest = max(own, key=lambda job: (len(job.runs), job.phase == "confirm"), default=None)
        estimate = self.known.of(largest) if largest else None
        if estimate is None:
            return plain
        hours = [self.known.hours(job) for job in own]
        known = [h for h in hours if h is not None] if None not in hours and not plain.problem else None
        total = sum(known) if known is not None else None
        return dataclasses.replace(
            plain,
            parameters=estimate.parameters,
            trainable=estimate.trainable,
            flops_per_step=estimate.flops_per_step,
            steps=estimate.steps,
            examples=estimate.examples,
            tokens=estimate.tokens or None,
            memory=estimate.memory.peak,
            memory_source=estimate.memory.source,
            capacity=self.capacity,
            fits=estimate.memory.peak <= self.capacity,
            largest_micro_batch=estimate.memory.largest_micro_batch,
            hours=total,
            hours_source=estimate.time.source if estimate.time else "",
            longest=max(known, default=None) if known is not None else None,
            cost=total * self.request.rate if total is not None and self.request.rate is not None else None,
            choices=tuple(self._choices(estimate, own)),
        )

    def _choices(self, estimate: Estimate, jobs: Sequence[Job]) -> Iterable[str]:
        batch, split = estimate.batch, max(job.split for job in jobs)
        yield f"batch of {batch.effective}: {batch.why}"
        if split > 1:
            yield (
                f"micro-batches split by {split}: {batch.micro} examples do not fit, "
                f"{estimate.memory.largest_micro_batch} do"
            )
        members = max(len(job.runs) for job in jobs)
        room = self.rooms.get(jobs[0].arm, Room())
        cohorts = f"cohorts of {members}"
        if room.members:
            tried = max(c.members for c in self.estimates if c.arm == jobs[0].arm)
            peak = next(
                e.memory.peak for c, e in self.estimates.items() if (c.arm, c.members) == (jobs[0].arm, tried)
            )
            yield f"{cohorts}: {tried} members take {sentences.gigabytes(peak)} of {sentences.gigabytes(self.capacity)}"
        elif self.request.max_members and members == self.request.max_members:
            yield f"{cohorts}: as --max-members says"
        elif any(sum(o.phase == job.phase for o in jobs) > 1 for job in jobs):
            yield f"{cohorts}: so that each of {self.request.gpus} GPUs has one"
        else:
            yield f"{cohorts}: all runs of the arm in one program"

    def notes(self, jobs: Sequence[Job]) -> Iterable[str]:
        work, rule = self.work, self.work.manifest.study.learning_rate
        if work.ended:
            yield f"left out, since they have their outcome: {sentences.count(work.ended, 'run')}"
        if work.given_up:
            runs = sentences.count(work.given_up, "run")
            yield f"left out, since they failed or were cancelled: {runs}; `jaxablate retry` takes them in again"
        if not jobs:
            yield "nothing is left to train"
        if rule is not None and rule.extend and work.waiting:
            more = rule.extend * len(rule.tuning_seeds)
            yield f"a best rate at the edge of the grid adds up to {more} tuning runs to its arm, which are not counted"
        if left := sorted({e.memory.left_out for e in self.estimates.values() if e.memory.left_out}):
            yield f"memory leaves out {left[0]}"
        if self.problems:
            yield f"left out of the totals: {', '.join(sorted(self.problems))}"
        if self.timed and any(e.time and e.time.start_s is None for e in self.estimates.values()):
            yield "hours by a stated MFU are of the steps alone: start, compilation, evaluation and saving come on top"
        if jobs and self.estimates and not self.timed:
            yield (
                "hours are unknown: give --mfu=F, the share of the GPU's bfloat16 peak that the steps reach (a model "
                "that computes in float32 has none), or --probe without --target to time them here"
            )
