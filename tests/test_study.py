"""Declarations: what a study may say, what it must not, how arms are made, and what its plan's hash holds fast."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from jaxablate import study as study_module
from jaxablate.config import new_config
from jaxablate.errors import UserError
from jaxablate.study import (
    Arm,
    Expectation,
    Factor,
    Hypothesis,
    LearningRate,
    Response,
    Study,
    factorial,
    one_factor_out,
    product,
    switch,
    zipped,
)
from tests.toy import ToyData, ToyModel

NORM = Factor("norm", "model", {"layer": {}, "rms": {"model.norm": "rms"}, "none": {"model.norm": "none"}})
WIDE = switch("wide", "model", {"model.width": 16})
DEEP = switch("deep", "model", {"model.depth": 4})
LOSS = Response("val/loss", "min")
AUROC = Response("val/auroc", "max")


def declared(**changes: Any) -> Study:
    fields: dict[str, Any] = {
        "name": "s",
        "factors": (WIDE, DEEP),
        "arms": factorial((WIDE, DEEP)),
        "seeds": (0, 1, 2),
        "responses": (LOSS, AUROC),
    }
    return Study(**(fields | changes))


def base() -> ConfigDict:
    config = new_config(study="other", task="tests.toy:ToyTask", model=ToyModel(), data=ToyData())
    config.host.workdir = "here"
    return config


def names(arms: tuple[Arm, ...]) -> list[str]:
    return [arm.name for arm in arms]


# ------------------------------------------------------------------------------ errors of a declaration

EQUIVALENT = {"name": "h", "claim": "equivalence"}


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: switch("a b", "model", {"x": 1}), "factor 'a b'"),
        (lambda: Factor("f", "model", {"off": {}}), "factor 'f' has 1 level"),
        (lambda: Factor("f", "model", {"off": {"x": 1}, "on": {"x": 2}}), "first level 'off'"),
        (lambda: Factor("f", "model", {"off": {}, "on": {}}), "level 'on' changes nothing"),
        (lambda: Arm("../x"), "arm '../x'"),
        (lambda: Arm(""), "arm ''"),
        (lambda: Response("val/x", "min", name="a/b"), "response 'a/b'"),
        (lambda: Response("val/x", "min", reduce="at"), "needs step=N"),
        (lambda: Response("val/x", "min", reduce="time_to"), "target=X or fraction=F"),
        (lambda: Response("val/x", "min", reduce="time_to", target=1.0, fraction=0.5), "one of the two"),
        (lambda: Response("val/x", "min", reduce="time_to", fraction=0.5), "needs chance=X"),
        (lambda: Hypothesis("h", "superiority"), "treatment='ARM' or factor='NAME'"),
        (lambda: Hypothesis("h", "superiority", treatment="a", factor="b"), "one of the two"),
        (lambda: Hypothesis("h", "superiority", treatment="a", margin=-1.0), "margin=-1.0"),
        (lambda: Hypothesis("h", "equivalence", treatment="a"), "equivalence needs a margin above 0"),
        (lambda: Hypothesis("h", "non_inferiority", factor="a"), "non_inferiority needs a margin above 0"),
        (lambda: LearningRate((), (1,)), "learning_rate.grid=()"),
        (lambda: LearningRate((0.1, 0.01), (1,)), "rising order"),
        (lambda: LearningRate((0.1, 0.1), (1,)), "rising order"),
        (lambda: LearningRate((0.0, 0.1), (1,)), "positive"),
        (lambda: LearningRate((0.1,), ()), "tuning_seeds=()"),
        (lambda: LearningRate((0.1,), (1,), extend=-1), "extend=-1"),
        (lambda: declared(name="a/b"), "name 'a/b'"),
        (lambda: declared(factors=(WIDE, WIDE)), "two factors are named 'wide'"),
        (lambda: declared(arms=(Arm("a"), Arm("a"))), "two arms are named 'a'"),
        (lambda: declared(responses=(LOSS, LOSS)), "two responses are named 'loss'"),
        (lambda: declared(arms=()), "arms is empty"),
        (lambda: declared(seeds=()), "seeds is empty"),
        (lambda: declared(responses=()), "responses is empty"),
        (lambda: declared(seeds=(0, 1, 0)), "one is given twice"),
        (lambda: declared(arms=(Arm("a", {"wyde": "on"}),)), "did you mean 'wide'?"),
        (lambda: declared(arms=(Arm("a", {"wide": "onn"}),)), "did you mean 'on'?"),
        (lambda: declared(arms=(Arm("a", {"wide": "on"}),)), "name the baseline with baseline='ARM'"),
        (lambda: declared(baseline="wyde"), "did you mean 'wide'?"),
        (lambda: declared(groups={"all": ("wide",)}), "group 'all' is always there"),
        (lambda: declared(groups={"g": ("wyde",)}), "did you mean 'wide'?"),
        (lambda: declared(factors=(switch("wide", "model", {"seed": 1}), DEEP)), "factor 'wide' changes 'seed'"),
        (lambda: declared(factors=(switch("wide", "model", {"host.split": 2}), DEEP)), "changes 'host.split'"),
        (
            lambda: declared(factors=(WIDE, switch("deep", "model", {"model.width": 4}))),
            "factors 'wide' and 'deep' both change 'model.width'",
        ),
        (
            lambda: declared(
                factors=(switch("wide", "training", {"optim.learning_rate": 1.0}), DEEP),
                learning_rate=LearningRate((0.1,), (9,)),
            ),
            "which the study's learning_rate rule chooses",
        ),
        (lambda: declared(learning_rate=LearningRate((0.1,), (9, 2))), "seed [2] both tunes"),
        (lambda: declared(learning_rate=LearningRate((0.1,), (9,), response="los")), "did you mean 'loss'?"),
        (lambda: declared(hypotheses=(Hypothesis("h", "superiority", "wyde"),)), "did you mean 'wide'?"),
        (lambda: declared(hypotheses=(Hypothesis("h", "superiority", factor="wyde"),)), "did you mean"),
        (lambda: declared(hypotheses=(Hypothesis("h", "superiority", "wide", response="x"),)), "no response"),
        (lambda: declared(hypotheses=(Hypothesis("h", "superiority", "baseline"),)), "with itself"),
        (
            lambda: declared(
                factors=(NORM,), arms=product(NORM), hypotheses=(Hypothesis("h", "superiority", factor="norm"),)
            ),
            "has 3 levels, not 2",
        ),
    ],
)  # fmt: skip
def test_a_wrong_declaration_is_one_line_that_names_the_fault(make, says):
    with pytest.raises(UserError) as raised:
        make()
    message = str(raised.value)
    assert says in message
    assert message.startswith("study")
    assert "\n" not in message


def test_what_is_right_is_accepted():
    study = declared(
        hypotheses=(Hypothesis("h", "equivalence", "wide", margin=0.1), Hypothesis("g", "superiority", factor="deep")),
        learning_rate=LearningRate((0.01, 0.1), (9, 10), response="auroc"),
        groups={"single": ("wide", "deep")},
    )  # fmt: skip
    assert study.baseline == "baseline"
    assert study.response().name == "loss"


def test_names_of_responses_follow_metric_and_rule():
    assert Response("val/loss", "min").name == "loss"
    assert Response("train/loss", "min").name == "train_loss"
    assert Response("val/x", "max", "best").name == "x_best"
    assert Response("val/x", "max", "at", step=50).name == "x_at_50"
    assert Response("val/x", "max", "time_to", target=1.0).name == "x_time"
    assert (LOSS.better, AUROC.better) == (-1, 1)


# ------------------------------------------------------------------------------------- making arms


def test_a_factorial_holds_every_combination_fewest_changes_first():
    arms = factorial((WIDE, DEEP, NORM))
    assert len(arms) == 2 * 2 * 3
    assert names(arms)[:5] == ["baseline", "wide", "deep", "norm-rms", "norm-none"]
    assert len({tuple(arm.levels.values()) for arm in arms}) == 12
    assert names(arms)[-1] == "wide_deep_norm-none"


def test_arms_take_names_by_what_they_change():
    arms = factorial((WIDE, DEEP), names={frozenset(): "base", frozenset({"wide"}): "w", frozenset({"deep"}): "d",
                                          frozenset({"wide", "deep"}): "full"})  # fmt: skip
    assert names(arms) == ["base", "w", "d", "full"]
    by_function = product(WIDE, names=lambda levels: f"w_{levels['wide']}")
    assert names(by_function) == ["w_off", "w_on"]


def test_one_factor_out_changes_one_factor_at_a_time():
    arms = one_factor_out((WIDE, NORM, Factor("pos", "model", {"rope": {}, "nope": {"model.pos": "none"}})))
    assert names(arms) == ["baseline", "wide", "norm-rms", "norm-none", "nope"]
    assert [len(arm.levels) for arm in arms] == [0, 1, 1, 1, 1]


def test_a_product_keeps_what_its_predicate_keeps():
    arms = product(WIDE, DEEP, where=lambda levels: levels["deep"] == "off" or levels["wide"] == "on")
    assert names(arms) == ["baseline", "wide", "wide_deep"]  # and not deep by itself


def test_zipped_factors_move_together():
    arms = product(zipped(WIDE, DEEP), NORM)
    assert len(arms) == 2 * 3
    assert all((arm.levels["wide"] == "on") == (arm.levels["deep"] == "on") for arm in arms)
    with pytest.raises(UserError, match="equally many levels"):
        zipped(WIDE, NORM)


# ------------------------------------------------------------------------------------- looking up


def test_groups_select_arms_in_order():
    study = declared(groups={"single": ("deep", "wide")})
    assert names(study.select()) == ["baseline", "wide", "deep", "wide_deep"]
    assert names(study.select("all")) == names(study.select())
    assert names(study.select("single")) == ["wide", "deep"]
    assert names(study.select("single", ["deep", "baseline"])) == ["deep"]
    with pytest.raises(UserError, match="no group 'singel'; did you mean 'single'"):
        study.select("singel")
    with pytest.raises(UserError, match="'wide' is an arm: use --arm"):
        study.select("wide")
    with pytest.raises(UserError, match="no arm 'wyde'; did you mean 'wide'"):
        study.select(arms=["wyde"])


def test_levels_and_changes_of_an_arm():
    study = declared()
    assert study.levels("wide") == {"wide": "on", "deep": "off"}
    assert study.set_levels("wide") == {"wide": "on"}
    assert study.set_levels("baseline") == {}
    assert study.changes(study.levels("wide_deep")) == {"model.width": 16, "model.depth": 4}


def test_an_arms_config_differs_from_the_base_in_what_it_declares():
    study = declared(factors=(WIDE,), arms=factorial((WIDE,)), base=base())
    config, plain = study.config("wide").to_dict(), study.config("baseline").to_dict()
    assert (config["study"], config["arm"], tuple(config["seeds"])) == ("s", "wide", (0, 1, 2))
    assert config["model"]["width"] == 16
    plain["model"]["width"], plain["arm"] = 16, "wide"
    assert config == plain
    assert study.base["model"]["width"] == 8  # a copy was changed


def test_a_level_that_names_no_field_is_refused():
    wrong = switch("wide", "model", {"model.widht": 16})
    study = declared(factors=(wrong,), arms=factorial((wrong,)), base=base())
    with pytest.raises(UserError, match=r"did you mean 'model.width'"):
        study.config("wide")


def test_without_a_base_there_is_no_config():
    with pytest.raises(UserError, match="has no base config"):
        declared().config("wide")


# ---------------------------------------------------------------------------------------- the plan

HYPOTHESIS = Hypothesis("h", "non_inferiority", "wide", margin=0.02)


def test_the_plans_hash_changes_with_what_decides_how_results_are_read():
    study = declared(hypotheses=(HYPOTHESIS,), learning_rate=LearningRate((0.1,), (9,)))
    changed = {
        "margin": {"hypotheses": (dataclasses.replace(HYPOTHESIS, margin=0.03),)},
        "claim": {"hypotheses": (dataclasses.replace(HYPOTHESIS, claim="equivalence"),)},
        "primary": {"hypotheses": (dataclasses.replace(HYPOTHESIS, primary=False),)},
        "no hypothesis": {"hypotheses": ()},
        "seeds": {"seeds": (0, 1, 2, 3)},
        "response": {"responses": (AUROC, LOSS)},
        "direction": {"responses": (dataclasses.replace(LOSS, direction="max"), AUROC)},
        "rate rule": {"learning_rate": LearningRate((0.1,), (9,), rule="largest_stable")},
        "arms": {"arms": study.arms[:3]},
        "baseline": {"baseline": "deep"},
        "alpha": {"alpha": 0.01},
    }
    hashes = {what: dataclasses.replace(study, **fields).plan_hash for what, fields in changed.items()}
    assert study.plan_hash not in hashes.values()
    assert len(set(hashes.values())) == len(hashes)


def test_the_plans_hash_does_not_change_with_words_groups_or_base():
    study = declared(hypotheses=(HYPOTHESIS,))
    for fields in (
        {"title": "T"},
        {"groups": {"g": ("wide",)}},
        {"expectations": (Expectation("faster"),)},
        {"base": base()},
    ):
        assert dataclasses.replace(study, **fields).plan_hash == study.plan_hash


def test_a_study_reads_back_as_it_was_written():
    timed = Response("val/auroc", "max", "time_to", fraction=0.9, chance=0.5)
    study = declared(
        factors=(WIDE, DEEP, NORM),
        arms=factorial((WIDE, DEEP, NORM)),
        responses=(LOSS, timed),
        hypotheses=(HYPOTHESIS,),
        learning_rate=LearningRate((0.01, 0.1), (9,)),
        groups={"g": ("wide",)},
        title="T",
        expectations=(Expectation("faster"),),
        base=base(),
    )
    again = Study.from_dict(json.loads(json.dumps(study.to_dict())))
    assert again == study
    assert again.plan_hash == study.plan_hash
    assert again.base is None


def test_a_study_that_was_tampered_with_is_not_read_back():
    values = declared().to_dict()
    with pytest.raises(UserError, match=r"study\.sedes: no such field; did you mean 'seeds'"):
        Study.from_dict({**values, "sedes": (1,)})
    with pytest.raises(UserError, match=r"study\.alpha: missing"):
        Study.from_dict({key: value for key, value in values.items() if key != "alpha"})
    values["responses"] = [{**dataclasses.asdict(LOSS), "direction": "down"}]
    with pytest.raises(UserError, match=r"study\.responses\[0\]\.direction='down'"):
        Study.from_dict(values)


# ---------------------------------------------------------------------------------------- loading

FILE = """
from jaxablate.config import new_config
from jaxablate.study import Response, Study, factorial, switch
from tests.toy import ToyData, ToyModel

