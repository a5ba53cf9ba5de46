"""`jaxablate submit`: all of a submission is queued or nothing, and no run twice. With SLURM's tools played."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import itertools
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxablate import cli, runstore
from jaxablate.claims import Claim, Claimed
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.schedule import local
from jaxablate.schedule.plan.packing import Item
from jaxablate.schedule.plan.plan import Plan, Scheduled
from jaxablate.schedule.slurm import cluster, elements, verbs
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm import submit as submits
from jaxablate.schedule.slurm.left import Options
from jaxablate.schedule.slurm.queue import _PASSING, SlurmError
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import Submission
from jaxablate.schedule.slurm.submit import Outcome, submit
from jaxablate.study import Study
from tests.frozen import write_run
from tests.schedule.plan.made_estimates import made_plan
from tests.schedule.slurm.fake_slurm import SILENT, FakeSlurm
from tests.schedule.toy_studies import STUDIES


@pytest.fixture
def fake(tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    found = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("PATH", found.path)
    monkeypatch.chdir(repo)
    monkeypatch.setattr(cluster, "_PAUSES_S", (0.0, 0.0, 0.0))
    return found


def submitted(workdir: Path, study: str = "faults", site: Site | None = None, **options: Any) -> Outcome:
    return submit(STUDIES[study](str(workdir)), site or Site(), Options(**options))


def frozen(workdir: Path, study: str, **states: runstore.State) -> Manifest:
    """A frozen study; `baseline="done"` gives the state of an arm's runs, the others never ran."""
    declared = STUDIES[study](str(workdir))
    manifest = Manifest.freeze(declared, local.resolve(declared))
    for run in manifest.runs:
        if state := states.get(run.arm):
            write_run(manifest, run, state)
    return manifest


def newest(workdir: Path) -> Submission:
    return records.submissions(workdir / "toy")[-1]


def option(argv: list[str], name: str) -> str:
    return next((word.partition("=")[2] for word in argv if word.startswith(f"--{name}=")), "")


# ------------------------------------------------------------------------------------ what is submitted


def test_an_element_for_each_arm_in_one_array(tmp_path: Path, fake: FakeSlurm) -> None:
    outcome = submitted(tmp_path)
    (argv,) = fake.calls("sbatch")
    assert option(argv, "array") == "0-5"
    record = newest(tmp_path)
    assert outcome.submission == record
    assert record.state == "submitted"
    assert record.jobs() == [100]
    assert record.tasks() == {n: f"100_{n}" for n in range(6)}
    manifest = Manifest.load(tmp_path / "toy")
    carried = [run.id for element in record.elements for run in element.runs_of(manifest)]
    assert carried == [run.id for run in manifest.runs]
    assert (tmp_path / "toy" / "slurm").stat().st_mode & 0o077 == 0


