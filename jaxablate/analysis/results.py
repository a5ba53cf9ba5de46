"""What a study's runs gave: one value of each response per run. All of the analysis starts from here.

`load` reads it from run directories, `from_csv` from a plain table of any other framework.
Imports no jax.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jaxablate import disk, runstore
from jaxablate.analysis import benchmarks
from jaxablate.analysis.benchmarks import BatchBenchmark, StepBenchmark
from jaxablate.analysis.curves import Rows
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest, read_rates
from jaxablate.runstore import OUTCOMES, RunDir, State
from jaxablate.study import Phase, Response, Study

Condition = State | Literal["unreadable"]  # the last: a damaged history, of which nobody can tell the state


@dataclass(frozen=True)
class Nothing:
    """What a predictor that knows nothing scored, and in which metric a run recorded it."""

    metric: str
    value: float


@dataclass(frozen=True)
class Result:
    """One run. `values` has a key for every response; None where the run has no such number."""

    arm: str
    seed: int
    state: Condition
    values: Mapping[str, float | None]  # of time_to: steps; None if the target was not reached
    phase: Phase = "confirm"
    run_id: str = ""
    learning_rate: float | None = None
    seconds: Mapping[str, float | None] = field(
        default_factory=dict
    )  # of time_to: training time, no compilation
    steps: int | None = None  # that the run made: where a target that was not reached is censored
    diverged_at: int | None = None
    stopped_at: int | None = None  # if its response did not improve; it is done, and trained no further
    parameters: int | None = None
    perf: Mapping[str, Any] = field(default_factory=dict)  # medians, as in summary.json
    kernels: Mapping[str, str] = field(default_factory=dict)
    hardware: str = ""
    cohort_size: int = 1
    finals: Mapping[str, float | None] = field(
        default_factory=dict
    )  # last value of each metric with a direction
    statistics: Mapping[str, Any] = field(default_factory=dict)  # as in summary.json
    response: str = ""  # the metric that its best checkpoint went by
    nothing: Mapping[str, Nothing] = field(default_factory=dict)  # by metric: what stands beside it
    accumulation: int = 1  # micro-batches of an update, more than declared if memory ran out
    started: str | None = None  # when its first attempt began, ISO 8601; None if nobody recorded it
    reason: str = ""  # why it is in its state, of one that did not finish
    unread: str = ""  # of a run that finished: why its numbers cannot be read, so that it has none
    dir: RunDir | None = None
    rows: Rows = field(default=(), repr=False, compare=False)  # of metrics.jsonl
    perf_rows: Rows = field(default=(), repr=False, compare=False)  # of perf.jsonl

    @property
    def without_result(self) -> bool:
        """Has not ended, failed, or cannot be read. Divergence is a result."""
        return self.state not in OUTCOMES or bool(self.unread)


@dataclass(frozen=True)
class Results:
    """All runs of a study, with the declaration they answer to."""

    study: Study
    runs: tuple[Result, ...]
    path: Path | None = None  # the study's directory; None for a table
    plan_hash: str = ""  # as locked
    locked: str | None = None  # when it was locked; None: never
    amendments: tuple[Mapping[str, Any], ...] = ()
    rates: Mapping[str, Any] = field(default_factory=dict)  # arm -> its tuned rate with the evidence
    default_rates: Mapping[str, float] = field(default_factory=dict)  # arm -> its rate before any tuning
    targets: Mapping[str, float | None] = field(default_factory=dict)  # of time_to responses, as numbers
    notes: tuple[str, ...] = ()  # what could not be read, in words
    source: str = ""  # of a table: its file
    benchmarks: tuple[StepBenchmark, ...] = ()  # of the steps, one for each hardware
    batches: tuple[BatchBenchmark, ...] = ()  # largest batches, one for each hardware

    @cached_property
    def confirm(self) -> tuple[Result, ...]:
        """The runs that results are reported on: none that tuned a rate."""
        return tuple(run for run in self.runs if run.phase == "confirm")

    def of(self, arm: str) -> tuple[Result, ...]:
        """The confirmatory runs of an arm, by seed."""
        return tuple(sorted((run for run in self.confirm if run.arm == arm), key=lambda run: run.seed))

    def values(self, arm: str, response: str) -> dict[int, float]:
        """seed -> value of an arm's finished runs that have one."""
        known = {run.seed: run.values.get(response) for run in self.of(arm) if run.state == "done"}
        return {seed: value for seed, value in known.items() if value is not None}


