"""Batches cut to the smallest size that holds them: the same training, each step compiled once and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxablate import disk
from jaxablate.clock import Clock
from jaxablate.errors import UserError
from jaxablate.train import train
from tests.toy_tasks import BucketTask, UncutTask, WrongShapeTask, cohort_with
from tests.toy_training import killed_at, metrics, run_dir

ORDER = {"training__order": "file"}  # four batches of short examples, four of long ones, and again
COUNTS = {"largest": 20, "x[4]": 20}


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def test_cut_batches_train_as_whole_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    compiling = Clock.compile
    monkeypatch.setattr(
        Clock, "compile", lambda *args: (compiled.append(args[2]["x"].shape), compiling(*args))[1]
    )
    cut = train(cohort_with(BucketTask, tmp_path / "cut", seeds="0,1", **ORDER))
    assert compiled == [(2, 8, 4), (2, 8, 8)]
    whole = train(cohort_with(UncutTask, tmp_path / "whole", seeds="0,1", **ORDER))
    assert compiled[2:] == [(2, 8, 8)]
    for one, other in zip(cut, whole, strict=True):
        assert one["buckets"] == COUNTS and "buckets" not in other
        a, b = metrics(tmp_path / "cut", one), metrics(tmp_path / "whole", other)
        for row, there in zip(a, b, strict=True):
            np.testing.assert_allclose(list(row.values()), list(there.values()), rtol=2e-4, atol=1e-5)
        perf = disk.read_jsonl(run_dir(tmp_path / "cut", one) / "perf.jsonl")[0]
        told = {row["step"] for row in perf if "perf/tokens_per_sec" in row}
        timed = {row["step"] for row in perf if "perf/steps_per_sec" in row}
        assert told < timed and not told & {2, 3, 4, 9, 10}  # of short ones nobody has counted the tokens


def test_counts_go_on_in_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = cohort_with(BucketTask, tmp_path, host__log_every=4, **ORDER)
    killed_at(cohort, 24, monkeypatch)  # the checkpoint before it is of step 20
    (summary,) = train(cohort)
    assert summary["buckets"] == COUNTS


def test_data_of_another_shape_than_the_task_says_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"'x' is float32\[8\] an example, and the task says float32\[9\]"
    ) as raised:
        train(cohort_with(WrongShapeTask, tmp_path))
    assert "\n" not in str(raised.value)
