"""Rows 1 and 13: kill -9 at random instants. Nothing committed is lost, nothing is done twice."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from jaxablate.analysis.goodput import of_run
from tests.faults.harness import (
    TOY,
    Child,
    Counts,
    Nursery,
    Toy,
    attempts,
    begun,
    common_step,
    differences,
    finish,
    progress,
    runs,
    shown_twice,
    start,
    twice,
    wait_for,
)

pytestmark = pytest.mark.slow


def kill(nursery: Nursery, whole: Path, scratch: Path, kills: int, seed: int, toy: Toy = TOY) -> list[Counts]:
    """Kills a toy again and again at random instants until it is done, then another, `kills` times in all.

    Most kills fall into training, at most a dozen rows after it went on, and many of those into a save, since
    every other step is one; one in eight comes sooner, while the process starts or restores.
    """
    rng = random.Random(seed)
    counts = Counts(1, "kill -9 at random instants, one process", "kills")
    resumes = Counts(13, "resumes after kill -9", "resumes")
    numbers = itertools.count()
    while counts.faults < kills:
        workdir = scratch / str(next(numbers))
        while counts.faults < kills:
            committed, begins = common_step(workdir), [len(begun(run)) for run in runs(workdir)]
            child = start(nursery, toy, workdir)
            _until_a_random_instant(workdir, child, rng)
            child.send(signal.SIGKILL)
            code = child.wait()
            for run, before in zip(runs(workdir), begins, strict=False):
                for row in begun(run)[before:]:
                    counts.expect(
                        "went on from the newest commit", row["step"] >= committed, (row, committed)
                    )
                    resumes.faults += row["step"] > 0
            if code != -signal.SIGKILL:
                counts.expect("ended by itself", code == 0, child.words()[-2000:])
                break
            counts.faults += 1
        finish(nursery, toy, workdir)
        wrong = differences(whole, workdir)
        counts.expect("ended as if undisturbed", not wrong, wrong)
        for run in runs(workdir):
            counts.goodput += of_run(run)
            resumes.expect("no step twice in metrics.jsonl", not twice(run), run.path)
            resumes.expect("no step twice in TensorBoard", not shown_twice(run), run.path)
        if not wrong:
            shutil.rmtree(workdir)
    return [counts, resumes]


def _wait_for_attempts(workdir: Path, child: Child) -> None:
    before = attempts(workdir)
    wait_for(lambda: attempts(workdir) >= before + 2, child)


def _until_a_random_instant(workdir: Path, child: Child, rng: random.Random) -> None:
    if not rng.randrange(8):
        time.sleep(rng.uniform(0, 1))
        return
    _wait_for_attempts(workdir, child)
    enough = progress(workdir) + rng.randrange(12)  # some strike before the first new step
    wait_for(lambda: progress(workdir) >= enough, child)
    time.sleep(rng.uniform(0, 0.05))


def stop(nursery: Nursery, whole: Path, scratch: Path, stops: int, seed: int) -> Counts:
    """Asks a toy to stop, by each of the signals in turn, until it is done."""
    rng, counts = random.Random(seed), Counts(3, "a signal to stop, one process", "signals")
    numbers = itertools.count()
    while counts.faults < stops:
        workdir = scratch / str(next(numbers))
        while counts.faults < stops:
            child = start(nursery, TOY, workdir)
            _wait_for_attempts(workdir, child)
            time.sleep(rng.uniform(0, 0.3))
            name = ("SIGTERM", "SIGUSR2", "SIGINT")[counts.faults % 3]
            child.send(signal.Signals[name])
            if child.wait() == 0:
                break
            counts.faults += 1
            counts.expect("ended with 75", child.returncode == 75, child.words()[-2000:])
            said = child.words().splitlines()[-1]
            counts.expect("said how to go on", "run the same command again to continue" in said, said)
            ends = [run.history()[-1] for run in runs(workdir)]
            lost = [row for row in ends if row["state"] != "preempted" or row["step"] != common_step(workdir)]
            counts.expect("stopped at a step that is committed", not lost, lost)
        finish(nursery, TOY, workdir)
        wrong = differences(whole, workdir)
        counts.expect("ended as if undisturbed", not wrong, wrong)
    return counts


def test_kill_9_at_random_instants_changes_nothing(nursery: Nursery, whole: Path, tmp_path: Path) -> None:
    kills, resumes = kill(nursery, whole, tmp_path, 8, seed=0)
    kills.check()
    resumes.check()
    assert kills.held["went on from the newest commit"] > 8  # they did hit it at work
    assert resumes.faults > 4


def test_another_run_is_not_taken_for_an_undisturbed_one(whole: Path, tmp_path: Path) -> None:
    """The control of all comparisons: one bit, one row, one end too many shows."""
    copy = shutil.copytree(whole, tmp_path / "copy")
    assert differences(whole, copy) == []
    run = runs(copy)[0]
    for path in (run.metrics, run.attempts):
        content = path.read_bytes()
        path.write_bytes(content + content.splitlines(keepends=True)[-1])
    summary = run.summary.read_text()
    run.summary.write_text(summary.replace('"params_digest": "', '"params_digest": "0'))
    found = " ".join(differences(whole, copy))
    for word in ("params_digest differs", "metrics.jsonl differs", "written twice", "to its end 2 times"):
        assert word in found


def test_a_signal_to_stop_loses_no_step(nursery: Nursery, whole: Path, tmp_path: Path) -> None:
    stop(nursery, whole, tmp_path, 1, seed=0).check()
