"""Goodput: every second of a run is counted once, and under what it was spent on."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from jaxablate import cli, disk, runstore
from jaxablate.analysis.goodput import Goodput, account, goodput
from tests.frozen import freeze, toy_study, write_run

START = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)


def at(seconds: float) -> str:
    return (START + datetime.timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def row(attempt: int, state: str, seconds: float, **more: Any) -> dict[str, Any]:
    pid = more.pop("pid", attempt)
    return {"attempt": attempt, "state": state, "time": at(seconds), "host": "here", "pid": pid, **more}


def perf(first: int, last: int, step_ms: float = 100.0, **more: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"step": step, "perf/step_ms": step_ms} for step in range(first, last + 1)]
    rows[0] = {"step": first, "perf/compile_sec": 2.0}
    rows[-1] |= more
    return rows


def test_an_undisturbed_run_is_useful_but_for_start_compilation_and_end() -> None:
    history = [row(1, "running", 5, age=3.0, step=0), row(1, "done", 20, step=100)]
    found = account(history, perf(1, 100, **{"perf/pause_sec": 1.5}), submitted=START.timestamp())
    assert found.seconds == pytest.approx(
        {"useful": 10, "lost": 0, "compile": 2, "pause": 1.5, "start": 3, "waiting": 2, "other": 1.5}
    )
    assert found.share == pytest.approx(10 / 20)
    assert (found.steps, found.attempts, found.lost_steps) == (100, 1, 0)


def test_what_a_kill_cost_is_lost_and_the_rest_was_waiting() -> None:
    notes = ["perf.jsonl: dropped 15 rows after step 50, up to step 65"]
    history = [
        row(1, "running", 3, age=3.0, step=0),
        row(1, "node_fail", 60, pid=9),  # by another, who came to know much later
        row(2, "running", 64, age=3.0, step=50, notes=notes),
        row(2, "done", 75, step=100),
    ]
    found = account(history, [*perf(1, 50), *perf(51, 100)])
    # 5 s of steps, 2 of compilation and 1.5 of steps for nothing: it died at 11.5.
    assert found.seconds == pytest.approx(
        {
            "useful": 10,
            "lost": 1.5,
            "compile": 4,
            "pause": 0,
            "start": 6,
            "waiting": 64 - 3 - 11.5,
            "other": 4,
        }
    )
    assert sum(found.seconds.values()) == pytest.approx(75)
    assert (found.steps, found.attempts, found.lost_steps) == (100, 2, 15)


def test_a_clean_stop_loses_nothing_and_a_cohort_shares_its_time() -> None:
    history = [
        row(1, "running", 3, age=3.0, step=0, members=2), row(1, "preempted", 11, step=50),
        row(2, "running", 31, age=3.0, step=50, members=2), row(2, "done", 38, step=100),
    ]  # fmt: skip
    found = account(history, [*perf(1, 50), *perf(51, 100)])
    assert found.lost == found.lost_steps == 0
    assert found.waiting == pytest.approx((31 - 11 - 3) / 2)
    assert sum(found.seconds.values()) == pytest.approx(38 / 2)


def test_an_attempt_that_never_got_to_a_step_is_all_cost() -> None:
    history = [row(1, "running", 3, age=3.0, step=0), row(1, "bug", 9, step=0)]
    found = account(history, [])
    assert (found.useful, found.start, found.other) == pytest.approx((0, 3, 6))
    assert found.share == 0


def test_an_attempt_that_was_killed_while_it_started_takes_no_steps_from_others() -> None:
    history = [
        row(1, "running", 3, age=3.0, step=0), row(1, "preempted", 11, step=50),
        row(2, "running", 14, age=3.0, step=0), row(2, "node_fail", 14),  # its launcher's word; it was at step 50
        row(3, "running", 17, age=3.0, step=50), row(3, "done", 24, step=100),
    ]  # fmt: skip
    found = account(history, [*perf(1, 50), *perf(51, 100)])
    assert (found.useful, found.compile, found.start) == pytest.approx((10, 4, 9))
    assert (found.steps, found.attempts, found.lost_steps) == (100, 3, 0)


def test_of_a_study_all_runs_are_added_and_a_damaged_one_is_left_out(tmp_path: Path) -> None:
    manifest = freeze(toy_study(tmp_path))
    assert goodput(manifest).share is None
    assert goodput(manifest).text() == "goodput: nothing has been trained"
    for run in manifest.runs:
        write_run(manifest, run, "done", {"val/loss": 0.5}, seconds=60.0)
        rows = [{"step": n, "perf/step_ms": 500.0} for n in range(1, 101)]
        manifest.run_dir(run).perf.write_bytes(b"".join(map(disk.encode_row, rows)))
    found = goodput(manifest)
    assert found.share == pytest.approx(50 / 60)
    assert found.attempts == len(manifest.runs)
    manifest.run_dir(manifest.runs[0]).attempts.write_text("{}\n")
    assert goodput(manifest).attempts == len(manifest.runs) - 1
    assert isinstance(found + Goodput(), Goodput)
    assert found.text().startswith("goodput 83.3 %: ")
    arms = {run.arm for run in manifest.runs[1:]}
    of_arms = sum((goodput(manifest, [arm]) for arm in arms), Goodput())
    assert of_arms.attempts == len(manifest.runs) - 1


def test_it_is_said_in_a_line() -> None:
    found = Goodput(
        useful=9 * 3600, lost=1800, start=1800, waiting=2 * 3600, attempts=3, lost_steps=5, steps=90
    )
    assert found.text() == (
        "goodput 75.0 % (90.0 % without waiting): 9.0 h useful, 30.0 min redone, 30.0 min starting, "
        "2.0 h waiting; 90 steps in 3 attempts, 5 computed twice"
    )


def test_status_says_it_when_asked_and_else_reads_no_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = freeze(toy_study(tmp_path))
    for run in manifest.runs:
        write_run(manifest, run, "done", {"val/loss": 0.5}, seconds=60.0)
    assert cli.main(["status", str(manifest.path), "--goodput", "--arm=wide"]) == 0
    own = sum(run.arm == "wide" for run in manifest.runs)
    assert f"in {own} attempts, 0 computed twice" in capsys.readouterr().out
    assert cli.main(["status", str(manifest.path), "--goodput", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["goodput"]["attempts"] == len(manifest.runs)
    monkeypatch.setattr(runstore, "read_steps", lambda path: pytest.fail(f"{path} was read"))
    assert cli.main(["status", str(manifest.path), "--json"]) == 0
    assert "goodput" not in json.loads(capsys.readouterr().out)
