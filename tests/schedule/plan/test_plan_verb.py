"""`jaxablate plan` as a user has it: one line for bad input, files that are whole, estimates that are kept."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from jaxablate import cli, study
from jaxablate.errors import UserError
from jaxablate.schedule import local
from jaxablate.schedule.plan import machine, verbs
from jaxablate.schedule.plan.make import make
from jaxablate.schedule.plan.plan import Plan
from jaxablate.schedule.plan.work import Remaining
from jaxablate.schedule.survey import Selection
from tests.schedule.plan.made_estimates import Made

STUDY = """
from jaxablate.study import Study, factorial
from tests.schedule.toy_studies import LOSS, WIDE, base

def get_study(arg=""):
    return Study("toy", (WIDE,), factorial((WIDE,)), (0, 1, 2), (LOSS,), base("runs"))
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("JAXABLATE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "study.py").write_text(STUDY)
    return str(tmp_path / "study.py")


def error_of(capfd: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["plan", *argv]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--deadline=abc", "--gpus=1"], "argument --deadline: 'abc': write a time as 90m, 6h or 2d"),
        (["--deadline=0h", "--gpus=1"], "argument --deadline: '0h'"),
        (["--deadline=-6h", "--gpus=1"], "argument --deadline: '-6h'"),
        (["--deadline=6h"], "--deadline=6h: on how many GPUs? Give --gpus=N"),
        (["--gpus=0"], "argument --gpus: '0': must be 1 or more"),
        (["--gpus=two"], "argument --gpus: 'two'"),
        (["--target=h300"], "--target=h300: unknown target; did you mean 'h200'?"),
        (["--rate=-3"], "--rate=-3: must be above 0"),
        (["--rate=nan"], "--rate=nan: must be above 0"),
        (["--rate=much"], "argument --rate: invalid float value: 'much'"),
        (["--mfu=1.5", "--target=h200"], "--mfu=1.5: must be above 0 and at most 1"),
        (["--share=0"], "--share=0: must be above 0 and at most 1"),
        (["--power=1.2"], "--power=1.2: must be above 0 and at most 1"),
        (["--probe", "--target=h200"], "--probe: times steps on this machine"),
        (["--probe", "--mfu=0.4"], "--probe: not allowed with --mfu"),
        (["--max-members=-1"], "--max-members=-1: must be 0 or more"),
        (["--arm=wid"], "study toy: no arm 'wid'; did you mean 'wide'?"),
        (["--seeds=9"], "--seeds=9: is not a seed of study toy"),
        (["--site=none.toml"], "--site=none.toml: cannot be read"),
        (["--pilot=nowhere"], "nowhere: no such directory"),
    ],
)
def test_bad_input_is_one_line(spec, capfd, arguments, message):
    assert error_of(capfd, spec, *arguments).startswith(message)


@pytest.mark.parametrize(
    ("text", "hours"), [("90m", 1.5), ("6h", 6.0), ("2d", 48.0), ("1.5h", 1.5), ("36s", 0.01)]
)
def test_times_are_read_as_they_are_written(text, hours):
    assert verbs.hours(text) == pytest.approx(hours)


@pytest.mark.parametrize(
    ("text", "hours"),
    [
        ("30", 0.5),
        ("30:30", 30.5 / 60),
        ("08:00:00", 8.0),
        ("2-12", 60.0),
        ("1-06:30:00", 30.5),
        ("UNLIMITED", None),
    ],
)
def test_a_sites_time_is_read_as_slurm_does(text, hours):
    assert verbs._limit(text) == (None if hours is None else pytest.approx(hours))


