"""`jaxablate submit`: what is queued, in which order, and no run twice. With SLURM's tools played."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jaxablate import cli
from jaxablate.claims import Claim
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.schedule import local
from jaxablate.schedule.slurm.left import SubmitOptions
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submit import submit
from tests.schedule.slurm.fake_slurm import FakeSlurm
from tests.schedule.slurm.submitting import frozen, newest, option, submitted
from tests.schedule.toy_studies import STUDIES

# ------------------------------------------------------------------------------------ what is submitted


def test_an_element_for_each_arm_in_one_array(tmp_path: Path, fake: FakeSlurm) -> None:
    outcome = submitted(tmp_path)
    (argv,) = fake.calls("sbatch")
    assert option(argv, "array") == "0-5"
    record = newest(tmp_path)
    assert outcome.submission == record
    assert record.state == "submitted"
    assert record.jobs() == [100]
    assert record.tasks() == {n: f"100_{n}" for n in range(6)}
    manifest = Manifest.load(tmp_path / "toy")
    carried = [run.id for element in record.elements for run in element.runs_of(manifest)]
    assert carried == [run.id for run in manifest.runs]
    assert (tmp_path / "toy" / "slurm").stat().st_mode & 0o077 == 0


def test_a_dry_run_prints_what_is_submitted_and_writes_nothing(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], repo: Path
) -> None:
    study = "tests/configs/toy_study.py"
    arguments = ["submit", study, f"--workdir={tmp_path / 'runs'}", "--array-limit=2", "--time=01:00:00"]
    assert cli.main([*arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert fake.calls("sbatch") == []
    assert (repo / "launch" / "array.sbatch").read_text().rstrip() in said
    assert cli.main(arguments) == 0
    (argv,) = fake.calls("sbatch")
    (line,) = (line for line in said.splitlines() if line.startswith("sbatch "))
    id = newest(tmp_path / "runs").id
    printed = [
        word.replace(option(shlex.split(line), "comment").split()[1], id) for word in shlex.split(line)
    ]
    assert printed == ["sbatch", *argv]
    assert "--array=0-3%2" in argv
    assert "--time=01:00:00" in argv


def test_a_second_time_nothing_is_submitted_until_it_has_left_the_queue(
    tmp_path: Path, fake: FakeSlurm
) -> None:
    submitted(tmp_path)
    again = submitted(tmp_path)
    assert again.submission is None
    assert again.notes == ("12 runs left out: queued already",)
    assert len(fake.jobs) == 1
    fake.end()  # and the directories say that nothing was done: they are right
    assert len(submitted(tmp_path).submission.elements) == 6
    assert len(fake.jobs) == 2


def test_what_is_done_or_failed_or_worked_on_is_left_out(tmp_path: Path, fake: FakeSlurm) -> None:
    manifest = frozen(tmp_path, "faults", baseline="done", raises="bug", tight="diverged")
    run = next(run for run in manifest.runs if run.arm == "killed")
    manifest.run_dir(run).create(manifest.config_of(run))
    with Claim(manifest.run_dir(run).claim):
        outcome = submitted(tmp_path)
    assert [(e.arm, len(e.runs)) for e in outcome.submission.elements] == [
        ("diverges", 2),
        ("hopeless", 2),
        ("killed", 1),
    ]
    assert "4 runs left out: done" in outcome.notes
    assert "1 run left out: being trained now" in outcome.notes


def test_only_what_was_asked_for(tmp_path: Path, fake: FakeSlurm) -> None:
    outcome = submitted(tmp_path, arms=("killed", "tight"), seeds=(1,))
    assert [(e.arm, e.seeds) for e in outcome.submission.elements] == [("tight", (1,)), ("killed", (1,))]
    frozen(tmp_path / "b", "faults", raises="bug", baseline="done")
    outcome = submitted(tmp_path / "b", only="failed")
    assert [e.arm for e in outcome.submission.elements] == ["raises"]


def test_cohorts_are_no_larger_than_is_allowed(tmp_path: Path, fake: FakeSlurm) -> None:
    outcome = submitted(tmp_path, max_members=1)
    assert [len(e.runs) for e in outcome.submission.elements] == [1] * 12
    outcome = submitted(tmp_path / "b", max_members=1, site=Site(gres="gpu:a100:2"))
    assert [len(e.runs) for e in outcome.submission.elements] == [2] * 6  # one cohort for each GPU


def test_a_prepared_submission_waits_for_its_user(tmp_path: Path, fake: FakeSlurm) -> None:
    outcome = submit(STUDIES["faults"](str(tmp_path)), Site(), SubmitOptions(), "prepare")
    assert fake.calls("sbatch") == []
    assert newest(tmp_path).state == "prepared"
    assert shlex.join(outcome.commands[0]) in outcome.text()
    assert outcome.commands[0][:3] == ("env", f"JAXABLATE_PYTHON={sys.executable}", "JAXABLATE_MODULES=")
    assert outcome.commands[0][3] == "sbatch"
    profile = Site(python="/opt/my env/bin/python", modules=("gcc/13", "cuda/13.0"))
    outcome = submit(STUDIES["faults"](str(tmp_path)), profile, SubmitOptions(), "prepare")
    asked = f"{shlex.join(outcome.commands[0][:3])} env -0"
    said = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True).stdout.split(
        "\0"
    )
    assert {"JAXABLATE_PYTHON=/opt/my env/bin/python", "JAXABLATE_MODULES=gcc/13\ncuda/13.0"} <= set(said)
    assert submitted(tmp_path).submission.state == "submitted"  # it holds nothing back


# --------------------------------------------------------------------------------------------- chains


def test_confirmations_wait_for_the_tuning_of_their_arm(tmp_path: Path, fake: FakeSlurm) -> None:
    outcome = submitted(tmp_path, "tuned", on_finish=("true", "now"))
    found = [(e.arm, e.phase, len(e.runs), e.after) for e in outcome.submission.elements]
    assert found == [
        ("baseline", "tuning", 4, ()),
        ("wide", "tuning", 4, ()),
        ("baseline", "confirm", 0, (0,)),
        ("wide", "confirm", 0, (1,)),
    ]
    first, second, last = fake.calls("sbatch")
    assert option(first, "dependency") == ""
    assert option(second, "dependency") == "afterany:100"
    assert option(last, "dependency") == "afterany:100:101"
    assert all("--kill-on-invalid-dep=yes" in argv for argv in (second, last))
    assert last[-1] == "--finish"
    assert newest(tmp_path).finish_job == 102
    assert submitted(tmp_path, "tuned").submission is None


def test_confirmations_of_an_arm_with_a_rate_wait_for_nobody(tmp_path: Path, fake: FakeSlurm) -> None:
    manifest = frozen(tmp_path, "tuned", baseline="done")
    resolved = local.resolve(STUDIES["tuned"](str(tmp_path)))
    manifest.with_rates({"baseline": {"learning_rate": 0.002, "grid": [0.0005, 0.002]}}, resolved)
    outcome = submitted(tmp_path, "tuned")
    found = [(e.arm, e.phase, len(e.runs), e.after) for e in outcome.submission.elements]
    assert found == [("wide", "tuning", 4, ()), ("baseline", "confirm", 2, ()), ("wide", "confirm", 0, (0,))]


def test_an_arm_whose_tuning_failed_is_told_apart(tmp_path: Path, fake: FakeSlurm) -> None:
    frozen(tmp_path, "tuned", wide="bug")
    outcome = submitted(tmp_path, "tuned")
    assert {e.arm for e in outcome.submission.elements} == {"baseline"}
    assert any(note.startswith("wide has no confirmations yet") for note in outcome.notes)


def test_stages_are_chained_if_asked_for(tmp_path: Path, fake: FakeSlurm) -> None:
    declared = STUDIES["slow"](str(tmp_path))
    declared.base.model.stages = "two"
    outcome = submit(declared, Site(), SubmitOptions(stages="chained"))
    first, second = outcome.submission.elements
    assert (first.stage, first.after, second.stage, second.after) == ("first", (), "", (0,))
    assert first.runs == second.runs
    assert outcome.submission.later(first) == [first, second]
    assert outcome.submission.later(second) == [second]
    assert [option(argv, "dependency") for argv in fake.calls("sbatch")] == ["", "afterany:100"]


# --------------------------------------------------------------------------------------------- refused


def test_what_is_refused_before_anything_is_written(tmp_path: Path, fake: FakeSlurm) -> None:
    declared = STUDIES["slow"](str(tmp_path / "runs"))
    named = dataclasses.replace(
        declared, arms=(dataclasses.replace(declared.arms[0], name="slurm"),), baseline="slurm"
    )
    with pytest.raises(UserError, match="arm 'slurm': its directory is where submissions are kept"):
        submit(named, Site(), SubmitOptions())
    with pytest.raises(UserError, match="--max-members=-1"):
        SubmitOptions(max_members=-1)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--time=soon", "--time: time='soon'"),
        ("--signal=KILL", "--signal: signal='KILL'"),
        ("--array-limit=-2", "--array-limit: array_limit=-2"),
        ("--site=nowhere.toml", "--site=nowhere.toml: cannot be read"),
        ("--on-finish=no-such-program now", "no program 'no-such-program'"),
        ("--on-finish='", "quote it as for a shell"),
        ("--prepare", "--dry-run: not allowed with --prepare"),
    ],
)
def test_a_mistaken_option_is_one_line(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], argument: str, words: str
) -> None:
    arguments = [
        "submit",
        "tests/configs/toy_study.py",
        f"--workdir={tmp_path / 'runs'}",
        "--dry-run",
        argument,
    ]
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert words in err
    assert not (tmp_path / "runs").exists()
