"""Adapters as other programs leave them: read right, or refused in one line that says what to do."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxablate.errors import UserError
from jaxablate.studies.lora_space.config import LoraSpaceData
from jaxablate.studies.lora_space.data import describe, names, open_adapters, open_reader
from jaxablate.studies.lora_space.features import feature_dim


def _beside(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


disk = _beside("adapters_on_disk")
PEFT, DIFFUSERS = disk.peft_shapes(), disk.diffusers_shapes()


def folder(path, **more) -> LoraSpaceData:
    return LoraSpaceData(source="folder", path=str(path), samples=12, **more)


def opened(data, tmp_path):
    return open_adapters(data, tmp_path / "cache", eval_batch_size=4, workers=2)


def refused(data, tmp_path, *words) -> str:
    """The one line that opening says, which has all of the words."""
    with pytest.raises(UserError) as caught:
        opened(data, tmp_path)
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in words), said
    return said


# ------------------------------------------------------------------------------------ folder of safetensors


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors"])
def test_adapters_that_peft_wrote(tmp_path, file):
    adapters = {c: [disk.drawn(PEFT, 10 * n + i) for i in range(6)] for n, c in enumerate(("dog", "cat"))}
    data = folder(disk.write_tree(tmp_path / "set", adapters, file), representation="flat_vec")
    assert not any(name.startswith("unet.") for name in PEFT) and any(".to_k." in name for name in PEFT)
    described = describe(data)
    assert described.tensors == PEFT
    assert described.categories == ("cat", "dog")
    assert len(describe(replace(data, tensors="visual_only")).tensors) == 6
    assert feature_dim(described.tensors, "product") == 6 * 36
    source = opened(data, tmp_path)
    for code, rows in enumerate(source.parts.parts):
        assert len(rows) == (8, 1, 3)[code]
    kept = np.load(source.features)
    in_order = [*adapters["cat"], *adapters["dog"]]
    for row, weights in zip(kept, in_order, strict=True):
        np.testing.assert_array_equal(
            row, np.concatenate([weights[name].ravel() for name in sorted(weights)])
        )
    assert source.labels.tolist() == [0] * 6 + [1] * 6


@pytest.mark.parametrize(
    "name",
    [
        "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v.lora.{}.weight",
        "up_blocks.1.attentions.2.transformer_blocks.0.attn2.processor.to_v_lora.{}.weight",
        "base_model.model.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v.lora_{}.weight",
        "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v.lora_{}.default.weight",
    ],
)
def test_names_that_are_known(name):
    spelled = ("A", "B") if "lora_{" in name else ("down", "up")
    down, up = (name.format(word) for word in spelled)
    assert (names.direction(down), names.direction(up)) == ("down", "up")
    assert names.pair(down) == names.pair(up) and names.kind(down) == "text"
    assert names.direction(name.replace(".weight", ".bias").format(spelled[0])) is None


def test_other_tensors_and_precisions_are_taken_as_they_come(tmp_path):
    def half(i, dtype):
        weights = {name: values.astype(dtype) for name, values in disk.drawn(PEFT, i).items()}
        return {**weights, "text_model.alpha": np.ones(1, np.float32)}

    kinds = (np.float16, ml_dtypes.bfloat16, np.float64)
    root = disk.write_tree(tmp_path / "set", {"cat": [half(i, kinds[i % 3]) for i in range(6)],
                                             "dog": [half(9 + i, np.float16) for i in range(6)]})  # fmt: skip
    reader = open_reader(folder(root), tmp_path / "cache", 2)
    found = reader.read(1, 3, list(PEFT), 2)
    for name, values in found.items():
        assert values.dtype == np.float32 and values.shape == (2, *PEFT[name])
        np.testing.assert_allclose(values[1], disk.drawn(PEFT, 2)[name], rtol=1e-6)
        np.testing.assert_allclose(values[0], disk.drawn(PEFT, 1)[name], rtol=1e-2)


def with_one_changed(root, change) -> Path:
    """The tree with the last adapter's tensors as `change` gives them; its path."""
    path = root / "cat" / "folder_5" / "pytorch_lora_weights.safetensors"
    weights = disk.drawn(PEFT, 5)
    save_file(change(weights), path)
    return path


