"""The run directory: private, with one config, and the history of its attempts."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxablate import disk, runstore
from jaxablate.errors import UserError
from jaxablate.runstore import RunDir
from tests.lines import one_line

ROOT = Path(runstore.__file__).parents[1]
DEAD_PID = 2**22 - 1  # above the kernel's default pid_max


# ------------------------------------------------------------------------------------------ directories


def test_run_directories_are_private(tmp_path: Path) -> None:
    old = os.umask(0o002)
    try:
        run = RunDir(tmp_path / "study" / "arm" / "run")
        assert run.create({"a": 1})
        for path in (run.path, run.path.parent, run.path.parent.parent):
            assert path.stat().st_mode & 0o777 == 0o700
        # What was there before keeps the mode that somebody gave it.
        shared = tmp_path / "shared"
        shared.mkdir()
        shared.chmod(0o770)
        RunDir(shared / "run").create({})
        assert shared.stat().st_mode & 0o777 == 0o770
    finally:
        os.umask(old)


def test_another_config_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    config = {
        "optim": {"lr": 1e-3, "betas": [0.9, 0.99]},
        "model": {"norm": "rmsnorm"},
        "seed": 0,
        "x": math.nan,
    }
    assert run.create(config)
    assert not run.create(config)
    changed = {**config, "optim": {"lr": 2e-3, "betas": [0.9, 0.99]}, "extra": True}
    with pytest.raises(UserError) as error:
        run.create(changed)
    text = one_line(error)
    assert "optim.lr: 0.001 -> 0.002" in text
    assert "extra: (absent) -> true" in text
    assert "betas" not in text
    assert disk.read_json(run.config)["optim"]["lr"] == 1e-3


def test_one_and_one_point_zero_and_true_differ() -> None:
    assert runstore.differences({"a": 1}, {"a": True}) == ["a: 1 -> true"]
    assert runstore.differences({"a": 1}, {"a": 1.0}) == ["a: 1 -> 1.0"]
    assert runstore.differences({"a": {}}, {"a": {"b": 1}}) == ["a: {} -> (absent)", "a.b: (absent) -> 1"]
    assert runstore.differences({"a": [{"b": 1}, {"b": 2}]}, {"a": [{"b": 1}, {"b": 3}]}) == [
        "a[1].b: 2 -> 3"
    ]


def test_many_differences_stay_one_short_line(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create({f"k{i}": "old" * 100 for i in range(50)})
    with pytest.raises(UserError) as error:
        run.create({f"k{i}": "new" * 100 for i in range(50)})
    assert "and 46 more" in one_line(error)
    assert len(str(error.value)) < 1000


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "study").write_text("")
    for path in (tmp_path / "study", tmp_path / "study" / "arm"):
        with pytest.raises(UserError) as error:
            RunDir(path).create({})
        assert "choose another workdir" in one_line(error)


def test_run_id() -> None:
    assert runstore.run_id(0, 0.001, "1a2b3c4d5e6f") == "seed0-lr0.001-1a2b3c4d5e"
    assert runstore.run_id(12, 1.25e-6, "a" * 64) == "seed12-lr1.25e-06-aaaaaaaaaa"
    for bad in ("short", "../../etc/passwd", ""):
        with pytest.raises(ValueError, match="fingerprint"):
            runstore.run_id(0, 0.001, bad)


# --------------------------------------------------------------------------------------------- attempts


def test_attempts_and_states(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.state() == "pending"
    assert run.history() == []
    assert run.begin_attempt(step=0, note="x") == 1
    assert run.state() == "running"
    run.end_attempt(1, "preempted", "SIGTERM\nat a step boundary", step=40)
    assert run.state() == "preempted"
    assert run.begin_attempt(step=40) == 2
    run.end_attempt(2, "done", "all steps done", step=100)
    assert run.state() == "done"
    rows = run.history()
    assert [(row["attempt"], row["state"]) for row in rows] == [
        (1, "running"), (1, "preempted"), (2, "running"), (2, "done")
    ]  # fmt: skip
    assert rows[1]["reason"] == "SIGTERM at a step boundary"
    assert rows[1]["step"] == 40
    assert rows[0]["host"] == socket.gethostname()
    assert rows[0]["pid"] == os.getpid()


def test_nothing_is_inferred_from_a_dead_process(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    rows = [
        {
            "attempt": 1,
            "state": "running",
            "time": runstore.now(),
            "host": socket.gethostname(),
            "pid": DEAD_PID,
        }
    ]
    for row in rows:
        disk.append_jsonl(run.attempts, row)
    assert run.state() == "running"
    run.end_attempt(1, "node_fail", "the scheduler says so")
    assert run.state() == "node_fail"


def test_a_torn_attempt_is_no_attempt(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.begin_attempt()
    run.end_attempt(1, "oom", "out of memory")
    with run.attempts.open("ab") as file:
        file.write(b'{"attempt": 2, "state": "runn')
    assert run.state() == "oom"
    assert run.begin_attempt() == 2
    assert [row["attempt"] for row in run.history()] == [1, 1, 2]


def test_an_attempt_begins_by_sweeping_up_after_killed_writers(tmp_path: Path) -> None:
    (tmp_path / ".summary.json.0a1b2c.tmp").touch()
    os.utime(tmp_path / ".summary.json.0a1b2c.tmp", (0, 0))
    (tmp_path / "summary.json").touch()
    RunDir(tmp_path).begin_attempt()
    assert sorted(os.listdir(tmp_path)) == ["attempts.jsonl", "summary.json"]


def test_marks_of_others(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.mark("cancelled", "by hand")
    assert run.state() == "cancelled"
    run.mark("pending", "retry")
    assert run.state() == "pending"
    assert run.begin_attempt() == 1


def test_misuse_of_attempts_is_an_error(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.begin_attempt()
    with pytest.raises(ValueError, match="never began"):
        run.end_attempt(2, "done", "")
    with pytest.raises(ValueError, match="does not end"):
        run.end_attempt(1, "running", "")
    with pytest.raises(ValueError, match="is not one of"):
        run.end_attempt(1, "finished", "")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="pid"):
        run.begin_attempt(pid=3)
    assert [row["state"] for row in run.history()] == ["running"]


@pytest.mark.parametrize(
    "row", ['{"attempt": 1, "state": "finished"}', '{"state": "done"}', '{"attempt": "x", "state": "done"}']
)
def test_an_odd_attempts_file_is_one_line(tmp_path: Path, row: str) -> None:
    run = RunDir(tmp_path)
    run.attempts.write_text(row + "\n")
    with pytest.raises(UserError) as error:
        run.state()
    assert f"{run.attempts}:1:" in one_line(error)


def test_no_jax_and_no_numpy_is_imported() -> None:
    heavy = ("jax", "numpy", "tensorboard")
    code = f"import sys, jaxablate.claims; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
