"""A run's metrics as a table: a view of what was recorded, with rows apart, gaps empty, and time that adds up."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from jaxablate import disk
from jaxablate.analysis import collect, plots, runtable
from jaxablate.runstore import RunDir

METRICS = [
    {"step": 0, "val/loss": 9.0, "val/perplexity": 8103.0},
    {"step": 1, "train/loss": 9.0, "train/grad_norm": 1.5, "train/lr": 1e-3},
    {"step": 10, "train/loss": None, "train/grad_norm": None, "train/lr": 2e-3},
    {"step": 20, "train/loss": 4.0, "train/grad_norm": 1.0, "train/lr": 1e-3},
    {"step": 20, "val/loss": 5.0, "val/perplexity": None},
]
PERF = [
    {"step": 1, "perf/compile_sec": 12.0, "time": 1000.0},
    {"step": 10, "perf/steps_per_sec": 5.0, "perf/tokens_per_sec": 640.0, "time": 1002.0},
    {"step": 11, "perf/compile_sec": 6.0, "time": 5000.0},  # another attempt, an hour later
    {"step": 20, "perf/steps_per_sec": 5.0, "perf/tokens_per_sec": 640.0, "perf/pause_sec": 1.0, "time": 5003.0},
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    where = RunDir(tmp_path)
    where.metrics.write_bytes(b"".join(map(disk.encode_row, METRICS)))
    where.perf.write_bytes(b"".join(map(disk.encode_row, PERF)))
    return where


def test_time_adds_up_over_attempts_and_leaves_out_the_queue() -> None:
    points = runtable.elapsed(PERF)
    assert points == [(0, 0.0), (1, 12.0), (10, 14.0), (11, 20.0), (20, 23.0)]
    assert points[-1][1] < PERF[-1]["time"] - PERF[0]["time"]  # the clock on the wall went on in between
    assert runtable.elapsed([]) == [(0, 0.0)]


def test_the_table_has_the_promised_columns_and_its_rows_apart(run: RunDir) -> None:
    runtable.write_csv(run)
    text = run.metrics_csv.read_text()
    assert text.splitlines()[0] == (
        "step,wallclock_time,elapsed_time,train_loss,val_loss,val_perplexity,learning_rate,tokens_per_sec,"
        "compile_sec,pause_sec,steps_per_sec,train_grad_norm"
    )
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == len(METRICS)
    assert not any(row["train_loss"] and row["val_loss"] for row in rows)
    last, evaluation = rows[-2], rows[-1]
    assert (last["step"], last["train_loss"], last["learning_rate"], last["tokens_per_sec"]) == (
        "20", "4.0", "0.001", "640.0",
    )  # fmt: skip
    assert float(last["elapsed_time"]) * 60 == pytest.approx(23)
    assert (evaluation["val_loss"], evaluation["val_perplexity"]) == ("5.0", "")
    assert (evaluation["train_loss"], evaluation["learning_rate"], evaluation["tokens_per_sec"]) == (
        "",
        "",
        "",
    )
    assert evaluation["wallclock_time"] == last["wallclock_time"] == "5003.0"
    assert rows[2]["train_loss"] == "" and rows[0]["wallclock_time"] == ""  # not finite; never timed


def test_the_json_has_the_same_rows_with_null_for_what_is_not_there(run: RunDir) -> None:
    runtable.write_csv(run)
    runtable.write_json(run)
    rows = json.loads(run.metrics_json.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert "elapsed_time" not in rows[0]
    for row, cells in zip(rows, csv.DictReader(run.metrics_csv.read_text().splitlines()), strict=True):
        cells.pop("elapsed_time")
        assert {name: "" if value is None else str(value) for name, value in row.items()} == cells


def test_the_tables_are_a_view_and_follow_what_was_recorded(run: RunDir) -> None:
    runtable.write_csv(run)
    before = run.metrics_csv.read_text()
    disk.append_jsonl(run.metrics, {"step": 30, "val/loss": 3.0, "val/new": 1.0})
    assert run.metrics_csv.read_text() == before  # not by itself
    runtable.write_csv(run)
    after = run.metrics_csv.read_text()
    assert after.splitlines()[0].endswith("train_grad_norm,val_new") and len(after.splitlines()) == 7


def jq(path: str, document: Any) -> Any:
    """What `jq PATH` prints of an object: null, and no error, for a key that is not there."""
    keys = path.removeprefix(".").split(".")
    return functools.reduce(lambda found, key: None if found is None else found.get(key), keys, document)


def test_an_arms_summary_is_asked_as_a_runs(tmp_path: Path) -> None:
    for seed, best in ((0, 1.0), (1, 3.0)):
        disk.make_private(tmp_path / "s" / "arm" / f"run{seed}")
        summary = {
            "run_id": f"run{seed}", "state": "done", "seed": seed, "config": {"seed": seed},
            "statistics": {
                "val_loss": {"best": best, "best_step": 5, "min": best, "mean": None},
                "generalization_gap": {"late_train_minus_final_val": -best},
                "total_steps": 10,
                "total_wallclock_hours": best / 2,
            },
        }  # fmt: skip
        disk.write_json(tmp_path / "s" / "arm" / f"run{seed}" / "summary.json", summary)
    collect.write_arm_summary(tmp_path / "s" / "arm", ("run0", "run1"))
    arm = json.loads((tmp_path / "s" / "arm" / "summary.json").read_text())
    assert jq(".statistics.val_loss.best", arm) == 2.0
    assert jq(".statistics.val_loss.best_sd", arm) == pytest.approx(2**0.5)
    assert jq(".statistics.generalization_gap.late_train_minus_final_val", arm) == -2.0
    assert (jq(".statistics.total_steps", arm), jq(".statistics.total_wallclock_hours", arm)) == (10, 1.0)
    assert jq(".statistics.val_loss.best_step", arm) is None  # no mean of places
    assert jq(".statistics.val_lost.best", arm) is None


def test_the_learning_rate_is_drawn(run: RunDir, tmp_path: Path) -> None:
    plots.lr_schedule(run, run.schedule, title="arm, seed $0")
    assert run.schedule.read_bytes().startswith(b"\x89PNG")
    plots.lr_schedule([{"step": 1, "train/loss": 1.0}], tmp_path / "none.png")
    assert (tmp_path / "none.png").read_bytes() != run.schedule.read_bytes()
