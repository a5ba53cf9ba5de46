"""A task of a job array: `python -m jaxablate.schedule.slurm.element STUDY_DIR SUBMISSION`, called by launch/*.sbatch.

It is the batch step itself, so the signal of --signal=B: reaches it, and it is a launcher of its element's runs:
what `jaxablate run` is to a study. Stopped by a signal it puts exactly itself back into the queue.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxablate import config
from jaxablate.config import HostConfig, RunConfig
from jaxablate.errors import UserError
from jaxablate.leases import LEASE_S
from jaxablate.manifest import Manifest, read_rates
from jaxablate.runstore import OUTCOMES
from jaxablate.schedule import on_finish, workers
from jaxablate.schedule.launcher import TAKEN, Launcher, Limits
from jaxablate.schedule.local import no_room_is_said
from jaxablate.schedule.signals import Signals
from jaxablate.schedule.slurm import chain
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm.job import Job
from jaxablate.schedule.slurm.submission import Element, Submission
from jaxablate.schedule.survey import Selection, Survey
from jaxablate.schedule.table import View
from jaxablate.schedule.workers import DIRECT, Command
from jaxablate.stopping import EXIT_AGAIN, EXIT_TAKEN
from jaxablate.structure import from_mapping
from jaxablate.study import Run

EPILOG = (
    "exit codes: 0 done, 1 some runs failed or what it waited for did, 2 bad input, 75 stopped and requeued, "
    "76 another process has its runs"
)
_FAILED = 1
_SHOWN = 3  # reasons in one line


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, works on the element; returns the exit code."""
    with Signals("first") as signals:  # first of all: what comes during the imports of a task counts too
        parser = argparse.ArgumentParser(
            "python -m jaxablate.schedule.slurm.element", None, "Work on one element of a submission.", EPILOG
        )
        parser.allow_abbrev = False
        parser.add_argument("study", metavar="STUDY_DIR", help="the directory of a study")
        parser.add_argument(
            "submission", metavar="SUBMISSION", help="a folder of STUDY_DIR/slurm, by its name"
        )
        parser.add_argument("--first", type=int, default=0, metavar="N", help="the element of task 0")
        parser.add_argument("--over-nodes", action="store_true", help="one program over all nodes of the job")
        parser.add_argument("--finish", action="store_true", help="call the submission's --on-finish, once")
        args = parser.parse_args(argv)
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
        logging.getLogger("jaxablate").setLevel(logging.INFO)
        study = Path(args.study).resolve()
        try:
            submission = records.read(study, args.submission)
            if args.finish:
                return 0 if submission.state == "withdrawn" else finish(study, submission)
            job = Job.here()
            element = _element(submission, args.first + job.task)
            attempt = Attempt(study, submission, element, job)
            if submission.state == "withdrawn":
                return attempt.withdrawn()
            return attempt.run(signals, _command(args, element, job))
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2


def _element(submission: Submission, index: int) -> Element:
    if not 0 <= index < len(submission.elements):
        last = len(submission.elements) - 1
        raise UserError(f"element {index}: submission {submission.id} has 0 to {last}; mend --array")
    return submission.elements[index]


