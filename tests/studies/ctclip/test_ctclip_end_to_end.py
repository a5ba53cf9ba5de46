"""CT-CLIP through the command line, as a user runs it: phantoms, real volumes, TensorBoard."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from jaxablate.main import main
from jaxablate.studies.ctclip.data.findings import FINDINGS

SMALL = [
    "--config.training.steps=6", "--config.training.eval_every=3", "--config.host.checkpoint_every=3",
    "--config.optim.warmup_steps=2", "--config.host.log_every=1",
]  # fmt: skip

# One arm has all that the factors change; the others train with JAXABLATE_CASES=300, as in `make demo`.
LEARNERS = [("optimized_full", 0.80)]
if int(os.environ.get("JAXABLATE_CASES", "0")) >= 300:
    LEARNERS += [("flash_rms", 0.85), ("baseline", 0.80)]

# For a few steps that only show that all parts meet: compiled in half the time.
QUICKLY = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def run(args: list[str], repo: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxablate.main", *args]
    return subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True, timeout=900)


def summaries(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(workdir.glob("ctclip/*/*/summary.json"))]


@pytest.mark.slow
@pytest.mark.parametrize("arm,least", LEARNERS)
def test_an_arm_learns_to_detect_findings(
    arm: str, least: float, tmp_path: Path, repo: Path, child_env: dict[str, str]
) -> None:
    result = run([f"--config=configs/{arm}.py", f"--config.host.workdir={tmp_path}"], repo, child_env)
    assert result.returncode == 0, result.stderr
    (summary,) = summaries(tmp_path)
    auroc = summary["statistics"]["val_macro_auroc"]
    assert 0.4 < auroc["initial"] < 0.6  # before training it cannot know
    assert auroc["final"] >= least
    assert summary["statistics"]["val_one_class_findings"]["final"] == 1
    assert "kernel of model.image.attention" in result.stderr
    kernel = summary["kernels"]["model.image.attention.impl"]
    assert kernel == ("reference" if arm == "baseline" else "blockwise")
    assert "\x1b[" not in result.stderr  # no bar, no colours outside a terminal


@pytest.mark.parametrize(
    "name,words",
    [
        ("pallas", "attention.impl: attention implementation 'pallas' cannot run this: platform is cpu"),
        ("blockwize", "attention.impl='blockwize': unknown attention implementation"),
        ("auto", "attention.impl='auto': "),
    ],
)
def test_a_kernel_that_cannot_run_here_is_one_line_and_nothing_falls_back(
    name: str, words: str, tmp_path: Path, repo: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(repo)
    overrides = [f"--config.host.workdir={tmp_path}", f"--config.model.image.attention.impl={name}"]
    overrides += ["--config.data.phantoms_train=16", "--config.data.phantoms_val=4"]
    assert main(["--config=configs/baseline.py", *overrides]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line
    assert "reference" in line  # what would do
    assert not summaries(tmp_path)


def write_study(folder: Path, volumes: list[Path], seed: int) -> None:
    """A split as a hospital would hand it over: volumes and three tables, written with nibabel and csv alone."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    rows: dict[str, list[list[Any]]] = {
        "metadata.csv": [["VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"]],
        "reports.csv": [["VolumeName", "Findings_EN", "Impressions_EN"]],
        "labels.csv": [["VolumeName", *FINDINGS]],
    }
    for number, source in enumerate(volumes):
        name = f"{folder.name}_{number}.nii.gz"
        voxels = np.asarray(nib.load(source).dataobj).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([5.0, 5.0, 12.0, 1.0])), folder / name)
        labels = (rng.random(18) < 0.4).astype(int)
        rows["metadata.csv"].append([name, 1, -1024, "[5.0, 5.0]", 12.0])
        seen = ". ".join(f"{f} is seen" for f, present in zip(FINDINGS, labels, strict=True) if present)
        rows["reports.csv"].append([name, seen or "Not given.", ""])
        rows["labels.csv"].append([name, *labels])
    for file, content in rows.items():
        with (folder / file).open("w", newline="") as stream:
            csv.writer(stream).writerows(content)


def source_volumes(repo: Path, tmp_path: Path) -> list[Path]:
    """Three-dimensional NIfTI files: the shared samples if they are there, else made here."""
    shared = repo.parent / "shared" / "data" / "nifti"
    found = [shared / "anatomical.nii", shared / "standard.nii.gz"]
    if all(path.exists() for path in found):
        return found
    made = []
    for number, shape in enumerate([(33, 41, 25), (4, 5, 7)]):
        path = tmp_path / f"made_{number}.nii.gz"
        voxels = np.random.default_rng(number).integers(0, 2000, shape).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
        made.append(path)
    return made


@pytest.fixture
def hospital(tmp_path: Path, repo: Path) -> Path:
    volumes = source_volumes(repo, tmp_path)
    write_study(tmp_path / "train", volumes * 4, 0)
    write_study(tmp_path / "val", volumes, 1)
    return tmp_path


def real_args(folder: Path) -> list[str]:
    return [
        "--config=configs/flash_rms.py", *SMALL, "--config.data.source=nifti", f"--config.data.train={folder}/train",
        f"--config.data.val={folder}/val", "--config.training.batch_size=4",
        f"--config.host.workdir={folder}/runs", f"--config.host.cache={folder}/cache",
    ]  # fmt: skip


@pytest.mark.slow
def test_trains_on_a_folder_of_real_volumes(hospital: Path, repo: Path, child_env: dict[str, str]) -> None:
    result = run([*real_args(hospital), "--config.host.workers=1"], repo, {**child_env, **QUICKLY})
    assert result.returncode == 0, result.stderr
    (summary,) = summaries(hospital / "runs")
    assert summary["steps"] == 6
    assert np.isfinite(summary["statistics"]["train_loss"]["final"])
    assert summary["statistics"]["train_loss"]["final"] != summary["statistics"]["train_loss"]["initial"]


def test_a_damaged_volume_is_named_before_training_starts(
    hospital: Path, repo: Path, child_env: dict[str, str]
) -> None:
    bad = hospital / "train" / "train_2.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-40])
    result = run(real_args(hospital), repo, child_env)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "train_2.nii.gz" in line
    assert "Traceback" not in result.stderr
    assert not (hospital / "runs").exists()
