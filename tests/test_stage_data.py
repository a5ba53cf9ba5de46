"""Stages with data, evaluations and an optimiser of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxablate import config, inputs, sharding
from jaxablate.check import check_study
from jaxablate.config import new_config
from jaxablate.data import CohortBatches
from jaxablate.errors import UserError
from jaxablate.estimate import hours
from jaxablate.program import Program
from jaxablate.steps import read
from jaxablate.study import Arm, Response, Study, switch
from jaxablate.train import train
from tests.toy import ToyData, ToyModel, ToyTask
from tests.toy_tasks import EasyFirstTask, StagedTask, cohort_with
from tests.toy_training import killed_at, metrics, timeless

TWO = {"model__stages": "two"}


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def programs(task: type[ToyTask], **overrides: Any) -> list[Program]:
    cohort = cohort_with(task, Path(), **TWO, **overrides)
    made, mesh = (
        task(cohort.base, "cpu"),
        sharding.make_mesh(config.MeshConfig(1, 1, 1, 1), 1, 8, jax.devices()[:1]),
    )
    first, second = made.stages()
    return [Program(made, cohort, first, mesh), Program(made, cohort, second, mesh, first.steps)]


def seen(program: Program, done: int, count: int) -> list[int]:
    """The items of the batches after so many steps."""
    batches = read(program, program.task.open(Path()), done)
    return np.concatenate([next(batches)["index"][0] for _ in range(count)]).tolist()


# ------------------------------------------------------------------------------------------ their data


def test_a_stage_with_data_of_its_own_begins_with_its_first_item() -> None:
    first, second = programs(StagedTask, training__order="file", training__steps=38)
    assert seen(first, 0, 4) == list(range(32))
    assert seen(second, 19, 4) == list(range(32, 64))
    assert seen(second, 21, 2) == list(range(48, 64))  # a resumed run goes on where it was
    _, whole = programs(ToyTask, training__order="file", training__steps=38)
    assert seen(whole, 19, 2) == list(range(24, 40))  # 19 batches of 8 are two epochs of 64, and 24 more
    assert seen(whole, 21, 2) == list(range(40, 56))


def test_each_stage_is_evaluated_on_its_own_data_and_a_killed_run_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (summary,) = train(cohort_with(StagedTask, tmp_path / "whole", **TWO))
    rows = {r["step"]: r["val/loss"] for r in metrics(tmp_path / "whole", summary) if "val/loss" in r}
    with monkeypatch.context() as patch:  # all stages on all of it
        patch.setattr(StagedTask, "data_of_stage", lambda self, source: source)
        (other,) = train(cohort_with(StagedTask, tmp_path / "other", **TWO))
    others = {r["step"]: r["val/loss"] for r in metrics(tmp_path / "other", other) if "val/loss" in r}
    assert rows.keys() == others.keys() and rows[0] != others[0] and rows[40] != others[40]

    cohort = cohort_with(StagedTask, tmp_path / "killed", **TWO)
    killed_at(cohort, 27, monkeypatch)
    (resumed,) = train(cohort)
    assert metrics(tmp_path / "killed", resumed) == metrics(tmp_path / "whole", summary)
    assert resumed["params_digest"] == summary["params_digest"] != other["params_digest"]


def test_the_best_of_a_stage_with_other_data_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though scores are better on what the first one is evaluated on; also of a run that goes on in the second."""
    cohort = cohort_with(EasyFirstTask, tmp_path / "whole", **TWO)
    (summary,) = train(cohort)
    losses = {r["step"]: r["val/loss"] for r in metrics(tmp_path / "whole", summary) if "val/loss" in r}
    assert min(losses, key=lambda step: losses[step]) <= 20
    best = min((step for step in losses if step > 20), key=lambda step: losses[step])
    assert summary["best_checkpoint"] == summary["statistics"]["val_loss"]["best_step"] == best
    assert summary["best_since"] == 20

    killed = cohort_with(EasyFirstTask, tmp_path / "killed", **TWO)
    killed_at(killed, 33, monkeypatch)
    (again,) = train(killed)
    assert (again["best_checkpoint"], timeless(again)) == (best, timeless(summary))

    monkeypatch.setattr(
        EasyFirstTask, "data_of_stage", lambda self, source: source
    )  # all of them compare then
    (same,) = train(cohort_with(EasyFirstTask, tmp_path / "same", **TWO))
    assert "best_since" not in same


