"""A base is shared by all members and by nothing else: no checkpoint, optimiser or gradient has it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxablate import inputs, runstore, sharding, trained
from jaxablate.bench import step_programs
from jaxablate.check import check_study
from jaxablate.config import Cohort, MeshConfig, new_config
from jaxablate.data import CohortBatches
from jaxablate.errors import UserError
from jaxablate.estimate import arm, memory, places
from jaxablate.program import Program
from jaxablate.study import Arm, Response, Study, switch
from jaxablate.train import train
from tests.toy import ToyData, ToyModel
from tests.toy_tasks import BasedTask, ClashingTask, OwnTask, cohort_with
from tests.toy_training import killed_at, metrics, run_dir

WIDTH = 256  # its matrix of bfloat16 and int8 is 196,608 bytes, beside which all else is small
BASE = WIDTH * WIDTH * 3


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def program_of(
    task: type[BasedTask], workdir: Path, mesh: MeshConfig | None = None, seeds: str = "0,1", **overrides: Any
) -> Program:
    """The program of the task's cohort, with its base on the devices."""
    cohort = cohort_with(task, workdir, seeds=seeds, model__width=WIDTH, **overrides)
    made = task(cohort.base, "cpu")
    size = int(np.prod([*dataclasses.astuple(mesh or MeshConfig(1, 1, 1, 1))]))
    devices = sharding.make_mesh(mesh or MeshConfig(1, 1, 1, 1), len(cohort.runs), 8, jax.devices()[:size])
    built = Program(made, cohort, made.stages()[0], devices)
    built.base = inputs.put_base(inputs.load_base(made, workdir), built.abstract_base)
    return built


def steps(built: Program, count: int) -> tuple[Any, np.ndarray]:
    """The state after so many steps, and the losses (steps, members)."""
    seeds = [run.seed for run in built.cohort.runs]
    batches = CohortBatches(built.task.open(Path()).train, seeds, 8, count)
    state, step, losses = built.init(), built.compile_step(), []
    for n in range(count):
        state, metric = step(state, built.member, built.put_batch(batches[n]), np.int32(n + 1))
        losses.append(np.asarray(metric["train/loss"]))
    return state, np.array(losses)


# ------------------------------------------------------------------------------------ where it is not


def test_no_state_has_it_and_every_bit_of_it_stays(tmp_path: Path) -> None:
    built = program_of(BasedTask, tmp_path)
    state, losses = steps(built, 3)
    assert np.ptp(losses[:, 0]) > 1e-3  # something is trained
    assert not [x for x in jax.tree.leaves(state) if x.shape[-2:] == (WIDTH, WIDTH)]
    given = built.task.base(tmp_path)
    for name, array in (("base", "kernel"), ("quantized", "codes")):
        held = built.base[name][array]
        assert held.shape == (WIDTH, WIDTH) and held.dtype == given[name][array].dtype
        np.testing.assert_array_equal(np.asarray(held), given[name][array])
    own = program_of(OwnTask, tmp_path)  # a matrix of each member would have been seen
    assert [x for x in jax.tree.leaves(own.abstract_state()) if x.shape[-2:] == (WIDTH, WIDTH)]


def test_no_memory_is_taken_for_its_gradient(tmp_path: Path) -> None:
    """Beside its float32 copy, which the product needs, the step has room for nothing of its size."""
    size = 4 * WIDTH * WIDTH
    found = {}
    for task in (BasedTask, OwnTask):
        analysis = program_of(task, tmp_path, seeds="0").lower_step().compile().memory_analysis()
        assert analysis is not None
        found[task] = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    assert found[BasedTask] < 1.5 * size
    assert found[OwnTask] > 3 * size  # the gradient, and the moments


def test_a_collection_of_both_kinds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="average is made by init and in the base too"):
        program_of(ClashingTask, tmp_path)


def test_another_array_than_was_said_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = cohort_with(BasedTask, tmp_path)
    wrong = {
        "base": {"kernel": np.zeros((8, 8), np.float32)},
        "quantized": {"codes": np.zeros((8, 8), np.int8)},
    }
    monkeypatch.setattr(BasedTask, "base", lambda self, cache: wrong)
    with pytest.raises(
        UserError, match=r"base/kernel is float32\[8, 8\].* asks for bfloat16\[8, 8\]"
    ) as raised:
        train(cohort)
    assert "\n" not in str(raised.value)


# --------------------------------------------------------------------------------------- training with it


