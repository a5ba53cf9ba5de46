"""`jaxablate submit`: freezes a study, hands what is left of it to SLURM, and leaves.

All of a submission is accepted, or nothing of it stays in the queue. Its record is on disk before the first array
is handed over; after a crash the next `submit` finds the arrays again by the comment that each carries.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxablate import disk, runstore, tuning
from jaxablate.claims import Claim
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.schedule.local import no_room_is_said, resolve
from jaxablate.schedule.retries import Outlook
from jaxablate.schedule.slurm import cluster, elements, left, queue
from jaxablate.schedule.slurm import site as sites
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm.cluster import Room
from jaxablate.schedule.slurm.elements import Work
from jaxablate.schedule.slurm.left import Mode, Queued, SubmitOptions
from jaxablate.schedule.slurm.queue import SlurmError
from jaxablate.schedule.slurm.sbatch import OWN_VARIABLES, finish_argv, sbatch_argv
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import Submission
from jaxablate.schedule.survey import Selection, Survey, without_rate
from jaxablate.study import Run, Study

logger = logging.getLogger(__name__)

_UNSETTLED = "the next `jaxablate submit` completes what SLURM has of it, or takes it back"


@dataclass(frozen=True)
class Submitted:
    """What was submitted, or would be."""

    path: Path
    submission: Submission | None  # None if nothing is left to submit
    commands: tuple[
        tuple[str, ...], ...
    ]  # for sbatch; `JOBn` stands for the job of array n before it has one
    script: str
    notes: tuple[str, ...]
    mode: Mode
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As data, for `--json`."""
        record = None if self.submission is None else dataclasses.asdict(self.submission)
        commands = [list(argv) for argv in self.commands]
        return {"study": str(self.path), "mode": self.mode, "submission": record, "commands": commands,
                "script": self.script, "notes": list(self.notes)}  # fmt: skip

    def text(self) -> str:
        """In a few lines; of a dry run the command lines and the script to the letter."""
        lines = [f"{self.path}: {self._what()}"]
        lines += [f"  {note}" for note in self.notes]
        if self.submission is None or self.mode == "submit":
            return "\n".join(lines)
        lines += ["", *(shlex.join(argv) for argv in self.commands)]
        if self.mode == "dry run":
            lines += ["", self.script.rstrip(), "", "nothing was submitted or written"]
        return "\n".join(lines)

    def _what(self) -> str:
        if self.submission is None:
            return "nothing to submit"
        count, arrays = len(self.submission.elements), len(self.submission.arrays)
        size = f"{count} element{'s' * (count > 1)} in {arrays} array{'s' * (arrays > 1)}"
        if self.mode == "dry run":
            return f"would submit {size}"
        if self.mode == "prepare":
            return f"submission {self.submission.id} is frozen, {size}; to submit it:"
        jobs = ", ".join(map(str, self.submission.jobs()))
        return f"submission {self.submission.id}: {size}, jobs {jobs}"


def submit(study: Study, site: Site, options: SubmitOptions, mode: Mode = "submit") -> Submitted:
    """Submits what is left of a study and is not queued already; returns when SLURM has accepted all of it.

    Args:
      mode: `prepare` freezes the study and the elements and leaves sbatch to the user; a dry run writes nothing.

    Raises:
      UserError: anything that is wrong with the study, the options or the directory; SLURM is absent, does
        not answer, or refuses, in which case nothing of this submission stays queued.
    """
    selection = options.selection(study)
    if study.learning_rate is not None:
        tuning.tuning_response(study)
    if records.FOLDER in selection.arms:
        raise UserError(
            f"arm '{records.FOLDER}': its directory is where submissions are kept; rename the arm"
        )
    notes: list[str] = []
    room = left.room(site, mode, notes)
    resolved = resolve(study)
    chained = left.chains(resolved, options)
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_room_is_said(study.name))
        if mode == "dry run":
            manifest = Manifest.preview(study, resolved)
        else:
            manifest = Manifest.freeze(study, resolved)
            folder = manifest.path / records.FOLDER
            disk.make_private(folder)
            stack.enter_context(Claim(folder / "submitting.json", "the submission of the study"))
            recover(manifest.path)
        todo = left.work(manifest, selection, options, notes, mode)
        levels = left.levels(todo, site, options, chained, room)
        if not levels:
            return Submitted(manifest.path, None, (), "", tuple(notes), mode)
        state = "prepared" if mode == "prepare" else "submitting"
        new = _record(levels, room, site, state, os.getcwd(), options)
        script = script_of(site)
        if mode == "submit":
            records.write(manifest.path, new)
            new = _hand_over(manifest.path, new, site, script)
        elif mode == "prepare":
            records.write(manifest.path, new)
        commands = tuple(tuple(argv) for argv in _commands(manifest.path, new, site, script))
        if mode == "prepare":
            commands = tuple(_by_hand(site, argv) for argv in commands)
        return Submitted(manifest.path, new, commands, script.read_text(), tuple(notes), mode)


