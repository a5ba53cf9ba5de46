"""A launcher that fails leaves no worker behind, and does not wait for ever for one that no signal reaches."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxablate.manifest import Manifest
from jaxablate.schedule import launcher
from jaxablate.schedule.cohorts import Job
from jaxablate.schedule.launcher import Launcher, Limits
from jaxablate.schedule.survey import Selection
from jaxablate.schedule.table import View
from jaxablate.schedule.workers import Worker
from tests.frozen import freeze, toy_study

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
)


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setattr(launcher, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(launcher, "_KILLED_S", 0.3)
    return freeze(toy_study(tmp_path))


class _Torn(RuntimeError):
    pass


class _Failing(Launcher):
    """Raises where it would start something."""

    def _launch(self) -> None:
        raise _Torn


def failing(manifest: Manifest, process: object) -> Launcher:
    run = manifest.runs[0]
    job = Job(run.arm, run.phase, (run,))
    selection = Selection(frozenset({run.arm}), frozenset({run.seed}))
    limits = Limits([""], {"confirm": 1, "tuning": 1}, "go on", 0)
    made = _Failing(manifest, {}, selection, limits, View("toy"))
    made.workers = [Worker(job, process, "logs/a.log", "", time.monotonic(), 0)]  # pyright: ignore[reportArgumentType]
    return made


class _Unreachable:
    """A process in the kernel's hands, which ends by no signal."""

    pid, returncode = 4711, None

    def __init__(self):
        self.heard: list[int] = []

    def poll(self) -> None:
        return None

    def send_signal(self, number: int) -> None:
        self.heard.append(number)


def test_a_worker_that_cannot_be_killed_is_named_and_left(
    manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    process = _Unreachable()
    with pytest.raises(_Torn):
        failing(manifest, process).run()
    assert process.heard == [signal.SIGTERM, signal.SIGKILL]  # once each: a second one would be a person's
    assert "could not be killed: process 4711" in capsys.readouterr().err


def test_a_worker_that_does_not_stop_is_killed(
    manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", STUBBORN], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(_Torn):
            failing(manifest, process).run()
        assert process.poll() == -signal.SIGKILL
    assert "could not be killed" not in capsys.readouterr().err
