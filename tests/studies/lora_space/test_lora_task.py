"""The task: scores by hand, running statistics as torch's, batch norm of the whole batch, the best restored."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate import config, disk, sharding, study
from jaxablate.bench.speedups import Options, bench_speedups
from jaxablate.config import MeshConfig
from jaxablate.program import Members, Program
from jaxablate.runstore import RunDir
from jaxablate.studies.lora_space import metrics, speed
from jaxablate.studies.lora_space.config import epoch_steps, split_sizes
from jaxablate.studies.lora_space.features import features
from jaxablate.studies.lora_space.speed import spectral_one_by_one
from jaxablate.studies.lora_space.task import LoraSpaceTask
from jaxablate.train import train
from tests.toy_training import killed_at

SMALL = {
    "data.samples": "120",
    "model.hidden": "16",
    "training.batch_size": "32",
    "host.mesh.member": "1",
    "host.mesh.data": "1",
}


def cohort(repo: Path, arm: str = "stats_visual_only", **options: str) -> config.Cohort:
    chosen = SMALL | {key.replace("__", "."): value for key, value in options.items()}
    return config.load(f"{repo}/configs/lora_space.py:{arm}", chosen.items())


# ------------------------------------------------------------------------------------------- scores


def test_macro_scores_are_those_by_hand():
    """Over the labels that truth or prediction has; label 3 is nobody's, label 2 is never given, 4 never true."""
    truth, prediction = np.array([0, 0, 1, 2, 1]), np.array([0, 1, 1, 1, 4])
    found = metrics.macro(truth, prediction, classes=5)
    assert found["precision"] == pytest.approx((1 + 1 / 3 + 0 + 0) / 4)
    assert found["recall"] == pytest.approx((1 / 2 + 1 / 2 + 0 + 0) / 4)
    assert found["f1"] == pytest.approx((2 / 3 + 2 / 5 + 0 + 0) / 4)
    assert metrics.confusion(truth, prediction, 5)[1].tolist() == [0, 1, 0, 0, 1]


def test_each_part_has_its_own_scores_and_its_own_chance():
    label, split = np.array([0, 1, 1, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 2, 2, 2])
    logits = np.log(
        np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8], [0.6, 0.4], [0.1, 0.9]])
    )
    batches = [{"logits": logits[a:b], "label": label[a:b], "split": split[a:b]} for a, b in ((0, 4), (4, 7))]
    found = metrics.evaluate(batches)
    assert [found[f"{part}accuracy"] for part in ("train_", "", "test_")] == pytest.approx([0.5, 0.5, 2 / 3])
    assert found["loss"] == pytest.approx(-(np.log(0.6) + np.log(0.3)) / 2)
    assert [found[f"{part}chance"] for part in ("train_", "", "test_")] == [0.5, 0.5, 1.0]
    nothing = metrics.knowing_nothing(np.array([0, 1, 1]), 2, batches)
    assert metrics.evaluate(nothing)["accuracy"] == 0.5  # it always says 1
    assert metrics.evaluate(nothing)["loss"] == pytest.approx(-(np.log(0.6) + np.log(0.4)) / 2)
    assert "test_accuracy" not in metrics.evaluate(batches[:1])


def test_epochs_and_parts_are_the_documents():
    assert [split_sizes(n) for n in (11, 100, 1000, 10_000, 50_000)] == [
        (7, 1, 3), (70, 9, 21), (700, 99, 201), (7000, 989, 2011), (35_000, 4950, 10_050),
    ]  # fmt: skip
    assert split_sizes(10) == (10, 10, 10)
    assert [epoch_steps(n, 256) for n in (7, 256, 257, 700, 35_000)] == [1, 1, 2, 3, 137]


# ------------------------------------------------------------------------------------------ training


def test_running_statistics_are_torchs(repo):
    task = LoraSpaceTask(cohort(repo).base, "cpu")
    variables = task.init(jax.random.key(0))
    batch = {
        "x": jnp.asarray(
            np.random.default_rng(0).normal(1, 2, (32, task.example()["x"].shape[0])), jnp.float32
        ),
        "label": jnp.zeros(32, jnp.int32),
    }
    features, sums = task.encode(variables, batch, jax.random.split(jax.random.key(1), 32))
    assert features["nll"].shape == (32,)
    collections = {key: value for key, value in variables.items() if key != "params"}
    once = task.advance(collections, sums)
    twice = task.advance(once, sums)
    layer = nn.unbox(variables["params"])["linear_0"]
    hidden = np.asarray(batch["x"]) @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
    mean, unbiased = hidden.mean(0), hidden.var(0, ddof=1)
    got = twice["batch_stats"]["norm_0"]
    np.testing.assert_allclose(got["mean"], 0.19 * mean, rtol=1e-4, atol=1e-5)  # from 0: 1 - 0.9^2
    np.testing.assert_allclose(got["var"], 0.81 + 0.19 * unbiased, rtol=1e-4)  # from 1
    assert not np.allclose(got["var"], 0.81 + 0.19 * hidden.var(0), rtol=1e-3)  # the biased one would show


