"""A run that is continued: after a kill, from another cohort, in another stage, under what was changed meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxablate import runstore
from jaxablate.errors import UserError
from jaxablate.program import Program
from jaxablate.record import Record
from jaxablate.stopping import Paused
from jaxablate.train import Loop, train
from tests.toy import ToyTask
from tests.toy_training import Killed, cohort_of, history, killed_at, metrics, run_dir, timeless, with_rates


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


# ------------------------------------------------------------------------------------------- resume


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
        assert timeless(a) == timeless(b)
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
            raise Killed  # member 0 is being saved, the others are not yet
        return take(self, state, m)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "take", dying)
        with pytest.raises(Killed):
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
