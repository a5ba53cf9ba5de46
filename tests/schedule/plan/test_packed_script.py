"""launch/packed.sbatch and its program: arguments as data, the signal passed on once, one job requeued."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxablate.schedule.plan import packed
from jaxablate.schedule.slurm.job import Job

JOB = Job(17, 0, 0, "n1")


def stub(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `scontrol` was called with."""
    calls = tmp_path / "calls"
    calls.touch()
    (tmp_path / "bin").mkdir()
    stub(
        tmp_path / "bin" / "scontrol",
        f'echo "$*" >> {calls}; [[ $* != *show* ]] || echo "JobState=RUNNING Reason=None"',
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return calls


def test_arguments_reach_the_program_as_data(repo, tmp_path):
    python = stub(tmp_path / "python", 'printf "%s\\n" "$@"')
    nasty = ["a b", "$(touch hit)", "; touch hit", "--gpus=4", "line\nbreak", "*"]
    script = repo / "launch" / "packed.sbatch"
    done = subprocess.run(
        ["bash", str(script), *nasty],
        cwd=tmp_path,
        env={"JAXABLATE_PYTHON": str(python), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "\n".join(["-P", "-m", "jaxablate.schedule.plan.packed", *nasty, ""])
    assert not (tmp_path / "hit").exists()


def test_the_script_is_constant_and_stops_and_requeues(repo):
    text = (repo / "launch" / "packed.sbatch").read_text()
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"--array=0", "--requeue", "--open-mode=append", "--signal=B:USR2@120"} <= set(options)
    assert any(option.startswith("--export=JAXABLATE_PYTHON,") for option in options)
    assert "SECRET" not in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_the_exit_code_is_the_programs(scontrol):
    for code in (0, 1, 2):
        assert packed.supervise([sys.executable, "-c", f"raise SystemExit({code})"], JOB) == code
    assert packed.supervise(["bash", "-c", "kill -9 $$"], JOB) == 137
    assert scontrol.read_text() == ""


def test_stopped_work_goes_back_into_the_queue_and_only_it(scontrol, tmp_path):
    told = tmp_path / "told"
    code = (
        "import signal, sys, time\n"
        "def stop(*_):\n"
        f"    open({str(told)!r}, 'a').write('stop\\n')\n"
        "    time.sleep(0.6)\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').close()\n"
        "time.sleep(30)\n"
    )

    def send() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        for number in (signal.SIGUSR2, signal.SIGTERM):  # as at a time limit
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    with contextlib.ExitStack() as stack:
        sender = threading.Thread(target=send)
        sender.start()
        stack.callback(sender.join)
        assert packed.supervise([sys.executable, "-c", code], JOB) == 75
    assert told.read_text() == "stop\n"
    assert scontrol.read_text().splitlines()[-1] == "requeue 17_0"


def test_a_job_that_was_stopped_too_often_stays_out(scontrol, capfd):
    often = Job(17, 0, packed.RESTARTS, "n1")
    assert packed.supervise([sys.executable, "-c", "raise SystemExit(75)"], often) == 75
    assert scontrol.read_text() == ""
    assert "stopped 21 times, and not requeued again" in capfd.readouterr().err


def test_outside_of_a_job_it_says_so(monkeypatch, capfd):
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    assert packed.main(["configs/ctclip.py"]) == 2
    assert capfd.readouterr().err.startswith("error: SLURM_ARRAY_TASK_ID: not set")
