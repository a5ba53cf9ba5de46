"""A packed schedule is possible, keeps its chains, and ends near the best that can be proved.

What a schedule must hold is looked at by `problems`, which knows nothing of how one is made: it sweeps over
the instants at which anything starts or ends.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from fractions import Fraction

import pytest

from jaxablate.errors import UserError
from jaxablate.schedule.plan import packing
from jaxablate.schedule.plan.packing import Item, Placed, lower_bound, makespan, pack

MEMORY = 100
INSTANCES = 1000


def problems(schedule: Sequence[Placed], items: Sequence[Item], gpus: int, memory: int) -> list[str]:
    """What is wrong with a schedule; nothing if it can be carried out."""
    placed = {p.item.name: p for p in schedule}
    found = [f"{item.name} is missing" for item in items if item.name not in placed]
    if len(schedule) != len(items):
        found.append(f"{len(schedule)} placed of {len(items)}")
    for p in schedule:
        if not 0 <= p.gpu < gpus:
            found.append(f"{p.item.name} is on GPU {p.gpu}")
        if p.start < 0 or abs(p.end - p.start - p.item.hours) > 1e-9 * max(p.end, 1):
            found.append(f"{p.item.name} does not take its hours")
        found += [
            f"{p.item.name} starts before {name} ends"
            for name in p.item.after
            if name in placed and p.start < placed[name].end
        ]
    for gpu in range(gpus):
        here = [p for p in schedule if p.gpu == gpu]
        for instant in sorted({p.start for p in here}):  # use only grows where something starts
            at_work = [p.item for p in here if p.start <= instant < p.end]
            if sum(item.memory for item in at_work) > memory:
                found.append(f"GPU {gpu} at {instant}: memory")
            if sum(Fraction(item.share).limit_denominator(1000) for item in at_work) > 1:
                found.append(f"GPU {gpu} at {instant}: share")
    return found


def one_at_a_time(items: Sequence[Item], gpus: int) -> float:
    """When the items end if each GPU takes the longest one that is ready as soon as it is free."""
    free, ended, left = [0.0] * gpus, {}, list(items)
    while left:
        ready = [item for item in left if all(name in ended for name in item.after)]
        item = max(ready, key=lambda i: i.hours)
        gpu = free.index(min(free))
        free[gpu] = ended[item.name] = max(free[gpu], *(ended[n] for n in item.after), 0.0) + item.hours
        left.remove(item)
    return max(ended.values())


def independent(rng: random.Random) -> tuple[list[Item], int]:
    """Cohorts that need a GPU of their own: all alike, alike but for few, or anything."""
    gpus, count = rng.randint(1, 8), rng.randint(1, 24)
    draw = rng.choice(
        [
            lambda: rng.uniform(0.1, 10),
            lambda: float(rng.randint(1, 6)),
            lambda: rng.lognormvariate(0, 2),
            lambda: rng.choice([3.0, 3.0, 3.0, 5.0, 9.0]),
        ]
    )
    return [Item(f"i{n}", draw(), rng.randint(0, MEMORY)) for n in range(count)], gpus


def chained(rng: random.Random) -> tuple[list[Item], int]:
    """Chains that also join and branch, of items that may share a GPU."""
    gpus, items = rng.randint(1, 4), []
    for n in range(rng.randint(2, 20)):
        before = rng.sample(items, min(len(items), rng.choice([0, 0, 1, 1, 1, 2])))
        share = rng.choice([1.0, 1.0, 0.1, 0.25, 0.3, 0.5, 0.6])
        after = tuple(item.name for item in before)
        items.append(Item(f"i{n}", rng.uniform(0.1, 5), rng.randint(1, MEMORY), share, after))
    rng.shuffle(items)
    return items, gpus


def test_independent_items_end_within_four_thirds_of_the_bound():
    worst = 0.0
    for seed in range(INSTANCES):
        items, gpus = independent(random.Random(seed))
        schedule = pack(items, gpus, MEMORY)
        assert problems(schedule, items, gpus, MEMORY) == [], seed
        ratio = makespan(schedule) / lower_bound(items, gpus, MEMORY)
        assert 1 - 1e-9 <= ratio <= 4 / 3 - 1 / (3 * gpus) + 1e-9, seed
        worst = max(worst, ratio)
    print(f"worst of {INSTANCES}: {worst:.3f} of the lower bound")


@pytest.mark.parametrize("gpus", range(2, 9))
def test_the_worst_cases_of_longest_first_are_searched_past(gpus):
    """2 m + 1 items of 2 m - 1, 2 m - 1, …, m + 1, m + 1, m, m, m take 3 m at best, and 4 m - 1 longest first."""
    hours = [h for h in range(2 * gpus - 1, gpus, -1) for _ in range(2)] + [gpus] * 3
    items = [Item(f"i{n}", float(h)) for n, h in enumerate(hours)]
    assert one_at_a_time(items, gpus) == 4 * gpus - 1
    assert lower_bound(items, gpus, 0) == 3 * gpus
    assert makespan(pack(items, gpus, 0)) == 3 * gpus


def test_chains_memory_and_shares_hold_at_every_instant():
    shared, hours, greedy = 0, 0.0, 0.0
    for seed in range(INSTANCES):
        items, gpus = chained(random.Random(seed))
        schedule = pack(items, gpus, MEMORY)
        assert problems(schedule, items, gpus, MEMORY) == [], seed
        end = makespan(schedule)
        alone = makespan(pack([dataclasses.replace(item, share=1.0) for item in items], gpus, MEMORY))
        assert end >= lower_bound(items, gpus, MEMORY) * (1 - 1e-9), seed
        assert end <= alone, seed
        shared += end < alone
        hours, greedy = hours + alone, greedy + one_at_a_time(items, gpus)
    assert shared > INSTANCES / 3  # half of the items could share a GPU
    assert hours < greedy


def test_no_bound_is_above_the_best_schedule():
    """By trying all of them: a GPU for each item, for few items that run alone."""
    for seed in range(200):
        rng = random.Random(seed)
        gpus = rng.randint(2, 3)
        items = [Item(f"i{n}", float(rng.randint(1, 9))) for n in range(rng.randint(1, 7))]
        best = min(
            max(
                sum(item.hours for item, at in zip(items, where, strict=True) if at == g) for g in range(gpus)
            )
            for where in _everywhere(len(items), gpus)
        )
        assert lower_bound(items, gpus, 0) <= best + 1e-9, seed
        assert makespan(pack(items, gpus, 0)) >= best - 1e-9, seed


def _everywhere(count: int, gpus: int) -> list[tuple[int, ...]]:
    if not count:
        return [()]
    return [(*rest, gpu) for rest in _everywhere(count - 1, gpus) for gpu in range(gpus)]


def test_a_chain_stays_on_its_gpu_where_that_costs_nothing():
    items = [
        Item(f"{arm}{stage}", 1.0, after=(f"{arm}{stage - 1}",) if stage else ())
        for arm in "abcd"
        for stage in range(3)
    ]
    homes = {(p.item.name[0], p.gpu) for p in pack(items, 4, 0)}
    assert len(homes) == 4


def test_the_schedule_is_the_same_every_time():
    items, gpus = chained(random.Random(7))
    assert pack(items, gpus, MEMORY) == pack(items, gpus, MEMORY)


def test_many_items_are_packed():
    rng = random.Random(0)
    items = [Item(f"i{n}", rng.uniform(1, 5), 10, rng.choice([0.2, 0.5, 1.0])) for n in range(400)]
    schedule = pack(items, 8, MEMORY)
    assert problems(schedule, items, 8, MEMORY) == []


@pytest.mark.parametrize(
    ("items", "gpus", "message"),
    [
        ([Item("big", 1, 101 * 2**30)], 1, "item big: takes 101.0 GiB, and a GPU has 100.0"),
        ([Item("a", 1, after=("b",))], 1, "item a: follows 'b', which is not there"),
        ([Item("a", 1, after=("b",)), Item("b", 1, after=("a",))], 1, "item a: follows itself"),
        ([Item("a", 1, after=("a",))], 1, "item a: follows itself"),
        ([Item("a", 1), Item("a", 2)], 1, "item a: two have this name"),
        ([Item("a", 1)], 0, "gpus=0: must be 1 or more"),
    ],
)
def test_what_cannot_be_packed_is_said(items, gpus, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        pack(items, gpus, 100 * 2**30)


@pytest.mark.parametrize(
    "fields", [{"hours": 0}, {"hours": float("nan")}, {"share": 0}, {"share": 1.1}, {"memory": -1}]
)
def test_an_item_that_makes_no_sense_is_refused(fields):
    with pytest.raises(UserError, match=f"item a: {next(iter(fields))}="):
        Item(**{"name": "a", "hours": 1.0, **fields})


# ------------------------------------------------------------------------ what looks at schedules can say no


def _packed() -> tuple[list[Item], list[Placed]]:
    items = [
        Item("a", 2, 60, 0.6),
        Item("b", 1, 60, 0.3),
        Item("c", 1, 30, 0.6),
        Item("d", 1, 10, 0.3, ("a",)),
    ]
    return items, list(pack(items, 1, MEMORY))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"gpu": 1}, "d is on GPU 1"),
        ({"start": 1.5, "end": 2.5}, "d starts before a ends"),
        ({"end": 100.0}, "d does not take its hours"),
    ],
)
def test_a_broken_placement_is_reported(broken, message):
    items, schedule = _packed()
    assert problems(schedule, items, 1, MEMORY) == []
    at = next(i for i, p in enumerate(schedule) if p.item.name == "d")
    schedule[at] = dataclasses.replace(schedule[at], **broken)
    assert message in problems(schedule, items, 1, MEMORY)


def test_what_is_over_or_missing_is_reported():
    items, schedule = _packed()
    together = [dataclasses.replace(p, start=10.0, end=10.0 + p.item.hours) for p in schedule]
    found = problems(together, items, 1, MEMORY)
    assert "GPU 0 at 10.0: memory" in found
    assert "GPU 0 at 10.0: share" in found
    assert problems(schedule[1:], items, 1, MEMORY) == [
        f"{schedule[0].item.name} is missing",
        "3 placed of 4",
    ]


def test_a_packer_that_forgets_a_limit_is_caught(monkeypatch):
    """The 1,000 instances do hold schedules in which memory, shares and order matter."""
    monkeypatch.setattr(packing._Timeline, "earliest", lambda self, item, ready: ready)
    found = set()
    for seed in range(50):
        items, gpus = chained(random.Random(seed))
        found |= {text.split()[-1] for text in problems(pack(items, gpus, MEMORY), items, gpus, MEMORY)}
    assert found >= {"memory", "share"}


def test_a_packer_that_forgets_chains_is_caught(monkeypatch):
    real = packing._schedule
    monkeypatch.setattr(
        packing,
        "_schedule",
        lambda order, gpus, memory: real([dataclasses.replace(i, after=()) for i in order], gpus, memory),
    )
    items = [Item("a", 1), Item("b", 2, after=("a",))]
    assert problems(pack(items, 2, 0), items, 2, 0) == ["b starts before a ends"]
