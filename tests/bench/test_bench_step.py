"""`jaxablate bench step`: what it times is the training step, what it writes reads back, and the report shows it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate import cli, config, footprint, study
from jaxablate.analysis import benchmarks
from jaxablate.analysis.benchmarks import ArmBenchmark, EffectRatio, StepBenchmark, Timing
from jaxablate.analysis.findings import Estimate
from jaxablate.analysis.report import expected as expected_section
from jaxablate.analysis.report import timings
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.stats.analyse import analyse
from jaxablate.bench import step, step_memory, step_programs
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.study import Expectation, Study
from tests.analysis.made import made_results, made_study

TOY = "tests/configs/toy_study.py"
ROUNDS = 9
ONE_DEVICE = "--config.host.mesh.data=1"  # as most users have; eight in turns starve on two cores


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


@pytest.fixture(scope="module")
def workdir(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory in which the toy study was frozen and benchmarked, by the command."""
    where = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        declared = study.load(TOY, [("host.workdir", str(where)), ("host.mesh.data", "1")])
        Manifest.freeze(
            declared, {a.name: config.resolve(declared.config(a.name)).base for a in declared.arms}
        )
        argv = ["bench", "step", TOY, f"--workdir={where}", f"--rounds={ROUNDS}", ONE_DEVICE]
        assert cli.main([*argv, "--what=step,forward,backward"]) == 0
    return where


@pytest.fixture
def found(workdir: Path) -> StepBenchmark:
    (path,) = (workdir / "toy" / "bench").glob("step_*.json")
    return benchmarks.load(path)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


# ------------------------------------------------------------------------------------- what is timed


def toy_program(stage: str = "", members: int = 1, **changes: Any) -> step_programs.StepProgram:
    changes = {"host__mesh__data": 1, **changes}
    declared = study.load(TOY, [(path.replace("__", "."), str(value)) for path, value in changes.items()])
    built = step_programs.make_program(config.resolve(declared.config("baseline")).base, stage, members)
    built.rows = built.cohort.base.training.batch_size
    return built


def test_forward_and_backward_are_those_of_the_training_step() -> None:
    built = toy_program(model__noise=0.1)
    state, batch = built.init(), step_programs.Batches("real").of(built.task)
    arguments = state, built.member, built.put_micro(batch), built.base
    loss, pullback = built.linearized(*arguments)
    gradient = built.backward(pullback, jnp.ones_like(loss))
    norm = math.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(gradient)))
    assert float(built.forward(*arguments)[0]) == float(loss[0])
    _, metrics = built.compile_step()(state, built.member, built.put_batch(batch), np.int32(1))
    assert float(loss[0]) == pytest.approx(float(metrics["train/loss"][0]), rel=1e-6)
    assert norm == pytest.approx(float(metrics["train/grad_norm"][0]), rel=1e-5)
    # Of other examples they are other numbers: the comparison above could have failed.
    made_up = built.put_micro(step_programs.made_up(built.task))
    other = built.forward(built.init(), built.member, made_up, built.base)
    assert float(other[0]) != pytest.approx(float(loss[0]), rel=1e-3)


def test_members_of_a_later_stage_are_programs_of_their_own_seeds_and_of_its_steps() -> None:
    """Each as in a cohort of one, and with the noise of the stage's own first step."""
    changes = {"model__noise": 0.1, "model__stages": "two", "host__mesh__member": 1}
    built = toy_program("second", 2, **changes)
    assert (built.stage.name, built.first, len(built.cohort.runs)) == ("second", 20, 2)
    batch = step_programs.Batches("real", members=2).of(built.task)
    assert batch["x"].shape == (2, 8, 4) and not np.array_equal(batch["x"][0], batch["x"][1])
    arguments = built.init(), built.member, built.put_micro(batch), built.base
    losses = np.asarray(built.compile(built.forward, *arguments)(*arguments))
    linearized, pullback = built.compile(built.linearized, *arguments)(*arguments)
    assert np.asarray(linearized) == pytest.approx(losses, rel=1e-6)
    one = jnp.ones_like(linearized)
    gradient = built.compile(built.backward, pullback, one)(pullback, one)
    found = step_programs.Runnable(built, built.compile_step(), batch, ("step",)).call("step")()
    assert np.asarray(found["train/loss"]) == pytest.approx(losses, rel=1e-6)
    for m, run in enumerate(built.cohort.runs):
        norm = math.sqrt(sum(float(jnp.sum(jnp.square(g[m]))) for g in jax.tree.leaves(gradient)))
        assert norm == pytest.approx(float(found["train/grad_norm"][m]), rel=1e-5)
        alone = step_programs.make_program(run, "second")
        batch = step_programs.Batches("real").of(alone.task)
        metrics = step_programs.Runnable(alone, alone.compile_step(), batch, ("step",)).call("step")()
        assert float(metrics["train/loss"][0]) == pytest.approx(float(losses[m]), rel=1e-6)
    # In the first stage the noise is another.
    first = toy_program("first", 2, **changes)
    other = np.asarray(first.compile(first.forward, *arguments)(*arguments))
    assert other != pytest.approx(losses, rel=1e-4)


