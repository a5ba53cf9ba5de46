"""The loop on a toy task: cohorts, divergence, accumulation, resume, stages, stopping."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxablate import config, data, events, program, runstore, sharding
from jaxablate.analysis import plots
from jaxablate.errors import StorageError, UserError
from jaxablate.program import Program
from jaxablate.record import Record
from jaxablate.schedule.retries import outlook
from jaxablate.stopping import Paused, Stopped
from jaxablate.train import Loop, train
from tests.toy import ToyTask


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def cohort_of(workdir: Path, **overrides: Any) -> config.Cohort:
    """The toy cohort; `mesh` is one device unless given, since most tests are not about meshes."""
    pairs = {"host.workdir": str(workdir), "host.mesh.member": "1", "host.mesh.data": "1"}
    pairs |= {key.replace("__", "."): str(value) for key, value in overrides.items()}
    return config.load("tests/configs/toy.py", pairs.items())


def with_rates(cohort: config.Cohort, *rates: float) -> config.Cohort:
    """A cohort of the first run at several learning rates."""
    base = cohort.base
    runs = [dataclasses.replace(base, optim=dataclasses.replace(base.optim, learning_rate=r)) for r in rates]
    return config.Cohort(tuple(runs))


def run_dir(workdir: Path, summary: dict[str, Any]) -> Path:
    return workdir / summary["experiment_name"] / summary["run_id"]


def metrics(workdir: Path, summary: dict[str, Any]) -> list[dict[str, Any]]:
    return runstore.read_jsonl(run_dir(workdir, summary) / "metrics.jsonl")[0]


# ------------------------------------------------------------------------------------- what is left


def test_a_run_leaves_what_the_design_promises(tmp_path: Path) -> None:
    (summary,) = train(cohort_of(tmp_path))
    where = run_dir(tmp_path, summary)
    left = {path.name.split(".tfevents")[0] for path in where.iterdir()}
    assert left >= {
        "config.json", "provenance.json", "attempts.jsonl", "metrics.jsonl", "perf.jsonl", "summary.json",
        "loss_curves.png", "checkpoints", "events.out",
    }  # fmt: skip
    assert "claim.json" not in left
    best = summary["statistics"]["val_loss"]
    losses = {row["step"]: row["val/loss"] for row in metrics(tmp_path, summary) if "val/loss" in row}
    assert sorted(losses) == [0, 10, 20, 30, 40]
    assert best["best"] == min(losses.values()) == losses[best["best_step"]]
    assert best["best"] < 0.7 * losses[0]
    arm = json.loads((where.parent / "summary.json").read_text())
    assert arm["statistics"]["val_loss"]["best"] == best["best"]
    states = [row["state"] for row in runstore.RunDir(where).history()]
    assert states == ["running", "done"]
    keys = {key for row in runstore.read_jsonl(where / "perf.jsonl")[0] for key in row}
    assert keys >= {
        "perf/steps_per_sec",
        "perf/examples_per_sec",
        "perf/step_ms",
        "perf/compile_sec",
        "perf/peak_bytes",
    }
    kept = sorted(p.name for p in (where / "checkpoints").glob("*.json"))
    assert kept == [f"{s:09d}.json" for s in sorted({30, 35, 40, best["best_step"]})]


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(cohort_of(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json*")}
    assert train(cohort_of(tmp_path)) == first
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json*")} == before
    two = train(cohort_of(tmp_path, seeds="0,1"))  # only the new one
    assert two[0] == first[0]
    assert two[1]["cohort_size"] == 1


# ------------------------------------------------------------------------------------------ cohorts


def test_each_member_gets_what_it_gets_alone(tmp_path: Path) -> None:
    together = train(cohort_of(tmp_path / "together", seeds="0,1,2,3", model__noise=0.1))
    for seed, summary in enumerate(together):
        (alone,) = train(cohort_of(tmp_path / "alone", seeds=seed, model__noise=0.1))
        assert alone["run_id"] == summary["run_id"]
        a, b = metrics(tmp_path / "together", summary), metrics(tmp_path / "alone", alone)
        assert [row["step"] for row in a] == [row["step"] for row in b]
        for row, other in zip(a, b, strict=True):
            # The declared tolerance: batched and single matrix products may round apart.
            np.testing.assert_allclose(list(row.values()), list(other.values()), rtol=2e-5, atol=1e-6)
    assert len({s["params_digest"] for s in together}) == 4


def test_a_member_that_diverges_leaves_the_others_bit_unchanged(tmp_path: Path) -> None:
    calm = train(with_rates(cohort_of(tmp_path / "calm"), 0.01, 0.02, 0.03))
    wild = train(with_rates(cohort_of(tmp_path / "wild"), 0.01, 1e30, 0.03))
    assert [s["state"] for s in wild] == ["done", "diverged", "done"]
    for m in (0, 2):
        assert wild[m]["params_digest"] == calm[m]["params_digest"]
        assert metrics(tmp_path / "wild", wild[m]) == metrics(tmp_path / "calm", calm[m])
    at, last = wild[1]["diverged"]["step"], wild[1]["diverged"]["last_loss"]
    rows = {row["step"]: row for row in metrics(tmp_path / "wild", wild[1]) if "train/loss" in row}
    assert rows[at]["train/loss"] is None
    assert rows[at - 1]["train/loss"] == pytest.approx(last)
    assert max(rows) == at
    assert f"at step {at}" in runstore.RunDir(run_dir(tmp_path / "wild", wild[1])).history()[-1]["reason"]


def test_a_run_that_diverges_alone_ends_early_and_is_not_an_error(tmp_path: Path) -> None:
    (summary,) = train(with_rates(cohort_of(tmp_path), 1e30))
    assert summary["state"] == "diverged"
    assert summary["diverged"]["step"] < 10


# ------------------------------------------------------------------------------------- accumulation


def gradients(accumulation: int, noise: float = 0.0) -> tuple[Any, ...]:
    cohort = config.load("tests/configs/toy.py", [("training.accumulation", str(accumulation))])
    cohort = config.Cohort(
        (dataclasses.replace(cohort.base, model=dataclasses.replace(cohort.base.model, noise=noise)),)
    )
    task = ToyTask(cohort.base, "cpu")
    mesh = sharding.make_mesh(config.MeshConfig(1, 1), 1, 8)
    current = Program(task, cohort, task.stages()[0], mesh)
    state = current.init()
    step = current.compile_step()
    source = task.open(Path())
    batches = data.CohortBatches(source.train, [0], 8, 3)
    for n in range(3):
        state, metric = step(state, current.member, current.put_batch(batches[n]), np.int32(n + 1))
    return jax.device_get((current.take(state, 0), metric))


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_gives_the_update_of_the_whole_batch(accumulation: int, noise: float) -> None:
    """The toy loss couples all examples of the batch, so averaging the losses of micro-batches would fail."""
    (whole, metric), (split, split_metric) = gradients(1, noise), gradients(accumulation, noise)
    for name, value in whole.items():
        np.testing.assert_allclose(split[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(split_metric["train/loss"], metric["train/loss"], rtol=1e-5)
    assert np.abs(whole["collections/average/input"]).max() > 0.1  # the sums really arrive


def test_averaging_micro_batch_losses_would_be_caught() -> None:
    cohort = config.load("tests/configs/toy.py")
    task = ToyTask(cohort.base, "cpu")
    variables = task.init(jax.random.key(0))
    rows = [task.open(Path()).train[i] for i in range(8)]
    batch = {k: np.stack([row[k] for row in rows]) for k in ("x", "y")}

    def loss(part: dict[str, np.ndarray]) -> float:
        return float(
            task.loss(
                variables,
                task.encode(variables, part, jax.random.split(jax.random.key(0), len(part["x"])))[0],
            )[0]
        )

    halves = [loss({k: v[i : i + 4] for k, v in batch.items()}) for i in (0, 4)]
    assert abs(np.mean(halves) - loss(batch)) > 1e-4


# ------------------------------------------------------------------------------------------ batches


def test_batches_depend_on_seed_and_step_alone() -> None:
    source = ToyTask(config.load("tests/configs/toy.py").base, "cpu").open(Path())
    alone = data.CohortBatches(source.train, [3], 8, 30)
    joined = data.CohortBatches(source.train, [0, 3, 3], 8, 100)
    for step in (0, 7, 8, 29):  # the seventh ends the first epoch of 64
        np.testing.assert_array_equal(joined[step]["index"][1], alone[step]["index"][0])
        np.testing.assert_array_equal(joined[step]["index"][1], joined[step]["index"][2])
        assert (joined[step]["index"][0] != joined[step]["index"][1]).any()
    first = np.concatenate([alone[i]["index"][0] for i in range(8)])
    assert sorted(first) == list(range(64))
    second = np.concatenate([alone[i]["index"][0] for i in range(8, 16)])
    assert sorted(second) == list(range(64))
    assert (first != second).any()


def test_epoch_that_does_not_divide_still_shows_each_example_once() -> None:
    drawn = np.concatenate([data.batch_indices(0, step, 7, 10) for step in range(1, 11)])
    for epoch in range(7):
        assert sorted(drawn[epoch * 10 : epoch * 10 + 10]) == list(range(10))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 5])
def test_reading_ahead_changes_no_batch(workers: int, start: int) -> None:
    source = ToyTask(config.load("tests/configs/toy.py").base, "cpu").open(Path())
    batches = data.CohortBatches(source.train, [0, 1], 8, 12)
    read = list(data.read(batches, start, workers))
    assert len(read) == 12 - start
    for i, batch in enumerate(read):
        np.testing.assert_array_equal(batch["index"], batches[start + i]["index"])


# ------------------------------------------------------------------------------------------- resume


class _Killed(BaseException):
    """Stands for a kill: nothing in the program catches it."""


def killed_at(cohort: config.Cohort, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains until a step is logged, and drops everything there."""
    log = Loop._log

    def dying(self: Loop, n: int, *args: Any) -> None:
        log(self, n, *args)
        if n >= step:
            raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_log", dying)
        with pytest.raises(_Killed):
            train(cohort)


