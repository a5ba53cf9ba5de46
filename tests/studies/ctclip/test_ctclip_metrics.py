"""Zero-shot metrics against the specification's golden values and against brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxablate.studies.ctclip import metrics

# Specification §9.
Y = [0, 0, 1, 1, 0, 1, 0, 1]
S = [0.1, 0.4, 0.35, 0.8, 0.4, 0.9, 0.2, 0.4]

# Few distinct scores, so that ties are the rule and not the exception.
scores_with_ties = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1)
cases = st.lists(st.tuples(scores_with_ties, st.booleans()), min_size=2, max_size=25)


def split(pairs: list[tuple[float, bool]]) -> tuple[list[float], list[int]]:
    scores, labels = [score for score, _ in pairs], [int(label) for _, label in pairs]
    assume(0 < sum(labels) < len(labels))
    return scores, labels


# ------------------------------------------------------------------------------------- golden values


def test_golden_of_one_finding() -> None:
    assert metrics.auroc(S, Y) == pytest.approx(0.8125, rel=1e-12)
    assert metrics.auprc(S, Y) == pytest.approx(0.8166667, rel=1e-7)
    f1, threshold = metrics.best_f1(S, Y)
    assert f1 == pytest.approx(0.8, rel=1e-9)
    assert threshold == 0.35
    assert f1 < 0.8, "the 1e-10 in the denominator"
    threshold, weighted, binary = metrics.original_f1(S, Y)
    assert threshold == pytest.approx(0.797980, rel=1e-6)
    assert (weighted, binary) == (pytest.approx(0.733333, rel=1e-6), pytest.approx(0.666667, rel=1e-6))


def test_golden_at_one_half() -> None:
    result = metrics.evaluate(np.array(S)[:, None], np.array(Y)[:, None], ["x"])
    assert result["macro_precision"] == 1.0
    assert result["macro_recall"] == 0.5
    assert result["macro_specificity"] == 1.0
    assert result["macro_accuracy"] == 0.75
    assert result["macro_f1_original"] == pytest.approx(0.733333, rel=1e-6)


@pytest.mark.parametrize("temperature, score", [(math.e, 0.626323), (10.0, 0.869892)])
def test_golden_pair_score(temperature: float, score: float) -> None:
    """The similarities are .31 and .12."""
    image = np.array([[1.0, 0.0]])
    prompts = np.array([[[0.31, math.sqrt(1 - 0.31**2)]], [[0.12, math.sqrt(1 - 0.12**2)]]])
    assert metrics.zero_shot_scores(image, prompts, temperature) == pytest.approx(score, rel=1e-5)


def test_golden_averages() -> None:
    values, positives = [0.9, 0.6, math.nan], [10, 30, 0]
    assert metrics.macro_average(values) == pytest.approx(0.75)
    assert metrics.weighted_average(values, positives) == pytest.approx(0.675)


def test_all_negative_predictions_score_well_by_the_original_rule() -> None:
    """§8.7: at 15 % prevalence an answer that never finds anything has a support-weighted F1 of .781."""
    labels = np.array([1] * 15 + [0] * 85)
    f1_negative = 2 * 85 / (2 * 85 + 15)
    assert 0.85 * f1_negative == pytest.approx(0.781, abs=5e-4)
    # Constant scores tie at every threshold below and at every one above; the last is all negative.
    _, weighted, binary = metrics.original_f1(np.full(100, 0.3), labels)
    assert weighted == pytest.approx(0.781, abs=5e-4)
    assert binary == 0.0


# ------------------------------------------------------------------------------------------- oracles


def brute_auroc(scores: list[float], labels: list[int]) -> float:
    pairs = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for (p, is_p), (n, is_n) in itertools.product(zip(scores, labels, strict=True), repeat=2)
        if is_p and not is_n
    ]
    return sum(pairs) / len(pairs)


def brute_confusion(predicted: list[bool], labels: list[int]) -> tuple[int, int, int, int]:
    pairs = list(zip(predicted, labels, strict=True))
    counts = [
        sum(1 for p, y in pairs if (p, y) == kind) for kind in ((True, 1), (True, 0), (False, 1), (False, 0))
    ]
    return counts[0], counts[1], counts[2], counts[3]


def brute_curve(scores: list[float], labels: list[int]) -> list[tuple[float, float, float]]:
    """(threshold, precision, recall), thresholds descending."""
    curve = []
    for threshold in sorted(set(scores), reverse=True):
        tp, fp, fn, _ = brute_confusion([score >= threshold for score in scores], labels)
        curve.append((threshold, tp / (tp + fp), tp / (tp + fn)))
    return curve


def brute_ap(scores: list[float], labels: list[int]) -> float:
    total, before = 0.0, 0.0
    for _, precision, recall in brute_curve(scores, labels):
        total += (recall - before) * precision
        before = recall
    return total


def brute_best_f1(scores: list[float], labels: list[int]) -> float:
    return max(2 * p * r / (p + r + 1e-10) for _, p, r in brute_curve(scores, labels))


def brute_f1(tp: int, fp: int, fn: int) -> float:
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0


def brute_original(scores: list[float], labels: list[int]) -> tuple[float, float, float]:
    """As a loop: `<=` keeps the last of equal distances."""
    best, chosen = math.inf, 0.0
    for threshold in np.linspace(0, 1, 100):
        tp, fp, fn, tn = brute_confusion([score > threshold for score in scores], labels)
        distance = math.sqrt((1 - tp / (tp + fn)) ** 2 + (fp / (fp + tn)) ** 2)
        if distance <= best:
            best, chosen = distance, float(threshold)
    tp, fp, fn, tn = brute_confusion([score > chosen for score in scores], labels)
    positive, negative = brute_f1(tp, fp, fn), brute_f1(tn, fn, fp)
    return chosen, (positive * (tp + fn) + negative * (tn + fp)) / len(labels), positive


@given(cases)
def test_auroc_equals_brute_force(pairs: list[tuple[float, bool]]) -> None:
    scores, labels = split(pairs)
    assert metrics.auroc(scores, labels) == pytest.approx(brute_auroc(scores, labels), abs=1e-12)


@given(cases)
def test_auroc_equals_the_rank_sum(pairs: list[tuple[float, bool]]) -> None:
    from scipy.stats import rankdata

    scores, labels = split(pairs)
    ranks, truth = rankdata(scores), np.array(labels, bool)
    positives, negatives = truth.sum(), (~truth).sum()
    expected = (ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives)
    assert metrics.auroc(scores, labels) == pytest.approx(expected, abs=1e-12)


@given(cases)
def test_average_precision_equals_brute_force(pairs: list[tuple[float, bool]]) -> None:
    scores, labels = split(pairs)
    assert metrics.auprc(scores, labels) == pytest.approx(brute_ap(scores, labels), abs=1e-12)


@given(cases)
def test_best_f1_equals_brute_force(pairs: list[tuple[float, bool]]) -> None:
    scores, labels = split(pairs)
    f1, threshold = metrics.best_f1(scores, labels)
    assert f1 == pytest.approx(brute_best_f1(scores, labels), abs=1e-12)
    reached = [p for p in brute_curve(scores, labels) if p[0] == threshold]
    assert 2 * reached[0][1] * reached[0][2] / (reached[0][1] + reached[0][2] + 1e-10) == pytest.approx(f1)


@given(cases)
def test_the_original_rule_equals_a_loop(pairs: list[tuple[float, bool]]) -> None:
    scores, labels = split(pairs)
    assert metrics.original_f1(scores, labels) == pytest.approx(brute_original(scores, labels), abs=1e-12)


@given(cases)
def test_the_numbers_at_one_half_equal_brute_force(pairs: list[tuple[float, bool]]) -> None:
    scores, labels = split(pairs)
    result = metrics.evaluate(np.array(scores)[:, None], np.array(labels)[:, None], ["x"])
    tp, fp, fn, tn = brute_confusion([score >= 0.5 for score in scores], labels)
    assert result["macro_precision"] == pytest.approx(tp / (tp + fp) if tp + fp else 0.0)
    assert result["macro_recall"] == pytest.approx(tp / (tp + fn))
    assert result["macro_specificity"] == pytest.approx(tn / (tn + fp))
    assert result["macro_accuracy"] == pytest.approx((tp + tn) / len(labels))


@given(cases)
def test_a_monotone_change_of_the_scores_changes_no_rank_metric(pairs: list[tuple[float, bool]]) -> None:
    scores, labels = split(pairs)
    halves = np.array(scores) / 2  # exact, so no tie is made or broken
    assume(len(set(halves.tolist())) == len(set(scores)))
    assert metrics.auroc(halves, labels) == metrics.auroc(scores, labels)
    assert metrics.auprc(halves, labels) == metrics.auprc(scores, labels)
    assert metrics.auroc(-np.array(scores), labels) == pytest.approx(1 - metrics.auroc(scores, labels))


def auroc_that_ignores_ties(scores: list[float], labels: list[int]) -> float:
    ranks, truth = np.argsort(np.argsort(scores, kind="stable")) + 1.0, np.array(labels, bool)
    positives, negatives = truth.sum(), (~truth).sum()
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def ap_with_a_threshold_for_each_case(scores: list[float], labels: list[int]) -> float:
    hits = np.array(labels, bool)[np.argsort(-np.array(scores), kind="stable")]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


def f1_at_one_half(scores: list[float], labels: list[int]) -> float:
    tp, fp, fn, _ = brute_confusion([score >= 0.5 for score in scores], labels)
    return brute_f1(tp, fp, fn)


def original_with(inclusive: bool, first: bool) -> Any:
    def rule(scores: list[float], labels: list[int]) -> float:
        best, chosen = math.inf, 0.0
        for threshold in np.linspace(0, 1, 100):
            predicted = [score >= threshold if inclusive else score > threshold for score in scores]
            tp, fp, fn, tn = brute_confusion(predicted, labels)
            distance = math.sqrt((1 - tp / (tp + fn)) ** 2 + (fp / (fp + tn)) ** 2)
            if distance < best or (distance == best and not first):
                best, chosen = distance, float(threshold)
        return chosen

    return rule


@pytest.mark.parametrize(
    "broken, right",
    [
        (auroc_that_ignores_ties, metrics.auroc),
        (ap_with_a_threshold_for_each_case, metrics.auprc),
        (f1_at_one_half, lambda s, y: metrics.best_f1(s, y)[0]),
        (original_with(inclusive=True, first=False), lambda s, y: metrics.original_f1(s, y)[0]),
        (original_with(inclusive=False, first=True), lambda s, y: metrics.original_f1(s, y)[0]),
    ],
)
def test_the_usual_mistakes_are_seen(broken: Any, right: Any) -> None:
    """Negative controls: cases like those above tell each mistake from the definition."""
    rng = np.random.default_rng(0)
    gaps = []
    for _ in range(100):
        scores = rng.choice([0.0, 0.1, 0.25, 0.5, 0.75, 1.0], 12).tolist()
        labels = rng.permutation([0] * 6 + [1] * 6).tolist()
        gaps.append(abs(broken(scores, labels) - right(scores, labels)))
    assert max(gaps) > 1e-3


# ------------------------------------------------------------------------------------------- scores


def softmax_scores(image: Any, prompts: Any, temperature: float) -> np.ndarray:
    logits = temperature * np.einsum("nd,kfd->knf", image, prompts)
    logits -= logits.max(axis=0)
    return (np.exp(logits) / np.exp(logits).sum(axis=0))[0]


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, math.e, 14.3, 1e3, 1e6])
def test_scores_equal_the_softmax_and_are_stable(temperature: float) -> None:
    rng = np.random.default_rng(0)
    image, prompts = unit(rng, 7, 12), unit(rng, 2, 18, 12)
    with np.errstate(all="raise", under="ignore"):
        scores = metrics.zero_shot_scores(image, prompts, temperature)
    assert scores.shape == (7, 18)
    assert scores.dtype == np.float64
    assert scores == pytest.approx(softmax_scores(image, prompts, temperature), abs=1e-9)
    swapped = metrics.zero_shot_scores(image, prompts[::-1], temperature)
    assert swapped == pytest.approx(1 - scores, abs=1e-12)


def test_wrong_shapes_are_refused() -> None:
    for image, prompts in (((3, 4), (2, 18, 5)), ((3, 4), (3, 18, 4)), ((3,), (2, 18, 3))):
        with pytest.raises(ValueError, match="expected"):
            metrics.zero_shot_scores(np.zeros(image), np.zeros(prompts), 1.0)


# ----------------------------------------------------------------------------------------- evaluate

NAMES = ["Medical material", "Lung nodule", "Consolidation", "Emphysema"]


def example(n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 4)) < [0.2, 0.4, 0.3, 0.5]).astype(np.float32)
    scores = np.round(np.clip(0.35 * labels + 0.6 * rng.random((n, 4)), 0, 1), 2)
    return scores, labels


def test_the_keys() -> None:
    scores, labels = example()
    result = metrics.evaluate(scores, labels, NAMES)
    averages = {f"{kind}_{name}" for kind in ("macro", "weighted") for name in metrics.METRICS}
    assert set(result) == averages | {"one_class_findings"} | {
        "auroc/medical_material", "auroc/lung_nodule", "auroc/consolidation", "auroc/emphysema"
    }  # fmt: skip
    assert all(type(value) is float for value in result.values())
    assert result["one_class_findings"] == 0
    each = [metrics.auroc(scores[:, i], labels[:, i]) for i in range(4)]
    assert result["macro_auroc"] == pytest.approx(np.mean(each))
    assert result["weighted_auroc"] == pytest.approx(np.average(each, weights=labels.sum(axis=0)))


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_a_one_class_finding_is_counted_and_never_averaged_in(constant: float) -> None:
    scores, labels = example()
    expected = metrics.evaluate(scores[:, :3], labels[:, :3], NAMES[:3])
    labels[:, 3] = constant
    result = metrics.evaluate(scores, labels, NAMES)
    assert result["one_class_findings"] == 1
    assert math.isnan(result["auroc/emphysema"])
    for name in metrics.METRICS:
        assert result[f"macro_{name}"] == pytest.approx(expected[f"macro_{name}"])
        assert result[f"weighted_{name}"] == pytest.approx(expected[f"weighted_{name}"])


def test_with_one_class_everywhere_there_is_no_number() -> None:
    scores, labels = example()
    result = metrics.evaluate(scores, np.zeros_like(labels), NAMES)
    assert result.pop("one_class_findings") == 4
    assert all(math.isnan(value) for value in result.values())
    assert math.isnan(metrics.auroc([0.1, 0.2], [1, 1]))
    assert math.isnan(metrics.best_f1([0.1], [0])[0])
    assert all(
        map(math.isnan, metrics.bootstrap_intervals(scores, np.zeros_like(labels), resamples=9).values())
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_model_has_no_score(bad: float) -> None:
    scores, labels = example()
    scores[3, 2] = bad
    result = metrics.evaluate(scores, labels, NAMES)
    assert result["one_class_findings"] == 0
    assert all(math.isnan(value) for key, value in result.items() if key != "one_class_findings")
    assert all(map(math.isnan, metrics.bootstrap_intervals(scores, labels, resamples=9).values()))
    with pytest.raises(ValueError, match="finite"):
        metrics.auroc(scores[:, 2], labels[:, 2])


def test_wrong_input_is_refused() -> None:
    scores, labels = example()
    for args in (
        (scores[:5], labels, NAMES),
        (scores, labels, NAMES[:3]),
        (scores, labels, [*NAMES[:3], "lung  NODULE"]),
        (scores, labels * 2, NAMES),
        (scores, labels - 1.0, NAMES),
        (scores[:0], labels[:0], NAMES),
    ):
        with pytest.raises(ValueError, match=r"scores|labels|findings"):
            metrics.evaluate(*args)


def test_the_order_of_the_cases_does_not_matter() -> None:
    scores, labels = example()
    shuffled = np.random.default_rng(1).permutation(len(scores))
    one = metrics.evaluate(scores, labels, NAMES)
    other = metrics.evaluate(scores[shuffled], labels[shuffled], NAMES)
    assert one == pytest.approx(other, rel=1e-12)


def test_chance_is_one_half_and_the_labels_themselves_are_one() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random((4000, 4)) < 0.3
    result = metrics.evaluate(rng.random((4000, 4)), labels, NAMES)
    assert result["macro_auroc"] == pytest.approx(0.5, abs=0.02)
    assert result["macro_auprc"] == pytest.approx(0.3, abs=0.03)
    perfect = metrics.evaluate(labels.astype(float), labels, NAMES)
    assert perfect["macro_auroc"] == perfect["macro_auprc"] == perfect["macro_f1_original"] == 1.0


# ---------------------------------------------------------------------------------------- bootstrap


def test_bootstrap_equals_evaluating_each_resample() -> None:
    """The counting shortcut against `evaluate` on the resampled arrays, one-class cases included."""
    scores, labels = example(n=9)
    resamples = 40
    got = metrics.bootstrap_intervals(scores, labels, resamples=resamples, seed=7)
    drawn = np.random.default_rng(7).integers(0, 9, (resamples, 9))
    each = [metrics.evaluate(scores[rows], labels[rows], NAMES) for rows in drawn]
    assert any(result["one_class_findings"] for result in each)
    for name in metrics.METRICS:
        values = [result[f"macro_{name}"] for result in each]
        lower, upper = np.nanquantile(values, (0.025, 0.975))
        assert got[f"macro_{name}_ci_lower"] == pytest.approx(lower, abs=1e-12)
        assert got[f"macro_{name}_ci_upper"] == pytest.approx(upper, abs=1e-12)


def test_bootstrap_has_width_and_holds_the_estimate() -> None:
    """The original resamples, and then evaluates the full set again: width 0 (§8.14)."""
    scores, labels = example()
    result, intervals = metrics.evaluate(scores, labels, NAMES), metrics.bootstrap_intervals(scores, labels)
    assert set(intervals) == {
        f"macro_{name}_ci_{end}" for name in metrics.METRICS for end in ("lower", "upper", "width")
    }
    for name in metrics.METRICS:
        lower, upper = intervals[f"macro_{name}_ci_lower"], intervals[f"macro_{name}_ci_upper"]
        assert intervals[f"macro_{name}_ci_width"] == upper - lower > 0
        if name not in ("f1", "f1_original"):  # tuned on each resample, so biased upwards
            assert lower < result[f"macro_{name}"] < upper
    assert intervals == metrics.bootstrap_intervals(scores, labels)
    assert intervals != metrics.bootstrap_intervals(scores, labels, seed=43)


def test_bootstrap_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels = example(n=30)
    whole = metrics.bootstrap_intervals(scores, labels, resamples=50)
    monkeypatch.setattr(metrics, "CHUNK", 30 * 7)
    assert metrics.bootstrap_intervals(scores, labels, resamples=50) == whole


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_more_cases_make_a_narrower_interval(seed: int) -> None:
    few, many = (metrics.bootstrap_intervals(*example(n, seed), resamples=100) for n in (40, 640))
    assert many["macro_auroc_ci_width"] < few["macro_auroc_ci_width"]


def test_the_slug() -> None:
    assert metrics.slug("Arterial wall calcification") == "arterial_wall_calcification"


def test_the_specifications_findings_have_slugs_of_their_own() -> None:
    from jaxablate.studies.ctclip.data.findings import FINDINGS

    assert len({metrics.slug(name) for name in FINDINGS}) == len(FINDINGS) == 18
