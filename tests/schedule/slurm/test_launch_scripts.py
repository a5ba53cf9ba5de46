"""The scripts in launch/: constant, called by hand as by `submit`, and they end in the program itself."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxablate import study
from jaxablate.manifest import Manifest
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm.left import SubmitOptions
from jaxablate.schedule.slurm.sbatch import OWN_VARIABLES
from jaxablate.schedule.slurm.site import ENVIRONMENT, Site
from jaxablate.schedule.slurm.submit import submit
from tests.schedule.slurm.fake_slurm import FakeSlurm
from tests.schedule.toy_studies import STUDIES


@pytest.fixture
def launch(repo: Path) -> Path:
    return repo / "launch"


def bash(script: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(script), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["array.sbatch", "multinode.sbatch", "launch_all.sh"])
def test_bash_reads_them(launch: Path, name: str) -> None:
    subprocess.run(["bash", "-n", str(launch / name)], check=True)
    assert os.access(launch / name, os.X_OK)
    assert "set -u" in (launch / name).read_text() or "set -euo" in (launch / name).read_text()


@pytest.mark.parametrize("name", ["array.sbatch", "multinode.sbatch", "packed.sbatch"])
def test_they_pass_on_the_variables_that_a_profile_does(launch: Path, name: str) -> None:
    (line,) = (line for line in (launch / name).read_text().splitlines() if "--export=" in line)
    assert line.partition("--export=")[2].split(",") == [*OWN_VARIABLES, *ENVIRONMENT]
    assert {"JAX_COORDINATOR_ADDRESS", "NCCL_SOCKET_IFNAME", "JAXABLATE_TUNED"} <= set(ENVIRONMENT)


def test_both_batch_scripts_differ_in_the_one_option(launch: Path) -> None:
    def code(name: str) -> list[str]:
        return [
            line
            for line in (launch / name).read_text().splitlines()
            if line.strip("# ") and not line.startswith("# ")
        ]

    one, many = code("array.sbatch"), code("multinode.sbatch")
    assert [line.replace(" --over-nodes", "") for line in many] == one
    assert many != one


def test_without_python_it_says_so(launch: Path) -> None:
    done = bash(
        launch / "array.sbatch", "study", "id", PATH=os.environ["PATH"], JAXABLATE_PYTHON="/nowhere/python"
    )
    assert done.returncode == 127
    assert "/nowhere/python" in done.stderr


@pytest.mark.slow
def test_an_element_by_hand(launch: Path, tmp_path: Path, child_env: dict[str, str], repo: Path) -> None:
    """As SLURM would run it, with real training: a stage, and the next one when the first is done."""
    fake = FakeSlurm(tmp_path / "fake")
    declared = STUDIES["slow"](str(tmp_path / "runs"))
    declared.base.model.stages = "two"
    declared.base.training.update(steps=8, eval_every=4)
    outcome = submit(declared, Site(), SubmitOptions(stages="chained"), "prepare")
    assert outcome.submission is not None
    assert [shlex.split(shlex.join(argv)) for argv in outcome.commands] == [
        list(argv) for argv in outcome.commands
    ]

    def task(number: int) -> subprocess.CompletedProcess[str]:
        about = {
            "SLURM_ARRAY_JOB_ID": "12",
            "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_JOB_ID": str(12 + number),
        }
        environment = {**child_env, **about, "PATH": fake.path, "JAXABLATE_PYTHON": sys.executable}
        return bash(launch / "array.sbatch", str(outcome.path), outcome.submission.id, **environment)

    manifest = Manifest.load(outcome.path)
    early = task(1)
    assert early.returncode == 1, early.stderr
    assert "did not start: element 0" in early.stderr
    for number, state in ((0, "paused"), (1, "done")):
        done = task(number)
        assert done.returncode == 0, done.stderr
        element = outcome.submission.elements[number]
        rows = records.element_log(outcome.path, outcome.submission, element)
        assert rows[-1]["state"] == state
    for run in manifest.runs:
        history = manifest.run_dir(run).history()
        assert [row["state"] for row in history] == ["running", "preempted", "running", "done"]
        assert [row["slurm"]["job"] for row in history if row["state"] == "running"] == ["12_0", "12_1"]
        steps = [json.loads(line)["step"] for line in manifest.run_dir(run).metrics.read_text().splitlines()]
        assert max(steps) == 8
        assert len([row for row in history if row["state"] == "done"]) == 1


# ------------------------------------------------------------------------------------------- launch_all


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A folder with an interpreter that says what it was told, and the tools that scripts need."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python3").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (folder / "python3").chmod(0o755)
    for name in ("bash", "dirname", "sed", "sh"):
        (folder / name).symlink_to(shutil.which(name) or "")
    return folder


def told_in(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the program was told, behind `-m jaxablate.cli`."""
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[:2] == ["-m", "jaxablate.cli"]
    return words[2:]


