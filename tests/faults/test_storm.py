"""The storm counts what has hit, and no kind of fault stays behind the others."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from jaxablate.schedule.slurm.submission import Element
from tests.faults import storm
from tests.faults.harness import Counts
from tests.faults.storm import Storm, Struck, Target
from tests.slurm_lab import Site

KINDS = (
    "requeue",
    "preempt",
    "lose_node",
    "kill_worker",
    "kill_step",
    "kill_slurmd",
    "kill_slurmctld",
)


class Deaf:
    """A cluster on which one element runs, and nothing that is done to it has an effect, but what `hears` says."""

    site = Site(nodes=1)

    def __init__(self, hears: str = "") -> None:
        self.hears, self.restarts = hears, 0

    def run(self, *argv: str, **options: Any) -> str:
        self.restarts += argv[1] == self.hears
        return ""

    def sbatch(self, *argv: str) -> int:
        return 2

    def node(self, job: str) -> str:
        return "n0"

    def show(self, job: str) -> dict[str, str]:
        return {"Restarts": str(self.restarts), "JobState": "COMPLETED"}

    def down(self, node: str) -> None:
        pass

    def kill(self, daemon: str) -> bool:
        return False

    def processes(self) -> list[int]:
        return []


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Target:
    element: Any = Element(0, "wide", "confirm", ("a",), (0,))
    found = Target(None, element, "1_0")  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(storm, "HIT_S", 0.0)
    monkeypatch.setattr(Storm, "_remember", lambda self, target: Struck(target.job, {}, {}))
    monkeypatch.setattr(Storm, "targets", lambda self: [found])
    return found


def a_storm(lab: Any, where: Path) -> Storm:
    counts, control = Counts(2, "storm", "faults"), Counts(4, "control", "kills")
    return Storm(lab, None, where, random.Random(0), counts, control)  # pyright: ignore[reportArgumentType]


def test_a_fault_that_changes_nothing_is_not_counted(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storm.Manifest, "load", lambda path: None)
    missed = a_storm(Deaf(), tmp_path)
    missed._strike(target)
    assert (missed.counts.faults, missed.control.faults) == (0, 0)
    assert missed.struck == []
    hit = a_storm(Deaf(hears="requeue"), tmp_path)
    for _ in range(3):
        hit._strike(target)
    assert hit.counts.kinds == {"requeue": 3}
    assert hit.counts.faults == len(hit.struck) == 3


def test_all_kinds_have_their_turn(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:

        def strike(self: Storm, target: Target) -> bool:
            return True

        strike.__name__ = kind
        monkeypatch.setattr(Storm, kind, strike)
    found = a_storm(Deaf(), tmp_path)
    for _ in range(2 * len(KINDS) + 1):
        found._strike(target)
    assert len(found.counts.kinds) == len(KINDS)
    assert set(found.counts.kinds.values()) == {2, 3}
