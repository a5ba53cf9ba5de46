"""`results.json`, field for field as the document's guide promises it."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxablate.studies.lora_space.config import TENSORS
from jaxablate.studies.lora_space.report.runs import PARTS, SCORES, Finished, Setting, Settings, finished


def results_json(found: Settings, dataset: str, runs: int) -> dict[str, Any]:
    """The document's dict; a setting without a finished run is in no list. Spreads are population deviations."""
    done = finished(found)
    layers = {tensors: _layers(found, tensors) for tensors in TENSORS}
    text = layers["text_only"]
    if text is None and layers["all_layers"] is not None and layers["visual_only"] is not None:
        text = layers["all_layers"] - layers["visual_only"]
    categories = done[0].kept.categories if done else ()
    lists = {f"{tensors}_results": _results(found, tensors) for tensors in TENSORS}
    if not any(tensors == "text_only" for _, tensors in found):  # the document never trained on these
        del lists["text_only_results"]
    return {
        "dataset": dataset,
        "num_runs": runs,
        "num_classes": len(categories),
        "num_all_layers": layers["all_layers"],
        "num_visual_layers": layers["visual_only"],
        "num_text_layers": text,
        "optimizations": optimizations(done[0]) if done else {},
        **lists,
        "label_mapping": {name: label for label, name in enumerate(categories)},
    }


def optimizations(run: Finished) -> dict[str, Any]:
    """The document's switches, each as it was in effect."""
    training = run.config["training"]
    return {
        "fast_svd": True,  # singular values in closed form, which are exact
        "gpu_normalization": "cores)" not in run.run.hardware,
        "mixed_precision": training["compute_dtype"] != "float32",
        "batch_size": training["batch_size"],
        "num_workers": run.kept.facts["workers"],
        "sample_layers": run.config["data"]["sample_layers"],
    }


def _layers(found: Settings, tensors: str) -> int | None:
    counts = (
        run.kept.facts["tensors"] for (_, kind), one in found.items() if kind == tensors for run in one.runs
    )
    return next(counts, None)


def _results(found: Settings, tensors: str) -> list[dict[str, Any]]:
    return [result(one) for (_, kind), one in found.items() if kind == tensors and one.runs]


def result(one: Setting) -> dict[str, Any]:
    """One entry of `all_layers_results` or `visual_only_results`."""
    seconds, epochs = [run.seconds for run in one.runs], [run.best_epoch for run in one.runs]
    facts = one.runs[0].kept.facts
    fields: dict[str, Any] = {"representation": one.name, "num_layers": facts["tensors"]}
    for part in PARTS:
        fields |= _spread(f"{part}_acc", one.scores(part))
    for part in ("val", "test"):
        for name in SCORES:
            fields |= _spread(f"{part}_{name}", one.scores(part, name))
    fields |= _spread("training_time", seconds) | {"training_time_total": float(np.sum(seconds))}
    fields |= _spread("best_epoch", epochs)
    fields |= {
        "feature_dim": facts["features"],
        "per_run_results": [_run(number, run) for number, run in enumerate(one.runs)],
        "learning_curves": [
            {
                "val_acc_history": run.accuracy_history,
                "train_loss_history": run.loss_history,
                "best_epoch": run.best_epoch,
            }
            for run in one.runs
        ],
    }
    for part in ("val", "test"):
        fields[f"{part}_confusion_matrices"] = [run.kept.confusion(part).tolist() for run in one.runs]
    return fields | {f"{part}_acc_all_runs": one.scores(part).tolist() for part in PARTS}


def _spread(name: str, values: Any) -> dict[str, float]:
    return {f"{name}_mean": float(np.mean(values)), f"{name}_std": float(np.std(values))}


def _run(number: int, run: Finished) -> dict[str, Any]:
    scores = {f"{part}_{name}": run.score(part, name) for part in ("val", "test") for name in SCORES}
    return {
        "run": number,
        **{f"{part}_acc": run.score(part, "accuracy") for part in PARTS},
        **scores,
        "training_time": run.seconds,
        "best_epoch": run.best_epoch,
        "feature_dim": run.kept.facts["features"],
    }
