"""Row 10: an arm whose every process is killed. Bounded retries, a reason that is reported, the others unharmed.

The other ways to fail, and that they leave each other alone: tests/schedule/test_faults_of_runs.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxablate.manifest import Manifest
from tests.faults.harness import Counts, Nursery

pytestmark = pytest.mark.slow


def crash(nursery: Nursery, scratch: Path, retries: int) -> Counts:
    """A study of two arms, of which one kills whoever opens its data."""
    counts = Counts(10, "an arm that always crashes", "crashes")
    options = json.dumps({"retries": retries, "workers": 1})
    child = nursery.start(
        "tests.schedule.toy_studies", ["crashes", str(scratch), options], scratch / "out.txt"
    )
    counts.expect("ends with 'some runs failed'", child.wait() == 1, child.words()[-2000:])
    manifest = Manifest.load(scratch / "toy")
    for run in manifest.runs:
        history = [(row["state"], row.get("reason", "")) for row in manifest.run_dir(run).history()]
        states = [state for state, _ in history]
        if run.arm == "baseline":
            counts.expect("the others are unaffected", states == ["running", "done"], history)
            continue
        failed = states.count("node_fail")
        counts.faults += failed
        counts.expect("bounded retries", failed == retries + 1 and states[-1] == "node_fail", history)
    shown = nursery.start("jaxablate.cli", ["status", str(manifest.path)], scratch / "status.txt")
    counts.expect(
        "status says why", shown.wait() == 0 and "killed by SIGKILL" in shown.words(), shown.words()
    )
    written = nursery.start("jaxablate.cli", ["report", str(manifest.path)], scratch / "report.txt")
    code, text = written.wait(), "".join(p.read_text() for p in manifest.path.glob("report/*.txt"))
    counts.expect(
        "the report says why", code == 0 and "killed by SIGKILL" in text, (code, written.words()[-1500:])
    )
    return counts


def test_an_arm_that_always_crashes_is_given_up(nursery: Nursery, tmp_path: Path) -> None:
    crash(nursery, tmp_path, retries=1).check()
