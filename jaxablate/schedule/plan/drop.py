"""A deadline that cannot be met: which seeds to leave out, or by how much something has to grow. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from jaxablate.analysis import sentences
from jaxablate.schedule.plan.plan import PLURAL, PlaceKind

FEWEST = 2  # seeds, below which no spread can be told

Makespan = Callable[[tuple[int, ...], int], float]  # of seeds and GPUs, in hours


def keep(
    seeds: Sequence[int], fixed: frozenset[int], fewest: int, deadline: float, makespan: Callable[..., float]
) -> tuple[int, ...]:
    """The seeds that are kept for a deadline, in their order: as many as fit, and never fewer than `fewest`.

    A seed is dropped for all arms, so that every arm keeps the same ones: the design stays balanced and every
    comparison paired. The last ones go first.

    Args:
        seeds: as declared.
        fixed: of these, those that are kept whatever happens, since some arm has them already.
        fewest: that must be left.
        deadline: hours.
        makespan: hours that a tuple of seeds takes.
    """
    kept = tuple(seeds)
    while makespan(kept) > deadline:
        loose = [seed for seed in kept if seed not in fixed]
        if not loose or len(kept) <= fewest:
            break
        kept = tuple(seed for seed in kept if seed != loose[-1])
    return kept


def shortfall(
    kept: tuple[int, ...], places: int, place: PlaceKind, most: int, deadline: float, makespan: Makespan
) -> str:
    """Why the seeds that are left cannot meet a deadline, and what would let them; empty if they can.

    Args:
        kept: the seeds.
        places: GPUs, or processes on a CPU, of which more would take the same cores from each other.
        place: which of the two.
        most: places beyond which more are no use.
        deadline: hours.
        makespan: hours that seeds take on so many places.
    """
    needed = makespan(kept, places)
    if needed <= deadline:
        return ""
    where = sentences.count(places, place, PLURAL[place])
    text = (
        f"{sentences.count(len(kept), 'seed')} on {where} take {sentences.duration(needed)}, "
        f"{sentences.duration(needed - deadline)} more than the deadline of {sentences.duration(deadline)}"
    )
    if place == "process":
        return f"{text}: give --deadline={_up(needed)}"
    enough = _enough(lambda n: makespan(kept, n) <= deadline, places, most)
    if enough is None:
        return f"{text}, and no number of GPUs is enough: give --deadline={_up(needed)}"
    return f"{text}: give --deadline={_up(needed)}, or --gpus={enough}"


def _enough(holds: Callable[[int], bool], below: int, most: int) -> int | None:
    """The smallest number above `below` of which it holds; None if it does not even of `most`."""
    if most <= below or not holds(most):
        return None
    low, high = below, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _up(hours: float) -> str:
    """As `--deadline` is written, rounded up."""
    if hours < 1:
        return f"{math.ceil(hours * 60)}m"
    return f"{math.ceil(hours * 10) / 10:g}h"
