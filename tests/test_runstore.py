"""The run directory: atomic files, torn lines, attempts."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxablate import runstore
from jaxablate.errors import UserError
from jaxablate.runstore import RunDir

SPAWN = multiprocessing.get_context("spawn")
ROOT = Path(runstore.__file__).parents[1]
DEAD_PID = 2**22 - 1  # above the kernel's default pid_max


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------------------- write_json


def test_write_json_reads_back_and_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"x": [1, 2.5, math.nan, -math.inf], "t": (True, None), "n": np.float32(0.5), "é": tmp_path}
    runstore.write_json(path, value)
    text = path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert text.endswith("\n")
    assert runstore.read_json(path) == {
        "x": [1, 2.5, None, None], "t": [True, None], "n": 0.5, "é": str(tmp_path)
    }  # fmt: skip
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("value", [{1: 2}, {"x": object()}, np.zeros(3), {1, 2}, b"x"])
def test_what_has_no_json_form_is_refused_and_the_old_file_stays(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.json"
    runstore.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        runstore.write_json(path, value)
    assert runstore.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_error_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a.json"
    runstore.write_json(path, {"old": 1})

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space"):
        runstore.write_json(path, {"new": 1})
    monkeypatch.undo()
    assert runstore.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


KILL_BEFORE_RENAME = """
import os, signal, sys
from jaxablate import runstore
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
runstore.write_json(sys.argv[1], {"new": 1})
"""


def test_a_kill_between_temp_and_rename_leaves_the_old_file(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    runstore.write_json(run.summary, {"old": 1})
    done = subprocess.run([sys.executable, "-c", KILL_BEFORE_RENAME, str(run.summary)], check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert runstore.read_json(run.summary) == {"old": 1}
    strays = list(tmp_path.glob(".*.tmp"))
    assert len(strays) == 1
    run.begin_attempt()
    assert strays[0].exists()  # it could still be somebody's
    os.utime(strays[0], (0, 0))
    run.begin_attempt()
    assert not strays[0].exists()


@pytest.mark.parametrize("data", [b"", b"{", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000, b"\0" * 64])
def test_a_damaged_json_file_is_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        runstore.read_json(path)
    assert str(path) in one_line(error)


def test_a_missing_json_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        runstore.read_json(tmp_path / "config.json")
    assert "config.json: cannot be read" in one_line(error)


# -------------------------------------------------------------------------------------------- JSON lines

ROWS = [{"step": 1, "a": 0.1}, {"step": 2, "a": None, "text": 'braces } and "quotes" and ü'}, {"step": 3}]


def test_truncation_at_every_byte_of_the_last_row(tmp_path: Path) -> None:
    whole = b"".join(map(runstore.encode_row, ROWS))
    before_last = len(whole) - len(runstore.encode_row(ROWS[-1]))
    path = tmp_path / "rows.jsonl"
    for end in range(before_last, len(whole) + 1):
        path.write_bytes(whole[:end])
        rows, torn = runstore.read_jsonl(path)
        complete = end >= len(whole) - 1  # only the newline is missing, or nothing
        assert rows == (ROWS if complete else ROWS[:-1])
        assert torn == (before_last < end and not complete)
        runstore.append_jsonl(path, {"step": 9})
        rows_after, torn = runstore.read_jsonl(path)
        assert rows_after == [*rows, {"step": 9}]
        assert not torn


@given(
    rows=st.lists(
        st.dictionaries(st.text(), st.floats() | st.text() | st.integers(), max_size=3), max_size=4
    ),
    cut=st.integers(0, 400),
)
def test_any_truncation_keeps_a_prefix_of_the_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], cut: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    for row in rows:
        runstore.append_jsonl(path, row)
    assert runstore.read_jsonl(path) == ([runstore.plain(row) for row in rows], False)
    data = path.read_bytes() if path.exists() else b""
    path.write_bytes(data[:cut])
    kept, _ = runstore.read_jsonl(path)
    assert kept == [runstore.plain(row) for row in rows][: len(kept)]
    assert len(kept) >= data[:cut].count(b"\n")


@pytest.mark.parametrize(
    "line", [b'{"step": 2, "a"', b"12", b"[]", b"\xff", b'{"a": NaN}', b"\0\0\0", b"[" * 99_999]
)
def test_a_broken_middle_line_names_file_and_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(UserError) as error:
        runstore.read_jsonl(path)
    assert f"{path}:2:" in one_line(error)


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert runstore.read_jsonl(tmp_path / "none.jsonl") == ([], False)


def test_an_append_is_one_write_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    real = os.write

    def spy(fd: int, data: bytes) -> int:
        written.append(data)
        return real(fd, data)

    monkeypatch.setattr(os, "write", spy)
    runstore.append_jsonl(tmp_path / "rows.jsonl", {"step": 1, "loss": math.inf})
    assert written == [b'{"step": 1, "loss": null}\n']


def test_a_full_disk_takes_the_part_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    runstore.append_jsonl(path, {"step": 1})
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:5]))
    with pytest.raises(OSError, match="No space left"):
        runstore.append_jsonl(path, {"step": 2})
    monkeypatch.undo()
    assert path.read_bytes() == b'{"step": 1}\n'


def append_many(path: Path, who: int) -> None:
    for number in range(200):
        runstore.append_jsonl(path, {"who": who, "number": number, "text": "x" * 300})


def test_appends_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    workers = [SPAWN.Process(target=append_many, args=(path, who)) for who in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    rows, torn = runstore.read_jsonl(path)
    assert not torn
    assert len(rows) == 600
    for who in range(3):
        assert [row["number"] for row in rows if row["who"] == who] == list(range(200))


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
    assert runstore.read_json(run.config)["optim"]["lr"] == 1e-3


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
        runstore.append_jsonl(run.attempts, row)
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
