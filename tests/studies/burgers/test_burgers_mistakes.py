"""What a mistake says: one line with field or file, value and fix, exit code 2, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from jaxablate import cli
from jaxablate.main import main
from jaxablate.study import Response, product, switch
from tests.analysis.made import made_study
from tests.analysis.made_dirs import made_study_dir

ROWS, FRAMES, CELLS = 20, 13, 16
FILES = {
    "data.source": "pdebench", "data.cells": CELLS, "data.time_stride": 2, "data.rollout": 2, "data.eval_windows": 4,
    "model.encoder.tokens": 4, "training.batch_size": 4, "training.eval_batch_size": 4,
    "host.mesh.member": 1, "host.mesh.data": 1,
}  # fmt: skip
SEPARATED = {"model.core.attention": "channel_separated"}
RANDOM = {"model.encoder.kind": "faithful_random", "model.autoencoder.steps": 0}


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def refused(capsys: pytest.CaptureFixture[str], where: Path, fields: dict[str, object]) -> str:
    """What `main` says of a config with these fields, after it was found to be one line and the workdir untouched."""
    workdir = where / "runs"
    given = fields | {"host.workdir": workdir, "host.cache": where / "cache"}
    argv = [f"--config.{name}={value}" for name, value in given.items()]
    assert main(["--config=configs/burgers.py", *argv]) == 2
    assert not workdir.exists()
    *_, last = said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("error: ")] == [last]
    return last.removeprefix("error: ")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (SEPARATED | {"model.core.group": 12}, "config.model.core.group=12: "),
        (SEPARATED | {"model.core.group": 8, "model.core.heads": 3}, "config.model.core.heads=3: "),
        ({"model.encoder.tokens": 33}, "config.model.encoder.tokens=33: "),
        (
            {"model.loss.rollout": 0.1, "model.loss.rollout_steps": 1},
            "config.model.loss.rollout=0.1: has no effect of its own",
        ),
        (
            {"model.conditioning.weights": "(0.0, 1.0, 1.0)"},
            "config.model.conditioning.weights=(0.0, 1.0, 1.0): ",
        ),
        ({"model.corrector.steps": 0, "model.conditioning.candidates": 0}, "has no corrector to distil"),
        ({"model.autoencoder.steps": 0}, "config.model.autoencoder.steps=0: must be 1 or more"),
        (RANDOM | {"model.autoencoder.steps": 5}, "config.model.autoencoder.steps=5: must be 0"),
        ({"model.core.attention": "chanel_separated"}, "'channel_separated'"),
        ({"data.source": "pdbench"}, "'pdebench'"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(capsys, tmp_path: Path, fields, says: str) -> None:
    assert says in refused(capsys, tmp_path, fields)


def a_file(path: Path, **changes: object) -> Path:
    """A file of the benchmark's layout with some datasets changed, or left out (None)."""
    x, t = np.arange(CELLS) / CELLS, 0.05 * np.arange(FRAMES)
    phase = np.random.default_rng(0).uniform(0, 1, (ROWS, 1, 1))
    tensor = np.sin(2 * np.pi * (x - t[:, None] + phase)).astype("f4")
    t = (0.05 * np.arange(FRAMES + 1)).astype("f4")
    found = {"tensor": tensor, "x-coordinate": x.astype("f4"), "t-coordinate": t} | changes
    with h5py.File(path, "w") as file:
        for name, values in found.items():
            if callable(values):
                values = values(tensor)
            if values is not None:
                file[name] = values
    return path


def with_nan(tensor: np.ndarray) -> np.ndarray:
    broken = tensor.copy()
    broken[13, 7, 5] = np.nan
    return broken


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("1D_Burgers_Sols_Nu0.01.hdf5", {"tensor": None, "u": lambda u: u}, "has no dataset `tensor`, only "),
        (
            "1D_Burgers_Sols_Nu0.01.hdf5",
            {"tensor": lambda u: u[..., None]},
            "`tensor` has shape (20, 13, 16, 1)",
        ),
        ("1D_Burgers_Sols_Nu0.01.hdf5", {"tensor": with_nan}, "trajectory 13 is nan in frame 7, cell 5"),
        (
            "fields.hdf5",
            {},
            "does not say its viscosity, and data.viscosities=(0.001, 0.1) is not one number",
        ),
    ],
    ids=["name", "rank", "nan", "viscosity"],
)
def test_a_file_that_cannot_be_trained_on_is_refused(
    capsys, tmp_path: Path, name: str, changes, says: str
) -> None:
    path = a_file(tmp_path / name, **changes)
    found = refused(capsys, tmp_path, FILES | {"data.train": path})
    assert says in found
    assert str(path) in found


def test_a_sound_file_gets_as_far_as_the_evaluation(capsys, tmp_path: Path) -> None:
    """The same file without a fault: what is refused is the next thing that is wrong."""
    path = a_file(tmp_path / "1D_Burgers_Sols_Nu0.01.hdf5")
    said = refused(capsys, tmp_path, FILES | {"data.train": path, "data.eval_windows": 400})
    assert said.startswith("data.eval_windows=400: ")


@pytest.mark.parametrize("state", ["diverged", "missing"])
def test_a_failed_run_is_never_promoted(capsys, tmp_path: Path, state: str) -> None:
    factors = (switch("unet", "model", {"model.core.kind": "pdet_unet"}),)
    declared = made_study(
        3,
        name="burgers",
        factors=factors,
        arms=product(
            *factors, names=lambda levels: "32tokens_unet" if levels["unet"] == "on" else "32tokens_pure"
        ),
        responses=(Response("val/nrmse", "min", scale="log"),),
        hypotheses=(),
        expectations=(),
    )
    manifest = made_study_dir(tmp_path, declared, **{state: {"32tokens_unet": (1,)}})
    out = tmp_path / "production"
    (run,) = (run for run in manifest.runs if (run.arm, run.seed) == ("32tokens_unet", 1))
    argv = [
        "promote",
        str(manifest.run_dir(run).path.parents[1]),
        "--arm=32tokens_unet",
        f"--production-dir={out}",
    ]
    assert cli.main(argv) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert "seeds: 2 of 3 are done (seed 1 is " in said
    assert not out.exists()
