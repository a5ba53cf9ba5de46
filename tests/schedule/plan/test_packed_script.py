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


def test_stopped_while_it_plans_it_goes_back_too_and_leaves_nothing_behind(scontrol, tmp_path):
    """It listens to no signal then, and has started processes of its own."""
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(f'{{child.pid}}\\n')\n"
        "time.sleep(60)\n"
    )

    def send() -> None:
        while not (tmp_path / "pid").exists() or "\n" not in (tmp_path / "pid").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR2)

    with contextlib.ExitStack() as stack:
        sender = threading.Thread(target=send)
        sender.start()
        stack.callback(sender.join)
        assert packed.supervise([sys.executable, "-c", code], JOB) == 75
    assert scontrol.read_text().splitlines()[-1] == "requeue 17_0"
    assert gone(int((tmp_path / "pid").read_text()))


def gone(pid: int) -> bool:
    """Within ten seconds; a zombie that nobody waits for is gone."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def test_a_command_that_ends_by_a_signal_of_others_is_not_requeued(scontrol):
    assert packed.supervise(["bash", "-c", "kill -TERM $$"], JOB) == 143
    assert scontrol.read_text() == ""


def test_a_job_that_was_stopped_too_often_stays_out(scontrol, capfd):
    often = Job(17, 0, packed.RESTARTS, "n1")
    assert packed.supervise([sys.executable, "-c", "raise SystemExit(75)"], often) == 75
    assert scontrol.read_text() == ""
    assert "stopped 21 times, and not requeued again" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("code", "restarts", "fate", "called"),
    [
        *((code, 0, "RUNNING", True) for code in (0, 1, 2, 70, 137)),
        (75, 0, "RUNNING", False),  # requeued by us
        (75, 0, "COMPLETING Restarts=1", False),  # by SLURM, after a preemption
        (75, 0, "CANCELLED", True),
        (75, packed.RESTARTS, "RUNNING", True),  # and not again
    ],
)
def test_on_finish_is_called_once_the_job_is_over_and_not_when_it_is_requeued(
    tmp_path, scontrol, monkeypatch, code, restarts, fate, called
):
    stub(tmp_path / "bin" / "scontrol", f'[[ $* != *show* ]] || echo "JobState={fate} Reason=None"')
    told = tmp_path / "told"
    program = stub(tmp_path / "program", f'echo "$JAXABLATE_STUDY_DIR $JAXABLATE_EXIT_CODE" >> {told}')
    child = (
        "import os, sys\n"
        "from jaxablate.schedule.on_finish import calling\n"
        f"with calling([{str(program)!r}], {str(tmp_path)!r}) as finish:\n"
        f"    if {code} == 137:\n"
        "        os.kill(os.getpid(), 9)\n"
        f"    finish.exit_code = {code}\n"
        f"sys.exit({code})\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert packed.supervise([sys.executable, "-c", child], Job(17, 0, restarts, "n1")) == code
    assert (told.read_text() if told.exists() else "") == (f"{tmp_path} {code}\n" if called else "")


def test_outside_of_a_job_it_says_so(monkeypatch, capfd):
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    assert packed.main(["configs/ctclip.py"]) == 2
    assert capfd.readouterr().err.startswith("error: SLURM_ARRAY_TASK_ID: not set")
