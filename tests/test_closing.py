"""Closing metrics: once for each member, when its training has ended, with the parameters that it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxablate import evaluation, inputs, runstore, trained
from jaxablate.check import check_study
from jaxablate.config import new_config
from jaxablate.errors import UserError
from jaxablate.evaluation import Evaluations
from jaxablate.program import Program
from jaxablate.record import Record
from jaxablate.stopping import Stopped, StopRequest
from jaxablate.study import Arm, Response, Study, switch
from jaxablate.train import train
from tests.toy import ToyData, ToyModel
from tests.toy_tasks import ClosingTask, cohort_with
from tests.toy_training import Killed, metrics, run_dir, with_rates

STOPPING: dict[str, Any] = {
    "training__early_stop": 2,
    "training__restore": "best",
    "training__eval_every": 4,
    "optim__schedule": "constant",
}
RATES = (0.005, 0.02)  # the second gets worse after a while, and stops


class Trained(NamedTuple):
    workdir: Path
    summaries: list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


@pytest.fixture(scope="module")
def stopped(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A cohort of which one member stops early, and both go back to their best."""
    workdir = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        return Trained(workdir, train(with_rates(cohort_with(ClosingTask, workdir, **STOPPING), *RATES)))


@pytest.fixture(scope="module")
def plain(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run to the end of its steps."""
    workdir = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        return Trained(workdir, train(cohort_with(ClosingTask, workdir)))


def closings(workdir: Path, summary: dict[str, Any]) -> list[tuple[int, float]]:
    return [(r["step"], r["val/test_loss"]) for r in metrics(workdir, summary) if "val/test_loss" in r]


def kept(workdir: Path, summary: dict[str, Any]) -> np.ndarray:
    with np.load(run_dir(workdir, summary) / "predictions.npz", allow_pickle=False) as file:
        return file["square"]


def measured(workdir: Path, summary: dict[str, Any], rate: float, **overrides: Any) -> float:
    """What the checkpoint that the run left gives on the closing batches."""
    run = with_rates(cohort_with(ClosingTask, workdir, **overrides), rate).base
    task, where = ClosingTask(run, "cpu"), runstore.RunDir(run_dir(workdir, summary))
    variables = trained.restore(task, run, where, "final").variables
    closing = task.closing(task.open(workdir))
    return closing.score([task.conclude(variables, batch) for batch in closing.batches])["test_loss"]


def test_a_run_is_measured_once_after_its_last_step(plain: Trained) -> None:
    (summary,) = plain.summaries
    ((step, value),) = closings(plain.workdir, summary)
    assert step == 41 and summary["statistics"]["val_test_loss"]["final"] == value
    assert value == pytest.approx(measured(plain.workdir, summary, 0.01), rel=1e-5)
    square = kept(plain.workdir, summary)  # `keep` is given what `conclude` gave
    assert square.shape == (12,) and np.mean(square) == pytest.approx(value, rel=1e-5)


def test_a_member_is_measured_where_it_stops_with_its_best_parameters(stopped: Trained) -> None:
    ends = [summary["stopped_at"] or 40 for summary in stopped.summaries]
    assert ends[1] < ends[0] == 40
    for summary, end, rate in zip(stopped.summaries, ends, RATES, strict=True):
        ((step, value),) = closings(stopped.workdir, summary)
        assert step == end + 1
        assert value == pytest.approx(measured(stopped.workdir, summary, rate, **STOPPING), rel=1e-5)
        (row,) = [r for r in metrics(stopped.workdir, summary) if r["step"] == end + 1]
        assert {"val/loss", "val/test_loss"} <= row.keys()  # beside the last evaluation


def test_other_parameters_are_measured_otherwise(stopped: Trained, tmp_path: Path) -> None:
    """Of the member that goes back to its best: the last ones score something else."""
    last = {**STOPPING, "training__restore": "last"}
    (summary,) = train(with_rates(cohort_with(ClosingTask, tmp_path, **last), RATES[1]))
    ((step, value),) = closings(tmp_path, summary)
    ((at, best),) = closings(stopped.workdir, stopped.summaries[1])
    assert step == at and value != pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("m", [0, 1])
def test_a_member_in_a_cohort_is_measured_as_alone(m: int, stopped: Trained, tmp_path: Path) -> None:
    (alone,) = train(with_rates(cohort_with(ClosingTask, tmp_path, **STOPPING), RATES[m]))
    ((step, value),) = closings(tmp_path, alone)
    ((at, other),) = closings(stopped.workdir, stopped.summaries[m])
    assert step == at and value == pytest.approx(other, rel=1e-4)


def test_a_run_that_diverged_has_none(tmp_path: Path) -> None:
    done, lost = train(with_rates(cohort_with(ClosingTask, tmp_path), 0.01, 1e30))
    assert lost["state"] == "diverged" and closings(tmp_path, lost) == []
    assert not (run_dir(tmp_path, lost) / "predictions.npz").exists()
    assert len(closings(tmp_path, done)) == 1


def interrupted(kind: type, method: str, cause: type[BaseException], workdir: Path, **overrides: Any) -> Any:
    """Ends a run before it is measured, though all its steps are done; gives the cohort."""
    cohort = cohort_with(ClosingTask, workdir, **overrides)

    def ends(self: Any, *args: Any) -> Any:
        raise cause

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, method, ends)
        with pytest.raises(cause):
            train(cohort)
    assert not list(workdir.rglob("summary.json"))
    return cohort


@pytest.mark.parametrize("restore", ["last", "best"])
def test_a_run_killed_after_its_last_checkpoint_is_measured_when_it_goes_on(
    restore: str, plain: Trained, tmp_path: Path
) -> None:
    cohort = interrupted(Evaluations, "_conclude", Killed, tmp_path, training__restore=restore)
    (summary,) = train(cohort)
    ((step, value),) = closings(tmp_path, summary)
    assert step == 41 and kept(tmp_path, summary).shape == (12,)
    last = runstore.RunDir(run_dir(tmp_path, summary)).history()[-2]
    assert last["step"] == 40  # no step was trained again
    if restore == "last":
        assert metrics(tmp_path, summary) == metrics(plain.workdir, plain.summaries[0])
        assert summary["params_digest"] == plain.summaries[0]["params_digest"]
    assert value == pytest.approx(closings(plain.workdir, plain.summaries[0])[0][1], rel=0.5)


def test_a_signal_while_it_is_measured_stops_it_and_loses_nothing(plain: Trained, tmp_path: Path) -> None:
    due, asked = StopRequest.due, []

    def at_the_end(self: StopRequest) -> str:
        """From the third time on after the last step."""
        asked.append(due(self))
        return "SIGTERM" if len(asked) > 42 else ""

    cohort = cohort_with(ClosingTask, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "due", at_the_end)
        with pytest.raises(Stopped, match="SIGTERM before the closing metrics"):
            train(cohort)
    (summary,) = train(cohort)
    assert metrics(tmp_path, summary) == metrics(plain.workdir, plain.summaries[0])


@pytest.mark.parametrize("how", ["signal", "kill"])
def test_a_signal_while_a_member_that_stopped_early_is_measured_loses_no_step(
    how: str, stopped: Trained, tmp_path: Path
) -> None:
    """Unlike a kill, after which it goes on from its last checkpoint."""
    due, asked, end = StopRequest.due, [], stopped.summaries[1]["stopped_at"]

    def in_the_middle(self: StopRequest) -> str:
        asked.append(due(self))
        return "SIGTERM" if len(asked) > end + 2 else ""

    def killed(*_: Any, **__: Any) -> Any:
        raise Killed

    cohort = with_rates(cohort_with(ClosingTask, tmp_path, **STOPPING, host__checkpoint_every=1000), RATES[1])
    with pytest.MonkeyPatch.context() as patch:
        if how == "signal":
            patch.setattr(StopRequest, "due", in_the_middle)
        else:
            patch.setattr(Evaluations, "_conclude", killed)
        with pytest.raises(Stopped if how == "signal" else Killed):
            train(cohort)
    (summary,) = train(cohort)
    began = [
        row for row in runstore.RunDir(run_dir(tmp_path, summary)).history() if row["state"] == "running"
    ]
    assert began[1]["step"] == {"signal": end, "kill": 0}[how]
    ((step, value),) = closings(tmp_path, summary)
    ((at, other),) = closings(stopped.workdir, stopped.summaries[1])
    assert step == at and value == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("damage", ["none", "another byte"])
def test_what_was_measured_before_a_kill_is_not_measured_again(
    damage: str, stopped: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two members, of which one has stopped; what is damaged is done again."""
    monkeypatch.setattr(evaluation, "WORTH_KEEPING", 0.0)
    asked: list[int] = []

    def dying(self: Program, *args: Any) -> Any:
        asked.append(len(asked))
        if len(asked) == 12 + 8:  # the twelve of the member that stops, and then of the other
            raise Killed
        return conclude(self, *args)

    conclude, cohort = Program.conclude, with_rates(cohort_with(ClosingTask, tmp_path, **STOPPING), *RATES)
    monkeypatch.setattr(Program, "conclude", dying)
    with pytest.raises(Killed):
        train(cohort)
    (where,) = tmp_path.glob("toy/base/*/closing/000000040")
    assert sorted(int(path.name) for path in where.iterdir()) == list(range(7))
    content = (where / "3").read_bytes()
    if damage != "none":
        (where / "3").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    asked[:] = range(100)
    for summary, before in zip(train(cohort), stopped.summaries, strict=True):
        assert metrics(tmp_path, summary) == metrics(stopped.workdir, before)
        assert not (run_dir(tmp_path, summary) / "closing").exists()
    assert len(asked) - 100 == {"none": 5}.get(damage, 6)


def test_what_was_measured_of_steps_that_are_trained_again_is_dropped(tmp_path: Path) -> None:
    record = Record(cohort_with(ClosingTask, tmp_path).base, {}, "val/loss")
    with record:
        for step in (20, 40):
            record.keep_output(step, 0, b"of another day")
        assert [record.output(step, 0) for step in (20, 40, 60)] == [
            b"of another day",
            b"of another day",
            b"",
        ]
        record.begin(20, {})
    assert [path.name for path in record.dir.closing.iterdir()] == ["000000020"]


def test_a_metric_that_hides_another_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClosingTask, "name", "loss")
    with pytest.raises(UserError, match="closing metric val/loss is evaluated during training as well"):
        train(cohort_with(ClosingTask, tmp_path, training__restore="best"))


