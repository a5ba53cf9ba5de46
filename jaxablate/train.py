"""The one training loop. It works on a cohort; a single run is a cohort of one.

kernels resolved -> shapes without memory -> restore or init -> for each stage: next batch, dispatch
step n, fetch the metrics of an earlier one, evaluate, checkpoint -> summary
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxablate import config, data, events, program, provenance, runstore, sharding, xla
from jaxablate.analysis import collect
from jaxablate.claims import Claim
from jaxablate.clock import Clock
from jaxablate.config import Cohort, import_task
from jaxablate.errors import UserError
from jaxablate.program import Program, State
from jaxablate.progress import StepProgress
from jaxablate.record import Record
from jaxablate.stopping import Stopped, StopRequest
from jaxablate.study import Phase
from jaxablate.task import Source, Task
from jaxablate_kernels import KernelUnsupported
from jaxablate_kernels.tuning import used_configs

logger = logging.getLogger(__name__)


def train(
    cohort: Cohort,
    claims: Mapping[str, Claim] = MappingProxyType({}),
    log: str = "",
    phase: Phase = "confirm",
) -> list[dict[str, Any]]:
    """Trains the cohort, or continues it, and returns the summary of each member, in order.

    Members that have finished are not trained again.

    Args:
      cohort: the runs.
      claims: run id -> a claim on it that the caller holds already; the others are claimed here.
      log: the file that this process writes to, to be noted in the row of each attempt.
      phase: what the runs are for, where a study says it.

    Raises:
      UserError: the config, the data or a run directory is not as it must be.
      Stopped: a signal asked for it; all that was done is saved.
    """
    cache = config.cache_dir(cohort.base.host)
    xla.keep_compiled(cache)
    task = import_task(cohort.base.task)(cohort.base, jax.default_backend())
    records = [Record(run, task.directions, task.response, claims, phase) for run in cohort.runs]
    if any(record.summary() is None for record in records):
        _mesh(cohort)  # refused, if it is, before anything is written
        try:
            _train_the_rest(records, task, task.open(cache), log)
        except KernelUnsupported as error:
            asked = (slot for slot, k in task.kernels.items() if (k.op, k.name) == (error.op, error.name))
            raise UserError(f"config.{next(asked, 'model')}: {error}") from error
    return [summary for record in records if (summary := record.summary())]


def _train_the_rest(records: list[Record], task: Task[Any, Any], source: Source, log: str) -> None:
    """Claims and trains the members that have not finished."""
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        left = [stack.enter_context(record) for record in records if record.summary() is None]
        left = [record for record in left if record.summary() is None]  # now that nobody else can finish it
        # Of a frozen study the launcher keeps what is about several runs: it knows their list.
        frozen = (records[0].dir.path.parents[1] / "study.json").exists()
        if left and not frozen:
            _declare(left)
        for together in _equally_far(left):
            if stop.signal:
                raise Stopped(f"{stop.signal} between two cohorts")
            own = Cohort(tuple(record.run for record in together))
            about = {"members": len(together), "split": own.base.host.split, **({"log": log} if log else {})}
            Loop(own, task, together, source, stop, about).run()
        if left and not frozen:
            arm = left[0].dir.path.parent
            collect.write_arm_summary(arm, collect.same_config(arm, left[0].id))


def _declare(records: list[Record]) -> None:
    """The columns of TensorBoard's hparams page, from all runs that are there; without them the runs go on."""
    study = records[0].dir.path.parents[1]
    try:
        configs = [runstore.read_json(path) for path in sorted(study.glob("*/*/config.json"))]
        events.declare_experiment(study, configs, records[0].response)
    except (OSError, UserError) as error:
        logger.warning("%s: TensorBoard's hparams page lacks its columns: %s", study, error)


def _mesh(cohort: Cohort) -> jax.sharding.Mesh:
    base = cohort.base
    rows = base.training.batch_size // base.accumulation
    return sharding.make_mesh(base.host.mesh, len(cohort.runs), rows)


def _equally_far(records: list[Record]) -> list[list[Record]]:
    """Groups of members that can go on together from a step that all of them have a checkpoint of.

    A kill between the saves of two members leaves them one checkpoint apart and a cohort still; a member
    that joined later would throw back the others to its own step, so it goes on by itself.
    """
    groups: list[tuple[set[int], list[Record]]] = []
    for record in records:
        steps = record.checkpoints.regular_steps()
        if len(steps) < 2:
            steps |= {-1}  # the start is no further back than a checkpoint would be
        for common, members in groups:
            if common & steps:
                common &= steps
                members.append(record)
                break
        else:
            groups.append((steps, [record]))
    return [members for _, members in groups]