def stepped(own: config.Cohort, mesh: MeshConfig, members: Members) -> Any:
    """The cohort's state after two steps on made-up batches, on the host."""
    task = LoraSpaceTask(own.base, "cpu")
    made = sharding.make_mesh(mesh, len(own.runs), own.base.training.batch_size)
    (stage,) = task.stages()
    program = Program(task, own, stage, made, members=members)
    state, step = program.init(), program.compile_step()
    for n in (1, 2):
        rng = np.random.default_rng(n)
        x = rng.normal(2, 3, (len(own.runs), 32, task.example()["x"].shape[0])).astype(np.float32)
        label = rng.integers(0, 5, (len(own.runs), 32)).astype(np.int32)
        state, _ = step(state, program.member, program.put_batch({"x": x, "label": label}), np.int32(n))
    return jax.device_get({"params": state.params, "stats": state.collections})


@pytest.mark.alone
@pytest.mark.slow
def test_batch_norm_is_of_the_whole_batch_of_one_member_wherever_it_lies(repo):
    """Over eight devices, members together or in turn: were a device to take its own rows, all would differ."""
    own = cohort(repo, seeds="42,43")
    one = MeshConfig(member=1, data=1)
    alone = stepped(own, one, "in turn")
    for mesh, members in (
        (one, "together"),
        (MeshConfig(member=2, data=4), "together"),
        (MeshConfig(1, 8), "in turn"),
    ):
        found = stepped(own, mesh, members)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), found, alone)
    # It is a cohort of two different members.
    assert not np.allclose(*alone["stats"]["batch_stats"]["norm_0"]["mean"])


@pytest.fixture(scope="module")
def trained(repo: Path, tmp_path_factory) -> list[tuple[dict[str, Any], RunDir]]:
    where = tmp_path_factory.mktemp("trained")
    own = cohort(
        repo,
        seeds="42,43",
        training__early_stop="3",
        training__steps="60",
        host__workdir=str(where / "runs"),
        host__cache=str(where / "cache"),
    )
    found = train(own)
    return [(one, RunDir(where / "runs" / one["experiment_name"] / one["run_id"])) for one in found]


@pytest.mark.slow
def test_what_is_reported_is_the_best_epoch(trained):
    """Upstream's snapshot was an alias of the live parameters, so it reported the last epoch."""
    for summary, place in trained:
        rows = [row for row in disk.read_jsonl(place.metrics)[0] if "val/accuracy" in row]
        *during, last = [{k: v for k, v in row.items() if k.startswith("val/")} for row in rows]
        restored = {key: last[key] for key in during[0]}
        best = max(during, key=lambda row: row["val/accuracy"])  # the first of them
        assert restored == best
        assert {key.split("_")[0] for key in last.keys() - restored.keys()} == {"val/train", "val/test"}
        assert restored != during[-1]  # which it would be without a copy
        assert summary["statistics"]["val_accuracy"]["final"] == best["val/accuracy"]
        if summary["stopped_at"] is not None:
            assert len(during) - 1 - during.index(best) == 3  # evaluations without a better one


@pytest.mark.slow
def test_what_is_kept_scores_what_was_recorded(trained):
    for _, place in trained:
        last = [row for row in disk.read_jsonl(place.metrics)[0] if "val/accuracy" in row][-1]
        with np.load(place.predictions, allow_pickle=False) as kept:
            right = kept["prediction"] == kept["label"]
            for part, prefix in metrics.PARTS.items():
                assert right[kept["split"] == part].mean() == pytest.approx(last[f"val/{prefix}accuracy"])
            assert kept["categories"].tolist() == ["airplane", "bird", "car", "cat", "dog"]
            assert int(kept["features"]) == 7 * int(kept["tensors"]) == 7 * 16
            assert len(kept["label"]) == 120


def test_workers_read_batches_and_features_take_every_core(repo, tmp_path):
    found = {}
    for workers in (0, 3):
        options = {"data__samples": "12", "host__workers": str(workers)}
        task = LoraSpaceTask(cohort(repo, "flat_vec_visual_only", **options).base, "cpu")
        source = task.open(tmp_path)
        rows = {name: np.zeros(12, int) for name in ("label", "split")}
        kept = task.keep(source, [{"logits": np.zeros((12, 5)), **rows}])
        found[workers] = int(kept["workers"]), source.workers
    assert [read for read, _ in found.values()] == [0, 3]
    assert [threads for _, threads in found.values()] == [len(os.sched_getaffinity(0))] * 2


@pytest.mark.slow
def test_a_killed_cohort_goes_on_to_the_same_bits(repo, tmp_path, trained, monkeypatch):
    """Running statistics, best snapshots and who has stopped are all in the checkpoint."""
    options = {
        "training__early_stop": "3",
        "training__steps": "60",
        "host__checkpoint_every": "3",
        "host__workdir": str(tmp_path),
        "host__cache": str(trained[0][1].path.parents[3] / "cache"),
    }
    own = cohort(repo, seeds="42,43", **options)
    killed_at(own, 8, monkeypatch)
    for (before, place), after in zip(trained, train(own), strict=True):
        assert after["params_digest"] == before["params_digest"]
        again = RunDir(tmp_path / after["experiment_name"] / after["run_id"])
        rows = [
            [row for row in disk.read_jsonl(one.metrics)[0] if "val/accuracy" in row]
            for one in (place, again)
        ]
        assert rows[0] == rows[1]
        starts = [row["step"] for row in again.history() if row["state"] == "running"]
        assert starts == [0, 6]


