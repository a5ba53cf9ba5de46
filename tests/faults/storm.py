"""Rows 2 and 4: a study on a real SLURM under a storm of faults. Every arm ends as if undisturbed."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jaxablate.analysis.goodput import goodput
from jaxablate.manifest import Manifest
from jaxablate.runstore import OUTCOMES, moment
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm.submission import Element, Submission
from jaxablate.study import Run
from tests.faults.harness import REPO, Counts, Nursery, begun, committed, differences
from tests.slurm_lab import Lab

STUDY = "tests/faults/storm_study.py"
SITE = "tests/faults/storm.toml"
PAUSE_S = (0.5, 4.0)  # between two faults
PATIENCE_S = 900.0  # for all to end once the storm is over
HIT_S = 30.0  # in which a fault shows, or it has hit nothing: a preempted job has ten to end
TIMED = "slow"  # this arm alone meets its time limit
STAGED = "staged"  # this one is an element for each of its two stages, the second after the first


@dataclass(frozen=True)
class Target:
    """An element that runs."""

    submission: Submission
    element: Element
    job: str  # as SLURM writes it, such as 12_3


@dataclass
class Struck:
    """What a fault must not undo: the step that each member had committed, and how often it had begun."""

    element: str
    steps: dict[Run, int]  # the same one, from which they go on
    begins: dict[Run, int]


@dataclass
class Storm:
    """A study on a lab, and what befalls it."""

    lab: Lab
    nursery: Nursery
    workdir: Path
    rng: random.Random
    counts: Counts
    control: Counts
    struck: list[Struck] = field(default_factory=list)

    @property
    def study(self) -> Path:
        """Its directory."""
        return self.workdir / "storm"

    def submit(self, *options: str) -> None:
        """Hands what is left of the study to SLURM, as a user does."""
        argv = ["submit", STUDY, f"--site={SITE}", f"--workdir={self.workdir}", *options]
        env = {"SLURM_CONF": str(self.lab.conf)}
        child = self.nursery.start("jaxablate.cli", argv, self.workdir / "submit.txt", env=env)
        assert child.wait() == 0, child.words()[-3000:]

    def submit_all(self) -> None:
        """The arm that is to meet its time limit, the one in stages, and the others."""
        self.submit(f"--arm={TIMED}", "--time=00:01:00", "--signal=USR2@30")
        self.submit(f"--arm={STAGED}", "--stages=chained")
        arms = [arm.name for arm in Manifest.load(self.study).study.arms]
        self.submit(*(f"--arm={arm}" for arm in arms if arm not in (TIMED, STAGED)))

    def targets(self) -> list[Target]:
        """The elements whose jobs run now, by the queue."""
        running = {job for job, state in self.lab.squeue().items() if state == "RUNNING"}
        return [
            Target(one, one.elements[index], job)
            for one in records.submissions(self.study)
            for index, job in one.tasks().items()
            if job in running
        ]

    def left(self) -> list[Run]:
        """The runs without an outcome."""
        manifest = Manifest.load(self.study)
        return [run for run in manifest.runs if manifest.run_dir(run).state() not in OUTCOMES]

    # -------------------------------------------------------------------------------------- faults

    def rage(self, faults: int) -> None:
        """Strikes until so many faults have hit something, or nothing is left to do."""
        deadline = time.monotonic() + PATIENCE_S
        while self.counts.faults < faults and self.left():
            self._recover()
            assert time.monotonic() < deadline, (
                f"{self.counts}, and no more in all that time{self.lab.logs()}"
            )
            if targets := self.targets():
                self._strike(self.rng.choice(targets))
                deadline = time.monotonic() + PATIENCE_S
            elif not self.lab.squeue():
                self._submit_again()  # a job whose step was killed has ended, and nobody else puts it back
            time.sleep(self.rng.uniform(*PAUSE_S))

    def _strike(self, target: Target) -> None:
        """By the first fault that hits, of all kinds in turn: those that hit least often come first.

        Of these in this order: a preemption spares the arm that meets its time limit, which is the last to end.
        """
        kinds = (self.preempt, self.kill_step, self.lose_node, self.kill_slurmd, self.kill_worker,
                 self.requeue, self.kill_slurmctld)  # fmt: skip
        for strike in sorted(kinds, key=lambda strike: self.counts.kinds[name_of(strike)]):
            before = self._remember(target)
            if strike(target):
                self.counts.faults += 1
                self.counts.kinds[name_of(strike)] += 1
                self.struck.append(before)
                return
            if target.job not in {one.job for one in self.targets()}:
                return

    def _remember(self, target: Target) -> Struck:
        manifest = Manifest.load(self.study)
        own = target.element.runs_of(manifest)
        common = min((max(committed(manifest.run_dir(run)), default=0) for run in own), default=0)
        begins = {run: len(begun(manifest.run_dir(run))) for run in own}
        return Struck(target.job, dict.fromkeys(own, common), begins)

    def _seen(self, hit: Callable[[], bool]) -> bool:
        """Whether a fault shows in time; one that hit nothing, since its target had just ended, never does."""
        patience = time.monotonic() + HIT_S
        while not hit():
            if time.monotonic() > patience:
                return False
            time.sleep(0.1)
        return True

    def _restarts(self, target: Target) -> int:
        return int(self.lab.show(target.job).get("Restarts", 0))

    def _requeued(self, target: Target, before: int) -> bool:
        return self._seen(lambda: self._restarts(target) > before)

    def requeue(self, target: Target) -> bool:
        """By hand, or by the site."""
        before = self._restarts(target)
        self.lab.run("scontrol", "requeue", target.job, check=False)
        return self._requeued(target, before)

    def preempt(self, target: Target) -> bool:
        """A job of the better partition takes the node."""
        node = self.lab.node(target.job)
        if not node:
            return False
        others = (t for t in self.targets() if t.element.arm == TIMED)
        if any(self.lab.node(t.job) == node for t in others):
            return False  # whose signals are counted as time limits
        before = self._restarts(target)
        self.lab.sbatch("#!/bin/sh\nsleep 0.2\n", "--partition=high", f"--nodelist={node}",
                        f"--ntasks={self.lab.site.cpus}")  # fmt: skip
        return self._requeued(target, before)

    def lose_node(self, target: Target) -> bool:
        """A node is down, and comes back a little later."""
        node = self.lab.node(target.job)
        if not node:
            return False
        before = self._restarts(target)
        self.lab.down(node)
        return self._requeued(target, before)

    def kill_worker(self, target: Target) -> bool:
        """kill -9 of the process that trains: another one begins."""
        before = self._remember(target).begins
        killed = self._kill(target, b"jaxablate.worker")
        manifest = Manifest.load(self.study)

        def goes_on() -> bool:
            rows = (row for run, had in before.items() for row in begun(manifest.run_dir(run))[had:])
            return any(row["pid"] != killed for row in rows)

        return killed != 0 and self._seen(goes_on)

    def kill_step(self, target: Target) -> bool:
        """kill -9 of the batch step, which is the element's launcher: SLURM takes the job for failed."""
        killed = self._kill(target, b"jaxablate.schedule.slurm.element")
        return killed != 0 and self._seen(lambda: self.lab.show(target.job).get("JobState") == "FAILED")

    def kill_slurmd(self, target: Target) -> bool:
        """kill -9 of a node's daemon; what runs there does not notice."""
        node = self.lab.node(target.job)
        if not node or not self.lab.kill(f"slurmd-{node}"):
            return False
        time.sleep(self.rng.uniform(0, 1))
        self.lab.start_node(node)
        return True

    def kill_slurmctld(self, target: Target) -> bool:
        """kill -9 of the controller, at once or a while after it has written its state."""
        if not self.lab.kill("slurmctld"):
            return False
        asked = self.nursery.start(
            "jaxablate.cli", ["status", str(self.study), "--json"], self.workdir / f"status{self.counts.faults}.txt",
            env={"SLURM_CONF": str(self.lab.conf)},
        )  # fmt: skip
        code, runs = asked.wait(), len(Manifest.load(self.study).runs)
        counted = re.search(r'"total": \{[^}]*\}', asked.words())
        told = sum(map(int, re.findall(r": (\d+)", counted[0]))) if counted else 0
        self.control.faults += 1
        self.control.expect("status answered without it", code == 0 and told == runs, asked.words()[-1500:])
        self.lab.start_controller()
        return True

    def _kill(self, target: Target, module: bytes) -> int:
        """SIGKILL for the process of the target that runs `module`; its id, or 0 if there is none."""
        array, _, task = target.job.partition("_")
        marks = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={task}".encode()}
        for pid in self.lab.processes():
            folder = Path(f"/proc/{pid}")
            try:
                ours = marks <= set((folder / "environ").read_bytes().split(b"\0"))
                if ours and module in (folder / "cmdline").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGKILL)
                    return pid
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return 0

    # ----------------------------------------------------------------------------------- the operator

    def _recover(self) -> None:
        """What an operator does: nodes that are well again are put back, held jobs are let go."""
        for node in self.lab.nodes:
            self.counts.operator["node put back"] += self.lab.resume(node)
        for job in self.lab.squeue():
            if "held" in self.lab.show(job).get("Reason", "").lower():
                self.lab.run("scontrol", "release", job, check=False)
                self.counts.operator["held job released"] += 1

    def _submit_again(self) -> None:
        self.submit_all()
        self.counts.operator["submitted again"] += 1

    # ----------------------------------------------------------------------------------- afterwards

    def calm(self) -> None:
        """Waits until all is done, putting back what SLURM gave up."""
        deadline = time.monotonic() + PATIENCE_S
        while self.left():
            assert time.monotonic() < deadline, f"{len(self.left())} runs have not ended{self.lab.logs()}"
            self._recover()
            if not self.lab.squeue():
                self._submit_again()
            time.sleep(1)

    def judge(self, whole: Path) -> None:
        """Compares with the undisturbed study, and looks back at every fault."""
        manifest = Manifest.load(self.study)
        arms = {run.arm for run in manifest.runs}
        for arm in arms:
            wrong = [line for line in differences(whole, self.workdir) if f"/{arm}/" in line]
            self.counts.expect("arms ended as if undisturbed", not wrong, wrong)
            if self.control.faults:
                self.control.expect("no arm lost, none trained twice", not wrong, wrong)
        for struck in self.struck:
            later = [
                (run.arm, run.seed, row["step"], step)
                for run, step in struck.steps.items()
                for row in begun(manifest.run_dir(run))[struck.begins[run] :]
                if row["step"] < step and "notes" in row  # which one that was killed before it read any lacks
            ]
            self.counts.expect("no committed step lost", not later, (struck.element, later))
        limits = sum("USR2" in row.get("reason", "") for row in self._rows(TIMED))
        self.counts.kinds["time limit"] = limits
        self.counts.faults += limits
        first = min(moment(one.time) or 0.0 for one in records.submissions(self.study))
        self.counts.goodput = goodput(manifest, submitted=first)
        starts = sum(row["state"] == "running" for arm in arms for row in self._rows(arm))
        self.counts.measured["starts of elements"] = starts

    def _rows(self, arm: str) -> Iterator[dict]:
        """What the elements of an arm have noted."""
        for one in records.submissions(self.study):
            for element in one.elements:
                if element.arm == arm:
                    yield from records.element_log(self.study, one, element)


def name_of(strike: Callable[[Target], bool]) -> str:
    """A kind of fault as the table has it."""
    return strike.__name__.replace("_", " ")


def storm(lab: Lab, nursery: Nursery, whole: Path, workdir: Path, faults: int, seed: int) -> Storm:
    """One study under `faults` faults, or as many as find it unfinished."""
    workdir.mkdir(parents=True)
    counts = Counts(
        2,
        "a study on real SLURM, every kind of fault in turn",
        "faults",
    )
    control = Counts(4, "slurmctld killed while elements run", "kills")
    found = Storm(lab, nursery, workdir, random.Random(seed), counts, control)
    found.submit_all()
    found.rage(faults)
    found.calm()
    found.judge(whole)
    return found


def undisturbed(nursery: Nursery, workdir: Path) -> Path:
    """The same study on this machine, without SLURM and without a fault."""
    workdir.mkdir(parents=True)
    child = nursery.start("jaxablate.cli", ["run", STUDY, f"--workdir={workdir}"], workdir / "output.txt",
                          cwd=REPO)  # fmt: skip
    assert child.wait() == 0, child.words()[-3000:]
    return workdir
