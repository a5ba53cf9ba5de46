"""What a task keeps of its last evaluation is on disk once the run is done, and not before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxablate.train import train
from tests.toy import ToyTask
from tests.toy_training import cohort_of, killed_at, run_dir


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def keep(self, source, outputs):
    """The errors, beside the right answers, which only the source knows."""
    return {"error": np.asarray(outputs[0]["error"]), "y": source.evaluation[0]["y"]}


def kept(where: Path) -> dict[str, np.ndarray]:
    with np.load(where, allow_pickle=False) as file:
        return dict(file)


def test_the_predictions_are_those_of_the_last_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(ToyTask, "keep", keep)
    summaries = train(cohort_of(tmp_path, data__nan_at_seed=1, data__nan_after=5, seeds="0,1"))
    done, diverged = (run_dir(tmp_path, summary) for summary in summaries)
    found = kept(done / "predictions.npz")
    loss = summaries[0]["statistics"]["val_loss"]
    assert np.mean(np.square(found["error"])) == pytest.approx(loss["final"], rel=1e-6)
    assert loss["final"] != pytest.approx(loss["initial"], rel=0.1)
    assert found["y"].shape == found["error"].shape
    assert not (diverged / "predictions.npz").exists()


def test_a_run_that_was_killed_has_none_until_it_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(ToyTask, "keep", keep)
    cohort = cohort_of(tmp_path)
    killed_at(cohort, 25, monkeypatch)
    assert not list(tmp_path.rglob("predictions.npz"))
    (summary,) = train(cohort)
    assert (run_dir(tmp_path, summary) / "predictions.npz").exists()


def test_a_task_that_keeps_nothing_leaves_nothing(tmp_path):
    (summary,) = train(cohort_of(tmp_path))
    assert not (run_dir(tmp_path, summary) / "predictions.npz").exists()
