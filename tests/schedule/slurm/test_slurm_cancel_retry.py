"""`cancel` and `retry` of a submitted study: which elements they take out of the queue, and which they add."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest

from jaxablate import cli, disk
from jaxablate.claims import Holder
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.runstore import State
from jaxablate.schedule.slurm import marks
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import Array, Element, Submission
from tests.frozen import RULE, freeze, toy_study, write_run
from tests.schedule.slurm.fake_slurm import FakeSlurm
from tests.schedule.slurm.four_arms import arm_of, at_work, of, submit


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Four arms of three seeds."""
    return freeze(toy_study(tmp_path))


@pytest.fixture
def fake(fake: FakeSlurm) -> FakeSlurm:
    """With the array of four elements in the queue."""
    fake.write(jobs=[{"job": 7, "comment": "", "count": 4, "state": "PENDING"}])
    return fake


def states(manifest: Manifest) -> list[State]:
    return [manifest.run_dir(run).state() for run in manifest.runs]


def test_cancel_names_exactly_the_element_that_has_nothing_left(manifest: Manifest, fake: FakeSlurm) -> None:
    submit(manifest)
    write_run(manifest, of(manifest, 1)[0], "done")  # which does not make it work to do
    found = marks.cancel(manifest, [arm_of(manifest, 1)])
    assert len(found) == 2
    assert fake.calls("scancel") == [["--quiet", "7_1"]]
    assert states(manifest).count("cancelled") == 2
    # Again: it has nothing left to cancel, and its element is still the only one that is named.
    assert marks.cancel(manifest, [arm_of(manifest, 1)]) == []
    assert {call[-1] for call in fake.calls("scancel")} == {"7_1"}


def test_cancel_of_some_runs_of_an_element_leaves_it_in_the_queue(
    manifest: Manifest, fake: FakeSlurm
) -> None:
    submit(manifest)
    found = marks.cancel(manifest, [arm_of(manifest, 2)], [1])
    assert [run.seed for run in found] == [1]
    assert fake.calls("scancel") == []
    marks.cancel(manifest, [arm_of(manifest, 2)], [0])
    assert fake.calls("scancel") == []
    marks.cancel(manifest, [arm_of(manifest, 2)])
    assert fake.calls("scancel") == [["--quiet", "7_2"]]


def test_cancel_marks_runs_of_another_machine_before_anything_else(
    manifest: Manifest, fake: FakeSlurm
) -> None:
    submit(manifest)
    at_work(manifest, 0)
    for run in of(manifest, 0):
        claim = manifest.run_dir(run).claim
        there = dataclasses.replace(Holder.me(), host="n7", pid=1)
        claim.write_bytes(disk.encode_row(dataclasses.asdict(there)))
    fake.answer("scancel", "Access/permission denied")
    with pytest.raises(
        UserError, match=r"denied; 3 runs are marked as cancelled, call `jaxablate cancel` again"
    ):
        marks.cancel(manifest, [arm_of(manifest, 0)])
    assert states(manifest).count("cancelled") == 3
    marks.cancel(manifest, [arm_of(manifest, 0)])
    assert fake.calls("scancel") == [["--quiet", "7_0"]] * 2


def test_cancel_of_what_is_no_longer_queued_calls_nothing(manifest: Manifest, fake: FakeSlurm) -> None:
    submit(manifest)
    fake.end()
    assert len(marks.cancel(manifest)) == 12
    assert fake.calls("scancel") == []


def test_cancel_without_slurm_marks_and_says_so(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(manifest)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"scancel: not on PATH.*12 runs are marked"):
        marks.cancel(manifest)
    assert set(states(manifest)) == {"cancelled"}


def test_a_study_that_was_never_submitted_needs_no_slurm(manifest: Manifest, fake: FakeSlurm) -> None:
    assert len(marks.cancel(manifest)) == 12
    assert len(marks.retry(manifest)) == 12
    assert not (fake.home / "calls.jsonl").exists()


def test_retry_submits_exactly_those_runs_on_the_same_terms(manifest: Manifest, fake: FakeSlurm) -> None:
    site = Site(partition="gpu", time="01:00:00", max_attempts=4)
    submit(manifest, site=site.to_dict())
    fake.end()
    for n, state in enumerate(("done", "bug", "timeout", "diverged")):
        for run in of(manifest, n):
            write_run(manifest, run, state)  # pyright: ignore[reportArgumentType]
    arm = arm_of(manifest, 1)
    assert [run.seed for run in marks.retry(manifest, [arm], [0, 2])] == [0, 2]
    (argv,) = fake.calls("sbatch")
    assert {"--partition=gpu", "--time=01:00:00"} <= set(argv)
    newest = records.submissions(manifest.path)[-1]
    wanted = tuple(run.id for run in of(manifest, 1) if run.seed in (0, 2))
    assert [(element.arm, element.runs) for element in newest.elements] == [(arm, wanted)]
    assert newest.site == site.to_dict()
    assert states(manifest).count("pending") == 2
    assert fake.calls("scancel") == []


def test_retry_of_what_is_still_queued_submits_nothing(manifest: Manifest, fake: FakeSlurm) -> None:
    submit(manifest)
    for run in of(manifest, 1):
        write_run(manifest, run, "bug")
    assert len(marks.retry(manifest)) == 3
    assert fake.calls("sbatch") == []
    fake.end()  # the negative control
    for run in of(manifest, 1):
        manifest.run_dir(run).mark("bug", "again")
    assert len(marks.retry(manifest)) == 3
    assert len(fake.calls("sbatch")) == 1


