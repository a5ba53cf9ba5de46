"""The opened data as the training loop uses it, the rules of its config, and the choice of tensors."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from jaxablate.data import Several
from jaxablate.errors import UserError
from jaxablate.rules import enforce
from jaxablate.studies.lora_space import metrics
from jaxablate.studies.lora_space.config import LoraSpaceData
from jaxablate.studies.lora_space.data import describe, names, open_adapters, rules
from jaxablate.studies.lora_space.features import feature_dim
from jaxablate.task import Source

DATA = LoraSpaceData(architecture="tiny", samples=40, classes=3, representation="simple_stats")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_adapters(DATA, tmp_path_factory.mktemp("cache"), eval_batch_size=16, workers=2)


def test_it_is_a_source(source):
    assert isinstance(source, Source)
    item = source.train[3]
    assert {key: (value.shape, value.dtype) for key, value in item.items()} == {
        "x": ((source.dim,), np.float32),
        "label": ((), np.int32),
    }
    assert source.dim == feature_dim(describe(DATA).tensors, DATA.representation)
    assert len(source.train) == 28 and item["label"] == source.labels[source.parts.train[3]]
    with pytest.raises(IndexError):
        source.train[28]


def test_evaluation_is_of_validation_alone_and_the_end_of_every_adapter_once(source):
    (during,) = source.evaluation
    assert during["split"].tolist() == [1] * 3
    batches = list(source.all_parts)
    assert [len(batch["x"]) for batch in batches] == [16, 16, 8] and len(source.all_parts) == 3
    assert set(batches[0]) == {"x", "label", "split"}
    split = np.concatenate([batch["split"] for batch in batches])
    assert np.bincount(split).tolist() == [28, 3, 9]
    labels = np.concatenate([batch["label"] for batch in batches])
    np.testing.assert_array_equal(labels[split == 2], source.labels[source.parts.test])
    np.testing.assert_array_equal(during["x"], np.concatenate([b["x"] for b in batches])[split == 1])
    np.testing.assert_array_equal(source.all_parts[-1]["x"], batches[2]["x"])
    with pytest.raises(IndexError):
        source.all_parts[3]


def test_several_rows_are_what_they_are_one_by_one(source):
    """In the order in which they are asked for, not in that of the file."""
    asked = np.array([7, 0, 19, 7])
    together = source.train.several(asked)
    for i, index in enumerate(asked):
        for key, value in source.train[int(index)].items():
            np.testing.assert_array_equal(together[key][i], value)
    assert isinstance(source.train, Several)


def test_scores_are_of_the_parts_and_knowing_nothing_scores_little(source):
    """Validation's while it trains, the other parts' at the end, no name twice."""

    def outputs(guess):
        return [
            {"logits": guess(batch["label"]), "label": batch["label"], "split": batch["split"]}
            for batch in source.all_parts
        ]

    right = source.score(outputs(lambda label: 9.0 * np.eye(3)[label]))
    at_end = metrics.evaluate_others(outputs(lambda label: 9.0 * np.eye(3)[label]))
    assert right["accuracy"] == at_end["test_accuracy"] == at_end["train_f1"] == 1
    assert not right.keys() & at_end.keys()
    nothing = source.trivial(outputs(lambda label: np.zeros((len(label), 3))))
    for name in nothing:
        assert metrics.evaluate_others(nothing[name])["test_accuracy"] < 0.7


def test_training_rows_pickle_to_a_few_words_and_need_no_jax(source, tmp_path):
    buffer = io.BytesIO()
    pickle.dump(source.train, buffer)
    assert len(buffer.getvalue()) < 4000
    path = tmp_path / "rows"
    path.write_bytes(buffer.getvalue())
    code = (
        "import pickle, sys; rows = pickle.load(open(sys.argv[1], 'rb'));"
        "print(len(rows), repr(float(rows[2]['x'].sum(dtype='f8')))); assert 'jax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.stdout.split() == ["28", repr(float(source.train[2]["x"].sum(dtype="f8")))]


def test_a_new_fingerprint_for_other_data_and_the_same_for_the_same(source, tmp_path):
    def fingerprint(data):
        return open_adapters(data, tmp_path, eval_batch_size=99, workers=1).fingerprint

    assert fingerprint(DATA) == source.fingerprint  # made in another cache, with other threads and batches
    assert fingerprint(replace(DATA, seed=3)) != source.fingerprint


# -------------------------------------------------------------------------------- which tensors


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_a_sample_of_layers_is_of_whole_pairs_and_nested(share):
    data = LoraSpaceData(sample_layers=share)
    chosen = describe(data).tensors
    assert {names.direction(n) for n in chosen if names.pair(n) == names.pair(min(chosen))} == {"down", "up"}
    by_pair = {names.pair(name) for name in chosen}
    assert len(chosen) == 2 * len(by_pair) == 4 * int(np.ceil(share * 32))
    more = describe(replace(data, sample_layers=min(1.0, share + 0.1))).tensors
    assert set(chosen) < set(more)
    assert describe(data).tensors == chosen
    assert describe(replace(data, sample_seed=1)).tensors != chosen


def test_visual_and_text_are_what_all_layers_has_of_them():
    data = LoraSpaceData(sample_layers=0.3)
    everything, visual, text = (
        describe(replace(data, tensors=kind)).tensors for kind in ("all_layers", "visual_only", "text_only")
    )
    assert {**visual, **text} == everything and not set(visual) & set(text)
    assert all(".attn1." in name for name in visual) and all(".attn2." in name for name in text)
    assert len(describe(LoraSpaceData()).tensors) == 128


def test_describing_made_up_adapters_reads_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = describe(replace(DATA, classes=5))
    assert found.categories == ("airplane", "bird", "car", "cat", "dog") and len(found.tensors) == 32
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------- the rules

BROKEN = {
    "path": ({"path": "x"}, "data.path='x': must be empty"),
    "no path": ({"source": "folder", "samples": 1000}, "data.source=folder needs a path"),
    "unread": (
        {"source": "columnar", "path": "x", "rank": 4},
        "data.rank=4: is not read by data.source=columnar",
    ),
    "classes": ({"classes": 11}, "data.classes=11: must be from 2 to 10"),
    "one class": ({"classes": 1}, "data.classes=1"),
    "samples": ({"samples": 1}, "data.samples=1: must be 2 or more"),
    "share": ({"sample_layers": 0.0}, "data.sample_layers=0.0"),
    "rank": ({"rank": 0}, "data.rank=0: must be 1 or more"),
    "seed": ({"split_seed": -1}, "data.split_seed=-1: must be 0 or more"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_rules_name_field_value_and_fix(what):
    change, words = BROKEN[what]
    with pytest.raises(UserError) as caught:
        enforce(rules(replace(LoraSpaceData(), **change)))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    enforce(rules(LoraSpaceData()))
