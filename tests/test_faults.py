"""kill -9 of a real process at random instants: nothing is lost, nothing is done twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxablate import runstore

KILLS, CHAIN = 20, 5  # kills in all, and how many hit one run before it may finish
COMMAND = [
    sys.executable, "-m", "jaxablate.main", "--config=tests/configs/toy.py", "--config.seeds=0,1",
    "--config.model.noise=0.1", "--config.training.steps=60", "--config.host.checkpoint_every=2",
]  # fmt: skip


def own_cache(env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A compilation cache that no other test reads: a kill can leave a torn entry in it."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**env, **cache}


def launch(workdir: Path, repo: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [*COMMAND, f"--config.host.workdir={workdir}"]
    return subprocess.Popen(command, cwd=repo, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(workdir: Path, repo: Path, env: dict[str, str]) -> list[dict]:
    process = launch(workdir, repo, env)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()
    return [json.loads(p.read_text()) for p in sorted(workdir.glob("toy/base/*/summary.json"))]


def rows(workdir: Path) -> int:
    """Rows that the slower member has written."""
    files = list(workdir.glob("toy/base/*/metrics.jsonl"))
    return min((len(path.read_bytes().splitlines()) for path in files), default=0)


def attempts(workdir: Path) -> int:
    return sum(len(p.read_bytes().splitlines()) for p in workdir.glob("toy/base/*/attempts.jsonl"))


@pytest.mark.slow
def test_kill_9_at_random_instants_changes_nothing(
    tmp_path: Path, repo: Path, child_env: dict[str, str]
) -> None:
    env = own_cache(child_env, tmp_path)
    whole = finish(tmp_path / "whole", repo, env)
    rng = random.Random(0)
    resumed_from: list[int] = []
    for number in range(KILLS // CHAIN):
        workdir = tmp_path / str(number)
        for _ in range(CHAIN):
            before = attempts(workdir)
            process = launch(workdir, repo, env)
            while attempts(workdir) < before + 2 and process.poll() is None:
                time.sleep(0.005)
            enough = rows(workdir) + rng.randrange(14)  # some strike before the first new step
            while rows(workdir) < enough and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        again = finish(workdir, repo, env)
        for a, b in zip(whole, again, strict=True):
            assert a["params_digest"] == b["params_digest"]
            assert a["statistics"] == b["statistics"]
            paths = [tmp_path / "whole" / "toy/base" / a["run_id"], workdir / "toy/base" / b["run_id"]]
            one, other = ((path / "metrics.jsonl").read_bytes() for path in paths)
            assert one == other
            written, torn = runstore.read_jsonl(paths[1] / "metrics.jsonl")
            keys = [(row["step"], key) for row in written for key in row if key != "step"]
            assert not torn
            assert len(keys) == len(set(keys))  # no step twice
            history = runstore.RunDir(paths[1]).history()
            resumed_from += [row["step"] for row in history if row["state"] == "running"]
    print(f"{KILLS} kills of 2 members: resumed from steps {sorted(resumed_from)}")
    assert len(set(resumed_from)) > 5  # the kills did hit it at work


@pytest.mark.slow
def test_sigterm_ends_with_75_and_the_same_command_goes_on(
    tmp_path: Path, repo: Path, child_env: dict[str, str]
) -> None:
    env = own_cache(child_env, tmp_path)
    whole = finish(tmp_path / "whole", repo, env)
    process = launch(tmp_path / "stopped", repo, env)
    while attempts(tmp_path / "stopped") < 2 and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output.decode()
    assert b"run the same command again to continue" in output
    again = finish(tmp_path / "stopped", repo, env)
    assert [s["params_digest"] for s in again] == [s["params_digest"] for s in whole]
