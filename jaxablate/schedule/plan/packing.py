"""Which cohort runs when, and on which GPU. Pure: numbers in, a schedule out; the same for the same input.

List scheduling, longest first (Graham 1969): items are taken in the order of the work that begins with them,
their own and that of what follows them, and each is placed where it can start first. Where that is not the
best possible, limits between the two are tried, below which each goes where it still fits (MULTIFIT); and of a few
items other orders, in which one of them comes earlier or later.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxablate.errors import UserError

ROUNDING = 1e-9  # of sums: shares that add up to a whole GPU, hours that follow each other
NEAR = 0.02  # of the best possible: closer than any estimate, so that longest first, the simplest, is kept
_LIMITS = 8  # that the search tries
_FEW = 10  # items of which other orders are tried
_GIB = 2**30


@dataclass(frozen=True)
class Item:
    """Work that one process does on one GPU without a break.

    Attributes:
        name: by which others follow it; unique.
        hours: that it takes.
        memory: bytes of the GPU that it holds.
        share: of the GPU that it keeps busy; items whose shares and memory fit run beside each other.
        after: names of the items that must have ended before it starts.
    """

    name: str
    hours: float
    memory: int = 0
    share: float = 1.0
    after: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.hours) and self.hours > 0):
            raise UserError(f"item {self.name}: hours={self.hours}: must be a positive number")
        if not 0 < self.share <= 1:
            raise UserError(f"item {self.name}: share={self.share}: must be above 0 and at most 1")
        if self.memory < 0:
            raise UserError(f"item {self.name}: memory={self.memory}: must be 0 or more")


@dataclass(frozen=True)
class Placed:
    """An item with its GPU, counted from 0, and its hours from the start of the study."""

    item: Item
    gpu: int
    start: float
    end: float


Schedule = tuple[Placed, ...]


def pack(items: Sequence[Item], gpus: int, memory: int) -> Schedule:
    """A schedule that ends early, in the order of its starts.

    It is the better one of two: with one item at a time on each GPU, and with several where they fit. Of
    independent items that run alone it ends within 4/3 - 1/(3 gpus) of `lower_bound`, as the first schedule
    of the search does.

    Args:
        items: with chains given by `Item.after`, which may join and branch but not close.
        gpus: that are alike.
        memory: bytes of each.

    Raises:
        UserError: an item is too large for a GPU, follows one that is not there, or itself; two have one name.
    """
    _check(items, gpus, memory)
    if not items:
        return ()
    tails = _tails(items)
    given = {item.name: item for item in items}
    in_order = [given[name] for name in reversed(tails)]  # what follows behind what it follows, on ties too
    longest_first = sorted(in_order, key=lambda item: -tails[item.name])
    alone = _search([replace(item, share=1.0) for item in longest_first], gpus, memory)
    shared = alone
    if any(item.share < 1 for item in items):
        shared = _search(longest_first, gpus, memory)
    best = min(alone, shared, key=makespan)
    return tuple(replace(p, item=given[p.item.name]) for p in sorted(best, key=lambda p: (p.start, p.gpu)))


def makespan(schedule: Iterable[Placed]) -> float:
    """Hours until the last item ends; 0 without any."""
    return max((placed.end for placed in schedule), default=0.0)


def in_company(schedule: Iterable[Placed]) -> frozenset[str]:
    """The names of the items that have another beside them on their GPU, for however long."""
    found: set[str] = set()
    by_gpu: dict[int, list[Placed]] = {}
    for placed in schedule:
        by_gpu.setdefault(placed.gpu, []).append(placed)
    for own in by_gpu.values():
        for one, other in itertools.combinations(own, 2):
            if one.start < other.end * (1 - ROUNDING) and other.start < one.end * (1 - ROUNDING):
                found |= {one.item.name, other.item.name}
    return frozenset(found)


def lower_bound(items: Sequence[Item], gpus: int, memory: int) -> float:
    """Hours below which no schedule can end.

    The largest of: the mean work of a GPU, the mean memory-hours of one, the longest chain, and the bounds of
    `_of_singles` for the items that keep most of a GPU busy, and for those that hold most of its memory.
    """
    if not items:
        return 0.0
    work = sum(item.hours * item.share for item in items) / gpus
    filled = sum(item.hours * item.memory for item in items) / (gpus * memory) if memory else 0.0
    busy = [item.hours for item in items if item.share > 0.5 + ROUNDING]
    large = [item.hours for item in items if 2 * item.memory > memory]
    return max(work, filled, *_tails(items).values(), _of_singles(busy, gpus), _of_singles(large, gpus))


def _of_singles(hours: Iterable[float], gpus: int) -> float:
    """Of items of which no two fit on a GPU, with m = `gpus`, counted from the longest.

    Pigeonholes: of the first k m + 1 some k + 1 are on one GPU, at best the shortest k + 1. Folding: of the
    first m + i either three are on one GPU, or none has more than two, and then the best that can be done is to
    put the shortest beside item m - i + 1. Against these bounds longest-first ends within 4/3 - 1/(3 m): if its
    last item takes at most a third of the bound, by Graham's argument; else there are 2 m items at most, and it
    folds them.
    """
    hours, found = sorted(hours, reverse=True), 0.0
    for k in range(1, (len(hours) - 1) // gpus + 1):
        found = max(found, sum(hours[k * gpus - k : k * gpus + 1]))
    for i in range(1, min(gpus, len(hours) - gpus) + 1):
        pair, three = hours[gpus - i] + hours[gpus + i - 1], sum(hours[max(gpus + i - 3, 0) : gpus + i])
        found = max(found, min(pair, three))
    return found


# --------------------------------------------------------------------------------------- the search


def _search(order: Sequence[Item], gpus: int, memory: int) -> Schedule:
    """The best schedule of an order: with each item where it starts first, or packed below a limit.

    The limits are those of MULTIFIT (Coffman, Garey and Johnson 1978): halving what is between the best that
    was found and the best that is possible.
    """
    best = _schedule(order, gpus, memory)
    low, tails = lower_bound(order, gpus, memory), _tails(order)
    for _ in range(_LIMITS):
        if makespan(best) <= low * (1 + NEAR):
            break
        limit = (low + makespan(best)) / 2
        latest = {item.name: limit - tails[item.name] for item in order}
        found = _schedule(order, gpus, memory, latest)
        if makespan(found) > limit:
            low = limit
        best = min(best, found, key=makespan)
    return _reordered(order, best, gpus, memory) if len(order) <= _FEW else best


def _reordered(order: Sequence[Item], best: Schedule, gpus: int, memory: int) -> Schedule:
    """The best schedule that moving one item of the order at a time leads to, as long as each move is for the better.

    What follows a short item may be why a long one should not come first.
    """
    low, order = lower_bound(order, gpus, memory), list(order)
    moves = list(itertools.permutations(range(len(order)), 2))
    while makespan(best) > low * (1 + NEAR):
        for here, there in moves:
            other = [*order]
            other.insert(there, other.pop(here))
            if not _follows(other):
                continue
            found = _schedule(other, gpus, memory)
            if makespan(found) < makespan(best) * (1 - ROUNDING):
                best, order = found, other
                break
        else:
            break
    return best


def _follows(order: Sequence[Item]) -> bool:
    """Whether every item comes behind those that it follows."""
    seen: set[str] = set()
    for item in order:
        if not seen.issuperset(item.after):
            return False
        seen.add(item.name)
    return True


def _schedule(
    order: Sequence[Item], gpus: int, memory: int, latest: Mapping[str, float] | None = None
) -> Schedule:
    """Each item in turn on the first GPU where it can start by its `latest`, else where it can start first.

    On a tie it is where what it follows ran.
    """
    timelines = [_Timeline(memory) for _ in range(gpus)]
    placed: dict[str, Placed] = {}
    for item in order:
        before = [placed[name] for name in item.after]
        ready, home = max((p.end for p in before), default=0.0), {p.gpu for p in before}
        by = latest[item.name] * (1 + ROUNDING) if latest else -math.inf
        choices = []
        for gpu in sorted(range(gpus), key=lambda gpu: gpu not in home):
            start = timelines[gpu].earliest(item, ready)
            choices.append((start, gpu))
            if start <= by:
                break
        start, gpu = choices[-1] if choices[-1][0] <= by else min(choices, key=lambda choice: choice[0])
        timelines[gpu].add(item, start)
        placed[item.name] = Placed(item, gpu, start, start + item.hours)
    return tuple(placed.values())


class _Timeline:
    """What one GPU is used for: memory and share from each instant of `times` to the next, the last for ever."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.times, self.memory, self.share = [0.0], [0], [0.0]

    def earliest(self, item: Item, ready: float) -> float:
        """The first instant from `ready` on at which the item fits for as long as it takes."""
        start = ready
        for i, ends in enumerate([*self.times[1:], math.inf]):
            if ends <= start:
                continue
            full = self.share[i] + item.share > 1 + ROUNDING or self.memory[i] + item.memory > self.capacity
            if full:
                start = ends
            elif ends >= start + item.hours:
                break
        return start

    def add(self, item: Item, start: float) -> None:
        first, last = self._split(start), self._split(start + item.hours)
        for i in range(first, last):
            self.memory[i] += item.memory
            self.share[i] += item.share

    def _split(self, time: float) -> int:
        """The index of the stretch that begins at `time`, which is made if there is none."""
        at = next((i for i, begins in enumerate(self.times) if begins >= time), len(self.times))
        if at == len(self.times) or self.times[at] != time:
            self.times.insert(at, time)
            self.memory.insert(at, self.memory[at - 1])
            self.share.insert(at, self.share[at - 1])
        return at


