"""What a command is about, what it would do, and what a person may change; no worker is started here."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxablate import config, events
from jaxablate.claims import Claim, Holder
from jaxablate.errors import UserError
from jaxablate.leases import LEASE_S
from jaxablate.manifest import Manifest
from jaxablate.runstore import State
from jaxablate.schedule import local, workers
from jaxablate.schedule.cohorts import Job
from jaxablate.schedule.local import RunOptions, dry_run, run_study
from jaxablate.schedule.survey import Selection, Survey, to_come, without_rate
from jaxablate.schedule.workers import Command, Worker
from tests.frozen import write_run
from tests.schedule.toy_studies import STUDIES, faults, slow, tuned


@pytest.fixture(autouse=True)
def _no_worker(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def started(*args: Any) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(workers, "start", started)


def frozen(workdir: Path, study: str = "faults", **states: State) -> Manifest:
    """A frozen study; `baseline0="done"` gives the state of a run by its arm and seed, the others never ran."""
    declared = STUDIES[study](str(workdir))
    manifest = Manifest.freeze(declared, local.resolve(declared))
    for run in manifest.runs:
        if state := states.get(f"{run.arm}{run.seed}", states.get(run.arm)):
            write_run(manifest, run, state)
    return manifest


def tree(path: Path) -> dict[Path, int]:
    return {found: found.stat().st_mtime_ns for found in path.rglob("*")}


# ------------------------------------------------------------------------------------- nothing to do


def test_a_study_that_is_done_is_found_so_without_resolving_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen(tmp_path, "slow", baseline="done")
    before = tree(tmp_path)

    def resolved(*args: Any) -> None:
        raise AssertionError("resolving imports jax")

    monkeypatch.setattr(config, "resolve", resolved)
    outcome = run_study(slow(str(tmp_path)), RunOptions())
    assert (outcome.exit_code, outcome.counts, outcome.failures) == (0, {"done": 2}, ())
    assert tree(tmp_path) == before
    edited = slow(str(tmp_path))
    assert edited.base is not None
    edited.base.training.steps = 61
    with pytest.raises(AssertionError, match="resolving"):
        run_study(edited, RunOptions())


def test_a_study_that_is_done_is_found_so_without_jax(
    tmp_path: Path, repo: Path, child_env: dict[str, str]
) -> None:
    frozen(tmp_path, "slow", baseline0="done", baseline1="diverged")
    code = (
        "import sys; from ml_collections import ConfigDict; import json\n"
        "from jaxablate import study; from jaxablate.schedule import local\n"
        "declared = study.Study.from_dict(json.load(open(sys.argv[1]))['study'])\n"
        "values = json.load(open(sys.argv[1])); base = ConfigDict(values['configs']['baseline'])\n"
        "base.seeds, base.host = (0,), values['host']\n"
        "object.__setattr__(declared, 'base', base)\n"
        "outcome = local.run_study(declared, local.RunOptions())\n"
        "assert outcome.exit_code == 0, outcome\n"
        "assert not {'jax', 'jaxlib', 'flax'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "toy" / "study.json")]
    child = subprocess.run(command, cwd=repo, env=child_env, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


def test_what_failed_for_good_is_left_alone_and_said(tmp_path: Path) -> None:
    frozen(tmp_path, "slow", baseline0="done", baseline1="bug")
    outcome = run_study(slow(str(tmp_path)), RunOptions())
    assert (outcome.exit_code, outcome.counts) == (1, {"done": 1, "bug": 1})
    assert "bug: baseline seed 1" in outcome.text()
    with pytest.raises(AssertionError, match="a worker was started"):
        run_study(slow(str(tmp_path)), RunOptions(only="failed"))


# ------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path: Path) -> None:
    said = dry_run(faults(str(tmp_path / "new")), RunOptions(workers=2))
    assert not (tmp_path / "new").exists()
    assert "12 runs: 12 pending" in said
    assert "would train 12 runs in 6 cohorts, 2 at a time on the CPU" in said
    assert "baseline (confirm): seeds 0,1, learning rate 0.01, 2 members" in said
    frozen(
        tmp_path, baseline="done", raises0="preempted", raises1="bug", killed="timeout", diverges1="diverged"
    )
    before = tree(tmp_path)
    said = dry_run(faults(str(tmp_path)), RunOptions())
    assert "would train 6 runs in 4 cohorts" in said
    assert "raises (confirm): seeds 0," in said
    assert tree(tmp_path) == before


def test_a_dry_run_does_not_count_the_interruptions_of_earlier_launches(tmp_path: Path) -> None:
    manifest = frozen(tmp_path, "slow", baseline1="bug")
    where = manifest.run_dir(manifest.runs[0])
    where.create(manifest.config_of(manifest.runs[0]))
    for _ in range(5):
        where.end_attempt(where.begin_attempt(), "preempted", "SIGTERM")
    assert "would train 1 runs" in dry_run(slow(str(tmp_path)), RunOptions())


def test_a_dry_run_of_a_tuned_study_says_what_comes_after(tmp_path: Path) -> None:
    said = dry_run(tuned(str(tmp_path)), RunOptions(seeds=(1,), max_members=3))
    assert "8 runs: 8 pending" in said
    assert "wide (tuning): seeds 100,101, learning rate 0.002, 2 members" in said
    assert "4 members" in dry_run(tuned(str(tmp_path)), RunOptions())  # all rates and seeds of an arm
    assert "then 2 confirmatory runs at the rates that best_mean chooses" in said


@pytest.mark.parametrize(
    ("options", "cohorts"),
    [
        ({"only": "missing"}, ["raises", "diverges", "tight"]),
        ({"only": "failed"}, ["hopeless", "killed"]),
        ({"only": "all"}, ["raises", "diverges", "tight", "hopeless"]),
        ({"arms": ("raises", "baseline"), "seeds": (0,)}, ["raises"]),
    ],
)
def test_only_what_was_asked_for(tmp_path: Path, options: Any, cohorts: list[str]) -> None:
    frozen(tmp_path, baseline="done", raises="preempted", hopeless="node_fail", killed="bug")
    lines = dry_run(faults(str(tmp_path)), RunOptions(**options)).splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == cohorts


def test_runs_that_another_process_works_on_are_left_to_it(tmp_path: Path) -> None:
    manifest = frozen(tmp_path, "slow", baseline="preempted")
    with Claim(manifest.run_dir(manifest.runs[0]).claim):
        said = dry_run(slow(str(tmp_path)), RunOptions())
        assert "would train 1 runs" in said
        assert "1 runs are left to another process" in said
    assert "would train 2 runs" in dry_run(slow(str(tmp_path)), RunOptions())


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ("basline",)}, "no arm 'basline'; did you mean 'baseline'"),
        ({"group": "al"}, "no group 'al'; did you mean 'all'"),
        ({"seeds": (7,)}, r"--seeds=7: is not a seed of study toy; valid: \[0, 1\]"),
        ({"workers": -1}, "--workers=-1: must be 0 or more"),
        ({"max_members": -2}, "--max-members=-2: must be 0 or more"),
    ],
)
def test_a_bad_option_is_one_line(tmp_path: Path, options: Any, message: str) -> None:
    for act in (run_study, dry_run):
        with pytest.raises(UserError, match=message):
            act(slow(str(tmp_path)), RunOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_more_workers_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "gpus", lambda: ["0", "1"])
    with pytest.raises(UserError, match=r"--workers=3: there are 2 GPUs"):
        dry_run(slow(str(tmp_path)), RunOptions(workers=3))
    # Twelve runs on two GPUs: six each at most; a study of one arm is split so that none idles.
    assert "2 at a time on GPU 0, 1" in dry_run(faults(str(tmp_path)), RunOptions())
    assert "in 2 cohorts" in dry_run(slow(str(tmp_path)), RunOptions())


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.*: cannot create the directory.*another workdir"):
        run_study(slow(str(tmp_path / "file")), RunOptions())


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(manifest: Manifest, *args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(manifest.path / "logs"))

    monkeypatch.setattr(workers, "start", full)
    with pytest.raises(UserError, match=r"toy/logs: No space left on device; make room .*run again"):
        run_study(slow(str(tmp_path)), RunOptions())


# ---------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_ctrl_c_ends_a_worker_that_does_not_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: signal.Signals
) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    children: list[subprocess.Popen[bytes]] = []

    def start(manifest: Manifest, job: Job, device: str, command: Command, memory: object) -> Worker:
        child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
        assert child.stdout is not None
        with child.stdout as output:
            output.readline()  # now it no longer listens
        children.append(child)
        where = manifest.run_dir(job.runs[0])
        where.create(manifest.config_of(job.runs[0]))
        where.begin_attempt(log="logs/a.log")
        threading.Timer(0.1, os.kill, (os.getpid(), first)).start()
        threading.Timer(0.8, os.kill, (os.getpid(), signal.SIGINT)).start()
        return Worker(job, child, "logs/a.log", device, time.monotonic(), 0)

    monkeypatch.setattr(workers, "start", start)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    outcome = run_study(slow(str(tmp_path)), RunOptions())
    assert [child.returncode for child in children] == [-signal.SIGKILL]
    assert (outcome.exit_code, outcome.counts) == (75, {"preempted": 1, "pending": 1})
    assert "run the same command to go on" in outcome.text()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


# ------------------------------------------------------------------------------------ retry and cancel


def states(manifest: Manifest) -> dict[str, State]:
    return {f"{run.arm}{run.seed}": manifest.run_dir(run).state() for run in manifest.runs}


@pytest.fixture
def mixed(tmp_path: Path) -> Manifest:
    return frozen(
        tmp_path, baseline0="done", raises0="bug", raises1="oom", diverges0="diverged", tight0="node_fail",
        tight1="timeout", hopeless0="preempted", hopeless1="cancelled", killed0="running",
    )  # fmt: skip


def test_retry_takes_what_failed_and_never_an_outcome(mixed: Manifest) -> None:
    before = states(mixed)
    taken = {f"{run.arm}{run.seed}" for run in local.retry(mixed)}
    assert taken == {"raises0", "raises1", "tight0", "tight1", "hopeless0", "hopeless1"}
    assert states(mixed) == {key: "pending" if key in taken else state for key, state in before.items()}
    assert local.retry(mixed) == []


def test_retry_keeps_to_the_arms_and_seeds_it_is_given(mixed: Manifest) -> None:
    assert [f"{r.arm}{r.seed}" for r in local.retry(mixed, ["raises", "tight"], [1])] == ["raises1", "tight1"]
    with pytest.raises(UserError, match="no arm 'raise'; did you mean 'raises'"):
        local.retry(mixed, ["raise"])
    with pytest.raises(UserError, match="--seeds=5: no run of study toy has it"):
        local.retry(mixed, seeds=[5])


def test_a_failed_run_that_somebody_works_on_is_not_retried(mixed: Manifest) -> None:
    (run,) = [run for run in mixed.runs if (run.arm, run.seed) == ("raises", 0)]
    with Claim(mixed.run_dir(run).claim):
        assert local.retry(mixed, ["raises"], [0]) == []
    assert local.retry(mixed, ["raises"], [0]) == [run]


def test_cancel_takes_what_has_not_ended(mixed: Manifest) -> None:
    taken = {f"{run.arm}{run.seed}" for run in local.cancel(mixed)}
    assert taken == {"baseline1", "diverges1", "hopeless0", "killed0", "killed1"}
    assert {states(mixed)[key] for key in taken} == {"cancelled"}
    assert local.cancel(mixed) == []


def test_a_cancelled_run_is_not_started_and_can_be_retried(tmp_path: Path) -> None:
    manifest = frozen(tmp_path, "slow", baseline0="done")
    assert len(local.cancel(manifest)) == 1
    outcome = run_study(slow(str(tmp_path)), RunOptions())
    assert (outcome.exit_code, outcome.counts) == (1, {"done": 1, "cancelled": 1})
    assert len(local.retry(manifest)) == 1
    with pytest.raises(AssertionError, match="a worker was started"):
        run_study(slow(str(tmp_path)), RunOptions())


def test_a_damaged_run_is_a_failure_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = frozen(
        tmp_path, baseline="done", diverges="done", tight="done", hopeless="done", killed="done"
    )
    bad, good = (manifest.run_dir(run) for run in manifest.runs if run.arm == "raises")
    bad.create(manifest.config_of(manifest.runs[2]))
    bad.attempts.write_text("not json\n")
    started: list[Job] = []

    def start(manifest: Manifest, job: Job, device: str, command: Command, memory: object) -> Worker:
        started.append(job)
        (run,) = job.runs
        write_run(manifest, run)
        summary = manifest.run_dir(run).summary
        rest = {"statistics": {"val_loss": {"final": 0.5}}, "config": manifest.config_of(run)}
        summary.write_text(json.dumps(json.loads(summary.read_text()) | rest))
        return Worker(job, subprocess.Popen(["true"]), "logs/a.log", device, time.monotonic(), 0)

    monkeypatch.setattr(workers, "start", start)
    outcome = run_study(faults(str(tmp_path)), RunOptions())
    assert [run.seed for job in started for run in job.runs] == [1]  # the other member is trained
    assert good.state() == "done"
    assert (outcome.exit_code, outcome.counts) == (1, {"done": 11, "bug": 1})
    (failure,) = outcome.failures
    assert failure.reason.startswith(f"unreadable: {bad.attempts}:1: not a JSON object")
    assert run_study(faults(str(tmp_path)), RunOptions(only="failed")).exit_code == 1
    assert local.retry(manifest) == []
    assert bad.attempts.read_text() == "not json\n"
    # Its summary is no part of the arm's.
    arm = json.loads((tmp_path / "toy/raises/summary.json").read_text())
    assert (arm["seeds"], arm["done"], arm["statistics"]["val_loss"]["final"]) == ([1], 1, 0.5)


def test_a_wider_grid_gives_a_second_choice_to_an_arm_for_which_no_rate_worked(tmp_path: Path) -> None:
    def listed(grid: tuple[float, ...]) -> Manifest:
        declared = tuned(str(tmp_path))
        assert declared.learning_rate is not None
        rule = dataclasses.replace(declared.learning_rate, grid=grid)
        declared = dataclasses.replace(declared, learning_rate=rule)
        return Manifest.freeze(declared, local.resolve(declared))

    manifest = listed((0.0005, 0.002))
    selection = Selection.of(manifest.study, "", (), (), "all")
    assert without_rate(manifest, selection) == {"baseline", "wide"}
    rows = {"baseline": 0.002, "wide": None}
    rates = {arm: {"learning_rate": rate, "grid": [0.0005, 0.002]} for arm, rate in rows.items()}
    manifest.with_rates(rates, local.resolve(tuned(str(tmp_path))))
    assert without_rate(listed((0.0005, 0.002)), selection) == set()
    assert to_come(listed((0.0005, 0.002)), selection) == 0
    assert without_rate(listed((0.0001, 0.0005, 0.002)), selection) == {"wide"}
    assert to_come(listed((0.0001, 0.0005, 0.002)), selection) == 2


def test_those_that_stop_for_a_cancelled_one_are_excused(tmp_path: Path) -> None:
    manifest = frozen(tmp_path, "slow")
    first, second = manifest.runs
    survey = Survey("", 0)
    for run in manifest.runs:
        where = manifest.run_dir(run)
        where.create(manifest.config_of(run))
        where.end_attempt(where.begin_attempt(), "preempted", "SIGTERM at step 3")
    survey.excuse(second)
    assert [survey.look(manifest, run).next for run in (first, second)] == ["nothing", "train"]


def test_a_claim_of_another_host_is_named_while_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = frozen(tmp_path, "slow", baseline0="done")
    claim = manifest.run_dir(manifest.runs[1]).claim
    manifest.run_dir(manifest.runs[1]).create(manifest.config_of(manifest.runs[1]))
    holder = dataclasses.replace(Holder.me(), host="gone")
    claim.write_text(json.dumps(dataclasses.asdict(holder)))
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert run_study(slow(str(tmp_path)), RunOptions()).exit_code == 75
    said = capsys.readouterr().err
    assert f"if a process of another host is gone, its claims expire after {LEASE_S:.0f} s" in said


def test_the_launcher_names_the_columns_of_the_hparams_page_and_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError, match="a worker was started"):
        run_study(tuned(str(tmp_path)), RunOptions())
    (record,) = (tmp_path / "toy").glob("*.hparams_config")
    written = record.read_bytes()
    assert all(word in written for word in (b"model.width", b"optim.learning_rate", b"best/val_loss"))
    assert b"training.steps" not in written  # in which no two arms differ

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(events, "experiment_hparams", full)
    with pytest.raises(AssertionError, match="a worker was started"):
        run_study(tuned(str(tmp_path)), RunOptions())
    assert "lacks its columns: " in capsys.readouterr().err


Histories = Callable[[Path], dict[str, list[str]]]


def test_a_run_whose_process_is_gone_is_closed_and_taken_up(tmp_path: Path, histories: Histories) -> None:
    frozen(tmp_path, "slow", baseline0="running", baseline1="done")
    with pytest.raises(AssertionError, match="a worker was started"):
        run_study(slow(str(tmp_path)), RunOptions())
    assert histories(tmp_path)["baseline 0 0.01"] == ["running", "node_fail"]
