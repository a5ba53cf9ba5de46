"""What becomes of a run, by its history alone; and how runs are packed into cohorts."""

from __future__ import annotations

from typing import Any

import pytest

from jaxablate.schedule.cohorts import Job, plan
from jaxablate.schedule.retries import Outlook, outlook
from jaxablate.study import Run

MICRO_BATCH = 8


def history(*attempts: Any) -> list[dict[str, Any]]:
    """Rows of attempts: `("oom", 4)` ended so with four members, `("oom", 1, 2)` with split 2; a word is a mark."""
    rows: list[dict[str, Any]] = []
    number = 0
    for attempt in attempts:
        time = f"2026-01-01T00:00:{len(rows):02}"
        if isinstance(attempt, str):
            rows.append({"attempt": number, "state": attempt, "time": time, "reason": "by hand"})
            continue
        state, members, split = (*attempt, 1)[:3]
        number += 1
        rows.append({"attempt": number, "state": "running", "time": time, "members": members, "split": split})
        if state != "running":
            rows.append({"attempt": number, "state": state, "time": time, "reason": f"was {state}"})
    return rows


def look(*attempts: Any, **options: Any) -> Outlook:
    return outlook(history(*attempts), MICRO_BATCH, **options)


@pytest.mark.parametrize("state", ["done", "diverged", "timeout", "cancelled"])
def test_these_are_never_tried_again(state: str) -> None:
    assert look((state, 3)).next == "nothing"
    assert look(("preempted", 3)).next == "train"  # the other answer


def test_an_interruption_within_a_stage_is_no_pause_at_its_end() -> None:
    until = ("first", "")  # of an element of the first stage; the last one has no name
    assert look(("preempted", 3), until=until).next == "train"
    rows = history(("preempted", 3))
    assert outlook([*rows[:-1], {**rows[-1], "paused": "first"}], MICRO_BATCH, until=until).next == "nothing"


@pytest.mark.parametrize("state", ["preempted", "node_fail", "oom", "running"])
def test_a_run_that_is_interrupted_in_a_stage_has_the_one_before_behind_it(state: str) -> None:
    rows = history(("preempted", 2), (state, 2))
    of_the_first, of_the_second = ("first", ""), ()
    assert outlook(rows, MICRO_BATCH, until=of_the_first).paused == ""
    rows[1]["paused"] = "first"
    found = outlook(rows, MICRO_BATCH, until=of_the_first)
    assert (found.state, found.next, found.paused) == (state, "nothing", "first")
    assert outlook(rows, MICRO_BATCH, until=of_the_second).next == "train"


def test_what_never_ran_or_was_abandoned_is_trained() -> None:
    assert look() == Outlook("pending", "", "train")
    assert look(("running", 3)).next == "train"


def test_out_of_memory_halves_the_cohort_and_then_splits_the_batch_until_nothing_is_left() -> None:
    taught = []
    failures: list[tuple[str, int, int]] = [("oom", 5, 1)]
    while (found := look(*failures)).next == "train":
        taught.append((found.members, found.split))
        failures.append(("oom", found.members or 5, found.split))
    assert taught == [(2, 1), (1, 1), (1, 2), (1, 4), (1, 8)]  # and 16 does not divide the 8
    assert found.state == "oom"


def test_a_batch_that_cannot_be_split_is_not() -> None:
    assert outlook(history(("oom", 1)), micro_batch=3).next == "nothing"
    assert outlook(history(("oom", 1)), micro_batch=6).split == 2


def test_a_bug_in_a_cohort_is_tried_alone_once_and_a_bug_alone_is_not() -> None:
    together = look(("bug", 3))
    assert (together.next, together.company) == ("train", "alone")
    assert look(("bug", 3), ("bug", 1)).next == "nothing"
    assert look(("bug", 1)).next == "nothing"
    assert look(("bug", 3), ("preempted", 1)).company == "alone"  # a stop in between changes nothing


def test_input_that_was_refused_is_not_tried_member_by_member() -> None:
    rows = history(("bug", 3))
    rows[-1]["reason"] = "UserError: toy.csv: is broken; mend it"
    assert outlook(rows, MICRO_BATCH).next == "nothing"


@pytest.mark.parametrize("state", ["node_fail", "preempted"])
def test_an_interrupted_run_is_taken_up_a_few_times_in_one_launch(state: str) -> None:
    assert [look(*[(state, 1)] * n, retries=3).next for n in (1, 3, 4)] == ["train", "train", "nothing"]
    assert look(*[(state, 1)] * 4, since="2026-01-01T00:00:02").next == "train"  # the first was before


