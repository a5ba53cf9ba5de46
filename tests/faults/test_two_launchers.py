"""Row 5: of two processes that want the same runs one gets them, and the other is told at once.

That two launchers share a study, each run trained once, is in tests/schedule/test_faults_of_runs.py.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from jaxablate.claims import Claim, Claimed
from jaxablate.runstore import RunDir
from tests.faults.harness import (
    TOY,
    Counts,
    Nursery,
    begun,
    differences,
    finish,
    progress,
    runs,
    start,
    wait_for,
)

pytestmark = pytest.mark.slow


REFUSED = "second refused"
AT_MOST_S = 1.0  # from the attempt to claim a run to the refusal


def refusal(run: RunDir) -> float | None:
    """Seconds that a claim on a run takes to be refused; None if it was not, since the run was free just then."""
    began = time.perf_counter()
    try:
        with Claim(run.claim):
            return None
    except Claimed:
        return time.perf_counter() - began


def compete(nursery: Nursery, whole: Path, scratch: Path, times: int, seed: int) -> Counts:
    """Starts a second process on runs that the first one trains, at random instants; then ends as one."""
    rng, counts = random.Random(seed), Counts(5, "two launchers, one study", "second launchers")
    slowest, refusals = 0.0, []
    for number in range(times):
        workdir, instant = scratch / str(number), rng.randrange(12)  # of 40 steps
        first = start(nursery, TOY, workdir)
        wait_for(lambda workdir=workdir, instant=instant: progress(workdir) > instant, first)
        before = time.monotonic()
        second = nursery.start(TOY.entry, TOY.argv(workdir), scratch / f"{number}.txt")
        code = second.wait()
        slowest = max(slowest, time.monotonic() - before)
        took = [refusal(run) for run in runs(workdir)]  # after the process, which has tried the same
        said = second.words().strip().splitlines()[-1]
        counts.faults += 1
        if first.poll() is None:
            counts.expect(REFUSED, code == 2 and f"claimed by process {first.pid}" in said, said)
            refusals += [seconds for seconds in took if seconds is not None]
        counts.expect("first not disturbed", first.wait() == 0, first.words()[-2000:])
        wrong = differences(whole, workdir)
        counts.expect("ended as if undisturbed", not wrong, wrong)
        counts.expect("trained once", all(len(begun(run)) == 1 for run in runs(workdir)), workdir)
    counts.expect("some came while the first was at work", counts.held[REFUSED], f"none of {times} did")
    for seconds in refusals:
        counts.expect(f"a claim refused in under {AT_MOST_S:g} s", seconds < AT_MOST_S, seconds)
    counts.expect("claims were refused", refusals, "none was")
    counts.measured["slowest refusal of a claim, ms"] = round(1000 * max(refusals, default=0.0), 2)
    counts.measured["slowest refusal, s, with its process start"] = round(slowest, 2)
    return counts


def race(nursery: Nursery, whole: Path, scratch: Path, times: int) -> Counts:
    """Starts two at the same instant on a new run."""
    counts = Counts(5, "two launchers at the same instant", "races")
    for number in range(times):
        workdir = scratch / f"race{number}"
        racers = [start(nursery, TOY, workdir) for _ in range(2)]
        codes = sorted(racer.wait() for racer in racers)
        counts.faults += 1
        counts.expect("at most one trains", codes in ([0, 2], [2, 2]), (codes, racers[0].words()[-2000:]))
        finish(nursery, TOY, workdir)
        wrong = differences(whole, workdir)
        counts.expect("ended as if undisturbed", not wrong, wrong)
        counts.expect("trained once", all(len(begun(run)) == 1 for run in runs(workdir)), workdir)
    return counts


def test_the_second_of_two_is_refused_and_disturbs_nothing(
    nursery: Nursery, whole: Path, tmp_path: Path
) -> None:
    compete(nursery, whole, tmp_path, 1, seed=0).check()