def test_a_run_with_a_base_resumes_bit_for_bit_and_on_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it leaves knows nothing of the base but which it was."""
    (whole,) = train(cohort_with(BasedTask, tmp_path / "whole"))
    cohort = cohort_with(BasedTask, tmp_path / "killed")
    killed_at(cohort, 23, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(BasedTask, "seed", 1)
        with pytest.raises(UserError, match=r"is a checkpoint of run .* with base"):
            train(cohort)
    (resumed,) = train(cohort)
    assert resumed["params_digest"] == whole["params_digest"]
    assert metrics(tmp_path / "killed", resumed) == metrics(tmp_path / "whole", whole)
    assert whole["parameters"] == {"total": 40 + 128, "first": 32, "out": 8, "frozen": 128}

    task, where = BasedTask(cohort.base, "cpu"), runstore.RunDir(run_dir(tmp_path / "killed", resumed))
    found = trained.restore(task, cohort.base, where, "final")
    given = inputs.Inputs.open(task, tmp_path)
    assert found.data == given.fingerprint == resumed["data"]
    assert set(found.variables) == {"params", "average"}
    outputs = task.predict({**found.variables, **given.base}, given.source.evaluation[0])
    loss = resumed["statistics"]["val_loss"]["final"]
    assert given.source.score([outputs])["loss"] == pytest.approx(loss, rel=1e-5)


def test_each_member_gets_what_it_gets_alone(tmp_path: Path) -> None:
    _, both = steps(program_of(BasedTask, tmp_path), 4)
    for m in range(2):
        _, alone = steps(program_of(BasedTask, tmp_path, seeds=str(m)), 4)
        np.testing.assert_allclose(both[:, m], alone[:, 0], rtol=1e-5)
    assert np.abs(both[:, 0] - both[:, 1]).max() > 1e-3


@pytest.mark.alone
def test_on_a_mesh_it_is_split_as_parameters_are_and_members_share_it(tmp_path: Path) -> None:
    _, single = steps(program_of(BasedTask, tmp_path), 3)
    built = program_of(BasedTask, tmp_path, MeshConfig(2, 1, 2, 2))
    _, spread = steps(built, 3)
    np.testing.assert_allclose(spread, single, rtol=1e-4)
    kernel, codes = built.base["base"]["kernel"], built.base["quantized"]["codes"]
    assert kernel.sharding.spec == PartitionSpec("fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (WIDTH // 2, WIDTH // 2)
    assert codes.sharding.is_fully_replicated


# -------------------------------------------------------------------------------- what looks at programs


def test_an_estimate_counts_it_once(tmp_path: Path) -> None:
    here = places.present("cpu")
    for members in (1, 3):
        cohort = cohort_with(BasedTask, tmp_path, model__width=WIDTH, seeds=",".join("012"[:members]))
        found = arm.estimate(cohort, here)
        assert found.parameters == 5 * WIDTH + 2 * WIDTH**2 and found.trainable == 5 * WIDTH
        (program,) = memory.programs(cohort, here)
        state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state()))
        member = state // members
        assert found.memory.programs["start"] == 2 * state + BASE
        assert found.memory.programs["save in main"] == state + member + BASE


def study_of(task: str, tmp_path: Path) -> Study:
    base = new_config(study="toy", task=task, model=ToyModel(), data=ToyData())
    base.training.update(steps=10, batch_size=8, eval_every=5)
    base.host.update(workdir=str(tmp_path), cache=str(tmp_path))
    wide = switch("wide", "model", {"model.width": 16})
    return Study("toy", (wide,), (Arm("baseline", {}), Arm("wide", {"wide": "on"})), (0,),
                 (Response("val/loss", "min"),), base=base)  # fmt: skip


def test_check_runs_arms_with_a_base(tmp_path: Path) -> None:
    report = check_study(study_of("tests.toy_tasks:BasedTask", tmp_path))
    assert not [f for f in report.findings if f.verdict == "fail"]
    said = {f.arm: f.reason for f in report.findings if f.check == "trained"}
    assert "a base of 128 parameters is only read" in said["baseline"]
    assert "a base of 512 parameters" in said["wide"]


def test_bench_runs_them_too(tmp_path: Path) -> None:
    base = cohort_with(BasedTask, tmp_path).base
    built = step_programs.make_program(base)
    built.rows = base.training.batch_size
    built.base = inputs.put_base(inputs.load_base(built.task, tmp_path), built.abstract_base)
    batch = step_programs.Batches("real").of(built.task)
    runnable = step_programs.Runnable(built, built.compile_step(), batch, ("step", "forward", "backward"))
    losses = [float(runnable.call("forward")()[0]), float(runnable.call("step")()["train/loss"][0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    gradient = runnable.call("backward")()
    assert {x.shape for x in jax.tree.leaves(gradient)} == {(1, 4, 8), (1, 8, 1)}


def test_a_task_without_one_is_known_by_its_data_alone(tmp_path: Path) -> None:
    cohort = cohort_with(OwnTask, tmp_path)
    given = inputs.Inputs.open(OwnTask(cohort.base, "cpu"), tmp_path)
    assert given.fingerprint == given.source.fingerprint
    assert isinstance(cohort, Cohort) and given.base == {}
