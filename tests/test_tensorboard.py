"""TensorBoard really shows what MetricsLog wrote: asked through its own HTTP interface."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from jaxablate import events, metrics
from jaxablate.metrics import MetricsLog
from jaxablate.runstore import RunDir
from tests.running_tensorboard import tensorboard


def train(
    run: RunDir, first: int, last: int, *, resume_step: int, seed: int, offset: float = 0.0
) -> MetricsLog:
    """Write what a run would: the same numbers for the same step, whichever process computes them."""
    log = MetricsLog(
        run,
        resume_step=resume_step,
        hparams={"attention": "flash", "lr": 1e-3, "seed": seed, "qk_norm": True},
        group=f"arm_{seed}",
    )
    for step in range(first, last + 1):
        log.write(step, {"train/loss": 3.0 / (1 + step) + offset})
        log.write_perf(step, {"perf/step_ms": 10.0 + time.monotonic() % 1})
        if step % 5 == 0:
            log.write(step, {"val/loss": 4.0 / (1 + step) + offset, "val/macro_auroc": 0.5 + step / 100})
    log.flush()
    return log


def finish(log: MetricsLog, run: RunDir, state: Any) -> None:
    from jaxablate.disk import read_jsonl

    rows, _ = read_jsonl(run.metrics)
    log.finish(state, metrics.statistics(rows, {"val/loss": "min", "val/macro_auroc": "max"}))
    log.close()


@pytest.mark.parametrize("options", [(), ("--load_fast=false",)], ids=["fast", "python"])
def test_scalars_and_hparams_come_back_without_duplicates(tmp_path: Path, options: tuple[str, ...]) -> None:
    logdir = tmp_path / "study"
    events.experiment_hparams(
        logdir,
        {"attention": ["flash", "plain"], "lr": [1e-3], "seed": [0, 1], "qk_norm": [True, False]},
        ["val/loss", "val/macro_auroc", "best/val_macro_auroc", "never/written"],
    )
    runs = [RunDir(logdir / "arm" / f"seed{seed}") for seed in (0, 1)]
    for run in runs:
        run.create({})
    train(runs[0], 0, 17, resume_step=-1, seed=0).close()  # killed at step 17, last checkpoint at 10

    with tensorboard(logdir, *options) as page:
        # The page is open while the run is resumed: it has seen steps 11 to 17 once already.
        page.wait(lambda: "arm/seed0" in page.get("scalars/tags"))
        assert page.wait(lambda: page.steps("arm/seed0", "train/loss"))[-1] == 17
        log = train(runs[0], 11, 30, resume_step=10, seed=0)
        finish(log, runs[0], "done")
        log = train(runs[1], 0, 12, resume_step=-1, seed=1, offset=1.0)
        log.write(13, {"train/loss": math.nan, "val/loss": math.nan})
        finish(log, runs[1], "diverged")

        page.wait(lambda: page.steps("arm/seed0", "train/loss")[-1:] == [30])
        page.wait(lambda: len(page.steps("arm/seed1", "train/loss")) == 14)
        page.wait(lambda: len(page.groups()) == 2)
        tags = page.get("scalars/tags")
        assert set(tags) == {"arm/seed0", "arm/seed1"}
        assert {"train/loss", "val/loss", "val/macro_auroc", "perf/step_ms"} <= set(tags["arm/seed0"])
        assert "perf/time" not in tags["arm/seed0"]
        assert "time" not in tags["arm/seed0"]

        assert page.steps("arm/seed0", "train/loss") == list(range(31))
        assert page.steps("arm/seed0", "perf/step_ms") == list(range(31))
        assert page.steps("arm/seed0", "val/loss") == list(range(0, 31, 5))
        expected = [3.0 / (1 + step) for step in range(31)]
        assert page.values("arm/seed0", "train/loss") == pytest.approx(expected, rel=1e-6)
        assert page.values("arm/seed1", "train/loss")[-1] == "NaN"

        experiment = page.get("hparams/experiment", {})
        assert {info["name"] for info in experiment["hparamInfos"]} == {"attention", "lr", "seed", "qk_norm"}
        assert {info["name"]["tag"] for info in experiment["metricInfos"]} == {
            "val/loss", "val/macro_auroc", "best/val_macro_auroc", "never/written",
        }  # fmt: skip

        groups = {group["name"]: group for group in page.groups()}
        assert set(groups) == {"arm_0", "arm_1"}
        assert groups["arm_0"]["hparams"] == {"attention": "flash", "lr": 1e-3, "seed": 0.0, "qk_norm": True}
        sessions = [groups[name]["sessions"] for name in ("arm_0", "arm_1")]
        assert [len(group) for group in sessions] == [1, 1]
        assert [group[0]["status"] for group in sessions] == ["STATUS_SUCCESS", "STATUS_FAILURE"]
        shown = {m["name"]["tag"]: m for m in groups["arm_0"]["metricValues"]}
        assert shown["val/loss"]["value"] == pytest.approx(4.0 / 31, rel=1e-6)
        assert shown["val/macro_auroc"]["trainingStep"] == 30
        assert shown["best/val_macro_auroc"]["value"] == pytest.approx(0.8, rel=1e-6)
        assert "never/written" not in shown


def test_runs_that_tune_a_rate_are_no_part_of_those_that_are_reported_at_it() -> None:
    assert events.session_group("rms", 1e-3, "tuning") != events.session_group("rms", 1e-3, "confirm")
    assert events.session_group("rms", 1e-3, "confirm") == events.session_group("rms", 1e-3) == "rms lr=0.001"


def test_runs_of_a_group_are_averaged(tmp_path: Path) -> None:
    logdir = tmp_path / "study"
    events.experiment_hparams(logdir, {"lr": [1e-3]}, ["val/loss"])
    for seed, loss in ((0, 1.0), (1, 3.0)):
        run = RunDir(logdir / f"seed{seed}")
        run.create({})
        with MetricsLog(run, resume_step=-1, hparams={"lr": 1e-3}, group="baseline") as log:
            log.write(1, {"val/loss": loss})
            log.finish("done", {})
    with tensorboard(logdir) as page:
        groups = page.wait(page.groups)
        page.wait(lambda: len(page.groups()[0]["sessions"]) == 2)
        groups = page.groups()
        assert [group["name"] for group in groups] == ["baseline"]
        assert groups[0]["metricValues"][0]["value"] == 2.0