@pytest.mark.slow
def test_text_tensors_tell_more_and_nothing_tells_the_category_without_cues(repo, tmp_path):
    """The classifier itself, over three seeds: cross-attention has more of the cues, and the last category none."""
    options = {
        "data__samples": "600",
        "training__batch_size": "64",
        "model__hidden": "64",
        "seeds": "42,43,44",
    }
    where = {"host__workdir": str(tmp_path), "host__cache": str(tmp_path / "cache")}
    recall = {}
    for arm in ("ensemble_all_layers", "ensemble_visual_only"):
        own = config.load(
            f"{repo}/configs/lora_space.py:{arm}",
            (SMALL | {key.replace("__", "."): value for key, value in (options | where).items()}).items(),
        )
        tables = []
        for summary in train(own):
            place = RunDir(tmp_path / summary["experiment_name"] / summary["run_id"])
            with np.load(place.predictions, allow_pickle=False) as kept:
                test = kept["split"] == 2
                tables.append(
                    metrics.confusion(*(kept[name][test].astype(int) for name in ("label", "prediction")), 5)
                )
        table = np.sum(tables, axis=0)
        recall[arm] = np.diag(table) / table.sum(axis=1)
    both, visual = recall.values()
    assert both[:4].mean() > visual[:4].mean() + 0.05 > 0.25
    assert both[4] < 0.3 < both[:4].min()  # a fifth is chance


def test_micro_batches_are_refused_since_they_would_compute_something_else(repo):
    base = cohort(repo).base
    for section, field in (("training", "accumulation"), ("host", "split")):
        changed = dataclasses.replace(getattr(base, section), **{field: 2})
        with pytest.raises(config.UserError, match=rf"{section}\.{field}=2: must be 1: batch norm"):
            LoraSpaceTask(dataclasses.replace(base, **{section: changed}), "cpu")


# ---------------------------------------------------------------------------------------- speed-ups


@pytest.mark.parametrize("rank", [1, 4])
def test_the_documents_algorithm_gives_what_ours_gives(rank):
    """Or it would be no wonder that ours is faster."""
    rng = np.random.default_rng(0)
    shapes = {"a": (rank, 12), "b": (15, rank)}
    weights = {name: rng.normal(size=(3, *shape)).astype(np.float32) for name, shape in shapes.items()}
    ours = features(weights, ["spectral"])["spectral"]
    theirs = spectral_one_by_one(weights)
    assert ours.shape == theirs.shape == (3, 64)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_is_timed_as_ours_is_the_training_of_a_run(repo, tmp_path, trained, monkeypatch):
    """Loss for loss what the loop recorded; and the same without compilation."""
    (_, place), *_ = trained
    cache = place.path.parents[3] / "cache"
    task = LoraSpaceTask(cohort(repo, training__steps="60", training__early_stop="3").base, "cpu")
    by_name = {one.name: one for one in task.speedups(cache, tmp_path)}
    rows = {
        row["step"]: row["train/loss"] for row in disk.read_jsonl(place.metrics)[0] if "train/loss" in row
    }
    epoch = task.config.training.eval_every
    assert float(by_name["batch"].ours()) == pytest.approx(rows[epoch], rel=1e-4)
    assert float(by_name["epochs"].ours()) != pytest.approx(rows[epoch], rel=1e-4)  # which is another step
    monkeypatch.setattr(speed, "STEPS", 2)  # operation by operation a step takes a second
    one_by_one, compiled = by_name["compilation"].original(), by_name["compilation"].ours()
    assert float(one_by_one) == pytest.approx(float(compiled), rel=1e-3)


@pytest.mark.slow
def test_speed_ups_are_measured_one_at_a_time_on_the_same_data(repo, tmp_path):
    changed = {**SMALL, "host.workdir": str(tmp_path / "runs"), "host.cache": str(tmp_path / "cache")}
    declared = study.load(f"{repo}/configs/lora_space.py", changed.items())
    found = bench_speedups(declared, Options(only=("svd", "preload", "cache"), rounds=1))
    assert [one.name for one in found.measured] == ["svd", "preload", "cache"]
    by_name = {one.name: one for one in found.measured}
    assert by_name["preload"].agreement == by_name["cache"].agreement == "yes"
    assert by_name["svd"].agreement.startswith("within")
    assert all(ratio > 0 for one in found.measured for ratio in one.ratios)
    written = disk.read_json(found.files[0])
    assert [row["name"] for row in written["measured"]] == list(by_name)
    assert "first call" in found.files[1].read_text()
    with pytest.raises(config.UserError, match="--only=swd: did you mean 'svd'"):
        bench_speedups(declared, Options(only=("swd",)))
