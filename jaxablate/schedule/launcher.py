"""The launcher: keeps workers busy with what is left of a study until nothing is. One thread, one loop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from jaxablate import events, tuning
from jaxablate.analysis import collect, results
from jaxablate.claims import claim_holder
from jaxablate.config import RunConfig
from jaxablate.errors import UserError
from jaxablate.leases import LEASE_S
from jaxablate.manifest import Manifest, writing
from jaxablate.runstore import FAILURES, OUTCOMES, now
from jaxablate.schedule import workers
from jaxablate.schedule.cohorts import Job, plan
from jaxablate.schedule.plan import follow
from jaxablate.schedule.plan.plan import Plan
from jaxablate.schedule.retries import PENDING, Outlook
from jaxablate.schedule.signals import Signals
from jaxablate.schedule.survey import Selection, Survey, close_abandoned, taken_by, to_come, without_rate
from jaxablate.schedule.table import Progress, View, in_words, seconds_left
from jaxablate.schedule.workers import DIRECT, Command, Worker
from jaxablate.stopping import EXIT_TAKEN
from jaxablate.study import Phase, Run

A_FAILURE = "a failure"  # why a launcher stops, if not a signal's name
TAKEN = "taken"  # the same: others have its runs, and go on having them

_TICK_S = 0.1  # between two looks at the workers
_LOOK_S = 1.0  # between two looks at the runs of others
_HEED_S = 2.0  # between two looks for runs at work that were cancelled
_PATIENCE_S = 60.0  # for workers to stop cleanly when the launcher itself has failed
_KILLED_S = 10.0  # the same, to end once they were killed


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much at a time, and how often."""

    devices: Sequence[str]  # one per worker: a GPU, or "" for the CPU
    most: Mapping[Phase, int]  # members of a cohort
    on_failure: Literal["go on", "stop"]
    retries: int
    patience_s: float = math.inf  # to wait for others that work on what is asked for here
    split: int = 1  # times more micro-batches than the config says, at least
    plan: Plan | None = None  # by which jobs are ordered and placed


