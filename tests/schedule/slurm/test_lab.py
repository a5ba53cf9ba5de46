"""The clusters of the tests are what they say: separate, complete, and gone afterwards."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests import slurm_fixtures
from tests.slurm_lab import Lab, LabError

WAIT = """#!/bin/sh
echo start $SLURM_RESTART_COUNT on $SLURMD_NODENAME with GPU $CUDA_VISIBLE_DEVICES
sleep 60 & wait
"""


def running(lab: Lab, job: int, count: int) -> bool:
    return list(lab.squeue(job).values()).count("RUNNING") == count


@pytest.mark.slow
def test_two_clusters_stand_side_by_side_and_leave_nothing(slurm: Lab):
    with Lab(nodes=1, gpus=0) as other:
        job = other.sbatch(WAIT)
        other.wait_for(lambda: running(other, job, 1), 20, "a job")
        assert slurm.squeue() == {}
        assert other.processes()
        assert not set(other.processes()) & set(slurm.processes())
        where, ports = other.dir, other.ports.values()
    assert not where.exists()
    assert other.processes() == []
    for port in ports:  # nobody listens any more
        with socket.socket() as trial, pytest.raises(ConnectionRefusedError):
            trial.connect(("127.0.0.1", port))
    assert slurm.processes()


def test_a_cluster_ends_when_a_test_fails():
    if lacking := slurm_fixtures.missing():
        pytest.skip(f"{', '.join(lacking)}: not on this machine")
    lab = Lab(nodes=1)

    def fails() -> None:
        with lab:
            job = lab.sbatch(WAIT)
            lab.wait_for(lambda: running(lab, job, 1), 20, "a job")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert (lab.processes(), lab.dir.exists()) == ([], False)


def test_what_does_not_come_is_an_error_with_the_logs(slurm: Lab):
    job = slurm.sbatch(WAIT, "--hold")
    with pytest.raises(LabError, match=r"(?s)the held job: not in 0\.2 s.*slurmctld\.log"):
        slurm.wait_for(lambda: running(slurm, job, 1), 0.2, "the held job")


@pytest.mark.slow
def test_elements_spread_over_nodes_with_a_gpu_each(slurm: Lab):
    job = slurm.sbatch(WAIT, "--array=0-3", "--gres=gpu:2")
    slurm.wait_for(lambda: running(slurm, job, 4), 20, "the array")
    assert {slurm.node(f"{job}_{n}") for n in range(4)} == set(slurm.nodes)
    output = slurm.dir / f"{job}_2.out"
    slurm.wait_for(lambda: output.exists() and "GPU 0,1" in output.read_text(), 10, "the output")


@pytest.mark.slow
def test_a_lost_node_gives_its_job_to_another(slurm: Lab):
    job = slurm.sbatch(WAIT, "--requeue")
    slurm.wait_for(lambda: running(slurm, job, 1), 20, "the job")
    first = slurm.node(job)
    slurm.down(first)
    second = slurm.wait_for(lambda: {slurm.node(job)} - {first, ""}, 30, "another node").pop()
    assert second != first
    assert slurm.show(job)["Restarts"] == "1"
    slurm.reset()
    assert slurm.squeue() == {}


@pytest.mark.slow
def test_jobs_outlive_a_killed_controller(slurm: Lab):
    job = slurm.sbatch(WAIT)
    slurm.wait_for(lambda: running(slurm, job, 1), 20, "the job")
    slurm.settle()
    slurm.kill("slurmctld")
    slurm.start_controller()
    assert list(slurm.squeue()) == [str(job)]


@pytest.mark.slow
def test_the_accounting_keeps_what_the_queue_forgets(slurm_with_accounting: Lab):
    lab = slurm_with_accounting
    job = lab.sbatch("#!/bin/sh\nexit $SLURM_ARRAY_TASK_ID\n", "--array=0-1")
    lab.wait_for(lambda: set(lab.sacct(job).values()) == {"COMPLETED", "FAILED"}, 60, "the accounting")
    assert lab.sacct(job) == {f"{job}_0": "COMPLETED", f"{job}_1": "FAILED"}


@pytest.mark.parametrize("required", ["0", "1"])
def test_a_machine_without_slurm_skips_unless_it_must_have_it(required: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slurm_fixtures, "missing", lambda accounting: ["slurmctld"])
    monkeypatch.setenv(slurm_fixtures.REQUIRE, required)
    outcome = pytest.fail.Exception if required == "1" else pytest.skip.Exception
    with pytest.raises(outcome, match="slurmctld: not on this machine"):
        slurm_fixtures._need("none")


def test_the_environment_names_this_cluster_and_no_other(slurm: Lab, tmp_path: Path):
    base = {"PATH": os.environ["PATH"], "SLURM_CONF": str(tmp_path), "SLURM_JOB_ID": "7", "SBATCH_QOS": "x"}
    assert slurm.env(base) == {"PATH": os.environ["PATH"], "SLURM_CONF": str(slurm.conf)}
    assert os.environ["SLURM_CONF"] == str(slurm.conf)
