"""The record of a run: deterministic, the same after any kill and resume, and never a step twice."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxablate import disk, metrics, runstore
from jaxablate.errors import UserError
from jaxablate.events import experiment_hparams
from jaxablate.metrics import MetricsLog
from jaxablate.runstore import RunDir

ROOT = Path(runstore.__file__).parents[1]
HPARAMS = {"attention": "flash", "lr": 1e-3, "seed": 0, "qk_norm": True}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create({})
    return run


def train(run: RunDir, resume_step: int, last: int) -> MetricsLog:
    """A run that evaluates before it starts and every 4 steps, and never computes a step it has resumed."""
    log = MetricsLog(run, resume_step=resume_step, hparams=HPARAMS)
    for step in range(resume_step + 1, last + 1):
        if step > 0:
            log.write(step, {"train/loss": 1.0 / 3 / step, "train/grad_norm": np.float32(0.1) * step})
            log.write_perf(step, {"perf/step_ms": random.random()})
        if step % 4 == 0:
            log.write(step, {"val/loss": math.nan if step == 8 else 1.0 / 7 / (step + 1)})
    return log


def events(run: RunDir) -> list[Any]:
    """All events of the run directory, read by tensorboard's own loader."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    paths = sorted(run.path.glob("events.out.tfevents.*"))
    return [event for path in paths for event in EventFileLoader(str(path)).Load()]


def shown(run: RunDir) -> list[tuple[int, str, float]]:
    from tensorboard.util import tensor_util

    return [
        (event.step, value.tag, float(tensor_util.make_ndarray(value.tensor)))
        for event in events(run)
        for value in event.summary.value
        if not value.tag.startswith("_hparams_")
    ]


# --------------------------------------------------------------------------------------------- the rows


def test_rows_have_the_step_first_then_sorted_keys_and_pythons_floats(run: RunDir) -> None:
    with MetricsLog(run, resume_step=-1, hparams=HPARAMS) as log:
        log.write(0, {"val/loss": 0.1, "val/a": np.float64(1e-7)})
        log.write(1, {"train/loss": np.float32(0.1), "data/tokens": 3, "b": math.inf})
        log.write(1, {"val/loss": 2.0})
    assert run.metrics.read_text() == (
        '{"step": 0, "val/a": 1e-07, "val/loss": 0.1}\n'
        '{"step": 1, "b": null, "data/tokens": 3, "train/loss": 0.10000000149011612}\n'
        '{"step": 1, "val/loss": 2.0}\n'
    )


def test_there_is_no_time_in_metrics(run: RunDir) -> None:
    train(run, -1, 9).close()
    rows, _ = disk.read_jsonl(run.metrics)
    assert {key for row in rows for key in row} == {"step", "train/loss", "train/grad_norm", "val/loss"}
    perf, _ = disk.read_jsonl(run.perf)
    assert {key for row in perf for key in row} == {"step", "time", "perf/step_ms"}


@pytest.mark.parametrize(
    "first, second, error",
    [
        ((3, {"a": 1.0}), (2, {"a": 1.0}), ValueError),  # goes back
        ((3, {"a": 1.0}), (3, {"a": 1.0}), ValueError),  # twice, even if it is the same
        ((3, {"a": 1.0, "b": 1.0}), (3, {"c": 1.0, "b": 1.0}), ValueError),
        ((3, {"a": 1.0}), (4, {"step": 1.0}), ValueError),
        ((3, {"a": 1.0}), (4, {"a": "high"}), TypeError),
        ((3, {"a": 1.0}), (4, {"a": True}), TypeError),
        ((3, {"a": 1.0}), (4, {"a": np.zeros(2)}), TypeError),
        ((3, {"a": 1.0}), (-1, {"b": 1.0}), ValueError),
    ],
)
def test_misuse_is_refused_and_writes_nothing(run: RunDir, first: Any, second: Any, error: type) -> None:
    with MetricsLog(run, resume_step=-1, hparams=HPARAMS) as log:
        log.write(*first)
        before = run.metrics.read_bytes()
        with pytest.raises(error):
            log.write(*second)
        assert run.metrics.read_bytes() == before
        log.write(9, {"a": 1.0})
    assert [step for step, _, _ in shown(run)].count(9) == 1


