"""How a task of an array ends: stopped and requeued, as a duplicate, as the last of all."""

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

import pytest

from jaxablate.claims import Holder
from jaxablate.manifest import Manifest
from jaxablate.runstore import State
from jaxablate.schedule import workers
from jaxablate.schedule.cohorts import Job
from jaxablate.schedule.slurm import element as elements
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.workers import Command, Worker
from jaxablate.stopping import EXIT_AGAIN, EXIT_TAKEN
from tests.frozen import write_run
from tests.schedule.slurm.fake_slurm import FakeSlurm
from tests.schedule.slurm.one_element import Started, frozen, in_task, part, rows, states, work


@pytest.fixture
def fake(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """SLURM's tools, and the environment of task 0 of job 12."""
    in_task(monkeypatch)
    return fake


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
