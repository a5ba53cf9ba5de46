"""Which elements a submission has, and in which arrays they go. Pure: who calls it knows the runs and the limits.

An element is what one node does: runs of one arm and phase. Elements that wait for others are on a later level;
a level is one array, or several where an array may not be that long.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxablate.schedule.cohorts import Job, plan
from jaxablate.schedule.retries import Outlook
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import Array, Element
from jaxablate.study import Phase, Run

Level = tuple[Element, ...]
Stages = Callable[[str, Phase], Sequence[str]]


@dataclass(frozen=True)
class Work:
    """What is to be done."""

    runs: tuple[Run, ...]  # listed, and to be trained now
    outlooks: Mapping[Run, Outlook]  # of these, and of all whose history teaches how much memory an arm needs
    later: Mapping[str, tuple[int, ...]]  # arm -> seeds of the confirmations whose rate is not chosen yet


def places(site: Site) -> int:
    """Cohorts that an element trains at a time: one for each GPU that a node gives it."""
    found = re.search(r"(?:^|,)gpu(?::[^,:]+)?:(\d+)", site.gres)
    return int(found.group(1)) if found and site.nodes == 1 else 1


def whole(arm: str, phase: Phase) -> Sequence[str]:
    """One element for all stages of a run."""
    del arm, phase
    return ("",)


def form(
    work: Work, most: int, stages: Stages = whole, ordered: Callable[[list[Job]], list[Job]] = list
) -> list[Level]:
    """The elements by level, numbered through.

    Args:
      work: what is to be done.
      most: runs of an element at most; 0 for any number.
      stages: arm, phase -> the stages of which each is an element of its own, in order; "" is the last one.
      ordered: cohorts in the order in which they are to come.
    """
    most = most or max([len(work.runs), *(len(seeds) for seeds in work.later.values()), 1])
    levels: dict[int, list[tuple[Element, list[Element]]]] = defaultdict(list)
    ends: dict[str, list[tuple[int, Element]]] = defaultdict(list)  # the last of each tuning chain, by arm

    def chain(depth: int, first: Element, waits_for: list[Element]) -> tuple[int, Element]:
        element = first
        for n, stage in enumerate(stages(first.arm, first.phase)):
            element, before = replace(first, stage=stage), [element] if n else waits_for
            levels[depth + n].append((element, before))
        return depth + len(stages(first.arm, first.phase)), element

    for job in ordered(plan(work.runs, work.outlooks, {"tuning": most, "confirm": most})):
        seeds = tuple(sorted({run.seed for run in job.runs}))
        end = chain(0, Element(0, job.arm, job.phase, tuple(run.id for run in job.runs), seeds), [])
        if job.phase == "tuning":
            ends[job.arm].append(end)
    for arm, seeds in work.later.items():
        depth = max((depth for depth, _ in ends[arm]), default=0)
        for n in range(0, len(seeds), most):
            part = Element(0, arm, "confirm", (), seeds[n : n + most])
            chain(depth, part, [element for _, element in ends[arm]])
    return _numbered([levels[depth] for depth in sorted(levels)])


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


def cut(levels: Sequence[Level], longest: int) -> tuple[Array, ...]:
    """The arrays that carry the elements, none longer than `longest`, each after those that it waits for."""
    arrays: list[Array] = []
    for level in levels:
        parts = [level[n : n + longest] for n in range(0, len(level), longest)]
        before = list(arrays)
        for part in parts:
            needed = {index for element in part for index in element.after}
            after = (
                n for n, one in enumerate(before) if needed & set(range(one.first, one.first + one.count))
            )
            arrays.append(Array(None, part[0].index, len(part), tuple(after)))
    return tuple(arrays)


def throttle(limit: int, array: Array, arrays: Sequence[Array]) -> int:
    """How many elements of an array may run at a time, so that those of its level together keep to the limit."""
    beside = sum(one.after == array.after for one in arrays)
    return max(limit // beside, 1) if limit else 0
