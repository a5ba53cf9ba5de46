"""A member that gets no better slows down, stops, and goes back to its best; the others do not notice."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate import config, disk, plateau, runstore, trained
from jaxablate.analysis import results
from jaxablate.check import check_study
from jaxablate.errors import UserError
from jaxablate.evaluation import Evaluations
from jaxablate.plateau import Judged, Policy
from jaxablate.record import Record
from jaxablate.study import Arm, Response, Study, switch
from jaxablate.train import train
from tests.frozen import freeze, toy_study, write_run
from tests.toy import ToySource, ToyTask
from tests.toy_training import Killed, cohort_of, killed_at, metrics, run_dir, timeless, with_rates

# Three rates: good to the end, good for a while, and worse than the untrained model from the start.
RATES = (0.005, 0.02, 1.0)
OPTIONS: dict[str, Any] = {
    "training__early_stop": 2,
    "training__restore": "best",
    "training__eval_every": 4,
    "optim__schedule": "constant",
}


class Trained(NamedTuple):
    workdir: Path
    summaries: list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


@pytest.fixture(scope="module")
def stopped(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A cohort of which two members stop early."""
    workdir = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        return Trained(workdir, train(with_rates(cohort_of(workdir, **OPTIONS), *RATES)))


def responses(workdir: Path, summary: dict[str, Any]) -> list[tuple[int, float]]:
    return [(row["step"], row["val/loss"]) for row in metrics(workdir, summary) if "val/loss" in row]


def returned_to_its_best(workdir: Path, summary: dict[str, Any]) -> bool:
    """Whether the evaluation after the last step gave, to the bit, the best value of those before it."""
    *before, (_, after) = responses(workdir, summary)
    return after == min(value for _, value in before)


# ------------------------------------------------------------------------------------------- stopping


def test_a_member_stops_after_so_many_evaluations_that_are_not_better(stopped: Trained) -> None:
    for summary in stopped.summaries:
        *before, (after, _) = responses(stopped.workdir, summary)
        steps, values = zip(*before, strict=True)
        waits = [i - int(np.argmin(values[: i + 1])) for i in range(len(values))]
        stops = next((step for step, waited in zip(steps, waits, strict=True) if waited >= 2), None)
        assert (summary["stopped_at"], summary["steps"]) == (stops, stops or 40)
        assert steps[-1] == summary["steps"] and after == steps[-1] + 1
        assert summary["restored_from"] == steps[int(np.argmin(values))]
    assert [s["stopped_at"] is None for s in stopped.summaries] == [True, False, False]


def test_what_is_recorded_of_a_member_ends_where_it_stopped(stopped: Trained) -> None:
    for summary in stopped.summaries[1:]:
        where, at = runstore.RunDir(run_dir(stopped.workdir, summary)), summary["stopped_at"]
        rows = metrics(stopped.workdir, summary)
        assert max(row["step"] for row in rows if "train/loss" in row) == at
        assert max(row["step"] for row in disk.read_jsonl(where.perf)[0]) == at
        last = where.history()[-1]
        assert (summary["state"], summary["diverged"]) == ("done", None)
        assert (last["state"], last["step"]) == ("done", at)
        assert last["reason"].startswith("stopped early: 2 evaluations without a better val/loss")
        assert (
            ("back to step 0" in last["reason"]) == ("remark" in summary) == (summary["restored_from"] == 0)
        )


def test_a_member_that_stops_leaves_the_others_bit_unchanged(stopped: Trained, tmp_path: Path) -> None:
    steady = train(with_rates(cohort_of(tmp_path, **OPTIONS), RATES[0], 0.003, 0.004))
    assert [s["stopped_at"] for s in steady] == [None] * 3
    assert steady[0]["params_digest"] == stopped.summaries[0]["params_digest"]
    assert metrics(tmp_path, steady[0]) == metrics(stopped.workdir, stopped.summaries[0])


