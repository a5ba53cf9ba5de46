"""Which elements a submission has, and in which arrays they go. Pure: who calls it knows the runs and the limits.

An element is what one node does: runs of one arm and phase. Elements that wait for others are on a later level;
a level is one array, or several where an array may not be that long.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxablate.schedule.cohorts import Job, plan
from jaxablate.schedule.retries import PENDING, Outlook
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import Array, Element
from jaxablate.study import Phase, Run

Level = tuple[Element, ...]
Stages = Callable[[str, Phase], Sequence[str]]


@dataclass(frozen=True)
class Work:
    """What is to be done."""

    runs: tuple[Run, ...]  # listed, and to be trained now
    outlooks: Mapping[
        Run, Outlook
    ]  # of all these, and of any whose history teaches how much memory an arm needs
    later: frozenset[Run] = (
        frozenset()
    )  # the confirmations to come, whose rate is not chosen yet; see `confirmation`


def confirmation(index: int, arm: str, seed: int) -> Run:
    """A run to come: without a rate, a fingerprint or an id."""
    return Run(index, arm, "confirm", seed, 0.0, "", "")


def places(site: Site) -> int:
    """Cohorts that an element trains at a time: one for each GPU that a node gives it."""
    found = re.search(r"(?:^|,)gpu(?::[^,:]+)?:(\d+)", site.gres)
    return int(found.group(1)) if found and site.nodes == 1 else 1


def whole(arm: str, phase: Phase) -> Sequence[str]:
    """One element for all stages of a run."""
    del arm, phase
    return ("",)


def form(
    work: Work,
    members: int,
    together: int,
    stages: Stages = whole,
    ordered: Callable[[list[Job]], list[Job]] = list,
) -> list[Level]:
    """The elements by level, numbered through.

    Args:
      work: what is to be done.
      members: runs of a cohort at most; 0 for any number. What `work` knows of the memory may allow fewer.
      together: cohorts of an element at most; 0 for any number.
      stages: arm, phase -> the stages of which each is an element of its own, in order; "" is the last one.
      ordered: cohorts in the order in which they are to come.
    """
    runs = [*work.runs, *work.later]
    most = members or max(len(runs), 1)
    looks = {**dict.fromkeys(work.later, PENDING), **work.outlooks}
    jobs = ordered(plan(runs, looks, {"tuning": most, "confirm": most}))
    bounded = {run.arm for run, look in looks.items() if members or look.members}
    levels: dict[int, list[tuple[Element, list[Element]]]] = defaultdict(list)
    ends: dict[str, list[tuple[int, Element]]] = defaultdict(list)  # the last of each tuning chain, by arm

    def chain(depth: int, first: Element, waits_for: list[Element]) -> tuple[int, Element]:
        element = first
        for n, stage in enumerate(stages(first.arm, first.phase)):
            element, before = replace(first, stage=stage), [element] if n else waits_for
            levels[depth + n].append((element, before))
        return depth + len(stages(first.arm, first.phase)), element

    groups = _groups(jobs, together)
    waits = [group[0].runs[0] in work.later for group in groups]
    for group in (group for group, later in zip(groups, waits, strict=True) if not later):
        end = chain(0, _element(group, bounded), [])
        if group[0].phase == "tuning":
            ends[group[0].arm].append(end)
    for group in (group for group, later in zip(groups, waits, strict=True) if later):
        before = ends[group[0].arm]
        depth = max((depth for depth, _ in before), default=0)
        chain(depth, replace(_element(group, bounded), runs=()), [element for _, element in before])
    return _numbered([levels[depth] for depth in sorted(levels)])


def _groups(jobs: Sequence[Job], together: int) -> list[list[Job]]:
    """The cohorts of each element: of one arm and phase, as many as it may have, in their order."""
    found: list[list[Job]] = []
    last: dict[tuple[str, Phase], list[Job]] = {}
    for job in jobs:
        key = (job.arm, job.phase)
        if key not in last or len(last[key]) == together:
            last[key] = []
            found.append(last[key])
        last[key].append(job)
    return found


def _element(cohorts: Sequence[Job], bounded: Collection[str]) -> Element:
    """An element of these cohorts. Its members are free, for its GPUs to share, unless something bounds them."""
    first = cohorts[0]
    runs = [run for job in cohorts for run in job.runs]
    seeds = tuple(sorted({run.seed for run in runs}))
    members = max(len(job.runs) for job in cohorts) if first.arm in bounded else 0
    ids = tuple(run.id for run in runs)
    return Element(0, first.arm, first.phase, ids, seeds, members=members, split=first.split)


def _numbered(levels: list[list[tuple[Element, list[Element]]]]) -> list[Level]:
    """With their indices, which are also what they wait for."""
    index = {element: n for n, element in enumerate(element for level in levels for element, _ in level)}
    return [
        tuple(
            replace(element, index=index[element], after=tuple(index[one] for one in before))
            for element, before in level
        )
        for level in levels
    ]


def cut(levels: Sequence[Level], longest: int, limit: int = 0) -> tuple[Array, ...]:
    """The arrays that carry the elements, none longer than `longest`, each after those that it waits for.

    Args:
      limit: elements that may run at a time; 0: any number. Arrays beyond it wait for earlier ones as well, since
        each runs one element at least.
    """
    arrays: list[Array] = []
    lanes: list[int] = []  # the last array of each
    for level in levels:
        parts = [level[n : n + longest] for n in range(0, len(level), longest)]
        before = list(arrays)
        for part in parts:
            needed = {index for element in part for index in element.after}
            after = {
                n for n, one in enumerate(before) if needed & set(range(one.first, one.first + one.count))
            }
            if limit and len(lanes) == limit and not after & set(lanes):
                after.add(min(lanes))
            _enter(lanes, len(arrays), after)
            arrays.append(Array(None, part[0].index, len(part), tuple(sorted(after))))
    return tuple(arrays)


def throttle(limit: int, arrays: Sequence[Array]) -> int:
    """How many elements of each array may run at a time, so that all of them together keep to the limit.

    Of the arrays of a lane each waits for the one before, so no more run together than there are lanes.
    """
    lanes: list[int] = []
    for n, array in enumerate(arrays):
        _enter(lanes, n, array.after)
    return max(limit // len(lanes), 1) if limit else 0


def _enter(lanes: list[int], n: int, after: Collection[int]) -> None:
    """Puts array `n` into the first lane whose last array it waits for, or into one of its own."""
    lane = next((i for i, last in enumerate(lanes) if last in after), len(lanes))
    lanes[lane : lane + 1] = [n]
