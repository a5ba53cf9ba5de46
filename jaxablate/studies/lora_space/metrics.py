"""Scores of a classifier on the three parts of the adapters. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxablate.config import Direction

# Of `split` in an evaluation batch, with what stands before a part's scores: those of validation are the plain ones.
PARTS = {0: "train_", 1: "", 2: "test_"}
TRAIN, VAL, TEST = PARTS
HIGHER_IS_BETTER = ("accuracy", "f1", "precision", "recall")
DIRECTIONS: dict[str, Direction] = {
    f"val/{part}{name}": "max" if name in HIGHER_IS_BETTER else "min"
    for part in PARTS.values()
    for name in (*HIGHER_IS_BETTER, "loss")
}

Ints = NDArray[np.integer]


def confusion(truth: Ints, prediction: Ints, classes: int) -> NDArray[np.int64]:
    """(classes, classes): how often a truth (row) was given a prediction (column); unseen classes have zeros."""
    return np.bincount(truth * classes + prediction, minlength=classes**2).reshape(classes, classes)


def macro(truth: Ints, prediction: Ints, classes: int) -> dict[str, float]:
    """Macro precision, recall and F1 over the labels that truth or prediction has; an empty denominator gives 0."""
    table = confusion(truth, prediction, classes)
    hits, given, true = np.diag(table), table.sum(0), table.sum(1)
    present = (given + true) > 0

    def mean_ratio(above: Ints, below: Ints) -> float:
        return float(np.mean((above / np.maximum(below, 1))[present]))

    return {
        "precision": mean_ratio(hits, given),
        "recall": mean_ratio(hits, true),
        "f1": mean_ratio(2 * hits, given + true),
    }


def chance(truth: Ints) -> float:
    """What always naming the largest class scores: its share."""
    return float(np.bincount(truth).max() / len(truth))


def cross_entropy(logits: NDArray[np.floating], truth: Ints) -> float:
    """Mean of -ln softmax(logits)[truth], in nats; logits (rows, classes)."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    normaliser = np.log(np.exp(shifted).sum(axis=1))
    return float(np.mean(normaliser - shifted[np.arange(len(truth)), truth]))


def joined(outputs: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """`predict`'s outputs, one per evaluation batch, as one array a key."""
    return {key: np.concatenate([np.asarray(output[key]) for output in outputs]) for key in outputs[0]}


def evaluate(outputs: Sequence[Mapping[str, Any]], parts: Sequence[int] = tuple(PARTS)) -> dict[str, float]:
    """The scores of one member: accuracy, macro F1, precision, recall, loss, and what knowing nothing scores.

    Args:
      outputs: per evaluation batch `logits` (B, classes), `label` (B,) and `split` (B,), a key of `PARTS`.
      parts: those that are scored.

    Returns:
      `accuracy` and the others of validation; of the other parts as `train_accuracy`, `test_f1`, …. A part that
      no row belongs to has none. The `chance` of a part is the share of its largest class.
    """
    all_rows = joined(outputs)
    scores: dict[str, float] = {}
    for part in parts:
        own = all_rows["split"] == part
        if not own.any():
            continue
        logits, truth = all_rows["logits"][own], all_rows["label"][own]
        prediction = np.argmax(logits, axis=1)
        found = {
            "accuracy": float(np.mean(prediction == truth)),
            **macro(truth, prediction, logits.shape[1]),
            "loss": cross_entropy(logits, truth),
            "chance": chance(truth),
        }
        scores |= {PARTS[part] + name: value for name, value in found.items()}
    return scores


def evaluate_others(outputs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The scores of training and test, without those of validation, which are known already."""
    return evaluate(outputs, (TRAIN, TEST))


def knowing_nothing(truth: Ints, classes: int, outputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What `predict` would give that knows the shares of the training labels `truth`, and nothing of an adapter."""
    counts = np.bincount(truth, minlength=classes)
    logits = np.log((counts + 1) / (counts + 1).sum())  # a class without training adapters is not impossible
    return [{**output, "logits": np.tile(logits, (len(output["label"]), 1))} for output in outputs]
