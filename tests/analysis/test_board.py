"""The board of a study: right means and bounds, honest names, and a TensorBoard that shows them beside the runs."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.weightstats import DescrStatsW

from jaxablate import disk, events
from jaxablate.analysis import board
from jaxablate.analysis.board import mean_curves, write_board
from jaxablate.analysis.findings import Estimate, Verdict
from jaxablate.analysis.results import Result, Results
from jaxablate.analysis.stats.analyse import analyse
from jaxablate.errors import UserError
from jaxablate.runstore import RunDir
from tests.analysis.made import made_results
from tests.analysis.recorded import record
from tests.running_tensorboard import Page, tensorboard

ARMS = (
    "baseline", "flash_only", "rms_only", "swiglu_only", "flash_rms", "flash_swiglu", "rms_swiglu",
    "optimized_full",
)  # fmt: skip
SURVIVORS, WAITING = "rms_only (2 of 3 seeds, 1 diverged)", "optimized_full (1 of 3 seeds)"
NAMES = {*ARMS} - {"rms_only", "optimized_full"} | {SURVIVORS, WAITING}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Three seeds, of which one arm lost one to divergence and another has run one so far."""
    made = made_results(seeds=3, diverged={"rms_only": [2]}, missing={"optimized_full": [1, 2]})
    return record(made, tmp_path_factory.mktemp("made") / "study")


def run_of(path: Path, rows: Sequence[Mapping[str, Any]], **about: Any) -> Result:
    """A finished run with those rows of metrics.jsonl and one row of perf.jsonl."""
    run = RunDir(path)
    run.create({})
    run.metrics.write_bytes(b"".join(map(disk.encode_row, rows)))
    run.perf.write_bytes(disk.encode_row({"step": 1, "time": 1.0, "perf/step_ms": 8.0}))
    perf = disk.read_jsonl(run.perf)[0]
    return Result("arm", 0, "done", {}, dir=run, rows=rows, perf_rows=perf, **about)