@pytest.mark.parametrize("step", [3, 5, 17, 39])
def test_a_killed_run_ends_as_an_undisturbed_one(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"seeds": "0,1", "model__noise": 0.1, "optim__ema_decay": 0.9}
    whole = train(cohort_of(tmp_path / "whole", **options))
    killed_at(cohort_of(tmp_path / "killed", **options), step, monkeypatch)
    again = train(cohort_of(tmp_path / "killed", **options))
    for a, b in zip(whole, again, strict=True):
        assert a["params_digest"] == b["params_digest"]
        files = [
            (run_dir(tmp_path / k, s) / "metrics.jsonl").read_bytes()
            for k, s in (("whole", a), ("killed", b))
        ]
        assert files[0] == files[1]
        assert a["statistics"] == b["statistics"]
        assert a["best_checkpoint"] == b["best_checkpoint"]


def test_noise_depends_on_the_step(tmp_path: Path) -> None:
    quiet, noisy = (train(cohort_of(tmp_path, model__noise=n))[0] for n in (0.0, 0.1))
    assert quiet["params_digest"] != noisy["params_digest"]


def test_a_smaller_cohort_may_continue_what_a_larger_one_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(cohort_of(tmp_path, seeds="0,1"), 20, monkeypatch)
    whole = train(cohort_of(tmp_path / "whole", seeds="1"))
    (one,) = train(cohort_of(tmp_path, seeds="1"))
    np.testing.assert_allclose(
        one["statistics"]["val_loss"]["final"], whole[0]["statistics"]["val_loss"]["final"], rtol=1e-4
    )
    history = runstore.RunDir(run_dir(tmp_path, one)).history()
    assert [(row["state"], row["step"]) for row in history] == [("running", 0), ("running", 15), ("done", 40)]


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(cohort_of(tmp_path / "whole"))
    killed_at(cohort_of(tmp_path), 20, monkeypatch)
    (where,) = tmp_path.glob("toy/base/*/checkpoints")
    newest = max(p for p in where.iterdir() if p.is_dir())
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    (summary,) = train(cohort_of(tmp_path))
    assert summary["params_digest"] == whole[0]["params_digest"]
    begun = [row for row in runstore.RunDir(where.parent).history() if row["state"] == "running"]
    assert begun[1]["step"] == 10
    assert "has other bytes than were written" in " ".join(begun[1]["notes"])
    assert list(where.glob("damaged-*"))