class Loop:
    """A cohort while it trains: the host's side."""

    def __init__(
        self,
        cohort: Cohort,
        task: Task[Any, Any],
        records: list[Record],
        source: Source,
        stop: StopRequest,
        about: Mapping[str, Any],
    ):
        self.cohort, self.task, self.records, self.source, self.stop = cohort, task, records, source, stop
        self.host, training = cohort.base.host, cohort.base.training
        self.training = training
        self.mesh = _mesh(cohort)
        self.stages = task.stages()
        self.last = sum(stage.steps for stage in self.stages)
        self.step = 0  # updates done, counted over all stages
        flops = task.flops_per_example
        tokens = task.tokens_per_example
        self.clock = Clock(flops and flops * training.batch_size, training.batch_size, tokens)
        for record in records:
            record.about = {**about, "steps": self.last}
            record.on_data(source.fingerprint)

    def run(self) -> None:
        """Trains to the end. Failures are recorded in every member's attempts."""
        with contextlib.ExitStack() as stack:
            try:
                steps = [set(record.checkpoints.sound_regular_steps()) for record in self.records]
                resume = max(set.intersection(*steps), default=-1)  # -1: from the start
                self._announce(resume)
                bar = stack.enter_context(StepProgress(self.cohort.base.arm, self.last, max(resume, 0)))
                self._finish(*self._train(resume, bar))
            except Stopped as stopped:
                self._interrupted("preempted", str(stopped))
                raise
            except KeyboardInterrupt:
                self._interrupted("preempted", "interrupted twice; continues from the last checkpoint")
                raise
            except Exception as error:
                out_of_memory = "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError)
                self._interrupted("oom" if out_of_memory else "bug", f"{type(error).__name__}: {error}")
                raise

    def _train(self, resume: int, bar: StepProgress) -> tuple[State, Program]:
        """The stages that are left, from the checkpoint of step `resume`, or from the start if that is -1."""
        state, current, first = None, None, 0
        for stage in self.stages:
            end = first + stage.steps
            if resume <= end and self._anyone_alive(state):
                current = Program(self.task, self.cohort, stage, self.mesh, first)
                if resume > first:
                    target = current.abstract_checkpoint()
                    state = current.stack([r.checkpoints.restore(resume, target) for r in self.records])
                    self.step = resume
                    self._begin(resume, state)
                elif state is None:
                    state = current.init()
                    self._begin(resume, state)
                    self._evaluate(current, state)
                else:
                    state = current.carry(state)
                state = self._train_stage(current, state, end, bar)
            first = end
        assert state is not None, "resume is never beyond the last stage"
        assert current is not None
        return state, current

    def _train_stage(self, current: Program, state: State, end: int, bar: StepProgress) -> State:
        if self.step == end:
            return state
        seeds = [run.seed for run in self.cohort.runs]
        batches = data.CohortBatches(
            self.source.train, seeds, self.training.batch_size, end, self.training.order
        )
        reader = data.read(batches, self.step, self.host.workers)
        step = self.clock.compile(current)
        before: tuple[int, dict[str, jax.Array]] | None = None
        for n in range(self.step + 1, end + 1):
            state, metrics = step(state, current.member, current.put_batch(next(reader)), np.int32(n))
            self.step = n
            if before:  # waited for only now, so that the device already has step n to work on
                self._log(*before, bar)
            before = (n, metrics)
            evaluate = n % self.training.eval_every == 0 or n == end
            regular = n % self.host.checkpoint_every == 0 or n == end
            if not (evaluate or regular or self.stop.signal):
                continue
            self._log(n, metrics, bar)
            before = None
            improved = self._evaluate(current, state) if evaluate else [False] * len(self.records)
            stopping = self.stop.signal  # read once: what is saved and what is said must agree
            self._save(
                current,
                state,
                [regular or bool(stopping) or best for best in improved],
                regular or bool(stopping),
            )
            if stopping and n < self.last:
                raise Stopped(f"{stopping} at step {n}")
            if not self._anyone_alive(state):
                break
            self.clock.restart(n)
        return state

    def _begin(self, resume: int, state: State) -> None:
        facts = provenance.collect(jax.devices(), self.task.kernels, self.mesh.shape)
        self.hardware = provenance.hardware(facts)
        for record, alive in zip(self.records, np.asarray(state.alive), strict=True):
            record.diverged = not alive
            record.begin(resume, {**facts, "data": self.source.fingerprint})

    def _anyone_alive(self, state: State | None) -> bool:
        return state is None or bool(np.asarray(state.alive).any())

    def _save(self, current: Program, state: State, due: list[bool], regular: bool) -> None:
        """Starts the checkpoints of the members that are due; the older ones of all go when all are complete."""
        for record in self.records:
            record.checkpoints.wait()
        for record in self.records:
            record.prune()
        for m, record in enumerate(self.records):
            if due[m]:
                record.save(self.step, current.take(state, m), regular=regular)

    def _evaluate(self, current: Program, state: State) -> list[bool]:
        """Scores every living member on the whole evaluation set; which of them are at their best."""
        outputs = [jax.device_get(current.predict(state, batch)) for batch in self.source.evaluation]
        alive = np.asarray(state.alive)
        improved = [False] * len(self.records)
        for m, record in enumerate(self.records):
            if alive[m]:
                own = [jax.tree.map(lambda x, m=m: x[m], output) for output in outputs]
                improved[m] = record.evaluated(self.step, self.source.score(own))
        return improved

    def _log(self, n: int, metrics: Mapping[str, jax.Array], bar: StepProgress) -> None:
        """Waits for step `n`, notes who was lost in it, and writes its metrics if it is due."""
        diverged_at = np.asarray(metrics["diverged_at"])
        for m, record in enumerate(self.records):
            if diverged_at[m] >= 0:
                record.lost(int(diverged_at[m]))
        if not (n == 1 or n % self.host.log_every == 0 or n == self.last):
            return
        values = {key: np.asarray(value) for key, value in metrics.items() if key != "diverged_at"}
        perf = self.clock.lap(n)
        for m, record in enumerate(self.records):
            if not record.diverged:
                record.log.write(n, {key: float(value[m]) for key, value in values.items()})
                record.log.write_perf(n, perf)
        losses = " ".join(f"{x:.3f}" for x in values["train/loss"][:4])
        rate = perf.get("perf/steps_per_sec")
        bar.update(n, f"loss {losses}  {f'{rate:.1f} steps/s' if rate else ''}")

    def _finish(self, state: State, current: Program) -> None:
        for m, record in enumerate(self.records):
            arrays = jax.device_get(current.take(state, m))
            params = {k.removeprefix("params/"): v for k, v in arrays.items() if k.startswith("params/")}
            parts = {name: program.count(tree) for name, tree in current.abstract_member.params.items()}
            facts = {
                "parameters": {"total": sum(parts.values()), **parts},
                "params_digest": program.digest(params),
                "kernels": {slot: kernel.name for slot, kernel in self.task.kernels.items()},
                "kernel_configs": used_configs(),
                "cohort_size": len(self.records),
                "hardware": self.hardware,
                "accumulation": self.cohort.base.accumulation,
                "data": self.source.fingerprint,
                "diverged": None,
            }
            if arrays["alive"]:
                record.finish("done", "", self.step, facts)
                continue
            at, loss = int(arrays["diverged_at"]), float(arrays["last_loss"])
            facts["diverged"] = {"step": at, "last_loss": runstore.plain(loss)}
            reason = f"loss or gradient not finite at step {at}; loss before it {loss:.6g}"
            record.finish("diverged", reason, at, facts)
        for record in self.records:  # last, so that no figure stands between a member and its result
            record.draw()

    def _announce(self, resume: int) -> None:
        base, runs = self.cohort.base, self.cohort.runs
        seeds = ", ".join(str(run.seed) for run in runs)
        mesh = " x ".join(f"{axis} {n}" for axis, n in self.mesh.shape.items() if n > 1) or "one device"
        logger.info(
            "%s/%s (%s): seeds %s, %d steps, %s", base.study, base.arm, base.scale, seeds, self.last, mesh
        )
        for slot, kernel in self.task.kernels.items():
            carried = "" if kernel.name == kernel.requested else f" -> {kernel.name}"
            logger.info("kernel of %s: %s%s", slot, kernel.requested, carried)
        if self.mesh.size < jax.device_count():
            logger.warning("using %d of %d devices", self.mesh.size, jax.device_count())
        if resume >= 0:
            logger.info("continues from step %d", resume)

    def _interrupted(self, state: runstore.State, reason: str) -> None:
        """Ends the attempts of all members that have no result yet."""
        for record in self.records:
            if record.finished:
                continue
            try:
                record.interrupted(state, reason, self.step)
            except OSError as error:  # a full disk must not hide the error that ended the cohort
                logger.error("%s: cannot record '%s': %s", record.dir.path, state, error)
