"""Upstream's encoder, which is never trained: what the report says of an operator on its tokens."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

from jaxablate import config, disk, study
from jaxablate.analysis import results
from jaxablate.analysis.sentences import number
from jaxablate.analysis.stats.analyse import analyse
from jaxablate.manifest import Manifest
from jaxablate.studies.burgers import report as pages
from jaxablate.train import train

# As small as its tokens allow: operator and corrector for a few updates, and upstream's conditioning.
SMALL = {
    "data.cells": "32", "data.trajectories": "8", "data.held_out": "4", "data.frames": "40", "data.rollout": "1",
    "data.eval_windows": "8", "training.eval_batch_size": "8", "training.batch_size": "8", "training.steps": "8",
    "model.encoder.dim": "4", "model.decoder.hidden": "8", "model.decoder.heads": "2", "model.decoder.ffn": "8",
    "model.core.hidden": "8", "model.core.heads": "2", "model.core.depth": "1", "model.corrector.steps": "4",
    "model.distill.steps": "0", "model.conditioning.candidates": "2", "optim.warmup_steps": "1",
    "host.mesh.member": "1", "host.mesh.data": "1",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


@pytest.mark.slow
def test_its_report_shows_an_operator_beside_doing_nothing_in_the_same_space(tmp_path: Path) -> None:
    overrides = SMALL | {"host.workdir": str(tmp_path)}
    declared = study.load("configs/burgers.py:encoder=faithful_random", overrides.items())
    arm = declared.baseline
    arms = tuple(one for one in declared.arms if one.name == arm)
    declared = dataclasses.replace(declared, arms=arms, seeds=(0,))
    chosen = config.resolve(declared.config(arm))
    manifest = Manifest.freeze(declared, {arm: chosen.base})
    (summary,) = train(config.Cohort(chosen.runs[:1]))
    nothing = results.knowing_nothing(summary)
    assert nothing["val/nrmse"].metric == "val/nrmse_persistence"
    assert "val/latent_rmse" in nothing
    assert not {"val/rmse", "val/crmse", "val/rollout_nrmse"} & set(nothing)  # of fields nothing is known
    (where,) = (manifest.run_dir(run) for run in manifest.runs)
    rows = disk.read_jsonl(where.metrics)[0]
    first, last = (next(row for row in some if "val/latent_nrmse" in row) for some in (rows, rows[::-1]))

    # What is added to the tokens starts at nothing, and that is the level that persistence names.
    still = last["val/latent_nrmse_persistence"]
    assert first["val/latent_nrmse"] == pytest.approx(still, rel=1e-6)
    assert last["val/latent_nrmse"] != pytest.approx(still, rel=1e-3)
    assert (last["val/nrmse"], last["val/nrmse_persistence"]) == (last["val/latent_nrmse_conditioned"], still)
    assert "val/nrmse_operator" not in last  # nothing brings the tokens back to fields
    assert not any("reconstruction" in name for name in last)

    out = tmp_path / "report"
    (out / "figures").mkdir(parents=True)
    found = results.load(manifest)
    pages.write(found, analyse(found), out)
    (row,) = csv.DictReader((out / "architecture_comparison.csv").read_text().splitlines())
    assert float(row["nrmse_baseline"]) == last["val/latent_nrmse"]
    assert float(row["nrmse_ttc"]) == last["val/latent_nrmse_conditioned"]
    laws = {"conservation_gap": "conservation_gap", "bc_violation": "boundary_violation"}
    laws["negativity_penalty"] = "negativity"
    for column, name in laws.items():
        assert float(row[column]) == last[f"val/latent_{name}"] > 0
    text = (out / "ablation_report.md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {arm}"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert "of tokens" in cells[0]
    assert number(last["val/latent_nrmse"]) in cells
    assert number(still) in cells
    level = "level of doing nothing" in text
    assert level == (last["val/latent_nrmse"] >= still)