@pytest.mark.parametrize("m", [0, 1])
def test_a_member_in_a_cohort_ends_as_it_does_alone(m: int, stopped: Trained, tmp_path: Path) -> None:
    (alone,) = train(with_rates(cohort_of(tmp_path, **OPTIONS), RATES[m]))
    together = stopped.summaries[m]
    for key in ("steps", "stopped_at", "restored_from", "final_checkpoint"):
        assert alone[key] == together[key], key
    ours, theirs = metrics(tmp_path, alone), metrics(stopped.workdir, together)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        # The tolerance of a cohort against a run by itself: their matrix products may round apart.
        np.testing.assert_allclose(list(row.values()), list(other.values()), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_on_a_mesh_the_same_members_stop_at_the_same_steps(stopped: Trained, tmp_path: Path) -> None:
    cohort = cohort_of(tmp_path, host__mesh__member=2, host__mesh__data=4, **OPTIONS)
    pair = train(with_rates(cohort, *RATES[:2]))
    for spread, one in zip(pair, stopped.summaries, strict=False):
        assert (spread["stopped_at"], spread["restored_from"]) == (one["stopped_at"], one["restored_from"])
        assert returned_to_its_best(tmp_path, spread)


def test_stages_stop_apart_and_each_begins_from_the_best_of_the_one_before(tmp_path: Path) -> None:
    options = {**OPTIONS, "model__stages": "two", "training__early_stop": 1, "training__eval_every": 2}
    cohort = with_rates(cohort_of(tmp_path, **options), *RATES[1:])
    for summary in train(cohort):
        steps = {row["step"] for row in metrics(tmp_path, summary) if "train/loss" in row}
        assert (
            20 not in steps and 21 in steps
        )  # the first stage ended early, and the second began in its place
        assert summary["final_checkpoint"] == 40 and summary["steps"] == summary["stopped_at"] < 40


# ----------------------------------------------------------------------------------- going back to the best


def test_the_best_parameters_come_back_and_score_what_they_scored(stopped: Trained) -> None:
    assert all(returned_to_its_best(stopped.workdir, summary) for summary in stopped.summaries)
    for summary in stopped.summaries:
        loss = summary["statistics"]["val_loss"]
        assert loss["final"] == loss["best"] and loss["best_step"] == summary["restored_from"]


def test_a_snapshot_that_follows_the_parameters_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    judge = Policy.judge

    def following(self: Policy, *args: Any) -> Judged:
        return dataclasses.replace(judge(self, *args), better=jnp.array(True))

    monkeypatch.setattr(Policy, "judge", following)
    with caplog.at_level(logging.WARNING, "jaxablate.evaluation"):
        (summary,) = train(with_rates(cohort_of(tmp_path, **OPTIONS), RATES[1]))
    assert not returned_to_its_best(tmp_path, summary)
    assert f"restored from step {summary['restored_from']} it scores" in caplog.text


def test_the_last_parameters_stay_if_that_is_asked(tmp_path: Path) -> None:
    (summary,) = train(with_rates(cohort_of(tmp_path, **OPTIONS | {"training__restore": "last"}), RATES[1]))
    assert summary["stopped_at"] is not None and summary["restored_from"] is None
    assert responses(tmp_path, summary)[-1][0] == summary["stopped_at"]
    assert not returned_to_its_best(tmp_path, summary)


def test_without_any_response_it_goes_back_to_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ToySource, "score", lambda self, outputs: {"loss": math.nan})
    cohort = cohort_of(tmp_path, **OPTIONS)
    (summary,) = train(cohort)
    assert (summary["stopped_at"], summary["restored_from"]) == (4, 0)  # the evaluation at step 0 counts
    words = "no evaluation gave a number for val/loss: back to step 0, with which the stage began"
    assert summary["remark"] == words and words in caplog.text
    assert runstore.RunDir(run_dir(tmp_path, summary)).history()[-1]["reason"].endswith(words)
    where = runstore.RunDir(run_dir(tmp_path, summary))
    task = ToyTask(cohort.base, "cpu")
    start = nn.unbox(task.init(jax.random.key(0))["params"])
    final = trained.restore(task, cohort.base, where, "final").variables["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), start, final)


IN_TWO = {**OPTIONS, "model__stages": "two"}


def test_a_stage_that_makes_it_worse_gives_back_what_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both stages do, at this rate; also of a run that is killed in the second one."""
    cohort = with_rates(cohort_of(tmp_path / "whole", **IN_TWO), RATES[2])
    with caplog.at_level(logging.WARNING, "jaxablate.record"):
        (summary,) = train(cohort)
    assert summary["restored_from"] == 20 and "back to step 20" in summary["remark"]
    assert caplog.text.count("no evaluation was better than val/loss=") == 2  # of each stage
    rows = responses(tmp_path / "whole", summary)
    assert [step for step, _ in rows] == [0, 4, 8, 24, 28, 29]  # each stops after two that are not better
    assert rows[-1][1] == rows[0][1]  # what it was before it was trained

    killed = with_rates(cohort_of(tmp_path / "killed", **IN_TWO), RATES[2])
    killed_at(killed, 27, monkeypatch)
    (again,) = train(killed)
    assert (again["params_digest"], again["remark"]) == (summary["params_digest"], summary["remark"])
    assert metrics(tmp_path / "killed", again) == metrics(tmp_path / "whole", summary)


def test_a_stage_that_makes_it_better_has_nothing_to_remark(tmp_path: Path) -> None:
    (summary,) = train(with_rates(cohort_of(tmp_path, **IN_TWO), RATES[0]))
    assert summary["restored_from"] > 20 and "remark" not in summary


def test_the_final_checkpoint_of_a_stopped_member_has_its_best_parameters(
    stopped: Trained, tmp_path: Path
) -> None:
    run = with_rates(cohort_of(stopped.workdir, **OPTIONS), *RATES).runs[1]
    where = runstore.RunDir(run_dir(stopped.workdir, stopped.summaries[1]))
    task = ToyTask(run, "cpu")
    final = trained.restore(task, run, where, "final")
    assert trained.restore(task, run, where, "best").step == final.step == 40

    # A run that keeps its last parameters has a checkpoint of the best ones, which must be the same.
    last = with_rates(cohort_of(tmp_path, **OPTIONS | {"training__restore": "last"}), RATES[1]).runs[0]
    (summary,) = train(config.Cohort((last,)))
    there = runstore.RunDir(run_dir(tmp_path, summary))
    best, end = (trained.restore(task, last, there, which) for which in ("best", "final"))
    assert best.step == stopped.summaries[1]["restored_from"] < end.step

    def same(one: trained.Trained, other: trained.Trained) -> bool:
        close = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5), one.variables, other.variables)
        return all(jax.tree.leaves(close))

    assert same(final, best) and not same(final, end)


def test_a_response_that_is_not_scored_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToySource, "score", lambda self, outputs: {"error": 1.0})
    with pytest.raises(UserError, match=r"config\.training: early_stop.* go by val/loss.*\(error\)"):
        train(cohort_of(tmp_path, **OPTIONS))


# ------------------------------------------------------------------------------------------- resuming

SLOWING = {
    **OPTIONS,
    "optim__plateau_factor": 0.5,
    "optim__plateau_patience": 0,
    "optim__ema_decay": 0.5,
    "host__checkpoint_every": 4,
}


@pytest.fixture(scope="module")
def undisturbed(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    workdir = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        return Trained(workdir, train(with_rates(cohort_of(workdir, **SLOWING), *RATES[:2])))


def ends_as(undisturbed: Trained, workdir: Path) -> None:
    again = train(with_rates(cohort_of(workdir, **SLOWING), *RATES[:2]))
    for a, b in zip(undisturbed.summaries, again, strict=True):
        whole, resumed = ((run_dir(*x) / "metrics.jsonl").read_bytes()
                          for x in ((undisturbed.workdir, a), (workdir, b)))  # fmt: skip
        assert resumed == whole
        keys = (
            "params_digest",
            "steps",
            "stopped_at",
            "restored_from",
            "final_checkpoint",
            "best_checkpoint",
        )
        assert {key: a[key] for key in keys} == {key: b[key] for key in keys}
        assert timeless(a) == timeless(b)


@pytest.mark.parametrize("step", [23, 26, 39])
def test_a_killed_run_decides_as_an_undisturbed_one(
    step: int, undisturbed: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that goes on from the very step after which a member stopped, which has a row after it."""
    assert undisturbed.summaries[1]["stopped_at"] == 24
    killed_at(with_rates(cohort_of(tmp_path, **SLOWING), *RATES[:2]), step, monkeypatch)
    ends_as(undisturbed, tmp_path)


@pytest.mark.parametrize("where", [(Evaluations, "conclude"), (Record, "done")])
def test_a_run_killed_between_its_end_and_its_summary_evaluates_its_best_again(
    where: tuple[type, str], undisturbed: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its last step is saved already, or its best was evaluated and not yet written down."""
    kind, name = where
    method = getattr(kind, name)

    def dying(self: Any, *args: Any) -> Any:
        if name == "conclude" and args[2] < 40:
            return method(self, *args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(kind, name, dying)
        with pytest.raises(Killed):
            train(with_rates(cohort_of(tmp_path, **SLOWING), *RATES[:2]))
    ends_as(undisturbed, tmp_path)


# ------------------------------------------------------------------------------------------- the rate


class ReduceLROnPlateau:
    """What torch documents of its scheduler: relative threshold 1e-4, no cooldown, no least rate; in float64."""

    def __init__(self, mode: str, factor: float, patience: int):
        self.mode, self.factor, self.patience, self.threshold = mode, factor, patience, 1e-4
        self.best, self.bad, self.share = -math.inf if mode == "max" else math.inf, 0, 1.0

    def step(self, value: float) -> float:
        if self.mode == "max":
            better = value > self.best * (1 + self.threshold)
        else:
            better = value < self.best * (1 - self.threshold)
        self.best, self.bad = (value, 0) if better else (self.best, self.bad + 1)
        if self.bad > self.patience:
            self.share, self.bad = self.share * self.factor, 0
        return self.share


def shares(policy: Policy, values: Sequence[float]) -> list[float]:
    """What is left of the rate after each evaluation, the first of which is of step 1."""
    control, judge = policy.start({}), jax.jit(policy.judge)
    found = []
    for n, value in enumerate(values, start=1):
        control = judge(control, jnp.float32(value), jnp.int32(n)).control
        found.append(float(control.share))
    return found


@pytest.mark.parametrize(("direction", "patience"), [("max", 10), ("min", 3)])
def test_the_rate_falls_where_torch_lets_it_fall(direction: Any, patience: int) -> None:
    policy = Policy(direction, 0, "last", 0.5, patience, 0, 1000)
    sign = 1 if direction == "max" else -1
    rng = np.random.default_rng(patience)
    climb = np.minimum(np.arange(120) * 2e-5, 1e-3)  # steps of less than the threshold
    values = 0.7 + sign * (climb + rng.choice([0.0, 2e-3, -2e-3, 5e-3], size=120, p=[0.6, 0.1, 0.25, 0.05]))
    reference = ReduceLROnPlateau(direction, 0.5, patience)
    expected = [reference.step(float(value)) for value in values]
    assert expected[-1] < 0.25
    assert shares(policy, values.tolist()) == expected
    patient = ReduceLROnPlateau(direction, 0.5, patience + 1)
    assert [patient.step(float(value)) for value in values] != expected


def test_by_hand_patience_is_exceeded_and_not_reached() -> None:
    policy = Policy("max", 0, "last", 0.5, 2, 0, 1000)
    assert shares(policy, [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]) == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]
    assert shares(policy, [0.5, 0.5, 0.5, 0.50004, 0.6, 0.5, 0.5]) == [1, 1, 1, 0.5, 0.5, 0.5, 0.5]
    assert shares(policy, [0.5, math.nan, math.nan, math.nan]) == [1, 1, 1, 0.5]
    assert shares(policy, [0.7, 0.70002, 0.70004, 0.70006]) == [1, 1, 1, 0.5]  # better, and not clearly
    assert shares(policy, [0.7, 0.7001, 0.7002, 0.7003]) == [1, 1, 1, 1]
    assert shares(policy, [-0.5, -0.49, -0.48, -0.47]) == [1, 1, 1, 1]  # negative ones improve too
    for first in (0, 20):  # of this stage
        policy = Policy("max", 0, "last", 0.5, 2, first, 1000)
        untrained = policy.judge(policy.start({}), jnp.float32(0.9), jnp.int32(first)).control
        assert math.isnan(float(untrained.reference)) and float(untrained.best) == pytest.approx(0.9)


def test_by_hand_only_a_better_one_is_kept_and_only_an_end_brings_it_back() -> None:
    values = [0.5, 0.5, 0.6, math.nan, 0.4, 0.7]
    for early_stop, ends in ((2, [5, 6]), (4, [6])):  # the last step is an end by itself
        policy, kept, back = Policy("max", early_stop, "best", 1.0, 10, 0, 6), [], []
        control = policy.start({})
        for n, value in enumerate(values, start=1):
            judged = policy.judge(control, jnp.float32(value), jnp.int32(n))
            control = judged.control
            kept += [n] * bool(judged.better)
            back += [n] * bool(judged.ends)
        assert (kept, back) == ([1, 3, 6], ends)


def test_the_recorded_rate_is_the_one_that_is_left(undisturbed: Trained) -> None:
    """With no patience every evaluation of a trained model that is not clearly better halves the rate."""
    for rate, summary in zip(RATES, undisturbed.summaries, strict=False):
        rows = metrics(undisturbed.workdir, summary)
        reference = ReduceLROnPlateau("min", 0.5, 0)
        after = {
            row["step"]: reference.step(row["val/loss"]) for row in rows if "val/loss" in row and row["step"]
        }
        for row in (row for row in rows if "train/lr" in row and row["step"] > 5):  # after the warm-up
            known = [share for step, share in after.items() if step < row["step"]]
            assert row["train/lr"] == pytest.approx(rate * known[-1], rel=1e-6)
        falls = [share for step, share in after.items() if step < summary["steps"]]
        assert (min(falls) < 1) == (summary["stopped_at"] is not None)


# --------------------------------------------------------------------------- where it is not asked for


def test_runs_without_it_stay_what_they_were() -> None:
    """Identities that were recorded before there were such fields, and what a config was recorded as."""
    base = config.load("tests/configs/toy.py").base
    assert base.fingerprint == "bf056999aecc"
    kept = base.to_dict()
    assert not {name for section, later in config.LATER.items() for name in later if name in kept[section]}
    assert config.from_dict(kept, base.host) == base
    assert base.complete()["training"]["early_stop"] == 0
    state = ToyTask(base, "cpu")
    assert plateau.Policy.of(state, state.stages()[0], 0) is None
    for path, value in (
        ("training.early_stop", "3"),
        ("training.restore", "best"),
        ("optim.plateau_factor", "0.5"),
        ("optim.plateau_patience", "3"),
    ):
        other = config.load("tests/configs/toy.py", [(path, value)]).base
        assert other.fingerprint != base.fingerprint, path
        assert config.from_dict(json.loads(json.dumps(other.to_dict())), other.host) == other
        assert list(config.diff(base, other)) == [path]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("training.early_stop", "-1", "0 or more"),
        ("training.restore", "first", "valid: best, last"),
        ("optim.plateau_factor", "0", r"in \(0, 1\]"),
        ("optim.plateau_patience", "-1", "0 or more"),
    ],
)
def test_a_setting_that_means_nothing_is_one_line(path: str, value: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        config.load("tests/configs/toy.py", [(path, value)])
    assert path in str(raised.value) and "\n" not in str(raised.value)


def test_advice_says_when_it_could_never_act() -> None:
    base = config.load("tests/configs/toy.py").base  # evaluates every 10 of 40 steps
    for stops, holds in ((3, True), (4, False)):
        rules = dataclasses.replace(base.training, early_stop=stops).rules()
        assert [r.holds for r in rules if r.name == "training.early_stop" and r.kind == "advice"] == [holds]
    for patience, holds in ((2, True), (3, False)):
        optim = dataclasses.replace(base.optim, plateau_factor=0.5, plateau_patience=patience)
        found = [
            r for r in dataclasses.replace(base, optim=optim).rules() if r.name == "optim.plateau_patience"
        ]
        assert [rule.holds for rule in found] == [holds]


# ------------------------------------------------------------------------------- what reads the results


def test_a_check_takes_it_for_training_and_reports_one_that_never_acts(tmp_path: Path) -> None:
    base = toy_study(tmp_path).base
    assert base is not None
    base.training.steps, base.training.eval_every = 40, 10
    factors = (
        switch("stops", "training", {"training.early_stop": 2}),
        switch("never", "training", {"training.early_stop": 9}),
    )
    arms = (Arm("baseline", {}), Arm("stops", {"stops": "on"}), Arm("never", {"never": "on"}))
    study = Study("toy", factors, arms, (0,), (Response("val/loss", "min"),), base=base)
    found = {f.arm: f for f in check_study(study).findings if f.check == "function"}
    assert found["stops"].verdict == "ok" and "how a run ends" in found["stops"].reason
    assert found["never"].verdict == "fail" and "has no effect" in found["never"].reason


def test_results_take_a_stopped_run_for_a_finished_one(tmp_path: Path) -> None:
    manifest = freeze(toy_study(tmp_path, responses=(Response("val/loss", "min", reduce="at", step=1500),)))
    first, second = [run for run in manifest.runs if run.arm == "baseline"][:2]
    for run in (first, second):
        write_run(manifest, run, metrics={"val/loss": 0.5})
    path = manifest.run_dir(first).summary
    path.write_text(json.dumps({**json.loads(path.read_text()), "stopped_at": 1000}))
    values = results.load(manifest).values("baseline", "loss_at_1500")
    assert values == {first.seed: 0.5}  # what it ended with is what it has there; the other was not evaluated
