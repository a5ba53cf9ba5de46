"""Makes a plan: cohorts from the study, hours and memory from estimates, an order and places from the packing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from jaxablate.analysis import sentences
from jaxablate.estimate.facts import Estimate, StageFacts
from jaxablate.runstore import now
from jaxablate.schedule.cohorts import Job
from jaxablate.schedule.plan import drop
from jaxablate.schedule.plan.estimates import Cohort, Problem
from jaxablate.schedule.plan.hours import Known
from jaxablate.schedule.plan.packing import NEAR, Item, Placed, in_company, lower_bound, makespan, pack
from jaxablate.schedule.plan.plan import FORMAT, ArmPlan, Chain, Plan, Request, Scheduled, SeedsNeeded
from jaxablate.schedule.plan.work import TO_BE_CHOSEN, Fit, Remaining

Ask = Callable[[Iterable[Cohort]], Mapping[Cohort, Estimate | Problem]]


def make(
    work: Remaining,
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
        most = sum(len(job.runs) for job in planner.jobs(seeds))
        short = drop.shortfall(seeds, request.gpus, request.place, most, request.deadline, planner.makespan)
    jobs = planner.jobs(seeds)
    placed = planner.pack(jobs) if planner.timed else ()
    planner.shared = in_company(placed)
    arms = tuple(planner.arm(arm, jobs) for arm in work.arms)
    if any(need.more for need in needed(len(seeds), None)):
        planner.learn_price(seeds)
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
        chains=tuple(planner.chains(jobs)),
        hypotheses=tuple(needed(len(seeds), planner.price(seeds))),
        notes=tuple(planner.notes(jobs)),
    )


@dataclass
class _Planner:
    """What is known while a plan is made."""

    work: Remaining
    request: Request
    ask: Ask
    estimates: dict[Cohort, Estimate] = field(default_factory=dict)
    rooms: dict[str, Fit] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    prices: dict[Cohort, Estimate] = field(default_factory=dict)  # of arms of which nothing is left
    shared: frozenset[str] = frozenset()  # items that are not alone on their GPU

    @property
    def known(self) -> Known:
        return Known(self.estimates)

    @property
    def capacity(self) -> int:
        """Bytes of one place: of a GPU, or what a process on a CPU has of the host's."""
        return max((found.memory.capacity for found in self.estimates.values()), default=0)

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
                    if found.devices > 1:
                        self.problems[cohort.arm] = (
                            f"host.mesh lays a cohort over {found.devices} devices at once, and a plan gives it one: "
                            "set --config.host.mesh.data=1, and its other axes likewise, or submit the arm without "
                            "--gpus to a site with nodes of as many"
                        )
            before = dict(self.rooms)
            for cohort in sorted(wanted):
                if cohort.arm not in self.problems:
                    self._make_room(cohort)
            if self.rooms == before:
                return

    def _make_room(self, cohort: Cohort) -> None:
        """Gives a cohort that does not fit less to hold."""
        estimate, room = self.estimates[cohort], self.rooms.get(cohort.arm, Fit())
        if estimate.memory.peak <= self.capacity:
            return
        if cohort.members > 1:
            self.rooms[cohort.arm] = dataclasses.replace(room, members=cohort.members // 2)
            return
        micro, fits, split = estimate.batch.micro, estimate.memory.largest_micro_batch or 0, 1
        while micro % split == 0 and micro // split > fits > 0:
            split *= 2
        if split == 1 or micro % split:  # smaller micro-batches are no help, or there are none
            peak, whole = (sentences.gigabytes(n) for n in (estimate.memory.peak, self.capacity))
            crowd = self.request.gpus if self.request.on_cpu else 1
            advice = f", which is what each of {crowd} processes has; give --gpus=1" if crowd > 1 else ""
            self.problems[cohort.arm] = f"does not fit: takes {peak} of {whole}{advice}"
        else:
            self.rooms[cohort.arm] = dataclasses.replace(room, split=split)

    def learn_price(self, seeds: tuple[int, ...]) -> None:
        """Asks for an estimate of a cohort of each arm that has none, since all its runs have ended."""
        sizes: dict[str, int] = {}
        for job in self._whole(seeds):
            sizes[job.arm] = max(len(job.runs), sizes.get(job.arm, 0))
        had = {cohort.arm for cohort in self.estimates} | self.problems.keys()
        missing = [Cohort(arm, members) for arm, members in sizes.items() if arm not in had]
        known = list(self.estimates.values())
        # The first alone: where it has no hours, none has any, and the others need not be compiled.
        for some in (missing[:1], missing[1:]):
            if all(estimate.time is not None for estimate in known):
                found = {c: e for c, e in self.ask(some).items() if not isinstance(e, Problem)}
                self.prices |= found
                known += found.values()

    def price(self, seeds: tuple[int, ...]) -> float | None:
        """GPU-hours of one more seed over all arms, whatever of them has run: its part of whole cohorts."""
        known, whole = Known({**self.prices, **self.estimates}), self._whole(seeds)
        each = [self._gpu_hours(job, known, self.request.share if self.shared else 1.0) for job in whole]
        return sum(h for h in each if h is not None) / len(seeds) if each and None not in each else None

    def _whole(self, seeds: tuple[int, ...]) -> list[Job]:
        """The confirmatory cohorts of these seeds, as if nothing had run."""
        every = self.work.jobs(seeds, self._places(), self.request.max_members, self.rooms, "all")
        return [job for job in every if job.phase == "confirm"]

    # ------------------------------------------------------------------------------------ scheduling

    def _places(self, gpus: int | None = None) -> int:
        return 1 if self.request.on_cpu else gpus or self.request.gpus

    def jobs(self, seeds: tuple[int, ...], gpus: int | None = None) -> list[Job]:
        return self.work.jobs(seeds, self._places(gpus), self.request.max_members, self.rooms)

    def makespan(self, seeds: tuple[int, ...], gpus: int | None = None) -> float:
        return makespan(self.pack(self.jobs(seeds, gpus), gpus))

    def pack(self, jobs: Sequence[Job], gpus: int | None = None) -> tuple[Placed, ...]:
        """Whole cohorts; or with their stages apart, each where it ends earlier, if that is clearly the better one."""
        gpus = gpus or self.request.gpus
        whole = pack([item for _, item in self._items(jobs)], gpus, self.capacity)
        pieces = [piece for job, item in self._items(jobs) for piece in self._pieces(job, item)]
        if len(pieces) == len(whole):
            return whole
        apart = pack(pieces, gpus, self.capacity)
        return apart if makespan(apart) < makespan(whole) * (1 - NEAR) else whole

    def _pieces(self, job: Job, item: Item) -> list[Item]:
        """The stages of a cohort, each as if a process of its own started, compiled all and trained it.

        What follows a cohort follows its last stage, which has the cohort's name.
        """
        estimate = self.known.of(job)
        assert estimate is not None and estimate.time is not None, "an item has hours"
        stages = [stage for stage in estimate.stages if stage.steps]
        once = min(((estimate.time.start_s or 0.0) + (estimate.time.compile_s or 0.0)) / 3600, item.hours)
        found: list[Item] = []
        for stage in stages:
            name = item.name if stage is stages[-1] else _piece(item, stage)
            hours = once + (item.hours - once) * stage.steps / estimate.steps
            after = (found[-1].name,) if found else item.after
            found.append(dataclasses.replace(item, name=name, hours=hours, after=after))
        return found or [item]

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
            memory = self.known.memory(job)
            item = Item(
                name=f"{job.arm}/{job.phase}/{number}",
                hours=hours,
                # Split, it takes less than was estimated, and how much less was searched for: it fits.
                memory=min(memory, self.capacity) if job.split > 1 else memory,
                share=self.request.share,
                after=tuple(tuning),
            )
            found.append((job, item))
        return found

    @staticmethod
    def _gpu_hours(job: Job, known: Known, share: float) -> float | None:
        hours = known.hours(job)
        return None if hours is None else hours * known.gpus(job) * share

    def elements(self, jobs: Sequence[Job], placed: Sequence[Placed]) -> tuple[Scheduled, ...]:
        """The stages of the cohorts, in the order of their starts. One process goes through those that are one
        after another on a GPU."""
        places = {p.item.name: p for p in placed}
        found: list[Scheduled] = []
        for job, item in self._items(jobs):
            estimate = self.known.of(job)
            assert estimate is not None, "an item has hours"
            several, after = len(estimate.stages) > 1, item.after
            rates = sorted({run.learning_rate for run in job.runs} - {TO_BE_CHOSEN})
            for stage, gpu, start, end in self._spans(item, estimate, places):
                name = _piece(item, stage) if several else item.name
                found.append(
                    Scheduled(
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
                        hours=end - start,
                        gpu=gpu,
                        start=start,
                        end=end,
                        steps=stage.steps,
                    )
                )
                after = (name,)
        return tuple(sorted(found, key=lambda e: (e.start or 0.0, e.gpu or 0)))

    @staticmethod
    def _spans(
        item: Item, estimate: Estimate, places: Mapping[str, Placed]
    ) -> Iterator[tuple[StageFacts, int, float, float]]:
        """(stage, GPU, start, end) of a cohort that is placed, whole or in pieces."""
        stages, last = estimate.stages, places[item.name]
        apart = {s.name: p for s in stages if (p := places.get(_piece(item, s)))}
        if apart:
            for stage in (stage for stage in stages if stage.steps):
                piece = apart.get(stage.name, last)
                yield stage, piece.gpu, piece.start, piece.end
            return
        start, done = last.start, 0
        for stage in stages:
            done += stage.steps
            end = last.end if stage is stages[-1] else last.start + item.hours * done / max(estimate.steps, 1)
            yield stage, last.gpu, start, end
            start = end

    def chains(self, jobs: Sequence[Job]) -> Iterator[Chain]:
        """What the chains that the study declares would take, each on a GPU of its own; nothing if that is unknown."""
        for arms in self.work.manifest.study.chains:
            own = [(job, item) for job, item in self._items(jobs) if job.arm in arms]
            steps = [e.steps for job, _ in own if (e := self.known.of(job))]
            if {job.arm for job, _ in own} == set(arms):
                yield Chain(arms, sum(item.hours for _, item in own), sum(steps))

    # --------------------------------------------------------------------------------------- in words

    def _share(self, job: Job, items: Mapping[Job, Item]) -> float:
        """Of its GPU, as far as others have the rest."""
        return items[job].share if job in items and self._in_company(items[job]) else 1.0

    def _in_company(self, item: Item) -> bool:
        """Whether it, or a piece of it, is not alone on its GPU."""
        return any(name == item.name or name.startswith(f"{item.name}/") for name in self.shared)

    def arm(self, arm: str, jobs: Sequence[Job]) -> ArmPlan:
        items = dict(self._items(jobs))
        own = [job for job in jobs if job.arm == arm]
        runs, members = sum(len(job.runs) for job in own), max((len(job.runs) for job in own), default=0)
        plain = ArmPlan(arm, runs, len(own), members, problem=self.problems.get(arm, ""))
        largest = max(own, key=lambda job: (len(job.runs), job.phase == "confirm"), default=None)
        estimate = self.known.of(largest) if largest else None
        if estimate is None:
            return plain
        hours = [self.known.hours(job) for job in own]
        gpu_hours = [self._gpu_hours(job, self.known, self._share(job, items)) for job in own]
        # What takes several GPUs has no place in the schedule, but its price.
        told = None not in hours and (not plain.problem or estimate.devices > 1)
        known = [h for h in hours if h is not None] if told else None
        total = sum(h for h in gpu_hours if h is not None) if told else None
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
        room = self.rooms.get(jobs[0].arm, Fit())
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
        several = {c.arm for c, e in self.estimates.items() if e.devices > 1 and e.time is not None}
        if unknown := sorted(self.problems.keys() - several):
            yield f"left out of the totals: {', '.join(unknown)}"
        if priced := sorted(self.problems.keys() & several):
            yield f"in the totals, but not in the schedule: {', '.join(priced)}"
        if self.timed and any(e.time and e.time.start_s is None for e in self.estimates.values()):
            yield "hours by a stated MFU are of the steps alone: start, compilation, evaluation and saving come on top"
        if jobs and self.estimates and not self.timed:
            yield (
                "hours are unknown: give --mfu=F, the share of the GPU's bfloat16 peak that the steps reach (a model "
                "that computes in float32 has none), or --probe without --target to time them here"
            )


def _piece(item: Item, stage: StageFacts) -> str:
    """The name of one of several stages of a cohort."""
    return f"{item.name}/{stage.name}"
