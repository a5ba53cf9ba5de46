"""Files that outlive a kill: atomic replacement, whole rows, torn lines."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxablate import disk
from jaxablate.errors import UserError
from tests.lines import one_line

SPAWN = multiprocessing.get_context("spawn")
ROOT = Path(disk.__file__).parents[1]


# ------------------------------------------------------------------------------------------- write_json


def test_write_json_reads_back_and_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"x": [1, 2.5, math.nan, -math.inf], "t": (True, None), "n": np.float32(0.5), "é": tmp_path}
    disk.write_json(path, value)
    text = path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert text.endswith("\n")
    assert disk.read_json(path) == {
        "x": [1, 2.5, None, None], "t": [True, None], "n": 0.5, "é": str(tmp_path)
    }  # fmt: skip
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("value", [{1: 2}, {"x": object()}, np.zeros(3), {1, 2}, b"x"])
def test_what_has_no_json_form_is_refused_and_the_old_file_stays(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.json"
    disk.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        disk.write_json(path, value)
    assert disk.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_error_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a.json"
    disk.write_json(path, {"old": 1})

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space"):
        disk.write_json(path, {"new": 1})
    monkeypatch.undo()
    assert disk.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


KILL_BEFORE_RENAME = """
import os, signal, sys
from jaxablate import disk
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
disk.write_json(sys.argv[1], {"new": 1})
"""


def test_a_kill_between_temp_and_rename_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    disk.write_json(path, {"old": 1})
    done = subprocess.run([sys.executable, "-c", KILL_BEFORE_RENAME, str(path)], check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert disk.read_json(path) == {"old": 1}
    strays = list(tmp_path.glob(".*.tmp"))
    assert len(strays) == 1
    disk.sweep(tmp_path)
    assert strays[0].exists()  # it could still be somebody's
    os.utime(strays[0], (0, 0))
    disk.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["summary.json"]


@pytest.mark.parametrize("data", [b"", b"{", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000, b"\0" * 64])
def test_a_damaged_json_file_is_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        disk.read_json(path)
    assert str(path) in one_line(error)


def test_a_missing_json_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        disk.read_json(tmp_path / "config.json")
    assert "config.json: cannot be read" in one_line(error)


# -------------------------------------------------------------------------------------------- JSON lines

ROWS = [{"step": 1, "a": 0.1}, {"step": 2, "a": None, "text": 'braces } and "quotes" and ü'}, {"step": 3}]


def test_truncation_at_every_byte_of_the_last_row(tmp_path: Path) -> None:
    whole = b"".join(map(disk.encode_row, ROWS))
    before_last = len(whole) - len(disk.encode_row(ROWS[-1]))
    path = tmp_path / "rows.jsonl"
    for end in range(before_last, len(whole) + 1):
        path.write_bytes(whole[:end])
        rows, torn = disk.read_jsonl(path)
        complete = end >= len(whole) - 1  # only the newline is missing, or nothing
        assert rows == (ROWS if complete else ROWS[:-1])
        assert torn == (before_last < end and not complete)
        disk.append_jsonl(path, {"step": 9})
        rows_after, torn = disk.read_jsonl(path)
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
        disk.append_jsonl(path, row)
    assert disk.read_jsonl(path) == ([disk.plain(row) for row in rows], False)
    data = path.read_bytes() if path.exists() else b""
    path.write_bytes(data[:cut])
    kept, _ = disk.read_jsonl(path)
    assert kept == [disk.plain(row) for row in rows][: len(kept)]
    assert len(kept) >= data[:cut].count(b"\n")


@pytest.mark.parametrize(
    "line", [b'{"step": 2, "a"', b"12", b"[]", b"\xff", b'{"a": NaN}', b"\0\0\0", b"[" * 99_999]
)
def test_a_broken_middle_line_names_file_and_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(UserError) as error:
        disk.read_jsonl(path)
    assert f"{path}:2:" in one_line(error)


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert disk.read_jsonl(tmp_path / "none.jsonl") == ([], False)


def test_an_append_is_one_write_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    real = os.write

    def spy(fd: int, data: bytes) -> int:
        written.append(data)
        return real(fd, data)

    monkeypatch.setattr(os, "write", spy)
    disk.append_jsonl(tmp_path / "rows.jsonl", {"step": 1, "loss": math.inf})
    assert written == [b'{"step": 1, "loss": null}\n']


def test_a_full_disk_takes_the_part_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    disk.append_jsonl(path, {"step": 1})
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:5]))
    with pytest.raises(OSError, match="No space left"):
        disk.append_jsonl(path, {"step": 2})
    monkeypatch.undo()
    assert path.read_bytes() == b'{"step": 1}\n'


def append_many(path: Path, who: int) -> None:
    for number in range(200):
        disk.append_jsonl(path, {"who": who, "number": number, "text": "x" * 300})


def test_appends_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    workers = [SPAWN.Process(target=append_many, args=(path, who)) for who in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    rows, torn = disk.read_jsonl(path)
    assert not torn
    assert len(rows) == 600
    for who in range(3):
        assert [row["number"] for row in rows if row["who"] == who] == list(range(200))
