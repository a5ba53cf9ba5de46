"""What a task of an array does: which runs it takes, what it waits for, over how many nodes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from jaxablate.runstore import State
from jaxablate.schedule import workers
from jaxablate.schedule.slurm import element as elements
from jaxablate.schedule.slurm.site import Site
from tests.frozen import write_run
from tests.schedule.slurm.fake_slurm import FakeSlurm
from tests.schedule.slurm.one_element import ID, Started, finish, frozen, in_task, part, rows, states, work


@pytest.fixture
def fake(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """SLURM's tools, and the environment of task 0 of job 12."""
    in_task(monkeypatch)
    return fake


# ---------------------------------------------------------------------------------- what it works on


def test_it_trains_its_runs_and_no_other(tmp_path: Path, fake: FakeSlurm, started: Started) -> None:
    manifest = frozen(tmp_path, "faults", part("baseline"), part("killed"))
    assert work(manifest, array_task_id="1") == 0
    assert {run.arm for job, _ in started for run in job.runs} == {"killed"}
    assert states(manifest, 1) == ["running", "done"]
    first, last = rows(manifest, 1)
    assert (first["job"], first["restart"], first["node"]) == ("12_1", 0, "n3")
    assert last["time"] >= first["time"]
    assert rows(manifest, 0) == []
    assert work(manifest, array_task_id="1") == 0  # once more, as after a controller that forgot it
    assert len(started) == 1


def test_the_tasks_of_a_later_array_count_from_its_first_element(
    tmp_path: Path, fake: FakeSlurm, started: Started
) -> None:
    manifest = frozen(tmp_path, "faults", part("baseline"), part("killed"), part("tight"))
    assert work(manifest, "--first=1", array_task_id="1") == 0
    assert {job.arm for job, _ in started} == {"tight"}


def test_of_a_submission_that_was_withdrawn_it_trains_nothing(
    tmp_path: Path, fake: FakeSlurm, started: Started
) -> None:
    manifest = frozen(tmp_path, "slow", part(), state="withdrawn")
    assert work(manifest) == 1
    assert started == []
    assert [(row["state"], row["reason"]) for row in rows(manifest)] == [
        ("cancelled", "the submission was withdrawn")
    ]


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({}, [(1, 1), (1, 1)]),  # nothing bounds them, so the GPUs share them
        ({"members": 2, "split": 2}, [(2, 2)]),
        ({"members": 1}, [(1, 1), (1, 1)]),
    ],
)
def test_a_cohort_keeps_the_members_with_which_it_was_planned(
    tmp_path: Path, fake: FakeSlurm, started: Started, monkeypatch: pytest.MonkeyPatch,
    cut: dict[str, int], expected: list[tuple[int, int]],
) -> None:  # fmt: skip
    monkeypatch.setattr(workers, "gpus", lambda: ["0", "1", "2", "3"])
    manifest = frozen(tmp_path, "slow", part(**cut))
    assert work(manifest) == 0
    assert [(len(job.runs), job.split) for job, _ in started] == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"array_task_id": "7"}, "element 7: submission"),
        ({"array_task_id": ""}, "SLURM_ARRAY_TASK_ID: not set"),
    ],
)
def test_a_task_without_an_element_is_one_line(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], changes: dict[str, str], words: str
) -> None:
    manifest = frozen(tmp_path, "slow", part())
    assert work(manifest, **changes) == 2
    assert words in capsys.readouterr().err


