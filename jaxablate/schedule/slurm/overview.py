"""What `status` says of a study's submissions: the run directories, joined with what SLURM has in its queue.

The runs are the truth. The queue adds why an element waits and where one runs; that it does not know one, or
does not answer, changes no state.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxablate.analysis.seen import Count, printable
from jaxablate.analysis.seen import Seen as SeenRun
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.runstore import OUTCOMES
from jaxablate.schedule.slurm import queue
from jaxablate.schedule.slurm.queue import Seen as SeenJob
from jaxablate.schedule.slurm.submission import FOLDER, Element, Submission, by_arm, element_log, submissions

# What an element is doing.
#   done       its runs have their outcomes, or its stage has ended
#   stopped    it was interrupted, and nothing more is known
#   duplicate  it ended because another process had its runs
#   ended      SLURM says it is over, and runs of it have no outcome
#   unqueued   SLURM answers, and does not know it
#   replaced   a later submission has what is left of it
#   prepared   frozen, and not known to have been submitted
State = Literal[
    "done", "running", "pending", "stopped", "failed", "cancelled", "duplicate", "ended", "unqueued",
    "replaced", "prepared",
]  # fmt: skip
STATES: tuple[State, ...] = (
    "done", "running", "pending", "stopped", "failed", "ended", "unqueued", "duplicate", "cancelled",
    "replaced", "prepared",
)  # fmt: skip
_SHOWN = 12  # lines per submission
_FINAL: Mapping[str, State] = {"failed": "failed", "cancelled": "cancelled", "duplicate": "duplicate"}

Ask = Callable[[Iterable[int | str]], tuple[dict[str, SeenJob], str]]


@dataclass(frozen=True)
class Part:
    """An element as it stands."""

    index: int
    job: str  # "123_4"; "" if SLURM has not accepted it
    arm: str
    phase: str
    stage: str  # "" if it trains to the end
    runs: Mapping[Count, int]  # by state; empty while their rate is not chosen
    starts: int
    state: State
    reason: str = ""
    node: str = ""  # where it runs


@dataclass(frozen=True)
class Line:
    """A submission as it stands."""

    id: str
    time: str
    state: str
    jobs: tuple[int, ...]
    elements: tuple[Part, ...]

    @property
    def counts(self) -> dict[State, int]:
        """Elements by state."""
        found = Counter(part.state for part in self.elements)
        return {state: found[state] for state in STATES if found[state]}

    def lines(self) -> list[str]:
        """For people: a line for all of it, and one for each element, or kind of element, that says more."""
        jobs = f", job{'s' * (len(self.jobs) > 1)} {', '.join(map(str, self.jobs))}" if self.jobs else ""
        counts = ", ".join(f"{count} {state}" for state, count in self.counts.items())
        size = f"{len(self.elements)} element{'s' * (len(self.elements) != 1)}"
        own = [f"submission {self.id}{jobs}: {size}: {counts}"]
        if self.state == "withdrawn":
            return [f"submission {self.id}: withdrawn"]
        alike: dict[tuple[State, str, str], list[Part]] = defaultdict(list)
        for part in self.elements:
            if part.state not in ("done", "replaced"):
                alike[part.state, part.reason, part.node].append(part)
        order = sorted(alike.items(), key=lambda item: STATES.index(item[0][0]))
        own += [_line(*key, parts) for key, parts in order[:_SHOWN]]
        more = len(order) - _SHOWN
        return [*own, f"  and {more} more; --json lists all"] if more > 0 else own


@dataclass(frozen=True)
class Overview:
    """All submissions of a study, the newest last."""

    submissions: tuple[Line, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> list[dict[str, Any]]:
        """The submissions as plain data."""
        return [dataclasses.asdict(line) | {"counts": line.counts} for line in self.submissions]

    def lines(self) -> list[str]:
        """For people."""
        return [line for one in self.submissions for line in one.lines()]


def overview(manifest: Manifest, seen: Iterable[SeenRun], ask: Ask = queue.look) -> Overview:
    """How the submissions of a study stand.

    SLURM is asked once, and only if something of them is open.

    Args:
      manifest: the study.
      seen: its runs, or those of some arms; elements of other arms are left out.
      ask: what says how jobs stand, as `queue.look` does.
    """
    if not (manifest.path / FOLDER).is_dir():
        return Overview()
    notes: list[str] = []
    try:
        records = submissions(manifest.path)
    except UserError as error:
        return Overview(notes=(str(error),))
    looks = {(one.run.arm, one.run.id): one for one in seen}
    arms = {arm for arm, _ in looks} or {arm.name for arm in manifest.study.arms}
    open_ones = _open(manifest, records, looks, arms, notes)
    asked = [one.job for one in open_ones if one.job and one.state is None]
    found, silent = ask(asked) if asked else ({}, "")
    if silent:
        notes.append(f"{silent}; what is said of the elements is from the run directories alone")
    by_record: dict[str, list[Part]] = defaultdict(list)
    for one in open_ones:
        by_record[one.record.id].append(_part(one, found.get(one.job), silent))
    lines = (
        Line(one.id, one.time, one.state, tuple(one.jobs()), tuple(by_record[one.id]))
        for one in records
        if one.id in by_record
    )
    return Overview(tuple(lines), tuple(notes))


# ------------------------------------------------------------------------------------------ joining


@dataclass(frozen=True)
class _Open:
    """An element before SLURM was asked; `state` is what needs no answer, None if one may help."""

    record: Submission
    element: Element
    job: str
    own: tuple[SeenRun, ...]
    rows: tuple[Mapping[str, Any], ...]
    state: State | None
    reason: str = ""

    @property
    def last(self) -> Mapping[str, Any]:
        return self.rows[-1] if self.rows else {}


def _open(
    manifest: Manifest,
    records: Sequence[Submission],
    looks: Mapping[tuple[str, str], SeenRun],
    arms: set[str],
    notes: list[str],
) -> list[_Open]:
    """Every element of these arms, with what the disk alone says of it."""
    found: list[_Open] = []
    later: set[tuple[str, str, int]] = set()  # (arm, phase, seed) in submissions after this one
    runs = by_arm(manifest)
    for record in reversed(records):
        tasks = record.tasks()
        for element in record.elements:
            if element.arm not in arms:
                continue
            own = [looks[run.arm, run.id] for run in element.among(runs[element.arm, element.phase])]
            try:
                rows = element_log(manifest.path, record, element)
            except UserError as error:
                notes.append(str(error))
                rows = []
            left = {seed for seed in element.seeds if not _has_outcome(own, seed)}
            replaced = bool(left) and all((element.arm, element.phase, seed) in later for seed in left)
            state, reason = _from_disk(record, own, rows, replaced)
            job = tasks.get(element.index) or str(rows[-1].get("job", "") if rows else "")
            found.append(_Open(record, element, job, tuple(own), tuple(rows), state, reason))
        if record.state in ("submitting", "submitted"):
            later |= {(e.arm, e.phase, seed) for e in record.elements for seed in e.seeds}
    found.sort(key=lambda one: (one.record.id, one.element.index))
    return found


def _has_outcome(own: Iterable[SeenRun], seed: int) -> bool:
    looks = [one.state in OUTCOMES for one in own if one.run.seed == seed]
    return bool(looks) and all(looks)


def _from_disk(
    record: Submission,
    own: Sequence[SeenRun],
    rows: Sequence[Mapping[str, Any]],
    replaced: bool,
) -> tuple[State | None, str]:
    """State and reason as far as they follow without SLURM; no state if it may know more."""
    last = rows[-1] if rows else {}
    said, reason = last.get("state", ""), printable(last.get("reason", ""))
    states = {one.state for one in own}
    if states and states <= set(OUTCOMES):
        return "done", ""
    if (said == "paused" and "pending" not in states) or (said == "done" and not own):
        return "done", reason
    if record.state == "withdrawn":
        return "cancelled", "the submission was withdrawn"
    if states and states <= {*OUTCOMES, "cancelled"}:
        return "cancelled", "its runs were cancelled"
    if replaced:
        return "replaced", ""
    if said in _FINAL:
        return _FINAL[said], reason
    if record.state == "prepared" and not rows:
        return "prepared", ""
    return None, reason


def _part(one: _Open, job: SeenJob | None, silent: str) -> Part:
    state, reason, node = one.state, one.reason, ""
    if state is None:
        state, reason, node = _with_slurm(one, job, silent)
    element = one.element
    counts: dict[Count, int] = dict(Counter(run.state for run in one.own))
    starts = sum(row.get("state") == "running" for row in one.rows)
    return Part(
        element.index, one.job, element.arm, element.phase, element.stage, counts, starts, state, reason, node
    )


def _with_slurm(one: _Open, job: SeenJob | None, silent: str) -> tuple[State, str, str]:
    """State, reason and node of an element of which the disk does not say all."""
    said, node = one.last.get("state", ""), printable(one.last.get("node", ""))
    works = said == "running" and any(run.state == "running" for run in one.own)
    if job is not None and job.queued:
        if job.state == "PENDING":
            before = f"{one.reason}; " if said == "stopped" and one.reason else ""
            return "pending", printable(f"{before}{job.reason}{_release(job)}"), ""
        if job.held:
            return "pending", printable(f"{job.reason or job.state.lower()}{_release(job)}"), ""
        return "running", "" if job.state == "RUNNING" else job.state.lower(), printable(job.node) or node
    if works:
        return "running", "", node
    if job is not None:
        why = f", {job.reason}" if job.reason else ""
        return (
            "ended",
            printable(f"SLURM says {job.state}{why}; `jaxablate submit` takes up what is left"),
            "",
        )
    if silent:
        if said == "running":
            return "stopped", f"began on {node} at {one.last.get('time', '')}", ""
        return ("stopped" if said == "stopped" else "pending"), one.reason, ""
    if not one.job:
        return "pending", "not accepted by SLURM yet", ""
    return "unqueued", "SLURM does not know it any more; `jaxablate submit` takes up what is left", ""


def _release(job: SeenJob) -> str:
    """What lets a held job start, which would wait for ever, and what comes after it too."""
    return f"; `scontrol release {job.job}` lets it start" if job.held else ""


def _line(state: State, reason: str, node: str, parts: Sequence[Part]) -> str:
    jobs = [part.job or f"element {part.index}" for part in parts]
    shown = ", ".join(jobs) if len(jobs) <= 3 else f"{jobs[0]} … {jobs[-1]} ({len(jobs)})"
    names = list(dict.fromkeys(part.arm + (f" until {part.stage}" if part.stage else "") for part in parts))
    arms = ", ".join(names) if len(names) <= 3 else f"{len(names)} arms"
    tuning = ", tuning" if all(part.phase == "tuning" for part in parts) else ""
    starts = max(part.starts for part in parts)
    again = f", start {starts}" if starts > 1 else ""
    where = f" on {node}" if node else ""
    why = f": {reason}" if reason else ""
    return f"  {state} {shown} ({arms}{tuning}){where}{again}{why}"
