"""How the end of a worker is read, and what the table says of it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from jaxablate.errors import UserError
from jaxablate.schedule import step, workers
from jaxablate.schedule.table import Progress, View, in_words, seconds_left
from jaxablate.schedule.workers import ending_of, tail
from jaxablate.stopping import EXIT_AGAIN, EXIT_DISK, EXIT_PAUSED, EXIT_TAKEN


@pytest.mark.parametrize(
    ("code", "asked", "memory", "state", "reason"),
    [
        (-signal.SIGKILL, "", False, "node_fail", "killed by SIGKILL"),
        (-signal.SIGKILL, "", True, "oom", "killed by the kernel, which was out of memory"),
        (-signal.SIGKILL, "stopped at once", True, "preempted", "stopped at once"),
        (-signal.SIGSEGV, "", False, "bug", "SIGSEGV: the last words"),
        (-signal.SIGABRT, "", True, "bug", "SIGABRT: the last words"),
        (-signal.SIGTERM, "", False, "preempted", "SIGTERM before it could stop cleanly"),
        (EXIT_AGAIN, "", False, "preempted", "the last words"),
        (EXIT_DISK, "", False, "node_fail", "the last words"),
        (2, "", False, "bug", "UserError: the last words"),
        (1, "", False, "bug", "the last words"),
    ],
)
def test_who_knows_how_a_worker_died_says_it(
    code: int, asked: str, memory: bool, state: str, reason: str
) -> None:
    line = "error: the last words" if code == 2 else "the last words"
    assert ending_of(code, line, asked, memory) == (state, reason)


@pytest.mark.parametrize("code", [0, EXIT_TAKEN, EXIT_PAUSED])
def test_a_worker_that_spoke_for_itself_is_not_spoken_for(code: int) -> None:
    assert ending_of(code, "the last words", "", False) is None


@pytest.mark.parametrize(
    ("lines", "srun", "code"),
    [
        (["srun: error: n0: task 0: Exited with exit code 2", "srun: error: n1: task 1: Terminated"], 143, 2),
        (["srun: error: n1: task 1: Killed", "srun: error: n0: task 0: Aborted (core dumped)"], 137, -9),
        (["srun: error: n[0-1]: tasks 0-1: Exited with exit code 75"], 75, 75),
        (["srun: error: n0: task 0: Segmentation fault"], 139, -11),
        (
            ["a task: Killed", "error: task 0: Exited with exit code 1"],
            137,
            -9,
        ),  # not of srun: by its own code
        (["srun: Force Terminated StepId=51.0"], 1, 1),
        ([], 0, 0),
    ],
)
def test_a_step_ended_as_the_first_of_its_tasks_did(lines: list[str], srun: int, code: int) -> None:
    assert step.code_of(lines, srun) == code


def test_what_srun_says_are_not_the_last_words(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("error: toy.csv: is broken\nsrun: error: n0: task 0: Exited with exit code 2\n")
    assert workers.last_words(log) == "error: toy.csv: is broken"


def test_memory_is_told_from_a_bug_before_training_began() -> None:
    line = "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"
    assert ending_of(1, line, "", False) == ("oom", line)
    assert ending_of(1, "ImportError: no jax", "", False) == ("bug", "ImportError: no jax")


def test_kills_for_memory_are_counted_in_the_own_control_group_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, machine = tmp_path / "memory.events", tmp_path / "vmstat"
    machine.write_text("nr_free_pages 1\noom_kill 7\n")
    monkeypatch.setattr(workers, "_counters", lambda: [group, machine])
    assert workers.oom_kills() == 7
    group.write_text("low 0\noom 1\noom_kill 3\noom_group_kill 0\n")
    assert workers.oom_kills() == 3
    monkeypatch.setattr(workers, "_counters", list)
    assert workers.oom_kills() == 0


def test_one_worker_for_each_visible_gpu_and_none_where_jax_has_no_use_for_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "jax_cuda13_plugin").mkdir()
    (tmp_path / "jax_cuda13_plugin" / "__init__.py").touch()
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-1f,")
    assert workers.gpus() == ["3", "GPU-1f"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert workers.gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: H200 (UUID: GPU-a)'\necho 'GPU 1: H200 (UUID: GPU-b)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert workers.gpus() == ["0", "1"]
    tool.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    monkeypatch.setattr(workers, "_DRIVER_S", 0.05)
    with pytest.raises(UserError, match=r"nvidia-smi: no answer in 0\.05 s; mend the driver"):
        workers.gpus()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert workers.gpus() == []


def test_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log, 3) == []
    log.write_bytes(b"\xff" * 40_000 + b"\none\ntwo\n\n")
    assert tail(log, 3) == ["one", "two", ""]
    assert workers.last_words(log) == "two"


JAX_NOTE = """\
--------------------
For simplicity, JAX has removed its internal frames from the traceback of the following exception. \
Set JAX_TRACEBACK_FILTERING=off to include these.
"""


@pytest.mark.parametrize(
    ("line", "state"),
    [
        ("jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.", "oom"),
        ("ValueError: mean() of an empty batch", "bug"),
        ("AssertionError", "bug"),
    ],
)
def test_the_reason_is_the_exception_and_not_what_jax_notes_behind_it(
    tmp_path: Path, line: str, state: str
) -> None:
    log = tmp_path / "log"
    log.write_text(
        f"Traceback (most recent call last):\n  File 'x'\n    raise Error\n{line}\nmore\n{JAX_NOTE}"
    )
    assert workers.last_words(log) == line
    assert ending_of(1, workers.last_words(log), "", False) == (state, line)
    log.write_text("KeyError: 'handled'\nerror: data.csv: not there; give another\n")
    assert workers.last_words(log) == "error: data.csv: not there; give another"


def progress(step: int, elapsed: float, runs: int = 3, steps: int = 100) -> Progress:
    return Progress("a", runs, step, steps, None, elapsed)


def test_time_left_comes_from_finished_cohorts_and_else_from_those_at_work() -> None:
    assert seconds_left([], [progress(0, 9.0)], 6, 1) is None  # nothing to go by yet
    # 60 s for three runs: 20 s each, six waiting, and half of three begun.
    assert seconds_left([(60.0, 3)], [progress(50, 30.0)], 6, 1) == pytest.approx(6 * 20 + 30)
    assert seconds_left([], [progress(50, 30.0)], 6, 1) == pytest.approx(6 * 20 + 30)
    assert seconds_left([(60.0, 3)], [], 6, 2) == pytest.approx(60)
    assert seconds_left([(60.0, 3)], [], 0, 2) == 0
    assert [in_words(s) for s in (None, 0, 3, 65, 200, 7200)] == [
        "", "", ", about 10 s left", ", about 60 s left", ", about 3 min left", ", about 2.0 h left",
    ]  # fmt: skip


def test_events_are_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with View("study") as view:
        view.event("started a (confirm): [3 members]")
        view.update({"a": {"pending": 3}}, [progress(1, 1.0)], None)
        view.mute()
        view.event("to nobody")
    captured = capsys.readouterr()
    assert captured.err == "started a (confirm): [3 members]\n"
    assert captured.out == ""


def test_a_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with View("study") as view:
        view.update({"rms": {"pending": 3, "done": 2}}, [progress(7, 1.0)], 200.0)
    shown = capsys.readouterr().err
    assert all(
        word in shown for word in ("rms", "diverged", "step 7 of 100", "2 of 5 runs, about 3 min left")
    )