def test_a_plan_is_made_written_and_its_estimates_are_kept(spec, tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO, "jaxablate")
    command = ["plan", spec, f"--workdir={tmp_path / 'runs'}", "--arm=wide", "--json"]
    assert cli.main(command) == 0
    shown = json.loads(capfd.readouterr().out)
    path = tmp_path / "runs" / "toy" / "plan.json"
    plan = Plan.load(path.parent)
    assert plan is not None
    assert shown == json.loads(json.dumps(plan.to_dict())) | {"written": [str(path)]}
    (arm,) = plan.arms
    assert (arm.arm, arm.runs, arm.members, arm.fits, arm.parameters) == ("wide", 3, 3, True, 97)
    assert (arm.hours, plan.makespan) == (None, None)  # nobody has timed it
    assert "estimate 1 of 1: wide, 3 members" in caplog.text
    assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0
    caplog.clear()
    assert cli.main(command) == 0
    assert "estimate" not in caplog.text


# ------------------------------------------------------------------------- where a plan is followed


@pytest.fixture
def planned(spec, tmp_path):
    """`planned("h200")`: keeps a plan of the study for two GPUs and two hours, `wide` first and without seed 2."""

    def make_it(target: str) -> Path:
        options = verbs.PlanOptions(gpus=2, deadline=2.0, target=target)
        declared = study.load(spec, [("host.workdir", str(tmp_path / "runs"))])
        selection = Selection.of(declared, "", (), (), "all")
        work = Remaining.of(declared, local.resolve(declared), selection)
        slow = Made(wide={"hours": 0.9}, baseline={"hours": 0.8})
        plan = make(work, verbs.request(work, options), slow)
        assert plan.dropped == (2,)
        plan.save(work.manifest.path)
        return work.manifest.path

    return make_it


def run(tmp_path: Path, verb: str, spec: str, *options: str) -> int:
    return cli.main([verb, spec, f"--workdir={tmp_path / 'runs'}", *options])


def test_run_follows_the_plan_in_the_studys_directory(planned, spec, tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO, "jaxablate")
    path = planned("cpu")
    assert run(tmp_path, "run", spec, "--gpus=2", "--deadline=2h", "--dry-run") == 0
    assert f"following {path / 'plan.json'}" in caplog.text
    shown = capfd.readouterr().out.splitlines()
    assert "would train 4 runs in 2 cohorts, 2 at a time on the CPU" in shown
    assert [line.split()[0] for line in shown if "(confirm)" in line] == ["wide", "baseline"]


def test_a_plan_for_something_else_is_not_followed(planned, spec, tmp_path, capfd, caplog, monkeypatch):
    def refused(*args, **options):
        raise UserError("it plans anew")

    monkeypatch.setattr(verbs, "make_plan", refused)
    planned("cpu")
    others = (
        ["--gpus=3", "--deadline=2h"],
        ["--gpus=2", "--deadline=121m"],
        ["--gpus=2"],
        ["--gpus=2", "--deadline=2h", "--seeds=0"],
        ["--gpus=2", "--deadline=2h", "--arm=wide"],
    )
    for options in others:
        assert run(tmp_path, "run", spec, *options, "--dry-run") == 2
        assert "it plans anew" in capfd.readouterr().err
    planned("h200")
    assert run(tmp_path, "run", spec, "--gpus=2", "--deadline=2h", "--dry-run") == 2
    assert "it plans anew" in capfd.readouterr().err


def test_submit_follows_the_plan_in_the_studys_directory(planned, spec, tmp_path, capfd):
    planned("h200")
    assert run(tmp_path, "submit", spec, "--gpus=2", "--deadline=2h", "--dry-run", "--json") == 0
    shown = json.loads(capfd.readouterr().out)
    assert [(e["arm"], e["seeds"]) for e in shown["submission"]["elements"]] == [
        ("wide", [0, 1]),
        ("baseline", [0, 1]),
    ]
    assert "seeds left out of every arm for the deadline: 2" in shown["notes"]
    assert shown["submission"]["site"]["array_limit"] == 2


