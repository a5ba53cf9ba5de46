"""A cohort over several nodes: `srun`, and `jax.distributed` between its tasks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxablate.schedule.retries import outlook
from tests.several import DEVICES, MEMBERS, Cohort
from tests.slurm_lab import Lab


@pytest.fixture
def cohort(tmp_path: Path, child_env: dict[str, str]) -> Iterator[Cohort]:
    made = Cohort(tmp_path / "cohort", child_env)
    yield made
    made.end()


def srun(lab: Lab, cohort: Cohort, tasks: int, nodes: int) -> subprocess.Popen[bytes]:
    env = {
        **lab.env(cohort.env),
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1",  # the nodes of a lab are this host, and their names no addresses
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // tasks}",
    }
    step = ["srun", f"--ntasks={tasks}", f"--nodes={nodes}", "--kill-on-bad-exit=1", "--export=ALL"]
    return cohort.launch([*step, *cohort.command("slurm")], env)


def task(lab: Lab, rank: int) -> int:
    """The process of a task."""
    workers = []
    for pid in lab.processes():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if (
            b"SLURM_PROCID=%d" % rank in variables
            and b"jaxablate.worker" in command
            and b"srun" not in command
        ):
            workers.append(pid)
    (found,) = workers
    return found


@pytest.mark.slow
def test_a_cohort_over_nodes_survives_a_stop_and_a_dead_task(
    slurm: Lab, cohort: Cohort, tmp_path: Path, child_env: dict[str, str]
) -> None:
    """Four tasks, stopped by a signal to one; two tasks, of which one is killed; then to the end."""
    whole = Cohort(tmp_path / "whole", child_env).train(1).results()
    first = srun(slurm, cohort, tasks=4, nodes=2)
    cohort.until_step(4)
    os.kill(task(slurm, 3), signal.SIGUSR2)
    assert first.wait(90) == 75, cohort.words()
    (reason,) = {cohort.dir(m).history()[-1]["reason"] for m in range(MEMBERS)}
    stopped = int(reason.removeprefix("SIGUSR2 at step "))
    assert 4 <= stopped < 60
    assert cohort.words().count(f"stopped: SIGUSR2 at step {stopped}") == 4

    second = srun(slurm, cohort, tasks=2, nodes=2)
    cohort.until_step((stopped // 2 + 2) * 2)
    began = time.monotonic()
    os.kill(task(slurm, 1), signal.SIGKILL)
    code = second.wait(90)
    assert time.monotonic() - began < 30  # what the README promises
    assert code not in (0, 75)
    for m in range(MEMBERS):
        history = cohort.dir(m).history()
        assert history[-1]["state"] in ("node_fail", "running")  # process 0 said it, or the launcher is to
        assert outlook(history, 8).next == "train"

    last = srun(slurm, cohort, tasks=2, nodes=1)
    assert last.wait(240) == 0, cohort.words()
    assert cohort.results() == whole
    begun = [row["step"] for row in cohort.dir(0).history() if row["state"] == "running"]
    assert begun[:2] == [0, stopped]
    assert begun[2] >= stopped  # nothing that was saved is lost
    assert json.loads(cohort.dir(0).provenance.read_text())["mesh"]["member"] == DEVICES