# -------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("checkpoint, killed", [(c, k) for c in (-1, 0, 4, 8) for k in range(max(c, 1), 17)])
def test_a_resumed_run_has_the_bytes_of_an_undisturbed_one(
    tmp_path: Path, checkpoint: int, killed: int
) -> None:
    whole, parts = RunDir(tmp_path / "whole"), RunDir(tmp_path / "parts")
    for each in (whole, parts):
        each.create({})
    train(whole, -1, 16).close()
    train(parts, -1, killed).close()
    train(parts, checkpoint, 16).close()
    assert parts.metrics.read_bytes() == whole.metrics.read_bytes()
    perf = [row["step"] for row in disk.read_jsonl(parts.perf)[0]]
    assert perf == list(range(1, 17))
    views = [sorted(str(p) for p in shown(each) if not p[1].startswith("perf/")) for each in (whole, parts)]
    assert views[0] == views[1]  # as text, because NaN is not equal to itself
    counts = Counter((step, tag) for step, tag, _ in shown(parts))
    assert counts == Counter((step, tag) for step, tag, _ in shown(whole))
    assert set(counts.values()) == {1}


def test_every_truncation_of_the_last_row_is_resumed(tmp_path: Path) -> None:
    whole = RunDir(tmp_path / "whole")
    whole.create({})
    train(whole, -1, 6).close()
    data = whole.metrics.read_bytes()
    start = data.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(start, len(data)):
        torn = RunDir(tmp_path / str(end))
        torn.create({})
        torn.metrics.write_bytes(data[:end])
        log = train(torn, 5, 6)
        log.close()
        assert torn.metrics.read_bytes() == data
        assert bool(log.notes) == (end > start)


def test_what_was_dropped_is_said(run: RunDir) -> None:
    train(run, -1, 12).close()
    with run.perf.open("ab") as file:
        file.write(b'{"step": 13, "perf')
    with MetricsLog(run, resume_step=8, hparams=HPARAMS) as log:
        assert log.notes == [
            "metrics.jsonl: dropped 5 rows after step 8, up to step 12",
            "perf.jsonl: dropped a torn last line",
            "perf.jsonl: dropped 4 rows after step 8, up to step 12",
        ]


def test_nothing_restored_means_that_step_0_goes_too(run: RunDir) -> None:
    train(run, -1, 3).close()
    train(run, -1, 0).close()
    assert disk.read_jsonl(run.metrics)[0] == [{"step": 0, "val/loss": 1.0 / 7}]


def test_an_evaluation_after_the_checkpoint_may_be_repeated_if_it_is_the_same(run: RunDir) -> None:
    train(run, -1, 4).close()
    before = run.metrics.read_bytes()
    with MetricsLog(run, resume_step=4, hparams=HPARAMS) as log:
        log.write(4, {"val/loss": 1.0 / 7 / 5})
        assert run.metrics.read_bytes() == before
        with pytest.raises(ValueError, match="written twice"):
            log.write(4, {"val/loss": 0.5})
        log.write(4, {"val/new": 0.5})
    assert Counter((step, tag) for step, tag, _ in shown(run))[4, "val/loss"] == 1


def test_timings_at_the_resumed_step_stay_those_measured_first(run: RunDir) -> None:
    with MetricsLog(run, resume_step=-1, hparams=HPARAMS) as log:
        log.write_perf(4, {"perf/compile_sec": 1.0})
    for _ in range(2):
        with MetricsLog(run, resume_step=4, hparams=HPARAMS) as log:
            log.write_perf(4, {"perf/compile_sec": 2.0, "perf/peak_bytes": 7})
            log.write_perf(5, {"perf/compile_sec": 3.0})
    rows, _ = disk.read_jsonl(run.perf)
    assert [{key: value for key, value in row.items() if key != "time"} for row in rows] == [
        {"step": 4, "perf/compile_sec": 1.0},
        {"step": 4, "perf/peak_bytes": 7},
        {"step": 5, "perf/compile_sec": 3.0},
    ]


def test_there_is_one_event_file_with_anything_in_it(run: RunDir) -> None:
    for _ in range(4):
        train(run, -1, 3).close()
    sizes = [path.stat().st_size for path in sorted(run.path.glob("events.out.tfevents.*"))]
    assert len(sizes) == 2
    assert sizes[0] == 0
    assert sizes[1] > 0


def test_the_next_event_file_comes_later_even_if_the_clock_is_behind(run: RunDir) -> None:
    ahead = run.path / "events.out.tfevents.9000000000.a.node.with.dots.1.0"
    ahead.write_bytes(b"")
    train(run, -1, 1).close()
    names = sorted(path.name for path in run.path.glob("events.out.tfevents.*"))
    assert names[0] == ahead.name
    assert names[1].startswith("events.out.tfevents.9000000001.")


def test_replayed_values_keep_their_times(run: RunDir) -> None:
    train(run, -1, 3).close()
    rows = disk.read_jsonl(run.perf)[0]
    old = [{**row, "time": 1000.0 + row["step"]} for row in rows]
    disk.write_bytes(run.perf, b"".join(map(disk.encode_row, old)))
    MetricsLog(run, resume_step=3, hparams=HPARAMS).close()
    times = {event.step: event.wall_time for event in events(run) if event.step}
    assert times == {1: 1001.0, 2: 1002.0, 3: 1003.0}


