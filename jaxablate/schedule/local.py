"""Running a study on this machine: freeze it, tune the learning rates, lock the plan, train what is left."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxablate import config, tuning
from jaxablate.config import RunConfig, canonical
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest, as_read, read_rates
from jaxablate.runstore import OUTCOMES, State, now
from jaxablate.schedule import cohorts, workers
from jaxablate.schedule.asked import Launch
from jaxablate.schedule.launcher import A_FAILURE, Launcher, Limits
from jaxablate.schedule.marks import cancel, make_pending, retry
from jaxablate.schedule.plan import follow, machine
from jaxablate.schedule.plan.plan import Plan
from jaxablate.schedule.retries import PENDING
from jaxablate.schedule.survey import Selection, Survey, taken_by, to_come, without_rate
from jaxablate.schedule.table import View
from jaxablate.stopping import EXIT_AGAIN
from jaxablate.study import Phase, Run, Study

__all__ = ["Ended", "RunOptions", "cancel", "dry_run", "retry", "run_study"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@dataclass(frozen=True)
class RunOptions(Launch):
    """What of a study to run, and how.

    Without `max_members` a cohort is all runs of an arm and phase, or with several GPUs their share of them.
    """

    on_failure: Literal["go on", "stop"] = "go on"
    workers: int = 0  # 0: one per GPU, or two on the CPU
    retries: int = 3  # of a run that was interrupted

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("workers", "retries"):
            if (value := getattr(self, name)) < 0:
                raise UserError(f"--{name}={value}: must be 0 or more")
        if self.plan is not None and self.workers:
            raise UserError(
                f"--workers={self.workers}: not allowed with --gpus, which says it; drop one of them"
            )


@dataclass(frozen=True)
class Failure:
    """A run without a result, and why."""

    run: Run
    state: State
    reason: str
    log: str  # relative to the study's directory; empty if it has none


@dataclass(frozen=True)
class Ended:
    """How `run` ended, over the runs that it was about."""

    path: Path
    counts: Mapping[State, int]
    failures: tuple[Failure, ...]
    notes: tuple[str, ...]  # what a reader must know: rates at an edge, arms that have to wait
    exit_code: int  # 0: every run has an outcome, 1: some have none, 75: stopped

    def to_dict(self) -> dict[str, Any]:
        """As data, for `--json`."""
        failures = [
            {"arm": f.run.arm, "run": f.run.id, "state": f.state, "reason": f.reason, "log": f.log}
            for f in self.failures
        ]
        return {
            "study": str(self.path),
            "runs": dict(self.counts),
            "failures": failures,
            "notes": list(self.notes),
            "exit_code": self.exit_code,
        }

    def text(self) -> str:
        """In a few lines."""
        counts = ", ".join(f"{count} {state}" for state, count in self.counts.items()) or "no runs"
        lines = [f"{self.path}: {counts}"]
        for f in self.failures:
            log = f" (see {self.path / f.log})" if f.log else ""
            lines.append(
                f"  {f.state}: {f.run.arm} seed {f.run.seed} at {f.run.learning_rate:g}: {f.reason}{log}"
            )
        lines += [f"  note: {note}" for note in self.notes]
        if self.exit_code == EXIT_AGAIN:
            lines.append("stopped; run the same command to go on")
        elif self.failures:
            lines.append("when the cause is mended, `jaxablate retry` lets these be run again")
        return "\n".join(lines)


def run_study(study: Study, options: RunOptions) -> Ended:
    """Runs what is left of a study, and returns when that is done or was stopped.

    Raises:
      UserError: anything that is wrong with the study, the options or the working directory.
    """
    selection = options.selection(study)
    if study.learning_rate is not None:
        tuning.tuning_response(study)
    devices = _devices(options)
    if (frozen := _unchanged(study)) is not None and _nothing_left(frozen, selection):
        return _outcome(frozen, selection, "", options.plan)
    resolved = resolve(study)
    with no_room_is_said(study.name):
        manifest = Manifest.freeze(study, resolved)
        survey = Survey("", options.retries)
        selection = dataclasses.replace(selection, before=survey.failed(manifest))
        if selection.only == "failed":
            make_pending(manifest, selection.runs(manifest))
        most = _most(manifest, selection, options, devices)
        limits = Limits(devices, most, options.on_failure, options.retries, plan=options.plan)
        launcher = Launcher(manifest, resolved, selection, limits, View(study.title or study.name))
        launcher.run()
    return _outcome(launcher.manifest, selection, launcher.stopping, options.plan)


def directory(study: Study) -> Path:
    """Where a study that is declared keeps its files, whether or not it has been run."""
    assert study.base is not None, "a study that is run has its base config"
    return Path(study.base.to_dict()["host"]["workdir"]) / study.name


@contextlib.contextmanager
def no_room_is_said(name: str) -> Iterator[None]:
    """A full or read-only disk is no fault of the program: one line, and what was there is there still."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        where = error.filename or name
        raise UserError(
            f"{where}: {error.strerror}; make room or use another --workdir, then run again"
        ) from None


