"""`status`, `cancel` and `retry` of a submitted study: the run directories are the truth, the queue is news."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from jaxablate import cli, runstore
from jaxablate.analysis.seen import look
from jaxablate.claims import Holder
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.runstore import State
from jaxablate.schedule.slurm import cluster, marks
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm.overview import Overview, Part, overview
from jaxablate.schedule.slurm.queue import Seen
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import Array, Element, Submission
from jaxablate.study import Run
from tests.frozen import RULE, freeze, toy_study, write_run
from tests.schedule.slurm.fake_slurm import FakeSlurm


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


def arm_of(manifest: Manifest, n: int) -> str:
    return manifest.study.arms[n].name


def of(manifest: Manifest, n: int) -> list[Run]:
    return [run for run in manifest.runs if run.arm == arm_of(manifest, n)]


def submit(manifest: Manifest, job: int | None = 7, **changes: Any) -> Submission:
    """A submission of an element for each arm, in one array."""
    arms = [arm.name for arm in manifest.study.arms]
    parts = tuple(
        Element(n, arm, "confirm", tuple(run.id for run in of(manifest, n)), manifest.study.seeds)
        for n, arm in enumerate(arms)
    )
    fields: dict[str, Any] = {
        "id": records.new_id(), "time": runstore.now(), "site": Site().to_dict(), "elements": parts,
        "arrays": (Array(job, 0, len(parts)),), "state": "submitted", "folder": str(manifest.path),
    }  # fmt: skip
    record = Submission(**fields | changes)
    records.write(manifest.path, record)
    return record


def row(
    manifest: Manifest, record: Submission, index: int, state: str, reason: str = "", **info: Any
) -> None:
    about = {"restart": 0, "job": f"7_{index}", "node": "n1"}
    records.log_row(manifest.path, record.id, index, state=state, reason=reason, **about | info)


def at_work(manifest: Manifest, n: int) -> None:
    """This process holds the claims of an arm's runs."""
    for run in of(manifest, n):
        write_run(manifest, run, "running")
        claim = manifest.run_dir(run).claim
        claim.write_bytes(runstore.encode_row(dataclasses.asdict(Holder.me())))


def seen_by(manifest: Manifest, queue: Queue) -> Overview:
    return overview(manifest, [look(manifest, run, []) for run in manifest.runs], queue.look)


def first(manifest: Manifest, queue: Queue) -> Part:
    return seen_by(manifest, queue).submissions[-1].elements[0]


# ---------------------------------------------------------------------------------------------- status


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


# ------------------------------------------------------------------------------------ cancel and retry


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    found = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("PATH", found.path)
    monkeypatch.setattr(cluster, "_PAUSES_S", (0.0, 0.0, 0.0))
    found.write(jobs=[{"job": 7, "comment": "", "count": 4, "state": "PENDING"}])
    return found


def states(manifest: Manifest) -> list[State]:
    return [manifest.run_dir(run).state() for run in manifest.runs]


def test_cancel_names_exactly_the_element_that_has_nothing_left(manifest: Manifest, fake: FakeSlurm) -> None:
    submit(manifest)
    write_run(manifest, of(manifest, 1)[0], "done")  # which does not make it work to do
    found = marks.cancel(manifest, [arm_of(manifest, 1)])
    assert len(found) == 2
    assert fake.calls("scancel") == [["--quiet", "7_1"]]
    assert states(manifest).count("cancelled") == 2
    # Again: it has nothing left to cancel, and its element is still the only one that is named.
    assert marks.cancel(manifest, [arm_of(manifest, 1)]) == []
    assert {call[-1] for call in fake.calls("scancel")} == {"7_1"}


def test_cancel_of_some_runs_of_an_element_leaves_it_in_the_queue(
    manifest: Manifest, fake: FakeSlurm
) -> None:
    submit(manifest)
    found = marks.cancel(manifest, [arm_of(manifest, 2)], [1])
    assert [run.seed for run in found] == [1]
    assert fake.calls("scancel") == []
    marks.cancel(manifest, [arm_of(manifest, 2)], [0])
    assert fake.calls("scancel") == []
    marks.cancel(manifest, [arm_of(manifest, 2)])
    assert fake.calls("scancel") == [["--quiet", "7_2"]]