WIDE = switch("wide", "model", {"model.width": 16})

def get_study(arg=""):
    base = new_config(study="s", task="tests.toy:ToyTask", model=ToyModel(), data=ToyData())
    return Study("s", (WIDE,), factorial((WIDE,)), (0,), (Response("val/loss", "min"),), BASE)
"""


def test_a_study_file_is_loaded_with_overrides(tmp_path: Path):
    file = tmp_path / "s.py"
    file.write_text(FILE.replace("BASE", "base"))
    study = study_module.load(str(file), [("training.steps", "7"), ("host.workdir", "there")])
    assert study.config("wide").training.steps == 7
    assert study.config("wide").host.workdir == "there"
    with pytest.raises(UserError, match=r"did you mean 'training.steps'"):
        study_module.load(str(file), [("training.stps", "7")])


def test_a_study_file_without_a_base_or_a_study_is_refused(tmp_path: Path):
    file = tmp_path / "s.py"
    file.write_text(FILE.replace("BASE", "None"))
    with pytest.raises(UserError, match="has no base config"):
        study_module.load(str(file))
    file.write_text("def get_study(): return 3")
    with pytest.raises(UserError, match="get_study"):
        study_module.load(str(file))
    with pytest.raises(UserError, match="no such file"):
        study_module.load(str(tmp_path / "none.py"))
