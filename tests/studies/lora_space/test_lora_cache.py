"""Features on disk: found by what they are made of, proved when they are found, and normalised as it says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from jaxablate import cache
from jaxablate.errors import UserError
from jaxablate.studies.lora_space.config import LoraSpaceData
from jaxablate.studies.lora_space.data import describe, names, open_adapters, open_reader
from jaxablate.studies.lora_space.data.synthetic import Synthetic
from jaxablate.studies.lora_space.features import descriptors, features, store

DATA = LoraSpaceData(architecture="tiny", samples=40, classes=3, representation="stats")


def opened(data, tmp_path, **more):
    return open_adapters(data, tmp_path, **{"eval_batch_size": 16, "workers": 2, **more})


def test_a_second_opening_finds_what_the_first_made(tmp_path):
    first, second = opened(DATA, tmp_path), opened(DATA, tmp_path)
    assert (first.cached, second.cached) == (False, True)
    assert first.features == second.features and first.fingerprint == second.fingerprint
    about = json.loads((first.features.parent / "about.json").read_text())
    assert about["representation"] == "stats"
    tensors = list(describe(DATA).tensors)
    assert about["legacy_key"] == store.legacy_key("synthetic", "stats", "all_layers", tensors)
    assert about["legacy_key"] != store.legacy_key("1k", "stats", "all_layers", tensors)


def test_what_is_kept_is_what_is_computed_in_one_go(tmp_path, monkeypatch):
    """Also in many short stretches, the last of which overlaps the one before."""
    whole = np.load(opened(DATA, tmp_path / "whole").features)
    weights = open_reader(DATA, tmp_path, 1).read(0, 40, sorted(names.unet_shapes("tiny", 1)), 1)
    np.testing.assert_array_equal(whole, features(weights, ["stats"])["stats"])
    monkeypatch.setattr(store, "AT_ONCE", 7 * 4 * sum(v[0].size for v in weights.values()))
    pieces = np.load(opened(DATA, tmp_path / "pieces").features)
    np.testing.assert_allclose(pieces, whole, rtol=1e-6, atol=1e-7)


def counted(monkeypatch) -> list[int]:
    """Filled with the number of adapters of each reading."""
    read, counts = Synthetic.read, []

    def reading(self, start, stop, *args):
        counts.append(stop - start)
        return read(self, start, stop, *args)

    monkeypatch.setattr(Synthetic, "read", reading)
    return counts


def test_adapters_are_read_once_for_all_arms(tmp_path, monkeypatch):
    """A representation of other tensors takes its columns from what the first arm found; a second run only proves."""
    counts = counted(monkeypatch)
    arms = [
        replace(DATA, representation=one, tensors=tensors)
        for one in ("stats", "ensemble", "info_theoretic")
        for tensors in ("all_layers", "visual_only")
    ]
    found = [opened(arm, tmp_path) for arm in arms]
    assert sum(counts) == 40 and not any(one.cached for one in found)
    counts.clear()
    monkeypatch.setattr(store, "_stream", None)  # whoever computed all anew would call it
    assert all(opened(arm, tmp_path).cached for arm in arms)
    assert sum(counts) == len(arms) * store.PROVED


@pytest.mark.parametrize("tensors", ["all_layers", "visual_only"])
def test_columns_that_are_taken_are_those_of_the_tensors_by_themselves(tmp_path, tensors):
    data = replace(DATA, representation="ensemble", tensors=tensors, rank=2)
    kept = np.load(opened(data, tmp_path).features)
    chosen = sorted(describe(data).tensors)
    weights = open_reader(data, tmp_path, 1).read(0, 40, chosen, 1)
    np.testing.assert_allclose(kept, features(weights, ["ensemble"])["ensemble"], rtol=1e-5, atol=1e-6)


CHANGES = {
    "seed": {"seed": 1},
    "samples": {"samples": 41},
    "representation": {"representation": "spectral"},
    "tensors": {"tensors": "text_only"},
    "share": {"sample_layers": 0.5},
    "rank": {"rank": 2},
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_adapters_tensors_or_features_are_other_keys(tmp_path, what):
    first = opened(DATA, tmp_path)
    other = opened(replace(DATA, **CHANGES[what]), tmp_path)
    assert not other.cached and other.features != first.features and other.fingerprint != first.fingerprint


def test_the_version_of_the_code_is_in_the_key(tmp_path, monkeypatch):
    opened(DATA, tmp_path)
    monkeypatch.setattr(descriptors, "VERSION", descriptors.VERSION + 1)
    assert not opened(DATA, tmp_path).cached


def test_the_variant_is_in_the_key_of_what_has_a_condition_number(tmp_path):
    spectral = replace(DATA, representation="spectral")
    first = opened(spectral, tmp_path)
    assert not opened(replace(spectral, spectral_variant="original"), tmp_path).cached
    assert first.features != opened(replace(spectral, spectral_variant="original"), tmp_path).features
    opened(DATA, tmp_path)
    assert opened(replace(DATA, spectral_variant="original"), tmp_path).cached


@pytest.mark.parametrize("change", [{"split_seed": 7}, {"split": "stratified"}, {"normalise": "biased"}])
def test_the_split_changes_the_scale_and_the_fingerprint_but_not_the_features(tmp_path, change):
    first, other = opened(DATA, tmp_path), opened(replace(DATA, **change), tmp_path)
    assert other.cached and other.features == first.features
    assert other.scale != first.scale and other.fingerprint != first.fingerprint


def test_features_of_other_adapters_in_the_right_place_are_noticed(tmp_path):
    """A valid folder with wrong content, as a mistake in a key would give it."""
    first = opened(DATA, tmp_path)
    other = opened(replace(DATA, seed=1), tmp_path)
    shutil.rmtree(first.features.parent)
    shutil.copytree(other.features.parent, first.features.parent)
    with pytest.raises(UserError, match="are not what is computed") as caught:
        opened(DATA, tmp_path)
    assert str(first.features) in str(caught.value) and "\n" not in str(caught.value)


def test_a_single_changed_row_that_is_looked_at_is_noticed(tmp_path):
    place = opened(DATA, tmp_path).features.parent
    values = np.load(place / store.FEATURES)
    values[-1] *= 1.002
    shutil.rmtree(place)
    cache.built_folder(place, lambda scratch: np.save(scratch / store.FEATURES, values))
    with pytest.raises(UserError, match="delete its folder"):
        opened(DATA, tmp_path)


@pytest.mark.parametrize("when", ["made", "found"])
def test_the_adapter_whose_features_overflow_is_named(tmp_path, monkeypatch, when):
    """Also if it is one of those few whose features are computed again, which do not lie side by side."""
    if when == "found":
        opened(DATA, tmp_path)
    read, odd = Synthetic.read, len(open_reader(DATA, tmp_path, 1).labels) // 2

    def reading(self, start, stop, *args):
        return {
            name: np.where((np.arange(start, stop) == odd).reshape(-1, 1, 1), np.float32(1e30), values)
            for name, values in read(self, start, stop, *args).items()
        }

    monkeypatch.setattr(Synthetic, "read", reading)
    with pytest.raises(UserError, match=rf"adapter {odd}\b.* overflows"):
        opened(DATA, tmp_path)


def test_damaged_features_are_made_again(tmp_path, caplog):
    first = opened(DATA, tmp_path)
    before = first.features.read_bytes()
    first.features.write_bytes(before[:-4] + b"\0\0\0\1")
    again = opened(DATA, tmp_path)
    assert not again.cached and "damaged" in caplog.text
    assert again.features.read_bytes() == before


@pytest.mark.parametrize("how", ["unbiased", "biased"])
def test_columns_are_normalised_by_the_training_adapters(tmp_path, how):
    source = opened(replace(DATA, normalise=how), tmp_path)
    raw = np.load(source.features).astype(np.float64)
    train = raw[source.parts.train]
    std = train.std(axis=0, ddof=1) + 1e-8 if how == "unbiased" else train.std(axis=0)
    expected = (raw - train.mean(axis=0)) / std
    got = np.stack([source.train[i]["x"] for i in range(len(source.train))])
    np.testing.assert_allclose(got, expected[source.parts.train], rtol=1e-4, atol=1e-4)
    everything = np.concatenate([batch["x"] for batch in source.all_parts])
    np.testing.assert_allclose(everything, expected[np.concatenate(source.parts.parts)], rtol=1e-4, atol=1e-4)
    others = everything[len(source.train) :]
    assert abs(others.mean(axis=0)).max() > 0.1  # of the training adapters, not of all
    validation = np.concatenate([batch["x"] for batch in source.evaluation])
    np.testing.assert_array_equal(validation, others[: len(validation)])


def test_near_constant_columns_are_counted_and_zero(tmp_path):
    """A vector's share of its one singular value is 1 up to rounding; divided by its deviation it would be noise."""
    source = opened(replace(DATA, representation="spectral"), tmp_path)
    raw = np.load(source.features)[source.parts.train].astype(np.float64)
    jitter = raw.std(axis=0, ddof=1) <= 1e-6 * np.abs(raw.mean(axis=0))
    assert source.near_constant == jitter.sum() > 0
    x = np.stack([source.train[i]["x"] for i in range(len(source.train))])
    assert (x[:, jitter] == 0).all() and x.shape[1] == source.dim
    informative = x[:, ~jitter]
    assert (informative.std(axis=0) > 0.1).sum() >= 32 * 2  # the norm, and what follows from it
    assert opened(DATA, tmp_path).near_constant == 0


def test_moments_in_pieces_are_those_of_the_whole(monkeypatch):
    values = (1e4 + np.random.default_rng(0).standard_normal((101, 6))).astype(np.float32)
    monkeypatch.setattr(store, "AT_ONCE", 8 * 6 * 9)
    mean, squares = store._moments(values, np.arange(0, 101, 2))
    part = values[::2].astype(np.float64)
    np.testing.assert_allclose(mean, part.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(squares, part.var(axis=0) * len(part), rtol=1e-9)
