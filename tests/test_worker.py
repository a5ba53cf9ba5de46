"""The worker's border: which runs it takes, what it refuses, and that it goes when its launcher has gone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxablate import worker
from jaxablate.claims import Claim, Claimed
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.stopping import EXIT_PAUSED, EXIT_TAKEN
from tests.frozen import freeze, toy_study, write_run


@pytest.fixture
def manifest(tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.chdir(repo)
    return freeze(toy_study(tmp_path))


def ids(manifest: Manifest, arm: str = "baseline") -> list[str]:
    return [run.id for run in manifest.runs if run.arm == arm]


def work(manifest: Manifest, *flags: str, runs: list[str] | None = None) -> int:
    wanted = ",".join(ids(manifest) if runs is None else runs)
    return worker.main([str(manifest.path), "--arm=baseline", f"--runs={wanted}", *flags])


def test_a_frozen_run_is_rebuilt_as_it_was_on_this_host(manifest: Manifest, tmp_path: Path) -> None:
    runs = worker.find_runs(manifest, "wide", list(reversed(ids(manifest, "wide"))))
    cohort = worker.rebuild(manifest, runs, {"split": 2})
    assert [run.fingerprint for run in cohort.runs] == [run.fingerprint for run in runs]
    assert [run.seed for run in cohort.runs] == [0, 1, 2]
    assert (cohort.base.host.split, cohort.base.host.workdir) == (2, str(tmp_path))
    assert cohort.base.model.width == 16


def test_a_program_that_computes_something_else_is_refused(
    manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (manifest.path / "study.json").read_text()
    assert '"width": 8' in text
    (manifest.path / "study.json").write_text(text.replace('"width": 8', '"width": 9'))
    assert work(Manifest.load(manifest.path)) == 2
    error = capsys.readouterr().err
    assert "was frozen as" in error
    assert error.count("\n") == 1
    history = manifest.run_dir(manifest.runs[0]).history()
    assert history == []


def test_a_run_that_is_not_in_the_study_is_refused(
    manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ids(manifest)[0]
    assert work(manifest, runs=[first[:-1]]) == 2
    assert f"did you mean '{first}'" in capsys.readouterr().err
    with pytest.raises(UserError, match="the study has no runs of arm 'narrow'"):
        worker.find_runs(manifest, "narrow", [first])


@pytest.mark.parametrize("flag", ["--host={", "--host=3", '--host={"splits": 2}'])
def test_a_bad_host_is_refused(manifest: Manifest, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert work(manifest, flag) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_study_under_another_name_is_refused(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest.path.rename(tmp_path / "renamed")
    moved = Manifest.load(tmp_path / "renamed")
    assert work(moved) == 2
    assert "must have its name" in capsys.readouterr().err


def test_a_cohort_of_which_another_has_a_run_is_left_to_it_whole(
    manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    where = manifest.run_dir(manifest.runs[1])
    where.create(manifest.config_of(manifest.runs[1]))
    with Claim(where.claim):
        assert work(manifest) == EXIT_TAKEN
    assert "left alone" in capsys.readouterr().err
    assert not any(manifest.run_dir(run).claim.exists() for run in manifest.runs)  # it gave the others back


def test_runs_that_are_done_are_not_trained_again(manifest: Manifest) -> None:
    for run in manifest.runs:
        if run.arm == "baseline":
            write_run(manifest, run)
    before = {path: path.stat().st_mtime_ns for path in manifest.path.rglob("*.json*")}
    assert work(manifest) == 0
    assert {path: path.stat().st_mtime_ns for path in manifest.path.rglob("*.json*")} == before


def promised(directory: Path) -> dict[str, bytes]:
    """The files of a run but for checkpoints that are not complete, which have names of their own."""
    files = {str(path): path for path in directory.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes() for name, path in files.items() if not re.search(r"/\d{9}-[0-9a-f]{8}", name)
    }


@pytest.mark.slow
def test_a_worker_that_was_stopped_for_longer_than_its_lease_writes_nothing_more(
    manifest: Manifest, repo: Path, child_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run, *_) = [run for run in manifest.runs if run.arm == "baseline"]
    where = manifest.run_dir(run)
    command = [
        sys.executable, "-m", "jaxablate.worker", str(manifest.path), "--arm=baseline", f"--runs={run.id}",
        '--host={"checkpoint_every": 1}',
    ]  # fmt: skip
    child = subprocess.Popen(command, cwd=repo, env=child_env, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not list(where.checkpoints.glob("*.json")):
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.01)
        claim = Claim(where.claim)
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        while not claim.held:  # in the middle of a write it would keep the claim
            child.send_signal(signal.SIGCONT)
            time.sleep(0.02)
            child.send_signal(signal.SIGSTOP)
            while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                time.sleep(0.01)
            os.utime(where.claim, (0, 0))
            with contextlib.suppress(Claimed):
                claim.acquire()
        before = promised(where.path)
        child.send_signal(signal.SIGCONT)
        _, words = child.communicate(timeout=60)
        assert child.returncode == EXIT_TAKEN, words
        assert b"left alone" in words
        assert promised(where.path) == before
        claim.release()
    finally:
        child.kill()
        child.wait()


@pytest.mark.slow
def test_a_worker_trains_until_a_stage(
    tmp_path: Path, repo: Path, child_env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    study = toy_study(tmp_path / "staged")
    study.base.model.stages = "two"
    staged = freeze(study)
    command = [
        sys.executable, "-m", "jaxablate.worker", str(staged.path), "--arm=baseline",
        f"--runs={','.join(ids(staged))}", "--until=first",
    ]  # fmt: skip
    child = subprocess.run(command, cwd=repo, env=child_env, capture_output=True, timeout=240, check=False)
    assert child.returncode == EXIT_PAUSED, child.stderr
    assert child.stderr.endswith(b"paused: stage 'first' is done, as asked\n")
    ends = [staged.run_dir(run).history()[-1] for run in staged.runs if run.arm == "baseline"]
    assert {end.get("paused") for end in ends} == {"first"}
    assert work(staged, "--until=later") == 2
    assert "valid: first, second" in capsys.readouterr().err


def test_a_worker_whose_launcher_has_gone_stops(
    manifest: Manifest, repo: Path, child_env: dict[str, str]
) -> None:
    nobody = 2**22 + 1  # no process has such a number
    command = [
        sys.executable, "-m", "jaxablate.worker", str(manifest.path), "--arm=baseline",
        f"--runs={','.join(ids(manifest))}", f"--parent={nobody}",
    ]  # fmt: skip
    child = subprocess.run(command, cwd=repo, env=child_env, capture_output=True, timeout=120, check=False)
    assert child.returncode == -15, child.stderr
    assert not any(manifest.run_dir(run).history() for run in manifest.runs)
    assert os.getppid() != nobody
    assert json.loads((manifest.path / "study.json").read_text())["study"]["name"] == "toy"
