"""The loop on a toy task: what a run leaves, cohorts, divergence, accumulation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxablate import config, data, disk, runstore, sharding
from jaxablate.program import Program
from jaxablate.train import train
from jaxablate.trees import digest
from tests.toy import ToyTask
from tests.toy_training import cohort_of, metrics, run_dir, with_rates


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


# ------------------------------------------------------------------------------------- what is left


def test_a_run_leaves_what_the_design_promises(tmp_path: Path) -> None:
    (summary,) = train(cohort_of(tmp_path))
    where = run_dir(tmp_path, summary)
    left = {path.name.split(".tfevents")[0] for path in where.iterdir()}
    assert left >= {
        "config.json", "provenance.json", "attempts.jsonl", "metrics.jsonl", "perf.jsonl", "summary.json",
        "loss_curves.png", "lr_schedule.png", "metrics.csv", "metrics.json", "checkpoints", "events.out",
    }  # fmt: skip
    assert "claim.json" not in left
    best = summary["statistics"]["val_loss"]
    losses = {row["step"]: row["val/loss"] for row in metrics(tmp_path, summary) if "val/loss" in row}
    assert sorted(losses) == [0, 10, 20, 30, 40]
    assert best["best"] == min(losses.values()) == losses[best["best_step"]]
    assert best["best"] < 0.7 * losses[0]
    arm = json.loads((where.parent / "summary.json").read_text())
    assert arm["statistics"]["val_loss"]["best"] == best["best"]
    assert summary["statistics"]["total_steps"] == arm["statistics"]["total_steps"] == 40
    assert (
        summary["statistics"]["total_wallclock_hours"]
        == summary["statistics"]["total_wallclock_time"] / 3600
        > 0
    )
    assert summary["metrics_count"] == len(metrics(tmp_path, summary))
    states = [row["state"] for row in runstore.RunDir(where).history()]
    assert states == ["running", "done"]
    keys = {key for row in disk.read_jsonl(where / "perf.jsonl")[0] for key in row}
    assert keys >= {
        "perf/steps_per_sec",
        "perf/examples_per_sec",
        "perf/step_ms",
        "perf/compile_sec",
        "perf/peak_bytes",
    }
    kept = sorted(p.name for p in (where / "checkpoints").glob("*.json"))
    assert kept == [f"{s:09d}.json" for s in sorted({30, 35, 40, best["best_step"]})]


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(cohort_of(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json*")}
    assert train(cohort_of(tmp_path)) == first
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json*")} == before
    two = train(cohort_of(tmp_path, seeds="0,1"))  # only the new one
    assert two[0] == first[0]
    assert two[1]["cohort_size"] == 1


def test_in_a_frozen_study_what_is_about_several_runs_is_left_to_the_launcher(tmp_path: Path) -> None:
    train(cohort_of(tmp_path / "plain"))
    assert list((tmp_path / "plain/toy").glob("*.hparams_config"))
    assert (tmp_path / "plain/toy/base/summary.json").exists()
    (tmp_path / "frozen/toy").mkdir(parents=True)
    (tmp_path / "frozen/toy/study.json").touch()
    train(cohort_of(tmp_path / "frozen"))
    assert not list((tmp_path / "frozen/toy").glob("*.hparams_config"))
    assert not (tmp_path / "frozen/toy/base/summary.json").exists()


# ------------------------------------------------------------------------------------------ cohorts


def test_each_member_gets_what_it_gets_alone(tmp_path: Path) -> None:
    together = train(cohort_of(tmp_path / "together", seeds="0,1,2,3", model__noise=0.1))
    for seed, summary in enumerate(together):
        (alone,) = train(cohort_of(tmp_path / "alone", seeds=seed, model__noise=0.1))
        assert alone["run_id"] == summary["run_id"]
        a, b = metrics(tmp_path / "together", summary), metrics(tmp_path / "alone", alone)
        assert [row["step"] for row in a] == [row["step"] for row in b]
        for row, other in zip(a, b, strict=True):
            # The declared tolerance: batched and single matrix products may round apart.
            np.testing.assert_allclose(list(row.values()), list(other.values()), rtol=2e-5, atol=1e-6)
    assert len({s["params_digest"] for s in together}) == 4


def test_a_member_that_diverges_leaves_the_others_bit_unchanged(tmp_path: Path) -> None:
    calm = train(with_rates(cohort_of(tmp_path / "calm"), 0.01, 0.02, 0.03))
    wild = train(with_rates(cohort_of(tmp_path / "wild"), 0.01, 1e30, 0.03))
    assert [s["state"] for s in wild] == ["done", "diverged", "done"]
    for m in (0, 2):
        assert wild[m]["params_digest"] == calm[m]["params_digest"]
        assert metrics(tmp_path / "wild", wild[m]) == metrics(tmp_path / "calm", calm[m])
    at, last = wild[1]["diverged"]["step"], wild[1]["diverged"]["last_loss"]
    rows = {row["step"]: row for row in metrics(tmp_path / "wild", wild[1]) if "train/loss" in row}
    assert rows[at]["train/loss"] is None
    assert rows[at - 1]["train/loss"] == pytest.approx(last)
    assert max(rows) == at
    assert f"at step {at}" in runstore.RunDir(run_dir(tmp_path / "wild", wild[1])).history()[-1]["reason"]


def test_a_run_that_diverges_alone_ends_early_and_is_not_an_error(tmp_path: Path) -> None:
    (summary,) = train(with_rates(cohort_of(tmp_path), 1e30))
    assert summary["state"] == "diverged"
    assert summary["diverged"]["step"] < 10


def test_an_arm_averages_runs_of_one_config_alone(tmp_path: Path) -> None:
    (other,) = train(cohort_of(tmp_path, training__steps=10))
    runs = train(cohort_of(tmp_path, seeds="0,1"))
    arm = json.loads((tmp_path / "toy/base/summary.json").read_text())
    finals = [run["statistics"]["val_loss"]["final"] for run in runs]
    assert arm["statistics"]["val_loss"]["final"] == pytest.approx(np.mean(finals))
    assert arm["statistics"]["val_loss"]["final_sd"] == pytest.approx(np.std(finals, ddof=1))
    assert (arm["seeds"], arm["done"], arm["left_out"]) == ([0, 1], 2, [other["run_id"]])


def test_a_divergence_between_two_logged_steps_is_recorded(tmp_path: Path) -> None:
    cohort = with_rates(cohort_of(tmp_path, host__log_every=10, host__checkpoint_every=5), 1e30)
    (summary,) = train(cohort)
    nulls = [row for row in metrics(tmp_path, summary) if "train/loss" in row and row["train/loss"] is None]
    assert [row["step"] for row in nulls] == [summary["diverged"]["step"]]


# ------------------------------------------------------------------------------------- accumulation


def gradients(accumulation: int, noise: float = 0.0) -> tuple[Any, ...]:
    cohort = config.load("tests/configs/toy.py", [("training.accumulation", str(accumulation))])
    cohort = config.Cohort(
        (dataclasses.replace(cohort.base, model=dataclasses.replace(cohort.base.model, noise=noise)),)
    )
    task = ToyTask(cohort.base, "cpu")
    mesh = sharding.make_mesh(config.MeshConfig(1, 1), 1, 8)
    current = Program(task, cohort, task.stages()[0], mesh)
    state = current.init()
    step = current.compile_step()
    source = task.open(Path())
    batches = data.CohortBatches(source.train, [0], 8, 3)
    for n in range(3):
        state, metric = step(state, current.member, current.put_batch(batches[n]), np.int32(n + 1))
    return jax.device_get((current.take(state, 0), metric))


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_gives_the_update_of_the_whole_batch(accumulation: int, noise: float) -> None:
    """The toy loss couples all examples of the batch, so averaging the losses of micro-batches would fail."""
    (whole, metric), (split, split_metric) = gradients(1, noise), gradients(accumulation, noise)
    for name, value in whole.items():
        np.testing.assert_allclose(split[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(split_metric["train/loss"], metric["train/loss"], rtol=1e-5)
    assert np.abs(whole["collections/average/input"]).max() > 0.1  # the sums really arrive


def test_averaging_micro_batch_losses_would_be_caught() -> None:
    cohort = config.load("tests/configs/toy.py")
    task = ToyTask(cohort.base, "cpu")
    variables = task.init(jax.random.key(0))
    rows = [task.open(Path()).train[i] for i in range(8)]
    batch = {k: np.stack([row[k] for row in rows]) for k in ("x", "y")}

    def loss(part: dict[str, np.ndarray]) -> float:
        return float(
            task.loss(
                variables,
                task.encode(variables, part, jax.random.split(jax.random.key(0), len(part["x"])))[0],
            )[0]
        )

    halves = [loss({k: v[i : i + 4] for k, v in batch.items()}) for i in (0, 4)]
    assert abs(np.mean(halves) - loss(batch)) > 1e-4


# -------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_stage_begins_with_what_the_one_before_was_evaluated_with(decay: float) -> None:
    """With the average of its parameters where it keeps one: what was reported is what is built upon."""
    options = [("model.stages", "two"), ("optim.ema_decay", str(decay))]
    cohort = config.load("tests/configs/toy.py", options)
    task = ToyTask(cohort.base, "cpu")
    mesh = sharding.make_mesh(config.MeshConfig(1, 1), 1, 8)
    first, second = task.stages()
    before = Program(task, cohort, first, mesh)
    after = Program(task, cohort, second, mesh, first.steps)
    batch = before.put_batch(data.CohortBatches(task.open(Path()).train, [0], 8, 3)[0])
    state, _ = before.compile_step()(before.init(), before.member, batch, np.int32(1))
    (ended,) = [before.take(state, 0)]
    (begun,) = [after.take(after.carry(state), 0)]
    evaluated = "ema" if decay else "params"
    names = [name.removeprefix("params/") for name in begun if name.startswith("params/")]
    assert names
    for name in names:
        np.testing.assert_array_equal(begun[f"params/{name}"], ended[f"{evaluated}/{name}"])
    if decay:
        assert any((begun[f"params/{name}"] != ended[f"params/{name}"]).any() for name in names)


# ------------------------------------------------------------------------------------------- digests


def test_digest_tells_one_bit(tmp_path: Path) -> None:
    a = {"x": np.arange(4.0), "y": np.zeros(2)}
    b = {"y": np.zeros(2), "x": np.arange(4.0)}
    assert digest(a) == digest(b)
    b["x"][2] = np.nextafter(b["x"][2], 3)
    assert digest(a) != digest(b)