def test_check_gives_each_stage_a_batch_of_its_own_data(tmp_path: Path) -> None:
    """Arms with the same stages are compared on the same batches; another batch is another gradient."""
    base = new_config(
        study="toy", task="tests.toy_tasks:StagedTask", model=ToyModel(stages="two"), data=ToyData()
    )
    base.training.update(steps=10, batch_size=8, eval_every=5, order="file")
    base.host.update(workdir=str(tmp_path), cache=str(tmp_path))
    switches = (
        switch("kernel", "implementation", {"training.accumulation": 2}),
        switch("wide", "model", {"model.width": 16}),
    )
    arms = (Arm("baseline", {}), Arm("split", {"kernel": "on"}), Arm("wide", {"wide": "on"}))
    study = Study("toy", switches, arms, (0,), (Response("val/loss", "min"),), base=base)
    report = check_study(study)
    assert not [f for f in report.findings if f.verdict == "fail"]
    from jaxablate.check.probes import Bench

    bench = Bench(tmp_path, "auto", 1)
    bench.probe({"baseline": config.resolve(study.config("baseline")).base})
    draw = bench.draw("baseline", 0)
    assert len(draw.batch.split()) == 2
    one, two = (draw.gradients[f"{stage}: out/bias"] for stage in ("first", "second"))
    assert not np.allclose(one, two)


# ----------------------------------------------------------------------------------- their evaluations


def test_a_stage_counts_its_own_steps_between_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StagedTask, "second", {"eval_every": 8})
    cohort = cohort_with(StagedTask, tmp_path, **TWO)
    (summary,) = train(cohort)
    steps = [row["step"] for row in metrics(tmp_path, summary) if "val/loss" in row]
    assert steps == [0, 10, 20, 28, 36, 40]
    stages = StagedTask(cohort.base, "cpu").stages()
    assert hours.evaluations(stages, cohort.base.training) == len(steps)


# --------------------------------------------------------------------------------------- their optimiser


def carried(
    second: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A member after the first step of the first stage, and at the start of the second."""
    monkeypatch.setattr(StagedTask, "second", second)
    before, after = programs(StagedTask)
    batch = CohortBatches(before.task.open(Path()).train, [0], 8, 3)[0]
    state, _ = before.compile_step()(before.init(), before.member, before.put_batch(batch), np.int32(1))
    ended = jax.device_get(before.take(state, 0))
    return ended, jax.device_get(after.take(after.carry(state), 0))


def test_a_kept_optimiser_goes_on_with_its_moments_and_a_fresh_one_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended, begun = carried({"optimizer": "kept"}, monkeypatch)
    moments = [name for name in ended if name.startswith("opt_state")]
    assert all(np.array_equal(ended[name], begun[name]) for name in moments)
    ended, begun = carried({}, monkeypatch)
    assert not any(begun[name].any() for name in moments)
    assert sum(ended[name].any() for name in moments) >= 8


@pytest.mark.parametrize(
    "second", [{"trainable": ("out/*",)}, {"optim": config.OptimConfig(decay_at="gradient")}]
)
def test_a_kept_optimiser_of_other_parameters_is_one_line(
    second: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StagedTask, "second", {"optimizer": "kept", **second})
    with pytest.raises(
        UserError, match=r"stage 'second': optimizer='kept' needs .* of stage 'first'"
    ) as raised:
        train(cohort_with(StagedTask, tmp_path, **TWO))
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(StagedTask, "second", second)
    assert programs(StagedTask)  # a fresh one may be of any


def test_inputs_are_those_of_the_whole_data() -> None:
    first, second = programs(StagedTask)
    sources = [inputs.Inputs.open(program.task, Path()).fingerprint for program in (first, second)]
    assert sources[0] == sources[1] == "toy-64"