def test_the_batch_is_the_tasks_own_and_made_up_only_in_so_many_words() -> None:
    task = toy_program().task
    real, synthetic = step_programs.Batches("real"), step_programs.Batches("synthetic")
    first = real.of(task)
    assert first["x"].shape == (1, 8, 4)
    assert real.words == "the task's own (toy-64)"
    assert synthetic.of(task)["x"].shape == (1, 8, 4)
    assert "--synthetic" in synthetic.words
    assert not np.array_equal(synthetic.of(task)["x"], first["x"])
    broken = step_programs.Batches("real")
    assert broken.of(toy_program(data__problem="broken").task)["y"].shape == (1, 8)
    assert "made up" in broken.words and "toy.csv: is broken" in broken.words


# ---------------------------------------------------------------------------------- what is written


def test_the_record_holds_every_sample_and_what_they_come_to(found: StepBenchmark) -> None:
    assert [arm.arm for arm in found.arms] == ["baseline", "wide", "split", "wide_split"]
    assert found.whats == ("step", "forward", "backward")
    assert (found.batch_size, found.micro_batch, found.rounds) == (8, 4, ROUNDS)
    assert found.data == "the task's own (toy-64)"
    base, wide = found.arms[0].timing("step"), found.arms[1].timing("step")
    assert base is not None and wide is not None and wide.ratio is not None
    assert base.ratio is None
    for arm in found.arms:
        for timing in arm.timings:
            assert len(timing.samples_ms) == ROUNDS and min(timing.samples_ms) > 0
            assert timing.median_ms == pytest.approx(np.median(timing.samples_ms))
    pairs = np.log(wide.samples_ms) - np.log(base.samples_ms)
    assert np.exp(pairs.min()) <= wide.ratio.value <= np.exp(pairs.max())
    assert wide.ratio.low is not None and wide.ratio.low <= wide.ratio.value
    assert found.arms[0].examples_per_sec == pytest.approx(8000 / base.median_ms)
    assert found.arms[2].accumulation == 2


def test_memory_is_the_compilers_and_the_same_for_two_copies(found: StepBenchmark) -> None:
    for arm in found.arms:
        parts = arm.memory
        assert parts is not None
        assert parts["peak"] == parts["argument"] + parts["output"] + parts["temp"] - parts["alias"]
    assert found.control is not None and found.control.memory_ratio == 1.0
    assert (found.arms[1].memory_ratio or 0) > 1.0  # the wide network's


def test_effects_are_those_of_the_factorial(found: StepBenchmark) -> None:
    of = {(e.factors, e.quantity): e.estimate for e in found.effects}
    assert {names for names, _ in of} == {("wide",), ("split",), ("wide", "split")}
    assert {quantity for _, quantity in of} == {"step", "forward", "backward", "memory"}
    a, b, c, d = (arm.memory["peak"] for arm in found.arms)
    assert of[("wide",), "memory"].value == pytest.approx(math.sqrt(b * d / (a * c)))
    assert of[("wide", "split"), "memory"].value == pytest.approx(a * d / (b * c))


def test_each_config_and_the_machine_are_on_record(found: StepBenchmark) -> None:
    declared = study.load(TOY)
    for arm in found.arms:
        assert arm.config == config.resolve(declared.config(arm.arm)).base.fingerprint
    assert found.provenance["packages"]["jax"] == jax.__version__
    assert "diff" not in (found.provenance["git"] or {})
    assert found.platform == "cpu" and found.hardware