def shown(directory: Path) -> dict[str, dict[int, float]]:
    """tag -> step -> value of a run of the board, as TensorBoard's own loader reads it."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    scalars: dict[str, dict[int, float]] = {}
    for path in sorted(directory.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name in ("scalars", "") and value.tag[0] != "_":
                    points = scalars.setdefault(value.tag, {})
                    assert event.step not in points, f"{value.tag} twice at {event.step}"
                    points[event.step] = float(tensor_util.make_ndarray(value.tensor))
    return scalars


def charts(layout: Any) -> dict[str, Any]:
    return {chart.title: chart for category in layout.category for chart in category.chart}


# ------------------------------------------------------------------------------------------------ means


def test_mean_and_bounds_are_students_t_over_seeds(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(4, 6))
    runs = [
        run_of(tmp_path / str(seed), [{"step": 10 * i, "val/x": x} for i, x in enumerate(own)])
        for seed, own in enumerate(values)
    ]
    band = mean_curves(runs, 0.95)["val/x"]
    assert band.steps.tolist() == [0, 10, 20, 30, 40, 50]
    np.testing.assert_allclose(band.mean, values.mean(0))
    low, high = DescrStatsW(values).tconfint_mean(alpha=0.05)
    assert band.low is not None and band.high is not None
    np.testing.assert_allclose(band.low, low)
    np.testing.assert_allclose(band.high, high)


@pytest.mark.parametrize(("seeds", "bounded"), [(1, False), (2, False), (3, True)])
def test_below_three_seeds_there_are_no_bounds(tmp_path: Path, seeds: int, bounded: bool) -> None:
    runs = [run_of(tmp_path / str(seed), [{"step": 1, "val/x": float(seed)}]) for seed in range(seeds)]
    band = mean_curves(runs, 0.95)["val/x"]
    assert (band.low is not None, band.high is not None) == (bounded, bounded)


def test_a_step_counts_only_if_every_seed_has_a_value_there(tmp_path: Path) -> None:
    steps = {"a": {1: 1.0, 2: 2.0, 3: 3.0}, "b": {1: 3.0, 2: None, 3: 5.0, 4: 9.0}}
    runs = [
        run_of(tmp_path / name, [{"step": step, "x": value} for step, value in own.items()])
        for name, own in steps.items()
    ]
    band = mean_curves(runs, 0.95)["x"]
    assert (band.steps.tolist(), band.mean.tolist()) == ([1, 3], [2.0, 4.0])
    never = [*runs, run_of(tmp_path / "c", [{"step": 7, "x": 1.0}])]
    assert "x" not in mean_curves(never, 0.95)
    assert mean_curves([], 0.95) == {}


def test_a_run_that_stopped_stays_what_it_was_and_one_that_was_cut_does_not(tmp_path: Path) -> None:
    rows = [{"step": step, "val/x": float(step), "train/x": float(step)} for step in (1, 2, 3, 4)]
    whole = run_of(tmp_path / "whole", rows)
    stopped = mean_curves([whole, run_of(tmp_path / "stopped", rows[:2], stopped_at=2)], 0.95)
    assert stopped["val/x"].steps.tolist() == [1, 2, 3, 4]
    assert stopped["val/x"].mean.tolist() == [1, 2, 2.5, 3]
    assert stopped["train/x"].steps.tolist() == [1, 2]  # no batch was trained on afterwards
    cut = mean_curves([whole, run_of(tmp_path / "cut", rows[:2])], 0.95)
    assert cut["val/x"].steps.tolist() == [1, 2]


def test_timings_are_averaged_on_one_kind_of_hardware_only(tmp_path: Path) -> None:
    def runs(*hardware: str) -> list[Result]:
        return [
            run_of(tmp_path / f"{h}{i}", [{"step": 1, "x": 1.0}], hardware=h) for i, h in enumerate(hardware)
        ]

    assert mean_curves(runs("H200", "H200"), 0.95).keys() == {"x", "perf/step_ms"}
    assert mean_curves(runs("H200", "A100"), 0.95).keys() == {"x"}


def test_a_long_series_is_thinned_to_both_of_its_ends(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [{"step": step, "x": float(step)} for step in range(1, 1001)])
    band = mean_curves([run], 0.95)["x"]
    assert len(band.steps) == board.MAX_STEPS
    assert (band.steps[0], band.steps[-1]) == (1, 1000)
    np.testing.assert_array_equal(band.steps, band.mean)


# ------------------------------------------------------------------------------------------- what is there


def test_an_arm_that_lost_seeds_says_so_in_its_name(results: Results, tmp_path: Path) -> None:
    out = write_board(results, analyse(results), tmp_path / "board")
    runs = {path.parent.relative_to(out).as_posix() for path in out.rglob("events.out.tfevents.*")}
    assert runs == {".", *NAMES, *(f"responses/{name}" for name in NAMES)}
    lost = next(run for run in results.of("rms_only") if run.state == "diverged")
    assert lost.dir is not None
    survivors = [run.dir for run in results.of("rms_only") if run.state == "done" and run.dir]
    finals = [disk.read_jsonl(run.metrics)[0][-1]["val/loss"] for run in survivors]
    curve = shown(out / SURVIVORS)["val/loss"]
    assert curve[300] == pytest.approx(np.mean(finals), rel=1e-6)
    assert not any("bounds" in tag for tag in shown(out / SURVIVORS))
    assert any("bounds" in tag for tag in shown(out / "baseline"))


def test_charts_ask_for_tags_that_the_arms_have(results: Results, tmp_path: Path) -> None:
    out = write_board(results, analyse(results), tmp_path / "board")
    bands = {arm: mean_curves([r for r in results.of(arm) if r.state == "done"], 0.95) for arm in ARMS}
    layout = board.layout(results.study, bands)
    assert [category.title for category in layout.category] == ["quality", "training", "speed"]
    assert set(charts(layout)) == {
        name
        for tag in ("val/macro_auroc", "val/loss", "train/loss", "train/lr", "perf/steps_per_sec")
        for name in (tag, f"{tag}, means of all arms")
    }
    there = shown(out / "baseline")
    for title, chart in charts(layout).items():
        for series in chart.margin.series:
            assert there.keys() >= {series.value, series.lower, series.upper}, title
            for step, mean in there[series.value].items():
                assert there[series.lower][step] <= mean <= there[series.upper][step]


def test_means_have_their_own_chart_only_where_bounds_are_missing(results: Results) -> None:
    complete = {"baseline": mean_curves(results.of("baseline"), 0.95)}
    assert not [title for title in charts(board.layout(results.study, complete)) if "means" in title]
    one = {"optimized_full": mean_curves(results.of("optimized_full")[:1], 0.95)}
    assert all(title.endswith("means of all arms") for title in charts(board.layout(results.study, one)))
    assert not board.layout(results.study, {}).category


def test_a_table_has_a_board_without_curves(tmp_path: Path) -> None:
    results = made_results(seeds=3)
    out = write_board(results, analyse(results), tmp_path / "board")
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"responses"}
    mean = np.mean(list(results.values("rms_only", "loss").values()))
    assert shown(out / "responses" / "rms_only")["response/loss"] == {300: pytest.approx(mean, rel=1e-6)}


def test_a_target_that_was_not_reached_counts_in_the_time_to_it(tmp_path: Path) -> None:
    results = made_results(seeds=3)
    late = dataclasses.replace(
        results.of("rms_only")[0], values={"macro_auroc": 0.6, "loss": 3.0}, steps=1000
    )
    runs = [late if (run.arm, run.seed) == ("rms_only", 0) else run for run in results.runs]
    results = dataclasses.replace(results, runs=tuple(runs))
    out = write_board(results, analyse(results), tmp_path / "board")
    (found,) = shown(out / "responses" / "rms_only")["response/macro_auroc_time"].values()
    reached = list(results.values("rms_only", "macro_auroc_time").values())
    assert len(reached) == 2
    assert found == pytest.approx(np.mean([*reached, 300]), rel=1e-6)  # 300: how long the others were watched


def test_speed_is_compared_on_one_kind_of_hardware_only(tmp_path: Path) -> None:
    for hardware, there in (({}, True), ({"rms_only": "1 x NVIDIA A100"}, False)):
        results = made_results(seeds=3, hardware=hardware)
        out = write_board(results, analyse(results), tmp_path / "board")
        tags = shown(out / "responses" / "baseline").keys()
        assert ("speed/steps_per_sec" in tags) == there
        assert "response/loss" in tags


def test_the_text_has_the_verdicts_and_what_to_know_first(results: Results) -> None:
    verdict = Verdict(
        "rms_no_worse", "non_inferiority", "RMSNorm costs | no AUROC", "macro_auroc", "rms_only", "baseline",
        True, "inconclusive", Estimate(0.0), 0.02, "difference", 0.2, 0.4, "too few seeds",
    )  # fmt: skip
    texts = board.texts(results, dataclasses.replace(analyse(results), verdicts=(verdict,)))
    assert "* rms_only: 1 of 3 runs diverged" in texts["how to read this"]
    assert "| rms_only | 2 of 3, 1 diverged |" in texts["arms"]
    row = texts["verdicts"].splitlines()[2]
    assert "RMSNorm costs \\| no AUROC" in row
    assert "| inconclusive | 0.20 | 0.40 | too few seeds |" in row
    unasked = dataclasses.replace(analyse(results), verdicts=())
    assert "verdicts" not in board.texts(results, unasked)


# ---------------------------------------------------------------------------------------------- replacing


def test_a_new_board_leaves_nothing_of_the_old_one(results: Results, tmp_path: Path) -> None:
    out = tmp_path / "board"
    for _ in range(3):
        write_board(results, analyse(results), out)
    (out / "notes.txt").write_text("mine")
    study = dataclasses.replace(results.study, arms=results.study.arms[:3], hypotheses=())
    fewer = dataclasses.replace(results, study=study)
    write_board(fewer, analyse(fewer), out)
    names = {"baseline", "flash_only", SURVIVORS}
    assert {path.name for path in out.iterdir() if path.is_dir()} == {*names, "responses"}
    assert {path.name for path in (out / "responses").iterdir()} == names
    assert (out / "notes.txt").read_text() == "mine"
    sizes = [path.stat().st_size for path in sorted((out / "baseline").iterdir())]
    assert sizes[:-1] == [0]  # what a TensorBoard may have open
    assert sizes[-1] > 0
    assert shown(out / "baseline")


def test_a_disk_that_refuses_is_one_line_and_keeps_the_old_board(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_board(results, analyse(results), tmp_path / "board")
    before = shown(out / "baseline")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_bytes", read_only)  # a mode would not stop root, as whom CI runs
    with pytest.raises(UserError, match="Read-only file system") as error:
        write_board(results, analyse(results), out)
    assert str(out) in str(error.value)
    assert "\n" not in str(error.value)
    assert shown(out / "baseline") == before


# -------------------------------------------------------------------------------- as TensorBoard shows it


def table(page: Page) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The rows of the hparams page: name -> hyperparameters and metrics, of the columns that it has."""
    experiment = page.get("hparams/experiment", {})
    columns = {info["name"] for info in experiment["hparamInfos"]}
    return {
        group["name"]: (
            {key: value for key, value in sorted(group["hparams"].items()) if key in columns},
            {m["name"]["tag"]: float(m["value"]) for m in group.get("metricValues", [])},
        )
        for group in page.groups()
    }