FIRST = min(PEFT)
CHANGES = {
    "missing": (lambda w: {n: v for n, v in w.items() if n != FIRST}, (FIRST, "has no tensor", "leave one")),
    "more": (lambda w: {**w, "x.to_out.lora_A.weight": w[FIRST]}, ("x.to_out", "has not", "leave one")),
    "shape": (lambda w: {**w, FIRST: w[FIRST][:, :3].copy()}, (FIRST, "(4, 3)", "(4, 8)")),
    "rank": (lambda w: {n: (v[:2] if "_A" in n else v[:, :2]).copy() for n, v in w.items()}, ("(2, 8)", "one rank")),
    "nan": (lambda w: {**w, FIRST: np.full_like(w[FIRST], np.nan)}, (FIRST, "nan", "leave that")),
    "infinite": (lambda w: {**w, FIRST: np.full_like(w[FIRST], np.inf)}, (FIRST, "inf")),
    "huge": (lambda w: {**w, FIRST: np.full_like(w[FIRST], 1e30)}, ("overflows",)),
    "integers": (lambda w: {**w, FIRST: np.ones((4, 8), np.int32)}, (FIRST, "int32")),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_an_adapter_unlike_the_others_is_named(tmp_path, what):
    root = disk.tree(tmp_path / "set", PEFT, categories=("bird", "cat"))
    change, words = CHANGES[what]
    path = with_one_changed(root, change)
    refused(folder(root, representation="simple_stats"), tmp_path, str(path), *words)
    with_one_changed(root, lambda weights: weights)
    assert opened(folder(root, representation="simple_stats"), tmp_path).dim == 5 * len(PEFT)


def test_a_file_that_is_torn(tmp_path):
    root = disk.tree(tmp_path / "set", PEFT)
    path = root / "bird" / "folder_3" / "pytorch_lora_weights.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    refused(folder(root), tmp_path, str(path), "cannot be read", "fetch it again")


def test_folders_that_are_not_what_they_should_be(tmp_path):
    refused(folder(tmp_path / "nowhere"), tmp_path, "nowhere", "mend the path")
    (tmp_path / "empty").mkdir()
    refused(folder(tmp_path / "empty"), tmp_path, "empty", "<category>/<adapter>")
    one = disk.tree(tmp_path / "one", PEFT, categories=("cat",))
    refused(folder(one), tmp_path, "one category", "'cat'", "two or more")
    bare = disk.tree(tmp_path / "bare", PEFT)
    (bare / "cat" / "folder_9").mkdir()
    refused(folder(bare), tmp_path, "folder_9", "has no pytorch_lora_weights.safetensors")
    other = disk.write_tree(tmp_path / "other", {c: [{"weight": np.ones((2, 2))}] * 6 for c in "ab"})
    refused(folder(other), tmp_path, "lora.down.weight", "give LoRA adapters")
    text = disk.tree(tmp_path / "text", {n: s for n, s in PEFT.items() if ".attn2." in n})
    refused(folder(text, tensors="visual_only"), tmp_path, "data.tensors=visual_only", ".attn1.")


def test_few_adapters_are_no_measurement_and_are_said_to_be_none(tmp_path, caplog):
    source = opened(folder(disk.tree(tmp_path / "set", PEFT, each=3)), tmp_path)
    assert len(source.remarks) == 1 and "not a measurement" in source.remarks[0]
    assert source.remarks[0] in caplog.text
    assert [len(rows) for rows in source.parts.parts] == [6, 6, 6]


# ------------------------------------------------------------------------------------------ parquet


def table(path: Path, rows: list[dict], categories: list, column="category_label", *, flat=False, **more):
    pa = pytest.importorskip("pyarrow", reason="needs jaxablate[parquet]")
    from pyarrow import parquet

    columns = {
        column: categories,
        "folder": [f"f{i}" for i in range(len(rows))],
        "step_loss": [0.1] * len(rows),
    }
    for name in rows[0]:
        columns[name] = [
            None if r[name] is None else (r[name].ravel() if flat else r[name]).tolist() for r in rows
        ]
    parquet.write_table(pa.table({**columns, **more}), path, row_group_size=5)
    return LoraSpaceData(source="columnar", path=str(path), samples=len(rows), representation="flat_vec")


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_a_table_and_a_folder_of_the_same_adapters_are_the_same(tmp_path, flat):
    rows = [disk.drawn(PEFT, i) for i in range(13)]
    label = ["dog" if i % 3 else "cat" for i in range(13)]
    data = table(tmp_path / "t.parquet", rows, label, flat=flat, rank=[4] * 13)
    assert describe(data).tensors == PEFT
    source = opened(data, tmp_path)
    expected = np.array([np.concatenate([row[name].ravel() for name in sorted(row)]) for row in rows])
    np.testing.assert_array_equal(np.load(source.features), expected.astype(np.float32))
    assert [source.categories[i] for i in source.labels] == label


def test_a_table_is_read_in_any_stretches(tmp_path):
    """On from where the last one ended, back, and across row groups and files."""
    rows = [disk.drawn(DIFFUSERS, i) for i in range(23)]
    (tmp_path / "set").mkdir()
    table(tmp_path / "set" / "a.parquet", rows[:13], ["b", *["a"] * 12])
    data = table(tmp_path / "set" / "b.parquet", rows[13:], ["a"] * 10)
    reader = open_reader(replace(data, path=str(tmp_path / "set")), tmp_path / "cache", 1)
    for start, stop in ((0, 3), (3, 4), (4, 11), (11, 17), (22, 23), (2, 20), (0, 23), (7, 8)):
        found = reader.read(start, stop, list(DIFFUSERS), 1)
        for name, values in found.items():
            np.testing.assert_array_equal(values, [row[name] for row in rows[start:stop]])
    assert reader.where(14).endswith("b.parquet: row 1")


def test_labels_may_be_numbers_with_or_without_names(tmp_path):
    rows = [disk.drawn(DIFFUSERS, i) for i in range(12)]
    numbers = [10, 9, 2] * 4
    assert describe(table(tmp_path / "n.parquet", rows, numbers)).categories == ("2", "9", "10")
    named = table(tmp_path / "m.parquet", rows, numbers, category_name=["x", "b", "c"] * 4)
    assert describe(named).categories == ("b", "c", "x")


def test_tables_that_cannot_be_used(tmp_path, monkeypatch):
    rows = [disk.drawn(DIFFUSERS, i) for i in range(12)]
    name = min(DIFFUSERS)
    label = ["a", "b"] * 6
    missing = [*rows[:7], {**rows[7], name: None}, *rows[8:]]
    refused(
        table(tmp_path / "1.parquet", missing, label), tmp_path, "1.parquet: row 7", "has no tensor", name
    )
    shape = [*rows[:8], {**rows[8], name: np.ones((1, 5), np.float32)}, *rows[9:]]
    refused(table(tmp_path / "2.parquet", shape, label), tmp_path, "2.parquet: row 8", "(1, 5)", "(1, 8)")
    nan = [*rows[:9], {**rows[9], name: np.full((1, 8), np.nan)}, *rows[10:]]
    refused(table(tmp_path / "3.parquet", nan, label), tmp_path, "3.parquet: row 9", "nan")
    refused(table(tmp_path / "4.parquet", rows, ["a"] * 12), tmp_path, "one category")
    refused(table(tmp_path / "5.parquet", rows, label, column="kind"), tmp_path, "no column 'category_label'")
    refused(table(tmp_path / "6.parquet", rows, [None, *label[1:]]), tmp_path, "row 0 has no category_label")
    good = table(tmp_path / "7.parquet", rows, label)
    (tmp_path / "7.parquet").write_bytes((tmp_path / "7.parquet").read_bytes()[:-50])
    refused(good, tmp_path, "7.parquet", "cannot be read as parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(good, tmp_path, "pyarrow", "pip install 'jaxablate[parquet]'")


# ------------------------------------------------------------------------------------- preprocessed


def stacked(path: Path, sizes=(7, 2, 3), metadata=None, **change) -> LoraSpaceData:
    content = {}
    for number, (part, size) in enumerate(zip(("train", "val", "test"), sizes, strict=True)):
        rows = [disk.drawn(PEFT, 100 * number + i) for i in range(size)]
        content |= {f"{part}__{name}": np.stack([row[name] for row in rows]) for name in PEFT}
        content[f"{part}__labels"] = np.arange(size, dtype=np.int64) % 2
    save_file({key: v for key, v in {**content, **change}.items() if v is not None}, path, metadata)
    return LoraSpaceData(source="preprocessed", path=str(path), samples=sum(sizes), representation="flat_vec")


def test_preprocessed_parts_stay_what_they_are(tmp_path):
    data = stacked(tmp_path / "1k.safetensors", metadata={"label_mapping": json.dumps({"car": 0, "ship": 1})})
    source = opened(data, tmp_path)
    assert [rows.tolist() for rows in source.parts.parts] == [[*range(7)], [7, 8], [9, 10, 11]]
    assert source.categories == ("car", "ship")
    rows = [disk.drawn(PEFT, i) for i in (*range(7), 100, 101, 200, 201, 202)]
    expected = [np.concatenate([row[name].ravel() for name in sorted(row)]) for row in rows]
    np.testing.assert_array_equal(np.load(source.features), np.array(expected, np.float32))
    with pytest.raises(UserError, match=r"not read by data\.source=preprocessed"):
        describe(replace(data, split_seed=3))


def test_preprocessed_files_that_cannot_be_used(tmp_path):
    name = min(PEFT)
    path = tmp_path / "x.safetensors"
    refused(stacked(path, **{f"test__{name}": None}), tmp_path, name, "alone")
    refused(stacked(path, **{f"val__{name}": np.ones((2, 4, 3))}), tmp_path, "(4, 3)", "(4, 8)")
    refused(stacked(path, **{f"val__{name}": np.ones((1, 4, 8))}), tmp_path, "adapters")
    refused(stacked(path, val__labels=None), tmp_path, "val__labels", "add the category")
    refused(stacked(path, train__labels=np.zeros(7)), tmp_path, "train__labels", "whole")
    alike = {f"{part}__labels": np.zeros(n, np.int32) for part, n in (("train", 7), ("val", 2), ("test", 3))}
    refused(stacked(path, **alike), tmp_path, "one category")
    refused(stacked(path, metadata={"label_mapping": "[]"}), tmp_path, "label_mapping")
    unseen = stacked(path, test__labels=np.array([0, 1, 2]))
    assert any("category '2'" in remark for remark in opened(unseen, tmp_path).remarks)