def dry_run(study: Study, options: RunOptions) -> str:
    """What `run_study` would train, in words. Writes nothing.

    Raises:
      UserError: what `run_study` would raise before the first run.
    """
    selection = options.selection(study)
    devices = _devices(options)
    manifest = Manifest.preview(study, resolve(study))
    survey = Survey(now(), options.retries)  # a new launch: what interrupted earlier ones does not count
    selection = dataclasses.replace(selection, before=survey.failed(manifest))
    looks = {run: survey.look(manifest, run) for run in manifest.runs}
    runs = selection.runs(manifest)
    taken = {run for run in runs if looks[run].state not in OUTCOMES and taken_by(manifest, run)}
    if selection.only == "failed":
        looks |= dict.fromkeys(runs, PENDING)
    todo = [run for run in runs if run not in taken and looks[run].next == "train"]
    if options.plan is not None:
        looks = follow.company(options.plan, looks)
    jobs = cohorts.plan(todo, looks, _most(manifest, selection, options, devices))
    if options.plan is not None:
        jobs = follow.ordered(options.plan, jobs)
    counts = ", ".join(f"{n} {state}" for state, n in Counter(looks[run].state for run in runs).items())
    lines = [f"{manifest.path}: {len(runs)} runs{': ' if counts else ''}{counts}"]
    where = f"on GPU {', '.join(devices)}" if devices[0] else "on the CPU"
    lines += [f"would train {len(todo)} runs in {len(jobs)} cohorts, {len(devices)} at a time {where}"]
    lines += [f"  {job}" for job in jobs]
    if taken:
        lines.append(f"{len(taken)} runs are left to another process, which works on them")
    if later := to_come(manifest, selection):
        assert study.learning_rate is not None
        lines.append(f"then {later} confirmatory runs at the rates that {study.learning_rate.rule} chooses")
    return "\n".join([*lines, "nothing was written"])


def resolve(study: Study) -> dict[str, RunConfig[Any, Any]]:
    """arm -> its resolved config. Imports the study's task, and with it jax."""
    return {arm.name: config.resolve(study.config(arm.name)).base for arm in study.arms}


# ------------------------------------------------------------------------------------- internals


def _devices(options: RunOptions) -> list[str]:
    """One entry per worker: a GPU, or "" for the CPU."""
    gpus = workers.gpus()
    if options.plan is not None:
        return follow.devices(options.plan, gpus)
    if gpus and options.workers > len(gpus):
        raise UserError(f"--workers={options.workers}: there are {len(gpus)} GPUs, and each takes one worker")
    if gpus:
        return gpus[: options.workers or len(gpus)]
    return [""] * (options.workers or machine.CPU_PROCESSES)


def _most(
    manifest: Manifest, selection: Selection, options: RunOptions, devices: Sequence[str]
) -> dict[Phase, int]:
    """Members of a cohort at most."""
    places = len(set(devices))  # on a CPU all of them are one
    return cohorts.most(
        manifest.study, len(selection.arms), len(selection.seeds), places, options.max_members
    )


def _unchanged(study: Study) -> Manifest | None:
    """The frozen study if it is what `study` declares, value by value; found out without importing jax."""
    path = directory(study)
    if not (path / "study.json").is_file():
        return None
    manifest = Manifest.load(path)
    if canonical(manifest.study.to_dict()) != canonical(as_read(study).to_dict()):
        return None
    for arm in study.arms:
        declared = study.config(arm.name).to_dict()
        values = config.recorded(declared)
        kept = {key: value for key, value in values.items() if key not in ("seeds", "host")}
        if arm.name not in manifest.configs or canonical(kept) != canonical(manifest.configs[arm.name]):
            return None
    return manifest


def _nothing_left(manifest: Manifest, selection: Selection) -> bool:
    """Whether every run of the selection has its outcome, the runs at rates still to choose included."""
    survey = Survey("", 0)
    whole = dataclasses.replace(selection, only="all")
    ended = all(survey.look(manifest, run).state in OUTCOMES for run in whole.runs(manifest))
    return ended and not to_come(manifest, whole)


def _outcome(manifest: Manifest, selection: Selection, stopping: str, plan: Plan | None = None) -> Ended:
    """Read from the disk, so that it holds whoever trained the runs."""
    counts: Counter[State] = Counter()
    failures = []
    for run in selection.runs(manifest):
        try:
            rows = manifest.run_dir(run).history()
        except UserError as error:
            counts["bug"] += 1
            failures.append(Failure(run, "bug", f"unreadable: {error}", ""))
            continue
        state: State = rows[-1]["state"] if rows else "pending"
        counts[state] += 1
        if state not in (*OUTCOMES, "pending", "running") and not (stopping and state == "preempted"):
            log = next((row["log"] for row in reversed(rows) if row.get("log")), "")
            failures.append(Failure(run, state, rows[-1].get("reason", ""), log))
    rates = read_rates(manifest.path)
    notes = [tuning.warning(arm, rates[arm]) for arm in sorted(selection.arms & rates.keys())]
    waiting = to_come(manifest, selection)
    if waiting and not stopping:
        arms = ", ".join(sorted(without_rate(manifest, selection)))
        notes.append(f"no rate is chosen for {arms}: a tuning run has no result yet")
    if plan is not None and plan.dropped:
        seeds = ", ".join(map(str, plan.dropped))
        notes.append(
            f"seeds left out of every arm for the deadline: {seeds}; without --deadline they are run too"
        )
    if plan is not None:
        notes += plan.warnings
    stopped = stopping not in ("", A_FAILURE)
    complete = all(state in OUTCOMES for state in counts) and not waiting
    code = EXIT_AGAIN if stopped else 0 if complete else 1
    return Ended(manifest.path, dict(counts), tuple(failures), tuple(filter(None, notes)), code)
