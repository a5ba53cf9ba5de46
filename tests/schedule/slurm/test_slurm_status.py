"""`status` of a submitted study: the run directories are the truth, the queue is news."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from jaxablate import cli
from jaxablate.analysis.seen import look
from jaxablate.manifest import Manifest
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm.overview import Overview, Part, overview
from jaxablate.schedule.slurm.queue import Seen
from jaxablate.schedule.slurm.submission import Array, Element
from tests.frozen import RULE, freeze, toy_study, write_run
from tests.schedule.slurm.four_arms import arm_of, at_work, of, row, submit


@dataclasses.dataclass
class Queue:
    """Answers as `queue.look` does, and remembers what it was asked."""

    seen: dict[str, Seen] = dataclasses.field(default_factory=dict)
    silent: str = ""
    asked: list[str] = dataclasses.field(default_factory=list)

    def has(self, job: str, state: str, reason: str = "", node: str = "") -> Queue:
        self.seen[job] = Seen(job, state, reason, node, "squeue")
        return self

    def look(self, jobs: Iterable[int | str]) -> tuple[dict[str, Seen], str]:
        self.asked = [str(job) for job in jobs]
        return (
            {} if self.silent else {job: s for job, s in self.seen.items() if job in self.asked}
        ), self.silent


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Four arms of three seeds."""
    return freeze(toy_study(tmp_path))


def seen_by(manifest: Manifest, queue: Queue) -> Overview:
    return overview(manifest, [look(manifest, run, []) for run in manifest.runs], queue.look)


def first(manifest: Manifest, queue: Queue) -> Part:
    return seen_by(manifest, queue).submissions[-1].elements[0]


def test_a_study_that_was_not_submitted_asks_nobody(manifest: Manifest) -> None:
    queue = Queue(silent="must not be asked")
    assert seen_by(manifest, queue) == Overview()
    assert queue.asked == []


def test_a_submission_that_is_over_asks_nobody(manifest: Manifest) -> None:
    record = submit(manifest)
    for n in (0, 1):
        for run in of(manifest, n):
            write_run(manifest, run, "done" if n else "diverged")
    for run in of(manifest, 2):
        write_run(manifest, run, "cancelled")
    for run in of(manifest, 3):
        write_run(manifest, run, "bug")
    row(manifest, record, 3, "failed", "3 of 3 runs: bug: torn")
    queue = Queue(silent="must not be asked")
    (line,) = seen_by(manifest, queue).submissions
    assert line.counts == {"done": 2, "failed": 1, "cancelled": 1}
    assert line.elements[3].reason == "3 of 3 runs: bug: torn"
    assert queue.asked == []
    # A negative control: one run that is not over, and the element is asked for, and only it.
    manifest.run_dir(of(manifest, 2)[0]).mark("pending", "to be tried again")
    seen_by(manifest, queue)
    assert queue.asked == ["7_2"]


@pytest.mark.parametrize(
    ("state", "reason", "node", "expected"),
    [
        ("PENDING", "JobArrayTaskLimit", "", ("pending", "JobArrayTaskLimit", "")),
        ("RUNNING", "", "n3", ("running", "", "n3")),
        ("COMPLETING", "", "n3", ("running", "completing", "n3")),
        ("NODE_FAIL", "", "n3", ("ended", "SLURM says NODE_FAIL; `jaxablate submit` takes up what is left", "")),
        ("COMPLETED", "", "n3", ("ended", "SLURM says COMPLETED; `jaxablate submit` takes up what is left", "")),
    ],
)  # fmt: skip
def test_what_slurm_says_of_an_element_that_has_said_nothing(
    manifest: Manifest, state: str, reason: str, node: str, expected: tuple[str, str, str]
) -> None:
    submit(manifest)
    part = first(manifest, Queue().has("7_0", state, reason, node))
    assert (part.state, part.reason, part.node) == expected
    assert part.runs == {"pending": 3}  # whatever the queue says, no run has ended


@pytest.mark.parametrize("silent", ["", "squeue: no answer in 10 s"])
def test_a_job_that_is_not_found_is_in_no_terminal_state(manifest: Manifest, silent: str) -> None:
    record = submit(manifest)
    row(manifest, record, 1, "running")
    row(manifest, record, 2, "running")
    row(manifest, record, 2, "stopped", "SIGUSR2")
    at_work(manifest, 3)
    row(manifest, record, 3, "running")
    found = seen_by(manifest, Queue(silent=silent))
    never, began, stopped, works = found.submissions[0].elements
    assert (works.state, works.node) == ("running", "n1")  # its processes live, whatever the queue says
    if silent:
        assert (never.state, began.state, stopped.state) == ("pending", "stopped", "stopped")
        assert stopped.reason == "SIGUSR2"
        assert found.notes == (f"{silent}; what is said of the elements is from the run directories alone",)
    else:
        assert {never.state, began.state, stopped.state} == {"unqueued"}
        assert found.notes == ()
    assert all(part.runs in ({"pending": 3}, {"running": 3}) for part in (never, began, stopped, works))


def test_the_run_directories_overrule_the_queue(manifest: Manifest) -> None:
    submit(manifest)
    for run in of(manifest, 0):
        write_run(manifest, run, "done")
    # As after a controller that was killed: what is finished comes back as pending.
    assert first(manifest, Queue().has("7_0", "PENDING", "launch failed requeued held")).state == "done"