class Launcher:
    """Trains what a selection leaves to train of a frozen study, sharing the work with other launchers."""

    def __init__(
        self,
        manifest: Manifest,
        resolved: Mapping[str, RunConfig[Any, Any]],
        selection: Selection,
        limits: Limits,
        view: View,
        command: Command = DIRECT,
        survey: Survey | None = None,
    ):
        self.manifest, self.resolved, self.selection = manifest, resolved, selection
        self.limits, self.view, self.command = limits, view, command
        self.survey = survey or Survey(now(), limits.retries)
        self.workers: list[Worker] = []
        self.outlooks: dict[Run, Outlook] = {}
        self.stopping = ""  # why nothing is started any more
        self._others: dict[Run, str] = {}  # who works on the runs that another launcher has
        self._finished: list[tuple[float, int]] = []
        self._looked = self._shown = self._heeded = -1e9
        self._waits_since: float | None = None  # for others that have runs of its own
        self._signature: tuple[int, ...] = ()
        self._told = ""

    def run(self, signals: Signals | None = None) -> None:
        """Returns when nothing is left to do here, or when it was stopped: see `stopping`.

        Args:
          signals: what its caller listens to already.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.view)
            heard = signals or stack.enter_context(Signals())
            self._declare()
            try:
                while True:
                    self._obey(heard)
                    self._heed()
                    self._reap()
                    if not self.stopping:
                        self._launch()
                        self._wait()
                    if not self.workers and (self.stopping or not self._others):
                        break
                    self._show(every=0.5)
                    time.sleep(_TICK_S)
                self._show()
            finally:
                self._stop_all("the launcher failed")

    # ------------------------------------------------------------------------------------- stopping

    def _wait(self) -> None:
        """Gives up on runs that others have had for longer than it has patience for: it is one too many."""
        waits = not self.workers and any(self.selection.counts_on(run) for run in self._others)
        if not waits:
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = time.monotonic()
        elif time.monotonic() > self._waits_since + self.limits.patience_s:
            self.stopping = TAKEN

    def _heed(self) -> None:
        """Stops the workers that have a run which was cancelled meanwhile, on whatever machine that was done."""
        if time.monotonic() < self._heeded + _HEED_S:
            return
        self._heeded = time.monotonic()
        for worker in [worker for worker in self.workers if not worker.asked]:
            looks = (self.survey.look(self.manifest, run) for run in worker.job.runs)
            if any(look.state == "cancelled" for look in looks):
                worker.stop("stopped because a run of its cohort was cancelled")

    def _obey(self, signals: Signals) -> None:
        if signals.received and not self.stopping:
            self.stopping = signals.received[0]
            if self.stopping == "SIGHUP":
                self.view.mute()
            for worker in self.workers:
                worker.stop(f"stopped with {self.stopping}")
            if self.workers:
                self.view.event("stopping at the next step; once more to stop at once")
        if len(signals.received) > 1:
            for worker in self.workers:
                worker.kill(f"stopped at once with {signals.received[1]}")

    def _stop_all(self, why: str) -> None:
        """Leaves no worker behind when something here has raised; else there is none left."""
        for worker in self.workers:
            worker.stop(why)
        if not self._all_end(_PATIENCE_S):
            for worker in self.workers:
                worker.kill(why)
            if not self._all_end(_KILLED_S):  # it hangs in the kernel, where no signal reaches it
                left = ", ".join(str(w.process.pid) for w in self.workers if w.process.poll() is None)
                self.view.event(f"left behind, since it could not be killed: process {left}")

    def _all_end(self, patience_s: float) -> bool:
        """Whether all workers end in that time."""
        until = time.monotonic() + patience_s
        while any(worker.process.poll() is None for worker in self.workers):
            if time.monotonic() > until:
                return False
            time.sleep(_TICK_S)
        return True

    # ------------------------------------------------------------------------------- ends of workers

    def _reap(self) -> None:
        for worker in [w for w in self.workers if w.process.poll() is not None]:
            self.workers.remove(worker)
            self._looked = -1e9
            workers.settle(self.manifest, worker)
            if worker.process.returncode == EXIT_TAKEN:
                continue
            self._account(worker)

    def _account(self, worker: Worker) -> None:
        """Says how a worker's runs came out, and draws the consequence of a failure."""
        took = time.monotonic() - worker.began
        looks = {run: self.survey.look(self.manifest, run) for run in worker.job.runs}
        if any(
            look.state == "cancelled" for look in looks.values()
        ):  # for whose sake the others were stopped
            for run in [run for run, look in looks.items() if look.state == "preempted"]:
                self.survey.excuse(run)
                looks[run] = self.survey.look(self.manifest, run)
        self.outlooks |= looks
        if worker.job.phase == "confirm":
            self._sum_up(worker.job.arm)
        ended = sum(look.state in OUTCOMES for look in looks.values())
        if ended:
            self._finished.append((took, ended))
        states = Counter(look.state for look in looks.values())
        said = ", ".join(f"{count} {state}" for state, count in states.items())
        self.view.event(f"ended   {worker.job}: {said} after {took:.0f} s{in_words(self._seconds_left())}")
        reasons = {f"{look.state}: {look.reason}": look for look in looks.values() if look.state in FAILURES}
        for reason, look in reasons.items():
            again = "; to be tried again" if look.next == "train" else ""
            self.view.event(f"        {reason} (see {self.manifest.path / worker.log}){again}")
            if look.next == "nothing" and self.limits.on_failure == "stop" and not self.stopping:
                self.stopping = A_FAILURE
                for other in self.workers:
                    other.stop("stopped because another run failed")

    # -------------------------------------------------------------------------- what is about several runs

    def _sum_up(self, arm: str) -> None:
        """Writes the summary of an arm of which nothing is left to train."""
        runs = [run for run in self.manifest.runs if (run.arm, run.phase) == (arm, "confirm")]
        if self.survey.until:  # none of its stages is the last
            return
        if all(self.survey.look(self.manifest, run).next == "nothing" for run in runs):
            try:
                collect.write_arm_summary(self.manifest.path / arm, [run.id for run in runs])
            except UserError as error:  # a damaged summary of a run; the others are to be trained yet
                self.view.event(f"{arm}: no summary of the arm: {error}")

    def _declare(self) -> None:
        """Names the columns of TensorBoard's hparams page: those of the newest list, in one record for all."""
        try:
            with writing(self.manifest.path):
                newest = Manifest.load(self.manifest.path)
                alike = {(run.arm, run.learning_rate): run for run in newest.runs}
                configs = [newest.config_of(run) for run in alike.values()]
                first, *others = (response.metric for response in newest.study.responses)
                events.declare_experiment(newest.path, configs, first, others)
        except UserError as error:  # it trains as well without
            self.view.event(f"TensorBoard's hparams page lacks its columns: {error}")

    # ------------------------------------------------------------------------------------- starting

    def _launch(self) -> None:
        """Fills the free places with jobs."""
        free = list(self.limits.devices)
        for worker in self.workers:
            free.remove(worker.device)
        if not free or time.monotonic() < self._looked + _LOOK_S:
            return
        jobs = self._jobs()
        self._looked = time.monotonic()
        for device, job in self._placed(free, jobs):
            if job.phase == "confirm":
                self.manifest = self.manifest.lock()
            worker = workers.start(self.manifest, job, device, self._command(job), self._memory(job))
            self.workers.append(worker)
            where = f" on GPU {device}" if device else ""
            self.view.event(f"started {job}{where}")
        self._tell_of_others()

    def _placed(self, free: Sequence[str], jobs: Sequence[Job]) -> Iterable[tuple[str, Job]]:
        """(device, job) of what is to be started: by the plan, or in the order of the list."""
        if self.limits.plan is None:
            return zip(free, jobs, strict=False)
        at_work = [(worker.device, worker.job) for worker in self.workers]
        return follow.assign(self.limits.plan, jobs, self.limits.devices, at_work)

    def _command(self, job: Job) -> Command:
        """To the end of its last stage, unless it is asked for less or the plan has a later one elsewhere."""
        command = self.command.of(job)
        if self.limits.plan is None or command.until:
            return command
        return dataclasses.replace(command, until=follow.until(self.limits.plan, job))

    def _memory(self, job: Job) -> float | None:
        """What of its GPU's memory a worker may take if the plan has others beside it."""
        return None if self.limits.plan is None else follow.memory_fraction(self.limits.plan, job)

    def _jobs(self) -> list[Job]:
        """What can be started now. Looks at every run that has no outcome, and chooses rates on the way."""
        self._reload()
        self._look()
        if self._choose_rates():
            self._look()
        todo, self._others = [], {}
        for run in set(self.selection.runs(self.manifest)) - self._ours():
            if self.outlooks[run].next == "nothing":
                continue
            who = taken_by(self.manifest, run)
            if not who and self.outlooks[run].state == "running":
                close_abandoned(self.manifest, run)
                self.outlooks[run] = self.survey.look(self.manifest, run)
                if self.outlooks[run].state == "running":  # somebody was quicker
                    who = "another process"
            if who:
                self._others[run] = who
            elif self.outlooks[run].next == "train":
                todo.append(run)
        looks = self.outlooks if self.limits.plan is None else follow.company(self.limits.plan, self.outlooks)
        if (split := self.limits.split) > 1:
            looks = {
                run: dataclasses.replace(look, split=max(look.split, split)) for run, look in looks.items()
            }
        return plan(todo, looks, self.limits.most)

    def _ours(self) -> set[Run]:
        return {run for worker in self.workers for run in worker.job.runs}

    def _look(self) -> None:
        self.outlooks = {run: self.survey.look(self.manifest, run) for run in self.manifest.runs}

    def _reload(self) -> None:
        """Reads the study anew if another launcher has added to it."""
        files = [self.manifest.path / name for name in ("study.json", "runs.jsonl")]
        signature = tuple(n for file in files for n in (file.stat().st_mtime_ns, file.stat().st_size))
        if signature != self._signature:
            self.manifest, self._signature = Manifest.load(self.manifest.path), signature

    def _tell_of_others(self) -> None:
        if self.workers or not self._others:
            return
        told = f"waiting for {', '.join(sorted(set(self._others.values())))}: {len(self._others)} runs"
        claims = [self.manifest.run_dir(run).claim for run in sorted(self._others, key=lambda run: run.index)]
        here = socket.gethostname()
        elsewhere = [path for path in claims if (holder := claim_holder(path)) and holder.host != here]
        if elsewhere:  # whose end nobody here sees
            told += f"; if a process of another host is gone, its claims expire after {LEASE_S:.0f} s"
        if told != self._told:
            self._told = told
            self.view.event(told)

    # ------------------------------------------------------------------------------- learning rates

    def _choose_rates(self) -> bool:
        """Gives each arm that is tuned its rate, or a further rate to try; whether runs were added."""
        if self.manifest.study.learning_rate is None:
            return False
        tuned = [
            arm
            for arm in sorted(without_rate(self.manifest, self.selection))
            if all(self.outlooks[run].state in OUTCOMES for run in self._tuning(arm))
        ]
        if not tuned:
            return False
        own = dataclasses.replace(self.manifest, runs=tuple(r for arm in tuned for r in self._tuning(arm)))
        choices = tuning.choose(self.manifest.study, results.load(own).runs)
        further = {arm: [c.extend_by] for arm, c in choices.items() if c.extend_by is not None}
        final = {arm: choice for arm, choice in choices.items() if arm not in further}
        if further:
            self.manifest = self.manifest.with_tuning(further, self.resolved)
        if final:
            rates = {arm: choice.to_dict() for arm, choice in final.items()}
            self.manifest = self.manifest.with_rates(rates, self.resolved)
        if choices:
            self._declare()
        for arm, (rate,) in further.items():
            self.view.event(f"tuning  {arm}: best at the edge of its grid, which {rate:g} extends")
        for arm, choice in final.items():
            chosen = "no rate" if choice.learning_rate is None else f"learning rate {choice.learning_rate:g}"
            self.view.event(f"tuned   {arm}: {chosen} by {choice.rule}")
        return bool(choices)

    def _tuning(self, arm: str) -> list[Run]:
        return [run for run in self.manifest.runs if run.arm == arm and run.phase == "tuning"]

    # -------------------------------------------------------------------------------------- showing

    def _show(self, every: float = 0.0) -> None:
        if not self.view.live or time.monotonic() < self._shown + every:
            return
        self._shown = time.monotonic()
        arms: dict[str, Counter[str]] = {}
        for run, column in self._columns().items():
            arms.setdefault(run.arm, Counter())[column] += 1
        self.view.update(arms, self._progress(), self._seconds_left())

    def _columns(self) -> dict[Run, str]:
        """In which column of the table each run counts."""
        at_work = self._ours() | self._others.keys()

        def column(run: Run) -> str:
            look = self.outlooks.get(run, PENDING)
            if look.state in OUTCOMES:
                return look.state
            if run in at_work:
                return "running"
            return "failed" if look.next == "nothing" else "pending"

        return {run: column(run) for run in self.selection.runs(self.manifest)}

    def _progress(self) -> list[Progress]:
        return [Progress.of(self.manifest, worker) for worker in self.workers]

    def _seconds_left(self) -> float | None:
        waiting = list(self._columns().values()).count("pending") + to_come(self.manifest, self.selection)
        return seconds_left(self._finished, self._progress(), waiting, len(self.limits.devices))
