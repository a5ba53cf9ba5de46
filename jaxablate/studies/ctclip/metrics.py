"""Zero-shot metrics of the CT-CLIP study (specification §5), in float64 on the host.

Everything is computed from counts: of each finding, how many positives and negatives score at least each
distinct threshold. A bootstrap resample only changes how often a case is counted, so one sort per finding
serves all resamples, and the point estimate is the resample that counts every case once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

Floats = NDArray[np.float64]

F1_EPSILON = 1e-10
DECISION = 0.5
ORIGINAL_THRESHOLDS = np.linspace(0.0, 1.0, 100)
CHUNK = 400_000  # of counts at a time, so that the arrays stay in a core's cache
METRICS = ("auroc", "auprc", "f1", "precision", "recall", "specificity", "accuracy", "f1_original")


def zero_shot_scores(image: ArrayLike, prompts: ArrayLike, temperature: float) -> Floats:
    """The probability that each finding is present, from the two prompts of the finding.

    Args:
      image: (N, d) unit vectors.
      prompts: (2, F, d) unit vectors: [0] says that the finding is there, [1] that it is not.
      temperature: what the similarities are multiplied by, exp(θ).

    Returns (N, F): the first entry of the softmax over each pair. A softmax over two is the logistic function
    of their difference, which neither overflows nor loses the small differences at large temperatures.
    """
    image, prompts = np.asarray(image, np.float64), np.asarray(prompts, np.float64)
    if image.ndim != 2 or prompts.ndim != 3 or prompts.shape[0] != 2 or prompts.shape[2] != image.shape[1]:
        raise ValueError(f"image {image.shape}, prompts {prompts.shape}: expected (N, d) and (2, F, d)")
    return expit(temperature * (image @ (prompts[0] - prompts[1]).T))


@dataclasses.dataclass(frozen=True)
class _Counts:
    """One finding: counts of R resamples at T distinct thresholds, highest first.

    tp, fp: (R, T) positives and negatives with score >= threshold; positives, negatives: (R,) of all.
    """

    thresholds: Floats
    tp: Floats
    fp: Floats
    positives: Floats
    negatives: Floats

    @classmethod
    def of(cls, scores: Floats, labels: NDArray[np.bool_], weights: Floats) -> _Counts:
        """From scores (N,), labels (N,) and how often each resample counts each case, (R, N)."""
        order = np.argsort(-scores, kind="stable")
        sorted_scores = scores[order]
        # Cases of equal score enter together: the last of each tie closes the threshold.
        last = np.flatnonzero(np.append(np.diff(sorted_scores) != 0, True))
        positive = np.where(labels[order], weights[:, order], 0.0)
        tp, seen = np.cumsum(positive, axis=1)[:, last], np.cumsum(weights[:, order], axis=1)[:, last]
        fp = seen - tp
        return cls(sorted_scores[last], tp, fp, tp[:, -1], fp[:, -1])

    def at(self, threshold: float | Floats, side: Literal["ge", "gt"]) -> tuple[Floats, Floats]:
        """(tp, fp), each (R, len(threshold)), of score >= threshold ('ge') or score > threshold ('gt')."""
        ascending = self.thresholds[::-1]
        below = np.searchsorted(ascending, np.atleast_1d(threshold), side="left" if side == "ge" else "right")
        passed = len(ascending) - below
        tp, fp = (np.pad(counts, ((0, 0), (1, 0))) for counts in (self.tp, self.fp))
        return tp[:, passed], fp[:, passed]

    @property
    def one_class(self) -> NDArray[np.bool_]:
        return (self.positives == 0) | (self.negatives == 0)


def _ratio(top: Floats, bottom: Floats) -> Floats:
    """top / bottom, 0 where the denominator is 0."""
    top, bottom = np.broadcast_arrays(top, bottom)
    return np.divide(top, bottom, out=np.zeros(top.shape), where=bottom != 0)


def _auroc(counts: _Counts) -> Floats:
    """P(positive scores higher) + ½ P(tie): the trapezoids under the ROC curve, in whole counts."""
    tp = np.pad(counts.tp, ((0, 0), (1, 0)))
    twice_area = (np.diff(counts.fp, axis=1, prepend=0.0) * (tp[:, 1:] + tp[:, :-1])).sum(axis=1)
    return _ratio(twice_area, 2 * counts.positives * counts.negatives)


def _precision_recall(counts: _Counts) -> tuple[Floats, Floats]:
    """(R, T) each, by threshold."""
    return _ratio(counts.tp, counts.tp + counts.fp), _ratio(counts.tp, counts.positives[:, None])


def _auprc(counts: _Counts) -> Floats:
    """Average precision, Σ (Rₙ - Rₙ₋₁) Pₙ; no interpolation between thresholds."""
    precision, recall = _precision_recall(counts)
    return (np.diff(recall, axis=1, prepend=0.0) * precision).sum(axis=1)


def _best_f1(counts: _Counts) -> tuple[Floats, Floats]:
    """(F1, threshold), each (R,). Of equal F1 the lowest threshold counts."""
    precision, recall = _precision_recall(counts)
    f1 = 2 * precision * recall / (precision + recall + F1_EPSILON)
    best = f1.shape[1] - 1 - np.argmax(f1[:, ::-1], axis=1)
    return f1[np.arange(len(f1)), best], counts.thresholds[best]


def _original(counts: _Counts) -> tuple[Floats, Floats, Floats]:
    """(threshold, support-weighted F1 over both classes, F1 of the positive class), each (R,).

    The rule of the first CT-CLIP: the threshold of linspace(0, 1, 100) that minimises the distance
    √((1 - TPR)² + FPR²) of `score > threshold` from the corner of the ROC plane; of equal ones the last.
    """
    tp, fp = counts.at(ORIGINAL_THRESHOLDS, "gt")
    positives, negatives = counts.positives[:, None], counts.negatives[:, None]
    distance = np.sqrt((1 - _ratio(tp, positives)) ** 2 + _ratio(fp, negatives) ** 2)
    best = distance.shape[1] - 1 - np.argmin(distance[:, ::-1], axis=1)
    rows = np.arange(len(best))
    tp, fp = tp[rows, best], fp[rows, best]
    f1_positive = _ratio(2 * tp, tp + fp + counts.positives)
    tn = counts.negatives - fp
    f1_negative = _ratio(2 * tn, tn + (counts.positives - tp) + counts.negatives)
    total = counts.positives + counts.negatives
    weighted = _ratio(counts.positives * f1_positive + counts.negatives * f1_negative, total)
    return ORIGINAL_THRESHOLDS[best], weighted, f1_positive


def _finding_metrics(counts: _Counts) -> dict[str, Floats]:
    """METRICS -> (R,), NaN in the resamples that hold one class only."""
    tp, fp = (side[:, 0] for side in counts.at(DECISION, "ge"))
    tn = counts.negatives - fp
    values = {
        "auroc": _auroc(counts),
        "auprc": _auprc(counts),
        "f1": _best_f1(counts)[0],
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, counts.positives),
        "specificity": _ratio(tn, counts.negatives),
        "accuracy": _ratio(tp + tn, counts.positives + counts.negatives),
        "f1_original": _original(counts)[1],
    }
    return {name: np.where(counts.one_class, np.nan, value) for name, value in values.items()}


# ------------------------------------------------------------------------------ one finding, in numbers


def _single(scores: ArrayLike, labels: ArrayLike) -> _Counts:
    column, truth = _checked(np.asarray(scores, np.float64)[:, None], np.asarray(labels)[:, None])
    if not np.isfinite(column).all():
        raise ValueError("scores: not all finite")
    return _Counts.of(column[:, 0], truth[:, 0], np.ones((1, len(column))))


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve of scores (N,) for labels (N,); ties count half. NaN with one class only."""
    return float(_finding_metrics(_single(scores, labels))["auroc"][0])