def test_a_dry_run_prints_what_is_submitted_and_writes_nothing(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], repo: Path
) -> None:
    study = "tests/configs/toy_study.py"
    arguments = ["submit", study, f"--workdir={tmp_path / 'runs'}", "--array-limit=2", "--time=01:00:00"]
    assert cli.main([*arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert fake.calls("sbatch") == []
    assert (repo / "launch" / "array.sbatch").read_text().rstrip() in said
    assert cli.main(arguments) == 0
    (argv,) = fake.calls("sbatch")
    (line,) = (line for line in said.splitlines() if line.startswith("sbatch "))
    id = newest(tmp_path / "runs").id
    printed = [
        word.replace(option(shlex.split(line), "comment").split()[1], id) for word in shlex.split(line)
    ]
    assert printed == ["sbatch", *argv]
    assert "--array=0-3%2" in argv
    assert "--time=01:00:00" in argv


def test_a_second_time_nothing_is_submitted_until_it_has_left_the_queue(
    tmp_path: Path, fake: FakeSlurm
) -> None:
    submitted(tmp_path)
    again = submitted(tmp_path)
    assert again.submission is None
    assert again.notes == ("12 runs left out: queued already",)
    assert len(fake.jobs) == 1
    fake.end()  # and the directories say that nothing was done: they are right
    assert len(submitted(tmp_path).submission.elements) == 6
    assert len(fake.jobs) == 2


def test_what_is_done_or_failed_or_worked_on_is_left_out(tmp_path: Path, fake: FakeSlurm) -> None:
    manifest = frozen(tmp_path, "faults", baseline="done", raises="bug", tight="diverged")
    run = next(run for run in manifest.runs if run.arm == "killed")
    manifest.run_dir(run).create(manifest.config_of(run))
    with Claim(manifest.run_dir(run).claim):
        outcome = submitted(tmp_path)
    assert [(e.arm, len(e.runs)) for e in outcome.submission.elements] == [
        ("diverges", 2),
        ("hopeless", 2),
        ("killed", 1),
    ]
    assert "4 runs left out: done" in outcome.notes
    assert "1 run left out: being trained now" in outcome.notes


def test_only_what_was_asked_for(tmp_path: Path, fake: FakeSlurm) -> None:
    outcome = submitted(tmp_path, arms=("killed", "tight"), seeds=(1,))
    assert [(e.arm, e.seeds) for e in outcome.submission.elements] == [("tight", (1,)), ("killed", (1,))]
    frozen(tmp_path / "b", "faults", raises="bug", baseline="done")
    outcome = submitted(tmp_path / "b", only="failed")
    assert [e.arm for e in outcome.submission.elements] == ["raises"]


def test_cohorts_are_no_larger_than_is_allowed(tmp_path: Path, fake: FakeSlurm) -> None:
    outcome = submitted(tmp_path, max_members=1)
    assert [len(e.runs) for e in outcome.submission.elements] == [1] * 12
    outcome = submitted(tmp_path / "b", max_members=1, site=Site(gres="gpu:a100:2"))
    assert [len(e.runs) for e in outcome.submission.elements] == [2] * 6  # one cohort for each GPU


# --------------------------------------------------------------------------------------------- chains


def test_confirmations_wait_for_the_tuning_of_their_arm(tmp_path: Path, fake: FakeSlurm) -> None:
    outcome = submitted(tmp_path, "tuned", on_finish=("true", "now"))
    found = [(e.arm, e.phase, len(e.runs), e.after) for e in outcome.submission.elements]
    assert found == [
        ("baseline", "tuning", 4, ()),
        ("wide", "tuning", 4, ()),
        ("baseline", "confirm", 0, (0,)),
        ("wide", "confirm", 0, (1,)),
    ]
    first, second, last = fake.calls("sbatch")
    assert option(first, "dependency") == ""
    assert option(second, "dependency") == "afterany:100"
    assert option(last, "dependency") == "afterany:100:101"
    assert all("--kill-on-invalid-dep=yes" in argv for argv in (second, last))
    assert last[-1] == "--finish"
    assert newest(tmp_path).finish_job == 102
    assert submitted(tmp_path, "tuned").submission is None


def test_confirmations_of_an_arm_with_a_rate_wait_for_nobody(tmp_path: Path, fake: FakeSlurm) -> None:
    manifest = frozen(tmp_path, "tuned", baseline="done")
    resolved = local.resolve(STUDIES["tuned"](str(tmp_path)))
    manifest.with_rates({"baseline": {"learning_rate": 0.002, "grid": [0.0005, 0.002]}}, resolved)
    outcome = submitted(tmp_path, "tuned")
    found = [(e.arm, e.phase, len(e.runs), e.after) for e in outcome.submission.elements]
    assert found == [("wide", "tuning", 4, ()), ("baseline", "confirm", 2, ()), ("wide", "confirm", 0, (0,))]


def test_an_arm_whose_tuning_failed_is_told_apart(tmp_path: Path, fake: FakeSlurm) -> None:
    frozen(tmp_path, "tuned", wide="bug")
    outcome = submitted(tmp_path, "tuned")
    assert {e.arm for e in outcome.submission.elements} == {"baseline"}
    assert any(note.startswith("wide has no confirmations yet") for note in outcome.notes)


def test_stages_are_chained_if_asked_for(tmp_path: Path, fake: FakeSlurm) -> None:
    declared = STUDIES["slow"](str(tmp_path))
    declared.base.model.stages = "two"
    outcome = submit(declared, Site(), Options(stages="chained"))
    first, second = outcome.submission.elements
    assert (first.stage, first.after, second.stage, second.after) == ("first", (), "", (0,))
    assert first.runs == second.runs
    assert outcome.submission.later(first) == [first, second]
    assert outcome.submission.later(second) == [second]
    assert [option(argv, "dependency") for argv in fake.calls("sbatch")] == ["", "afterany:100"]


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


# --------------------------------------------------------------------------------------------- faults

TWO = {"study": "tuned"}  # of two arrays


def test_a_refusal_leaves_nothing_in_the_queue(tmp_path: Path, fake: FakeSlurm) -> None:
    fake.answer("sbatch", "ok", "Batch job submission failed: Invalid partition name specified")
    with pytest.raises(UserError, match="Invalid partition name") as caught:
        submitted(tmp_path, **TWO)
    assert "\n" not in str(caught.value)
    assert fake.states == ["CANCELLED"]
    assert newest(tmp_path).state == "withdrawn"
    assert submitted(tmp_path, **TWO).submission.state == "submitted"
    assert fake.states == ["CANCELLED", "PENDING", "PENDING"]


def test_what_got_no_answer_is_handed_over_again(tmp_path: Path, fake: FakeSlurm) -> None:
    fake.answer("sbatch", "silent", "ok", "silent", "silent", "ok")
    assert submitted(tmp_path, **TWO).submission.jobs() == [100, 101]
    assert fake.states == ["PENDING", "PENDING"]


def test_a_lost_answer_does_not_submit_twice(tmp_path: Path, fake: FakeSlurm) -> None:
    fake.answer("sbatch", "lost", "lost")
    assert submitted(tmp_path, **TWO).submission.jobs() == [100, 101]
    assert len(fake.jobs) == 2


def test_a_controller_that_stays_silent_is_one_line(tmp_path: Path, fake: FakeSlurm) -> None:
    fake.answer("sbatch", "ok", *["silent"] * 3)
    with pytest.raises(
        UserError, match=r"Unable to contact slurm controller.*the next `jaxablate submit`"
    ) as caught:
        submitted(tmp_path, **TWO)
    assert "\n" not in str(caught.value)
    assert fake.states == ["PENDING"]  # SLURM may have taken the second one too
    assert newest(tmp_path).state == "submitting"
    submitted(tmp_path, **TWO)
    assert [one.state for one in records.submissions(tmp_path / "toy")] == ["withdrawn", "submitted"]
    assert fake.states == ["CANCELLED", "PENDING", "PENDING"]


def test_an_answer_that_is_lost_at_the_last_attempt_is_looked_for_too(
    tmp_path: Path, fake: FakeSlurm
) -> None:
    fake.answer("sbatch", "silent", "silent", "lost")
    assert submitted(tmp_path).submission.jobs() == [100]
    assert (fake.states, newest(tmp_path).state) == (["PENDING"], "submitted")


def test_an_array_of_which_nobody_knows_is_never_withdrawn_while_it_is_queued(
    tmp_path: Path, fake: FakeSlurm
) -> None:
    fake.answer("sbatch", "lost")
    fake.answer("squeue", *["silent"] * 4)
    with pytest.raises(UserError, match="whether it was accepted cannot be told"):
        submitted(tmp_path)
    assert (fake.states, newest(tmp_path).state) == (["PENDING"], "submitting")
    assert submitted(tmp_path).submission is None  # which found it
    assert (fake.states, newest(tmp_path).state) == (["PENDING"], "submitted")
    assert newest(tmp_path).jobs() == [100]


def test_ctrl_c_in_the_middle_leaves_what_the_next_submit_settles(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = cluster.accept

    def pressed(argv: list[str], comment: str) -> int:
        if fake.jobs:
            raise KeyboardInterrupt
        return real(argv, comment)

    monkeypatch.setattr(cluster, "accept", pressed)
    with pytest.raises(KeyboardInterrupt):
        submitted(tmp_path, **TWO)
    monkeypatch.setattr(cluster, "accept", real)
    (line,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "interrupted; the next `jaxablate submit`" in line
    assert (newest(tmp_path).state, newest(tmp_path).jobs()) == ("submitting", [100])
    submitted(tmp_path, **TWO)
    assert fake.states == ["CANCELLED", "PENDING", "PENDING"]


@pytest.mark.parametrize(
    ("answer", "job"),
    [
        ("7\n", 7),
        ("7;north\n", 7),
        ("Welcome, 12 nodes\n2026\nsbatch: note\n17;north\n", 17),
        ("7\nBye.\n", 7),
    ],
)
def test_a_sites_wrapper_may_say_more_than_the_job(
    monkeypatch: pytest.MonkeyPatch, answer: str, job: int
) -> None:
    monkeypatch.setattr(cluster, "run_tool", lambda argv, timeout_s: answer)
    assert cluster.accept(["sbatch"], "jaxablate x 0") == job


def test_an_answer_without_a_job_is_no_answer(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "run_tool", lambda argv, **options: "fine, 12 nodes\n")
    with pytest.raises(SlurmError, match="names no job") as caught:
        cluster.accept(["sbatch"], "jaxablate x 0")
    assert caught.value.kind == "silent"


# ------------------------------------------------------------------------------ what the queue says


@pytest.mark.parametrize(
    "sacct", ["echo '100_0|RUNNING|n1|None'", "echo 'Unable to connect to database' >&2; exit 1"]
)
def test_the_accounting_neither_leaves_work_out_nor_blocks(
    tmp_path: Path, fake: FakeSlurm, sacct: str
) -> None:
    fake.add("sacct", sacct)
    submitted(tmp_path)
    again = submitted(tmp_path)
    assert again.submission is None  # squeue has it
    fake.write(jobs=[])  # and forgets it; the accounting's row is stale
    assert len(submitted(tmp_path).submission.elements) == 6


def test_elements_that_slurm_holds_are_released_and_no_others(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(tmp_path, **TWO)
    fake.write(jobs=[*fake.jobs, {"job": 7, "comment": "of another", "count": 1, "state": "PENDING"}])
    fake.hold(100, "launch failed requeued held")
    fake.hold(101, "JobHeldUser")
    fake.hold(7, "launch failed requeued held")
    dry = submit(STUDIES["tuned"](str(tmp_path)), Site(), Options(), "dry run")
    assert any(note.startswith("held by SLURM: 100_0, 100_1;") for note in dry.notes)
    again = submitted(tmp_path, **TWO)
    released = [words for words in fake.calls("scontrol") if words[0] == "release"]
    assert released == [["release", "100_0,100_1"]]
    assert any("`scontrol release 101_0,101_1` lets them start" in note for note in again.notes)
    assert again.submission is None


def test_what_a_chain_has_lost_is_not_taken_for_queued(tmp_path: Path, fake: FakeSlurm) -> None:
    """The second stage is in the queue, and will not take up a run that the first one did not bring to its end."""
    declared = STUDIES["slow"](str(tmp_path))
    declared.base.model.stages = "two"

    def again() -> Outcome:
        return submit(declared, Site(), Options(stages="chained"))

    again()
    manifest = Manifest.load(tmp_path / "toy")
    assert again().submission is None
    fake.write(jobs=[{**job, "state": "FAILED"} if job["job"] == 100 else job for job in fake.jobs])
    whole, torn = (manifest.run_dir(run) for run in manifest.runs)
    for where, run, info in ((whole, manifest.runs[0], {"paused": "first"}), (torn, manifest.runs[1], {})):
        where.create(manifest.config_of(run))
        where.end_attempt(where.begin_attempt(log="logs/a.log"), "preempted", "SIGUSR2", **info)
    record = again().submission
    assert [(e.stage, e.runs) for e in record.elements] == [
        (s, (manifest.runs[1].id,)) for s in ("first", "")
    ]


# -------------------------------------------------------------------------------------------- by plan


def plan_of(study: Study, members: int, split: int = 1) -> Plan:
    """One whose confirmatory cohorts have so many members, in the reverse order of the arms."""
    size = len(study.seeds)
    parts = [study.seeds[n : n + members] for n in range(0, size, members)]
    scheduled = [
        Scheduled(
            name=f"{arm.name}/confirm/{n}", arm=arm.name, phase="confirm", stage="", seeds=seeds, rates=(),
            members=len(seeds), split=split, memory=1, share=1.0, after=(), hours=1.0, gpu=0, start=start,
            end=start + 1,
        )
        for start, (arm, (n, seeds)) in enumerate(
            (arm, part) for arm in reversed(study.arms) for part in enumerate(parts)
        )
    ]  # fmt: skip
    end = float(len(scheduled))
    item = Item("one", 1.0, 1)
    return dataclasses.replace(made_plan([item], 1), elements=tuple(scheduled), makespan=end)


@pytest.mark.parametrize("gres", ["gpu:1", "gpu:4"])
def test_a_planned_cohort_keeps_its_members_wherever_it_is_sent(
    tmp_path: Path, fake: FakeSlurm, gres: str
) -> None:
    study = dataclasses.replace(STUDIES["faults"](str(tmp_path)), seeds=tuple(range(8)))
    outcome = submit(study, Site(gres=gres), Options(plan=plan_of(study, 2, split=2)))
    found = [(len(e.runs), e.members, e.split) for e in outcome.submission.elements]
    assert found == ([(2, 2, 2)] * 24 if gres == "gpu:1" else [(8, 2, 2)] * 6)
    plain = submit(study, Site(gres=gres), Options(), "dry run")
    assert plain.submission is None  # all are queued
    arms = list(dict.fromkeys(e.arm for e in outcome.submission.elements))
    assert arms == [arm.name for arm in reversed(study.arms)]


def test_confirmations_to_come_are_cut_as_the_plan_cuts_them(tmp_path: Path, fake: FakeSlurm) -> None:
    study = dataclasses.replace(STUDIES["tuned"](str(tmp_path)), seeds=(3, 1, 0, 2, 4))
    outcome = submit(study, Site(), Options(plan=plan_of(study, 3)))
    found = [(e.arm, e.seeds, e.members, e.runs) for e in outcome.submission.elements if e.phase == "confirm"]
    assert found == [(arm, own, len(own), ()) for arm in ("wide", "baseline") for own in ((0, 1, 3), (2, 4))]
    free = submit(study, Site(), Options(max_members=4), "prepare")
    assert free.submission is None


def test_what_is_tried_again_keeps_the_bounds_of_its_plan(tmp_path: Path, fake: FakeSlurm) -> None:
    study = STUDIES["faults"](str(tmp_path))
    first = submit(study, Site(), Options(plan=plan_of(study, 1, split=2))).submission
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


def test_what_cannot_be_taken_back_is_said_and_taken_back_next_time(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.answer("sbatch", "ok", "QOSMaxSubmitJobPerUserLimit")
    fake.answer("scancel", "Access denied")
    with pytest.raises(UserError, match=r"jobs 100 were accepted and could not be cancelled") as caught:
        submitted(tmp_path, **TWO)
    assert "QOSMaxSubmitJobPerUserLimit" in str(caught.value)
    assert newest(tmp_path).state == "submitting"
    submitted(tmp_path, **TWO)
    assert [one.state for one in records.submissions(tmp_path / "toy")] == ["withdrawn", "submitted"]
    assert fake.states == ["CANCELLED", "PENDING", "PENDING"]


class _Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("write", "left", "then"), [(2, ["PENDING"], "withdrawn"), (3, ["PENDING"] * 2, "submitted")]
)
def test_a_kill_between_sbatch_and_the_record_loses_no_array(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, write: int, left: list[str], then: str
) -> None:
    writes = 0
    real = records.write

    def killed(study: Path, submission: Submission) -> None:
        nonlocal writes
        writes += 1
        if writes == write:
            raise _Killed
        real(study, submission)

    monkeypatch.setattr(records, "write", killed)
    with pytest.raises(_Killed):
        submitted(tmp_path, **TWO)
    monkeypatch.setattr(records, "write", real)
    assert fake.states == left
    assert newest(tmp_path).state == "submitting"
    assert None in [array.job for array in newest(tmp_path).arrays]
    again = submitted(tmp_path, **TWO)
    first, *rest = records.submissions(tmp_path / "toy")
    assert first.state == then
    if then == "submitted":
        assert first.jobs() == [100, 101]
        assert again.submission is None
        assert fake.states == ["PENDING", "PENDING"]
    else:
        assert fake.states == ["CANCELLED", "PENDING", "PENDING"]
        assert [one.state for one in rest] == ["submitted"]


def test_without_slurm_it_says_what_else_to_do(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"sbatch: not on PATH; .* `jaxablate run`"):
        submitted(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    dry = submit(STUDIES["faults"](str(tmp_path / "runs")), Site(), Options(), "dry run")
    assert any("1001" in note for note in dry.notes)
    assert len(dry.commands) == 1


def test_a_queue_that_cannot_be_asked_submits_nothing(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(tmp_path, **TWO)
    fake.answer("squeue", *["silent"] * 4)
    with pytest.raises(UserError, match=r"what is queued of .* cannot be told"):
        submitted(tmp_path, **TWO)
    assert len(fake.jobs) == 2


@pytest.mark.parametrize("write", [1, 2])
def test_a_full_disk_submits_nothing(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    writes = 0
    real = runstore.write_json

    def full(path: Path, obj: object) -> None:
        nonlocal writes
        if Path(path).name == "submission.json":
            writes += 1
            if writes >= write:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, obj)

    monkeypatch.setattr(runstore, "write_json", full)
    with pytest.raises(UserError, match="No space left on device; make room") as caught:
        submitted(tmp_path, **TWO)
    assert "\n" not in str(caught.value)
    assert fake.states == ["CANCELLED"] * (write - 1)
    monkeypatch.undo()


def test_two_at_a_time_are_one_too_many(tmp_path: Path, fake: FakeSlurm) -> None:
    frozen(tmp_path, "slow")
    folder = tmp_path / "toy" / "slurm"
    folder.mkdir()
    with Claim(folder / "submitting.json"), pytest.raises(Claimed, match="the submission of the study"):
        submitted(tmp_path, "slow")
    assert fake.jobs == []


def test_what_is_refused_before_anything_is_written(tmp_path: Path, fake: FakeSlurm) -> None:
    declared = STUDIES["slow"](str(tmp_path / "runs"))
    named = dataclasses.replace(
        declared, arms=(dataclasses.replace(declared.arms[0], name="slurm"),), baseline="slurm"
    )
    with pytest.raises(UserError, match="arm 'slurm': its directory is where submissions are kept"):
        submit(named, Site(), Options())
    with pytest.raises(UserError, match="--max-members=-1"):
        Options(max_members=-1)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--time=soon", "--time: time='soon'"),
        ("--signal=KILL", "--signal: signal='KILL'"),
        ("--array-limit=-2", "--array-limit: array_limit=-2"),
        ("--site=nowhere.toml", "--site=nowhere.toml: cannot be read"),
        ("--on-finish=no-such-program now", "no program 'no-such-program'"),
        ("--on-finish='", "quote it as for a shell"),
        ("--prepare", "--dry-run: not allowed with --prepare"),
    ],
)
def test_a_mistaken_option_is_one_line(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], argument: str, words: str
) -> None:
    arguments = [
        "submit",
        "tests/configs/toy_study.py",
        f"--workdir={tmp_path / 'runs'}",
        "--dry-run",
        argument,
    ]
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert words in err
    assert not (tmp_path / "runs").exists()


def test_a_prepared_submission_waits_for_its_user(tmp_path: Path, fake: FakeSlurm) -> None:
    outcome = submit(STUDIES["faults"](str(tmp_path)), Site(), Options(), "prepare")
    assert fake.calls("sbatch") == []
    assert newest(tmp_path).state == "prepared"
    assert shlex.join(outcome.commands[0]) in outcome.text()
    assert outcome.commands[0][:3] == ("env", f"JAXABLATE_PYTHON={sys.executable}", "JAXABLATE_MODULES=")
    assert outcome.commands[0][3] == "sbatch"
    profile = Site(python="/opt/my env/bin/python", modules=("gcc/13", "cuda/13.0"))
    outcome = submit(STUDIES["faults"](str(tmp_path)), profile, Options(), "prepare")
    asked = f"{shlex.join(outcome.commands[0][:3])} env -0"
    said = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True).stdout.split(
        "\0"
    )
    assert {"JAXABLATE_PYTHON=/opt/my env/bin/python", "JAXABLATE_MODULES=gcc/13\ncuda/13.0"} <= set(said)
    assert submitted(tmp_path).submission.state == "submitted"  # it holds nothing back


def test_the_words_of_silence_are_those_that_pass() -> None:
    assert _PASSING.search(SILENT)
    assert not _PASSING.search("Batch job submission failed: Invalid partition name specified")
    assert submits.script_of(Site()).name == "array.sbatch"
    assert submits.script_of(Site(nodes=2)).name == "multinode.sbatch"
