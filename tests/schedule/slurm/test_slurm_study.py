"""Whole studies on a real SLURM: they end as they would at home, whatever SLURM does to them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jaxablate import cli
from jaxablate.disk import read_jsonl
from jaxablate.manifest import Manifest
from jaxablate.schedule.slurm import marks, queue
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm.left import SubmitOptions
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import Submission
from jaxablate.schedule.slurm.submit import submit
from jaxablate.study import Arm, LearningRate, Response, Study, factorial, one_factor_out, switch
from tests.schedule.toy_studies import base
from tests.several import DEVICES, MEMBERS, Cohort, declared, results
from tests.slurm_lab import Lab

pytestmark = pytest.mark.slow

LOSS = Response("val/loss", "min", scale="log")
EIGHT = (
    switch("wide", "model", {"model.width": 16}),
    switch("noisy", "model", {"model.noise": 0.1}),
    switch("long", "model", {"training.steps": 8}),
)
RAISES = switch("raises", "data", {"data.raises_at_seed": 0})
BROKEN = switch("broken", "data", {"data.problem": "broken"})
LONGER = 300.0  # seconds; a machine that is busy may need them, and nothing waits for them to pass
SITE = Site(cpus=1, time="00:10:00", signal="USR2@5", max_attempts=20)


@pytest.fixture(autouse=True)
def _at_home(child_env: Mapping[str, str], repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that a user has, from which jobs are submitted; `slurm` then adds its cluster."""
    for name in set(os.environ) - set(child_env):
        monkeypatch.delenv(name)
    for name, value in child_env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(repo)