def test_a_seed_that_joins_costs_the_others_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at(cohort_of(tmp_path, seeds="0"), 20, monkeypatch)
    whole = train(cohort_of(tmp_path / "whole", seeds="0"))
    first, second = train(cohort_of(tmp_path, seeds="0,1"))
    assert first["params_digest"] == whole[0]["params_digest"]
    begun = [
        [row["step"] for row in runstore.RunDir(run_dir(tmp_path, s)).history() if row["state"] == "running"]
        for s in (first, second)
    ]
    assert begun == [[0, 15], [0]]


def test_one_kept_checkpoint_is_enough_for_a_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"seeds": "0,1,2", "host__keep_last": 1}
    take = Program.take

    def dying(self: Program, state: Any, m: int) -> Any:
        if m == 1 and int(np.asarray(state.opt_state[1].count)[0]) == 20:
            raise _Killed  # member 0 is being saved, the others are not yet
        return take(self, state, m)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "take", dying)
        with pytest.raises(_Killed):
            train(cohort_of(tmp_path, **options))
    (summary, *_) = train(cohort_of(tmp_path, **options))
    begun = [row["step"] for row in runstore.RunDir(run_dir(tmp_path, summary)).history()][::2]
    assert min(begun[1:]) >= 15


def test_other_data_under_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at(cohort_of(tmp_path), 20, monkeypatch)
    before = (next(tmp_path.glob("toy/base/*/metrics.jsonl"))).read_bytes()
    monkeypatch.setattr("tests.toy.ToySource.fingerprint", "edited")
    with pytest.raises(UserError, match=r"on data toy-64, not of .* on data edited"):
        train(cohort_of(tmp_path))
    assert (next(tmp_path.glob("toy/base/*/metrics.jsonl"))).read_bytes() == before


