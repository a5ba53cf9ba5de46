"""Status: what the run directories say and no more; quickly, and without heavy imports."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxablate import disk
from jaxablate.analysis import results
from jaxablate.analysis.status import Row, Status, status
from jaxablate.claims import Holder
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.study import Run, factorial, switch
from tests.frozen import RULE, freeze, resolved, toy_study, write_run


def runs(manifest: Manifest, arm: str) -> list[Run]:
    return [run for run in manifest.runs if run.arm == arm]


def row(found: Status, arm: str, phase: str = "confirm") -> Row:
    return next(row for row in found.rows if (row.arm, row.phase) == (arm, phase))


def claim(manifest: Manifest, run: Run, **change: object) -> None:
    holder = dataclasses.replace(Holder.me(), **change)
    manifest.run_dir(run).claim.write_bytes(disk.encode_row(dataclasses.asdict(holder)))


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


# --------------------------------------------------------------------------------------- counting


def test_every_run_is_counted_once_in_the_state_it_recorded(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path, seeds=tuple(range(10))))
    states = ["done", "diverged", "oom", "preempted", "timeout", "node_fail", "bug", "cancelled", "running"]
    for run, state in zip(runs(manifest, "wide"), states, strict=False):  # the tenth has not begun
        write_run(manifest, run, state)  # pyright: ignore[reportArgumentType]
    found = status(manifest)
    assert row(found, "wide").counts == {**dict.fromkeys(states, 1), "pending": 1}
    assert row(found, "baseline").counts == {"pending": 10}
    assert sum(found.total.values()) == len(manifest.runs)
    # done, diverged and cancelled leave nothing to do
    assert (row(found, "wide").left, row(found, "baseline").left) == (7, 10)


def test_arms_can_be_chosen(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    assert [r.arm for r in status(manifest, ["noisy", "wide"]).rows] == ["wide", "noisy"]
    with pytest.raises(UserError, match="no arm 'wyde'; did you mean 'wide'"):
        status(manifest, ["wyde"])


def test_phases_are_counted_apart_and_runs_that_wait_for_a_rate_are_foreseen(tmp_path: Path):
    study = toy_study(tmp_path, learning_rate=RULE)
    manifest = freeze(study).with_rates({"wide": {"learning_rate": 0.01}, "noisy": {"learning_rate": None}},
                                        resolved(study))  # fmt: skip
    found = status(manifest)
    assert row(found, "wide", "tuning").counts == {"pending": 4}
    assert row(found, "wide").counts == {"pending": 3}
    assert row(found, "baseline").counts == {"unlisted": 3}
    assert all(r.arm != "noisy" for r in found.rows if r.phase == "confirm")
    assert "no learning rate was stable" in " ".join(found.notes)
    assert "after tuning" in found.table()
    assert "tuning" in found.table()


def test_arms_of_equal_config_are_not_taken_for_each_other(tmp_path: Path):
    same = switch("same", "model", {"model.width": 8})  # the width that the base has: runs with the same ids
    manifest = freeze(toy_study(tmp_path, factors=(same,), arms=factorial((same,)), hypotheses=()))
    assert {run.id for run in runs(manifest, "same")} == {run.id for run in runs(manifest, "baseline")}
    write_run(manifest, runs(manifest, "same")[0], metrics={"val/loss": 1.0})
    assert row(status(manifest), "same").counts == {"done": 1, "pending": 2}
    assert row(status(manifest), "baseline").counts == {"pending": 3}
    found = results.load(manifest)
    assert [run.state for run in found.of("same")] == ["done", "pending", "pending"]
    assert [run.state for run in found.of("baseline")] == ["pending"] * 3


def test_attempts_are_counted(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    write_run(manifest, runs(manifest, "wide")[0], attempts=3)
    write_run(manifest, runs(manifest, "wide")[1])
    assert row(status(manifest), "wide").attempts == 4


# ------------------------------------------------------------------------ who is running, and who is gone


def test_only_a_certainly_dead_holder_makes_a_running_run_gone(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path, seeds=tuple(range(5))))
    mine, elsewhere, dead, no_claim, torn = runs(manifest, "wide")
    for run in (mine, elsewhere, dead, no_claim, torn):
        write_run(manifest, run, "running")
    claim(manifest, mine)
    claim(manifest, elsewhere, host="another-host", pid=1)
    claim(manifest, dead, pid=dead_pid(), ticks=1)
    manifest.run_dir(torn).claim.write_text('{"host": "x"')
    found = status(manifest)
    assert row(found, "wide").counts == {"running": 4, "gone": 1}
    assert "running (its process is gone)" in found.table()
    assert row(found, "wide").left == 5


def test_what_runs_is_named_with_its_machine_and_process(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    for run in runs(manifest, "wide")[:2]:
        write_run(manifest, run, "running")
    write_run(manifest, runs(manifest, "noisy")[0], "running")
    claim(manifest, runs(manifest, "noisy")[0], pid=dead_pid(), ticks=1)  # not this one
    found = status(manifest)
    assert [(one.arm, one.host, one.pid, len(one.runs)) for one in found.working] == [
        ("wide", "elsewhere", 7, 2)
    ]
    assert "running: wide/2 runs (confirm) on elsewhere, process 7" in found.table()


def test_an_expired_lease_of_another_machine_makes_a_run_gone(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    fresh, old, _ = runs(manifest, "wide")
    for run in (fresh, old):
        write_run(manifest, run, "running")
        claim(manifest, run, host="another-host", pid=1)
    os.utime(manifest.run_dir(old).claim, (time.time() - 3600,) * 2)
    assert row(status(manifest), "wide").counts == {"running": 1, "gone": 1, "pending": 1}


def test_a_run_between_two_stages_is_no_failure(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    where = manifest.run_dir(runs(manifest, "wide")[0])
    where.create({})
    where.end_attempt(where.begin_attempt(), "preempted", "stage first is done", paused="first")
    where = manifest.run_dir(runs(manifest, "wide")[1])
    where.create({})
    where.end_attempt(where.begin_attempt(), "preempted", "SIGTERM")
    found = status(manifest)
    assert row(found, "wide").counts == {"paused": 1, "preempted": 1, "pending": 1}
    assert [failure.reason for failure in found.failures] == ["SIGTERM"]
    assert row(found, "wide").left == 3


def test_a_claim_says_nothing_of_a_run_that_ended(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    write_run(manifest, runs(manifest, "wide")[0], "done")
    claim(manifest, runs(manifest, "wide")[0], pid=dead_pid(), ticks=1)
    assert row(status(manifest), "wide").counts == {"done": 1, "pending": 2}


# ------------------------------------------------------------------------------ the end of the history


def test_the_last_row_counts_however_long_the_history_is(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    run, long, torn = runs(manifest, "wide")
    for one in (run, long, torn):
        write_run(manifest, one, "bug", attempts=2)
    where = manifest.run_dir(run)
    retry = disk.encode_row({"attempt": 2, "state": "pending", "reason": "another retry"})
    with where.attempts.open("ab") as file:
        file.write(300 * retry)  # far more than the end that is looked at
    where.mark("cancelled", "enough")
    manifest.run_dir(long).mark("timeout", "x" * 20_000)  # one row longer than that end
    with manifest.run_dir(torn).attempts.open("ab") as file:
        file.write(b'{"attempt": 2, "state": "do')  # a kill in the middle of a row
    assert row(status(manifest), "wide").counts == {"cancelled": 1, "timeout": 1, "bug": 1}


def test_a_row_without_its_newline_is_a_row(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    write_run(manifest, runs(manifest, "wide")[0])
    attempts = manifest.run_dir(runs(manifest, "wide")[0]).attempts
    attempts.write_bytes(attempts.read_bytes().rstrip(b"\n"))
    assert row(status(manifest), "wide").counts["done"] == 1


@pytest.mark.parametrize(
    "damage", [b"rubbish\n", b'{"attempt": 1, "state": "finished"}\n', b'{"state": "done"}\n']
)
def test_a_damaged_history_is_reported_and_stops_nothing(tmp_path: Path, damage: bytes):
    manifest = freeze(toy_study(tmp_path))
    write_run(manifest, runs(manifest, "wide")[0])
    write_run(manifest, runs(manifest, "wide")[1])
    attempts = manifest.run_dir(runs(manifest, "wide")[0]).attempts
    attempts.write_bytes(attempts.read_bytes() + damage)
    found = status(manifest)
    assert row(found, "wide").counts == {"done": 1, "pending": 1, "unreadable": 1}
    assert any(str(attempts) in note for note in found.notes)
    assert str(attempts) in found.table()


def test_an_empty_history_is_a_run_that_has_not_begun(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    write_run(manifest, runs(manifest, "wide")[0])
    manifest.run_dir(runs(manifest, "wide")[0]).attempts.write_bytes(b"")
    assert row(status(manifest), "wide").counts == {"pending": 3}


# ---------------------------------------------------------------------------------- what is left to pay


def test_the_time_left_is_the_arms_median_times_what_is_left(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path, seeds=tuple(range(6))))
    for run, seconds in zip(runs(manifest, "wide"), (60, 120, 600), strict=False):
        write_run(manifest, run, seconds=seconds)
    found = status(manifest)
    assert row(found, "wide").hours == pytest.approx(3 * 120 / 3600)
    assert row(found, "baseline").hours is None  # none of its runs has finished
    assert found.hours == pytest.approx(3 * 120 / 3600)
    assert found.not_estimated == 3 * 6
    assert "estimate" in found.table()
    assert "18 runs of arms that have finished none are not in it" in found.table()


def test_a_cohort_shares_its_time_and_a_run_pays_for_all_its_attempts(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    write_run(manifest, runs(manifest, "wide")[0], seconds=100, members=4, attempts=2)
    assert status(manifest).seconds_per_run["wide"] == pytest.approx(2 * 100 / 4)


def test_an_end_that_another_process_recorded_is_no_time_of_work(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    run = runs(manifest, "wide")[0]
    write_run(manifest, run, seconds=60)
    attempts = manifest.run_dir(run).attempts
    lost = {"attempt": 1, "state": "running", "time": "2025-01-01T00:00:00.000+00:00", "pid": 1}
    found_out = {**lost, "state": "node_fail", "time": "2025-01-09T00:00:00.000+00:00", "pid": 2}
    rows = [json.loads(line) | {"attempt": 2} for line in attempts.read_text().splitlines()]
    attempts.write_bytes(b"".join(map(disk.encode_row, [lost, found_out, *rows])))
    assert status(manifest).seconds_per_run["wide"] == pytest.approx(60)


def test_without_a_finished_run_there_is_no_estimate(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    write_run(manifest, runs(manifest, "wide")[0], "bug")
    write_run(manifest, runs(manifest, "wide")[1], "diverged")  # ended early: no measure of a whole run
    found = status(manifest)
    assert found.hours is None
    assert "no run has finished yet" in found.table()


def test_a_finished_study_has_nothing_left(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    for run in manifest.runs:
        write_run(manifest, run)
    found = status(manifest)
    assert (found.hours, found.not_estimated, sum(r.left for r in found.rows)) == (0.0, 0, 0)


# ---------------------------------------------------------------------------------------- failures


def test_failures_are_listed_with_reason_attempts_and_the_end_of_their_log(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    log = manifest.path / "logs" / "w.log"
    log.parent.mkdir()
    lines = [f"line {i}" for i in range(2000)]
    log.write_text("\n".join([*lines, "\x1b[31mTraceback\x1b[0m", "", "ValueError: [bold]x[/bold]", ""]))
    run = runs(manifest, "wide")[1]
    write_run(manifest, run, "bug", attempts=2, reason="ValueError: [bold]x[/bold]", log="logs/w.log")
    (failure,) = status(manifest).failures
    assert (failure.arm, failure.state, failure.runs, failure.attempts) == ("wide", "bug", (run.id,), 2)
    assert failure.tail[-2:] == ("Traceback", "ValueError: [bold]x[/bold]")
    assert len(failure.tail) == 5
    table = status(manifest).table()
    assert f"wide/{run.id}: bug, 2 attempts: ValueError: [bold]x[/bold]" in table
    assert str(log) in table
    assert "\x1b" not in table


def test_the_log_may_stand_in_the_row_that_began_the_attempt(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    run = runs(manifest, "wide")[0]
    (manifest.path / "w.log").write_text("the end\n")
    where = manifest.run_dir(run)
    where.create({})
    where.begin_attempt(log="w.log")
    where.end_attempt(1, "oom", "out of memory")
    assert status(manifest).failures[0].tail == ("the end",)


def test_failures_for_the_same_reason_are_one(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    for run in runs(manifest, "wide"):
        write_run(manifest, run, "oom", reason="out of memory")
    write_run(manifest, runs(manifest, "noisy")[0], "oom", reason="out of memory")
    assert [(f.arm, len(f.runs)) for f in status(manifest).failures] == [("wide", 3), ("noisy", 1)]
    assert "wide/3 runs: oom: out of memory" in status(manifest).table()


def test_what_can_be_done_about_it_is_said_where_a_phrase_says_it(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    for run, state in zip(runs(manifest, "wide"), ("oom", "diverged", "bug"), strict=True):
        write_run(manifest, run, state, reason="as it is")
    advice = {failure.state: failure.advice for failure in status(manifest).failures}
    assert "--config.training.accumulation=" in advice["oom"] and "16 or 8" in advice["oom"]
    assert advice["diverged"] == "try a lower learning rate" and advice["bug"] == ""
    assert status(manifest).table().count("  advice: ") == 2


def test_a_log_that_is_not_there_or_lies_elsewhere_is_said(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    secret = tmp_path / "secret"
    secret.write_text("secret words")
    one, two, three = runs(manifest, "wide")
    write_run(manifest, one, "bug", reason="a", log="logs/none.log")
    write_run(manifest, two, "bug", reason="b", log="../secret")
    write_run(manifest, three, "bug", reason="c")
    found = status(manifest)
    assert [failure.tail for failure in found.failures] == [(), (), ()]
    assert any("none.log: cannot be read" in note for note in found.notes)
    assert any("lies outside the study" in note for note in found.notes)
    assert "secret words" not in found.table()


# --------------------------------------------------------------------------------------- presentation


def test_the_table_is_plain_text_that_a_pipe_can_take(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    manifest = freeze(toy_study(tmp_path))
    for run in runs(manifest, "wide"):
        write_run(manifest, run)
    lines = status(manifest).table().splitlines()
    assert lines[0].split() == ["toy", str(manifest.path)]
    cells = next(line.split() for line in lines if line.strip().startswith("wide "))
    assert cells[:4] == ["wide", "3", "·", "·"]
    total = next(line.split() for line in lines if line.strip().startswith("total"))
    assert total[1:4] == ["3", "0", "9"]
    assert "…" not in "".join(lines)


def test_json_holds_all_of_it(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    write_run(manifest, runs(manifest, "wide")[0], seconds=90)
    write_run(manifest, runs(manifest, "wide")[1], "oom", reason="out of memory")
    data = status(manifest).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["total"] == {"done": 1, "pending": 10, "oom": 1}
    assert data["left"] == 11
    assert data["seconds_per_run"] == {"wide": 90.0}
    assert data["failures"][0]["reason"] == "out of memory"
    wide = next(arm for arm in data["arms"] if arm["arm"] == "wide")
    assert wide["counts"] == {"done": 1, "pending": 1, "oom": 1}


HEAVY = ("jax", "jaxlib", "numpy", "pandas", "matplotlib", "scipy", "flax", "pyarrow")


def test_status_loads_nothing_heavy(tmp_path: Path, repo: Path, child_env: dict[str, str]):
    manifest = freeze(toy_study(tmp_path))
    write_run(manifest, manifest.runs[0])
    code = (
        "import sys\nfrom jaxablate.manifest import Manifest\nfrom jaxablate.analysis.status import status\n"
        f"print(status(Manifest.load({str(manifest.path)!r})).table())\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=repo, env=child_env, capture_output=True, text=True, check=True
    )
    assert child.stdout.splitlines()[-1] == "[]"
    assert "total" in child.stdout
    assert os.fspath(tmp_path) in child.stdout
