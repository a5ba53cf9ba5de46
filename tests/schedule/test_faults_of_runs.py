"""Launchers and workers as real processes: every way to fail, two launchers, stopping and going on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxablate import disk
from jaxablate.claims import claim_holder
from jaxablate.manifest import Manifest, read_rates
from jaxablate.schedule import local

pytestmark = pytest.mark.slow
PATIENCE_S = 240


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """What `condition` gives once it is true; the launcher must not end before."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert output, errors
    found = json.loads(output.splitlines()[-1])
    assert found["exit_code"] == process.returncode
    return {**found, "stderr": errors}


def steps(workdir: Path, arm: str) -> int:
    """Steps that the slowest run of an arm has written."""
    files = list((workdir / "toy" / arm).glob("*/perf.jsonl"))
    return min((len(path.read_bytes().splitlines()) for path in files), default=0)


def checkpoints(workdir: Path, arm: str) -> int:
    """Complete checkpoints of the run of an arm that has the fewest."""
    runs = [len(list(path.glob("checkpoints/*.json"))) for path in (workdir / "toy" / arm).glob("*/")]
    return min(runs, default=0)


def worker_of(workdir: Path, arm: str) -> int:
    holders = [claim_holder(path) for path in (workdir / "toy" / arm).glob("*/claim.json")]
    return next((holder.pid for holder in holders if holder), 0)