def auprc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Average precision of scores (N,) for labels (N,). NaN with one class only."""
    return float(_finding_metrics(_single(scores, labels))["auprc"][0])


def best_f1(scores: ArrayLike, labels: ArrayLike) -> tuple[float, float]:
    """(F1, threshold) at the threshold that makes F1 largest: optimistic, as it is tuned on these labels."""
    counts = _single(scores, labels)
    if counts.one_class[0]:
        return float("nan"), float("nan")
    f1, threshold = _best_f1(counts)
    return float(f1[0]), float(threshold[0])


def original_f1(scores: ArrayLike, labels: ArrayLike) -> tuple[float, float, float]:
    """(threshold, support-weighted F1 over both classes, binary F1), by the rule of the first CT-CLIP."""
    counts = _single(scores, labels)
    if counts.one_class[0]:
        return float("nan"), float("nan"), float("nan")
    threshold, weighted, binary = _original(counts)
    return float(threshold[0]), float(weighted[0]), float(binary[0])


# -------------------------------------------------------------------------------------- all findings


def macro_average(values: ArrayLike) -> float:
    """The plain mean over the findings that have a value; NaN if none has."""
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else float("nan")


def weighted_average(values: ArrayLike, positives: ArrayLike) -> float:
    """The mean over the findings that have a value, weighted by their positives; NaN if there are none."""
    known, weights = np.asarray(values, np.float64), np.asarray(positives, np.float64)
    there = ~np.isnan(known)
    total = weights[there].sum()
    return float((known[there] * weights[there]).sum() / total) if total else float("nan")


def slug(finding: str) -> str:
    """`Arterial wall calcification` -> `arterial_wall_calcification`."""
    return "_".join(finding.lower().split())


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    scores, truth = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 2 or scores.shape != truth.shape or not len(scores):
        raise ValueError(f"scores {scores.shape}, labels {truth.shape}: expected two (N, F) with N > 0")
    if not np.isin(truth, (0, 1)).all():
        raise ValueError("labels: not all 0 or 1")
    return scores, truth.astype(bool)


def evaluate(scores: ArrayLike, labels: ArrayLike, findings: Sequence[str]) -> dict[str, float]:
    """All metrics of a validation set.

    Args:
      scores: (N, F) probabilities that a finding is present.
      labels: (N, F) of 0 and 1.
      findings: their F names.

    Returns `macro_<metric>` and `weighted_<metric>` for each of METRICS, `<metric>/<slug>` of each finding
    for auroc, and `one_class_findings`: how many findings have positives only or negatives only. Those are
    NaN throughout and enter no average. If any score is not finite, every metric is NaN, so that a broken
    model does not pass for one that has fewer findings.
    """
    scores, truth = _checked(scores, labels)
    if len(findings) != scores.shape[1] or len({slug(name) for name in findings}) != len(findings):
        raise ValueError(f"findings: {len(findings)} names for {scores.shape[1]} columns, or two alike")
    values = {name: np.full(scores.shape[1], np.nan) for name in METRICS}
    if np.isfinite(scores).all():
        once = np.ones((1, len(scores)))
        for column in range(scores.shape[1]):
            finding = _finding_metrics(_Counts.of(scores[:, column], truth[:, column], once))
            for name in METRICS:
                values[name][column] = finding[name][0]
    positives = truth.sum(axis=0)
    result: dict[str, float] = {}
    for name in METRICS:
        result[f"macro_{name}"] = macro_average(values[name])
        result[f"weighted_{name}"] = weighted_average(values[name], positives)
    result["one_class_findings"] = float(np.sum((positives == 0) | (positives == len(scores))))
    for finding, value in zip(findings, values["auroc"], strict=True):
        result[f"auroc/{slug(finding)}"] = float(value)
    return result


def bootstrap_intervals(
    scores: ArrayLike, labels: ArrayLike, *, resamples: int = 1000, seed: int = 42, level: float = 0.95
) -> dict[str, float]:
    """Percentile intervals of the macro metrics over resampled cases.

    Cases (rows) are drawn with replacement; each resample is evaluated as a validation set of its own, with
    its own best threshold and its own one-class findings. Returns `macro_<metric>_ci_lower`, `_ci_upper` and
    `_ci_width`; NaN where no resample has a value or a score is not finite.

    Args:
      scores, labels: (N, F), as for `evaluate`.
      resamples, seed, level: how many, from which seed, and how much the interval covers.
    """
    scores, truth = _checked(scores, labels)
    number, findings = scores.shape
    macro = {name: np.full(resamples, np.nan) for name in METRICS}
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK // number)
    for start in range(0, resamples if np.isfinite(scores).all() else 0, chunk):
        size = min(chunk, resamples - start)
        # (size, N): how often each case was drawn; row r of the draw is counted in bins r·N … r·N + N - 1.
        drawn = rng.integers(0, number, (size, number)) + number * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * number).reshape(size, number).astype(float)
        totals, known = {name: np.zeros(size) for name in METRICS}, np.zeros(size)
        for column in range(findings):
            counts = _Counts.of(scores[:, column], truth[:, column], weights)
            known += ~counts.one_class
            for name, value in _finding_metrics(counts).items():
                totals[name] += np.nan_to_num(value)
        for name in METRICS:
            macro[name][start : start + size] = np.where(known, _ratio(totals[name], known), np.nan)
    result: dict[str, float] = {}
    tail = (1 - level) / 2
    for name, samples in macro.items():
        there = samples[~np.isnan(samples)]
        lower, upper = np.quantile(there, (tail, 1 - tail)) if there.size else (np.nan, np.nan)
        result[f"macro_{name}_ci_lower"] = float(lower)
        result[f"macro_{name}_ci_upper"] = float(upper)
        result[f"macro_{name}_ci_width"] = float(upper - lower)
    return result
