"""Estimates as a plan gets them: from processes that are asked again, kept, and one line where there is none."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxablate import config
from jaxablate.estimate import __main__ as command
from jaxablate.schedule.plan import estimates
from jaxablate.schedule.plan.estimates import Cohort, Estimator, Problem
from tests.schedule.plan.made_estimates import made
from tests.schedule.toy_studies import base

ONE = Cohort("baseline", 1)
ECHO = 'while read -r asked; do echo "$1"; done'


class Scripted(Estimator):
    """Runs a command of the test's instead of an estimate: `asked` is a question, $1 the answer to that for `ONE`."""

    def command(self) -> list[str]:
        return ["bash", "-c", self.spec, "bash", json.dumps(made(ONE.arm, ONE.members).to_dict())]


@pytest.fixture
def estimator(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXABLATE_CACHE", str(tmp_path / "cache"))
    values = base(str(tmp_path))
    values.arm = "baseline"
    run = config.resolve(values).base
    mesh = dataclasses.replace(run.host.mesh, data=2)
    wide = dataclasses.replace(run, host=dataclasses.replace(run.host, mesh=mesh))
    return lambda script, **options: Scripted(script, (), {"baseline": run, "over_two": wide}, **options)


# --------------------------------------------------------------------------------------- the processes


def test_what_a_process_says_is_the_estimate_and_is_kept(estimator):
    found = estimator(ECHO).estimate([ONE, ONE])
    assert found == {ONE: made("baseline", 1)}
    assert estimator("exit 1").estimate([ONE]) == found  # from the cache
    other = estimator("echo 'error: bad'>&2; exit 2", target="h200").estimate([ONE])
    assert other == {ONE: Problem("bad")}  # of another target it is not


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"arm": 1}'])
def test_a_damaged_kept_estimate_is_made_again(estimator, tmp_path, damage):
    echo = estimator(ECHO)
    echo.estimate([ONE])
    (path,) = (tmp_path / "cache" / "estimates").glob("*.json")
    path.write_text(damage)
    assert echo.estimate([ONE]) == {ONE: made("baseline", 1)}
    assert json.loads(path.read_text())["arm"] == "baseline"


def test_a_process_that_fails_is_a_problem_and_not_kept(estimator, tmp_path):
    failing = estimator("echo first >&2; echo 'RuntimeError: no' >&2; exit 1")
    assert failing.estimate([ONE]) == {ONE: Problem("RuntimeError: no")}
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_a_process_that_says_nothing_right_is_a_problem(estimator):
    for script in ("true", "echo nonsense", "echo '{}'", "echo '[]'", "echo -n '{}'"):
        (found,) = estimator(script).estimate([ONE]).values()
        assert isinstance(found, Problem)


def test_a_process_is_asked_again_unless_it_times_steps_or_has_other_devices(estimator, tmp_path):
    started = tmp_path / "started"
    script = f'echo "$$" >> {started}; {ECHO}'
    several = [Cohort("baseline", members) for members in range(1, 7)]

    def processes(cohorts: list[Cohort], **options: Any) -> int:
        started.unlink(missing_ok=True)
        assert len(estimator(script, **options).estimate(cohorts)) == len(cohorts)
        return len(started.read_text().split())

    assert processes(several) in (1, 2)
    assert processes(several, probe="yes") == len(several)
    alive = [pid for pid in started.read_text().split() if Path(f"/proc/{pid}").exists()]
    assert alive == []
    assert processes([ONE, Cohort("over_two", 1)], target="h200") == 2


def test_one_arm_that_ends_its_process_takes_no_other_with_it(estimator):
    script = """while read -r asked; do [[ $asked == *2* ]] && { echo "out of luck" >&2; exit 3; }; echo "$1"; done"""
    several = [Cohort("baseline", members) for members in range(1, 5)]
    found = estimator(script).estimate(several)
    assert found[several[1]] == Problem("out of luck")
    assert [found[cohort] for cohort in several if cohort != several[1]] == 3 * [made("baseline", 1)]


def test_an_arm_that_cannot_be_estimated_is_a_problem_and_the_next_is_asked(estimator, tmp_path):
    script = f'echo x >> {tmp_path}/started; while read -r asked; do echo \'{{"problem": "too wide"}}\'; done'
    several = [Cohort("baseline", members) for members in range(1, 5)]
    assert set(estimator(script).estimate(several).values()) == {Problem("too wide")}
    assert len((tmp_path / "started").read_text().split()) in (1, 2)


