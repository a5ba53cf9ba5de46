"""The rules of a Burgers config: every arm of the study holds them, and each mistake breaks its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxablate import config, study
from jaxablate.config import RunConfig
from jaxablate.errors import UserError
from jaxablate.rules import Rule, enforce
from jaxablate.studies.burgers.rules import rules

BURGERS = "configs/burgers.py"
UNET = ("model.core.kind", "pdet_unet")
SEPARATED = ("model.core.attention", "channel_separated")
RANDOM = (("model.encoder.kind", "faithful_random"), ("model.autoencoder.steps", "0"))


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def of(*overrides: tuple[str, str]) -> list[Rule]:
    return list(rules(config.load(BURGERS, overrides).base))


def broken(*overrides: tuple[str, str]) -> list[tuple[str, str]]:
    return [(rule.name, rule.kind) for rule in of(*overrides) if not rule.holds]


@pytest.mark.parametrize(
    "arg", ["scale=tiny", "scale=small", "scale=tiny,arms=faithful", "scale=tiny,encoder=faithful_random"]
)
def test_every_arm_of_the_study_holds_them(arg: str):
    declared = study.load(f"{BURGERS}:{arg}")
    for arm in declared.arms:
        run: RunConfig[Any, Any] = config.resolve(declared.config(arm.name)).base
        assert [str(rule) for rule in rules(run) if not rule.holds] == [], arm.name


def test_without_its_files_the_papers_size_is_only_not_ready_here(tmp_path: Path):
    paper = list(rules(config.load(f"{BURGERS}:scale=paper").base))
    assert [(r.name, r.kind) for r in paper if not r.holds] == [("data.train", "host")]
    enforce(paper)
    given = [("data.train", str(tmp_path))]
    assert all(r.holds for r in rules(config.load(f"{BURGERS}:scale=paper", given).base))


ENFORCED = [
    ("model.encoder.tokens", ("model.encoder.tokens", "33")),
    ("model.encoder.tokens", ("model.encoder.tokens", "0")),
    ("model.encoder.dim", ("model.encoder.dim", "0")),
    ("model.decoder.heads", ("model.decoder.heads", "5")),
    ("model.core.heads", ("model.core.heads", "5")),
    ("model.core.depth", ("model.core.depth", "0")),
    ("model.core.depths", UNET, ("model.core.depths", "()")),
    ("model.core.depths", UNET, ("model.core.depths", "(1, 0)")),
    ("model.encoder.tokens", UNET, ("model.encoder.tokens", "2"), ("model.core.depths", "(1, 1, 1)")),
    ("model.core.group", SEPARATED, ("model.core.group", "12")),
    ("model.core.heads", SEPARATED, ("model.core.heads", "3")),
    ("model.core.drop_path", ("model.core.drop_path", "1.0")),
    ("model.loss.spectral", ("model.loss.spectral", "-0.1")),
    ("model.loss.rollout", ("model.loss.rollout", "0.1"), ("model.loss.rollout_steps", "1")),  # dead
    ("model.autoencoder.steps", ("model.autoencoder.steps", "0")),
    ("model.autoencoder.steps", RANDOM[0], ("model.conditioning.reward", "faithful")),
    ("model.distill.steps", ("model.corrector.steps", "0"), ("model.conditioning.candidates", "0")),
    ("model.conditioning.horizon", ("model.conditioning.horizon", "2"), ("model.conditioning.beam", "1")),
    ("model.conditioning.horizon", ("model.conditioning.horizon", "2"), ("model.conditioning.candidates", "1")),
    ("model.conditioning.horizon", ("model.conditioning.horizon", "3"), ("model.conditioning.max_evaluations", "13")),
    ("model.conditioning.early_stop_margin", ("model.conditioning.early_stop_margin", "0.1")),
    ("model.conditioning.tau", ("model.conditioning.tau", "(0.8, 0.2)")),
    ("model.conditioning.weights", ("model.conditioning.weights", "(0.0, 1.0, 1.0)")),
    ("data.frames", ("data.frames", "49")),
    ("data.viscosities", ("data.viscosities", "(0.1, 0.1)")),
    ("data.viscosities", ("data.viscosities", "(0.1, -0.1)")),
    ("data.train", ("data.train", "burgers.hdf5")),
    ("data.eval_windows", ("data.eval_windows", "255")),
    ("data.seed", ("data.seed", str(2**31 - 1))),  # the held-out trajectories have the next one
]  # fmt: skip

ADVISED = [
    ("optim.learning_rate", ("optim.learning_rate", "0.03")),
    ("optim.weight_decay", ("optim.weight_decay", "0.2")),
    ("optim.clip_norm", ("optim.clip_norm", "0.01")),
    ("model.corrector.learning_rate", ("model.corrector.learning_rate", "0.002")),
    ("model.conditioning.max_evaluations", ("model.conditioning.max_evaluations", "7")),
    ("model.conditioning.candidates", ("model.corrector.steps", "0"), ("model.distill.steps", "0")),
    ("model.conditioning.reward", *RANDOM),
    ("data.time_stride", ("data.time_stride", "11")),
    ("training.steps", ("training.steps", "10")),
    ("training.steps", ("training.steps", "200000")),
]


@pytest.mark.parametrize("case", ENFORCED, ids=lambda case: "-".join([case[-1][0], case[-1][1]]))
def test_a_mistake_breaks_its_own_rule_and_is_never_trained(case: tuple[Any, ...]):
    name, *overrides = case
    assert broken(*overrides) == [(name, "static")]
    run = config.load(BURGERS, overrides).base
    with pytest.raises(UserError, match=rf"^config\.{name}=") as refused:
        config.import_task(run.task)(run, "cpu")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("case", ADVISED, ids=lambda case: "-".join([case[-1][0], case[-1][1]]))
def test_what_the_document_advises_may_be_left_by_a_sweep(case: tuple[Any, ...]):
    name, *overrides = case
    assert broken(*overrides) == [(name, "advice")]
    enforce(of(*overrides))


def test_a_rollout_that_is_not_weighed_has_no_steps_to_hold():
    assert broken(("model.loss.rollout", "0.0"), ("model.loss.rollout_steps", "1")) == []


def test_a_look_ahead_that_is_paid_for_is_fine():
    """Also with the least that leaves a candidate for each of the three best ones, twice."""
    horizon = ("model.conditioning.horizon", "3")
    assert broken(horizon) == []
    assert broken(horizon, ("model.conditioning.early_stop_margin", "0.1")) == []
    deep = (horizon, ("model.conditioning.beam", "2"), ("model.conditioning.candidates", "2"))
    least = 2 + 2 * (2 + 2 * 1)
    assert broken(*deep, ("model.conditioning.max_evaluations", str(least))) == []
    few = ("model.conditioning.max_evaluations", str(least - 1))
    assert broken(*deep, few) == [("model.conditioning.horizon", "static")]


def test_candidates_without_any_evaluation_are_refused():
    """They would be none, and the operator without its corrector would stand for what conditioning gives."""
    found = broken(("model.conditioning.max_evaluations", "0"))
    assert ("model.conditioning.max_evaluations", "static") in found


def test_the_random_encoder_without_stage_zero_is_fine():
    assert broken(*RANDOM, ("model.conditioning.reward", "faithful")) == []