def test_check_knows_them_and_when_they_are_read(tmp_path: Path) -> None:
    base = new_config(study="toy", task="tests.toy_tasks:ClosingTask", model=ToyModel(), data=ToyData())
    base.training.update(steps=10, batch_size=8, eval_every=5)
    base.host.update(workdir=str(tmp_path), cache=str(tmp_path))

    def said(*responses: Response) -> dict[str, list[str]]:
        wide = switch("wide", "model", {"model.width": 16})
        arms = (Arm("baseline", {}), Arm("wide", {"wide": "on"}))
        study = Study("toy", (wide,), arms, (0,), responses, base=base)
        found = [f for f in check_study(study, arms=["baseline"]).findings if f.check == "response"]
        return {verdict: [f.reason for f in found if f.verdict == verdict] for verdict in ("ok", "fail")}

    known = said(Response("val/loss", "min", chance=0.57), Response("val/test_loss", "min", chance=0.42))
    assert known["ok"] and not known["fail"]
    cheap = said(Response("val/test_loss", "min", chance=0.6))
    assert "the predictor 'zero', which knows nothing, scores 0.41" in cheap["fail"][0]
    early = said(Response("val/test_loss", "min", chance=0.6, reduce="at", step=10))
    assert "is measured when that has ended" in early["fail"][0]
    assert "evaluation gives no val/test_los" in said(Response("val/test_los", "min"))["fail"][0]


def test_an_estimate_times_them(tmp_path: Path) -> None:
    from jaxablate.estimate import memory, places, probe

    cohort = cohort_with(ClosingTask, tmp_path, training__steps=2, host__cache=tmp_path)
    (program,) = memory.programs(cohort, places.present("cpu"))
    program.base = {}
    given = inputs.Inputs.open(program.task, tmp_path)
    assert probe._time_closing(program, program.init(), given) > 0
