"""What SLURM says, and that asking it ends in bounded time and never in an exception."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxablate.schedule.slurm import queue
from jaxablate.schedule.slurm.queue import Bounds, Seen, SlurmError, look, run_tool
from tests.slurm_lab import Lab, LabError

Fake = Callable[..., Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """`fake(squeue="echo hello")`: programs of these names, and only these; their calls are in the file returned."""
    programs, calls = tmp_path / "programs", tmp_path / "calls"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))

    def make(**scripts: str) -> Path:
        for name, script in scripts.items():
            path = programs / name
            path.write_text(
                f'#!/bin/sh\nprintf "%s\\n" "{name} $*" >> {calls}\nPATH=/usr/bin:/bin\n{script}\n'
            )
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return calls

    return make


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between attempts take no time."""
    monkeypatch.setattr(queue.time, "sleep", lambda seconds: None)


DOWN = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1'
DISABLED = 'echo "Slurm accounting storage is disabled" >&2; exit 1'


# ---------------------------------------------------------------------------------------- one tool


def test_arguments_reach_a_tool_as_they_are(fake: Fake):
    fake(scontrol='for word in "$@"; do printf "<%s>" "$word"; done')
    odd = ["a b", "$(touch /tmp/x)", "'; true", "line\nbreak", "--x=%j"]
    assert run_tool(["scontrol", *odd], timeout_s=5) == "".join(f"<{word}>" for word in odd)


def test_a_tool_that_is_not_there_is_said_in_one_line(fake: Fake):
    fake()
    with pytest.raises(SlurmError, match=r"^squeue: not on PATH; call jaxablate where") as error:
        run_tool(["squeue"], timeout_s=5)
    assert error.value.kind == "absent"
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("quick")
def test_what_may_pass_is_tried_again_and_a_refusal_is_not(fake: Fake, tmp_path: Path):
    calls = fake(
        squeue=f"[ -e {tmp_path}/up ] && echo fine && exit; touch {tmp_path}/up; {DOWN}",
        scontrol='echo "scontrol: error: Access/permission denied" >&2; exit 1',
    )
    assert run_tool(["squeue"], timeout_s=5, retries=3) == "fine\n"
    with pytest.raises(SlurmError, match=r"^scontrol: Access/permission denied$") as error:
        run_tool(["scontrol"], timeout_s=5, retries=3)
    assert error.value.kind == "refused"
    assert calls.read_text().split() == ["squeue", "squeue", "scontrol"]


@pytest.mark.usefixtures("quick")
def test_attempts_are_counted(fake: Fake):
    calls = fake(squeue=DOWN)
    with pytest.raises(SlurmError, match="Unable to contact") as error:
        run_tool(["squeue"], timeout_s=60, retries=4)
    assert error.value.kind == "silent"
    assert len(calls.read_text().splitlines()) == 5


def test_a_tool_that_hangs_is_left(fake: Fake):
    fake(squeue="exec sleep 60")
    began = time.monotonic()
    with pytest.raises(SlurmError, match="no answer in 0 s") as error:
        run_tool(["squeue"], timeout_s=0.2, retries=100)
    assert error.value.kind == "silent"
    assert time.monotonic() - began < 30  # and not the minute that it wants


def test_output_that_is_no_text_is_no_exception(fake: Fake):
    fake(squeue=r"printf '\377\376'; printf '7|RUNNING|n0|None\n'")
    assert "RUNNING" in run_tool(["squeue"], timeout_s=5)


# ------------------------------------------------------------------------------------ looking at jobs


def test_squeue_is_asked_first_and_sacct_only_for_the_rest(fake: Fake):
    calls = fake(
        squeue="echo '7_0|RUNNING|n1|None'; echo '7_1|PENDING||JobArrayTaskLimit'",
        sacct="echo '8|CANCELLED by 1000|n2|None'; echo '9_[0-1,3%2]|TIMEOUT||None'; echo '8.batch|X|n|'",
    )
    found, silent = look([7])
    assert silent == ""
    assert found == {
        "7_0": Seen("7_0", "RUNNING", "", "n1", "squeue"),
        "7_1": Seen("7_1", "PENDING", "JobArrayTaskLimit", "", "squeue"),
    }
    assert "sacct" not in calls.read_text()
    found, _ = look([7, "8", "9_3", "9_7"])
    assert found["8"] == Seen("8", "CANCELLED", "", "n2", "sacct")
    assert set(found) == {"7_0", "7_1", "8", "9_3"}  # 9_0 was not asked for, 9_7 is nowhere
    assert calls.read_text().splitlines()[-1].endswith("--jobs=8,9")


