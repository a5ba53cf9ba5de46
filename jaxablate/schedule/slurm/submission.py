"""What was handed to SLURM: a frozen list of elements, the arrays that carry them, and what each element said.

    <workdir>/<study>/slurm/<submission>/submission.json    the elements and the jobs of their arrays
    <workdir>/<study>/slurm/<submission>/element-<i>.jsonl  a row for each start and end of element i
    <workdir>/<study>/slurm/<submission>/<job>_<task>.log   its output

How the runs stand is not here: that is in their own directories, and nothing of this overrules it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxablate import disk, runstore
from jaxablate.errors import UserError, suggestion
from jaxablate.manifest import Manifest
from jaxablate.structure import from_mapping
from jaxablate.study import Phase, Run

FOLDER = "slurm"  # in the study's directory
_ID = re.compile(r"\d{8}T\d{6}-[0-9a-f]{6}")


@dataclass(frozen=True)
class Element:
    """What one task of an array works on: runs of one arm and phase."""

    index: int  # the task's number plus the first element of its array
    arm: str
    phase: Phase
    runs: tuple[str, ...]  # run ids; none for confirmations whose rate is not chosen yet
    seeds: tuple[int, ...]
    stage: str = ""  # until this stage; empty: to the end
    after: tuple[int, ...] = ()  # elements that must have ended before
    members: int = 0  # runs of a cohort at most; 0: its GPUs share them
    split: int = 1  # times more micro-batches than the config says, at least

    def runs_of(self, manifest: Manifest) -> list[Run]:
        """Its runs, as far as they are listed: confirmations are once their arm has a rate."""
        return self.among(manifest.runs)

    def among(self, runs: Iterable[Run]) -> list[Run]:
        """Its runs of these. Who looks at many elements gives those of an arm and phase: see `by_arm`."""
        return [run for run in runs if self.has(run)]

    def has(self, run: Run) -> bool:
        """Whether a run is one of its own, by its id, or by its seed where the rate was to be chosen."""
        if (run.arm, run.phase) != (self.arm, self.phase):
            return False
        return run.id in self.runs if self.runs else run.seed in self.seeds


def by_arm(manifest: Manifest) -> Mapping[tuple[str, Phase], list[Run]]:
    """The runs by arm and phase; an empty list for what has none."""
    found: dict[tuple[str, Phase], list[Run]] = defaultdict(list)
    for run in manifest.runs:
        found[run.arm, run.phase].append(run)
    return found


@dataclass(frozen=True)
class Array:
    """Elements `first` to `first + count - 1`, submitted as one job array."""

    job: int | None  # once SLURM has accepted it
    first: int
    count: int
    after: tuple[int, ...] = ()  # the arrays that it waits for

    def tasks(self) -> dict[int, str]:
        """element index -> its job as SLURM writes it, such as `123_4`; nothing before it is accepted."""
        return {} if self.job is None else {self.first + n: f"{self.job}_{n}" for n in range(self.count)}


@dataclass(frozen=True)
class Submission:
    """One `jaxablate submit`."""

    id: str
    time: str
    site: Mapping[str, Any]  # as it was used: the profile with the command's own options in it
    elements: tuple[Element, ...]
    arrays: tuple[Array, ...]
    state: Literal["prepared", "submitting", "submitted", "withdrawn"]
    folder: str  # where `submit` was called; the tasks of one's own studies are imported from there
    max_members: int = 0  # of a cohort; 0: the runs of an element, shared by its GPUs
    on_finish: tuple[str, ...] = ()  # a program with its arguments, called once when all has ended
    finish_job: int | None = None  # the job that calls it

    def tasks(self) -> dict[int, str]:
        """element index -> its job as SLURM writes it, of all arrays that were accepted."""
        return {index: task for array in self.arrays for index, task in array.tasks().items()}

    def jobs(self) -> list[int]:
        """The arrays' job numbers, as far as they were accepted, and that of `on_finish`."""
        jobs = [array.job for array in self.arrays if array.job is not None]
        return jobs if self.finish_job is None else [*jobs, self.finish_job]

    def later(self, element: Element) -> list[Element]:
        """The elements that continue the runs of this one, itself first: the stages of one chain."""
        chain = [element]
        for other in self.elements[element.index + 1 :]:
            same = (other.arm, other.phase, other.seeds, other.runs) == (
                element.arm,
                element.phase,
                element.seeds,
                element.runs,
            )
            if same and set(other.after) & {one.index for one in chain}:
                chain.append(other)
        return chain


def new_id() -> str:
    """The time, and what tells it from another of the same second."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def folder_of(study: str | os.PathLike[str], id: str) -> Path:
    """Where a submission keeps its files."""
    return Path(study) / FOLDER / id


def comment(id: str, part: int | str) -> str:
    """What SLURM keeps with a job so that it is found again if its number was lost."""
    return f"jaxablate {id} {part}"


def submissions(study: str | os.PathLike[str]) -> list[Submission]:
    """All submissions of a study, the newest last."""
    found = [path.parent.name for path in (Path(study) / FOLDER).glob("*/submission.json")]
    return sorted((read(study, id) for id in found if _ID.fullmatch(id)), key=lambda one: (one.time, one.id))


def read(study: str | os.PathLike[str], id: str) -> Submission:
    """The submission of that name.

    Raises:
      UserError: there is none, or its file is damaged.
    """
    path = folder_of(study, id) / "submission.json"
    if not _ID.fullmatch(id) or not path.is_file():
        known = [found.parent.name for found in (Path(study) / FOLDER).glob("*/submission.json")]
        near = suggestion(id, known) if known else "nothing of it was submitted"
        raise UserError(f"{Path(study) / FOLDER}: no submission {id!r}; {near}")
    values = disk.read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a submission; restore the file")
    try:
        return from_mapping(Submission, values, "")
    except UserError as error:
        raise UserError(f"{path}: {error}; restore the file") from None


def write(study: str | os.PathLike[str], submission: Submission) -> None:
    """Keeps a submission: the old record or this one is on disk, never half of each."""
    folder = folder_of(study, submission.id)
    disk.make_private(folder)
    try:
        disk.write_json(folder / "submission.json", dataclasses.asdict(submission))
    except OSError as error:
        what = f"cannot be written: {error.strerror}; make room or use another --workdir"
        raise UserError(f"{folder}: {what}") from None


def log_row(study: str | os.PathLike[str], id: str, index: int, **row: Any) -> None:
    """Notes a start or an end of an element, with the time."""
    path = folder_of(study, id) / f"element-{index}.jsonl"
    disk.append_jsonl(path, {"time": runstore.now(), **row}, sync=True)


def element_log(
    study: str | os.PathLike[str], submission: Submission, element: Element
) -> list[dict[str, Any]]:
    """The rows of an element, oldest first: {time, restart, job, node, state, reason}.

    States: `running`, then `done`, `paused` (its stage is done), `failed`, `stopped` (and to be requeued),
    `cancelled` or `duplicate` (another process has its runs).
    """
    rows, _ = disk.read_jsonl(folder_of(study, submission.id) / f"element-{element.index}.jsonl")
    return rows