def test_cancel_marks_runs_of_another_machine_before_anything_else(
    manifest: Manifest, fake: FakeSlurm
) -> None:
    submit(manifest)
    at_work(manifest, 0)
    for run in of(manifest, 0):
        claim = manifest.run_dir(run).claim
        there = dataclasses.replace(Holder.me(), host="n7", pid=1)
        claim.write_bytes(runstore.encode_row(dataclasses.asdict(there)))
    fake.answer("scancel", "Access/permission denied")
    with pytest.raises(
        UserError, match=r"denied; 3 runs are marked as cancelled, call `jaxablate cancel` again"
    ):
        marks.cancel(manifest, [arm_of(manifest, 0)])
    assert states(manifest).count("cancelled") == 3
    marks.cancel(manifest, [arm_of(manifest, 0)])
    assert fake.calls("scancel") == [["--quiet", "7_0"]] * 2


def test_cancel_of_what_is_no_longer_queued_calls_nothing(manifest: Manifest, fake: FakeSlurm) -> None:
    submit(manifest)
    fake.end()
    assert len(marks.cancel(manifest)) == 12
    assert fake.calls("scancel") == []


def test_cancel_without_slurm_marks_and_says_so(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(manifest)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"scancel: not on PATH.*12 runs are marked"):
        marks.cancel(manifest)
    assert set(states(manifest)) == {"cancelled"}


def test_a_study_that_was_never_submitted_needs_no_slurm(manifest: Manifest, fake: FakeSlurm) -> None:
    assert len(marks.cancel(manifest)) == 12
    assert len(marks.retry(manifest)) == 12
    assert not (fake.home / "calls.jsonl").exists()


def test_retry_submits_exactly_those_runs_on_the_same_terms(manifest: Manifest, fake: FakeSlurm) -> None:
    site = Site(partition="gpu", time="01:00:00", max_attempts=4)
    submit(manifest, site=site.to_dict())
    fake.end()
    for n, state in enumerate(("done", "bug", "timeout", "diverged")):
        for run in of(manifest, n):
            write_run(manifest, run, state)  # pyright: ignore[reportArgumentType]
    arm = arm_of(manifest, 1)
    assert [run.seed for run in marks.retry(manifest, [arm], [0, 2])] == [0, 2]
    (argv,) = fake.calls("sbatch")
    assert {"--partition=gpu", "--time=01:00:00"} <= set(argv)
    newest = records.submissions(manifest.path)[-1]
    wanted = tuple(run.id for run in of(manifest, 1) if run.seed in (0, 2))
    assert [(element.arm, element.runs) for element in newest.elements] == [(arm, wanted)]
    assert newest.site == site.to_dict()
    assert states(manifest).count("pending") == 2
    assert fake.calls("scancel") == []


def test_retry_of_what_is_still_queued_submits_nothing(manifest: Manifest, fake: FakeSlurm) -> None:
    submit(manifest)
    for run in of(manifest, 1):
        write_run(manifest, run, "bug")
    assert len(marks.retry(manifest)) == 3
    assert fake.calls("sbatch") == []
    fake.end()  # the negative control
    for run in of(manifest, 1):
        manifest.run_dir(run).mark("bug", "again")
    assert len(marks.retry(manifest)) == 3
    assert len(fake.calls("sbatch")) == 1


def staged(manifest: Manifest) -> Submission:
    """The first arm's runs in two stages, of two arrays."""
    own = tuple(run.id for run in of(manifest, 0))
    parts = tuple(
        Element(n, arm_of(manifest, 0), "confirm", own, manifest.study.seeds, stage, after)
        for n, (stage, after) in enumerate([("first", ()), ("", (0,))])
    )
    return submit(manifest, elements=parts, arrays=(Array(7, 0, 1), Array(8, 1, 1, (0,))))


@pytest.mark.parametrize(
    ("first", "second", "job", "expected"),
    [
        ("RUNNING", "PENDING", "7_0", "3 runs left to job 7_0, which is queued and will find them"),
        ("COMPLETED", "RUNNING", "8_0", "3 runs left to job 8_0, which is queued and will find them"),
        # What failed before the second stage that stage does not take up: submitted anew.
        ("COMPLETED", "PENDING", "7_0", "submission"),
        ("COMPLETED", "RUNNING", "7_0", "submission"),
    ],
)
def test_retry_leaves_to_a_stage_what_it_will_find_and_says_so(
    manifest: Manifest, fake: FakeSlurm, caplog: pytest.LogCaptureFixture, first: str, second: str, job: str,
    expected: str,
) -> None:  # fmt: skip
    """`job` began the last attempt at the runs, which failed."""
    staged(manifest)
    fake.write(jobs=[{"job": n, "comment": "", "count": 1, "state": s} for n, s in ((7, first), (8, second))])
    for run in of(manifest, 0):
        where = manifest.run_dir(run)
        where.create(manifest.config_of(run))
        where.end_attempt(where.begin_attempt(slurm={"job": job}), "bug", "torn")
    caplog.set_level("INFO")
    assert len(marks.retry(manifest, [arm_of(manifest, 0)])) == 3
    assert [record.getMessage() for record in caplog.records][-1].startswith(expected)
    assert len(fake.calls("sbatch")) == (expected == "submission")


