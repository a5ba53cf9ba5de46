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
from jaxablate.schedule.slurm.left import Options
from jaxablate.schedule.slurm.sbatch import OWN_VARIABLES
from jaxablate.schedule.slurm.site import ENVIRONMENT, Site
from jaxablate.schedule.slurm.submit import submit
from tests.schedule.slurm.fake_slurm import FakeSlurm
from tests.schedule.toy_studies import STUDIES

GROUPS = ("all", "baseline", "optimized", "ablation")


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
    outcome = submit(declared, Site(), Options(stages="chained"), "prepare")
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


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_submitted_where_slurm_is_and_run_where_it_is_not(
    launch: Path, told: Path, group: str
) -> None:
    here = bash(launch / "launch_all.sh", group, "--dry-run", "--workdir=a b", PATH=str(told))
    assert "training on this machine" in here.stderr
    words = here.stdout.splitlines()
    assert words[:3] == ["-m", "jaxablate.cli", "run"]
    assert words[4:] == [f"--group={group}", "--dry-run", "--workdir=a b"]
    assert Path(words[3]).resolve() == (launch.parent / "configs" / "ctclip.py").resolve()
    (told / "sbatch").symlink_to(told / "python3")
    there = bash(launch / "launch_all.sh", group, PATH=str(told), JAXABLATE_STUDY="mine.py:scale=tiny")
    assert there.stdout.splitlines()[2:] == ["submit", "mine.py:scale=tiny", f"--group={group}"]


@pytest.mark.parametrize("words", [(), ("everything",), ("all; touch x",)])
def test_any_other_word_is_refused(launch: Path, told: Path, words: tuple[str, ...]) -> None:
    done = bash(launch / "launch_all.sh", *words, PATH=str(told))
    assert done.returncode == 2
    assert done.stdout == ""
    assert "give one of all, baseline, optimized, ablation" in done.stderr


def test_its_words_are_groups_of_the_study_that_cover_it(repo: Path) -> None:
    declared = study.load(str(repo / "configs" / "ctclip.py"))
    arms = {group: {arm.name for arm in declared.select(group)} for group in GROUPS}
    assert arms["baseline"] | arms["optimized"] | arms["ablation"] == arms["all"]
    assert len(arms["all"]) == 8
