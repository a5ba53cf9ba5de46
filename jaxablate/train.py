"""The one training loop. It works on a cohort; a single run is a cohort of one.

kernels resolved -> shapes without memory -> restore or init -> for each stage: next batch, dispatch
step n, fetch the metrics of an earlier one, evaluate, checkpoint -> summary

Of several processes (see `distributed`) all run it, and process 0 alone has records to write.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax

from jaxablate import config, disk, distributed, inputs, provenance, runstore, sharding, stability, xla
from jaxablate.analysis import collect
from jaxablate.claims import Claim
from jaxablate.clock import Clock
from jaxablate.config import Cohort, import_task
from jaxablate.errors import StorageError, UserError, is_storage
from jaxablate.evaluation import Evaluations
from jaxablate.inputs import Inputs
from jaxablate.program import Program, State
from jaxablate.progress import StepProgress, announce
from jaxablate.record import Record, take
from jaxablate.steps import Steps, read
from jaxablate.stopping import Paused, Stopped, StopRequest
from jaxablate.study import Phase
from jaxablate.task import Task
from jaxablate.trees import count, digest, nbytes
from jaxablate_kernels import KernelUnsupported
from jaxablate_kernels.tuning import used_configs

logger = logging.getLogger(__name__)

ONE_BY_ONE = 256 << 20  # bytes of a member's state, of which larger ones are not written side by side


def train(
    cohort: Cohort,
    claims: Mapping[str, Claim] = MappingProxyType({}),
    log: str = "",
    phase: Phase = "confirm",
    until: str = "",
) -> list[dict[str, Any]]:
    """Trains the cohort, or continues it, and returns the summary of each member, in order.

    Members that have finished are not trained again.

    Args:
      cohort: the runs.
      claims: run id -> a claim on it that the caller holds already; the others are claimed here.
      log: the file that this process writes to, to be noted in the row of each attempt.
      phase: what the runs are for, where a study says it.
      until: name of the stage after which to stop; empty: train to the end.

    Raises:
      UserError: the config, the data or a run directory is not as it must be.
      StorageError: the disk is full or broken; what was saved before is intact.
      Stopped: a signal asked for it; all that was done is saved.
      Paused: the stage `until` is done, and there are more.
    """
    cache = config.cache_dir(cohort.base.host)
    xla.keep_compiled(cache)
    task = import_task(cohort.base.task)(cohort.base, jax.default_backend())
    records = [Record(run, task.directions, task.response, claims, phase) for run in cohort.runs]
    stages = [stage.name for stage in task.stages()]
    asked, until = "--until" if until else "config.host.until", until or cohort.base.host.until
    if until and until not in stages:
        raise UserError(f"{asked}={until}: no such stage of this task; valid: {', '.join(stages)}")
    if distributed.first(lambda: any(record.summary() is None for record in records)):
        distributed.check_mesh(_mesh(cohort))  # refused, if it is, before anything is written
        try:
            given = Inputs.open_everywhere(task, cache)
            _train_the_rest(records, task, given, log, until)
        except KernelUnsupported as error:
            asked = (slot for slot, k in task.kernels.items() if (k.op, k.name) == (error.op, error.name))
            raise UserError(f"config.{next(asked, 'model')}: {error}") from error
        except OSError as error:
            if not is_storage(error):
                raise
            where = error.filename or records[0].dir.path.parent
            what = "what was saved is there; mend this and run again, or use another workdir"
            raise StorageError(f"{where}: {error.strerror}; {what}") from error
    return distributed.first(lambda: [found for record in records if (found := record.summary())])


def _train_the_rest(records: list[Record], task: Task[Any, Any], given: Inputs, log: str, until: str) -> None:
    """Trains the members that have not finished."""
    # Of a frozen study the launcher keeps what is about several runs: it knows their list.
    frozen = (records[0].dir.path.parents[1] / "study.json").exists()
    paused: Paused | None = None
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(distributed.stop_request())
        groups = distributed.first(lambda: take(records, stack, frozen))
        for together in ([records[i] for i in group] for group in groups):
            if asked := stop.due():
                raise Stopped(f"{asked} between two cohorts")
            if not distributed.leads():
                for record in together:
                    stack.push(record)  # closes its checkpoints
            own = Cohort(tuple(record.run for record in together))
            about = {"members": len(together), "split": own.base.host.split, **({"log": log} if log else {})}
            about |= {"unsplittable": task.unsplittable} if task.unsplittable else {}
            try:
                Loop(own, task, together, given, stop, about, until).run()
            except Paused as reached:  # the next group has not got there yet
                paused = reached
        if groups and not frozen and distributed.leads():
            arm = records[0].dir.path.parent
            collect.write_arm_summary(arm, collect.same_config(arm, records[0].id))
    if paused:
        raise paused


def _mesh(cohort: Cohort) -> jax.sharding.Mesh:
    rows = cohort.base.training.batch_size // cohort.base.accumulation
    return sharding.make_mesh(cohort.base.host.mesh, len(cohort.runs), rows)


class Loop:
    """A cohort while it trains: the host's side."""

    def __init__(
        self,
        cohort: Cohort,
        task: Task[Any, Any],
        records: list[Record],
        given: Inputs,
        stop: StopRequest,
        about: Mapping[str, Any],
        until: str,
    ):
        self.cohort, self.task, self.given, self.stop, self.until = cohort, task, given, stop, until
        self.records = records if distributed.leads() else []
        self.host, self.training = cohort.base.host, cohort.base.training
        self.mesh = _mesh(cohort)
        self.base = inputs.put_base(given.base, inputs.abstract_base(task, self.mesh))
        self.stages = task.stages()
        self.last = sum(stage.steps for stage in self.stages)
        names = [stage.name for stage in self.stages]
        asked = self.stages[: names.index(until) + 1] if until else self.stages
        self.goal = sum(stage.steps for stage in asked)  # where to stop
        self.evaluations = Evaluations(task, given.source, self.records, stop)
        self.step = 0  # updates done, counted over all stages
        self.clock = Clock(self.training.batch_size, task.tokens_per_example)
        for record in records:
            record.about = {**about, "steps": self.last}
            record.on_data(given.fingerprint)
        self.stores = [record.checkpoints for record in records]

    def run(self) -> None:
        """Trains to the end. Failures are recorded in every member's attempts."""
        with contextlib.ExitStack() as stack:
            try:
                resume = distributed.first(self._resume_step)
                announce(self.cohort, self.task.kernels, self.mesh, self.last, resume)
                self._pause_at(resume)
                bar = stack.enter_context(StepProgress(self.cohort.base.arm, self.last, max(resume, 0)))
                self._finish(*self._train(resume, bar))
            except Paused as paused:
                self._interrupted("preempted", str(paused), paused=paused.stage)
                raise
            except Stopped as stopped:
                self._interrupted("preempted", str(stopped))
                raise
            except KeyboardInterrupt as error:
                self._interrupted("preempted", "interrupted twice; continues from the last checkpoint")
                distributed.abandon(error)
                raise
            except Exception as error:
                self._interrupted(*distributed.blame(error))
                if not isinstance(error, UserError):
                    distributed.abandon(error)
                raise

    def _resume_step(self) -> int:
        """The newest step that every member has a sound checkpoint of; -1: from the start."""
        steps = [set(record.checkpoints.sound_regular_steps()) for record in self.records]
        return max(set.intersection(*steps), default=-1)

    def _pause_at(self, step: int) -> None:
        """Ends the loop if the stage that was asked for is done; its checkpoint is complete then."""
        if self.goal <= step < self.last:
            for store in self.stores:
                store.wait()
            raise Paused(self.until, f"stage '{self.until}' is done, as asked")

    def _train(self, resume: int, bar: StepProgress) -> tuple[State, Program]:
        """The stages that are left, from the checkpoint of step `resume`, or from the start if that is -1."""
        state, current, first = None, None, 0
        for stage in self.stages:
            end = first + stage.steps
            if resume <= end and self._anyone_alive(state):
                current = Program(self.task, self.cohort, stage, self.mesh, first, base=self.base)
                self.evaluations.enter(current)
                if resume > first:
                    target = current.abstract_checkpoint()
                    state = current.stack([store.restore(resume, target) for store in self.stores])
                    self.step = resume
                    self._begin(resume)
                    self.evaluations.resumed(current, state, resume)
                elif state is None:
                    state = current.init()
                    self._begin(resume)
                    if self.last:
                        state, _ = self.evaluations.at(current, state, 0)
                        self.evaluations.conclude(current, state, 0)
                else:
                    state = self.evaluations.begin(current, current.carry(state), first)
                if self.step < end and current.training(state).any():
                    state = self._train_stage(current, state, end, bar)
                if self.step < end and self._anyone_alive(state):
                    self.step = end  # all have stopped: what is left changes nothing
                    self._save(current, state, [True] * len(self.stores), regular=True)
                if self._anyone_alive(state):
                    self._pause_at(end)
            first = end
        assert state is not None and current is not None, "resume is never beyond the last stage"
        return state, current

    def _train_stage(self, current: Program, state: State, end: int, bar: StepProgress) -> State:
        batches, step = read(current, self.given.source, self.step), Steps(current, self.clock)
        apart = self.training.restore == "last"  # otherwise every state has the best parameters so far
        before: tuple[int, dict[str, jax.Array]] | None = None
        for n in range(self.step + 1, end + 1):
            state, metrics = step(state, next(batches), n)
            self.step = n
            if before:  # waited for only now, so that the device already has step n to work on
                self._log(*before, bar)
            before = (n, metrics)
            evaluate = current.stage.evaluates(n - current.first, current.first, self.training.eval_every)
            regular = n % self.host.checkpoint_every == 0 or n == end
            improved = [False] * len(self.stores)
            if evaluate or regular:
                self._log(n, metrics, bar)
                before = None
            if evaluate:
                state, improved = self.evaluations.at(current, state, n)
            stopping = self.stop.due()  # asked once: what is saved and what is said must agree
            if not (evaluate or regular or stopping):
                continue
            if before:
                self._log(*before, bar)
                before = None
            regular = regular or bool(stopping)
            self._save(current, state, [regular or (best and apart) for best in improved], regular)
            if stopping and (n < self.last or self.evaluations.closing):
                raise Stopped(f"{stopping} at step {n}")
            if evaluate:
                try:
                    self.evaluations.conclude(current, state, n)
                except Stopped:  # while a member that stopped early was measured
                    if not regular:
                        self._save(current, state, [True] * len(self.stores), regular=True)
                    raise
            if not current.training(state).any():
                break
            self.clock.restart(n)
        return state

    def _begin(self, resume: int) -> None:
        facts = provenance.collect(jax.devices(), self.task.kernels, self.mesh.shape)
        self.hardware = provenance.hardware(facts)
        for record in self.records:
            record.begin(resume, {**facts, "data": self.given.fingerprint})

    def _anyone_alive(self, state: State | None) -> bool:
        return state is None or bool(distributed.fetch(state.alive).any())

    def _save(self, current: Program, state: State, due: list[bool], regular: bool) -> None:
        """Starts the checkpoints of the members that are due; the older ones of all go when all are complete."""
        for store in self.stores:
            store.wait()
        sizes = self.clock.sizes() if regular and type(self.task).fit is not Task.fit else {}
        for record in self.records:
            record.prune()
            record.stepped(self.step, sizes)
            record.flush()
        for m, store in enumerate(self.stores):
            if due[m]:
                taken = current.take(state, m)
                store.save(self.step, taken, regular=regular)
                if nbytes(taken) > ONE_BY_ONE:
                    store.wait()

    def _log(self, n: int, metrics: Mapping[str, jax.Array], bar: StepProgress) -> None:
        """Waits for step `n`, notes who was lost in it, and writes its metrics if it is due."""
        values = distributed.fetch(dict(metrics))
        diverged_at = values.pop("diverged_at")
        for m, record in enumerate(self.records):
            if diverged_at[m] >= 0:
                record.lost(int(diverged_at[m]), {key: float(values[key][m]) for key in stability.METRICS})
        if not (n == 1 or n % self.host.log_every == 0 or n == self.last):
            return
        perf = self.clock.lap(n)
        for m, record in enumerate(self.records):
            if record.training:
                record.trained(n, {key: float(value[m]) for key, value in values.items()}, perf)
        losses = " ".join(f"{x:.3f}" for x in values["train/loss"][:4])
        rate = perf.get("perf/steps_per_sec")
        bar.update(n, f"loss {losses}  {f'{rate:.1f} steps/s' if rate else ''}")

    def _finish(self, state: State, current: Program) -> None:
        parts = {name: count(tree) for name, tree in current.abstract_member.params.items()}
        if frozen := self.task.base_parameters:
            parts["frozen"] = frozen
        common = {
            "parameters": {"total": sum(parts.values()), **parts},
            "kernels": {slot: kernel.name for slot, kernel in self.task.kernels.items()},
            "kernel_configs": used_configs(),
            "cohort_size": len(self.stores),
            "hardware": self.hardware,
            "accumulation": self.cohort.base.accumulation,
            "data": self.given.fingerprint,
            "beside": dict(self.task.beside),
        }
        alive, at, loss = distributed.fetch((state.alive, state.diverged_at, state.last_loss))
        for m in range(len(self.stores)):
            taken = current.take(state, m)
            params = {k.removeprefix("params/"): v for k, v in taken.items() if k.startswith("params/")}
            params = distributed.fetch(params)
            for record in self.records[m : m + 1]:
                facts = {**common, "params_digest": digest(params), "diverged": None}
                if not self.last:
                    record.finish("done", "skipped: no stage has anything to train on", 0, facts)
                    continue
                if alive[m]:
                    record.done(self.step, facts)
                    continue
                step, last = int(at[m]), float(loss[m])
                facts["diverged"] = {"step": step, "last_loss": disk.plain(last)}
                reason = f"loss or gradient not finite at step {step}; loss before it {last:.6g}"
                record.finish("diverged", reason, step, facts)
        for record in self.records:  # last, so that no figure stands between a member and its result
            record.draw()

    def _interrupted(self, state: runstore.State, reason: str, **info: Any) -> None:
        """Ends the attempts of all members that have no result yet."""
        for record in self.records:
            if record.finished:
                continue
            try:
                record.interrupted(state, reason, self.step, **info)
            except OSError as error:  # a full disk must not hide the error that ended the cohort
                logger.error("%s: cannot record '%s': %s", record.dir.path, state, error)
