"""Which adapters are trained on: the document's indices, and what a stratified split promises."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from jaxablate.studies.lora_space.data import names
from jaxablate.studies.lora_space.data.split import remarks, split
from jaxablate.studies.lora_space.features.store import legacy_key

KEYS = {
    ("50k", "spectral", "all_layers"): "c569fac5bea30f42e953985b197f741b",
    ("1k", "spectral", "all_layers"): "e55f8430e2b5ca5e7497e90e75df710c",
    ("1k", "spectral", "visual_only"): "b558b5b884ebb7d828a5c7cea2729042",
    ("1k", "simple_stats", "all_layers"): "580967931927107bd65815a525b2f39e",
    ("1k", "ensemble", "all_layers"): "064a22ca2bc88f133acf7215badc547c",
}


@pytest.mark.parametrize(("dataset", "representation", "configuration"), KEYS)
def test_the_documents_keys(dataset, representation, configuration):
    tensors = [n for n in names.unet_shapes("sd15", 1) if configuration == "all_layers" or ".attn1." in n]
    found = legacy_key(dataset, representation, configuration, reversed(tensors))
    assert found == KEYS[dataset, representation, configuration]
    assert legacy_key(dataset, representation, configuration, tensors[1:]) != found


def test_the_keys_string_has_the_documents_length():
    text = "50k_spectral_all_layers_" + "_".join(sorted(names.unet_shapes("sd15", 1)))
    assert len(text) == 10_087
    assert hashlib.md5(text.encode()).hexdigest() == KEYS["50k", "spectral", "all_layers"]


SIZES = {
    11: (7, 1, 3),
    100: (70, 9, 21),
    1000: (700, 99, 201),
    10_000: (7000, 989, 2011),
    50_000: (35000, 4950, 10050),
}


@pytest.mark.parametrize("how", ["unstratified", "stratified"])
@pytest.mark.parametrize("count", SIZES)
def test_sizes_are_the_documents_and_every_adapter_is_in_one_part(count, how):
    parts = split(np.arange(count) % 10, how, 42).parts
    assert tuple(len(rows) for rows in parts) == SIZES[count]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(count))


def test_the_documents_indices():
    found = split(np.zeros(1000, int), "unstratified", 42)
    assert found.train[:5].tolist() == [868, 798, 164, 244, 829]
    assert found.validation[:3].tolist() == [107, 614, 671]
    assert found.test[:3].tolist() == [678, 937, 427]


@pytest.mark.parametrize("how", ["unstratified", "stratified"])
def test_the_seed_decides_the_split(how):
    labels = np.arange(200) % 7
    once, again, other = (split(labels, how, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(once.parts, again.parts, strict=True))
    assert not np.array_equal(once.train, other.train)


def test_a_stratified_split_has_each_category_at_its_share():
    """Of a rare category too, of which an unstratified one loses or gains a quarter."""
    labels = np.repeat(np.arange(4), (400, 300, 200, 100))
    for seed in range(5):
        found = split(labels, "stratified", seed)
        for label in range(4):
            total = np.sum(labels == label)
            for rows in found.parts:
                assert abs(np.sum(labels[rows] == label) - total * len(rows) / 1000) <= 1
    uneven = [abs(np.sum(labels[split(labels, "unstratified", s).test] == 3) - 20.1) for s in range(5)]
    assert max(uneven) > 2


def test_ten_adapters_are_all_parts_and_no_measurement():
    labels = np.arange(10) % 2
    found = split(labels, "unstratified", 42)
    assert all(np.array_equal(rows, np.arange(10)) for rows in found.parts)
    (said,) = remarks(labels, found, ("a", "b"))
    assert "not a measurement" in said and "10 adapters" in said
    eleven = np.arange(11) % 2
    assert list(remarks(eleven, split(eleven, "unstratified", 42), ("a", "b"))) == []


def test_a_category_that_training_lacks_is_named():
    labels = np.zeros(40, int)
    labels[split(labels, "unstratified", 42).test[:2]] = 1
    (said,) = remarks(labels, split(labels, "unstratified", 42), ("ship", "snake"))
    assert "'snake'" in said and "not a measurement" in said and "\n" not in said
