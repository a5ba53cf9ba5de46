"""`open_dataset`: the three sources behind one door, cached, picklable, without jax."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxablate.errors import UserError
from jaxablate.studies.ctclip.config import ClipData
from jaxablate.studies.ctclip.data import FINDINGS, Dataset, open_dataset
from jaxablate.studies.ctclip.data.phantom_set import phantom_split, write_nifti
from jaxablate.studies.ctclip.data.preprocess import Chain
from jaxablate.studies.ctclip.data.shard_writer import Sample, write_shards

CONFIG = ClipData(
    volume=(4, 12, 12),
    tokenizer="words",
    vocab_size=128,
    text_length=32,
    phantoms_train=6,
    phantoms_val=4,
    phantoms_seed=1,
)
CHAIN = Chain(CONFIG.volume, CONFIG.spacing, CONFIG.clip)


def contents(dataset: Dataset) -> list[bytes]:
    return [
        array.tobytes()
        for items in (dataset.train, dataset.val)
        for i in range(len(items))
        for array in items[i].values()
    ]


def from_nifti(folder: Path) -> ClipData:
    for split, count in (("train", CONFIG.phantoms_train), ("val", CONFIG.phantoms_val)):
        write_nifti(folder / split, CONFIG.phantoms_seed, split, count, CHAIN)
    return replace(CONFIG, source="nifti", train=str(folder / "train"), val=str(folder / "val"))


def from_shards(folder: Path) -> ClipData:
    for split, count in (("train", CONFIG.phantoms_train), ("val", CONFIG.phantoms_val)):
        made = phantom_split(CONFIG.phantoms_seed, split, count, CHAIN, folder / "made")
        samples = [
            Sample(name.split(".")[0], made.volumes.read(i), made.reports[i], made.labels[i])
            for i, name in enumerate(made.names)
        ]
        write_shards(folder / split, samples, per_shard=4)
    return replace(CONFIG, source="shards", train=str(folder / "train"), val=str(folder / "val"))


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return open_dataset(CONFIG, tmp_path_factory.mktemp("cache"))


def test_an_item_has_the_shapes_a_model_takes(phantoms):
    assert (len(phantoms.train), len(phantoms.val)) == (6, 4)
    item = phantoms.train[-1]
    assert {k: (v.shape, v.dtype.name) for k, v in item.items()} == {
        "image": ((4, 12, 12), "float32"),
        "text": ((32,), "int32"),
        "labels": ((18,), "float32"),
    }
    assert np.abs(item["image"]).max() <= 1
    assert phantoms.train.labels.shape == (6, 18)
    assert len(phantoms.train.reports) == 6
    np.testing.assert_array_equal(item["text"], phantoms.tokenizer.encode(phantoms.train.reports)[5])
    with pytest.raises(IndexError):
        phantoms.train[6]


def test_an_item_may_be_changed_without_harm(phantoms):
    before = phantoms.train[0]["image"].copy()
    phantoms.train[0]["image"][:] = 7
    np.testing.assert_array_equal(phantoms.train[0]["image"], before)


def test_prompts_are_36_different_questions(phantoms):
    assert phantoms.prompts.shape == (2, len(FINDINGS), 32)
    assert phantoms.prompts.dtype == np.int32
    assert len(np.unique(phantoms.prompts.reshape(36, -1), axis=0)) == 36
    assert not (phantoms.prompts == 1).any()
    assert phantoms.tokenizer.vocab_size <= CONFIG.vocab_size


@pytest.mark.parametrize("source", [from_nifti, from_shards])
def test_every_source_gives_the_same_items(phantoms, tmp_path, source):
    other = open_dataset(source(tmp_path / "data"), tmp_path / "cache", workers=1)
    assert contents(other) == contents(phantoms)
    np.testing.assert_array_equal(other.prompts, phantoms.prompts)
    assert (
        open_dataset(source(tmp_path / "data"), tmp_path / "other", workers=1).fingerprint
        == other.fingerprint
    )


def test_the_fingerprint_is_of_what_is_used(phantoms, tmp_path):
    assert open_dataset(CONFIG, tmp_path).fingerprint == phantoms.fingerprint
    changed = [
        replace(CONFIG, phantoms_seed=2),
        replace(CONFIG, phantoms_val=5),
        replace(CONFIG, volume=(4, 12, 14)),
        replace(CONFIG, text_length=30),
    ]
    prints = {open_dataset(config, tmp_path).fingerprint for config in changed}
    prints.add(open_dataset(CONFIG, tmp_path, prompt_style="original").fingerprint)
    assert len(prints | {phantoms.fingerprint}) == 6
    assert open_dataset(replace(CONFIG, train="unused"), tmp_path).fingerprint == phantoms.fingerprint


def test_items_pickle_small_and_read_the_same_elsewhere(phantoms):
    phantoms.train[0]  # opens the maps
    content = pickle.dumps(phantoms.train)
    assert len(content) < 2000 < phantoms.train[0]["image"].nbytes
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (there,) = pool.map(phantoms.train.__getitem__, [2])
    np.testing.assert_array_equal(there["image"], phantoms.train[2]["image"])


def test_a_second_opening_generates_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        open_dataset(CONFIG, tmp_path)
        assert caplog.text.count("generating") == 2
        caplog.clear()
        open_dataset(CONFIG, tmp_path)
    assert "generating" not in caplog.text


@pytest.mark.parametrize("pattern", ["phantoms/*/volumes.npy", "phantoms/*/texts.json", "text/*.npy"])
def test_a_damaged_cache_file_is_made_again(tmp_path, caplog, pattern):
    expected = contents(open_dataset(CONFIG, tmp_path))
    for path in tmp_path.glob(pattern):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING):
        again = open_dataset(CONFIG, tmp_path)
    assert "damaged" in caplog.text
    assert contents(again) == expected
    assert not [p for p in tmp_path.rglob(".*") if p.is_file() or p.is_dir()]  # no scratch left


def _open(cache: str) -> str:
    return open_dataset(CONFIG, Path(cache)).fingerprint


def test_two_processes_may_open_at_once(phantoms, tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_open, [str(tmp_path)] * 2, chunksize=1) == [phantoms.fingerprint] * 2


def test_the_package_imports_no_jax():
    code = "import sys, jaxablate.studies.ctclip.data as d; print(sorted({'jax', 'flax'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


FAULTS = [
    ({"source": "nifty"}, r"data\.source=nifty: unknown; did you mean 'nifti'\?"),
    ({"clip": "late"}, r"data\.clip=late: unknown"),
    ({"tokenizer": "word"}, r"data\.tokenizer=word: unknown; did you mean 'words'\?"),
    ({"volume": (0, 1, 1)}, r"data\.volume=\(0, 1, 1\): must be three"),
    ({"spacing": (1.0, -1.0, 1.0)}, r"data\.spacing=.*: must be three lengths"),
    ({"text_length": 2}, r"data\.text_length=2: must be at least 5"),
    ({"vocab_size": 10}, r"data\.vocab_size=10: the prompts alone need"),
    ({"phantoms_val": 0}, r"data\.phantoms_val=0: must be at least 1"),
    ({"phantoms_seed": -1}, r"data\.phantoms_seed=-1: must be 0 or more"),
    ({"source": "shards", "val": "x"}, r"data\.train is empty: data\.source=shards needs the folder"),
    ({"tokenizer": "wordpiece"}, r"data\.vocab_file is empty"),
]


@pytest.mark.parametrize("change, message", FAULTS)
def test_a_config_no_data_can_satisfy_is_refused(tmp_path, change, message):
    config = replace(CONFIG)
    for field, value in change.items():  # past the type checks that tests put on the constructor
        object.__setattr__(config, field, value)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(config, tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unknown_prompt_style_is_refused(tmp_path):
    with pytest.raises(UserError, match="prompt style 'originel': unknown; did you mean 'original'"):
        open_dataset(CONFIG, tmp_path, prompt_style="originel")


def test_a_sample_in_both_splits_is_refused(tmp_path):
    config = from_nifti(tmp_path / "data")
    config = replace(config, val=config.train)
    with pytest.raises(UserError, match=r"'train_1_a_1\.nii\.gz' \(6 in all\) is in data\.train="):
        open_dataset(config, tmp_path / "cache", workers=1)