def test_retry_of_tuning_says_who_submits_the_confirmations(
    tmp_path: Path, fake: FakeSlurm, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = freeze(toy_study(tmp_path, learning_rate=RULE))
    tuned = [run for run in manifest.runs if run.arm == "wide"]
    seeds = tuple(sorted({run.seed for run in tuned}))
    parts = (
        Element(0, "wide", "tuning", tuple(run.id for run in tuned), seeds),
        Element(1, "wide", "confirm", (), manifest.study.seeds, "", (0,)),
    )
    submit(manifest, elements=parts, arrays=(Array(7, 0, 1), Array(8, 1, 1, (0,))))
    fake.end()
    for run in tuned:
        write_run(manifest, run, "bug")
    caplog.set_level("INFO")
    assert len(marks.retry(manifest, ["wide"])) == len(tuned)
    said = "the confirmations of wide are not queued: call `jaxablate submit` for them"
    assert said in [record.getMessage() for record in caplog.records]
    assert len(fake.calls("sbatch")) == 1


def test_retry_releases_what_slurm_holds_though_nothing_has_failed(
    manifest: Manifest, fake: FakeSlurm, caplog: pytest.LogCaptureFixture
) -> None:
    submit(manifest)
    caplog.set_level("INFO")
    assert marks.retry(manifest) == []
    assert [words for words in fake.calls("scontrol") if words[0] == "release"] == []
    fake.hold(7, "launch failed requeued held")
    assert marks.retry(manifest) == []
    assert fake.calls("scontrol")[-1] == ["release", "7_0,7_1,7_2,7_3"]
    assert "released, since SLURM held them: 7_0" in caplog.text


def test_retry_while_slurm_is_silent_leaves_the_runs_pending(manifest: Manifest, fake: FakeSlurm) -> None:
    submit(manifest)
    fake.end()
    write_run(manifest, of(manifest, 1)[0], "bug")
    fake.answer("scontrol", *["Access/permission denied"] * 9)
    with pytest.raises(UserError, match=r"1 runs are pending, `jaxablate submit` takes them up"):
        marks.retry(manifest)
    assert states(manifest).count("bug") == 0
    assert len(records.submissions(manifest.path)) == 1


def test_the_verbs_reach_the_elements(manifest: Manifest, fake: FakeSlurm) -> None:
    submit(manifest)
    arm = arm_of(manifest, 3)
    assert cli.main(["cancel", str(manifest.path), f"--arm={arm}"]) == 0
    assert fake.calls("scancel") == [["--quiet", "7_3"]]
    fake.end()
    assert cli.main(["retry", str(manifest.path), f"--arm={arm}"]) == 0
    assert len(fake.calls("sbatch")) == 1


@pytest.mark.slow
def test_a_run_that_was_cancelled_on_another_machine_is_stopped_by_its_launcher(
    tmp_path: Path, launch: Any, histories: Any
) -> None:
    """No signal crosses machines: the mark alone does it, and the other run of the cohort is trained to its end."""
    process = launch("slow")
    manifest = found = None
    while found is None and process.poll() is None:
        with contextlib.suppress(UserError):
            manifest = Manifest.load(tmp_path / "toy")
            found = next((run for run in manifest.runs if manifest.run_dir(run).metrics.exists()), None)
        time.sleep(0.05)
    assert manifest is not None
    assert found is not None
    manifest.run_dir(found).mark("cancelled", "cancelled on another machine")
    output, _ = process.communicate(timeout=120)
    assert json.loads(output)["runs"] == {"done": 1, "cancelled": 1}
    other = next(run for run in manifest.runs if run != found)
    assert [row["state"] for row in manifest.run_dir(other).history()] == [
        "running", "preempted", "running", "done"
    ]  # fmt: skip