@pytest.mark.parametrize("options", [(), ("--load_fast=false",)], ids=["fast", "python"])
def test_an_open_tensorboard_follows(tmp_path: Path, options: tuple[str, ...]) -> None:
    made = made_results(seeds=3, diverged={"rms_only": [2]}, missing={"optimized_full": [1, 2]})
    first = record(made, tmp_path / "study")
    out = write_board(first, analyse(first), tmp_path / "study" / "report" / "tensorboard")
    with tensorboard(out, *options) as page:
        page.wait(lambda: len(page.groups()) == 8)
        page.wait(lambda: page.steps("baseline", "val/loss"))
        page.wait(lambda: "." in page.get("text/tags"))
        assert page.get("scalars/tags").keys() >= NAMES
        means = page.get("custom_scalars/scalars", run=SURVIVORS, tag="^val/loss$")["tag_to_events"]
        assert means.keys() == {"val/loss"}
        layout = page.get("custom_scalars/layout")
        for chart in (chart for category in layout["category"] for chart in category["chart"]):
            for tag in (
                tag for series in chart.get("margin", {}).get("series", []) for tag in series.values()
            ):
                assert page.steps("baseline", tag), tag

        rows = table(page)
        hparams, metrics = rows["rms_only lr=0.001"]
        assert hparams == {
            "Factor flash": "off", "Factor rms": "on", "Factor swiglu": "off", "Seeds done": 2.0,
            "Seeds diverged": 1.0, "arm": "rms_only", "optim.learning_rate": 0.001,
            "model.image.attention.impl": "plain", "model.image.ffn": "gelu", "model.image.norm": "rmsnorm",
        }  # fmt: skip
        survivors = np.mean(list(first.values("rms_only", "loss").values()))
        assert metrics["response/loss"] == pytest.approx(survivors, rel=1e-6)
        assert {tuple(metrics) for _, metrics in rows.values()} == {
            (
                "response/loss",
                "response/macro_auroc",
                "response/macro_auroc_time",
                "speed/peak_bytes",
                "speed/steps_per_sec",
            )
        }

        second = record(made_results(seeds=3, effects={"swiglu": 0.02}), tmp_path / "study")
        write_board(second, analyse(second), out)
        page.wait(lambda: {*ARMS} <= page.get("scalars/tags").keys())
        page.wait(lambda: SURVIVORS not in page.get("scalars/tags"))
        runs = [run.dir for run in second.of("swiglu_only") if run.dir]
        want = np.mean([disk.read_jsonl(run.metrics)[0][-1]["val/loss"] for run in runs])
        page.wait(lambda: math.isclose(page.values("swiglu_only", "val/loss")[-1], want, rel_tol=1e-5))
        for arm in ARMS:
            counts = Counter(page.steps(arm, "val/loss"))
            assert set(counts.values()) == {1}, arm
        page.wait(lambda: len(page.groups()) == 8)


