"""`submit` when SLURM refuses, is silent or loses an answer, and when `submit` itself is killed: all or nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from jaxablate import disk
from jaxablate.claims import Claim, Claimed
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.schedule.slurm import cluster
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm import submit as submits
from jaxablate.schedule.slurm.left import SubmitOptions
from jaxablate.schedule.slurm.queue import _PASSING, SlurmError
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import Submission
from jaxablate.schedule.slurm.submit import Submitted, submit
from tests.schedule.slurm.fake_slurm import SILENT, FakeSlurm
from tests.schedule.slurm.submitting import TWO, frozen, newest, submitted
from tests.schedule.toy_studies import STUDIES

# --------------------------------------------------------------------------------------------- faults


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
    dry = submit(STUDIES["faults"](str(tmp_path / "runs")), Site(), SubmitOptions(), "dry run")
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
    real = disk.write_json

    def full(path: Path, obj: object) -> None:
        nonlocal writes
        if Path(path).name == "submission.json":
            writes += 1
            if writes >= write:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, obj)

    monkeypatch.setattr(disk, "write_json", full)
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


def test_the_words_of_silence_are_those_that_pass() -> None:
    assert _PASSING.search(SILENT)
    assert not _PASSING.search("Batch job submission failed: Invalid partition name specified")
    assert submits.script_of(Site()).name == "array.sbatch"
    assert submits.script_of(Site(nodes=2)).name == "multinode.sbatch"


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
    dry = submit(STUDIES["tuned"](str(tmp_path)), Site(), SubmitOptions(), "dry run")
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

    def again() -> Submitted:
        return submit(declared, Site(), SubmitOptions(stages="chained"))

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
