"""Burgers as a user meets it: the declaration, files of other programs, its stages, what a mistake says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from jaxablate import config, study
from jaxablate.check import check_study
from jaxablate.config import import_task
from jaxablate.main import main

SMALL = [
    "data.cells=32", "model.encoder.tokens=8", "data.trajectories=8", "data.held_out=4", "data.frames=40",
    "data.rollout=2", "data.eval_windows=16", "training.eval_batch_size=8", "training.batch_size=8",
    "model.core.depth=1", "training.eval_every=50", "host.checkpoint_every=50",
]  # fmt: skip
SHORT = [
    "training.steps=6", "model.autoencoder.steps=6", "model.corrector.steps=4", "model.distill.steps=2",
    "optim.warmup_steps=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def train(tmp_path: Path, *options: str, arm: str = "32tokens_pure") -> dict[str, Any]:
    """The summary of one short run."""
    args = [f"--config.{option}" for option in (*SMALL, *SHORT, *options, f"host.workdir={tmp_path}")]
    assert main([f"--config=configs/burgers.py:{arm}", *args]) == 0
    (found,) = tmp_path.glob("burgers/*/*/summary.json")
    return json.loads(found.read_text())


def fields(rows: int, frames: int, cells: int, seed: int) -> np.ndarray:
    """Waves that travel, as another program might have made them."""
    rng = np.random.default_rng(seed)
    x, t = np.arange(cells) / cells, 0.05 * np.arange(frames)
    phase = rng.uniform(0, 1, (rows, 1, 1))
    return np.sin(2 * np.pi * (x - 0.3 * t[:, None] + phase)).astype("f4")


def test_the_arms_differ_in_the_declared_factors_alone() -> None:
    for scale in ("tiny", "small", "paper"):
        declared = study.load(f"configs/burgers.py:scale={scale}")
        base = config.load(f"configs/burgers.py:scale={scale}").base
        assert len(declared.arms) == 8
        for arm in declared.arms:
            changed = config.diff(base, config.load(f"configs/burgers.py:{arm.name},scale={scale}").base)
            assert set(changed) - {"arm"} == set(declared.changes(declared.set_levels(arm.name)))
    faithful = study.load("configs/burgers.py:scale=paper,arms=faithful")
    assert not faithful.hypotheses  # arms that differ in width, too, answer no question about the shape
    assert "model.core.hidden" in faithful.changes(faithful.set_levels("128tokens_pure"))


def test_hypotheses_are_declared_in_both_forms_on_the_ratio() -> None:
    claims = {h.name: h for h in study.load("configs/burgers.py").hypotheses}
    assert {name: h.claim for name, h in claims.items()} == {
        "H1": "equivalence",
        "H1_one_sided": "non_inferiority",
        "H2": "superiority",
        "H3": "equivalence",
        "H3_one_sided": "non_inferiority",
    }
    assert all(h.scale == "ratio" for h in claims.values())
    assert claims["H2"].margin == 0.1


@pytest.mark.slow
def test_every_arm_ablates_what_it_says() -> None:
    few = [("data.trajectories", "16"), ("data.held_out", "8"), ("data.eval_windows", "64")]
    report = check_study(study.load("configs/burgers.py", few), spec="configs/burgers.py")
    assert not report.failed, report.table(120, verbose=True)
    assert sum(row.function == "changed" for row in report.rows) == 7


@pytest.mark.slow
def test_four_stages_leave_the_encoder_frozen_and_say_what_each_part_gives(tmp_path: Path) -> None:
    summary = train(tmp_path)
    statistics = summary["statistics"]
    for name in ("operator", "corrected", "conditioned", "reconstruction", "persistence"):
        assert statistics[f"val_nrmse_{name}"]["final"] > 0
    assert summary["steps"] == 18
    (where,) = tmp_path.glob("burgers/*/*/predictions.npz")
    with np.load(where) as kept:
        assert kept["truth"].shape == kept["prediction"].shape
    stages = import_task("jaxablate.studies.burgers.task:BurgersTask")(
        config.load("configs/burgers.py").base, "cpu"
    ).stages()
    assert [stage.name for stage in stages] == ["autoencoder", "operator", "corrector", "distill"]
    assert not any(stage.trains("encoder/project/kernel") for stage in stages[1:])
    assert [stage.trains("operator/time_in/kernel") for stage in stages] == [False, True, False, False]


@pytest.mark.slow
def test_a_random_encoder_has_latent_scores_alone(tmp_path: Path) -> None:
    options = [
        "model.encoder.kind=faithful_random",
        "model.encoder.cells=pooled",
        "model.autoencoder.steps=0",
    ]
    statistics = train(tmp_path, *options, "model.corrector.steps=0", "model.distill.steps=0")["statistics"]
    assert statistics["val_latent_nrmse"]["final"] > 0
    assert statistics["val_latent_nrmse_persistence"]["final"] > 0
    assert "val_nrmse_operator" not in statistics


@pytest.mark.slow
def test_it_trains_on_a_file_in_the_benchmarks_layout(tmp_path: Path) -> None:
    path = tmp_path / "1D_Burgers_Sols_Nu0.01.hdf5"
    with h5py.File(path, "w") as file:
        file["tensor"] = fields(20, 31, 64, 0)
        file["x-coordinate"] = ((np.arange(64) + 0.5) / 64).astype("f4")
        file["t-coordinate"] = (0.05 * np.arange(32)).astype("f4")
        file.attrs["Nu"] = 0.01
    summary = train(
        tmp_path / "runs",
        "data.source=pdebench",
        f"data.train={path}",
        "data.space_stride=2",
        "data.time_stride=2",
    )
    assert summary["statistics"]["val_nrmse_nu_0p01"]["final"] > 0


@pytest.mark.slow
def test_it_trains_on_the_small_public_layout(tmp_path: Path) -> None:
    for name, rows, seed in (("train", 16, 1), ("val", 8, 2)):
        made = fields(rows, 17, 32, seed)
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["x"], file["y"], file["visc"] = made[:, 0], made, 0.01
    summary = train(
        tmp_path / "runs", "data.source=operator", f"data.train={tmp_path}/train.h5", f"data.val={tmp_path}/val.h5",
        "data.time_stride=1", "data.viscosities=0.01,",
    )  # fmt: skip
    assert summary["statistics"]["val_nrmse_persistence"]["final"] > 0