def test_the_runs_of_the_study_look_the_same_with_a_board_among_them(
    results: Results, tmp_path: Path
) -> None:
    assert results.path is not None
    study = tmp_path / "study"
    study.symlink_to(results.path)
    with tensorboard(study) as page:
        page.wait(lambda: len(page.groups()) == 8)
        page.wait(lambda: all(metrics for _, metrics in table(page).values()))
        before = table(page)
    assert all("best/val_macro_auroc" in metrics for _, metrics in before.values())
    write_board(results, analyse(results), results.path / "report" / "tensorboard")
    # The data server meets runs in another order each time: what depends on it would show in one of these.
    for options in ((), (), ("--load_fast=false",)):
        with tensorboard(study, *options) as page:
            page.wait(lambda: "report/tensorboard/baseline" in page.get("scalars/tags"))
            page.wait(lambda: sum(len(group["sessions"]) for group in page.groups()) == 22 + 8)
            after = table(page)
            assert after.keys() == before.keys()
            for row, (hparams, metrics) in after.items():
                assert hparams == before[row][0]
                assert metrics == pytest.approx(before[row][1], nan_ok=True)


def test_with_a_record_of_its_own_a_board_would_spoil_them(results: Results) -> None:
    """The reason that there is none: the page would take its columns from either."""
    found = board.board(results, analyse(results), 1.0)
    marks = [name for name, data in found.items() if b"_hparams_/experiment" in data]
    assert marks == []
    assert all(b"_hparams_/session_start_info" in found[f"responses/{name}"] for name in NAMES)
    assert events.session_group("rms_only", 1e-3).encode() in found[f"responses/{SURVIVORS}"]
