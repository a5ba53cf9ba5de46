"""Names and values of a user's reach the batch script as data only; a secret in the environment reaches no file."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxablate.errors import UserError
from jaxablate.schedule import on_finish
from jaxablate.schedule.slurm.left import SubmitOptions
from jaxablate.schedule.slurm.sbatch import finish_argv, sbatch_argv
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import Array
from jaxablate.schedule.slurm.submit import submit
from jaxablate.study import Arm
from tests.schedule.slurm.fake_slurm import FakeSlurm
from tests.schedule.toy_studies import STUDIES
from tests.slurm_lab import Lab

FUZZED, THROUGH_BASH = 10_000, 300
ID = "20250102T030405-0a1b2c"
SCRIPT = "launch/array.sbatch"
SECRET = "hunter2-7f3a9c"

PIECES = (
    "\n", "\r", "\t", " ", "'", '"', "`", "\\", "$(touch PWNED)", "`touch PWNED`", ";touch PWNED;", "${HOME}", "$IFS",
    "&&", "||", "|", ">PWNED", "<", "*", "?", "~", "!", "#", "%", "%%", "%j", "%A_%a", "--wrap=id", "-o", "--", "=",
    "\n#SBATCH --output=PWNED\n", "{a,b}", "[x]", "é", "✓", "日本", "\u202e", "\x7f", "\x01", "a", "B", "0", ".", "..",
)  # fmt: skip


def fuzzed(count: int, seed: int) -> Iterator[str]:
    """Names made of what shells, SLURM and file systems treat in a way of their own."""
    draw = random.Random(seed)
    for _ in range(count):
        yield "".join(draw.choice(PIECES) for _ in range(draw.randint(1, 6)))


def folder(name: str) -> str:
    """An absolute path with a fuzzed name in it; no name holds a slash or a NUL, and none is `.` or `..`."""
    return f"/work/x{name}/toy"


# ------------------------------------------------------------------------------------ the command line


def test_a_name_is_one_word_of_the_command_whatever_it_holds(repo: Path) -> None:
    digest = hashlib.sha256((repo / SCRIPT).read_bytes()).hexdigest()
    plain = sbatch_argv(Site(), "/work/plain/toy", ID, Array(None, 0, 8), 4, (12,), SCRIPT)
    last = finish_argv(Site(), "/work/plain/toy", ID, (12,), SCRIPT)
    for name in fuzzed(FUZZED, 1):
        path = folder(name)
        for found, known in (
            (sbatch_argv(Site(), path, ID, Array(None, 0, 8), 4, (12,), SCRIPT), plain),
            (finish_argv(Site(), path, ID, (12,), SCRIPT), last),
        ):
            differ = [i for i, (a, b) in enumerate(zip(found, known, strict=True)) if a != b]
            assert [known[i].partition("=")[0] for i in differ] == ["--chdir", "--output", "/work/plain/toy"]
            assert (found[differ[0]], found[differ[2]]) == (f"--chdir={path}", path)
    assert hashlib.sha256((repo / SCRIPT).read_bytes()).hexdigest() == digest


def test_a_value_of_a_profile_is_one_word_or_refused() -> None:
    accepted, refusals = 0, []
    fields = itertools.cycle(("partition", "account", "qos", "constraint", "gres"))
    plain = sbatch_argv(Site(), "/w/toy", ID, Array(None, 0, 1), 0, (), SCRIPT)
    for field, value in zip(fields, fuzzed(FUZZED, 2), strict=False):
        try:
            site = dataclasses.replace(Site(), **{field: value})
        except UserError as error:
            refusals.append(str(error))
            continue
        accepted += 1
        found = sbatch_argv(site, "/w/toy", ID, Array(None, 0, 1), 0, (), SCRIPT)
        assert [word for word in found if word not in plain] == [f"--{field}={value}"]
        assert len(found) == len(plain) + 1
    assert accepted > FUZZED / 10
    assert len(refusals) > FUZZED / 10
    assert all(len(line.splitlines()) == 1 for line in refusals)


def test_a_name_that_is_no_name_is_refused_in_one_line() -> None:
    accepted, refusals = 0, []
    for name in fuzzed(FUZZED, 3):
        try:
            Arm(name)
        except UserError as error:
            refusals.append(str(error))
            continue
        accepted += 1
        assert re.fullmatch(r"\w[\w.-]*", name)  # so neither an option nor a path of its own
    assert 0 < accepted < FUZZED / 2
    assert all(len(line.splitlines()) == 1 for line in refusals)


def test_the_program_of_on_finish_sees_no_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for value in (*fuzzed(40, 4), "; touch PWNED", "$(touch PWNED)"):
        on_finish.call(("true", value), tmp_path, 0)
    assert list(tmp_path.iterdir()) == []
    subprocess.run(["sh", "-c", "true ; touch PWNED"], check=True)  # which one would do
    assert (tmp_path / "PWNED").exists()


# --------------------------------------------------------------------------------------------- bash


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """In the place of Python: says what it was called with, and what it finds in its environment."""
    path = tmp_path / "bin" / "python stub"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\nprintf 'ENVIRONMENT\\0'\nenv -0\n")
    path.chmod(0o755)
    return path


def test_bash_hands_every_argument_on_as_it_is(stub: Path, repo: Path, tmp_path: Path) -> None:
    names = [*fuzzed(THROUGH_BASH, 5), "-n", "--", "a\nb", "%j", "$(touch PWNED)"]
    for name in names:
        own = [folder(name), name, f"--first={name}"]
        environment = {"JAXABLATE_PYTHON": str(stub), "PATH": os.environ["PATH"], "OTHER": name}
        done = subprocess.run(
            ["bash", str(repo / SCRIPT), *own], cwd=tmp_path, env=environment, capture_output=True, check=True
        )
        said = os.fsdecode(done.stdout).split("\0")
        assert said[: said.index("ENVIRONMENT")] == ["-P", "-m", "jaxablate.schedule.slurm.element", *own]
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_a_script_into_which_names_are_written_would_run_them(tmp_path: Path) -> None:
    """The control: the same names, and the same bash."""
    for name in fuzzed(THROUGH_BASH, 5):
        text = f"#!/bin/bash\ntrue {folder(name)}\n"
        subprocess.run(
            ["bash", "-c", text], cwd=tmp_path, capture_output=True, check=False, stdin=subprocess.DEVNULL
        )
    assert list(tmp_path.glob("PWNED*"))


def test_modules_are_loaded_by_name_before_python_starts(stub: Path, repo: Path, tmp_path: Path) -> None:
    (tmp_path / "init").mkdir()
    (tmp_path / "init" / "bash").write_text('module() { printf "MODULE %s|" "$@"; [[ $2 != broken ]]; }\n')
    about = {"JAXABLATE_PYTHON": str(stub), "PATH": os.environ["PATH"], "MODULESHOME": str(tmp_path)}

    def run(modules: str) -> subprocess.CompletedProcess[str]:
        environment = {**about, "JAXABLATE_MODULES": modules}
        command = ["bash", str(repo / SCRIPT), "study", ID]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    assert run("gcc/13\n$(touch PWNED)").stdout.startswith(
        "MODULE load|MODULE gcc/13|MODULE load|MODULE $(touch PWNED)|-P"
    )
    assert not (tmp_path / "PWNED").exists()
    broken = run("broken")
    assert broken.returncode == 2
    assert "module load broken failed" in broken.stderr


# ------------------------------------------------------------------------------------------- secrets


def files_with(text: str, *folders: Path) -> list[str]:
    return [str(path) for where in folders for path in where.rglob("*")
            if path.is_file() and text.encode() in path.read_bytes()]  # fmt: skip


@pytest.fixture
def planted(tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.chdir(repo)
    return fake


def test_a_secret_of_the_environment_reaches_no_file_and_no_command(
    planted: FakeSlurm, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    outcome = submit(STUDIES["tuned"](str(runs)), Site(), SubmitOptions(on_finish=("true",)))
    assert len(planted.calls("sbatch")) == 3
    assert SECRET not in json.dumps([planted.calls("sbatch"), outcome.to_dict(), outcome.text()])
    assert files_with(SECRET, tmp_path) == []
    (exported,) = {word for argv in planted.calls("sbatch") for word in argv if word.startswith("--export")}
    assert "=" not in exported.partition("=")[2]
    assert "ALL" not in exported.split(",")
    assert "WANDB_API_KEY" not in exported
    assert files_with(outcome.submission.id, runs)  # it can find what is there


@pytest.mark.slow
def test_on_a_real_cluster_every_path_is_data_and_a_secret_stays_where_it_was(
    slurm: Lab, stub: Path, tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    site = Site(python=str(stub), environment=("HOME", "PATH"), memory="50M", cpus=1)
    names = ["plain", "a b", "%j%A", "back\\slash%a", "new\nline", "q'\"$(touch PWNED)`id`;", "-x é✓"]
    where = {}
    for name in names:
        outcome = submit(STUDIES["slow"](str(tmp_path / "w" / name)), site, SubmitOptions())
        where[name] = (outcome.path.resolve(), outcome.submission)
    jobs = [job for _, record in where.values() for job in record.jobs()]
    slurm.wait_for(lambda: not slurm.squeue(*jobs), 60, "the arrays")
    for path, record in where.values():
        (log,) = (path / "slurm" / record.id).glob("*.log")
        said = os.fsdecode(log.read_bytes()).split("\0")
        assert said[3 : said.index("ENVIRONMENT")] == [str(path), record.id, "--first=0"]
    assert not list(tmp_path.rglob("PWNED*"))
    assert files_with(SECRET, tmp_path) == []
    # The control: told to pass everything on, SLURM does, and the log has it.
    log = tmp_path / "all.log"
    options = ["--export=ALL", f"--output={log}", "--array=0-0", "--mem=50M"]
    about = {"JAXABLATE_PYTHON": str(stub), "WANDB_API_KEY": SECRET}
    job = slurm.sbatch((repo / SCRIPT).read_text(), *options, **about)
    slurm.wait_for(lambda: not slurm.squeue(job), 60, "the control")
    assert files_with(SECRET, tmp_path) == [str(log)]