def test_an_arm_averages_runs_of_one_config_alone(tmp_path: Path) -> None:
    (other,) = train(cohort_of(tmp_path, training__steps=10))
    runs = train(cohort_of(tmp_path, seeds="0,1"))
    arm = json.loads((tmp_path / "toy/base/summary.json").read_text())
    finals = [run["statistics"]["val_loss"]["final"] for run in runs]
    assert arm["statistics"]["val_loss"]["final"] == pytest.approx(np.mean(finals))
    assert arm["statistics"]["val_loss"]["final_sd"] == pytest.approx(np.std(finals, ddof=1))
    assert (arm["seeds"], arm["done"], arm["left_out"]) == ([0, 1], 2, [other["run_id"]])


def test_a_divergence_between_two_logged_steps_is_recorded(tmp_path: Path) -> None:
    cohort = with_rates(cohort_of(tmp_path, host__log_every=10, host__checkpoint_every=5), 1e30)
    (summary,) = train(cohort)
    nulls = [row for row in metrics(tmp_path, summary) if "train/loss" in row and row["train/loss"] is None]
    assert [row["step"] for row in nulls] == [summary["diverged"]["step"]]


def test_no_second_stage_for_a_cohort_that_is_lost(tmp_path: Path) -> None:
    (summary,) = train(with_rates(cohort_of(tmp_path, model__stages="two"), 1e30))
    assert summary["state"] == "diverged"
    assert max(row["step"] for row in metrics(tmp_path, summary)) < 20


def test_an_edited_config_under_a_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    (summary,) = train(cohort_of(tmp_path))
    path = run_dir(tmp_path, summary) / "config.json"
    (path.parent / "summary.json").unlink()
    (path.parent / "attempts.jsonl").unlink()
    path.write_text(path.read_text().replace('"steps": 40', '"steps": 41'))
    with pytest.raises(UserError, match=r"training\.steps: 41 -> 40"):
        train(cohort_of(tmp_path))


def test_another_program_under_a_checkpoint_is_refused_with_the_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(cohort_of(tmp_path), 20, monkeypatch)
    init = ToyTask.init

    def wider(self: ToyTask, rng: jax.Array) -> Any:
        self.net = self.net.clone(width=9)
        return init(self, rng)

    monkeypatch.setattr(ToyTask, "init", wider)
    with pytest.raises(UserError, match=r"saved float32\[8\], now float32\[9\]"):
        train(cohort_of(tmp_path))


def test_a_run_that_is_being_trained_is_refused(tmp_path: Path) -> None:
    cohort = cohort_of(tmp_path)
    with (
        Record(cohort.base, ToyTask.directions, ToyTask.response),
        pytest.raises(UserError, match="claimed by"),
    ):
        train(cohort)


# ------------------------------------------------------------------------------------------- stages


