"""What a task of an array does: which runs it takes, how it ends, and when it goes back into the queue."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxablate.claims import Holder
from jaxablate.manifest import Manifest
from jaxablate.runstore import State, now
from jaxablate.schedule import local, workers
from jaxablate.schedule.cohorts import Job
from jaxablate.schedule.slurm import element as elements
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import Array, Element, Submission
from jaxablate.schedule.workers import Command, Worker
from jaxablate.stopping import EXIT_AGAIN, EXIT_PAUSED, EXIT_TAKEN
from jaxablate.study import Run
from tests.frozen import write_run
from tests.schedule.slurm.fake_slurm import FakeSlurm
from tests.schedule.toy_studies import STUDIES

ID = "20250102T030405-0a1b2c"
Started = list[tuple[Job, Command]]


@pytest.fixture
def fake(tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """SLURM's tools, and the environment of task 0 of job 12."""
    found = FakeSlurm(tmp_path / "fake")
    monkeypatch.chdir(repo)
    about = {"ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "0", "JOB_ID": "13", "RESTART_COUNT": "0"}
    for name, value in about.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    monkeypatch.setenv("PATH", found.path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return found


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Workers that are done at once; with what they were started."""
    found: Started = []

    def start(manifest: Manifest, job: Job, device: str, command: Command, memory: object) -> Worker:
        found.append((job, command))
        for run in job.runs:
            finish(manifest, run, command.until)
        code = f"raise SystemExit({EXIT_PAUSED if command.until else 0})"
        child = subprocess.Popen([sys.executable, "-S", "-c", code])
        return Worker(job, child, "logs/a.log", device, time.monotonic(), 0, command)

    monkeypatch.setattr(workers, "start", start)
    return found


def finish(manifest: Manifest, run: Run, until: str = "", state: State = "done") -> None:
    """Leaves what training to the end, or to the end of a stage, leaves."""
    if until:
        where = manifest.run_dir(run)
        where.create(manifest.config_of(run))
        where.end_attempt(where.begin_attempt(log="logs/a.log"), "preempted", "as asked", paused=until)
        return
    loss = {0.0005: 0.6, 0.002: 0.5, 0.008: 0.7}.get(run.learning_rate, 0.5)
    write_run(manifest, run, state, {"val/loss": loss})
    if state == "done":
        summary = manifest.run_dir(run).summary
        rest = {"statistics": {"val_loss": {"final": loss}}, "config": manifest.config_of(run)}
        summary.write_text(json.dumps(json.loads(summary.read_text()) | rest))


def frozen(workdir: Path, study: str, *of: Callable[[Manifest], Element], **changes: Any) -> Manifest:
    """A frozen study with a submission of these elements."""
    declared = STUDIES[study](str(workdir))
    manifest = Manifest.freeze(declared, local.resolve(declared))
    own = [dataclasses.replace(make(manifest), index=n) for n, make in enumerate(of)]
    fields = {"site": Site().to_dict(), "state": "submitted", "folder": os.getcwd(), **changes}
    whole = Array(12, 0, len(own), ())
    records.write(manifest.path, Submission(ID, now(), elements=tuple(own), arrays=(whole,), **fields))
    return manifest


def part(arm: str = "baseline", phase: Any = "confirm", **changes: Any) -> Callable[[Manifest], Element]:
    """An element with all listed runs of an arm and phase."""

    def make(manifest: Manifest) -> Element:
        runs = [run for run in manifest.runs if (run.arm, run.phase) == (arm, phase)]
        seeds = tuple(sorted({run.seed for run in runs})) or manifest.study.seeds
        return dataclasses.replace(Element(0, arm, phase, tuple(run.id for run in runs), seeds), **changes)

    return make


def work(manifest: Manifest, *options: str, **slurm: str) -> int:
    for name, value in slurm.items():
        os.environ[f"SLURM_{name.upper()}"] = value  # which the fixture restores
    return elements.main([str(manifest.path), ID, *options])


def rows(manifest: Manifest, index: int = 0) -> list[dict[str, Any]]:
    submission = records.read(manifest.path, ID)
    return records.element_log(manifest.path, submission, submission.elements[index])


def states(manifest: Manifest, index: int = 0) -> list[str]:
    return [row["state"] for row in rows(manifest, index)]


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


# ------------------------------------------------------------------------------------- being stopped


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch) -> Callable[[signal.Signals], None]:
    """Workers that train until they are stopped, which this process is as soon as one runs."""

    def by(number: signal.Signals) -> None:
        code = (
            f"import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit({EXIT_AGAIN}));"
            "print(flush=True); time.sleep(60)"
        )

        def start(manifest: Manifest, job: Job, device: str, command: Command, memory: object) -> Worker:
            for run in job.runs:
                manifest.run_dir(run).create(manifest.config_of(run))
                manifest.run_dir(run).begin_attempt(log="logs/a.log")
            child = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
            assert child.stdout is not None
            with child.stdout as output:
                output.readline()
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            threading.Timer(0.06, os.kill, (os.getpid(), signal.SIGTERM)).start()  # SLURM sends more than one
            return Worker(job, child, "logs/a.log", device, time.monotonic(), 0, command)

        monkeypatch.setattr(workers, "start", start)

    return by


@pytest.mark.parametrize("stage", ["", "first"])
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM])
def test_stopped_it_puts_exactly_itself_back_into_the_queue(
    tmp_path: Path, fake: FakeSlurm, stubborn: Callable[..., None], number: signal.Signals, stage: str
) -> None:
    later = [part(after=(0,))] if stage else []
    manifest = frozen(tmp_path, "slow", part(stage=stage), *later)
    stubborn(number)
    assert work(manifest) == EXIT_AGAIN
    assert [words for words in fake.calls("scontrol") if words[0] == "requeue"] == [["requeue", "12_0"]]
    assert states(manifest) == ["running", "stopped"]
    assert rows(manifest)[-1]["reason"] == number.name
    assert {manifest.run_dir(run).state() for run in manifest.runs} == {"preempted"}


def test_a_controller_that_is_down_is_asked_again(
    tmp_path: Path, fake: FakeSlurm, stubborn: Callable[..., None]
) -> None:
    manifest = frozen(tmp_path, "slow", part())
    stubborn(signal.SIGUSR2)
    fake.answer("scontrol", *["silent"] * 5)
    assert work(manifest) == EXIT_AGAIN
    requeued = [words for words in fake.calls("scontrol") if words[0] == "requeue"]
    assert len(requeued) >= 3
    assert states(manifest) == ["running", "stopped"]


@pytest.mark.parametrize(
    ("shown", "requeued", "row"),
    [
        ("JobState=RUNNING Reason=None Restarts=1", True, "stopped"),
        ("JobState=COMPLETING Reason=TimeLimit Restarts=1", True, "stopped"),
        ("JobState=COMPLETING Reason=None Restarts=2", False, "stopped"),  # SLURM has done it
        ("JobState=COMPLETING Reason=None Restarts=1", False, "cancelled"),
        ("JobState=CANCELLED Reason=None Restarts=1", False, "cancelled"),
    ],
)
def test_what_was_cancelled_or_requeued_already_is_left_so(
    tmp_path: Path, fake: FakeSlurm, stubborn: Callable[..., None], shown: str, requeued: bool, row: str
) -> None:
    manifest = frozen(tmp_path, "slow", part())
    fake.write(shown=shown)
    stubborn(signal.SIGTERM)
    assert work(manifest, restart_count="1") == EXIT_AGAIN
    assert (["requeue", "12_0"] in fake.calls("scontrol")) == requeued
    assert states(manifest) == ["running", row]


def test_it_is_not_requeued_for_ever(tmp_path: Path, fake: FakeSlurm, stubborn: Callable[..., None]) -> None:
    manifest = frozen(tmp_path, "slow", part(), site={**Site().to_dict(), "max_attempts": 3})
    stubborn(signal.SIGUSR2)
    assert work(manifest, restart_count="1") == EXIT_AGAIN
    assert fake.calls("scontrol").count(["requeue", "12_0"]) == 1
    assert work(manifest, restart_count="2") == 1
    assert fake.calls("scontrol").count(["requeue", "12_0"]) == 1
    assert rows(manifest)[-1]["reason"] == "SIGUSR2: stopped 3 times; max_attempts is 3"


def test_a_requeue_that_is_refused_is_said(
    tmp_path: Path, fake: FakeSlurm, stubborn: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = frozen(tmp_path, "slow", part())
    stubborn(signal.SIGUSR2)
    fake.answer("scontrol", "ok", "Requested operation is presently disabled")
    assert work(manifest) == EXIT_AGAIN
    assert "not requeued: scontrol: Requested operation is presently disabled" in capsys.readouterr().err
    assert states(manifest) == ["running", "stopped", "stopped"]


# ------------------------------------------------------------------------------------------ duplicates


def test_a_duplicate_of_a_running_element_ends_itself(
    tmp_path: Path, fake: FakeSlurm, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elements, "LEASE_S", 0.5)
    manifest = frozen(tmp_path, "slow", part())
    for run in manifest.runs:
        where = manifest.run_dir(run)
        where.create(manifest.config_of(run))
        holder = dataclasses.replace(Holder.me(), host="elsewhere")
        where.claim.write_text(json.dumps(dataclasses.asdict(holder)))
    assert work(manifest) == EXIT_TAKEN
    assert started == []
    assert states(manifest) == ["running", "duplicate"]
    assert ["requeue", "12_0"] not in fake.calls("scontrol")


def test_what_a_dead_process_left_is_taken_up(tmp_path: Path, fake: FakeSlurm, started: Started) -> None:
    manifest = frozen(tmp_path, "slow", part())
    where = manifest.run_dir(manifest.runs[0])
    where.create(manifest.config_of(manifest.runs[0]))
    where.begin_attempt()
    holder = dataclasses.replace(Holder.me(), host="elsewhere")
    where.claim.write_text(json.dumps(dataclasses.asdict(holder)))
    os.utime(where.claim, (time.time() - 3600,) * 2)
    assert work(manifest) == 0
    assert sum(len(job.runs) for job, _ in started) == 2


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


# ----------------------------------------------------------------------------------------- on finish


def program(called: Path) -> tuple[str, ...]:
    """Adds a line with the study and the code to a file."""
    text = (
        "import os, sys; e = os.environ; line = e['JAXABLATE_STUDY_DIR'] + e['JAXABLATE_EXIT_CODE'] + '\\n'"
    )
    return (sys.executable, "-S", "-c", f"{text}; open(sys.argv[1], 'a').write(line)", str(called))


def test_a_damaged_study_is_an_end_too(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    called = tmp_path / "called"
    manifest = frozen(tmp_path, "slow", part(), on_finish=program(called))
    (manifest.path / "study.json").write_text("{")
    assert work(manifest, "--finish") == 0
    assert work(manifest, "--finish") == 0
    assert called.read_text() == f"{manifest.path}2\n"
    assert "study.json" in capsys.readouterr().err


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


def test_what_ends_the_last_job_before_the_call_leaves_it_to_the_next_start(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = tmp_path / "called"
    manifest = frozen(tmp_path, "slow", part(), on_finish=program(called))

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(Manifest, "load", killed)
        with pytest.raises(KeyboardInterrupt):
            work(manifest, "--finish")
    assert not called.exists()
    assert work(manifest, "--finish") == 0
    assert called.read_text() == f"{manifest.path}1\n"


@pytest.mark.parametrize(("state", "code"), [("done", "0"), ("bug", "1")])
def test_the_last_job_calls_the_program_once(
    tmp_path: Path, fake: FakeSlurm, state: State, code: str
) -> None:
    called = tmp_path / "called"
    manifest = frozen(tmp_path, "slow", part(), on_finish=program(called))
    for run in manifest.runs:
        write_run(manifest, run, state)
    assert work(manifest, "--finish") == 0
    assert work(manifest, "--finish") == 0
    assert called.read_text() == f"{manifest.path}{code}\n"
