"""VQA as a user meets it: schedules of the document, the guide's names, what an arm changes, what a mistake says."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from jaxablate import config, optim, study
from jaxablate.check import check_study
from jaxablate.config import Cohort, import_task
from jaxablate.errors import UserError
from jaxablate.studies.vqa.config import warmup_steps
from jaxablate.task import Stage, Task
from tests.lines import one_line

EXPERIMENTS = ["exp1_random", "exp2_ordered", "exp3_experts", "exp4_curriculum", "exp5_three_pass"]
GUIDE = {  # arm and the stage to stop behind
    "exp1_random": ("exp1_random", ""),
    "exp2_qwen_reordered": ("exp2_ordered", ""),
    "exp3_stage1": ("exp3_stage1", ""),
    "exp3_stage2": ("exp3_stage2", ""),
    "exp3_stage3": ("exp3_stage3", ""),
    "exp4_stage1": ("exp4_curriculum", "stage_1"),
    "exp4_stage2": ("exp4_curriculum", "stage_2"),
    "exp5_sequential_cot": ("exp5_three_pass", ""),
}
# Learning rates of the document's logs: updates of a run -> update, counted from 0 -> rate.
LOGGED = {
    1680: {49: 4.803921568627e-5, 99: 4.852670349908e-5, 1349: 1.015960712093e-5},
    420: {49: 4.557739557740e-5, 399: 2.579852579853e-6},
    1260: {49: 4.954991816694e-5, 1249: 4.500818330606e-7},
}


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def load(arg: str, **overrides: Any) -> Cohort:
    pairs = {name.replace("__", "."): str(value) for name, value in overrides.items()}
    return config.load(f"configs/vqa.py:{arg}", pairs.items())


def task_of(arg: str, **overrides: Any) -> Task[Any, Any]:
    cohort = load(arg, **overrides)
    return import_task(cohort.base.task)(cohort.base, "cpu")


def rate(stage: Stage, update: int) -> float:
    """That of an update, counted from 0."""
    return stage.optim.learning_rate * float(optim.schedule(stage.optim, stage.steps)(update + 1))


# ----------------------------------------------------------------------------------------- schedules


def test_the_rates_are_those_that_the_document_logged() -> None:
    tasks = [task_of(f"{arm},scale=8b") for arm in ("exp1_random", "exp4_curriculum")]
    found = {stage.steps: stage for task in tasks for stage in task.stages()}
    assert found.keys() == LOGGED.keys()
    assert {steps: stage.optim.warmup_steps for steps, stage in found.items()} == {
        1680: 51,
        420: 13,
        1260: 38,
    }
    for steps, logged in LOGGED.items():
        for update, expected in logged.items():
            assert rate(found[steps], update) == pytest.approx(expected, rel=1e-5, abs=0)
    # With the program's usual count the peak comes an update earlier, and the first rate is not 0.
    stage = found[1680]
    assert rate(stage, 0) == 0
    usual = dataclasses.replace(stage, optim=dataclasses.replace(stage.optim, first_update=1))
    assert rate(usual, 49) == pytest.approx(rate(stage, 50))
    assert rate(usual, 49) != pytest.approx(LOGGED[1680][49], rel=1e-3)


@pytest.mark.parametrize(
    ("questions", "updates"),
    [((1341, 4023, 0), 1680), ((1341, 0, 0), 420), ((0, 4023, 0), 1260), ((14378, 26660, 41), 12840)],
)
@pytest.mark.parametrize("accumulation", [1, 4, 16])
def test_five_epochs_are_as_many_updates_as_the_document_has(
    questions: tuple[int, int, int], updates: int, accumulation: int
) -> None:
    counts = {f"data__questions__stage_{k}": n for k, n in enumerate(questions, 1)}
    run = load("exp1_random,scale=8b", training__accumulation=accumulation, **counts).base
    assert run.training.steps == updates
    micro = run.training.batch_size // accumulation
    assert updates == 5 * math.ceil(math.ceil(sum(questions) / micro) / accumulation)


def test_stages_are_trained_for_their_own_epochs_and_evaluated_after_each() -> None:
    (first, second) = task_of("exp3_experts,scale=8b").stages()
    assert [(s.name, s.steps, s.eval_every, s.trainable) for s in (first, second)] == [
        ("stage_1", 420, 84, ("expert_1/*",)),
        ("stage_2", 1260, 252, ("expert_2/*",)),
    ]
    (more, _) = task_of("exp3_experts,scale=8b", data__evaluations=4).stages()
    assert more.eval_every == 21
    assert load("exp1_random,scale=8b", data__evaluations=4).base.training.eval_every == 84


def test_a_curriculum_says_whether_it_keeps_its_optimiser() -> None:
    for state in ("fresh", "kept"):
        stages = task_of("exp4_curriculum", data__optimizer_state=state).stages()
        assert [stage.optimizer for stage in stages] == ["fresh", state, state]
        assert {stage.trainable for stage in stages} == {("*",)}


@pytest.mark.parametrize(
    ("ratio", "steps", "expected"), [(0.03, 1680, 51), (0.03, 100, 3), (0.03, 700, 21), (0.0, 9, 0)]
)
def test_a_warm_up_is_no_longer_for_a_ratio_that_binary_numbers_lack(
    ratio: float, steps: int, expected: int
) -> None:
    """0.07 * 100 is 7.000000000000001."""
    assert warmup_steps(steps, ratio) == expected
    assert warmup_steps(100, 0.07) == 7
    assert load("exp1_random", data__warmup_ratio=0.07).base.optim.warmup_steps == warmup_steps(845, 0.07)


# ---------------------------------------------------------------------------------------- declaration


@pytest.mark.parametrize(
    "arg", ["", "scale=2b", "scale=8b", "arms=jobs", "scale=8b,arms=jobs", "arms=splits"]
)
def test_an_arm_changes_what_its_factors_say_alone(arg: str) -> None:
    declared = study.load(f"configs/vqa.py:{arg}")
    base = load(f"{declared.baseline},{arg}" if arg else declared.baseline).base
    for arm in declared.arms:
        changed = config.diff(base, load(f"{arm.name},{arg}" if arg else arm.name).base)
        assert set(changed) - {"arm"} == set(declared.changes(declared.set_levels(arm.name)))
    assert not any(factor.name == "order" and factor.kind != "data" for factor in declared.factors)


def test_each_idea_is_asked_of_the_experiment_that_lacks_it_alone() -> None:
    declared = study.load("configs/vqa.py")
    assert [arm.name for arm in declared.arms] == EXPERIMENTS
    for claim in declared.hypotheses:
        levels = [declared.set_levels(arm) for arm in (claim.treatment, claim.control)]
        assert len(levels[0].items() ^ levels[1].items()) == 1, claim.name
    assert [h.name for h in declared.hypotheses if h.primary] == [
        "order_helps", "experts_help", "curriculum_helps", "passes_help",
    ]  # fmt: skip
    assert {h.response for h in declared.hypotheses} == {""}
    assert declared.response().metric == "val/exact"


def test_the_guides_eight_configs_are_arms() -> None:
    for scale in ("tiny", "8b"):
        for name, (arm, until) in GUIDE.items():
            run = load(f"{name},scale={scale}").base
            assert (run.arm, run.host.until) == (arm, until)
    # exp4's two are one run, which the second takes up where the first leaves it.
    first, second = (load(f"{name},scale=8b").base for name in ("exp4_stage1", "exp4_stage2"))
    assert first.fingerprint == second.fingerprint == load("exp4_curriculum,scale=8b").base.fingerprint
    assert len({load(name).base.fingerprint for name in GUIDE}) == 7


def test_before_and_after_are_one_batch_split_otherwise() -> None:
    declared = study.load("configs/vqa.py:scale=8b,arms=splits")
    runs = [load(f"{arm.name},scale=8b,arms=splits").base for arm in declared.arms]
    split = [(run.training.batch_size // run.accumulation, run.accumulation) for run in runs]
    assert split == [(1, 16), (4, 4), (16, 1)]
    assert [run.training.remat for run in runs] == ["block", "none", "none"]
    assert {run.training.batch_size for run in runs} == {16}
    assert {factor.kind for factor in declared.factors} == {"implementation"}


@pytest.mark.slow
def test_every_experiment_ablates_what_it_says() -> None:
    few = {"model.base": "random", "data.scenes": "4", "data.sequences": "3"}
    few |= {f"data.questions.stage_{k}": str(n) for k, n in {1: 4, 2: 11, 3: 4}.items()}
    report = check_study(study.load("configs/vqa.py", few.items()), spec="configs/vqa.py")
    assert not report.failed, report.table(120, verbose=True)
    assert [row.arm for row in report.rows if row.function == "changed"] == [
        "exp3_experts",
        "exp5_three_pass",
    ]


# ----------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("training.steps", "99"), "config.training.steps=99: 5 epochs of 2700 questions, 16 at a time, are 845"),
        (("optim.warmup_steps", "7"), "config.optim.warmup_steps=7: must be 26, 0.03 of the steps; set data.warmup"),
        (("data.questions.stage_2", "-1"), "config.data.questions.stage_2=-1: must be 0 or more"),
        (("data.buckets", "(96, 64)"), "config.data.buckets=(96, 64): must be lengths in rising order"),
        (("data.max_text", "200"), "config.data.buckets=(96, 112, 192): must end with data.max_text=200"),
        (("data.stages", "(1, 2)"), "config.data.stages=(1, 2): has no effect on data.regimen='single'"),
        (("data.stages", "(4,)"), "config.data.stages=(4,): must be some of (1, 2, 3), in rising order"),
        (("data.optimizer_state", "kept"), "has no effect but in data.regimen='curriculum'"),
        (("data.path", "somewhere"), "config.data.path='somewhere': is not read by data.source='synthetic'"),
        (("training.order", "random"), "config.training.order='random': must be 'shuffle' or 'file'"),
        (("model.base", "folder"), "config.model.base='folder': of size 'tiny' must be 'pretrained' on captions"),
        (("model.base_path", "x"), "config.model.base_path='x': is not read with model.base='pretrained'"),
        (("model.lora_rank", "0"), "config.model.lora_rank=0: must be 1 or more"),
        (("model.lora_dropout", "1.0"), "config.model.lora_dropout=1.0: must be in [0, 1)"),
        (("model.attention_impl", "flush"), "config.model.attention_impl='flush'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(override: tuple[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        task_of("exp1_random", **{override[0].replace(".", "__"): override[1]})
    assert message in one_line(caught)


def test_published_sizes_need_a_folder_and_say_so_only_where_they_are_trained() -> None:
    """A plan of them needs neither checkpoint nor data."""
    task = task_of("exp1_random,scale=8b")
    rules = {rule.name: rule for rule in task.rules(task.config) if not rule.holds}
    assert rules.keys() == {"model.base_path", "data.path"}
    assert {rule.kind for rule in rules.values()} == {"host"}