def test_a_group_is_submitted_where_slurm_is_and_run_where_it_is_not(launch: Path, told: Path) -> None:
    here = bash(launch / "launch_all.sh", "ablation", "--dry-run", "--workdir=a b", PATH=str(told))
    assert "training on this machine" in here.stderr
    verb, study_file, *rest = told_in(here)
    assert (verb, rest) == ("run", ["--group=ablation", "--dry-run", "--workdir=a b"])
    assert Path(study_file).resolve() == (launch.parent / "configs" / "ctclip.py").resolve()
    (told / "sbatch").symlink_to(told / "python3")
    there = bash(launch / "launch_all.sh", "all", PATH=str(told), JAXABLATE_STUDY="mine.py:scale=tiny")
    assert told_in(there) == ["submit", "mine.py:scale=tiny", "--group=all"]
    assert there.stderr == ""


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_study_is_named_among_the_options_before_the_environment_names_it(
    launch: Path, told: Path, at: int
) -> None:
    options = ["--dry-run", "--config.data.train=a b"]
    words = [*options[:at], "--study=my studies/x.py:arms=all", *options[at:]]
    done = bash(launch / "launch_all.sh", "a group", *words, PATH=str(told), JAXABLATE_STUDY="mine.py")
    assert told_in(done) == ["run", "my studies/x.py:arms=all", "--group=a group", *options]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a group of the study first"),
        (("--study=configs/tinystories.py",), "give a group of the study first"),
        (("all", "--study", "configs/tinystories.py"), "write it as --study=FILE"),
    ],
)
def test_what_the_script_itself_refuses(
    launch: Path, told: Path, words: tuple[str, ...], message: str
) -> None:
    done = bash(launch / "launch_all.sh", *words, PATH=str(told))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


@pytest.mark.parametrize(
    ("name", "group", "valid"),
    [("ctclip", "all; touch x", "ablation, all, baseline, optimized"), ("tinystories", "everything", "all")],
)
def test_a_group_that_the_study_has_not_is_answered_with_those_it_has(
    launch: Path, told: Path, child_env: dict[str, str], name: str, group: str, valid: str
) -> None:
    real = {**child_env, "PATH": str(told), "JAXABLATE_PYTHON": sys.executable}
    study_file = launch.parent / "configs" / f"{name}.py"
    done = bash(launch / "launch_all.sh", group, f"--study={study_file}", "--dry-run", **real)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"error: study {name}: no group '{group}'; valid: {valid}"


def test_the_groups_of_ct_clip_cover_it(repo: Path) -> None:
    declared = study.load(str(repo / "configs" / "ctclip.py"))
    arms = {group: {arm.name for arm in declared.select(group)} for group in ("all", *declared.groups)}
    assert set(declared.groups) == {"baseline", "optimized", "ablation"}
    assert arms["baseline"] | arms["optimized"] | arms["ablation"] == arms["all"]
    assert len(arms["all"]) == 8


def test_all_of_a_study_with_rates_to_tune_is_the_tuning_and_then_the_confirmations(
    launch: Path, tmp_path: Path, child_env: dict[str, str]
) -> None:
    """Of TinyStories, as `submit` hands it to SLURM: each arm's confirmations behind its own tuning."""
    fake = FakeSlurm(tmp_path / "fake")
    study_file = launch.parent / "configs" / "tinystories.py"
    words = ("all", f"--study={study_file}", "--dry-run", "--json", f"--workdir={tmp_path / 'runs'}")
    real = {**child_env, "PATH": fake.path, "JAXABLATE_PYTHON": sys.executable}
    done = bash(launch / "launch_all.sh", *words, **real)
    assert done.returncode == 0, done.stderr
    elements = json.loads(done.stdout)["submission"]["elements"]
    arms = [arm.name for arm in study.load(str(study_file)).arms]
    tuning = {e["arm"]: number for number, e in enumerate(elements) if e["phase"] == "tuning"}
    assert list(tuning) == arms
    behind = {e["arm"]: e["after"] for e in elements if e["phase"] == "confirm"}
    assert behind == {arm: [tuning[arm]] for arm in arms}
    assert not (tmp_path / "runs").exists()