def load(manifest: Manifest) -> Results:
    """The results of a study from its run directories; a damaged run has no values, and a note says why."""
    notes: list[str] = []
    measured, largest = benchmarks.read(manifest.path, notes)
    raw = [_Raw.read(manifest.run_dir(run), notes) for run in manifest.runs]
    study, runs = manifest.study, manifest.runs
    targets = {}
    for response in study.responses:
        if response.reduce == "time_to":
            own = [
                best
                for run, found in zip(runs, raw, strict=True)
                if run.arm == study.baseline and run.phase == "confirm" and found.state == "done"
                if (best := _best(found, response)) is not None
            ]
            targets[response.name] = _target(response, own)
    results = []
    for run, found in zip(runs, raw, strict=True):
        values = {r.name: _reduce(found, r, targets) for r in study.responses}
        summary = found.summary
        results.append(
            Result(
                arm=run.arm,
                seed=run.seed,
                state=found.state,
                values=values,
                phase=run.phase,
                run_id=run.id,
                learning_rate=run.learning_rate,
                seconds={
                    r.name: _seconds(found.perf_rows, values[r.name])
                    for r in study.responses
                    if r.reduce == "time_to"
                },
                steps=summary.get("steps"),
                diverged_at=(summary.get("diverged") or {}).get("step"),
                stopped_at=summary.get("stopped_at"),
                parameters=(summary.get("parameters") or {}).get("total"),
                perf=summary.get("perf", {}),
                kernels=summary.get("kernels", {}),
                hardware=summary.get("hardware", ""),
                cohort_size=summary.get("cohort_size", 1),
                accumulation=summary.get("accumulation", 1),
                finals={
                    k: s["final"]
                    for k, s in summary.get("statistics", {}).items()
                    if isinstance(s, Mapping) and "best" in s
                },
                statistics=summary.get("statistics", {}),
                response=summary.get("response") or study.response().metric,
                nothing=knowing_nothing(summary),
                started=found.started,
                reason=found.reason,
                unread=found.unread if found.state != "diverged" else "",
                dir=manifest.run_dir(run),
                rows=found.rows,
                perf_rows=found.perf_rows,
            )
        )
    return Results(
        study=study,
        runs=tuple(results),
        path=manifest.path,
        plan_hash=manifest.plan_hash,
        locked=manifest.locked,
        amendments=manifest.amendments,
        rates=read_rates(manifest.path),
        default_rates={arm: config["optim"]["learning_rate"] for arm, config in manifest.configs.items()},
        targets=targets,
        notes=tuple(notes),
        benchmarks=measured,
        batches=largest,
    )


def knowing_nothing(summary: Mapping[str, Any]) -> dict[str, Nothing]:
    """By metric: what a run's summary says of a predictor that knows nothing, as far as it has a value."""
    found = {}
    for metric, other in summary.get("beside", {}).items():
        value = summary["statistics"].get(other.replace("/", "_"), {}).get("final")
        if value is not None:
            found[metric] = Nothing(other, value)
    return found


@dataclass(frozen=True)
class _Raw:
    """The files of one run, as far as they are there."""

    state: Condition
    started: str | None = None
    reason: str = ""  # of the last state
    summary: Mapping[str, Any] = field(default_factory=dict)
    rows: Rows = ()
    perf_rows: Rows = ()
    unread: str = ""

    @classmethod
    def read(cls, where: RunDir, notes: list[str]) -> _Raw:
        state, started, reason = "unreadable", None, ""
        try:
            history = where.history()
            state = history[-1]["state"] if history else "pending"
            started = next((row.get("time") for row in history if row["state"] == "running"), None)
            reason = str(history[-1].get("reason", "")) if history else ""
            if state not in OUTCOMES:
                return cls(state, started, reason)
            summary, rows = disk.read_json(where.summary), runstore.read_steps(where.metrics)[0]
            return cls(state, started, reason, summary, rows, runstore.read_steps(where.perf)[0])
        except UserError as error:
            notes.append(f"left out: {error}")
            return cls(state, started, unread=str(error))


def _points(rows: Rows, metric: str) -> list[tuple[int, float]]:
    return [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]


def _best(found: _Raw, response: Response) -> float | None:
    since = found.summary.get("best_since", -1)  # what was evaluated up to there is of other data
    values = [value for step, value in _points(found.rows, response.metric) if step > since]
    return (max if response.direction == "max" else min)(values, default=None)


def _target(response: Response, baseline_bests: Sequence[float]) -> float | None:
    if response.target is not None:
        return response.target
    if not baseline_bests or response.fraction is None or response.chance is None:
        return None
    return response.chance + response.fraction * (statistics.fmean(baseline_bests) - response.chance)


def _reduce(found: _Raw, response: Response, targets: Mapping[str, float | None]) -> float | None:
    """The number that a run's rows come to; None for a run that diverged or cannot be read."""
    if found.state != "done" or found.unread:
        return None
    if response.metric.startswith("perf/"):
        return found.summary.get("perf", {}).get(response.metric.removeprefix("perf/"))
    points = _points(found.rows, response.metric)
    if response.reduce == "best":
        return _best(found, response)
    stopped = found.summary.get("stopped_at")
    if response.reduce == "at" and (stopped is None or response.step <= stopped):
        return dict(points).get(response.step)
    if response.reduce == "time_to":
        target = targets[response.name]
        sign = 1 if response.direction == "max" else -1
        reached = (s for s, v in points if target is not None and sign * (v - target) >= 0)
        return next(reached, None)
    # A metric whose last value was not finite has no final one. What a run ended with, having stopped before the
    # step that is asked for, is what it has there.
    last = [row[response.metric] for row in found.rows if response.metric in row][-1:]
    return last[0] if last else None


def _seconds(rows: Iterable[Mapping[str, Any]], step: float | None) -> float | None:
    """Training time up to `step` by the recorded rates of each stretch; compilation and evaluation apart."""
    if step is None:
        return None
    total, last = 0.0, 0
    for row in rows:
        rate = row.get("perf/steps_per_sec")
        if rate:
            end = min(row["step"], step)
            total += max(end - last, 0) / rate
            last = max(last, int(end))
    return total if last else None