def test_the_command_asks_for_what_the_plan_is_about():
    overrides, own = [("data.count", "32")], ["--served", f"--parent={os.getpid()}"]
    probing = Estimator("study.py:scale=tiny", overrides, {}, probe="yes", beside=2)
    assert probing.command()[1:] == [
        "-m", "jaxablate.estimate", "study.py:scale=tiny", *own, "--probe", "--beside=2", "--config.data.count=32",
    ]  # fmt: skip
    stated = Estimator("study.py", (), {}, target="h200", mfu=0.4)
    assert stated.command()[4:] == [*own, "--target=h200", "--mfu=0.4"]


def test_what_decides_an_estimate_is_in_its_key(estimator, monkeypatch):
    def key(**options: Any) -> str:
        return estimator("true", **options)._path(ONE).name

    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    here, there = key(device="cpu"), key(target="h200")
    assert key(device="cpu") == here != key(device="NVIDIA H200")
    assert key(device="cpu", beside=2) != here  # half of the memory
    assert key(target="h200", beside=2) == there
    monkeypatch.setenv("UNRELATED", "0.5")
    assert (key(device="cpu"), key(target="h200")) == (here, there)
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_FLAGS", "JAX_ENABLE_X64"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "0.5")
            assert here != key(device="cpu")
            assert there != key(target="h200")


def test_an_estimate_that_never_ends_is_a_problem_that_says_how_to_look(estimator, monkeypatch):
    monkeypatch.setattr(estimates, "_PATIENCE_S", 0.3)
    (found,) = estimator("exec sleep 60").estimate([ONE]).values()
    assert isinstance(found, Problem)
    assert found.reason.startswith("no estimate within 0.005 minutes; to see what it waits for: bash -c")
    assert found.reason.endswith("--arm=baseline --members=1")


def test_it_says_at_the_start_that_estimates_take_long_and_are_kept(estimator, caplog):
    caplog.set_level(logging.INFO, "jaxablate")
    estimator(ECHO, target="h200").estimate([ONE])
    assert caplog.messages[0] == (
        "1 estimate to make: programs are compiled; a program for a GPU may take minutes to compile; they are kept "
        "for the next time"
    )
    caplog.clear()
    estimator(ECHO, target="h200").estimate([ONE])
    assert caplog.messages == []


def test_estimates_end_with_the_plan_that_asked_for_them(child_env, repo, tmp_path):
    """Whatever ends it: nobody could pass a SIGKILL on."""
    study = tmp_path / "study.py"
    study.write_text(
        "import os, pathlib, time\n"
        "def get_study(arg=''):\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(f'{{os.getpid()}}.')\n"
        "    time.sleep(60)\n"
    )
    code = (
        "import sys\n"
        "from jaxablate.schedule.plan.estimates import Estimator\n"
        "from jaxablate.schedule.plan.processes import Processes\n"
        f"command = Estimator({str(study)!r}, (), {{}}).command()\n"
        "Processes(command, 60).ask('', '[\"wide\", 1]')\n"
    )
    plan = subprocess.Popen([sys.executable, "-c", code], env=child_env, cwd=repo)
    try:
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("."))
    finally:
        plan.kill()
        plan.wait()
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text().rstrip('.')}/stat")
    wait_for(lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_for(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not done():
        assert time.monotonic() < until, "it does not come about"
        time.sleep(0.1)


# ----------------------------------------------------------------------------------- what they answer


@pytest.fixture
def settings() -> Iterator[None]:
    """Those that a process which only compiles has for itself."""
    limit, thresholds = jax.config.jax_traceback_in_locations_limit, gc.get_threshold()  # pyright: ignore[reportAttributeAccessIssue]
    yield
    jax.config.update("jax_traceback_in_locations_limit", limit)
    gc.set_threshold(*thresholds)
    gc.unfreeze()


@pytest.mark.usefixtures("settings")
def test_one_that_is_asked_again_answers_as_one_that_is_asked_once(repo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(repo)
    study = tmp_path / "study.py"
    study.write_text("print('a word of its own')\nfrom tests.configs.toy_study import get_study\n")
    argv = [str(study), "--target=cpu", f"--config.host.cache={tmp_path}"]

    def answers(*more: str, asked: str = "") -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(asked))
        assert command.main([*argv, *more]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]

    alone = [answers(f"--arm={arm}", "--members=2")[0] for arm in ("baseline", "wide")]
    served = answers("--served", asked='["baseline", 2]\n["wiide", 1]\n["wide", 2]\n')
    assert "no arm 'wiide'" in served.pop(1)["problem"]
    assert served == alone
    assert alone[0]["memory"] != alone[1]["memory"]


@pytest.mark.parametrize("argv", [(), ("--arm=wide", "--served")])
def test_who_is_asked_once_must_be_told_the_arm_and_who_is_served_must_not(repo, monkeypatch, capsys, argv):
    monkeypatch.chdir(repo)
    with pytest.raises(SystemExit, match="2"):
        command.main(["tests/configs/toy_study.py", *argv])
    assert "--arm" in capsys.readouterr().err.splitlines()[-1]