def staged(manifest: Manifest) -> Submission:
    """The first arm's runs in two stages, of two arrays."""
    own = tuple(run.id for run in of(manifest, 0))
    parts = tuple(
        Element(n, arm_of(manifest, 0), "confirm", own, manifest.study.seeds, stage, after)
        for n, (stage, after) in enumerate([("first", ()), ("", (0,))])
    )
    return submit(manifest, elements=parts, arrays=(Array(7, 0, 1), Array(8, 1, 1, (0,))))


@pytest.mark.parametrize(
    ("first", "second", "job", "expected"),
    [
        ("RUNNING", "PENDING", "7_0", "3 runs left to job 7_0, which is queued and will find them"),
        ("COMPLETED", "RUNNING", "8_0", "3 runs left to job 8_0, which is queued and will find them"),
        # What failed before the second stage that stage does not take up: submitted anew.
        ("COMPLETED", "PENDING", "7_0", "submission"),
        ("COMPLETED", "RUNNING", "7_0", "submission"),
    ],
)
def test_retry_leaves_to_a_stage_what_it_will_find_and_says_so(
    manifest: Manifest, fake: FakeSlurm, caplog: pytest.LogCaptureFixture, first: str, second: str, job: str,
    expected: str,
) -> None:  # fmt: skip
    """`job` began the last attempt at the runs, which failed."""
    staged(manifest)
    fake.write(jobs=[{"job": n, "comment": "", "count": 1, "state": s} for n, s in ((7, first), (8, second))])
    for run in of(manifest, 0):
        where = manifest.run_dir(run)
        where.create(manifest.config_of(run))
        where.end_attempt(where.begin_attempt(slurm={"job": job}), "bug", "torn")
    caplog.set_level("INFO")
    assert len(marks.retry(manifest, [arm_of(manifest, 0)])) == 3
    assert [record.getMessage() for record in caplog.records][-1].startswith(expected)
    assert len(fake.calls("sbatch")) == (expected == "submission")


def test_retry_of_tuning_says_who_submits_the_confirmations(
    tmp_path: Path, fake: FakeSlurm, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = freeze(toy_study(tmp_path, learning_rate=RULE))
    tuned = [run for run in manifest.runs if run.arm == "wide"]
    seeds = tuple(sorted({run.seed for run in tuned}))
    parts = (
        Element(0, "wide", "tuning", tuple(run.id for run in tuned), seeds),
        Element(1, "wide", "confirm", (), manifest.study.seeds, "", (0,)),
    )
    submit(manifest, elements=parts, arrays=(Array(7, 0, 1), Array(8, 1, 1, (0,))))
    fake.end()
    for run in tuned:
        write_run(manifest, run, "bug")
    caplog.set_level("INFO")
    assert len(marks.retry(manifest, ["wide"])) == len(tuned)
    said = "the confirmations of wide are not queued: call `jaxablate submit` for them"
    assert said in [record.getMessage() for record in caplog.records]
    assert len(fake.calls("sbatch")) == 1


def test_retry_releases_what_slurm_holds_though_nothing_has_failed(
    manifest: Manifest, fake: FakeSlurm, caplog: pytest.LogCaptureFixture
) -> None:
    submit(manifest)
    caplog.set_level("INFO")
    assert marks.retry(manifest) == []
    assert [words for words in fake.calls("scontrol") if words[0] == "release"] == []
    fake.hold(7, "launch failed requeued held")
    assert marks.retry(manifest) == []
    assert fake.calls("scontrol")[-1] == ["release", "7_0,7_1,7_2,7_3"]
    assert "released, since SLURM held them: 7_0" in caplog.text


def test_retry_while_slurm_is_silent_leaves_the_runs_pending(manifest: Manifest, fake: FakeSlurm) -> None:
    submit(manifest)
    fake.end()
    write_run(manifest, of(manifest, 1)[0], "bug")
    fake.answer("scontrol", *["Access/permission denied"] * 9)
    with pytest.raises(UserError, match=r"1 runs are pending, `jaxablate submit` takes them up"):
        marks.retry(manifest)
    assert states(manifest).count("bug") == 0
    assert len(records.submissions(manifest.path)) == 1


def test_the_verbs_reach_the_elements(manifest: Manifest, fake: FakeSlurm) -> None:
    submit(manifest)
    arm = arm_of(manifest, 3)
    assert cli.main(["cancel", str(manifest.path), f"--arm={arm}"]) == 0
    assert fake.calls("scancel") == [["--quiet", "7_3"]]
    fake.end()
    assert cli.main(["retry", str(manifest.path), f"--arm={arm}"]) == 0
    assert len(fake.calls("sbatch")) == 1


@pytest.mark.slow
def test_a_run_that_was_cancelled_on_another_machine_is_stopped_by_its_launcher(
    tmp_path: Path, launch: Any, histories: Any
) -> None:
    """No signal crosses machines: the mark alone does it, and the other run of the cohort is trained to its end."""
    process = launch("slow")
    manifest = found = None
    while found is None and process.poll() is None:
        with contextlib.suppress(UserError):
            manifest = Manifest.load(tmp_path / "toy")
            found = next((run for run in manifest.runs if manifest.run_dir(run).metrics.exists()), None)
        time.sleep(0.05)
    assert manifest is not None
    assert found is not None
    manifest.run_dir(found).mark("cancelled", "cancelled on another machine")
    output, _ = process.communicate(timeout=120)
    assert json.loads(output)["runs"] == {"done": 1, "cancelled": 1}
    other = next(run for run in manifest.runs if run != found)
    assert [row["state"] for row in manifest.run_dir(other).history()] == [
        "running", "preempted", "running", "done"
    ]  # fmt: skip