@contextlib.contextmanager
def cleaned_up(*processes: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


def test_each_failure_has_its_state_and_leaves_the_others_alone(
    launch: Callable[..., Any], histories: Callable[..., Any], tmp_path: Path
) -> None:
    process = launch("faults", retries=0)
    with cleaned_up(process):
        wait_for(lambda: checkpoints(tmp_path, "killed") > 2, process)
        os.kill(worker_of(tmp_path, "killed"), signal.SIGKILL)
        found = result(process)
    assert found["exit_code"] == 1
    assert found["runs"] == {"done": 6, "bug": 1, "diverged": 1, "oom": 2, "node_fail": 2}
    history = {key.rsplit(" ", 1)[0]: states for key, states in histories(tmp_path).items()}
    once = ["running", "done"]
    assert history["baseline 0"] == history["baseline 1"] == once
    assert history["diverges 0"] == once
    assert history["diverges 1"] == ["running", "diverged"]
    # The one that raises takes its cohort along; each by itself, the innocent one finishes.
    assert history["raises 0"] == ["running", "bug", "running", "done"]
    assert history["raises 1"] == ["running", "bug", "running", "bug"]
    # Two members, one member, half micro-batches: and then it fits. What one learns the other may use.
    assert sorted(map(len, (history["tight 0"], history["tight 1"])))[-1] == 6
    for seed in (0, 1):
        *failed, _, last = history[f"tight {seed}"]
        assert set(failed) == {"running", "oom"}
        assert last == "done"
    assert history["hopeless 0"] == history["hopeless 1"] == ["running", "oom"] * 2
    assert history["killed 0"] == history["killed 1"] == ["running", "node_fail"]
    reasons = {(f["arm"], f["state"]): f["reason"] for f in found["failures"]}
    assert reasons["raises", "bug"] == "ValueError: the scan of seed 1 is torn"
    assert reasons["killed", "node_fail"] == "killed by SIGKILL"
    for failure in found["failures"]:
        assert (tmp_path / "toy" / failure["log"]).is_file()
    manifest = Manifest.load(tmp_path / "toy")
    tight = [manifest.run_dir(run).history()[-2] for run in manifest.runs if run.arm == "tight"]
    assert [(row["members"], row["split"]) for row in tight] == [(1, 2), (1, 2)]

    # What failed can be tried again; an outcome never.
    again = local.retry(manifest)
    assert {(run.arm, run.seed) for run in again} == {
        ("raises", 1), ("hopeless", 0), ("hopeless", 1), ("killed", 0), ("killed", 1),
    }  # fmt: skip
    assert local.retry(manifest) == []

    # And what was killed goes on from its checkpoint.
    process = launch("faults", arms=["killed", "baseline", "diverges"])
    with cleaned_up(process):
        found = result(process)
    assert (found["exit_code"], found["runs"]) == (0, {"done": 5, "diverged": 1})
    rows = [row for row in manifest.run_dir(again[-1]).history() if row["state"] == "running"]
    assert rows[-1]["step"] > 0


def test_two_launchers_share_a_tuned_study_and_train_each_run_once(
    launch: Callable[..., Any], histories: Callable[..., Any], tmp_path: Path
) -> None:
    one, two = launch("tuned", workers=1), launch("tuned", workers=1)
    with cleaned_up(one, two):
        found = [result(one), result(two)]
    assert [f["exit_code"] for f in found] == [0, 0]
    assert "arm wide: learning rate 0.008 is the highest rate of its grid" in found[0]["notes"][1]
    assert found[0]["notes"] == found[1]["notes"]
    history = histories(tmp_path)
    assert len(history) == 2 * (3 * 2 + 2)  # arms x (rates x tuning seeds + seeds)
    assert set(map(tuple, history.values())) == {("running", "done")}
    manifest = Manifest.load(tmp_path / "toy")
    for run in manifest.runs:
        rows, _ = disk.read_jsonl(manifest.run_dir(run).metrics)
        trained = [row["step"] for row in rows if "train/loss" in row]
        assert trained == list(range(1, 13))
    pids = {row["pid"] for run in manifest.runs for row in manifest.run_dir(run).history()}
    assert len(pids) == 6  # arms x (grid, extension, confirmation); neither launcher repeated another's
    rates = read_rates(tmp_path / "toy")
    for arm in ("baseline", "wide"):
        assert rates[arm]["grid"] == [0.0005, 0.002, 0.008]
        assert (rates[arm]["learning_rate"], rates[arm]["edge"]) == (0.008, "highest")
        confirmed = {r.learning_rate for r in manifest.runs if (r.arm, r.phase) == (arm, "confirm")}
        assert confirmed == {0.008}
        summary = json.loads((tmp_path / "toy" / arm / "summary.json").read_text())
        assert (summary["seeds"], summary["done"], len(summary["left_out"])) == ([0, 1], 2, 6)
    records = [path.stat().st_size for path in (tmp_path / "toy").glob("*.hparams_config")]
    assert sum(size > 0 for size in records) == 1  # those that it replaced are empty
    assert manifest.locked is not None
    first = min(manifest.run_dir(run).history()[0]["time"] for run in manifest.runs if run.phase == "confirm")
    assert manifest.locked < first


def test_what_was_stopped_goes_on_and_ends_as_if_undisturbed(
    launch: Callable[..., Any], histories: Callable[..., Any], tmp_path: Path
) -> None:
    process = launch("slow")
    with cleaned_up(process):
        wait_for(lambda: steps(tmp_path, "baseline") >= 5, process)
        worker = worker_of(tmp_path, "baseline")
        process.send_signal(signal.SIGINT)
        found = result(process)
    assert found["exit_code"] == 75
    assert found["runs"] == {"preempted": 2}
    assert found["failures"] == []
    stopped_at = steps(tmp_path, "baseline")

    # A launcher that is killed takes its worker along, which stops cleanly by itself.
    process = launch("slow")
    with cleaned_up(process):
        wait_for(lambda: steps(tmp_path, "baseline") >= stopped_at + 5, process)
        worker = worker_of(tmp_path, "baseline")
        process.kill()
        process.wait()
        deadline = time.monotonic() + PATIENCE_S
        while worker_of(tmp_path, "baseline") == worker:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert set(map(tuple, histories(tmp_path).values())) == {("running", "preempted") * 2}

    process, whole = launch("slow"), launch("slow", tmp_path / "whole")
    with cleaned_up(process, whole):
        assert result(process)["runs"] == result(whole)["runs"] == {"done": 2}
    digests = [
        [json.loads(p.read_text())["params_digest"] for p in sorted(root.glob("toy/baseline/*/summary.json"))]
        for root in (tmp_path, tmp_path / "whole")
    ]
    assert len(digests[0]) == 2
    assert digests[0] == digests[1]
    attempts = [row for rows in histories(tmp_path).values() for row in rows if row == "running"]
    assert len(attempts) == 6


def test_one_run_of_a_cohort_is_cancelled_and_the_other_goes_on(
    launch: Callable[..., Any], histories: Callable[..., Any], tmp_path: Path
) -> None:
    process = launch("slow")
    with cleaned_up(process):
        wait_for(lambda: steps(tmp_path, "baseline") >= 3, process)
        local.cancel(Manifest.load(tmp_path / "toy"), seeds=[1])
        found = result(process)
    assert (found["exit_code"], found["runs"]) == (1, {"done": 1, "cancelled": 1})
    history = histories(tmp_path)
    assert history["baseline 0 0.01"] == ["running", "preempted", "running", "done"]
    assert history["baseline 1 0.01"] == ["running", "cancelled", "cancelled"]


def test_fail_fast_starts_nothing_more_and_stops_the_others_cleanly(
    launch: Callable[..., Any], histories: Callable[..., Any], tmp_path: Path
) -> None:
    arms = ["raises", "killed"]  # which here is only slow
    process = launch("faults", arms=arms, max_members=1, workers=2, on_failure="stop")
    with cleaned_up(process):
        found = result(process)
    assert found["exit_code"] == 1
    assert [(f["arm"], f["state"]) for f in found["failures"]] == [("raises", "bug")]
    history = histories(tmp_path)
    assert history["killed 1 0.01"] == []
    assert history["killed 0 0.01"] in ([], ["running", "preempted"])