# ------------------------------------------------------------------------------------ what is checked


def _check(items: Sequence[Item], gpus: int, memory: int) -> None:
    if gpus < 1:
        raise UserError(f"gpus={gpus}: must be 1 or more")
    names = {item.name for item in items}
    for item in items:
        if item.memory > memory:
            raise UserError(
                f"item {item.name}: takes {item.memory / _GIB:.1f} GiB, and a GPU has {memory / _GIB:.1f}; "
                "train fewer members at a time, or smaller micro-batches"
            )
        if unknown := sorted(set(item.after) - names):
            raise UserError(f"item {item.name}: follows '{unknown[0]}', which is not there")
    if len(names) < len(items):
        twice = sorted(name for name in names if sum(item.name == name for item in items) > 1)
        raise UserError(f"item {twice[0]}: two have this name")


def _tails(items: Sequence[Item]) -> dict[str, float]:
    """Of each item the hours of the longest chain that begins with it, its own included.

    Raises:
        UserError: an item follows itself, directly or over others.
    """
    hours = {item.name: item.hours for item in items}
    followers: dict[str, list[str]] = {name: [] for name in hours}
    waits = {item.name: len(set(item.after)) for item in items}
    for item in items:
        for name in set(item.after):
            followers[name].append(item.name)
    order = [name for name, count in waits.items() if not count]
    for name in order:  # grows while it is read: those for which all they wait for has been read
        for follower in followers[name]:
            waits[follower] -= 1
            if not waits[follower]:
                order.append(follower)
    if len(order) < len(hours):
        raise UserError(f"item {min(hours.keys() - set(order))}: follows itself, over others or directly")
    tails: dict[str, float] = {}
    for name in reversed(order):
        tails[name] = hours[name] + max((tails[follower] for follower in followers[name]), default=0.0)
    return tails
