"""A launcher that follows a plan starts jobs in its order, never puts too much on a GPU, and takes what it says."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest

from jaxablate.errors import UserError
from jaxablate.schedule import cohorts
from jaxablate.schedule.cohorts import Job
from jaxablate.schedule.plan import follow
from jaxablate.schedule.plan.packing import Item
from jaxablate.schedule.plan.plan import Plan
from jaxablate.schedule.plan.work import TO_BE_CHOSEN
from jaxablate.schedule.retries import PENDING
from jaxablate.study import Run
from tests.schedule.plan.made_estimates import CAPACITY, made_plan


def job(arm: str, seed: int = 0, phase: str = "confirm", rate: float = 0.1) -> Job:
    assert phase in ("confirm", "tuning")
    return Job(arm, phase, (Run(0, arm, phase, seed, rate, "", f"{arm}-{seed}"),))


def carry_out(plan: Plan, items: Sequence[Item], gpus: Sequence[str]) -> dict[str, tuple[float, float, str]]:
    """What a launcher does, if every cohort takes the hours that the plan assumes: name -> start, end, GPU."""
    devices, now = follow.devices(plan, gpus), 0.0
    done: dict[str, tuple[float, float, str]] = {}
    while len(done) < len(items):
        at_work = {name: found for name, found in done.items() if found[1] > now}
        ended = done.keys() - at_work.keys()
        ready = [job(i.name) for i in items if i.name not in done and ended >= set(i.after)]
        busy = [(gpu, job(name)) for name, (_, _, gpu) in at_work.items()]
        hours = {item.name: item.hours for item in items}
        for gpu, started in follow.assign(plan, ready, devices, busy):
            done[started.arm] = (now, now + hours[started.arm], gpu)
        now = min(end for _, end, _ in done.values() if end > now)
    return done


def drawn(rng: random.Random) -> tuple[list[Item], int]:
    items: list[Item] = []
    for n in range(rng.randint(2, 14)):
        after = tuple(item.name for item in rng.sample(items, min(len(items), rng.choice([0, 0, 1]))))
        share, memory = rng.choice([1.0, 0.3, 0.5, 0.6]), rng.randint(1, CAPACITY)
        items.append(Item(f"arm{n}", rng.uniform(0.1, 5), memory, share, after))
    return items, rng.randint(1, 4)


@pytest.mark.parametrize("seed", range(200))
def test_memory_and_shares_hold_while_a_plan_is_followed(seed):
    items, gpus = drawn(random.Random(seed))
    done = carry_out(made_plan(items, gpus), items, [str(n) for n in range(gpus)])
    for start, _, gpu in done.values():
        beside = [i for i in items if done[i.name][2] == gpu and done[i.name][0] <= start < done[i.name][1]]
        alone = len(beside) == 1
        assert alone or sum(item.share for item in beside) <= 1 + 1e-6
        assert sum(item.memory for item in beside) <= CAPACITY
    for item in items:
        assert all(done[item.name][0] >= done[name][1] for name in item.after)


def test_a_plan_takes_what_it_says_if_its_hours_are_right():
    """Of independent cohorts exactly; chains and shares may start a little otherwise than packed."""
    for seed in range(100):
        items, gpus = drawn(random.Random(seed))
        single = [Item(item.name, item.hours, item.memory) for item in items]
        plan = made_plan(single, gpus)
        ends = carry_out(plan, single, [str(n) for n in range(gpus)])
        assert max(end for _, end, _ in ends.values()) == pytest.approx(plan.makespan)
        plan = made_plan(items, gpus)
        ends = carry_out(plan, items, [str(n) for n in range(gpus)])
        assert max(end for _, end, _ in ends.values()) <= 1.5 * (plan.makespan or 0)


def test_jobs_come_in_the_plans_order_and_unknown_ones_last():
    plan = made_plan([Item("short", 1.0), Item("long", 3.0), Item("middle", 2.0)], 1)
    jobs = [job("short"), job("new"), job("long"), job("middle", seed=7), job("middle")]
    assert [j.arm for j in follow.ordered(plan, jobs)] == ["long", "middle", "short", "new", "middle"]


def test_a_part_of_a_cohort_is_unknown_since_it_did_not_fit_as_planned():
    plan = made_plan([Item("a", 3.0), Item("b", 2.0)], 1)
    both = dataclasses.replace(plan.elements[0], seeds=(0, 1), members=2)
    plan = dataclasses.replace(plan, elements=(both, plan.elements[1]))
    whole = Job("a", "confirm", (*job("a").runs, *job("a", seed=1).runs))
    assert follow.element_of(plan, whole) == both
    assert follow.element_of(plan, job("a")) is None
    assert follow.element_of(plan, dataclasses.replace(whole, split=2)) is None
    assert [j.arm for j in follow.ordered(plan, [job("a"), job("b")])] == ["b", "a"]


def test_a_rate_beyond_the_grid_is_unknown():
    plan = made_plan([Item("a", 1.0)], 1)
    tuned = dataclasses.replace(plan.elements[0], phase="tuning", rates=(0.1, 0.2))
    plan = dataclasses.replace(plan, elements=(tuned,))
    assert follow.element_of(plan, job("a", phase="tuning", rate=0.2)) == tuned
    assert follow.element_of(plan, job("a", phase="tuning", rate=0.4)) is None
    assert follow.element_of(plan, job("a", phase="confirm", rate=0.2)) is None


def test_each_goes_to_its_own_gpu_and_to_another_one_if_that_is_busy():
    plan = made_plan([Item("a", 3.0), Item("b", 2.0), Item("c", 1.0)], 2)
    first = [(e.gpu, e.arm) for e in plan.elements if e.start == 0]
    assert follow.assign(plan, [job("b"), job("a")], ["4", "7"], []) == [
        ("47"[gpu or 0], job(arm)) for gpu, arm in first
    ]
    assert follow.assign(plan, [job("c")], ["4", "7"], [("7", job("b"))]) == [("4", job("c"))]
    assert follow.assign(plan, [job("c")], ["4", "7"], [("4", job("a")), ("7", job("b"))]) == []


def test_what_the_plan_does_not_know_has_a_gpu_to_itself():
    items = [Item("a", 1.0, 10, 0.2), Item("b", 1.0, 10, 0.2)]
    plan = made_plan(items, 1)
    devices = follow.devices(plan, ["0"])
    assert devices == ["0", "0"]
    assert len(follow.assign(plan, [job("a"), job("b")], devices, [])) == 2
    assert [j.arm for _, j in follow.assign(plan, [job("new"), job("a")], devices, [])] == ["a"]
    assert [j.arm for _, j in follow.assign(plan, [job("new")], devices, [])] == ["new"]


def test_workers_that_share_a_gpu_share_its_memory(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    plan = made_plan([Item("a", 1.0, 20, 0.4), Item("b", 1.0, 60, 0.4)], 1)
    fractions = [follow.memory_fraction(plan, job(arm)) for arm in "ab"]
    assert fractions == [pytest.approx(0.75 * 1.1 * 0.2), pytest.approx(0.75 * 1.1 * 0.6)]
    alone = made_plan([Item("a", 1.0, 20), Item("b", 1.0, 60)], 1)
    assert follow.memory_fraction(alone, job("a")) is None


@pytest.mark.parametrize("share", ["0.95", "1", "0.333"])
@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_what_shares_a_gpu_never_gets_more_than_the_whole(monkeypatch, name, share):
    for either in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(either, raising=False)
    monkeypatch.setenv(name, share)
    for halves in ((50, 50), (33, 66), (20, 20, 55), (1, 0, 98)):
        items = [Item(f"arm{n}", 1.0, memory, 0.3) for n, memory in enumerate(halves)]
        plan = made_plan(items, 1)
        assert follow.workers_per_gpu(plan) == len(halves)
        fractions = [follow.memory_fraction(plan, job(item.name)) or 0.0 for item in items]
        assert sum(fractions) <= float(share) + 1e-9
        assert all(fraction > 0 for fraction in fractions)  # jax takes 0 for nothing at all
        assert sum(fractions) >= 0.98 * float(share) * min(1.1 * sum(halves) / 100, 1)


@pytest.mark.parametrize("said", ["most", "0", "1.5"])
def test_a_share_that_is_said_badly_is_one_line_before_anything_starts(monkeypatch, said):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", said)
    plan = made_plan([Item("a", 1.0, 20, 0.4), Item("b", 1.0, 60, 0.4)], 1)
    with pytest.raises(UserError, match=f"XLA_CLIENT_MEM_FRACTION={said}: must be a number"):
        follow.devices(plan, ["0"])
    assert follow.devices(made_plan([Item("a", 1.0)], 1, "cpu"), []) == [""]  # of no importance there


def test_processes_on_a_cpu_keep_to_its_memory_together():
    plan = made_plan([Item("a", 3.0, 90), Item("b", 2.0, 90), Item("c", 1.0, 90)], 2, "cpu")

    def of(held: int) -> Plan:
        """If `a` takes that much after all; each of two processes has 100."""
        own = [dataclasses.replace(e, memory=held) if e.arm == "a" else e for e in plan.elements]
        return dataclasses.replace(plan, elements=tuple(own))

    jobs = [job("a"), job("b"), job("c")]
    assert [j.arm for _, j in follow.assign(of(110), jobs, ["", ""], [])] == ["a", "b"]
    assert [j.arm for _, j in follow.assign(of(111), jobs, ["", ""], [])] == ["a"]
    assert follow.assign(of(111), jobs[1:], ["", ""], [("", job("a"))]) == []


def test_confirmations_whose_rate_is_to_be_chosen_are_cut_and_split_and_ordered_as_planned():
    plan = made_plan([Item("a", 3.0), Item("b", 2.0)], 1)
    first, other = plan.elements
    two = dataclasses.replace(first, seeds=(2, 3), members=2, split=4, name="a/1")
    late = dataclasses.replace(first, seeds=(0, 1), members=2, split=4, name="a/2", start=7.0)
    tuning = dataclasses.replace(first, phase="tuning", seeds=(0, 1, 2), rates=(0.1,), members=9, start=0.0)
    plan = dataclasses.replace(plan, elements=(tuning, two, other, late))
    to_come = [
        Run(n, arm, "confirm", n % 4, TO_BE_CHOSEN, "", "") for n, arm in enumerate(["a"] * 4 + ["b", "new"])
    ]
    looks = follow.company(plan, dict.fromkeys(to_come, PENDING))
    jobs = follow.ordered(plan, cohorts.plan(to_come, looks, {"tuning": 99, "confirm": 99}))
    assert [(j.arm, [run.seed for run in j.runs], j.split) for j in jobs] == [
        ("a", [2, 3], 4),
        ("b", [0], 1),
        ("a", [0, 1], 4),
        ("new", [1], 1),
    ]


def test_on_a_cpu_every_process_has_a_place():
    plan = made_plan([Item("a", 1.0), Item("b", 1.0), Item("c", 1.0)], 2, "cpu")
    assert follow.devices(plan, []) == ["", ""]
    assert [j.arm for _, j in follow.assign(plan, [job("a"), job("b"), job("c")], ["", ""], [])] == ["a", "b"]
    assert follow.memory_fraction(plan, job("a")) is None


def test_more_gpus_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"--gpus=2: this machine has 1"):
        follow.devices(made_plan([Item("a", 1.0)], 2), ["0"])


def test_cohorts_are_as_small_as_the_plan_has_them():
    plan = made_plan([Item("a", 1.0)], 1)
    runs = dict.fromkeys((job("a").runs[0], job("b").runs[0]), PENDING)
    looks = follow.company(plan, runs)
    assert [look.members for look in looks.values()] == [1, None]
