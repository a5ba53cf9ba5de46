"""The guide's files: its own field names, true to the runs, joined by name, and careful with what is damaged."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from jaxablate import disk
from jaxablate.analysis import results
from jaxablate.analysis.report.document import Alert, Block, Table
from jaxablate.analysis.report.extra import Extra
from jaxablate.analysis.stats.analyse import analyse
from jaxablate.manifest import Manifest
from jaxablate.studies.lora_space import report as pages
from jaxablate.studies.lora_space.report import paired
from jaxablate.studies.lora_space.report.paired import Compared
from jaxablate.studies.lora_space.report.runs import settings
from jaxablate.studies.lora_space.report.texts import drop, page
from jaxablate.study import Factor, Response, Study, product
from tests.analysis.made import made_study
from tests.analysis.made_dirs import made_study_dir

REPRESENTATION = Factor(
    "representation", "model", {"simple_stats": {}, "spectral": {"data.representation": "spectral"}}
)
TENSORS = Factor("tensors", "model", {"all_layers": {}, "visual_only": {"data.tensors": "visual_only"}})
SPLIT = Factor("split", "data", {str(s): {"data.split_seed": s} if s > 42 else {} for s in (42, 43, 44, 45)})
CLASSES = ("bird", "cat", "snake", "nobody")  # no adapter is of the last one
TRAIN, VAL, TEST = 70, 29, 61
KEYS = (
    "dataset num_runs num_classes num_all_layers num_visual_layers num_text_layers optimizations all_layers_results "
    "visual_only_results label_mapping"
)
RESULT_KEYS = (
    "representation num_layers train_acc_mean train_acc_std val_acc_mean val_acc_std test_acc_mean test_acc_std "
    "val_f1_mean val_f1_std val_precision_mean val_precision_std val_recall_mean val_recall_std test_f1_mean "
    "test_f1_std test_precision_mean test_precision_std test_recall_mean test_recall_std training_time_mean "
    "training_time_std training_time_total best_epoch_mean best_epoch_std feature_dim per_run_results "
    "learning_curves val_confusion_matrices test_confusion_matrices train_acc_all_runs val_acc_all_runs "
    "test_acc_all_runs"
)


def declared(seeds: int, *factors: Factor) -> Study:
    return made_study(
        seeds,
        name="lora_space",
        title="LoRA weight space",
        factors=factors,
        arms=product(*factors, names=lambda levels: "_".join(levels.values())),
        responses=(Response("val/test_accuracy", "max", chance=0.5),),
        hypotheses=(),
        expectations=(),
    )


def hits(arm: str, seed: int, share: float) -> np.ndarray:
    """Which of all adapters the run is right about; the same adapters are easy for every arm."""
    easy = np.random.default_rng(0).random(TRAIN + VAL + TEST)
    return easy + 0.05 * np.random.default_rng([seed, *map(ord, arm)]).standard_normal(len(easy)) < share


def kept(arm: str, seed: int, share: float, tensors: int, *remarks: str) -> dict[str, np.ndarray]:
    label = np.random.default_rng(1).integers(0, 3, TRAIN + VAL + TEST)
    right = hits(arm, seed, share)
    return {
        "prediction": np.where(right, label, (label + 1) % 3).astype(np.int16),
        "label": label.astype(np.int16),
        "split": np.repeat([0, 1, 2], [TRAIN, VAL, TEST]).astype(np.int8),
        "categories": np.array(CLASSES),
        "features": np.array(5 * tensors),
        "tensors": np.array(tensors),
        "near_constant": np.array(2),
        "workers": np.array(2),
        "remarks": np.array(remarks, dtype=str),
    }


def scored(found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """val/… of what was kept; precision and the others are no matter here."""
    right = found["prediction"] == found["label"]
    rows: dict[str, float] = {"val/test_chance": 0.4}
    for part, prefix in enumerate(("train_", "", "test_")):
        accuracy = float(right[found["split"] == part].mean())
        rows |= {f"val/{prefix}{name}": accuracy for name in ("accuracy", "f1", "precision", "recall")}
    return rows


def config_of(study: Study, arm: str, seed: int) -> dict[str, Any]:
    levels = study.levels(arm)
    return {
        "seed": seed,
        "scale": "1k",
        "data": {
            "path": "", "samples": 1000, "architecture": "sd15", "rank": 1, "split": "unstratified",
            "split_seed": int(levels.get("split", 42)), "sample_layers": 1.0, "normalise": "unbiased",
            "spectral_variant": "optimized",
        },
        "model": {"layers": 3, "hidden": 512, "dropout": 0.5},
        "training": {"steps": 600, "batch_size": 256, "eval_every": 3, "early_stop": 15, "compute_dtype": "float32"},
        "optim": {"learning_rate": 1e-3, "weight_decay": 1e-4},
    }  # fmt: skip


def made(
    where: Path, shares: Mapping[str, float], *factors: Factor, seeds: int = 3, **about: Any
) -> Manifest:
    """Runs that are right about these shares of the adapters; each was best at epoch 2 of 4, and restored."""
    study = declared(seeds, *(factors or (REPRESENTATION, TENSORS)))
    manifest = made_study_dir(where, study, rows=2, **about)
    for run in manifest.runs:
        place = manifest.run_dir(run)
        if not place.summary.exists():
            continue
        levels = study.levels(run.arm)
        share = shares[f"{levels['representation']}_{levels['tensors']}"]
        found = kept(run.arm, run.seed, share, 128 if levels["tensors"] == "all_layers" else 64)
        np.savez(place.predictions, allow_pickle=False, **found)
        best = scored(found)
        rows: list[dict[str, Any]] = [{"step": 0, "val/accuracy": 0.01}]
        for epoch, accuracy in enumerate((0.02, best["val/accuracy"], 0.03, 0.01), start=1):
            rows.append({"step": 3 * epoch, "train/loss": 2.0 / epoch})
            rows.append({"step": 3 * epoch, "val/accuracy": accuracy})
        rows.append({"step": 13, **best})
        place.metrics.write_bytes(b"".join(map(disk.encode_row, rows)))
        disk.write_json(place.config, config_of(study, run.arm, run.seed))
        summary = disk.read_json(place.summary) | {
            "steps": 12,
            "cohort_size": 3,
            "hardware": "Xeon (2 cores)",
        }
        summary["statistics"]["total_wallclock_time"] = 30.0
        disk.write_json(place.summary, summary)
    return manifest


SHARES = {
    "simple_stats_all_layers": 0.6,
    "simple_stats_visual_only": 0.5,
    "spectral_all_layers": 0.8,
    "spectral_visual_only": 0.3,
}


def report(manifest: Manifest, where: Path) -> Path:
    (where / "figures").mkdir(parents=True)
    found = results.load(manifest)
    written = pages.write(found, analyse(found), where)
    own = blocks(manifest)
    assert written[: len(own)] == own
    assert sorted(one.path for one in written[len(own) :] if isinstance(one, Extra)) == sorted(
        path for path in where.rglob("*") if path.is_file()
    )
    return where


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("whole")
    return report(made(where, SHARES), where / "report")


def blocks(manifest: Manifest) -> list[Block]:
    """What the page says."""
    notes = list[str]()
    own = settings(results.load(manifest), notes)
    return list(page(own, Compared.of(own), notes))


def documents(manifest: Manifest) -> dict[str, str]:
    """The texts alone: pictures take most of the time."""
    found, notes = results.load(manifest), list[str]()
    own = settings(found, notes)
    written = pages.documents(found, own, Compared.of(own), notes)
    return {name: text for name, (text, _) in written.items()}


def read(where: Path) -> dict[str, Any]:
    return json.loads((where / "results.json").read_text())


# ------------------------------------------------------------------------------------- results.json


def test_the_file_has_exactly_the_guides_fields(whole):
    found = read(whole)
    assert list(found) == KEYS.split()
    assert set(found["all_layers_results"][0]) == set(RESULT_KEYS.split())
    assert set(found["optimizations"]) == {
        "fast_svd", "gpu_normalization", "mixed_precision", "batch_size", "num_workers", "sample_layers",
    }  # fmt: skip
    assert found["label_mapping"] == {"bird": 0, "cat": 1, "snake": 2, "nobody": 3}
    assert (found["dataset"], found["num_runs"], found["num_classes"]) == ("1k", 3, 4)
    assert [found[f"num_{what}_layers"] for what in ("all", "visual", "text")] == [128, 64, 64]
    per_run = ["run", "train_acc", "val_acc", "test_acc", "training_time", "best_epoch", "feature_dim"]
    per_run += [f"{part}_{name}" for part in ("val", "test") for name in ("f1", "precision", "recall")]
    assert set(found["all_layers_results"][0]["per_run_results"][0]) == set(per_run)


def test_a_result_is_what_its_runs_recorded(whole):
    found = {one["representation"]: one for kind in ("all_layers", "visual_only")
             for one in read(whole)[f"{kind}_results"]}  # fmt: skip
    assert list(found) == [*[n for n in SHARES if "all" in n], *[n for n in SHARES if "visual" in n]]
    for name, share in SHARES.items():
        one = found[name]
        test = slice(TRAIN + VAL, None)
        mine = [hits(name, seed, share)[test].mean() for seed in (0, 1, 2)]
        assert one["test_acc_all_runs"] == pytest.approx(mine)
        assert one["test_acc_mean"] == pytest.approx(np.mean(mine))
        assert one["test_acc_std"] == pytest.approx(np.std(mine))  # of the population
        assert one["best_epoch_mean"] == 2
        assert one["training_time_mean"] == 10  # a third of the cohort's
        assert one["training_time_total"] == 30
        curve = one["learning_curves"][0]
        assert curve["train_loss_history"] == [2.0, 1.0, pytest.approx(2 / 3), 0.5]
        assert len(curve["val_acc_history"]) == 4  # neither the start nor what was restored
        assert curve["val_acc_history"][1] == one["val_acc_all_runs"][0]


def test_confusion_matrices_have_all_labels(whole):
    for one in read(whole)["all_layers_results"]:
        assert len(one["test_confusion_matrices"]) == 3
        for table, accuracy in zip(one["test_confusion_matrices"], one["test_acc_all_runs"], strict=True):
            table = np.array(table)
            assert table.shape == (4, 4)
            assert table[3].sum() == 0  # nobody is of the class, and it has a row all the same
            assert table.sum() == TEST
            assert np.trace(table) / TEST == pytest.approx(accuracy)


# -------------------------------------------------------------------------------------- comparisons


def test_a_drop_is_absolute_and_relative():
    assert drop(0.8, 0.6) == pytest.approx((0.2, 25.0))
    assert drop(0.0, 0.1) == pytest.approx((-0.1, 0.0))  # 0 % of nothing


def rows(text: str) -> dict[tuple[str, str], dict[str, str]]:
    table = csv.DictReader(io.StringIO(text))
    return {(row["first"], row["second"]): row for row in table}


def test_representations_are_compared_on_the_same_adapters(whole):
    found = rows((whole / "paired_comparisons.csv").read_text())
    assert len(found) == 4  # a pair of representations in each of two sets, and two sets in each of two
    row = found["simple_stats_all_layers", "spectral_all_layers"]
    test = slice(TRAIN + VAL, None)
    a, b = (
        np.mean([hits(name, seed, SHARES[name])[test] for seed in (0, 1, 2)], axis=0)
        for name in ("simple_stats_all_layers", "spectral_all_layers")
    )
    expected = stats.ttest_rel(a, b)
    low, high = expected.confidence_interval(0.95)
    assert float(row["difference"]) == pytest.approx((a - b).mean())
    assert [float(row["low"]), float(row["high"])] == pytest.approx([low, high])
    assert float(row["p"]) == pytest.approx(expected.pvalue)
    assert float(row["p_holm"]) == pytest.approx(float(row["p"]))  # the only pair of its family
    assert float(row["p"]) < 0.01
    lost = [float(found[f"{n}_all_layers", f"{n}_visual_only"]["p"]) for n in ("simple_stats", "spectral")]
    holm = [
        float(found[f"{n}_all_layers", f"{n}_visual_only"]["p_holm"]) for n in ("simple_stats", "spectral")
    ]
    assert min(holm) == pytest.approx(min(1, 2 * min(lost)))


def test_two_settings_that_are_equally_good_are_not_told_apart(tmp_path):
    row = rows(documents(made(tmp_path, dict.fromkeys(SHARES, 0.6)))["paired_comparisons.csv"])
    assert all(float(one["p_holm"]) > 0.01 for one in row.values())


def test_several_splits_are_the_unit_and_share_adapters(tmp_path):
    manifest = made(tmp_path, SHARES, REPRESENTATION, TENSORS, SPLIT, seeds=2)
    found = settings(results.load(manifest), [])
    one = found["spectral", "all_layers"]
    assert len(one.runs) == 8  # four splits of two runs are one setting
    (row,) = paired.of_representations(found, "all_layers")
    differences = [
        np.mean(
            [r.score("test", "accuracy") for r in found["simple_stats", "all_layers"].runs if split(r) == s]
        )
        - np.mean([r.score("test", "accuracy") for r in one.runs if split(r) == s])
        for s in (42, 43, 44, 45)
    ]
    half = (row.difference.high - row.difference.low) / 2
    naive = stats.t.isf(0.025, 3) * np.std(differences, ddof=1) / 2
    assert row.difference.value == pytest.approx(np.mean(differences))
    assert half == pytest.approx(naive * np.sqrt(1 + 4 * TEST / TRAIN))  # wider than if nothing were shared


def split(run) -> int:
    return run.config["data"]["split_seed"]


# ------------------------------------------------------------------------------------- what is amiss


def test_a_representation_that_failed_moves_no_other_row(tmp_path):
    """Upstream paired the rows by their place, so a failure gave every later row another one's drop."""
    missing = {"simple_stats_visual_only": (0, 1, 2)}
    texts = documents(made(tmp_path, SHARES, missing=missing, missing_state="bug"))
    found = json.loads(texts["results.json"])
    assert [one["representation"] for one in found["visual_only_results"]] == ["spectral_visual_only"]
    text = texts["results.txt"]
    assert "no run of these has a result: simple_stats_visual_only" in text
    drops = text[text.index("All layers against") :]
    row = next(line for line in drops.splitlines() if line.startswith("spectral"))
    whole_mean, visual_mean = (
        100 * one[0]["test_acc_mean"]
        for one in ([r for r in found[k] if "spectral" in r["representation"]]
                    for k in ("all_layers_results", "visual_only_results"))
    )  # fmt: skip
    assert row.split()[1:4] == [f"{whole_mean:.2f}", f"{visual_mean:.2f}", f"+{whole_mean - visual_mean:.2f}"]
    failed = next(line for line in drops.splitlines() if line.startswith("simple_stats"))
    assert failed.split()[2:5] == ["–", "–", "–"]