def test_only_squeue_says_what_is_queued(fake: Fake):
    calls = fake(
        squeue="echo '7_0|RUNNING|n1|None'; echo '7_1|FAILED|n1|None'",
        sacct="echo '8|RUNNING|n1|None'; echo '9|COMPLETED|n1|None'",
    )
    found, silent = queue.queued([7, 8, 9])
    assert (set(found), silent) == ({"7_0"}, "")
    assert "sacct" not in calls.read_text()
    assert {job: seen.state for job, seen in look([8, 9])[0].items()} == {"9": "COMPLETED"}  # 8 is stale
    assert not Seen("8", "RUNNING", "", "n1", "sacct").queued


@pytest.mark.parametrize(
    ("state", "reason", "held"),
    [
        ("PENDING", "launch failed requeued held", "by slurm"),
        ("PENDING", "launch_failed_requeued_held", "by slurm"),
        ("PENDING", "job requeued in held state", "by hand"),
        ("REQUEUE_HOLD", "", "by hand"),
        ("PENDING", "JobHeldUser", "by hand"),
        ("PENDING", "JobHeldAdmin", "by hand"),
        ("PENDING", "Dependency", ""),
        ("RUNNING", "", ""),
    ],
)
def test_who_holds_a_job(state: str, reason: str, held: str):
    assert Seen("7", state, reason, "", "squeue").held == held


def test_only_what_was_asked_for_is_told(fake: Fake):
    fake(squeue="echo '7_0|RUNNING|n1|None'; echo '70_0|RUNNING|n1|None'; echo '7_1|RUNNING|n1|None'")
    assert set(look(["7_0"])[0]) == {"7_0"}
    assert set(look([7])[0]) == {"7_0", "7_1"}
    assert look([]) == ({}, "")


@pytest.mark.parametrize(
    ("squeue", "sacct", "known", "words"),
    [
        (DOWN, DISABLED, set(), "squeue: slurm_load_jobs error: Unable to contact slurm controller"),
        (DOWN, "echo '7|COMPLETED|n0|None'", {"7"}, "squeue: slurm_load_jobs"),
        ("true", DISABLED, set(), ""),  # no accounting is no trouble
        ("true", DOWN, set(), "sacct: "),
        ('echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1', DISABLED, set(), ""),
        ("exit 3", "exit 4", set(), "squeue: exit code 3; sacct: exit code 4"),
        ("echo rubbish; echo '|||'; echo '7|R'", "echo '\x1b'", set(), ""),
    ],
)
@pytest.mark.usefixtures("quick")
def test_whatever_fails_is_a_note_and_never_an_exception(
    fake: Fake, squeue: str, sacct: str, known: set[str], words: str
):
    fake(squeue=squeue, sacct=sacct)
    found, silent = look([7])
    assert set(found) == known
    assert silent.startswith(words)
    assert bool(silent) == bool(words)


def test_a_machine_without_slurm_is_said_once(fake: Fake):
    fake()
    assert look([7]) == ({}, "squeue: not on PATH; call jaxablate where SLURM's tools are installed")


# -------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    ("enforce", "qos", "expected"),
    [("none", "", Bounds(501, None)), ("associations,limits", "", Bounds(501, 40)),
     ("limits", "long", Bounds(501, 25))],
)  # fmt: skip
def test_bounds_are_those_that_are_enforced(fake: Fake, enforce: str, qos: str, expected: Bounds):
    fake(
        scontrol=f"echo 'AccountingStorageEnforce = {enforce}'; echo 'MaxArraySize            = 501'",
        sacctmgr="case $* in *assoc*proj*) echo '40|';; *assoc*) echo '1|';; *user*) echo proj;; "
        "*) echo '25|100';; esac",
    )
    assert queue.bounds(qos=qos) == expected


# ------------------------------------------------------------------------------------------- telling


def test_exactly_the_elements_meant_are_named(fake: Fake):
    calls = fake(scancel="true", scontrol="true")
    queue.scancel(["7_1", "7_3"])
    queue.requeue("7_2")
    queue.scancel([])
    queue.release(["7_1", "7_3"])
    queue.release([])
    assert calls.read_text().splitlines() == [
        "scancel --quiet 7_1 7_3", "scontrol requeue 7_2", "scontrol release 7_1,7_3"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "gone",
    ['echo "scancel: error: Kill job error on job id 7_1: Invalid job id specified" >&2; exit 1', "exit 225"],
)
def test_a_job_that_is_forgotten_is_none_to_cancel(fake: Fake, gone: str):
    fake(scancel=gone)
    queue.scancel(["7_1"])
    fake(scancel='echo "scancel: error: Access/permission denied" >&2; exit 1')
    with pytest.raises(SlurmError, match="denied"):
        queue.scancel(["7_1"])