def test_a_second_stage_starts_from_the_first_with_a_new_optimiser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = train(cohort_of(tmp_path / "whole", model__stages="two"))
    rates = {r["step"]: r["train/lr"] for r in metrics(tmp_path / "whole", whole) if "train/lr" in r}
    assert rates[1] == rates[21] < rates[5] == rates[25]
    for step in (12, 20, 33):  # in a stage, at its end, in the next
        workdir = tmp_path / str(step)
        killed_at(cohort_of(workdir, model__stages="two"), step, monkeypatch)
        (again,) = train(cohort_of(workdir, model__stages="two"))
        assert again["params_digest"] == whole["params_digest"]
    (one,) = train(cohort_of(tmp_path / "one"))
    assert one["params_digest"] != whole["params_digest"]


# ----------------------------------------------------------------------------------- until a stage


def history(workdir: Path) -> list[dict[str, Any]]:
    (where,) = workdir.glob("toy/base/*/")
    return runstore.RunDir(where).history()


def test_stages_one_at_a_time_give_the_bits_of_all_at_once(tmp_path: Path) -> None:
    stages: dict[str, Any] = {"model__stages": "two", "model__noise": 0.1, "host__checkpoint_every": 15}
    (whole,) = train(cohort_of(tmp_path / "whole", **stages))
    apart = cohort_of(tmp_path / "apart", **stages)
    with pytest.raises(Paused, match="stage 'first' is done, as asked"):
        train(apart, until="first")
    end = history(tmp_path / "apart")[-1]
    assert (end["state"], end["paused"], end["step"]) == ("preempted", "first", 20)
    with pytest.raises(Paused, match="stage 'first' is done"):  # at once
        train(apart, until="first")
    assert history(tmp_path / "apart")[-1] == end
    (summary,) = train(apart, until="second")  # the last one: to the end
    assert summary["params_digest"] == whole["params_digest"]
    assert history(tmp_path / "apart")[-2]["step"] == 20
    assert (run_dir(tmp_path / "apart", summary) / "metrics.jsonl").read_bytes() == (
        run_dir(tmp_path / "whole", whole) / "metrics.jsonl"
    ).read_bytes()
    assert train(apart, until="first") == [summary]  # finished, so there is nothing to wait for


def test_a_stage_that_does_not_exist_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--until=third: no such stage of this task; valid: first, second$"):
        train(cohort_of(tmp_path, model__stages="two"), until="third")
    assert not list(tmp_path.glob("toy/base/*"))


def test_a_kill_between_a_stage_and_its_record_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is there and nobody has said so: whoever waits for the stage reads it from the attempts."""
    cohort = cohort_of(tmp_path, model__stages="two")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_interrupted", lambda *_, **__: None)
        with pytest.raises(Paused):
            train(cohort, until="first")
    assert history(tmp_path)[-1]["state"] == "running"
    with pytest.raises(Paused):
        train(cohort, until="first")
    assert history(tmp_path)[-1]["paused"] == "first"


def test_a_run_that_was_lost_is_not_kept_waiting(tmp_path: Path) -> None:
    (summary,) = train(with_rates(cohort_of(tmp_path, model__stages="two"), 1e30), until="first")
    assert summary["state"] == "diverged"


# ----------------------------------------------------------------------------------------- stopping


def test_a_signal_during_an_evaluation_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Loop._evaluate

    def signalling(self: Loop, *args: Any) -> list[bool]:
        if self.step == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_evaluate", signalling)
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
    assert "cannot be drawn: [Errno 28] No space left" in caplog.text


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


def test_in_a_frozen_study_what_is_about_several_runs_is_left_to_the_launcher(tmp_path: Path) -> None:
    train(cohort_of(tmp_path / "plain"))
    assert list((tmp_path / "plain/toy").glob("*.hparams_config"))
    assert (tmp_path / "plain/toy/base/summary.json").exists()
    (tmp_path / "frozen/toy").mkdir(parents=True)
    (tmp_path / "frozen/toy/study.json").touch()
    train(cohort_of(tmp_path / "frozen"))
    assert not list((tmp_path / "frozen/toy").glob("*.hparams_config"))
    assert not (tmp_path / "frozen/toy/base/summary.json").exists()


def test_digest_tells_one_bit(tmp_path: Path) -> None:
    a = {"x": np.arange(4.0), "y": np.zeros(2)}
    b = {"y": np.zeros(2), "x": np.arange(4.0)}
    assert program.digest(a) == program.digest(b)
    b["x"][2] = np.nextafter(b["x"][2], 3)
    assert program.digest(a) != program.digest(b)