def test_a_submission_that_is_not_there_names_the_nearest(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = frozen(tmp_path, "slow", part())
    for wrong in (f"{ID[:-1]}d", "../../other"):
        assert elements.main([str(manifest.path), wrong]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "no submission" in line
    assert ID in line or "valid" in line


def test_a_run_that_failed_for_good_is_said_and_touches_no_other(
    tmp_path: Path, fake: FakeSlurm, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = frozen(tmp_path, "slow", part())
    write_run(manifest, manifest.runs[0], "bug", reason="ValueError: torn")
    assert work(manifest) == 1
    assert [run.seed for job, _ in started for run in job.runs] == [1]
    assert states(manifest) == ["running", "failed"]
    assert rows(manifest)[-1]["reason"] == "1 of 2 runs: bug: ValueError: torn"
    assert "element 0 failed: 1 of 2 runs" in capsys.readouterr().err


def test_interruptions_are_counted_over_all_starts(tmp_path: Path, fake: FakeSlurm, started: Started) -> None:
    site = {**Site().to_dict(), "max_attempts": 2}
    manifest = frozen(tmp_path, "slow", part(), site=site)
    for run in manifest.runs:
        where = manifest.run_dir(run)
        where.create(manifest.config_of(run))
        for _ in range(3):
            where.end_attempt(where.begin_attempt(), "node_fail", "killed")
    assert work(manifest) == 1
    assert started == []
    assert "node_fail: killed" in rows(manifest)[-1]["reason"]
    assert work(manifest, restart_count="3") == 1
    assert rows(manifest)[-1]["reason"] == "started 4 times; max_attempts is 2"


# -------------------------------------------------------------------------------------------- chains


def test_a_rate_is_chosen_and_confirmed_when_the_tuning_is_done(
    tmp_path: Path, fake: FakeSlurm, started: Started
) -> None:
    confirm = part("wide", "confirm", after=(0,))
    manifest = frozen(tmp_path, "tuned", part("wide", "tuning"), confirm)
    assert work(manifest) == 0
    assert {job.phase for job, _ in started} == {"tuning"}
    assert not (manifest.path / "rates.json").exists()  # that is the next element's
    assert work(manifest, array_task_id="1") == 0
    jobs = [(job.arm, job.phase, {run.learning_rate for run in job.runs}) for job, _ in started[1:]]
    assert jobs == [("wide", "tuning", {0.008}), ("wide", "confirm", {0.002})]  # it was best at the edge
    assert states(manifest, 1) == ["running", "done"]


def test_a_rate_is_tuned_to_the_end_before_the_first_of_several_stages(
    tmp_path: Path, fake: FakeSlurm, started: Started
) -> None:
    stages = part("wide", "confirm", after=(0,), stage="first"), part("wide", "confirm", after=(1,))
    manifest = frozen(tmp_path, "tuned", part("wide", "tuning"), *stages)
    assert [work(manifest, array_task_id=str(n)) for n in range(3)] == [0, 0, 0]
    assert [(job.phase, command.until) for job, command in started] == [
        ("tuning", ""), ("tuning", ""), ("confirm", "first"), ("confirm", ""),
    ]  # fmt: skip
    assert [states(manifest, n)[-1] for n in range(3)] == ["done", "paused", "done"]


def test_an_arm_without_a_stable_rate_has_no_stage_to_go_on_with(
    tmp_path: Path, fake: FakeSlurm, started: Started
) -> None:
    stages = part("wide", "confirm", after=(0,), stage="first"), part("wide", "confirm", after=(1,))
    manifest = frozen(tmp_path, "tuned", part("wide", "tuning"), *stages)
    for run in manifest.runs:
        finish(manifest, run, state="diverged")
    manifest.with_rates({"wide": {"learning_rate": None, "grid": [0.0005, 0.002]}}, {})
    assert [work(manifest, array_task_id=str(n)) for n in (1, 2)] == [0, 0]
    assert started == []
    assert {rows(manifest, n)[-1]["reason"] for n in (1, 2)} == {"no learning rate was stable"}


@pytest.mark.parametrize("state", ["bug", "preempted", None])
def test_without_its_tuning_it_ends_with_the_reason(
    tmp_path: Path, fake: FakeSlurm, started: Started, state: State | None, capsys: pytest.CaptureFixture[str]
) -> None:
    confirm = part("wide", "confirm", after=(0,))
    manifest = frozen(tmp_path, "tuned", part("wide", "tuning"), confirm)
    first, *others = [run for run in manifest.runs if run.arm == "wide"]
    for run in others:
        finish(manifest, run)
    if state:
        write_run(manifest, first, state, reason="of its own")
    assert work(manifest, array_task_id="1") == 1
    assert started == []
    assert states(manifest, 1) == ["running", "failed"]
    reason = rows(manifest, 1)[-1]["reason"]
    assert reason.startswith(f"did not start: element 0, wide/{first.id}, is {state or 'pending'}")
    assert reason in capsys.readouterr().err


def test_a_stage_goes_on_with_the_runs_that_are_ready(
    tmp_path: Path, fake: FakeSlurm, started: Started
) -> None:
    manifest = frozen(tmp_path, "slow", part(stage="first"), part(stage="", after=(0,)))
    assert work(manifest) == 0
    assert states(manifest) == ["running", "paused"]
    assert [command.until for _, command in started] == ["first"]
    assert work(manifest) == 0  # a duplicate after its end has nothing to do
    assert len(started) == 1
    lost = manifest.run_dir(manifest.runs[0])
    lost.end_attempt(lost.begin_attempt(), "bug", "ValueError: torn")
    assert work(manifest, array_task_id="1") == 1
    assert [(command.until, [run.seed for run in job.runs]) for job, command in started[1:]] == [("", [1])]
    assert rows(manifest, 1)[-1]["reason"].startswith("1 of 2 runs: element 0")


def test_a_stage_that_nothing_leads_to_does_not_start(
    tmp_path: Path, fake: FakeSlurm, started: Started
) -> None:
    manifest = frozen(tmp_path, "slow", part(stage="first"), part(stage="", after=(0,)))
    assert work(manifest, array_task_id="1") == 1
    assert started == []
    assert rows(manifest, 1)[-1]["reason"].startswith("did not start: element 0, baseline/seed0")


@pytest.mark.parametrize("state", ["preempted", "node_fail", "running"])
def test_an_element_that_was_stopped_in_its_stage_goes_on_when_it_is_started_again(
    tmp_path: Path, fake: FakeSlurm, started: Started, state: State
) -> None:
    manifest = frozen(tmp_path, "slow", part(stage="first"), part(stage="", after=(0,)))
    assert work(manifest) == 0
    for run in manifest.runs:
        where = manifest.run_dir(run)
        attempt = where.begin_attempt(log="logs/a.log")
        if state != "running":
            where.end_attempt(attempt, state, "SIGUSR2 at step 31")
    assert work(manifest, array_task_id="1", restart_count="1") == 0
    assert states(manifest, 1) == ["running", "done"]
    assert work(manifest, array_task_id="0") == 0
    assert states(manifest, 0)[-1] == "paused"


# ------------------------------------------------------------------------------------- several nodes


def test_over_several_nodes_the_worker_is_a_step(tmp_path: Path, fake: FakeSlurm, started: Started) -> None:
    manifest = frozen(tmp_path, "slow", part())
    assert work(manifest, "--over-nodes", cpus_per_task="4") == 0
    ((job, command),) = started
    assert command.prefix == ("srun", "--kill-on-bad-exit=1", "--export=ALL", "--cpus-per-task=4")
    assert (command.stop_signal, command.kill_signal) == (signal.SIGUSR2, signal.SIGTERM)
    argv = workers.argv(manifest, job, "logs/a.log", command)
    assert argv[0] == "srun"
    assert "--processes=slurm" in argv
    assert not any(word.startswith("--parent") for word in argv)
    alone = workers.argv(manifest, job, "logs/a.log", workers.DIRECT)
    assert f"--parent={os.getpid()}" in alone
    assert alone[0] == sys.executable