# ----------------------------------------------------------------------------------------- real SLURM


WAIT = """#!/bin/sh
echo began
sleep 60 & wait
"""


@pytest.mark.slow
def test_on_real_slurm_elements_are_found_requeued_and_cancelled(slurm: Lab):
    job = slurm.sbatch(WAIT, "--array=0-3%2", "--requeue")

    def states() -> dict[str, str]:
        return {task: seen.state for task, seen in look([job])[0].items()}

    def output(task: int) -> str:
        path = slurm.dir / f"{job}_{task}.out"
        return path.read_text() if path.exists() else ""

    ids = [f"{job}_{n}" for n in range(4)]
    slurm.wait_for(lambda: "began" in output(0) and "began" in output(1), 20, "two elements")
    assert states() == dict(zip(ids, ["RUNNING", "RUNNING", "PENDING", "PENDING"], strict=True))
    assert look([job])[0][ids[2]].reason == "JobArrayTaskLimit"
    assert look([job])[0][ids[0]].node in slurm.nodes
    slurm.run("scontrol", "hold", ids[2])
    assert {task: seen.held for task, seen in queue.queued([job])[0].items() if seen.held} == {
        ids[2]: "by hand"
    }
    queue.requeue(ids[1])
    queue.scancel([ids[0], ids[3], "99999"])
    slurm.wait_for(
        lambda: look([job])[0][ids[1]].state == "RUNNING" and output(1).count("began") == 2, 40, "1"
    )
    assert states()[ids[2]] == "PENDING"
    queue.release([ids[2], ids[1]])  # as one list; that another one is not held does no harm
    slurm.wait_for(lambda: states()[ids[2]] == "RUNNING" and "began" in output(2), 20, "element 2")
    assert states()[ids[0]] == "CANCELLED"
    assert states().get(ids[3]) in ("CANCELLED", None)  # one that never began is soon forgotten
    assert [output(n).count("began") for n in range(4)] == [1, 2, 1, 0]
    assert queue.bounds() == Bounds(1001, None)


@pytest.mark.slow
def test_a_requeue_waits_for_a_controller_that_comes_back(slurm: Lab):
    job = slurm.sbatch(WAIT, "--requeue")
    slurm.wait_for(lambda: (slurm.dir / f"{job}.out").exists(), 20, "the job")
    slurm.settle()
    slurm.kill("slurmctld")
    found, silent = look([job], timeout_s=1)
    assert (found, "squeue: " in silent) == ({}, True)
    with ThreadPoolExecutor(1) as waiting:
        asked = waiting.submit(queue.requeue, str(job), timeout_s=60)
        slurm.start_controller()
        asked.result()
    assert slurm.show(job)["Restarts"] == "1"


@pytest.mark.slow
def test_the_accounting_tells_what_the_queue_forgot(slurm_with_accounting: Lab):
    lab = slurm_with_accounting
    job = lab.sbatch("#!/bin/sh\nexit $SLURM_ARRAY_TASK_ID\n", "--array=0-1")
    lab.wait_for(lambda: {s.source for s in look([job])[0].values()} == {"sacct"}, 90, "squeue to forget")
    states = {task: seen.state for task, seen in look([job])[0].items()}
    assert states == {f"{job}_0": "COMPLETED", f"{job}_1": "FAILED"}


@pytest.mark.slow
def test_the_accountings_limits_are_found_before_they_are_reached(slurm_with_accounting: Lab):
    lab = slurm_with_accounting

    def change(*words: str) -> None:
        lab.run("sacctmgr", "--immediate", "--quiet", *words)

    assert queue.bounds() == Bounds(1001, None)
    change("add", "qos", "short", "MaxSubmitJobsPerUser=3")
    change("modify", "user", "where", f"name={queue._user()}", "set", "MaxSubmitJobs=5", "qos+=short")
    assert queue.bounds() == Bounds(1001, 5)
    assert queue.bounds(qos="short") == Bounds(1001, 3)
    lab.sbatch("#!/bin/sh\n", "--array=0-4", "--hold")
    with pytest.raises(LabError, match="SubmitJobLimit"):  # as it is meant
        lab.sbatch("#!/bin/sh\n", "--hold")
    change("modify", "user", "where", f"name={queue._user()}", "set", "MaxSubmitJobs=-1")
