"""Phantoms are reproducible, have the promised findings, and a linear probe can see them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.stats import rankdata

from jaxablate.studies.ctclip.data.findings import FINDINGS, PROMPT_STYLES, prompts
from jaxablate.studies.ctclip.data.phantom_set import phantom_split
from jaxablate.studies.ctclip.data.phantoms import ABSENT_FROM_VAL, BLOBS, phantom
from jaxablate.studies.ctclip.data.preprocess import Chain
from jaxablate.studies.ctclip.data.text import build_words, split_words

CHAIN = Chain((12, 48, 48), (1.5, 0.75, 0.75))
ABSENT = FINDINGS.index(ABSENT_FROM_VAL)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    cache = tmp_path_factory.mktemp("phantoms")
    return {s: phantom_split(2025, s, n, CHAIN, cache) for s, n in (("train", 512), ("val", 128))}


def volumes(split) -> np.ndarray:
    return np.stack([split.volumes.read(i) for i in range(len(split.volumes))]).astype(np.float32)


def test_a_sample_is_a_pure_function_of_its_arguments():
    first = phantom(7, "train", 3, CHAIN)
    phantom(7, "train", 4, CHAIN)
    again = phantom(7, "train", 3, CHAIN)
    np.testing.assert_array_equal(first.raw, again.raw)
    assert (first.report, first.spacing) == (again.report, again.spacing)
    for other in (phantom(8, "train", 3, CHAIN), phantom(7, "val", 3, CHAIN), phantom(7, "train", 4, CHAIN)):
        assert other.raw.shape != first.raw.shape or (other.raw != first.raw).any()
        assert other.spacing != first.spacing


def test_a_longer_split_begins_with_the_shorter(tmp_path):
    short, long = (phantom_split(1, "train", n, CHAIN, tmp_path) for n in (3, 5))
    np.testing.assert_array_equal(volumes(short), volumes(long)[:3])
    assert short.reports == long.reports[:3]


def test_no_sample_is_in_both_splits(splits):
    seen = {v.tobytes() for v in volumes(splits["train"])}
    assert len(seen) == 512
    assert not seen & {v.tobytes() for v in volumes(splits["val"])}


def test_labels_have_the_promised_statistics(splits):
    train, val = splits["train"].labels, splits["val"].labels
    assert set(np.unique(train)) == {0.0, 1.0}
    declared = np.array([BLOBS[name].prevalence for name in FINDINGS])
    assert declared.min() >= 0.1
    assert declared.max() <= 0.4
    assert np.abs(train.mean(0) - declared).max() < 4 * np.sqrt(0.25 / 512)
    assert val.any(0).tolist() == [i != ABSENT for i in range(18)]
    assert train[:, ABSENT].any()
    correlation = np.corrcoef(train.T) - np.eye(18)
    assert np.abs(correlation).max() < 0.2  # independent; 4.5 standard errors of 512 samples


def test_reports_name_what_is_present_and_deny_only_what_is_absent(splits):
    denials = 0
    for labels, report in zip(splits["train"].labels, splits["train"].reports, strict=True):
        present = {name.lower() for name, label in zip(FINDINGS, labels, strict=True) if label}
        # longest names first: one finding's name is part of no other's sentence
        sentences = [s.lower() for s in report.split(". ")]
        denied = {n.lower() for n in FINDINGS for s in sentences if "no " in f"{s} " and n.lower() in s}
        named = {n.lower() for n in FINDINGS for s in sentences if n.lower() in s} - denied
        assert named == present
        assert not denied & present
        denials += bool(denied)
    assert 100 < denials < 412


def test_reports_fit_the_tiny_text_encoder(splits):
    every = [text for style in PROMPT_STYLES for side in prompts(style) for text in side]
    lengths = [len(split_words(report)) for report in splits["train"].reports]
    assert np.mean(np.array(lengths) + 2 <= 32) > 0.9
    words = build_words(splits["train"].reports, every, 128, 32)
    assert words.vocab_size < 128  # nothing was left out
    assert not (words.encode(splits["val"].reports) == 1).any()


def test_two_pairs_of_blobs_differ_in_one_thing():
    low, high = BLOBS["Atelectasis"], BLOBS["Consolidation"]
    assert low.h - high.h > 0.5
    assert dataclasses.replace(low, h=high.h) == high
    up, down = BLOBS["Peribronchial thickening"], BLOBS["Interlobular septal thickening"]
    assert up.layers != down.layers
    z = [layer[0] for layer in up.layers]
    assert dataclasses.replace(up, layers=tuple(zip(z, [g for _, g in up.layers[::-1]], strict=True))) == down


def test_the_z_order_pair_shows_in_z_and_hardly_in_the_mean_over_z(splits):
    split = splits["train"]
    pair = [FINDINGS.index(n) for n in ("Peribronchial thickening", "Interlobular septal thickening")]
    by_z = volumes(split)[:, :, 24:36, :12].mean((2, 3))  # the cell both are painted in
    neither = by_z[split.labels[:, pair].sum(1) == 0].mean(0)
    only = [by_z[(split.labels[:, f] == 1) & (split.labels[:, pair].sum(1) == 1)].mean(0) for f in pair]
    first, second = (shown - neither for shown in only)
    assert first[:4].mean() - first[8:].mean() > 0.03
    assert second[:4].mean() - second[8:].mean() < -0.03
    assert abs(first.mean() - second.mean()) < 0.01


def test_spacing_scaling_and_offset_vary():
    samples = [phantom(0, "train", i, CHAIN) for i in range(40)]
    assert len({s.spacing for s in samples}) == 40
    assert len({s.raw.shape for s in samples}) > 20
    medians = [np.median(s.prepared(CHAIN)[2:10, 8:40, 8:40].astype(np.float32)) for s in samples]
    assert np.std(medians) > 0.03  # 30 HU


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    ranks, positives = rankdata(scores), labels.sum()
    negatives = len(labels) - positives
    return (ranks[labels > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives)


def probe(train_x, train_y, val_x, val_y) -> float:
    """Macro AUROC on val of a ridge regression to the labels, findings with both classes only."""
    mean, std = train_x.mean(0), train_x.std(0)
    train_x, val_x = (train_x - mean) / std, (val_x - mean) / std
    weights = np.linalg.solve(train_x.T @ train_x + 10 * np.eye(train_x.shape[1]), train_x.T @ train_y)
    scores = val_x @ weights
    return float(np.mean([auroc(val_y[:, f], scores[:, f]) for f in range(18) if f != ABSENT]))


def test_a_linear_probe_of_patch_means_finds_the_findings_and_not_shuffled_ones(splits):
    def patches(split):
        return volumes(split).reshape(-1, 3, 4, 4, 12, 4, 12).mean((2, 4, 6)).reshape(-1, 48)

    train, val = splits["train"], splits["val"]
    x, x_val = patches(train), patches(val)
    assert probe(x, train.labels, x_val, val.labels) >= 0.95
    shuffled = np.random.default_rng(0).permutation(train.labels)
    assert 0.4 < probe(x, shuffled, x_val, val.labels) < 0.6


def test_labels_alone_do_not_leak_through_order(splits):
    position = np.arange(512, dtype=np.float32)[:, None] + np.random.default_rng(0).random((512, 1))
    train, val = splits["train"], splits["val"]
    assert 0.35 < probe(position, train.labels, position[:128], val.labels) < 0.65
