"""What one run leaves on disk while it trains: attempts, metrics, checkpoints, summary."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from jaxablate import disk, runstore
from jaxablate.analysis import runtable, views
from jaxablate.checkpoint import Checkpoints, identity
from jaxablate.claims import Claim
from jaxablate.config import RunConfig
from jaxablate.errors import UserError
from jaxablate.events import declare_experiment, run_hparams, session_group
from jaxablate.metrics import MetricsLog, gaps, statistics
from jaxablate.plateau import Standing
from jaxablate.runstore import OUTCOMES, RunDir, run_id
from jaxablate.study import Phase

logger = logging.getLogger(__name__)

SIZE = "perf/bucket/"  # before the size of batch that steps had, in the rows of perf.jsonl

P = ParamSpec("P")
T = TypeVar("T")


def _fenced(method: Callable[Concatenate[Record, P], T]) -> Callable[Concatenate[Record, P], T]:
    """A method that writes: this process ends before it if the claim is lost (see `Claim.fenced`)."""

    @functools.wraps(method)
    def fenced(self: Record, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._claim.fenced():
            return method(self, *args, **kwargs)

    return fenced


class Record:
    """One member's files. Use as a context manager: it holds the claim on the run directory.

    `claims` are those that the caller holds already, by run id; the record gives its own back in the end.
    Of several processes only the first one enters it; the others use its checkpoints, which all of them write.
    """

    def __init__(
        self,
        run: RunConfig[Any, Any],
        directions: Mapping[str, Any],
        response: str,
        claims: Mapping[str, Claim] = MappingProxyType({}),
        phase: Phase = "confirm",
    ):
        self.run, self.directions, self.response = run, dict(directions), response
        self.id = run_id(run.seed, run.optim.learning_rate, run.fingerprint)
        self.dir = RunDir(Path(run.host.workdir) / run.study / run.arm / self.id)
        self.best: tuple[int, float] | None = None  # step and value of the response
        self._since = -1  # the step after which evaluations compare; see `compare_since`
        self.diverged = self.finished = False
        self.standing: Standing | None = None  # if something follows from the responses
        self.phase: Phase = phase
        self.about: Mapping[str, Any] = {}  # what the attempt's row says besides: cohort, steps, log
        self._claim, self._claimed = claims.get(self.id, Claim(self.dir.claim)), self.id in claims
        self.checkpoints = self.on_data("")
        self._log: MetricsLog | None = None
        self._attempt = 0

    def on_data(self, fingerprint: str) -> Checkpoints:
        """Ties the checkpoints to the content of the data: those from other data are refused."""
        own = identity(self.run.fingerprint, fingerprint)
        self.checkpoints = Checkpoints(self.dir.checkpoints, own, self.run.host.keep_last, self._claim.fenced)
        return self.checkpoints

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; None if it has not finished."""
        if not self.dir.path.is_dir() or self.dir.state() not in OUTCOMES:
            return None
        return disk.read_json(self.dir.summary)

    def __enter__(self) -> Record:
        kept = {k: v for k, v in self.run.to_dict().items() if k != "host"}  # another host may continue it
        self.dir.create(kept)
        if not self._claimed and (note := self._claim.acquire()):
            logger.warning("%s: %s", self.dir.path, note)
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.ExitStack() as stack:  # each of them, though the disk be full for another
            stack.callback(self._claim.release)
            stack.callback(self.checkpoints.close)
            if self._log is not None:
                stack.callback(self._log.close)

    # ------------------------------------------------------------------------------------- start

    @_fenced
    def begin(self, resume_step: int, provenance: Mapping[str, Any]) -> None:
        """Starts an attempt that continues from `resume_step`, -1 for none: what lies after it is dropped."""
        disk.write_json(self.dir.provenance, provenance)
        self.checkpoints.remove(s for s in self.checkpoints.steps() if s > resume_step)
        for folder in self.dir.closing.glob("*"):
            if int(folder.name) > resume_step:
                shutil.rmtree(folder)
        group = session_group(self.run.arm, self.run.optim.learning_rate, self.phase)
        self._log = MetricsLog(
            self.dir, resume_step=resume_step, hparams=run_hparams(self.run.to_dict()), group=group
        )
        for row in disk.read_jsonl(self.dir.metrics)[0]:
            self._see(row["step"], row)
        notes = [*self.checkpoints.notes, *self._log.notes]
        commit = (provenance.get("git") or {}).get("commit")  # provenance.json is the newest attempt's
        self._attempt = self.dir.begin_attempt(
            step=max(resume_step, 0), commit=commit, notes=notes, **self.about
        )

    # -------------------------------------------------------------------------------------- log

    @property
    def restores(self) -> bool:
        """Whether it ends with its best parameters, so that the last checkpoint is the best one."""
        return self.run.training.restore == "best"

    @property
    def training(self) -> bool:
        """Whether it still is: it has neither diverged nor stopped early."""
        return not self.diverged and (self.standing is None or self.standing.stopped_at is None)

    @property
    def remark(self) -> str:
        """What there is to say of a member whose stage came to nothing; empty if it did not."""
        return self.standing.remark(self.response) if self.restores and self.standing else ""

    def compare_since(self, step: int) -> None:
        """From now on the best evaluation is one of those after `step`: those up to it are of other data."""
        if step != self._since:
            self._since, self.best = step, None

    @property
    def _metrics(self) -> MetricsLog:
        assert self._log is not None, "begin() comes first"
        return self._log

    @_fenced
    def trained(self, step: int, metrics: Mapping[str, float], perf: Mapping[str, Any]) -> None:
        """Writes what was measured in a training step, and how fast they are."""
        self._metrics.write(step, metrics)
        self._metrics.write_perf(step, perf)

    @_fenced
    def stepped(self, step: int, sizes: Mapping[str, int]) -> None:
        """Writes how many of the cohort's steps since the checkpoint before had batches of each size."""
        if sizes:
            self._metrics.write_perf(step, {f"{SIZE}{size}": count for size, count in sizes.items()})

    @_fenced
    def evaluated(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Writes the validation metrics of a step; true if the response is the best so far."""
        row = {f"val/{k}": v for k, v in metrics.items()}
        self._metrics.write(step, row)
        return self._see(step, row)

    def _see(self, step: int, row: Mapping[str, Any]) -> bool:
        value = row.get(self.response)
        if value is None or value != value or step <= self._since:
            return False
        sign = 1 if self.directions[self.response] == "max" else -1
        if self.best is not None and sign * value <= sign * self.best[1]:
            return False
        self.best = (step, float(value))
        return True

    @_fenced
    def keep(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes predictions.npz, as a whole; nothing if there are no arrays."""
        if arrays:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, allow_pickle=False, **arrays)
            disk.write_bytes(self.dir.predictions, buffer.getvalue())

    @_fenced
    def lost(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes that `step` was not finite: the loss has no value there, and the run none after these metrics."""
        if not self.diverged:
            self.diverged = True
            self._metrics.write(step, {"train/loss": None, **metrics})

    @_fenced
    def keep_output(self, step: int, number: int, output: bytes) -> None:
        """Keeps what a batch of the closing metrics of `step` came to, for an attempt that goes on from there."""
        path = self._output(step, number)
        disk.make_private(path.parent)
        disk.write_bytes(path, zlib.crc32(output).to_bytes(4) + output)

    def output(self, step: int, number: int) -> bytes:
        """What `keep_output` was given; empty if it is not there, or damaged."""
        path = self._output(step, number)
        found = path.read_bytes() if path.exists() else b""
        return found[4:] if zlib.crc32(found[4:]).to_bytes(4) == found[:4] else b""

    def _output(self, step: int, number: int) -> Path:
        return self.dir.closing / f"{step:09d}" / str(number)

    def flush(self) -> None:
        """Brings the metrics to the disk; those of a step must be there before its checkpoint."""
        self._metrics.flush()

    def prune(self) -> None:
        """Removes old checkpoints; see `Checkpoints.prune` for when."""
        kept = self.best[0] if self.best and not self.restores else None
        self.checkpoints.prune(kept)

    # ---------------------------------------------------------------------------------------- end

    @_fenced
    def finish(
        self, state: runstore.State, reason: str, step: int, facts: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Writes summary.json and the end of the attempt, after which the run is `finished`; returns the summary."""
        self.checkpoints.wait()
        self.prune()
        rows, _ = disk.read_jsonl(self.dir.metrics)
        perf, _ = disk.read_jsonl(self.dir.perf)
        stats = statistics(rows, self.directions, self._since)
        self._metrics.finish(state, stats)
        seconds = runtable.elapsed(perf)[-1][1]
        best = self.best[0] if self.best else None
        summary = {
            "experiment_name": f"{self.run.study}/{self.run.arm}",
            "run_id": self.id,
            "state": state,
            "steps": step,
            "seed": self.run.seed,
            "response": self.response,
            "statistics": {
                **stats,
                "generalization_gap": gaps(rows),
                "total_steps": step,
                "total_wallclock_time": seconds,
                "total_wallclock_hours": seconds / 3600,
            },
            "metrics_count": len(rows),
            "best_checkpoint": best if best in self.checkpoints.steps() else None,
            **({"best_since": self._since} if self._since >= 0 else {}),
            "perf": _perf(perf),
            **_buckets(perf),
            **facts,
            "config": disk.read_json(self.dir.config),
        }
        disk.write_json(self.dir.summary, summary)
        self.dir.end_attempt(self._attempt, state, reason, step=step)
        self.finished = True
        shutil.rmtree(self.dir.closing, ignore_errors=True)
        return summary

    def done(self, step: int, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Finishes a run that came to its end with its cohort at `step`, or stopped before; returns the summary."""
        if self.standing is None:
            return self.finish("done", "", step, facts)
        stopped, training = self.standing.stopped_at, self.run.training
        own = {
            "stopped_at": stopped,
            "restored_from": self.standing.best_at if self.restores else None,
            "final_checkpoint": step,
            **({"best_checkpoint": step} if self.restores else {}),
            **({"remark": self.remark} if self.remark else {}),
        }
        self.warn()
        if stopped is None:
            return self.finish("done", self.remark, step, {**facts, **own})
        reason = f"stopped early: {training.early_stop} evaluations without a better {self.response}"
        reason = f"{reason}; {self.remark}" if self.remark else reason
        return self.finish("done", reason, stopped, {**facts, **own})

    def warn(self) -> None:
        """Says so if the stage came to nothing."""
        if self.remark and not self.diverged:
            logger.warning("%s: %s", self.dir.path, self.remark)

    @_fenced
    def draw(self) -> None:
        """Writes the views of a finished run: its metrics as tables, its learning rate, its curves.

        What hinders the writing of a file is a warning: the result is safe, and `report` makes what is missing.
        """
        title = f"{self.run.arm}, seed {self.run.seed}"
        for note in views.write(self.dir, title=title, response=self.response):
            logger.warning("%s", note)

    def paused(self) -> str:
        """The stage to whose end the run was trained on purpose; empty if that was not what happened last."""
        rows = self.dir.history()
        return rows[-1].get("paused", "") if rows else ""

    @_fenced
    def interrupted(self, state: runstore.State, reason: str, step: int, **info: Any) -> None:
        """Ends the attempt without a result: preempted, oom, bug. It may have failed before it began."""
        if self._log is not None:
            self._log.finish(state, {})
        if not self._attempt and "paused" in info and self.paused():
            return  # it was at the end of the stage already, and says so
        if not self._attempt:
            self._attempt = self.dir.begin_attempt(step=step, **self.about)
        if state == "oom" and self.about.get("members") == 1 and "unsplittable" in self.about:
            reason = f"{reason}; and it cannot be split: {self.about['unsplittable']}"
        if state == "preempted" and self.dir.state() == "cancelled":
            state = "cancelled"  # `cancel` marked the run, and then asked this process to stop
        self.dir.end_attempt(self._attempt, state, reason, step=step, **info)


def equally_far(records: Sequence[Record]) -> list[list[Record]]:
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


def take(records: list[Record], stack: contextlib.ExitStack, frozen: bool) -> list[list[int]]:
    """Claims the members that have not finished; their places in `records`, in groups that train together.

    The claims are given back when `stack` is left. Of a `frozen` study the launcher declares the columns.
    """
    left = [stack.enter_context(record) for record in records if record.summary() is None]
    left = [record for record in left if record.summary() is None]  # now that nobody else can finish it
    if left and not frozen:
        declare(left)
    return [[records.index(record) for record in group] for group in equally_far(left)]


def declare(records: Sequence[Record]) -> None:
    """The columns of TensorBoard's hparams page, from all runs that are there; without them the runs go on."""
    study = records[0].dir.path.parents[1]
    try:
        configs = [disk.read_json(path) for path in sorted(study.glob("*/*/config.json"))]
        declare_experiment(study, configs, records[0].response)
    except (OSError, UserError) as error:
        logger.warning("%s: TensorBoard's hparams page lacks its columns: %s", study, error)


def _buckets(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Steps by size of batch, of a run that had several; nothing of others."""
    steps = Counter[str]()
    for row in rows:
        steps.update({key.removeprefix(SIZE): row[key] for key in row if key.startswith(SIZE)})
    return {"buckets": dict(sorted(steps.items()))} if steps else {}


def _perf(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over all attempts; of compile time the sum, of memory the largest."""

    def values(name: str) -> list[float]:
        return [row[f"perf/{name}"] for row in rows if row.get(f"perf/{name}") is not None]

    rates = ("steps_per_sec", "step_ms", "examples_per_sec", "tokens_per_sec", "mfu")
    medians = {name: median(found) if (found := values(name)) else None for name in rates}
    return {
        **medians,
        "compile_sec": sum(values("compile_sec")),
        "peak_bytes": max(values("peak_bytes"), default=None),
    }