def test_an_interrupted_element_that_waits_says_both(manifest: Manifest) -> None:
    record = submit(manifest)
    row(manifest, record, 0, "running")
    row(manifest, record, 0, "stopped", "SIGUSR2")
    part = first(manifest, Queue().has("7_0", "PENDING", "BeginTime"))
    assert (part.state, part.reason, part.starts) == ("pending", "SIGUSR2; BeginTime", 1)


@pytest.mark.parametrize(
    ("state", "reason"),
    [("PENDING", "launch failed requeued held"), ("PENDING", "JobHeldUser"), ("REQUEUE_HOLD", "")],
)
def test_what_lets_a_held_element_start_is_said(manifest: Manifest, state: str, reason: str) -> None:
    submit(manifest)
    part = first(manifest, Queue().has("7_0", state, reason))
    assert part.state == "pending"
    assert part.reason.endswith("; `scontrol release 7_0` lets it start")
    assert first(manifest, Queue().has("7_0", "PENDING", "Dependency")).reason == "Dependency"


def test_a_stale_row_of_the_accounting_is_no_running_element(manifest: Manifest) -> None:
    submit(manifest)
    stale = Seen("7_0", "RUNNING", "", "n1", "sacct")
    assert first(manifest, Queue({"7_0": stale})).state != "running"
    assert first(manifest, Queue().has("7_0", "RUNNING")).state == "running"


def test_what_a_later_submission_has_is_replaced(manifest: Manifest) -> None:
    old = submit(manifest, id="20260101T000000-aaaaaa")
    row(manifest, old, 0, "failed", "3 of 3 runs: bug: torn")
    elements = (dataclasses.replace(old.elements[0], index=0),)
    new = submit(manifest, 8, id="20260102T000000-bbbbbb", elements=elements, arrays=(Array(8, 0, 1),))
    before, after = seen_by(manifest, Queue().has("8_0", "PENDING", "Priority")).submissions
    assert (before.elements[0].state, after.elements[0].state) == ("replaced", "pending")
    assert before.elements[1].state == "unqueued"  # the negative control: that one it does not have
    records.write(manifest.path, dataclasses.replace(new, state="withdrawn"))
    before, after = seen_by(manifest, Queue()).submissions
    assert before.elements[0].state == "failed"
    assert after.lines() == ["submission 20260102T000000-bbbbbb: withdrawn"]


def test_a_stage_that_ended_is_done_and_its_runs_are_no_failures(
    manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    run = of(manifest, 0)[0]
    parts = (
        Element(0, run.arm, "confirm", (run.id,), (run.seed,), "first"),
        Element(1, run.arm, "confirm", (run.id,), (run.seed,), "", (0,)),
    )
    record = submit(manifest, elements=parts, arrays=(Array(None, 0, 1), Array(None, 1, 1, (0,))))
    where = manifest.run_dir(run)
    where.create({})
    where.end_attempt(where.begin_attempt(), "preempted", "stage first is done", paused="first")
    row(manifest, record, 0, "running")
    row(manifest, record, 0, "paused")
    (line,) = seen_by(manifest, Queue()).submissions
    assert [part.state for part in line.elements] == ["done", "pending"]
    assert line.elements[1].reason == "not accepted by SLURM yet"
    assert cli.main(["status", str(manifest.path)]) == 0
    said = capsys.readouterr().out
    assert "between stages" in said
    assert "stage first is done" not in said  # not among what is worth a look


def test_a_prepared_submission_and_confirmations_to_come(tmp_path: Path) -> None:
    manifest = freeze(toy_study(tmp_path, learning_rate=RULE))
    parts = (Element(0, "wide", "confirm", (), (0, 1, 2)),)
    record = submit(manifest, state="prepared", elements=parts, arrays=(Array(None, 0, 1),))
    part = first(manifest, Queue())
    assert (part.state, part.runs) == ("prepared", {})
    row(manifest, record, 0, "running", job="9_0")  # somebody called sbatch
    queue = Queue().has("9_0", "RUNNING", "", "n2")
    assert first(manifest, queue).state == "running"
    row(manifest, record, 0, "done", "no learning rate was stable", job="9_0")
    assert first(manifest, queue).state == "done"


def test_the_table_groups_what_is_alike_and_cleans_what_it_prints(manifest: Manifest) -> None:
    submit(manifest)
    queue = Queue().has("7_0", "RUNNING", "", "n1").has("7_1", "PENDING", "JobArrayTaskLimit")
    queue.has("7_2", "PENDING", "JobArrayTaskLimit").has("7_3", "PENDING", "\x1b[31mhold\x07")
    head, *lines = seen_by(manifest, queue).lines()
    assert head.endswith("job 7: 4 elements: 1 running, 3 pending")
    arms = [arm.name for arm in manifest.study.arms]
    assert lines == [
        f"  running 7_0 ({arms[0]}) on n1",
        f"  pending 7_1, 7_2 ({arms[1]}, {arms[2]}): JobArrayTaskLimit",
        f"  pending 7_3 ({arms[3]}): hold",
    ]


def test_arms_that_were_not_asked_for_are_left_out(manifest: Manifest) -> None:
    submit(manifest)
    seen = [look(manifest, run, []) for run in of(manifest, 1)]
    (line,) = overview(manifest, seen, Queue().look).submissions
    assert [part.arm for part in line.elements] == [arm_of(manifest, 1)]


def test_a_damaged_submission_is_a_note(manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    record = submit(manifest)
    (records.folder_of(manifest.path, record.id) / "submission.json").write_text("{}")
    assert cli.main(["status", str(manifest.path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["submissions"] == []
    assert "submission.json" in data["notes"][0]
    assert data["total"] == {"pending": 12}
