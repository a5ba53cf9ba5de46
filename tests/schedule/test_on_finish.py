"""`--on-finish`: a program of the user's own, once, whatever the end was."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxablate import cli
from jaxablate.errors import UserError
from jaxablate.schedule import local, on_finish
from jaxablate.schedule.on_finish import calling, deferred, parse
from jaxablate.schedule.plan import verbs as planning

TOY = "tests/configs/toy_study.py"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Adds a line with its arguments, the study and the code to the file `called` beside it."""
    path = tmp_path / "stop it"
    path.write_text(
        f"#!{sys.executable} -S\nimport os, sys\ne = os.environ\n"
        "line = ' '.join([*sys.argv[1:], e['JAXABLATE_STUDY_DIR'], e['JAXABLATE_EXIT_CODE']])\n"
        f"open({str(tmp_path / 'called')!r}, 'a').write(line + '\\n')\nsys.exit(3)\n"
    )
    path.chmod(0o755)
    return path


def calls(program: Path) -> list[str]:
    called = program.with_name("called")
    return called.read_text().splitlines() if called.exists() else []


def test_it_is_split_as_a_shell_would_and_no_further() -> None:
    assert parse("") == ()
    assert parse("true 'a b' \"c;d\" $(e)") == ("true", "a b", "c;d", "$(e)")
    for text in ("no-such-program now", "'", " ", "./nothing"):
        with pytest.raises(UserError, match="--on-finish="):
            parse(text)


@pytest.mark.parametrize(
    ("raised", "code"), [(None, 75), (UserError("x"), 2), (KeyboardInterrupt(), 130), (ValueError("x"), 70)]
)
def test_it_is_called_once_at_any_end(
    program: Path, tmp_path: Path, raised: BaseException | None, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    ends = contextlib.nullcontext() if raised is None else pytest.raises(type(raised))
    with ends, caplog.at_level(logging.INFO, "jaxablate"), calling((str(program), "a b"), tmp_path) as finish:
        if raised is not None:
            raise raised
        finish.exit_code = code
    assert calls(program) == [f"a b {tmp_path} {code}"]
    assert "ended with code 3" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_nothing_hears_is_an_end_too(
    program: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """As while jax is imported or a plan is made, before the launcher listens; and nothing is waited for."""
    text = (
        "import signal, threading\n"
        "from jaxablate.schedule.on_finish import calling\n"
        f"with calling([{str(program)!r}], {str(tmp_path)!r}):\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
        f"    signal.raise_signal({int(number)})\n"
    )
    done = subprocess.run([sys.executable, "-c", text], check=False, timeout=60)
    assert done.returncode == -number
    assert calls(program) == [f"{tmp_path} {128 + number}"]


def test_the_call_can_be_left_to_who_started_the_process(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with deferred() as finish:
        monkeypatch.setattr(os, "environ", dict(finish.environment))
        finish.call(1)
        assert calls(program) == []  # nothing was started
        with calling((str(program), "a b"), tmp_path) as child:
            child.exit_code = 75
        assert calls(program) == []  # the job goes back into the queue
        finish.call(137)
    assert calls(program) == [f"a b {tmp_path} 137"]


def test_without_one_nothing_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("something was called"))
    with calling((), tmp_path):
        pass


def test_run_calls_it_after_the_result_is_said(
    repo: Path,
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(repo)
    outcome = local.Ended(tmp_path / "toy", {"done": 3, "bug": 1}, (), (), 1)
    said: list[str] = []

    def call(*args: object) -> None:
        said.append(capsys.readouterr().out)

    monkeypatch.setattr(local, "run_study", lambda *args: outcome)
    monkeypatch.setattr(on_finish, "call", call)
    assert cli.main(["run", TOY, f"--workdir={tmp_path}", f"--on-finish='{program}'"]) == 1
    assert len(said) == 1
    assert "3 done, 1 bug" in said[0]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--dry-run"], 0),
        (["--arm=wiide"], 2),
        (["--on-finish=no-such-program"], 2),
        (["--deadline=6h"], 2),
        (["--gpus=2", "--workers=2"], 2),
    ],
)
def test_nothing_is_called_if_nothing_was_started(
    repo: Path,
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
) -> None:
    monkeypatch.chdir(repo)
    where = [f"--workdir={tmp_path / 'runs'}", f"--on-finish='{program}'"]
    assert cli.main(["run", TOY, *where, *arguments]) == code
    assert calls(program) == []
    assert not (tmp_path / "runs").exists()


def test_a_plan_that_cannot_be_made_is_an_end(
    repo: Path, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise UserError("no step could be timed")

    monkeypatch.chdir(repo)
    monkeypatch.setattr(planning, "make_plan", fail)
    where = [f"--workdir={tmp_path / 'runs'}", f"--on-finish='{program}'"]
    assert cli.main(["run", TOY, *where, "--gpus=1"]) == 2
    assert calls(program) == [f"{tmp_path / 'runs' / 'toy'} 2"]


@pytest.mark.slow
def test_a_launcher_that_is_stopped_calls_it_too(
    repo: Path, program: Path, tmp_path: Path, child_env: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "jaxablate.cli", "run", f"{TOY}:steps=200", f"--workdir={tmp_path}"]
    child = subprocess.Popen(
        [*command, f"--on-finish='{program}'"], cwd=repo, env=child_env, stderr=subprocess.PIPE
    )
    while not list(tmp_path.glob("toy/logs/*.log")):
        assert child.poll() is None
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGTERM)
    child.communicate(timeout=120)
    assert child.returncode == 75
    assert calls(program) == [f"{tmp_path / 'toy'} 75"]
