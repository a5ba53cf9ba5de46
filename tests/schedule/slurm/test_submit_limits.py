"""Into which arrays and elements `submit` cuts what it has: SLURM's limits, the site's, a plan's."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
from pathlib import Path

import pytest

from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.schedule.slurm import elements, verbs
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm import submit as submits
from jaxablate.schedule.slurm.left import SubmitOptions
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submit import submit
from tests.schedule.slurm.fake_slurm import FakeSlurm
from tests.schedule.slurm.submitting import newest, option, plan_of, submitted
from tests.schedule.toy_studies import STUDIES

# --------------------------------------------------------------------------------------------- limits


def test_an_array_is_cut_where_slurm_takes_no_longer_one(tmp_path: Path, fake: FakeSlurm) -> None:
    fake.write(max_array_size=4)
    submitted(tmp_path, site=Site(array_limit=4))
    first, second = fake.calls("sbatch")
    assert (option(first, "array"), first[-1]) == ("0-3%2", "--first=0")
    assert (option(second, "array"), second[-1]) == ("0-1", "--first=4")
    assert newest(tmp_path).tasks() == {
        0: "100_0",
        1: "100_1",
        2: "100_2",
        3: "100_3",
        4: "101_0",
        5: "101_1",
    }


def test_cut_levels_wait_for_exactly_the_arrays_they_need() -> None:
    one = [records.Element(n, f"a{n}", "tuning", (f"r{n}",), (0,)) for n in range(5)]
    two = [records.Element(5 + n, f"a{n}", "confirm", (), (0,), after=(n,)) for n in range(5)]
    arrays = elements.cut([tuple(one), tuple(two)], 2)
    assert [(a.first, a.count, a.after) for a in arrays] == [
        (0, 2, ()), (2, 2, ()), (4, 1, ()), (5, 2, (0,)), (7, 2, (1,)), (9, 1, (2,)),
    ]  # fmt: skip


def most_at_a_time(arrays: tuple[records.Array, ...], throttle: int) -> int:
    """Elements that run together if SLURM starts all that it may, whatever has ended before."""

    def waits(n: int) -> set[int]:
        return {m for before in arrays[n].after for m in (before, *waits(before))}

    behind, most = [waits(n) for n in range(len(arrays))], 0
    for chosen in itertools.product((False, True), repeat=len(arrays)):
        own = [n for n, is_in in enumerate(chosen) if is_in]
        if not any(behind[n] & set(own) for n in own):
            most = max(most, sum(min(arrays[n].count, throttle) for n in own))
    return most


def test_no_cut_lets_more_elements_run_than_the_limit() -> None:
    rng = random.Random(0)
    for _ in range(200):
        n, first, longest, limit = rng.randint(1, 6), rng.randint(1, 9), rng.randint(2, 4), rng.randint(1, 6)
        one = tuple(records.Element(i, f"a{i}", "tuning", (f"r{i}",), (0,)) for i in range(first))
        two = tuple(
            records.Element(first + i, f"a{i}", "confirm", (), (0,), after=(rng.randrange(first),))
            for i in range(n)
        )
        arrays = elements.cut([one, two], longest, limit)
        assert most_at_a_time(arrays, elements.throttle(limit, arrays)) <= limit
        for array in arrays:
            for index in range(array.first, array.first + array.count):
                needed = {m for m, a in enumerate(arrays) for i in (*one, *two)[index].after
                          if a.first <= i < a.first + a.count}  # fmt: skip
                assert needed <= set(array.after)
    # The control: without a limit the arrays of a level run side by side, whatever each is throttled to.
    assert most_at_a_time(elements.cut([one], 2), 1) == -(-len(one) // 2)


def test_arrays_that_follow_one_another_each_have_the_whole_limit(tmp_path: Path, fake: FakeSlurm) -> None:
    assert elements.throttle(4, (records.Array(1, 0, 8), records.Array(2, 8, 8, (0,)))) == 4
    fake.write(max_array_size=2)
    submitted(tmp_path, site=Site(array_limit=2))
    found = [(option(argv, "array"), option(argv, "dependency")) for argv in fake.calls("sbatch")]
    assert found == [("0-1%1", ""), ("0-1%1", ""), ("0-1%1", "afterany:100")]


def test_cohorts_of_an_arm_share_an_element_where_the_queue_is_short(tmp_path: Path, fake: FakeSlurm) -> None:
    outcome = submitted(tmp_path, max_members=1, site=Site(max_submit=8))
    assert [len(e.runs) for e in outcome.submission.elements] == [2] * 6
    assert newest(tmp_path).max_members == 1
    with pytest.raises(UserError, match="6 elements, and SLURM takes 2 more of this user's jobs") as caught:
        submitted(tmp_path / "b", site=Site(max_submit=8))
    assert "--group" in str(caught.value)
    assert len(fake.jobs) == 1
    assert records.submissions(tmp_path / "b" / "toy") == []


# -------------------------------------------------------------------------------------------- by plan


@pytest.mark.parametrize("gres", ["gpu:1", "gpu:4"])
def test_a_planned_cohort_keeps_its_members_wherever_it_is_sent(
    tmp_path: Path, fake: FakeSlurm, gres: str
) -> None:
    study = dataclasses.replace(STUDIES["faults"](str(tmp_path)), seeds=tuple(range(8)))
    outcome = submit(study, Site(gres=gres), SubmitOptions(plan=plan_of(study, 2, split=2)))
    found = [(len(e.runs), e.members, e.split) for e in outcome.submission.elements]
    assert found == ([(2, 2, 2)] * 24 if gres == "gpu:1" else [(8, 2, 2)] * 6)
    plain = submit(study, Site(gres=gres), SubmitOptions(), "dry run")
    assert plain.submission is None  # all are queued
    arms = list(dict.fromkeys(e.arm for e in outcome.submission.elements))
    assert arms == [arm.name for arm in reversed(study.arms)]


def test_confirmations_to_come_are_cut_as_the_plan_cuts_them(tmp_path: Path, fake: FakeSlurm) -> None:
    study = dataclasses.replace(STUDIES["tuned"](str(tmp_path)), seeds=(3, 1, 0, 2, 4))
    outcome = submit(study, Site(), SubmitOptions(plan=plan_of(study, 3)))
    found = [(e.arm, e.seeds, e.members, e.runs) for e in outcome.submission.elements if e.phase == "confirm"]
    assert found == [(arm, own, len(own), ()) for arm in ("wide", "baseline") for own in ((0, 1, 3), (2, 4))]
    free = submit(study, Site(), SubmitOptions(max_members=4), "prepare")
    assert free.submission is None


def test_what_is_tried_again_keeps_the_bounds_of_its_plan(tmp_path: Path, fake: FakeSlurm) -> None:
    study = STUDIES["faults"](str(tmp_path))
    first = submit(study, Site(), SubmitOptions(plan=plan_of(study, 1, split=2))).submission
    fake.end()
    again = submits.resubmit(manifest := Manifest.load(tmp_path / "toy"), manifest.runs[:4], first, [])
    assert [(len(e.runs), e.members, e.split) for e in again.elements] == [(1, 1, 2)] * 4


@pytest.mark.parametrize(
    ("gpus", "gres", "limit", "expected"),
    [(8, "gpu:4", 0, 2), (9, "gpu:4", 0, 2), (8, "gpu:1", 3, 3), (2, "gpu:1", 5, 2), (8, "", 0, 8)],
)
def test_so_many_gpus_are_so_many_elements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, gres: str, limit: int, expected: int
) -> None:
    sent: list[Site] = []
    profile = tmp_path / "site.toml"
    profile.write_text(f'gres = "{gres}"\narray_limit = {limit}\n')
    monkeypatch.setattr(submits, "submit", lambda study, site, options, mode: sent.append(site))
    found = plan_of(STUDIES["faults"]("runs"), 1)
    monkeypatch.setattr(
        verbs.planning, "submitted", lambda args, study, options: dataclasses.replace(options, plan=found)
    )
    parser = argparse.ArgumentParser()
    parser.add_argument("study")
    for name in ("--group", "--arm", "--seeds"):
        parser.add_argument(name, default="")
    verbs.submit_arguments(parser)
    words = ["tests/configs/toy_study.py", f"--site={profile}"]
    verbs.submit(parser.parse_args([*words, f"--gpus={gpus}"]), [])
    assert sent[0].array_limit == expected
    if gres == "gpu:4":
        with pytest.raises(UserError, match="--gpus=3: an element takes 4 on this site"):
            verbs.submit(parser.parse_args([*words, "--gpus=3"]), [])