def resubmit(
    manifest: Manifest, runs: Sequence[Run], like: Submission, notes: list[str]
) -> Submission | None:
    """Submits exactly these runs of a study again, on the terms of that submission; None if all are queued.

    Args:
      notes: takes what is to be said about it.

    Raises:
      UserError: as of `submit`.
    """
    site = sites.replaced(Site(), dict(like.site), f"submission {like.id}")
    room = cluster.room(site)
    folder = manifest.path / records.FOLDER
    with (
        no_room_is_said(manifest.study.name),
        Claim(folder / "submitting.json", "the submission of the study"),
    ):
        recover(manifest.path)
        survey, queued = Survey(runstore.now(), 0), Queued(manifest, "submit", notes)
        looks = {run: survey.look(manifest, run) for run in manifest.runs}
        queued.release("submit", notes)
        holders = {run: queued.holder(run) for run in runs}
        for job, count in Counter(job for job in holders.values() if job).items():
            notes.append(
                f"{count} run{'s' * (count > 1)} left to job {job}, which is queued and will find them"
            )
        own = tuple(run for run, job in holders.items() if not job)
        tuned = frozenset(run.arm for run in runs if run.phase == "tuning")
        for arm in sorted(without_rate(manifest, Selection(tuned, frozenset()))) if tuned else ():
            coming = (elements.confirmation(-1, arm, seed) for seed in manifest.study.seeds)
            if not all(queued.holder(run) for run in coming):
                notes.append(f"the confirmations of {arm} are not queued: call `jaxablate submit` for them")
        options = SubmitOptions(max_members=like.max_members)
        levels = left.levels(Work(own, _as_in(like, looks)), site, options, {}, room)
        if not levels:
            return None
        new = _record(levels, room, site, "submitting", like.folder, options)
        records.write(manifest.path, new)
        return _hand_over(manifest.path, new, site, script_of(site))


def _as_in(like: Submission, looks: Mapping[Run, Outlook]) -> dict[Run, Outlook]:
    """The outlooks with the bounds that a plan found for the memory of those elements."""
    found = dict(looks)
    for element in like.elements:
        for run in element.among(looks):
            limits = [limit for limit in (found[run].members, element.members) if limit]
            split = max(found[run].split, element.split)
            found[run] = dataclasses.replace(found[run], members=min(limits, default=None), split=split)
    return found


def _record(
    levels: list[elements.Level], room: Room, site: Site, state: Any, folder: str, options: SubmitOptions
) -> Submission:
    return Submission(
        id=records.new_id(),
        time=runstore.now(),
        site=site.to_dict(),
        elements=tuple(element for level in levels for element in level),
        arrays=elements.cut(levels, room.array, site.array_limit),
        state=state,
        folder=folder,
        max_members=options.max_members,
        on_finish=options.on_finish,
    )


# --------------------------------------------------------------------------------------- handing it over


def script_of(site: Site) -> Path:
    """The batch script: in the package if it was installed, else in the checkout."""
    name = "multinode.sbatch" if site.nodes > 1 else "array.sbatch"
    folders = [Path(__file__).parents[2] / "launch", Path(__file__).parents[3] / "launch"]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{name}: in none of {', '.join(map(str, folders))}; install jaxablate anew")