def test_retry_starts_the_counts_anew() -> None:
    assert look(("bug", 1), "pending").next == "train"
    assert look(("oom", 4), "pending") == Outlook("pending", "by hand", "train")
    assert look(("bug", 1), "pending", ("bug", 1)).next == "nothing"


def test_a_run_that_was_cancelled_while_it_trained_stays_so_unless_it_finished_first() -> None:
    cancelled = history(("running", 2), "cancelled")
    stopped = [*cancelled, {"attempt": 1, "state": "preempted", "time": "2026-01-01T00:00:09"}]
    finished = [*cancelled, {"attempt": 1, "state": "done", "time": "2026-01-01T00:00:09"}]
    assert (outlook(stopped, 8).state, outlook(stopped, 8).next) == ("cancelled", "nothing")
    assert outlook(finished, 8).state == "done"


# ------------------------------------------------------------------------------------------ cohorts


def runs(arm: str, count: int, phase: Any = "confirm", first: int = 0) -> list[Run]:
    return [Run(first + n, arm, phase, n, 0.1, "f" * 12, f"{arm}{n}") for n in range(count)]


def planned(todo: list[Run], looks: dict[Run, Outlook] | None = None, most: int = 100) -> list[Job]:
    pending = {run: Outlook("pending", "", "train") for run in todo}
    return plan(todo, pending | (looks or {}), {"confirm": most, "tuning": most})


def shape(jobs: list[Job]) -> list[tuple[str, int, int]]:
    return [(job.arm, len(job.runs), job.split) for job in jobs]


def test_an_arm_is_one_cohort_and_phases_never_mix() -> None:
    tuning, confirm, other = runs("a", 3, "tuning"), runs("a", 2, first=3), runs("b", 2, first=5)
    jobs = planned([*confirm, *other, *tuning])
    assert [(job.arm, job.phase, len(job.runs)) for job in jobs] == [
        ("a", "tuning", 3), ("a", "confirm", 2), ("b", "confirm", 2),
    ]  # fmt: skip
    assert sorted(run.index for job in jobs for run in job.runs) == list(range(7))


@pytest.mark.parametrize(
    ("count", "most", "sizes"), [(6, 4, [3, 3]), (7, 4, [4, 3]), (3, 1, [1, 1, 1]), (2, 9, [2])]
)
def test_cohorts_are_as_equal_as_can_be(count: int, most: int, sizes: list[int]) -> None:
    assert [len(job.runs) for job in planned(runs("a", count), most=most)] == sizes


def test_what_one_run_taught_holds_for_its_arm_and_no_other() -> None:
    a, b = runs("a", 4), runs("b", 2, first=4)
    finished = Run(9, "a", "confirm", 9, 0.1, "f" * 12, "a9")
    jobs = planned([*a, *b], {finished: Outlook("done", "", "nothing", "cohort", 2, 1)})
    assert shape(jobs) == [("a", 2, 1), ("a", 2, 1), ("b", 2, 1)]
    jobs = planned([*a, *b], {a[0]: Outlook("oom", "", "train", "cohort", 1, 4)})
    assert shape(jobs) == [("a", 1, 4)] * 4 + [("b", 2, 1)]


def test_suspects_are_tried_alone_and_the_rest_stays_together() -> None:
    a = runs("a", 4)
    suspect = Outlook("bug", "", "train", "alone")
    assert shape(planned(a, {a[0]: suspect, a[2]: suspect})) == [("a", 2, 1), ("a", 1, 1), ("a", 1, 1)]


def test_a_pause_at_the_end_of_a_stage_is_no_interruption() -> None:
    rows = history(("preempted", 2), ("preempted", 2), ("preempted", 2))
    assert outlook(rows, MICRO_BATCH, retries=2).next == "nothing"
    rows[-1]["paused"] = "first"
    goes_on = Outlook("preempted", "was preempted", "train", behind="first")
    assert outlook(rows, MICRO_BATCH, retries=2) == goes_on
    ended = outlook(rows, MICRO_BATCH, until=("first", "second"))
    assert (ended.next, ended.paused) == ("nothing", "first")
    assert outlook(rows, MICRO_BATCH, until=("zeroth",)).next == "train"
    failed = outlook([*rows, *history(("bug", 1))], MICRO_BATCH, until=("first",))
    assert (failed.state, failed.paused) == ("bug", "")