@pytest.mark.parametrize(
    "text",
    ['{"step": 1}\n{"step": \n{"step": 2}\n', '{"a": 1}\n', '{"step": "1"}\n', '{"step": null}\n', "7\n"],
)
def test_a_damaged_record_is_one_line_and_stays_as_it_is(run: RunDir, text: str) -> None:
    run.metrics.write_text(text)
    with pytest.raises(UserError) as error:
        MetricsLog(run, resume_step=1, hparams=HPARAMS)
    assert str(run.metrics) in str(error.value)
    assert "\n" not in str(error.value)
    assert run.metrics.read_text() == text


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from test_metrics import train
from jaxablate.runstore import RunDir

run, resume, left = RunDir(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])

def counted(name, call):
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            if name == "write":  # a torn line
                call(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped

for name in ("write", "replace", "fsync", "unlink"):
    setattr(os, name, counted(name, getattr(os, name)))
print("go", flush=True)
while True:
    train(run, resume, 400).close()
"""


def test_kill_9_at_any_instant(tmp_path: Path) -> None:
    """At calls of the operating system chosen in advance, and at instants chosen by the clock."""
    whole, run = RunDir(tmp_path / "whole"), RunDir(tmp_path / "run")
    for each in (whole, run):
        each.create({})
    train(whole, -1, 400).close()
    rng, resume, torn, lasts = random.Random(0), -1, 0, []
    # The first calls of a resume are those that rewrite the two files and retire the event file.
    for call in (150, 2, 210, 1, 3, 5, 7, 300, 0, 0, 0):
        command = [
            sys.executable,
            "-c",
            KILLED,
            str(run.path),
            str(resume),
            str(call),
            str(Path(__file__).parent),
        ]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"go\n"
        if not call:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(rng.uniform(0.0, 0.2))
            child.kill()
        assert child.wait(60) == -9
        child.stdout.close()
        rows, was_torn = disk.read_jsonl(run.metrics)
        torn += was_torn + disk.read_jsonl(run.perf)[1]
        lasts.append(rows[-1]["step"] if rows else -1)
        # Back to a checkpoint, at every 20 steps: of its step all rows are there, as the loop has to see to.
        resume = max(resume, (lasts[-1] - 1) // 20 * 20) if lasts[-1] > 20 else resume
    assert torn >= 3
    assert 0 < min(lasts) < max(lasts)
    train(run, resume, 400).close()
    assert run.metrics.read_bytes() == whole.metrics.read_bytes()
    assert [row["step"] for row in disk.read_jsonl(run.perf)[0]] == list(range(1, 401))
    assert set(Counter((step, tag) for step, tag, _ in shown(run)).values()) == {1}


# ----------------------------------------------------------------------------------------- TensorBoard


def test_the_session_is_started_once_and_ended(run: RunDir) -> None:
    from tensorboard.plugins.hparams import metadata

    status_name = importlib.import_module("tensorboard.plugins.hparams.api_pb2").Status.Name

    def records() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for event in events(run):
            for value in event.summary.value:
                if value.tag.startswith("_hparams_"):
                    assert value.tag not in found
                    found[value.tag] = value.metadata.plugin_data.content
        return found

    for state, status in (("preempted", None), ("diverged", "FAILURE"), ("done", "SUCCESS")):
        log = MetricsLog(run, resume_step=-1, hparams={**HPARAMS, "nan": math.nan}, group="arm")
        log.write(1, {"val/loss": 1.0})
        log.finish(state, {})  # pyright: ignore[reportArgumentType]
        log.close()
        log.close()
        found = records()
        start = metadata.parse_session_start_info_plugin_data(found[metadata.SESSION_START_INFO_TAG])
        assert start.group_name == "arm"
        assert start.hparams["lr"].number_value == 1e-3
        assert start.hparams["qk_norm"].bool_value is True
        assert start.hparams["attention"].string_value == "flash"
        end = found.get(metadata.SESSION_END_INFO_TAG)
        assert (end is None) == (status is None)
        if status:
            got = metadata.parse_session_end_info_plugin_data(end).status
            assert status_name(got) == f"STATUS_{status}"


def test_experiment_hparams_replaces_what_it_wrote(tmp_path: Path) -> None:
    for values in ([1], [1, 2.5], ["a", 1], [True]):
        experiment_hparams(tmp_path / "study", {"x": values}, ["val/loss"])
    files = sorted((tmp_path / "study").iterdir())
    assert len(files) == 2
    assert files[0].stat().st_size == 0
    with pytest.raises(ValueError, match="no values"):
        experiment_hparams(tmp_path / "study", {"x": []}, [])


def test_tensorboard_and_tensorflow_are_not_imported_before_they_are_needed(tmp_path: Path) -> None:
    code = f"""
import sys
import jaxablate.metrics as m
assert "tensorboard" not in sys.modules and "jax" not in sys.modules and "numpy" not in sys.modules
from jaxablate.runstore import RunDir
from pathlib import Path
run = RunDir(Path({str(tmp_path / "run")!r}))
run.create({{}})
sys.modules["tensorflow"] = None  # an import of it would fail
log = m.MetricsLog(run, resume_step=-1, hparams={{"a": 1}})
log.write(1, {{"a": 1.0}})
log.finish("done", m.statistics([{{"step": 1, "a": 1.0}}], {{"a": "min"}}))
log.close()
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ------------------------------------------------------------------------------------------ statistics


def test_statistics() -> None:
    rows = [
        {"step": 1, "train/loss": 3.0},
        {"step": 2, "train/loss": None},
        {"step": 2, "val/loss": 2.0, "val/auroc": 0.5},
        {"step": 3, "train/loss": 1.0},
        {"step": 4, "val/loss": 1.5, "val/auroc": 0.9},
        {"step": 6, "val/loss": 1.5, "val/auroc": 0.9},
        {"step": 8, "val/loss": 1.75, "val/auroc": None, "val/never": None},
    ]
    directions: Any = {"val/loss": "min", "val/auroc": "max", "val/absent": "max", "val/never": "min"}
    assert metrics.statistics(rows, directions) == {
        "train_loss": {
            "initial": 3.0, "final": 1.0, "final_step": 3, "min": 1.0, "max": 3.0, "mean": 2.0, "nonfinite": 1,
        },
        "val_loss": {
            "initial": 2.0, "final": 1.75, "final_step": 8, "min": 1.5, "max": 2.0, "mean": 1.6875,
            "nonfinite": 0, "best": 1.5, "best_step": 4,
        },
        "val_auroc": {
            "initial": 0.5, "final": 0.9, "final_step": 6, "min": 0.5, "max": 0.9,
            "mean": pytest.approx(2.3 / 3), "nonfinite": 1, "best": 0.9, "best_step": 4,
        },
        "val_never": {
            "initial": None, "final": None, "final_step": None, "min": None, "max": None, "mean": None,
            "nonfinite": 1, "best": None, "best_step": None,
        },
    }  # fmt: skip


def test_the_gaps_are_of_one_batch_and_of_the_last_twentieth() -> None:
    rows = [{"step": step, "train/loss": 2.0 - step / 40} for step in range(1, 41)]
    rows += [{"step": 20, "val/loss": 1.25}, {"step": 40, "val/loss": 1.5}, {"step": 41, "train/loss": None}]
    gaps = metrics.gaps(rows)
    assert gaps is not None
    assert gaps["final_train_minus_best_val"] == pytest.approx(1.0 - 1.25)
    assert gaps["late_train_minus_final_val"] == pytest.approx((1.025 + 1.0) / 2 - 1.5)
    assert metrics.gaps([{"step": 1, "train/loss": 1.0}]) is None


def test_the_best_is_not_the_last() -> None:
    """The mistake of an upstream study, whose best checkpoint was its last one."""
    rows = [{"step": step, "val/loss": abs(step - 5.0)} for step in range(12)]
    entry = metrics.statistics(rows, {"val/loss": "min"})["val_loss"]
    assert (entry["best_step"], entry["final_step"]) == (5, 11)


def test_odd_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="less"):
        metrics.statistics([], {"val/loss": "less"})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="a_b"):
        metrics.statistics([{"step": 1, "a/b": 1.0, "a_b": 1.0}], {})


@given(st.lists(st.none() | st.floats(), max_size=20), st.sampled_from(["min", "max"]))
def test_statistics_of_anything_are_json(values: list[float | None], direction: Any) -> None:
    rows = [{"step": step, "x": value} for step, value in enumerate(values)]
    result = metrics.statistics(rows, {"x": direction})
    json.dumps(result, allow_nan=False)
    finite = [
        (step, value) for step, value in enumerate(values) if value is not None and math.isfinite(value)
    ]
    if values:
        assert result["x"]["nonfinite"] == len(values) - len(finite)
    if finite:
        sign = 1 if direction == "min" else -1
        step, value = min(finite, key=lambda point: (sign * point[1], point[0]))
        assert (result["x"]["best_step"], result["x"]["best"]) == (step, value)


def test_a_read_only_directory_is_an_os_error_and_keeps_the_rows(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(run, -1, 5).close()
    before = run.metrics.read_bytes()

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", read_only)  # a mode would not stop root, as whom CI runs
    with pytest.raises(OSError, match="Read-only file system"):
        MetricsLog(run, resume_step=2, hparams=HPARAMS)
    monkeypatch.undo()
    assert run.metrics.read_bytes() == before
    train(run, 2, 5).close()
    assert run.metrics.read_bytes() == before