def _commands(study: Path, new: Submission, site: Site, script: Path) -> Iterator[list[str]]:
    """The command line of every array, and of the last job; `JOBn` stands for the job of array n if unknown."""

    def job(n: int) -> int | str:
        return new.arrays[n].job or f"JOB{n}"

    study, limit = study.resolve(), elements.throttle(site.array_limit, new.arrays)
    for array in new.arrays:
        yield sbatch_argv(site, study, new.id, array, limit, [job(n) for n in array.after], script)
    if new.on_finish:
        yield finish_argv(site, study, new.id, [job(n) for n in range(len(new.arrays))], script)


def _hand_over(study: Path, new: Submission, site: Site, script: Path) -> Submission:
    """Submits the arrays one after another, each noted as soon as it is accepted; takes all back if one is refused.

    Where nobody knows whether one was accepted nothing is taken back: the record stays `submitting`, and `recover`
    settles it when SLURM answers again.
    """
    try:
        with _environment(site):
            for n in range(len(new.arrays)):
                argv = list(_commands(study, new, site, script))[n]
                job = cluster.accept(argv, records.comment(new.id, new.arrays[n].first))
                new = _with_job(new, n, job)
                records.write(study, new)
            if new.on_finish:
                *_, argv = _commands(study, new, site, script)
                new = dataclasses.replace(
                    new, finish_job=cluster.accept(argv, records.comment(new.id, "finish"))
                )
            new = dataclasses.replace(new, state="submitted")
            records.write(study, new)
            return new
    except KeyboardInterrupt:
        logger.warning("submission %s: interrupted; %s", new.id, _UNSETTLED)
        raise
    except UserError as error:
        if isinstance(error, SlurmError) and error.kind == "silent":  # SLURM may have taken the last one
            raise SlurmError(
                f"{error}; submission {new.id} is not complete: {_UNSETTLED}", "silent"
            ) from None
        _withdraw(study, new, error)
        raise


def _with_job(submission: Submission, n: int, job: int) -> Submission:
    arrays = list(submission.arrays)
    arrays[n] = dataclasses.replace(arrays[n], job=job)
    return dataclasses.replace(submission, arrays=tuple(arrays))


def _withdraw(study: Path, submission: Submission, error: UserError) -> None:
    """Takes back what was accepted. If not even that gets through, the next `submit` does it."""
    try:
        queue.scancel([str(job) for job in submission.jobs()])
    except queue.SlurmError as second:
        raise UserError(
            f"{error}; jobs {', '.join(map(str, submission.jobs()))} were accepted and could not be cancelled "
            f"({second}): the next `jaxablate submit` does that"
        ) from None
    with contextlib.suppress(UserError):  # a full disk: the record still says `submitting`, as after a kill
        records.write(study, dataclasses.replace(submission, state="withdrawn"))


def recover(study: Path) -> None:
    """Ends what a `submit` that was killed has left: complete it stands, incomplete it is taken back."""
    for one in records.submissions(study):
        if one.state != "submitting":
            continue
        names = {n: records.comment(one.id, array.first) for n, array in enumerate(one.arrays)}
        last = records.comment(one.id, "finish")
        found = cluster.numbers([*names.values(), last])
        for n, name in names.items():
            if one.arrays[n].job is None and name in found:
                one = _with_job(one, n, found[name])
        one = dataclasses.replace(one, finish_job=one.finish_job or found.get(last))
        wanted = len(one.arrays) + bool(one.on_finish)
        whole = len(one.jobs()) == wanted
        if not whole:
            queue.scancel([str(job) for job in one.jobs()])
        records.write(study, dataclasses.replace(one, state="submitted" if whole else "withdrawn"))


def _variables(site: Site) -> dict[str, str]:
    """What the scripts read."""
    values = (site.python or sys.executable, "\n".join(site.modules))
    return dict(zip(OWN_VARIABLES, values, strict=True))


def _by_hand(site: Site, argv: Sequence[str]) -> tuple[str, ...]:
    """The same command for a shell in which nothing is set."""
    return ("env", *(f"{name}={value}" for name, value in _variables(site).items()), *argv)


@contextlib.contextmanager
def _environment(site: Site) -> Iterator[None]:
    """What the scripts read, in the environment of sbatch. Paths are made absolute: a job starts elsewhere."""
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    own = {**_variables(site), **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
