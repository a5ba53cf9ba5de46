"""The one training loop. It works on a cohort; a single run is a cohort of one.

kernels resolved -> shapes without memory -> restore or init -> for each stage: next batch, dispatch
step n, fetch the metrics of an earlier one, evaluate, checkpoint -> summary
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxablate import data, program, provenance, runstore, sharding
from jaxablate.analysis.collect import write_arm_summary
from jaxablate.clock import Clock
from jaxablate.config import Cohort, import_task
from jaxablate.program import Program, State
from jaxablate.progress import StepProgress
from jaxablate.record import Record, declare_experiment
from jaxablate.stopping import Stopped, StopRequest
from jaxablate.task import Task

logger = logging.getLogger(__name__)


def train(cohort: Cohort) -> list[dict[str, Any]]:
    """Trains the cohort, or continues it, and returns the summary of each member, in order.

    Members that have finished are not trained again.

    Raises:
      UserError: the config, the data or a run directory is not as it must be.
      Stopped: a signal asked for it; all that was done is saved.
    """
    cache = Path(
        cohort.base.host.cache or os.environ.get("JAXABLATE_CACHE") or "~/.cache/jaxablate"
    ).expanduser()
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        # Only where the user has not chosen a place.
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    task = import_task(cohort.base.task)(cohort.base, jax.default_backend())
    records = [Record(run, task.directions, task.response) for run in cohort.runs]
    summaries = {record.id: record.summary() for record in records}
    left = [record for record in records if summaries[record.id] is None]
    if left:
        loop = Loop(Cohort(tuple(record.run for record in left)), task, left, cache)
        summaries |= {summary["run_id"]: summary for summary in loop.run()}
        write_arm_summary(left[0].dir.path.parent)
    return [summary for record in records if (summary := summaries[record.id])]


class Loop:
    """A cohort while it trains: the host's side."""

    def __init__(self, cohort: Cohort, task: Task[Any, Any], records: list[Record], cache: Path):
        self.cohort, self.task, self.records = cohort, task, records
        self.host, self.training = cohort.base.host, cohort.base.training
        self.source = task.open(cache)
        self.mesh = sharding.make_mesh(
            self.host.mesh, len(records), self.training.batch_size // self.training.accumulation
        )
        self.stages = task.stages()
        self.last = sum(stage.steps for stage in self.stages)
        self.step = 0  # updates done, counted over all stages
        self.clock = Clock()

    def run(self) -> list[dict[str, Any]]:
        """Trains to the end; each member's summary. Failures are recorded in every member's attempts."""
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            for record in self.records:
                stack.enter_context(record)
            try:
                declare_experiment(self.records)
                resume = self._resume_step()
                facts = provenance.collect(jax.devices(), self.task.kernels, self.mesh.shape)
                for record in self.records:
                    record.begin(
                        resume, {**facts, "host_config": runstore.plain(vars(self.host) | {"mesh": None})}
                    )
                self._announce(resume)
                bar = stack.enter_context(StepProgress(self.cohort.base.arm, self.last, max(resume, 0)))
                state, current = self._train(resume, stop, bar)
                return self._finish(state, current)
            except Stopped as stopped:
                self._interrupted("preempted", str(stopped))
                raise
            except KeyboardInterrupt:
                self._interrupted("cancelled", "interrupted twice; continues from the last checkpoint")
                raise
            except Exception as error:
                out_of_memory = "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError)
                self._interrupted("oom" if out_of_memory else "bug", f"{type(error).__name__}: {error}")
                raise

    def _train(self, resume: int, stop: StopRequest, bar: StepProgress) -> tuple[State, Program]:
        """The stages that are left, from the checkpoint of step `resume`, or from the start if that is -1."""
        state, current, first = None, None, 0
        for stage in self.stages:
            end = first + stage.steps
            if resume <= end:
                current = Program(self.task, self.cohort, stage, self.mesh, first)
                if resume > first:
                    arrays = [
                        r.checkpoints.restore(resume, current.abstract_checkpoint()) for r in self.records
                    ]
                    state, self.step = current.stack(arrays), resume
                elif state is None:
                    state = current.init()
                    self._evaluate(current, state)
                else:
                    state = current.carry(state)
                state = self._train_stage(current, state, end, stop, bar)
            first = end
        assert state is not None, "the last stage always runs"
        assert current is not None
        return state, current

    def _train_stage(
        self, current: Program, state: State, end: int, stop: StopRequest, bar: StepProgress
    ) -> State:
        if self.step == end:
            return state
        seeds = [run.seed for run in self.cohort.runs]
        batches = data.CohortBatches(self.source.train, seeds, self.training.batch_size, end)
        reader = data.read(batches, self.step, self.host.workers)
        step = self.clock.compile(current)
        waiting: tuple[int, dict[str, jax.Array]] | None = None
        for n in range(self.step + 1, end + 1):
            state, metrics = step(state, current.member, current.put_batch(next(reader)), np.int32(n))
            self.step = n
            if waiting:  # fetched only now, so that the device already has step n to work on
                self._log(*waiting, bar)
            waiting = (n, metrics) if n == 1 or n % self.host.log_every == 0 or n == end else None
            evaluate = n % self.training.eval_every == 0 or n == end
            regular = n % self.host.checkpoint_every == 0 or n == end or stop.signal is not None
            if not (evaluate or regular):
                continue
            if waiting:
                self._log(*waiting, bar)
                waiting = None
            improved = self._evaluate(current, state) if evaluate else [False] * len(self.records)
            for m, record in enumerate(self.records):
                if regular or improved[m]:
                    record.save(n, current.take(state, m), regular=regular)
            if stop.signal and n < self.last:
                raise Stopped(f"{stop.signal} at step {n}")
            if not np.asarray(state.alive).any():
                break  # every member has diverged
            self.clock.restart()
        return state

    def _resume_step(self) -> int:
        """The newest step that every member has a sound checkpoint of; -1 if there is none."""
        steps = [set(record.checkpoints.sound_regular_steps()) for record in self.records]
        return max(set.intersection(*steps), default=-1)

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
        values = {key: np.asarray(value) for key, value in jax.device_get(metrics).items()}
        perf = self.clock.lap(n, self.training.batch_size, self.task.tokens_per_example)
        diverged_at = values.pop("diverged_at")
        for m, record in enumerate(self.records):
            if diverged_at[m] < 0:
                record.log.write(n, {key: float(value[m]) for key, value in values.items()})
                record.log.write_perf(n, perf)
            elif not record.diverged:
                record.diverged = True
                record.log.write(int(diverged_at[m]), {"train/loss": None})
        losses = " ".join(f"{x:.3f}" for x in values["train/loss"][:4])
        bar.update(n, f"loss {losses}  {perf.get('perf/steps_per_sec', 0):.1f} steps/s")

    def _finish(self, state: State, current: Program) -> list[dict[str, Any]]:
        peak = self.clock.memory()
        summaries = []
        for m, record in enumerate(self.records):
            arrays = jax.device_get(current.take(state, m))
            params = {k.removeprefix("params/"): v for k, v in arrays.items() if k.startswith("params/")}
            parts = {name: program.count(tree) for name, tree in current.abstract_member.params.items()}
            facts = {
                "parameters": {"total": sum(parts.values()), **parts},
                "params_digest": program.digest(params),
                "kernels": {slot: got for slot, (_, got) in self.task.kernels.items()},
                "cohort_size": len(self.records),
                "perf": {**self.clock.summary(self.training.batch_size), **peak},
                "diverged": None,
            }
            if arrays["alive"]:
                summaries.append(record.finish("done", "", self.step, facts))
                continue
            at, loss = int(arrays["diverged_at"]), float(arrays["last_loss"])
            facts["diverged"] = {"step": at, "last_loss": runstore.plain(loss)}
            reason = f"loss or gradient not finite at step {at}; loss before it {loss:.6g}"
            summaries.append(record.finish("diverged", reason, at, facts))
        return summaries

    def _announce(self, resume: int) -> None:
        base, runs = self.cohort.base, self.cohort.runs
        seeds = ", ".join(str(run.seed) for run in runs)
        mesh = " x ".join(f"{axis} {n}" for axis, n in self.mesh.shape.items() if n > 1) or "one device"
        logger.info(
            "%s/%s (%s): seeds %s, %d steps, %s", base.study, base.arm, base.scale, seeds, self.last, mesh
        )
        for slot, (asked, got) in self.task.kernels.items():
            logger.info("kernel of %s: %s%s", slot, asked, "" if asked == got else f" -> {got}")
        if resume >= 0:
            logger.info("continues from step %d", resume)

    def _interrupted(self, state: runstore.State, reason: str) -> None:
        for record in self.records:
            record.interrupted(state, reason, self.step)
