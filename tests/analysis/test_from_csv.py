"""Tables in and out: what a foreign table means, what is wrong with it, and that ours come back as they went."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from jaxablate.analysis.export import FORMATS, export, frame
from jaxablate.analysis.from_csv import from_csv
from jaxablate.analysis.results import Results
from jaxablate.analysis.stats.analyse import analyse
from jaxablate.errors import UserError
from jaxablate.study import Response
from tests.analysis.made import made_results, made_study, tuned_study

TABLE = """\
arm,seed,norm,flash,val/loss,acc
baseline,0,layer,0,1.00,0.50
baseline,1,layer,0,1.10,0.52
rms,0,rms,0,0.90,0.60
rms,1,rms,0,0.95,0.61
flash,0,layer,1,1.01,0.51
flash,1,layer,1,1.09,0.53
both,0,rms,1,0.80,0.70
both,1,rms,1,0.85,0.71
"""
BOTH = {"val/loss": "min", "acc": "max"}


def read(tmp_path: Path, text: str = TABLE, **options: Any) -> Results:
    file = tmp_path / "my runs.csv"
    file.write_text(text)
    return from_csv(file, **({"directions": BOTH} | options))


def refused(tmp_path: Path, text: str | bytes, *says: str, **options: Any) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as raised:
        from_csv(file, **({"directions": BOTH} | options))
    message = str(raised.value)
    assert "\n" not in message
    for words in says:
        assert words in message, message


# ------------------------------------------------------------------------------------------ reading


def test_a_plain_table_becomes_a_study_with_its_factors(tmp_path: Path):
    found = read(tmp_path)
    study = found.study
    assert study.name == "my_runs"
    assert [arm.name for arm in study.arms] == ["baseline", "rms", "flash", "both"]
    assert study.baseline == "baseline"
    assert study.seeds == (0, 1)
    assert {f.name: list(f.levels) for f in study.factors} == {"norm": ["layer", "rms"], "flash": ["0", "1"]}
    assert study.set_levels("both") == {"norm": "rms", "flash": "1"}
    assert [(r.name, r.metric, r.direction) for r in study.responses] == [
        ("loss", "val/loss", "min"), ("acc", "acc", "max")
    ]  # fmt: skip
    assert found.values("rms", "loss") == {0: 0.9, 1: 0.95}
    assert found.source.endswith("my runs.csv")
    assert "factors, found: norm, flash" in found.notes


def test_the_effects_of_a_table_are_those_of_its_numbers(tmp_path: Path):
    table = next(t for t in analyse(read(tmp_path)).effects if (t.response, t.scale) == ("loss", "raw"))
    norm = next(effect for effect in table.effects if effect.factors == ("norm",))
    assert norm.estimate.value == pytest.approx((0.9 + 0.95 + 0.8 + 0.85 - 1.0 - 1.1 - 1.01 - 1.09) / 4)


def test_the_reference_is_the_baselines_level_wherever_it_stands(tmp_path: Path):
    found = read(tmp_path, baseline="both")
    assert {f.name: f.reference for f in found.study.factors} == {"norm": "rms", "flash": "1"}
    assert found.study.set_levels("baseline") == {"norm": "layer", "flash": "0"}


def test_without_an_arm_named_baseline_the_first_one_is_and_a_note_says_so(tmp_path: Path):
    found = read(tmp_path, TABLE.replace("baseline", "plain"))
    assert found.study.baseline == "plain"
    assert any("'plain', the first arm of the table" in note for note in found.notes)


def test_columns_can_have_other_names(tmp_path: Path):
    text = TABLE.replace("arm,seed", "Method,Trial")
    assert read(tmp_path, text, arm="Method", seed="Trial", name="mine").study.name == "mine"


def test_arms_take_names_that_folders_can_have(tmp_path: Path):
    found = read(tmp_path, TABLE.replace("\nboth,", "\nRMS + flash,"))
    assert found.study.arms[-1].name == "RMS_flash"
    assert any("'RMS + flash' is named 'RMS_flash'" in note for note in found.notes)


def test_factors_can_be_named_and_then_no_others_are_looked_for(tmp_path: Path):
    found = read(tmp_path, factors=["norm"], ignore=["flash"])
    assert [factor.name for factor in found.study.factors] == ["norm"]
    depth = TABLE.replace(",0,", ",2,").replace("flash,", "depth,")
    assert read(tmp_path, depth, factors=["depth", "norm"]).study.factor("depth")


def test_a_column_that_is_the_same_everywhere_is_no_factor(tmp_path: Path):
    lines = TABLE.splitlines()
    text = "\n".join([lines[0] + ",data,size", *(line + ",cifar,7" for line in lines[1:])])
    found = read(tmp_path, text)
    assert [factor.name for factor in found.study.factors] == ["norm", "flash"]
    assert "column 'data' is left out: all the same" in found.notes


def test_log_scale_is_for_the_columns_that_are_named(tmp_path: Path):
    assert [r.scale for r in read(tmp_path, log=["val/loss"]).study.responses] == ["log", "raw"]


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "NA", "None", "inf", "-inf", " "])
def test_a_cell_without_a_number_is_a_run_without_that_value(tmp_path: Path, cell: str):
    found = read(tmp_path, TABLE.replace("rms,1,rms,0,0.95,0.61", f"rms,1,rms,0,{cell},0.61"))
    run = found.of("rms")[1]
    assert (run.state, run.values) == ("done", {"loss": None, "acc": 0.61})
    assert not analyse(found).arm("rms", "loss").complete
    assert analyse(found).arm("rms", "acc").complete


def test_a_row_without_any_number_is_unfinished_unless_it_says_that_it_diverged(tmp_path: Path):
    text = TABLE.replace("0.95,0.61", ",nan")
    assert [run.state for run in read(tmp_path, text).of("rms")] == ["done", "pending"]
    lines = text.splitlines()
    words = ["state", "done", "", "finished", "Diverged", "failed", "oom", "running", "cancelled"]
    found = read(tmp_path, "\n".join(f"{line},{word}" for line, word in zip(lines, words, strict=True)))
    assert [run.state for arm in found.study.arms for run in found.of(arm.name)] == [
        "done", "done", "done", "diverged", "bug", "oom", "running", "cancelled"
    ]  # fmt: skip
    value = analyse(found).arm("rms", "loss")
    assert (value.done, value.diverged, value.unfinished) == (1, 1, 0)
    assert found.of("flash")[0].values == {"loss": None, "acc": None}  # of a run that failed no number counts


def test_a_seed_that_an_arm_lacks_is_an_unfinished_run(tmp_path: Path):
    found = read(tmp_path, TABLE.replace("both,1,rms,1,0.85,0.71\n", ""))
    assert [run.state for run in found.of("both")] == ["done", "pending"]
    assert "arm 'both' has no row for seed 1: unfinished" in found.notes


def test_columns_about_the_run_need_no_direction(tmp_path: Path):
    lines = TABLE.splitlines()
    text = "\n".join([lines[0] + ",learning_rate,steps,perf/steps_per_sec,hardware",
                      *(line + ",0.001,300,12.5,H200" for line in lines[1:])])  # fmt: skip
    run = read(tmp_path, text).of("rms")[0]
    assert (run.learning_rate, run.steps, run.hardware) == (0.001, 300, "H200")
    assert run.perf == {"steps_per_sec": 12.5}


def test_windows_and_spreadsheet_files_are_read(tmp_path: Path):
    file = tmp_path / "t.csv"
    file.write_bytes(
        b"\xef\xbb\xbf" + TABLE.replace("\n", "\r\n").replace("rms,1", '"rms", 1').encode() + b"\r\n\r\n"
    )
    assert from_csv(file, directions=BOTH).values("rms", "loss") == {0: 0.9, 1: 0.95}


# ------------------------------------------------------------------------------------------ refusals


def edited(old: str, new: str, count: int = 1) -> str:
    assert old in TABLE
    return TABLE.replace(old, new, count)


@pytest.mark.parametrize(
    "text, says",
    [
        (b"", "holds no rows"),
        (b"arm,seed,val/loss,acc\n", "holds no rows"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "not text in UTF-8"),
        (b"arm,seed\n\xff\xfe,1\n", "not text in UTF-8"),
        (TABLE.replace(",", ";"), "not separated by commas"),
        (TABLE.replace(",", "\t"), "not separated by commas"),
        (edited("arm,", "name,"), "no column 'arm'"),
        (edited("seed", "sead"), "no column 'seed'; did you mean 'sead'?"),
        (edited("val/loss", "val_loss"), "no column 'val/loss'; did you mean 'val_loss'?"),
        (edited("norm,", "acc,"), "two columns are named 'acc'"),
        (edited("rms,0,rms", "rms,1,rms"), "t.csv:5: arm 'rms' has seed 1 already"),
        (edited("0.95", "o.95"), "t.csv:5: val/loss='o.95': must be a number"),
        (edited("0.95", "1_0"), "t.csv:5: val/loss='1_0'"),
        (edited("rms,1,rms,0,0.95", "rms,1,rms,0,x,0.95"), "t.csv:5: 7 cells, the header has 6"),
        (edited(",0.61", ""), "t.csv:5: 5 cells, the header has 6"),
        (edited("rms,1,", "rms,,"), "t.csv:5: 'seed' is empty"),
        (edited("rms,1,", "rms,one,"), "t.csv:5: seed='one'"),
        (edited("rms,1,", "rms,1.5,"), "t.csv:5: seed='1.5': must be an integer"),
        (edited("rms,1,", ",1,"), "t.csv:5: 'arm' is empty"),
        (edited("rms,1,rms", "rms,1,rmsnrom"), "t.csv:5: factor 'norm' is 'rmsnrom' and was 'rms' for arm 'rms'"),
        (edited("rms,1,rms", "rms,1,"), "t.csv:5: 'norm' is empty"),
        (edited("rms,0,rms", "r+s,0,rms").replace("rms,1,rms", "r/s,1,rms"), "would both be named 'r_s'"),
        (TABLE + '"torn', "not a comma-separated table"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_one_line_that_names_the_place(tmp_path: Path, text: str | bytes, says: str):
    refused(tmp_path, text, says)


def test_the_same_seed_twice_at_two_rates_is_told_how_to_say_so(tmp_path: Path):
    text = "arm,seed,learning_rate,acc\na,0,0.1,1\na,0,0.2,2\n"
    refused(tmp_path, text, "keep each arm's chosen rate", directions={"acc": "max"})
    text = "arm,seed,learning_rate,acc,phase\na,0,0.1,1,tuning\na,0,0.2,2,tuning\na,1,0.2,2,\n"
    found = read(tmp_path, text, directions={"acc": "max"})
    assert [(run.phase, run.seed) for run in found.runs] == [("tuning", 0), ("tuning", 0), ("confirm", 1)]
    assert found.study.seeds == (1,)
    refused(
        tmp_path,
        text.replace("2,\n", "2,tuning\n"),
        "every row is of phase tuning",
        directions={"acc": "max"},
    )
    refused(tmp_path, text.replace("2,\n", "2,test\n"), "phase='test'", directions={"acc": "max"})


def test_every_column_of_numbers_needs_a_direction(tmp_path: Path):
    refused(tmp_path, TABLE, "column 'acc' holds numbers and has no direction", "--direction acc=min or =max",
            directions={"val/loss": "min"})  # fmt: skip
    refused(tmp_path, "arm,seed,norm\na,0,x\nb,0,y\n", "no response; say which way", directions={})
    refused(
        tmp_path, TABLE, "--direction acc=up: must be min or max", directions={"acc": "up", "val/loss": "min"}
    )
    refused(tmp_path, TABLE, "no column 'lss'; did you mean", directions={"lss": "min"})


def test_a_numeric_column_is_no_factor_unless_it_is_named(tmp_path: Path):
    text = TABLE.replace("layer", "2").replace("rms,0", "4,0").replace("rms,1", "4,1")
    refused(tmp_path, text, "column 'norm' holds numbers and has no direction", "--factors norm")


def test_a_named_factor_with_one_level_is_refused(tmp_path: Path):
    text = "arm,seed,norm,acc\na,0,x,1\nb,0,x,2\n"
    refused(tmp_path, text, "factor 'norm' has one level", directions={"acc": "max"}, factors=["norm"])


def test_other_mistakes_in_the_options(tmp_path: Path):
    refused(tmp_path, TABLE, "no arm 'basline'; did you mean 'baseline'?", baseline="basline")
    refused(tmp_path, TABLE, "no column 'nrom'; did you mean 'norm'?", factors=["nrom"])
    refused(tmp_path, TABLE, "on the log scale and has no direction", log=["norm"])
    refused(tmp_path, TABLE.replace("norm", "status"), "status='layer'")
    with pytest.raises(UserError, match="cannot be read"):
        from_csv(tmp_path / "none.csv", directions=BOTH)
    with pytest.raises(UserError, match="cannot be read"):
        from_csv(tmp_path, directions=BOTH)


# ------------------------------------------------------------------------------------------ writing


def directions(found: Results) -> dict[str, str]:
    return {response.name: response.direction for response in found.study.responses}


def test_what_was_exported_is_read_back_with_the_same_values(tmp_path: Path):
    study = tuned_study(4)
    before = made_results(
        study, effects={"swiglu": 0.02}, diverged={"rms_only": (2,)}, missing={"flash_rms": (0, 3)}
    )
    file = tmp_path / "made.csv"
    export(before, "csv", file)
    after = from_csv(file, directions=directions(before), factors=[f.name for f in study.factors])
    fields = ("arm", "seed", "phase", "state", "values", "learning_rate", "run_id", "steps", "diverged_at",
              "parameters", "cohort_size", "hardware", "kernels")  # fmt: skip
    assert len(after.runs) == len(before.runs)
    for old, new in zip(before.runs, after.runs, strict=True):
        assert {name: getattr(old, name) for name in fields} == {name: getattr(new, name) for name in fields}
        for family in ("perf", "seconds"):  # a number that is not known has no cell
            known = {k: v for k, v in getattr(old, family).items() if v is not None}
            assert getattr(new, family) == known
    assert after.study.baseline == "baseline"
    assert {arm.name: after.study.set_levels(arm.name) for arm in after.study.arms} == {
        arm.name: study.set_levels(arm.name) for arm in study.arms
    }


def test_a_table_goes_round_twice_without_change(tmp_path: Path):
    first, second = tmp_path / "1.csv", tmp_path / "2.csv"
    found = made_results(made_study(3))
    export(found, "csv", first)
    export(from_csv(first, directions=directions(found)), "csv", second)
    # Factors are found too: their levels are words, the same in all rows of an arm.
    assert second.read_text() == first.read_text()


def test_the_frame_is_long_and_typed(tmp_path: Path):
    found = made_results(made_study(3), diverged={"rms_only": (2,)})
    table = frame(found)
    assert len(table) == 8 * 3
    assert list(table.columns[:6]) == ["arm", "flash", "rms", "swiglu", "seed", "phase"]
    lost = table[(table.arm == "rms_only") & (table.seed == 2)].iloc[0]
    assert (lost.state, lost.diverged_at) == ("diverged", 40)
    assert math.isnan(lost.macro_auroc)
    assert table.dtypes["steps"] == "Int64"
    assert table.dtypes["macro_auroc"] == "float64"
    none = frame(made_results(made_study(3), missing={arm.name: (0, 1, 2) for arm in found.study.arms}))
    assert none.dtypes["macro_auroc"] == "float64"  # even where nothing has finished


def test_parquet_holds_the_same_table(tmp_path: Path):
    pytest.importorskip("pyarrow", reason="needs jaxablate[parquet]")
    found = made_results(made_study(3), missing={"rms_only": (0,)})
    export(found, "parquet", tmp_path / "t.parquet")
    read_back = pd.read_parquet(tmp_path / "t.parquet")
    assert read_back.macro_auroc.tolist() == pytest.approx(frame(found).macro_auroc.tolist(), nan_ok=True)
    assert list(read_back.columns) == list(frame(found).columns)


def test_without_pyarrow_parquet_says_what_to_install(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'jaxablate\[parquet\]'"):
        export(made_results(made_study(3)), "parquet", tmp_path / "t.parquet")


def test_json_says_what_the_columns_are(tmp_path: Path):
    found = made_results(made_study(3), missing={"rms_only": (0,)})
    export(found, "json", tmp_path / "t.json")
    data = json.loads((tmp_path / "t.json").read_text())
    assert data["responses"]["loss"]["direction"] == "min"
    assert len(data["runs"]) == 24
    missing = next(run for run in data["runs"] if (run["arm"], run["seed"]) == ("rms_only", 0))
    assert (missing["state"], missing["macro_auroc"]) == ("pending", None)
    assert data["plan_hash"] == found.study.plan_hash


def test_rliable_takes_matrices_of_runs_by_responses_with_more_better(tmp_path: Path):
    study = made_study(3, responses=(Response("val/macro_auroc", "max"), Response("val/loss", "min")))
    found = made_results(study)
    export(found, "rliable", tmp_path / "s.npz")
    export(found, "rliable", tmp_path / "s.json")
    data = json.loads((tmp_path / "s.json").read_text())
    with np.load(tmp_path / "s.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {arm.name for arm in study.arms}
        for arm in study.arms:
            matrix = arrays[arm.name]
            assert matrix.shape == (3, 2)
            auroc, loss = found.values(arm.name, "macro_auroc"), found.values(arm.name, "loss")
            assert matrix[:, 0].tolist() == [auroc[seed] for seed in study.seeds]
            assert matrix[:, 1].tolist() == [-loss[seed] for seed in study.seeds]
            assert data["scores"][arm.name] == matrix.tolist()
    assert [task["sign"] for task in data["tasks"]] == [1, -1]
    assert "more is better" in data["orientation"]


@pytest.mark.parametrize("lacking", ["diverged", "missing"])
def test_rliable_refuses_an_arm_with_a_missing_cell(tmp_path: Path, lacking: str):
    found = made_results(
        made_study(3, responses=(Response("val/loss", "min"),)), **{lacking: {"rms_only": (2,)}}
    )
    for suffix in (".json", ".npz"):
        with pytest.raises(UserError, match="no number for rms_only seed 2 loss; rliable takes complete"):
            export(found, "rliable", tmp_path / f"s{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_export(tmp_path: Path):
    found = made_results(made_study(3))
    assert FORMATS == ("csv", "json", "parquet", "rliable")
    with pytest.raises(UserError, match="--format=cvs: did you mean 'csv'"):
        export(found, "cvs", tmp_path / "t")
    with pytest.raises(UserError, match="cannot be written"):
        export(found, "csv", tmp_path / "no folder" / "t.csv")
    clash = made_study(3, responses=(Response("val/loss", "min", name="steps"),), hypotheses=())
    with pytest.raises(UserError, match="'steps' is a column of the table already"):
        frame(made_results(clash))


def test_an_export_replaces_the_file_at_once(tmp_path: Path):
    file = tmp_path / "t.csv"
    file.write_text("old")
    export(made_results(made_study(3)), "csv", file)
    assert pd.read_csv(io.StringIO(file.read_text())).shape[0] == 24
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_a_table_has_no_directory_and_no_plan(tmp_path: Path):
    found = read(tmp_path)
    assert (found.path, found.locked, found.plan_hash) == (None, None, "")
    assert dataclasses.replace(found, notes=()).study == found.study


def test_an_arm_may_have_any_name_in_an_npz(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text("arm,seed,loss\nbaseline,0,1.0\nbaseline,1,1.1\nfile,0,0.5\nfile,1,0.6\n")
    export(from_csv(path, directions={"loss": "min"}), "rliable", tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz", allow_pickle=False) as arrays:
        assert arrays["file"].tolist() == [[-0.5], [-0.6]]  # less is better: the sign is turned