@dataclasses.dataclass
class Sent:
    """A study that was submitted to a cluster."""

    lab: Lab
    path: Path
    submission: Submission

    @classmethod
    def of(cls, lab: Lab, study: Study, site: Site = SITE, **options: Any) -> Sent:
        os.environ["SLURM_CONF"] = str(lab.conf)
        outcome = submit(study, site, SubmitOptions(**options))
        assert outcome.submission is not None
        return cls(lab, outcome.path, outcome.submission)

    def rows(self, index: int) -> list[dict[str, Any]]:
        return records.element_log(self.path, self.submission, self.submission.elements[index])

    def said(self) -> list[list[str]]:
        """Of each element the states that it wrote down, in order."""
        return [[row["state"] for row in self.rows(i)] for i in range(len(self.submission.elements))]

    def task(self, index: int) -> str:
        return self.submission.tasks()[index]

    def indices(self) -> dict[str, int]:
        """arm -> its first element."""
        return {e.arm: e.index for e in reversed(self.submission.elements)}

    def queued(self) -> dict[str, str]:
        return self.lab.squeue(*self.submission.jobs())

    def ended(self, seconds: float = LONGER) -> None:
        """Waits until nothing of it is in the queue; its logs are printed, for a test that fails."""
        try:
            self.lab.wait_for(lambda: not self.queued(), seconds, "the end of the study")
        finally:
            for log in sorted(self.path.glob("slurm/*/*.log")):
                print(f"--- {log.name}\n{log.read_text()}")

    def steps(self, arm: str) -> list[int]:
        """The steps that the arm's first run has logged, in the order of the file."""
        manifest = Manifest.load(self.path)
        run = next(run for run in manifest.runs if run.arm == arm)
        rows, _ = read_jsonl(manifest.run_dir(run).metrics)
        return [row["step"] for row in rows if "train/loss" in row]

    def states(self) -> dict[str, list[str]]:
        """arm -> the states of its runs."""
        manifest = Manifest.load(self.path)
        found: dict[str, list[str]] = {}
        for run in manifest.runs:
            found.setdefault(run.arm, []).append(manifest.run_dir(run).state())
        return found

    def status(self, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
        """What `jaxablate status --json` says."""
        capsys.readouterr()
        assert cli.main(["status", str(self.path), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    def trained(self, arm: str, seconds: float = LONGER) -> None:
        """Waits until a run of the arm has trained a step."""
        self.lab.wait_for(lambda: self.steps(arm), seconds, f"a step of {arm}")


def slow(workdir: Path, arms: int, steps: int = 48) -> Study:
    """Arms whose runs take some seconds each, whatever the machine: 8 examples a step, 0.02 s each."""
    config = base(str(workdir), steps=steps, eval_every=steps)
    config.data.update(seconds=0.02)
    return Study("toy", EIGHT, factorial(EIGHT[:2])[:arms], (0,), (LOSS,), config)


# --------------------------------------------------------------------------------------- undisturbed


def test_eight_arms_under_a_throttle(slurm: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Study("toy", EIGHT, factorial(EIGHT), (0,), (LOSS,), base(str(tmp_path)))
    sent = Sent.of(slurm, study, dataclasses.replace(SITE, array_limit=3))
    most, seen = 0, sent.status(capsys)
    assert sum(seen["submissions"][0]["counts"].values()) == 8
    while queued := sent.queued():
        most = max(most, sum(state == "RUNNING" for state in queued.values()))
        time.sleep(0.2)
    assert most == 3
    assert sent.said() == [["running", "done"]] * 8
    assert {row["node"] for i in range(8) for row in sent.rows(i)} <= set(slurm.nodes)
    found, silent = queue.look(sent.submission.jobs())
    assert silent == ""  # no accounting, and that is no trouble
    assert {task: job.state for task, job in found.items()} == dict.fromkeys(
        sent.submission.tasks().values(), "COMPLETED"
    )
    status = sent.status(capsys)
    assert status["total"] == {"done": 8}
    assert status["submissions"][0]["counts"] == {"done": 8}
    assert status["notes"] == []


def test_one_that_fails_leaves_the_others_alone_and_the_accounting_agrees(
    slurm_with_accounting: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab, factors = slurm_with_accounting, (EIGHT[0], RAISES)
    study = Study("toy", factors, one_factor_out(factors), (0,), (LOSS,), base(str(tmp_path)))
    sent = Sent.of(lab, study)
    sent.ended()
    bad = sent.indices()["raises"]
    said = sent.said()
    assert said.pop(bad) == ["running", "failed"]
    assert said == [["running", "done"]] * 2
    expected = {task: "FAILED" if i == bad else "COMPLETED" for i, task in sent.submission.tasks().items()}
    lab.wait_for(lambda: lab.sacct(*sent.submission.jobs()) == expected, 60, "the accounting")
    lab.wait_for(lambda: {j.source for j in queue.look(sent.submission.jobs())[0].values()} == {"sacct"}, 60,
                 "squeue to forget")  # fmt: skip
    assert {task: job.state for task, job in queue.look(sent.submission.jobs())[0].items()} == expected
    status = sent.status(capsys)
    assert status["total"] == {"done": 2, "bug": 1}
    assert status["submissions"][0]["counts"] == {"done": 2, "failed": 1}
    element = status["submissions"][0]["elements"][bad]
    assert "the scan of seed 0 is torn" in element["reason"]


def test_confirmations_wait_for_the_tuning_and_end_with_a_reason_if_it_failed(
    slurm: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = LearningRate(grid=(0.002, 0.005, 0.01), tuning_seeds=(100,), extend=0)
    arms = one_factor_out((BROKEN,))
    config = base(str(tmp_path))
    study = Study("toy", (BROKEN,), arms, (0,), (LOSS,), config, learning_rate=rule)
    sent = Sent.of(slurm, study)
    sent.ended()
    by_phase = {(e.arm, e.phase): e.index for e in sent.submission.elements}
    tuning, confirm = by_phase["baseline", "tuning"], by_phase["baseline", "confirm"]
    assert [sent.said()[i] for i in (tuning, confirm)] == [["running", "done"]] * 2
    assert sent.rows(tuning)[-1]["time"] <= sent.rows(confirm)[0]["time"]
    assert sent.states()["baseline"] == ["done"] * 4
    broken = by_phase["broken", "confirm"]
    assert sent.said()[broken] == ["running", "failed"]
    reason = sent.rows(broken)[-1]["reason"]
    assert reason.startswith("did not start: ")
    assert "toy.csv: is broken" in reason
    elements = sent.status(capsys)["submissions"][0]["elements"]
    assert (elements[broken]["state"], elements[broken]["reason"]) == ("failed", reason)
    # A person mends the cause, or thinks so: exactly what failed is submitted again, on the same terms.
    again = marks.retry(Manifest.load(sent.path), arms=["broken"])
    assert {(run.arm, run.phase) for run in again} == {("broken", "tuning")}
    _, newest = records.submissions(sent.path)
    assert [(e.arm, e.phase, len(e.runs)) for e in newest.elements] == [("broken", "tuning", 3)]
    assert newest.site == sent.submission.site
    newest_sent = dataclasses.replace(sent, submission=newest)
    newest_sent.ended()
    assert newest_sent.said() == [["running", "failed"]]


def test_stages_run_in_order(slurm: Lab, tmp_path: Path) -> None:
    config = base(str(tmp_path), steps=8)
    config.model.stages = "two"
    study = Study("toy", (EIGHT[0],), (Arm("baseline"),), (0,), (LOSS,), config)
    sent = Sent.of(slurm, study, stages="chained")
    assert [e.stage for e in sent.submission.elements] == ["first", ""]
    sent.ended()
    assert sent.said() == [["running", "paused"], ["running", "done"]]
    assert sent.rows(0)[-1]["time"] <= sent.rows(1)[0]["time"]
    assert sent.states() == {"baseline": ["done"]}
    assert sent.steps("baseline") == sorted(set(sent.steps("baseline")))


# ------------------------------------------------------------------------------------ several nodes


def test_an_element_over_two_nodes_is_stopped_requeued_and_ends_as_one_process_would(
    slurm: Lab, tmp_path: Path, child_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Cohort(tmp_path / "whole", child_env).train(1)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1")  # the names of a lab's nodes are no addresses
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={DEVICES // 2}")
    site = dataclasses.replace(SITE, nodes=2)
    sent = Sent.of(slurm, declared(tmp_path / "nodes"), site, arms=("baseline",))
    sent.trained("baseline")
    slurm.run(
        "scancel", "--batch", "--signal=USR2", sent.task(0)
    )  # as --signal=B: does it before a time limit
    sent.ended()
    assert sent.said() == [["running", "stopped", "running", "done"]]
    assert sent.states()["baseline"] == ["done"] * MEMBERS
    manifest = Manifest.load(sent.path)
    runs = [run for run in manifest.runs if run.arm == "baseline"]
    for run in runs:
        assert [row["state"] for row in manifest.run_dir(run).history()] == [
            "running", "preempted", "running", "done",
        ]  # fmt: skip
    assert results(manifest, runs) == whole.results()
    about = json.loads(manifest.run_dir(runs[0]).provenance.read_text())
    assert about["mesh"]["member"] == DEVICES  # of both nodes: one alone has half of them


# ------------------------------------------------------------------------------------------- faults


def test_only_those_that_are_touched_start_again(
    slurm: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A requeue, a node that is lost and a controller that is killed, each in the middle of one study."""
    sent = Sent.of(slurm, slow(tmp_path, 4), dataclasses.replace(SITE, cpus=slurm.site.cpus))
    arms = sent.indices()
    for arm in arms:
        sent.trained(arm)
    requeued, lost, *others = arms.values()
    queue.requeue(sent.task(requeued))
    slurm.down(slurm.node(sent.task(lost)))
    slurm.settle()
    slurm.kill("slurmctld")
    assert "squeue: " in sent.status(capsys)["notes"][0]
    slurm.start_controller()
    sent.ended()
    said = sent.said()
    assert sent.states() == {arm: ["done"] for arm in arms}
    for index in (requeued, lost):
        assert said[index].count("running") == 2, said
    for index in others:
        assert said[index] == ["running", "done"]
    assert all(sent.steps(arm) == sorted(set(sent.steps(arm))) for arm in arms)


def test_preempted_it_comes_back(slurm: Lab, tmp_path: Path) -> None:
    sent = Sent.of(slurm, slow(tmp_path, 1), dataclasses.replace(SITE, partition="main"))
    sent.trained("baseline")
    urgent = slurm.sbatch("#!/bin/sh\nsleep 1\n", "--partition=high", "--nodes=4", "--exclusive")
    slurm.wait_for(lambda: slurm.show(urgent)["JobState"] == "COMPLETED", 60, "the urgent job")
    sent.ended()
    assert sent.states() == {"baseline": ["done"]}
    assert sent.said()[0][0] == "running"
    assert sent.said()[0][-2:] == ["running", "done"]
    assert len(sent.said()[0]) >= 3


def test_a_time_limit_is_an_interruption(slurm: Lab, tmp_path: Path) -> None:
    """The shortest limit is a minute; the signal comes long before, so that a busy machine has stopped by then."""
    site = dataclasses.replace(SITE, time="00:01:00", signal="USR2@40")
    sent = Sent.of(slurm, slow(tmp_path, 1, steps=700), site)  # 28 s at least; the signal comes after 20
    sent.ended(2 * LONGER)
    assert sent.states() == {"baseline": ["done"]}
    said = sent.said()[0]
    assert said[:2] == ["running", "stopped"]
    assert said[-1] == "done"
    assert "SIGUSR2" in sent.rows(0)[1]["reason"]
    assert sent.steps("baseline") == list(range(1, 701))


def test_a_duplicate_ends_itself(slurm: Lab, tmp_path: Path) -> None:
    sent = Sent.of(slurm, slow(tmp_path, 1))
    sent.trained("baseline")
    job, task = sent.task(0).split("_")
    code = (
        "import sys; from jaxablate.schedule.slurm import element; element.LEASE_S = 1.0; "
        "sys.exit(element.main(sys.argv[1:]))"
    )
    env = {**os.environ, "SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": task, "SLURMD_NODENAME": "n3"}
    twin = subprocess.run(
        [sys.executable, "-c", code, str(sent.path), sent.submission.id], env=env, capture_output=True,
        text=True, check=False, timeout=60,
    )  # fmt: skip
    assert twin.returncode == 76, twin.stderr
    assert "duplicate" in sent.said()[0]
    sent.ended()
    assert sent.states() == {"baseline": ["done"]}
    manifest = Manifest.load(sent.path)
    assert manifest.run_dir(manifest.runs[0]).history()[-1]["attempt"] == 1


def test_cancel_takes_the_elements_that_are_meant(
    slurm: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one arm all runs, of another one of two: that goes on with the other, and the third knows nothing."""
    study = dataclasses.replace(slow(tmp_path, 3), seeds=(0, 1))
    sent = Sent.of(slurm, study)
    whole, part, untouched = sent.indices()
    for arm in (whole, part, untouched):
        sent.trained(arm)
    manifest = Manifest.load(sent.path)
    marks.cancel(manifest, arms=[whole])
    marks.cancel(manifest, arms=[part], seeds=[1])
    sent.ended()
    assert sent.states() == {
        whole: ["cancelled", "cancelled"], part: ["done", "cancelled"], untouched: ["done", "done"],
    }  # fmt: skip
    assert sent.said()[sent.indices()[untouched]] == ["running", "done"]
    counts = sent.status(capsys)["submissions"][0]["counts"]
    assert counts["done"] >= 1
    history = manifest.run_dir(next(r for r in manifest.runs if r.arm == untouched)).history()
    assert [row["state"] for row in history] == ["running", "done"]