def test_a_damaged_file_is_named_and_costs_one_run(tmp_path):
    manifest = made(tmp_path, SHARES)
    place = manifest.run_dir(manifest.runs[0])
    place.predictions.write_bytes(place.predictions.read_bytes()[:100])
    texts = documents(manifest)
    assert str(place.predictions) in "".join(texts["results.txt"].split())
    counts = [len(one["per_run_results"]) for one in json.loads(texts["results.json"])["all_layers_results"]]
    assert sorted(counts) == [2, 3]


def test_a_study_that_never_ran_has_its_files(tmp_path):
    never = dict.fromkeys(SHARES, (0, 1, 2))
    where = report(made(tmp_path, SHARES, missing=never), tmp_path / "report")
    found = read(where)
    assert list(found) == KEYS.split()
    assert found["all_layers_results"] == found["visual_only_results"] == []
    assert "0 of 12 runs finished" in (where / "results.txt").read_text()


def test_what_is_no_measurement_is_said_first(tmp_path):
    manifest = made(tmp_path, SHARES)
    place = manifest.run_dir(manifest.runs[0])
    arrays = kept("simple_stats_all_layers", 0, 0.6, 128, "10 adapters: not a measurement")
    np.savez(place.predictions, allow_pickle=False, **arrays)
    text = documents(manifest)["results.txt"]
    assert text.index("BEFORE YOU READ") < text.index("not a measurement") < text.index("setting")
    assert text.count("not a measurement") == 1
    first, *others = blocks(manifest)
    assert isinstance(first, Alert) and first.items == ("10 adapters: not a measurement",)
    arrays = kept("simple_stats_all_layers", 0, 0.6, 128)
    np.savez(place.predictions, allow_pickle=False, **arrays)
    assert blocks(manifest) == others  # where nothing is amiss there is no such warning


def test_the_page_says_what_its_intervals_are_over(tmp_path):
    """Seeds alone say nothing of other adapters, and a split says more than the adapters of one."""
    one_split = blocks(made(tmp_path / "one", SHARES))
    several = blocks(made(tmp_path / "several", SHARES, REPRESENTATION, TENSORS, SPLIT, seeds=2))
    for found, unit in ((one_split, f"{TEST} test adapters"), (several, "4 splits")):
        over, _, table, *_ = found
        assert isinstance(over, Alert) and over.title == "What the intervals are over"
        assert "nothing of other adapters" in over.items[0] and unit in over.items[1]
        assert isinstance(table, Table) and unit in table.caption
        assert [row[0].text for row in table.rows] == ["simple_stats", "spectral"]
    assert "splits" not in str(one_split)
    never = dict.fromkeys(SHARES, (0, 1, 2))
    assert (
        len(blocks(made(tmp_path / "never", SHARES, missing=never))) == 1
    )  # nothing to compare: no intervals