def test_submit_needs_a_plan_since_it_cannot_time_anything(spec, tmp_path, capfd):
    assert run(tmp_path, "submit", spec, "--gpus=2", "--deadline=6h", "--dry-run") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "holds no plan with hours for this; first: jaxablate plan" in line
    assert "--gpus=2 --deadline=6h --target=h200 --mfu=0.4" in line


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("run", ["--deadline=6h"], "--deadline=6h: on how many GPUs? Give --gpus=N"),
        ("submit", ["--deadline=6h"], "--deadline=6h: on how many GPUs? Give --gpus=N"),
        ("run", ["--gpus=0"], "argument --gpus: '0': must be 1 or more"),
        (
            "run",
            ["--gpus=2", "--deadline=soon"],
            "argument --deadline: 'soon': write a time as 90m, 6h or 2d",
        ),
        ("run", ["--gpus=2", "--workers=2"], "--workers=2: not allowed with --gpus"),
    ],
)
def test_bad_places_are_one_line(spec, tmp_path, capfd, verb, options, message):
    assert run(tmp_path, verb, spec, *options) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.removeprefix("error: ").startswith(message)


# ------------------------------------------------------------------------------------- this machine


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """`driver(script)`: an nvidia-smi that is this script."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def put(script: str) -> None:
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.write_text(f"#!/bin/bash\n{script}\n")
        tool.chmod(0o755)

    return put


MIXED = """cat <<EOF
0, GPU-aaaa-1111, NVIDIA H200
1, GPU-bbbb-2222, NVIDIA A100
2, GPU-cccc-3333, NVIDIA H200
EOF"""


def test_the_kind_is_that_of_the_gpus_that_may_be_used(driver, monkeypatch):
    driver(MIXED)
    alike = (
        (["0", "2"], "NVIDIA H200"),
        (["1"], "NVIDIA A100"),
        (["GPU-aaaa", "GPU-cccc-3333"], "NVIDIA H200"),
    )
    for visible, kind in alike:
        monkeypatch.setattr(machine.workers, "gpus", lambda visible=visible: visible)
        assert machine.kind() == kind
    monkeypatch.setattr(machine.workers, "gpus", lambda: ["1", "2"])
    with pytest.raises(UserError, match="NVIDIA A100, NVIDIA H200; name alike ones in CUDA_VISIBLE_DEVICES"):
        machine.kind()


def test_a_driver_that_does_not_know_or_answer_is_one_line(driver, monkeypatch):
    monkeypatch.setattr(machine.workers, "gpus", lambda: ["0", "9"])
    for script in (MIXED, "echo 'No devices were found'; exit 6"):
        driver(script)
        with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES: .* knows no GPU [09]; name those"):
            machine.kind()
    monkeypatch.setattr(machine, "_DRIVER_S", 0.2)
    driver("exec sleep 60")
    with pytest.raises(UserError, match=r"no answer in 0\.2 s; mend the driver"):
        machine.kind()


# ------------------------------------------------------------------------------ what a plan could not do


def test_run_and_submit_say_that_a_plan_is_short(spec, tmp_path, capfd, caplog):
    options = verbs.PlanOptions(gpus=2, deadline=1.0)
    declared = study.load(spec, [("host.workdir", str(tmp_path / "runs"))])
    selection = Selection.of(declared, "", (), (), "all")
    work = Remaining.of(declared, local.resolve(declared), selection)
    plan = make(work, verbs.request(work, options), Made(wide="bad width"))
    assert plan.short and any(arm.problem for arm in plan.arms)
    plan.save(work.manifest.path)
    said = (f"the deadline cannot be met: {plan.short}", "which are trained last: wide: bad width")
    assert run(tmp_path, "run", spec, "--gpus=2", "--deadline=1h", "--dry-run") == 0
    assert [sum(part in line for line in caplog.messages) for part in said] == [1, 1]
    capfd.readouterr()
    assert run(tmp_path, "submit", spec, "--gpus=2", "--deadline=1h", "--dry-run", "--json") == 0
    notes = json.loads(capfd.readouterr().out)["notes"]
    assert [sum(part in note for note in notes) for part in said] == [1, 1]


def test_a_share_of_a_cpu_is_refused(spec, capfd):
    assert error_of(capfd, spec, "--target=cpu", "--share=0.5").startswith("--share=0.5: is of a GPU")
