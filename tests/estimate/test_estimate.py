"""What an arm costs: the figures follow the config, and agree with what training really does."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxablate import config, disk, targets
from jaxablate.config import Cohort
from jaxablate.errors import UserError
from jaxablate.estimate import __main__ as command
from jaxablate.estimate import arm, hours, memory, places, probe, share
from jaxablate.estimate.facts import Estimate, MemoryFacts, TimeFacts
from jaxablate.train import train
from jaxablate_gpus import GPUS
from tests.toy import ToyTask
from tests.toy_tasks import EmptyTask, cohort_with

TOY = "tests/configs/toy_study.py"
# Activations of megabytes, beside which a state of kilobytes does not matter.
LARGE = {"model__width": 64, "training__batch_size": 4084}
needs_cuda_compiler = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))),
    reason="needs jax's CUDA plugin: pip install 'jax[cuda13]'",
)


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def cohort(members: int = 1, **overrides: Any) -> Cohort:
    pairs = {key.replace("__", "."): str(value) for key, value in overrides.items()}
    return arm.cohort_of(config.load("tests/configs/toy.py", pairs.items()).base, members)


def large(members: int = 1, **overrides: Any) -> Cohort:
    return cohort(members, **{**LARGE, **overrides})


def here(**changes: Any) -> places.Place:
    return dataclasses.replace(places.present("cpu"), **changes)


# --------------------------------------------------------------------------------------------- facts


def test_an_estimate_survives_json_and_half_of_one_is_refused() -> None:
    found = arm.estimate(cohort(model__width=64), here())
    assert found.parameters == found.trainable == found.stages[0].trainable == 64 * 6 + 1
    values = json.loads(json.dumps(found.to_dict()))
    assert Estimate.from_dict(values) == found
    values["memory"].pop("peak")
    with pytest.raises(UserError, match=r"estimate\.memory\.peak: missing"):
        Estimate.from_dict(values)


def test_the_facts_are_read_without_jax(child_env: dict[str, str]) -> None:
    code = "import sys, jaxablate.estimate.facts, jaxablate.targets; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=child_env, check=False).returncode == 0


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({}, (16, 1, 1)),
        ({"training__accumulation": 4}, (4, 4, 1)),
        ({"training__accumulation": 2, "host__split": 2}, (4, 4, 1)),
        ({"training__accumulation": 2, "host__mesh__data": 4}, (2, 2, 4)),
    ],
)
def test_the_batch_is_the_product_of_its_parts(overrides: dict[str, int], parts: tuple[int, ...]) -> None:
    runs = cohort(training__batch_size=16, **overrides)
    found = arm.batch_facts(runs.base, memory.programs(runs, here())[0].mesh)
    assert (found.micro, found.accumulation, found.shards) == parts
    assert found.effective == 16
    assert found.why.startswith("16 = " + " x ".join(map(str, parts)))


def test_a_mesh_that_does_not_divide_the_micro_batch_is_refused() -> None:
    with pytest.raises(UserError, match="data x fsdp = 4 must divide 2 examples"):
        arm.estimate(cohort(training__batch_size=16, training__accumulation=8, host__mesh__data=4), here())


def test_flops_follow_the_width_and_not_the_accumulation() -> None:
    def flops(**overrides: int) -> float:
        runs = cohort(training__batch_size=16, **overrides)
        found, source = arm.flops_per_step(runs.base, memory.programs(runs, here()))
        assert source == "compiler" and found is not None
        return found

    narrow = flops(model__width=64)
    assert narrow == flops(model__width=64, training__accumulation=2)
    assert 1.8 < flops(model__width=128) / narrow < 2.2


# -------------------------------------------------------------------------------------------- memory


def test_memory_grows_with_members_and_with_the_batch() -> None:
    one, two, half = (
        memory.measure(memory.programs(runs, here()), here())
        for runs in (large(), large(2), large(training__batch_size=2042))
    )
    assert one.program == "step of main" and one.left_out == "" and one.source == "compiled for this CPU"
    assert one.peak == one.argument + one.output + one.temp - one.alias + one.beside
    assert 1.6 < one.peak / half.peak < 2.4
    # On a CPU the members take turns: each has its state, and all use the same room for activations.
    assert two.argument > 1.9 * one.argument
    assert two.peak < 1.1 * one.peak
    gpu = here(name="h200")  # where the CPU's program stands for a GPU's, they lie side by side
    both = memory.measure(memory.programs(large(2), gpu), gpu)
    assert 1.6 < both.peak / one.peak < 2.4
    assert one.fits and one.capacity > 2**28


def test_the_largest_micro_batch_is_the_last_one_that_fits() -> None:
    def found(capacity: int, accumulation: int = 1) -> MemoryFacts:
        place, runs = here(capacity=capacity), large(training__accumulation=accumulation)
        return memory.measure(memory.programs(runs, place), place)

    ample = found(2**40, accumulation=4)
    assert (ample.fits, ample.largest_micro_batch) == (True, 4084)  # advice: there is room
    tight = found(found(2**40).peak - 1)
    assert (tight.fits, tight.largest_micro_batch) == (False, 2042)
    none = found(1000)
    assert (none.fits, none.largest_micro_batch) == (False, None)


def test_data_that_only_evaluation_has_is_said_to_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.toy import ToyTask

    monkeypatch.setattr(ToyTask, "predict", lambda self, variables, batch: batch["label"])
    found = memory.measure(memory.programs(cohort(), here()), here())
    assert "label" in found.left_out and "evaluation" not in found.programs


def test_programs_are_made_and_lowered_without_touching_a_device() -> None:
    """As they must be for one that is not there."""
    with jax.transfer_guard("disallow_explicit"):
        (program,) = memory.programs(cohort(), here())
        assert "stablehlo" in program.lower_step().as_text()
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
            jax.random.key(0)  # which a program may only make inside of what is traced


# --------------------------------------------------------------------------------------------- place


def test_without_the_cuda_compiler_the_source_says_so(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(targets, "has_cuda_compiler", lambda: False)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    with places.place("h200", 1, tmp_path) as place:
        found = arm.estimate(cohort(), place)
    assert found.memory.source == "estimate from the CPU program"
    assert found.memory.capacity == GPUS["h200"].memory_bytes // 2
    assert "XLA_CLIENT_MEM_FRACTION=0.5" in found.memory.reserve


@needs_cuda_compiler
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("overrides", [{}, {"host__mesh__data": 2}])
def test_with_it_the_step_is_compiled_for_the_gpu(overrides, monkeypatch, tmp_path: Path) -> None:
    for name in (share.VARIABLE, share.DEPRECATED):
        monkeypatch.delenv(name, raising=False)
    runs = cohort(training__batch_size=16, **overrides)
    with places.place("h200", memory.devices_needed(runs.base), tmp_path) as place:
        found = arm.estimate(runs, place)
    assert found.memory.source == "compiled for NVIDIA H200"
    assert found.memory.capacity == int(0.75 * GPUS["h200"].memory_bytes)
    assert found.memory.peak > 0 and found.batch.shards == overrides.get("host__mesh__data", 1)


def test_kept_kernels_are_replaced_at_one_stroke(tmp_path: Path) -> None:
    shared = tmp_path / "estimates" / "h200.kernels"
    with places._kept_kernels(shared) as first, places._kept_kernels(shared) as second:
        assert first != second and not first.exists()
        second.write_text("second")
        first.write_text("half of the fi")
        assert not shared.exists()
    assert shared.read_text() == "half of the fi"  # the last to end
    with places._kept_kernels(shared) as third:
        assert third.read_text() == "half of the fi"
    assert [path.name for path in shared.parent.iterdir()] == [shared.name]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({share.VARIABLE: "most"}, "XLA_CLIENT_MEM_FRACTION=most: must be a number above 0 and at most 1"),
        ({share.VARIABLE: "0"}, "XLA_CLIENT_MEM_FRACTION=0: must be"),
        ({share.DEPRECATED: "1.2"}, "XLA_PYTHON_CLIENT_MEM_FRACTION=1.2: must be"),
        ({share.VARIABLE: "nan"}, "XLA_CLIENT_MEM_FRACTION=nan: must be"),
        (
            {share.VARIABLE: "0.5", share.DEPRECATED: "0.5"},
            "jax refuses it beside XLA_CLIENT_MEM_FRACTION; unset",
        ),
    ],
)
def test_a_share_that_jax_would_not_take_is_one_line(said: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as error:
        share.memory_share(said)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_share_is_that_of_either_name_and_limiting_it_leaves_one() -> None:
    assert share.memory_share({})[0] == 0.75
    assert (
        share.memory_share({share.VARIABLE: "0.9"})[0]
        == share.memory_share({share.DEPRECATED: "0.9"})[0]
        == 0.9
    )
    limited = share.limited({share.DEPRECATED: "0.9", "OTHER": "x"}, 0.4)
    assert limited == {share.VARIABLE: "0.400", "OTHER": "x"}
    assert share.memory_share(limited)[0] == 0.4


def test_processes_share_the_hosts_memory_and_each_its_gpu() -> None:
    alone = here(capacity=1000)
    assert places.shared(alone, 2).capacity == 500
    assert "shared by 2 processes" in places.shared(alone, 2).reserve
    assert places.shared(alone, 1) == alone
    for elsewhere in (here(name="h200", capacity=1000), here(platform="gpu", capacity=1000)):
        assert places.shared(elsewhere, 2) == elsewhere


# ---------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize("stages", ["one", "two"])
def test_evaluations_and_saves_are_those_of_training(stages: str, tmp_path: Path) -> None:
    overrides = {
        "model__stages": stages,
        "training__steps": 10,
        "training__eval_every": 4,
        "host__keep_last": 9,
    }
    runs = cohort(**overrides, host__checkpoint_every=3, host__workdir=tmp_path, host__cache=tmp_path)
    train(runs)
    (run,) = (path.parent for path in tmp_path.glob("*/*/*/summary.json"))
    rows, _ = disk.read_jsonl(run / "metrics.jsonl")
    saved = [json.loads(path.read_text())["regular"] for path in (run / "checkpoints").glob("*.json")]
    lengths = [10] if stages == "one" else [5, 5]
    parts = ToyTask(runs.base, "cpu").stages()
    assert hours.evaluations(parts, runs.base.training) == sum("val/loss" in row for row in rows)
    assert hours.saves(lengths, runs.base.host) == sum(saved)


def test_a_stated_rate_gives_the_seconds_of_the_steps_and_no_others() -> None:
    found = arm.estimate(cohort(2), here())
    gpu = here(kind=GPUS["h200"].kind)
    time = hours.stated(found, gpu, "bfloat16", 0.5)
    assert time is not None and found.flops_per_step is not None
    assert time.step_s == pytest.approx(2 * found.flops_per_step / (0.5 * 989e12))
    assert time.total_s == pytest.approx(found.steps * time.step_s)
    assert (time.compile_s, time.evaluate_s, time.source) == (None, None, "stated MFU 0.5")
    assert hours.stated(found, here(), "bfloat16", 0.5) is None  # nobody knows a CPU's peak
    rounded = hours.stated(found, gpu, "float32", 0.5)  # to TF32, whose peak is half of it
    assert rounded is not None
    assert rounded.step_s == pytest.approx(2 * time.step_s, rel=2e-3)
    assert hours.stated(found, gpu, "float64", 0.5) is None


def test_a_probe_times_everything_and_leaves_no_run(capsys, tmp_path: Path) -> None:
    workdir = tmp_path / "runs"
    argv = [TOY, "--arm=wide", "--target=cpu", "--members=2", "--probe", f"--config.host.workdir={workdir}"]
    assert command.main([*argv, f"--config.host.cache={tmp_path / 'cache'}"]) == 0
    found = Estimate.from_dict(json.loads(capsys.readouterr().out))
    time = found.time
    assert time is not None and found.members == 2
    parts = (time.start_s, time.compile_s, time.step_s, time.evaluate_s, time.save_s)
    assert all(part is not None and part > 0 for part in parts)
    start, compiling, step, evaluate, save = (part or 0.0 for part in parts)
    whole = start + compiling + 40 * step + time.evaluations * evaluate + time.saves * save
    assert time.total_s == pytest.approx(whole)
    assert (time.evaluations, time.saves) == (5, 4)
    assert time.source.startswith("probe on ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_probe_beside_others_says_so(child_env: dict[str, str], tmp_path: Path) -> None:
    argv = [TOY, "--arm=wide", "--target=cpu", "--probe", "--beside=2", f"--config.host.cache={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxablate.estimate", *argv],
        env=child_env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["time"]["source"].endswith(", 1 beside it")


# ---------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--arm=wiide",), "no arm 'wiide'; did you mean 'wide'"),
        (("--arm=wide", "--target=h20"), "--target=h20: unknown target; did you mean 'h200'"),
        (("--arm=wide", "--members=0"), "--members=0: must be 1 or more"),
        (("--arm=wide", "--mfu=40"), "--mfu=40: must be a share"),
        (("--arm=wide", "--mfu=0"), "--mfu=0: must be a share"),
        (("--arm=wide", "--beside=0"), "--beside=0: must be 1 or more"),
        (("--arm=wide", "--config.training.batch_size=7", "--config.host.mesh.data=2"), "must divide 7"),
        (("--arm=wide", "--memberz=2"), "--memberz: unknown argument"),
    ],
)
def test_what_is_wrong_is_one_line(argv: tuple[str, ...], message: str, capsys, tmp_path: Path) -> None:
    assert command.main([TOY, *argv, f"--config.host.cache={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_a_probe_of_another_device_is_refused(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(targets, "has_cuda_compiler", lambda: False)
    argv = [TOY, "--arm=wide", "--target=h200", "--probe", f"--config.host.cache={tmp_path}"]
    assert command.main(argv) == 2
    assert "--probe: times this machine, a cpu, which is no h200" in capsys.readouterr().err


def test_an_arm_with_nothing_to_train_on_takes_no_time(tmp_path: Path) -> None:
    """As the loop, which skips it; one with something to train on does take some."""

    def probed(task: type[ToyTask]) -> tuple[Estimate, TimeFacts]:
        own = cohort_with(task, tmp_path, training__steps=2, host__cache=tmp_path)
        began = time.perf_counter()
        return arm.estimate(own, here()), probe.measure(own, here(), began, 0)

    found, spent = probed(EmptyTask)
    assert (found.steps, found.examples, spent.step_s, spent.evaluations, spent.saves) == (0, 0, 0.0, 0, 0)
    assert found.flops_per_step and spent.total_s == spent.start_s
    found, spent = probed(ToyTask)
    assert found.steps == 2 and spent.step_s > 0 and spent.evaluations == 2


def test_what_each_stage_begins_with_is_evaluated_too_where_it_may_come_back() -> None:
    run = config.load("tests/configs/toy.py", [("model.stages", "two")]).base
    stages = ToyTask(run, "cpu").stages()
    best = dataclasses.replace(run.training, restore="best")
    assert hours.evaluations(stages, best) == hours.evaluations(stages, run.training) + 1
