"""What ends a training before its time: signals, exceptions, a full disk; and what does not."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from jaxablate import events, runstore
from jaxablate.analysis import plots
from jaxablate.errors import StorageError
from jaxablate.evaluation import Evaluations
from jaxablate.program import Program, State
from jaxablate.record import Record
from jaxablate.schedule.retries import outlook
from jaxablate.stopping import Stopped
from jaxablate.train import Loop, train
from tests.toy_training import cohort_of, run_dir


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def test_a_signal_during_an_evaluation_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Evaluations.at

    def signalling(self: Evaluations, current: Program, state: State, step: int) -> Any:
        if step == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, current, state, step)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluations, "at", signalling)
        with pytest.raises(Stopped, match="at step 20"):
            train(cohort_of(tmp_path, host__checkpoint_every=39))
    (summary,) = train(cohort_of(tmp_path, host__checkpoint_every=39))
    begun = [
        r["step"] for r in runstore.RunDir(run_dir(tmp_path, summary)).history() if r["state"] == "running"
    ]
    assert begun == [0, 20]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_stops_at_a_step_and_the_run_goes_on_later(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(cohort_of(tmp_path / "whole"))
    log = Loop._log

    def signalling(self: Loop, n: int, *args: Any) -> None:
        if n == 13:
            os.kill(os.getpid(), number)
        log(self, n, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_log", signalling)
        with pytest.raises(Stopped, match=f"{number.name} at step 1[34]"):
            train(cohort_of(tmp_path))
    (where,) = tmp_path.glob("toy/base/*/")
    assert runstore.RunDir(where).state() == "preempted"
    (summary,) = train(cohort_of(tmp_path))
    assert summary["params_digest"] == whole[0]["params_digest"]
    assert (where / "metrics.jsonl").read_bytes() == (
        run_dir(tmp_path / "whole", whole[0]) / "metrics.jsonl"
    ).read_bytes()


def test_an_exception_is_recorded_as_a_bug_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, n: int, *args: Any) -> None:
        raise RuntimeError("a loose wire")

    monkeypatch.setattr(Loop, "_log", broken)
    with pytest.raises(RuntimeError, match="a loose wire"):
        train(cohort_of(tmp_path))
    (where,) = tmp_path.glob("toy/base/*/")
    last = runstore.RunDir(where).history()[-1]
    assert (last["state"], last["reason"]) == ("bug", "RuntimeError: a loose wire")


def broken_for(seed: int, error: Exception, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Makes a method of Record raise for one seed."""
    real = getattr(Record, method)

    def broken(self: Record, *args: Any) -> Any:
        if self.run.seed == seed:
            raise error
        return real(self, *args)

    monkeypatch.setattr(Record, method, broken)


def states(workdir: Path) -> dict[int, list[str]]:
    runs = {int(path.name[4]): runstore.RunDir(path) for path in workdir.glob("toy/base/*/")}
    return {seed: [row["state"] for row in runs[seed].history()] for seed in sorted(runs)}


def test_a_member_that_cannot_be_finished_leaves_those_before_it_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        broken_for(1, OSError(errno.ENOSPC, "No space left on device"), patch, "finish")
        with pytest.raises(StorageError, match="No space left"):
            train(cohort_of(tmp_path, seeds="0,1,2"))
    lost = ["running", "node_fail"]  # no fault of theirs: they go on once there is room
    assert states(tmp_path) == {0: ["running", "done"], 1: lost, 2: lost}
    whole = train(cohort_of(tmp_path / "whole", seeds="0,1,2"))
    again = train(cohort_of(tmp_path, seeds="0,1,2"))
    assert [s["params_digest"] for s in again] == [s["params_digest"] for s in whole]
    assert states(tmp_path) == {
        0: ["running", "done"],
        1: [*lost, "running", "done"],
        2: [*lost, "running", "done"],
    }


def test_a_figure_that_fails_costs_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_for(0, ValueError("no such font"), monkeypatch, "draw")
    with pytest.raises(ValueError, match="no such font"):
        train(cohort_of(tmp_path, seeds="0,1"))
    assert states(tmp_path) == {0: ["running", "done"], 1: ["running", "done"]}
    assert [s["state"] for s in train(cohort_of(tmp_path, seeds="0,1"))] == ["done", "done"]


def test_a_full_disk_under_a_figure_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any, **kw: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plots, "loss_curves", full)
    (summary,) = train(cohort_of(tmp_path))
    assert summary["state"] == "done"
    assert "loss_curves.png: cannot be written: [Errno 28] No space left" in caplog.text
    (run,) = tmp_path.glob("**/seed*/summary.json")
    made = {path.name for path in run.parent.iterdir()}
    assert {"metrics.csv", "metrics.json", "lr_schedule.png"} <= made and "loss_curves.png" not in made


def test_a_second_ctrl_c_leaves_a_run_that_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupting(self: Loop, n: int, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_log", interrupting)
        with pytest.raises(KeyboardInterrupt):
            train(cohort_of(tmp_path))
    assert states(tmp_path) == {0: ["running", "preempted"]}
    assert outlook(runstore.RunDir(next(tmp_path.glob("toy/base/*/"))).history(), 8).next == "train"


def test_hparams_columns_that_cannot_be_written_do_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(events, "experiment_hparams", full)
    (summary,) = train(cohort_of(tmp_path))
    assert summary["state"] == "done"
    assert "lacks its columns" in caplog.text