def _command(args: argparse.Namespace, element: Element, job: Job) -> Command:
    if not args.over_nodes:
        return dataclasses.replace(DIRECT, until=element.stage)
    cpus = [f"--cpus-per-task={job.cpus}"] if job.cpus else []  # which srun no longer takes from the job
    return Command(("srun", "--kill-on-bad-exit=1", "--export=ALL", *cpus), element.stage)


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One start of an element."""

    study: Path
    submission: Submission
    element: Element
    job: Job

    def run(self, signals: Signals, command: Command) -> int:
        """Works on the element and says how that ended; returns the exit code."""
        with contextlib.suppress(FileNotFoundError):  # gone since: tasks of one's own may be installed too
            os.chdir(self.submission.folder)
        if "" not in sys.path:
            sys.path.insert(0, "")
        try:
            with no_room_is_said(str(self.study)):
                self._note("running")
                return self._work(signals, command)
        except UserError as error:
            with contextlib.suppress(OSError):  # of the same full disk
                self._note("failed", str(error))
            raise

    def withdrawn(self) -> int:
        """For what SLURM accepted without `submit` hearing of it: it trains nothing, since others may."""
        return self._end("cancelled", "the submission was withdrawn", _FAILED)

    def _work(self, signals: Signals, command: Command) -> int:
        most = self.submission.site["max_attempts"]
        if self.job.starts > most:
            return self._end("failed", f"started {self.job.starts} times; max_attempts is {most}", _FAILED)
        manifest = Manifest.load(self.study)
        lost = chain.lost(manifest, self.submission, self.element)
        selection = self._selection(manifest, lost)
        if selection is None:
            return self._did_not_start(lost)
        survey = Survey(self.submission.time, most, chain.until(self.submission, self.element))
        devices = [""] if command.prefix else workers.gpus() or [""]
        members, split = self._members(manifest, len(devices)), self.element.split
        limits = Limits(devices, members, "go on", most, LEASE_S, split=split)
        launcher = Launcher(
            manifest, self._resolved(manifest), selection, limits, View(str(self.job)), command, survey
        )
        launcher.run(signals)
        return self._conclude(launcher, lost)

    def _conclude(self, launcher: Launcher, lost: dict[Run, str]) -> int:
        """What has become of the runs, from their directories."""
        own = self.element.runs_of(launcher.manifest)
        looks = {run: launcher.survey.look(launcher.manifest, run) for run in own}
        left = [run for run, look in looks.items() if not chain.well(look)]
        if own and not left:
            return self._end("paused" if self.element.stage else "done", "", 0)
        if launcher.stopping == TAKEN:
            return self._end("duplicate", "another process has its runs, and goes on with them", EXIT_TAKEN)
        if launcher.stopping and (not own or any(looks[run].next == "train" for run in left)):
            return self._again(launcher.stopping)
        if not own:
            return self._no_rate()
        reasons = [lost.get(run) or f"{looks[run].state}: {looks[run].reason}" for run in left]
        return self._end("failed", f"{len(left)} of {len(own)} runs: {_few(reasons)}", _FAILED)

    def _did_not_start(self, lost: dict[Run, str]) -> int:
        if not lost:  # and yet there is nothing to go on with
            return self._no_rate()
        return self._end("failed", f"did not start: {_few(lost.values())}", _FAILED)

    def _no_rate(self) -> int:
        rate = read_rates(self.study).get(self.element.arm, {})
        if rate and rate["learning_rate"] is None:
            return self._end("done", "no learning rate was stable", 0)
        return self._end("failed", f"no learning rate is chosen for {self.element.arm}", _FAILED)

    def _again(self, why: str) -> int:
        """Stopped: back into the queue, unless somebody meant it to end, or it was there too often."""
        fate = self.job.fate()
        if fate == "cancelled":
            return self._end("cancelled", f"{why}: its job was cancelled", EXIT_AGAIN)
        most = self.submission.site["max_attempts"]
        if self.job.starts >= most:
            reason = f"{why}: stopped {self.job.starts} times; max_attempts is {most}"
            return self._end("failed", reason, _FAILED)
        self._note("stopped", why)  # before: the controller ends this process as it requeues it
        if fate == "ours" and (problem := self.job.requeue()):
            return self._end("stopped", f"{why}, and not requeued: {problem}; submit it again", EXIT_AGAIN)
        return EXIT_AGAIN

    # ---------------------------------------------------------------------------------- what it works on

    def _selection(self, manifest: Manifest, lost: dict[Run, str]) -> Selection | None:
        """The runs that can be trained now; None if what came before leaves nothing to do.

        Without all of its tuning runs an arm gets no rate; a stage goes on with the runs that are ready.
        """
        arms, seeds = frozenset({self.element.arm}), frozenset(self.element.seeds)
        tunes = any(run.phase == "tuning" for run in lost)
        if not self.element.runs and not self._follows_a_stage():
            return None if tunes else Selection(arms, seeds)
        ready = [run.index for run in self.element.runs_of(manifest) if run not in lost]
        return Selection(arms, seeds, given=frozenset(ready)) if ready else None

    def _follows_a_stage(self) -> bool:
        return any(
            self.submission.elements[index].phase == self.element.phase for index in self.element.after
        )

    def _members(self, manifest: Manifest, places: int) -> dict[Any, int]:
        """Members of a cohort at most: as it was cut, else all, shared by the GPUs. The same at each attempt."""
        rule, limit = manifest.study.learning_rate, self.element.members or self.submission.max_members
        runs = len(self.element.runs or self.element.seeds)
        tuning = runs if self.element.runs or rule is None else len(rule.tuning_seeds)
        return {"confirm": limit or -(-runs // places), "tuning": limit or -(-tuning // places)}

    def _resolved(self, manifest: Manifest) -> dict[str, RunConfig[Any, Any]]:
        """The config of its arm, as it was frozen, if confirmations may be added at the rate to be chosen."""
        if self.element.runs or manifest.study.learning_rate is None:
            return {}
        run = next(run for run in manifest.runs if run.arm == self.element.arm)
        host = from_mapping(HostConfig, {**manifest.host, "workdir": str(self.study.parent)}, "config.host.")
        return {run.arm: config.from_dict(manifest.config_of(run), host)}

    # ------------------------------------------------------------------------------------------- rows

    def _note(self, state: str, reason: str = "") -> None:
        about = {"restart": self.job.restart, "job": str(self.job), "node": self.job.node}
        records.log_row(
            self.study, self.submission.id, self.element.index, state=state, reason=reason, **about
        )

    def _end(self, state: str, reason: str, code: int) -> int:
        self._note(state, reason)
        if reason:
            sys.stderr.write(f"element {self.element.index} {state}: {reason}\n")
        return code


def finish(study: Path, submission: Submission) -> int:
    """Calls the program of `--on-finish`, once, however often its job is started.

    A study that cannot be read is an end too, with code 2. What tells the next start that the call was made is
    written just before it: whatever ends this process earlier leaves the call to that one.
    """
    try:
        code = 0 if _all_ended(study, submission) else _FAILED
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        code = 2
    try:
        (records.folder_of(study, submission.id) / "finished").open("x").close()
    except FileExistsError:
        return 0
    except OSError as error:  # of a full disk, say: twice is better than never
        sys.stderr.write(f"on-finish: {error.filename}: {error.strerror}; it may be called again\n")
    on_finish.call(submission.on_finish, study, code)
    return 0


def _all_ended(study: Path, submission: Submission) -> bool:
    """Whether every run of a submission has its outcome."""
    manifest, survey = Manifest.load(study), Survey("", sys.maxsize)
    own = [element.runs_of(manifest) for element in submission.elements]
    return all(runs and all(survey.look(manifest, run).state in OUTCOMES for run in runs) for runs in own)


def _few(reasons: Any) -> str:
    """The different reasons, the first ones in words."""
    different = list(dict.fromkeys(reasons))
    more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    return "; ".join(different[:_SHOWN]) + more


if __name__ == "__main__":
    sys.exit(main())
