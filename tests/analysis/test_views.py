"""The views of a finished run: each by itself, and made again where a kill or a full disk left them out."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from jaxablate import disk
from jaxablate.analysis import plots, results, text, views
from jaxablate.manifest import Manifest
from jaxablate.study import factorial, switch
from tests.analysis.made import RESPONSES, made_study
from tests.analysis.made_dirs import made_study_dir

VIEWS = {"metrics.csv", "metrics.json", "lr_schedule.png", "loss_curves.png"}
FACTORS = (switch("rms", "model", {"model.norm": "rmsnorm"}),)


@pytest.fixture
def study(tmp_path: Path) -> Manifest:
    """Two arms with one seed: one run is done, the other waits."""
    made = made_study(
        1, factors=FACTORS, arms=factorial(FACTORS), responses=RESPONSES[:2], hypotheses=(), expectations=()
    )
    return made_study_dir(tmp_path, made, rows=6, missing={"rms": (0,)})


def there(study: Manifest, arm: str) -> set[str]:
    return {path.name for path in (study.path / arm).glob("*/*")} & VIEWS


def test_a_report_makes_what_finished_runs_lack_and_nothing_else(study: Manifest) -> None:
    assert there(study, "baseline") == set()
    assert views.complete(results.load(study)) == []
    assert there(study, "baseline") == VIEWS and there(study, "rms") == set()
    (run,) = (study.path / "baseline").iterdir()
    (run / "metrics.csv").write_text("as it was")
    (run / "loss_curves.png").unlink()
    assert views.complete(results.load(study)) == []
    assert (run / "metrics.csv").read_text() == "as it was"  # only what is missing
    assert (run / "loss_curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("broken", "name"), [((plots, "lr_schedule"), "lr_schedule.png"), ((disk, "write_json"), "metrics.json")]
)
def test_one_that_fails_is_named_and_costs_no_other(
    study: Manifest, monkeypatch: pytest.MonkeyPatch, broken: tuple[Any, str], name: str
) -> None:
    def full(*args: Any, **kw: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    found = results.load(study)
    with monkeypatch.context() as patch:
        patch.setattr(*broken, full)
        (note,) = views.complete(found)
    assert f"{name}: cannot be written: [Errno 28] No space left" in note
    assert there(study, "baseline") == VIEWS - {name}
    assert views.complete(found) == [] and there(study, "baseline") == VIEWS


def test_a_summary_says_what_to_do_and_what_knowing_nothing_scores(study: Manifest) -> None:
    perf = {"steps_per_sec": None}
    run = {
        "experiment_name": "made/baseline", "run_id": "r", "state": "done", "response": "val/loss", "kernels": {},
        "perf": perf, "cohort_size": 1, "beside": {"val/loss": "val/unigram_loss"},
        "statistics": {
            "val_loss": {"initial": 3.0, "final": 2.0, "best": 1.5, "best_step": 5},
            "val_unigram_loss": {"final": 3.25},
        },
    }  # fmt: skip
    assert "(val/unigram_loss is 3.250)" in text.describe([run], str(study.path))
    assert "lower learning rate" not in text.describe([run], str(study.path))
    bare = run | {"statistics": {"val_loss": run["statistics"]["val_loss"]}}
    assert "unigram" not in text.describe([bare], str(study.path))
    lost = run | {"state": "diverged", "diverged": {"step": 7, "last_loss": 9.0}}
    said = text.describe([lost], str(study.path))
    assert "diverged at step 7, loss before it 9.0: try a lower learning rate" in said