def test_table_and_figure_lie_beside_it(workdir: Path) -> None:
    files = {path.suffix: path for path in (workdir / "toy" / "bench").iterdir()}
    assert set(files) == {".json", ".md", ".png", ".svg"}
    text = files[".md"].read_text()
    words = ("wide\\_split", "baseline, again", "forward, ×", "one launch is part of it")
    for word in (*words, f"({files['.png'].name})"):
        assert word.replace("\\_", "_") in text.replace("\\_", "_")
    assert files[".png"].read_bytes().startswith(b"\x89PNG")


def test_one_arm_is_measured_beside_the_baseline_and_json_is_the_record(capsys, tmp_path: Path) -> None:
    argv = ["bench", "step", TOY, "--arm=split", "--rounds=3", "--synthetic", "--no-control", "--batch=16"]
    assert cli.main([*argv, ONE_DEVICE, f"--out={tmp_path}", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (path,) = tmp_path.glob("step_*.json")
    assert printed["files"][0] == str(path)
    assert [arm["arm"] for arm in printed["arms"]] == ["baseline", "split"]
    assert printed["batch_size"] == 16 and printed["control"] is None
    assert printed["effects"] == [] and "wide" in printed["effects_note"]
    assert {k: v for k, v in printed.items() if k not in ("files", "exit_code")} == json.loads(
        path.read_text()
    )


def test_a_stage_and_members_are_said_and_rates_are_of_all_members(capsys, tmp_path: Path) -> None:
    argv = ["bench", "step", TOY, "--arm=split", "--rounds=3", "--no-control", f"--out={tmp_path}"]
    two = "--config.model.stages=two"
    assert cli.main([*argv, ONE_DEVICE, two, "--stage=second", "--members=2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "batch 8 for each of 2 members that differ in seed, stage second, 2 of 2" in printed
    assert "rates are of all together" in printed and "steps/s" in printed
    (path,) = tmp_path.glob("step_*.json")
    found = benchmarks.load(path)
    assert (found.stage, found.members, found.batch_size) == ("second, 2 of 2", 2, 8)
    for arm in found.arms:
        assert (timing := arm.timing("step")) is not None
        assert arm.steps_per_sec == pytest.approx(2000 / timing.median_ms)
        assert arm.examples_per_sec == pytest.approx(16_000 / timing.median_ms)
    # The first stage is the default; of one member there is no word.
    assert cli.main([*argv, ONE_DEVICE, two, "--arm=baseline"]) == 0
    printed = capsys.readouterr().out
    assert "stage first, 1 of 2" in printed
    assert "members that" not in printed and "all together" not in printed and "steps/s" not in printed


def test_what_was_written_before_there_were_members_is_read(found: StepBenchmark, tmp_path: Path) -> None:
    values = json.loads(json.dumps(dataclasses.asdict(found)))
    del values["members"]
    for arm in (*values["arms"], values["control"]):
        del arm["steps_per_sec"]
    (tmp_path / "old.json").write_text(json.dumps(values))
    assert benchmarks.load(tmp_path / "old.json") == found


def test_each_arm_has_its_own_kernels_on_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def of(task: Any) -> dict[str, Any]:
        return {"norm": SimpleNamespace(requested="auto", name=f"norm of {task.config.arm}")}

    monkeypatch.setattr(type(toy_program().task), "kernels", property(of))
    argv = ["bench", "step", TOY, "--arm=split", "--rounds=1", f"--out={tmp_path}", "--no-control"]
    assert cli.main([*argv, ONE_DEVICE]) == 0
    (path,) = tmp_path.glob("step_*.json")
    found = benchmarks.load(path)
    assert [arm.kernels for arm in found.arms] == [{"norm": "norm of baseline"}, {"norm": "norm of split"}]
    assert found.provenance["kernels"] == {}  # and none for all of them


def test_an_arm_that_cannot_run_here_is_named_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    whole = step.make_program

    def one_kernel_is_missing(run: Any, *args: Any) -> step_programs.StepProgram:
        if run.arm == "split":
            raise UserError("config.model.norm='fast': platform is cpu, supported is gpu")
        return whole(run, *args)

    monkeypatch.setattr(step, "make_program", one_kernel_is_missing)
    argv = [
        "bench",
        "step",
        TOY,
        "--arm=split",
        "--rounds=1",
        f"--out={tmp_path}",
        "--no-control",
        ONE_DEVICE,
    ]
    assert cli.main(argv) == 1
    assert "not measured: config.model.norm='fast'" in " ".join(capsys.readouterr().out.split())
    (path,) = tmp_path.glob("step_*.json")
    good, bad = benchmarks.load(path).arms
    assert good.timings and not good.problem
    assert not bad.timings and "supported is gpu" in bad.problem


# ---------------------------------------------------------------------------------------- the report


def report(workdir: Path, out: Path) -> str:
    assert cli.main(["report", str(workdir / "toy"), f"--out={out}"]) == 0
    return (out / "report.md").read_text()


def test_the_report_shows_a_benchmark_and_names_one_that_it_cannot_read(
    workdir: Path, tmp_path: Path
) -> None:
    text = report(workdir, tmp_path / "with")
    assert "Benchmark, timed in turns, on" in text
    assert "A benchmark and no training run" in text
    assert "baseline, again" in text
    assert list((tmp_path / "with" / "figures").glob("bench_step_*.png"))
    (path,) = (workdir / "toy" / "bench").glob("step_*.json")
    whole = path.read_bytes()
    try:
        path.write_text(json.dumps({**json.loads(whole), "format": 99}))
        text = report(workdir, tmp_path / "without")
    finally:
        path.write_bytes(whole)
    assert "Benchmark, timed in turns" not in text
    assert path.name in text and "is no benchmark of format 1" in text
    assert not list((tmp_path / "without" / "figures").glob("bench_step_*"))


# ------------------------------------------------------------------------------------- expectations


def benchmark(platform: str = "gpu", **changes: Any) -> StepBenchmark:
    """One of the made-up study, in which flash takes 0.4 times as long and 0.45 of the memory."""

    def arm(name: str, ratio: Estimate | None, memory: float) -> ArmBenchmark:
        timing = Timing("step", (1.0, 1.0, 1.0), 1.0, 0.0, ratio)
        return ArmBenchmark(name, "0" * 12, {}, 1, "none", "float32", timings=(timing,), memory_ratio=memory)

    fields: dict[str, Any] = {
        "format": 1,
        "study": "made",
        "scale": "tiny",
        "baseline": "baseline",
        "time": "",
        "data": "",
        "hardware": "1 x NVIDIA H200",
        "platform": platform,
        "stage": "main",
        "members": 1,
        "batch_size": 4,
        "micro_batch": 4,
        "compilation": "anew",
        "rounds": 3,
        "level": 0.95,
        "effects": (),
        "effects_note": "",
        "judged": (),
        "control": None,
        "provenance": {},
    }
    arms = (arm("baseline", None, 1.0), arm("flash_only", Estimate(0.4, 0.38, 0.42), 0.45))
    return StepBenchmark(**(fields | {"arms": arms} | changes))


def judged(expected: Expectation, found: StepBenchmark) -> benchmarks.Judged:
    return benchmarks.judge(made_study(expectations=(expected,)), found)[0]


@pytest.mark.parametrize(
    ("response", "low", "high", "verdict"),
    [
        ("speedup", 2, 4, "met"),  # 2.5 (2.38 to 2.63)
        ("speedup", 2, None, "met"),
        ("speedup", 2.5, 4, "inconclusive"),
        ("speedup", 2, 2.5, "inconclusive"),
        ("speedup", 3, 4, "not met"),
        ("speedup", 1.05, 1.1, "not met"),
        ("memory", None, 0.5, "met"),
        ("memory", None, 0.4, "not met"),
        ("memory", 0.3, 0.45, "met"),
    ],
)
def test_an_expectation_is_met_if_the_whole_interval_lies_within(response, low, high, verdict) -> None:
    found = judged(Expectation("flash", "flash", response=response, low=low, high=high), benchmark())
    assert found.verdict == verdict
    assert "1 x NVIDIA H200" in found.reason
    assert "flash_only against baseline" in found.of
    assert "GPU" not in found.reason


def test_a_verdict_from_a_cpu_says_what_it_is_worth() -> None:
    fast = Expectation("flash", "flash", response="speedup", low=2)
    assert "says nothing about a GPU" in judged(fast, benchmark("cpu")).reason


def test_a_factors_main_effect_goes_before_the_arm_that_changes_it_alone() -> None:
    effect = EffectRatio(("flash",), "step", Estimate(1.25, 1.2, 1.3))
    fast = Expectation("flash", "flash", response="speedup", low=2)
    assert judged(fast, benchmark(effects=(effect,))).verdict == "not met"
    assert judged(fast, benchmark()).verdict == "met"
    assert (
        judged(dataclasses.replace(fast, factor="", arm="flash_only"), benchmark(effects=(effect,))).verdict
        == "met"
    )


@pytest.mark.parametrize(
    ("expected", "reason"),
    [
        (Expectation("swiglu: better"), "in words"),
        (Expectation("rms", "rms", response="speedup", low=1.05), "rms_only: was not in the benchmark"),
        (Expectation("all", arm="optimized_full", response="memory", high=0.5), "optimized_full: was not in"),
    ],
)
def test_what_was_not_measured_is_not_judged(expected: Expectation, reason: str) -> None:
    found = judged(expected, benchmark())
    assert (found.verdict, found.measured) == ("not measured", None)
    assert reason in found.reason


def test_without_an_interval_nothing_is_met() -> None:
    arms = benchmark().arms
    bare = dataclasses.replace(arms[1], timings=(Timing("step", (1.0,), 1.0, 0.0, Estimate(0.4)),))
    fast = Expectation("flash", "flash", response="speedup", low=2)
    assert judged(fast, benchmark(arms=(arms[0], bare))).verdict == "inconclusive"


def test_the_report_has_the_verdict_beside_the_expectation() -> None:
    asked = (
        Expectation("flash: twice as fast", "flash", response="speedup", low=2),
        Expectation("rms: faster", "rms", response="speedup", low=1.05),
        Expectation("swiglu: better", "swiglu"),
    )

    def rows(*measured: StepBenchmark) -> list[str]:
        runs = dataclasses.replace(made_results(made_study(expectations=asked)), benchmarks=measured)
        table = expected_section.table(Scene(runs, analyse(runs)))
        assert table is not None
        return [" | ".join(f"{cell.text} {cell.note}" for cell in row) for row in table.rows]

    fast, rms, words = rows(benchmark())
    assert fast.endswith("| met ") and "×2.500 (2.381 to 2.632) on 1 x NVIDIA H200" in fast
    assert "rms_only: was not in the benchmark" in rms
    assert "in words" in words and "swiglu_only: speed ×" in words
    both = rows(benchmark(), benchmark("cpu", hardware="EPYC", arms=benchmark().arms[:1]))[0]
    assert "met; not measured" in both
    assert all("not measured" in row for row in rows()[:2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": " "}, "has no text"),
        ({"low": 2.0}, "need response="),
        ({"response": "speedup", "low": 2.0}, "of what"),
        ({"response": "speedup", "factor": "flash"}, "give low, high or both"),
        ({"response": "speedup", "factor": "flash", "low": 4.0, "high": 2.0}, "the smaller one first"),
        ({"response": "memory", "factor": "flash", "low": -1.0}, "positive"),
        ({"factor": "flash", "arm": "rms_only"}, "not both"),
        ({"factor": "flush"}, "did you mean 'flash'"),
        ({"arm": "rms"}, "did you mean 'rms_only'"),
        ({"arm": "baseline"}, "with itself"),
    ],
)
def test_an_expectation_that_cannot_be_judged_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made_study(expectations=(Expectation(**({"text": "fast"} | fields)),))


def test_a_study_frozen_with_expectations_in_words_is_still_read() -> None:
    values = {**made_study().to_dict(), "expectations": ["flash: faster"]}
    assert Study.from_dict(values).expectations == (Expectation("flash: faster"),)
    with pytest.raises(UserError, match=r"expectations\[0\]\.lwo: no such field; did you mean"):
        Study.from_dict({**values, "expectations": [{"text": "fast", "lwo": 1.0}]})


def test_two_copies_that_differ_are_a_warning() -> None:
    def control(ratio: Estimate) -> StepBenchmark:
        arms = benchmark().arms
        timing = Timing("step", (1.0,), 1.0, 0.0, ratio)
        return benchmark(control=dataclasses.replace(arms[0], arm=step.CONTROL, timings=(timing,)))

    assert control(Estimate(1.001, 0.99, 1.01)).warnings == ()
    (warning,) = control(Estimate(1.02, 1.01, 1.03)).warnings
    assert "differ by more than chance" in warning
    assert timings.warnings(control(Estimate(1.02, 1.01, 1.03)))


# ------------------------------------------------------------------------------------- largest batch


@pytest.mark.parametrize("limit", [1000, 1024, 5000, 100_000])
@pytest.mark.parametrize(("start", "unit"), [(8, 1), (12, 4), (64, 8)])
def test_the_largest_batch_fits_and_the_next_does_not(limit: int, start: int, unit: int) -> None:
    asked = []

    def peak(size: int) -> int:
        asked.append(size)
        return 100 + 25 * size

    fits, fails = footprint.search(peak, limit, start, unit)
    assert fits is not None and fails is not None
    assert peak(fits) <= limit < peak(fails)
    assert fails - fits <= max(unit, fits // footprint.RESOLUTION)
    assert all(size % unit == 0 for size in asked)
    assert len(asked) < 30


def test_where_nothing_or_everything_fits_it_says_so() -> None:
    assert footprint.search(lambda size: 10**9, 10, 8, 4) == (None, 4)
    assert footprint.search(lambda size: None, 10, 8, 4) == (None, 4)
    fits, fails = footprint.search(lambda size: 1, 10, 8, 4)
    assert fails is None and fits is not None and fits > footprint.MOST // 2


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("800m", 8 * 10**8), ("4096", 4096)]
)
def test_memory_is_read_as_it_is_written(text: str, size: int) -> None:
    assert step_memory.memory_limit(text) == (size, "--memory")


def test_on_a_cpu_the_memory_is_the_hosts_and_said_to_be() -> None:
    size, source = step_memory.memory_limit("")
    assert size > 2**28 and "RAM" in source


def test_largest_batches_of_a_study_by_the_command(capsys, tmp_path: Path) -> None:
    argv = [
        "bench",
        "step",
        TOY,
        "--arm=wide",
        "--largest-batch",
        "--memory=6KB",
        f"--out={tmp_path}",
        "--json",
    ]
    assert cli.main([*argv, ONE_DEVICE]) == 0
    found = json.loads(capsys.readouterr().out)
    base, wide = found["arms"]
    for arm in (base, wide):
        peaks = arm["peaks"]
        assert peaks[str(arm["fits"])] <= 6_000 < peaks[str(arm["fails"])]
        assert list(peaks.values()) == sorted(peaks.values())
    assert wide["fits"] < base["fits"]
    assert (found["stage"], found["members"]) == ("main", 1)
    argv += ["--config.model.stages=two", "--stage=second", "--members=2", ONE_DEVICE]
    assert cli.main([*argv, "--config.host.mesh.member=1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["stage"], found["members"]) == ("second, 2 of 2", 2)
    for both, one in zip(found["arms"], (base, wide), strict=True):
        assert both["peaks"]["8"] > 1.3 * one["peaks"]["8"]
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("batch_")


# ------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--what=stp",), "--what=stp: did you mean 'step'"),
        (("--what=,",), "--what: is empty"),
        (("--rounds=0",), "--rounds=0: must be 1 or more"),
        (("--members=0",), "--members=0: must be 1 or more"),
        (("--members=0", "--largest-batch"), "--members=0: must be 1 or more"),
        (("--stage=mian",), "--stage=mian: there is no such stage; valid: main"),
        (
            ("--stage=secnd", "--config.model.stages=two", "--largest-batch"),
            "--stage=secnd: there is no such stage; valid: first, second",
        ),
        (("--arm=wiide",), "no arm 'wiide'; did you mean 'wide'"),
        (("--group=narow",), "no group 'narow'"),
        (("--group=narrow", "--arm=wide"), "no arm is in both"),
        (("--batch=0",), "training.batch_size=0"),
        (("--memory=24GB",), "--largest-batch"),
        (("--largest-batch", "--memory=lots"), "--memory=lots: is no size"),
        (("--config.training.accumulation=2",), "is what factor 'split' varies"),
        (("--roundz=3",), "--roundz: unknown argument"),
    ],
)
def test_what_is_wrong_is_one_line(argv: tuple[str, ...], message: str, capsys, tmp_path: Path) -> None:
    assert message in refused(capsys, "bench", "step", TOY, *argv, f"--workdir={tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_benchmark_is_named(capsys) -> None:
    assert "stepp" in refused(capsys, "bench", "stepp", TOY)
    assert "kernels belong to no study" in refused(capsys, "bench", "kernels", "--config.training.steps=3")
    assert "did you mean 'forward'" in refused(capsys, "bench", "kernels", "--directions=forwards")
