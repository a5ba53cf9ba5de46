"""VQA as a task: how a batch is split, in which order questions come, what a stage starts from, who is asked what."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate import config, sharding
from jaxablate.config import Cohort, import_task
from jaxablate.data import CohortBatches
from jaxablate.decoding import Continued
from jaxablate.errors import UserError
from jaxablate.inputs import abstract_base, load_base, put_base
from jaxablate.main import main
from jaxablate.program import Program
from jaxablate.studies.vqa.examination import TOO_LONG, Examination
from jaxablate.studies.vqa.task import VqaTask, _routed
from jaxablate.task import Stage
from jaxablate.trees import digest, flat
from tests.lines import one_line
from tests.studies.vqa.few import FEW


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def load(arg: str = "exp1_random", **overrides: Any) -> Cohort:
    pairs = FEW | {name.replace("__", "."): str(value) for name, value in overrides.items()}
    return config.load(f"configs/vqa.py:{arg}", pairs.items())


def task_of(arg: str = "exp1_random", **overrides: Any) -> VqaTask:
    cohort = load(arg, **overrides)
    task: VqaTask = import_task(cohort.base.task)(cohort.base, "cpu")
    return task


def program_of(
    task: VqaTask, cohort: Cohort, cache: Path, stage: Stage | None = None, first: int = 0
) -> Program:
    """A stage of the task, the first one if none is given, on one device, with its base there."""
    mesh = sharding.make_mesh(cohort.base.host.mesh, 1, 16)
    base = put_base(load_base(task, cache), abstract_base(task, mesh))
    return Program(task, cohort, stage or task.stages()[0], mesh, first, base=base)


# ------------------------------------------------------------------------------------------ the loss


def test_the_loss_is_of_all_tokens_and_not_the_mean_of_means() -> None:
    """Answers of one and of three tokens, with losses [2] and [1, 1, 1]."""
    nll, count = jnp.array([2.0, 3.0]), jnp.array([1, 3])
    loss, _ = task_of().loss({}, {"nll": nll, "count": count})
    assert float(loss) == 1.25
    assert float(jnp.mean(nll / count)) == 1.5


@functools.cache
def updated(accumulation: int, remat: str, cache: Path) -> tuple[dict[str, np.ndarray], np.ndarray, str, str]:
    """Adapters after an update of 16 questions at the document's rate, and its gradient by the optimiser's mean.

    Then digests of the base before and after it.
    """
    split = {"training__accumulation": accumulation, "training__remat": remat, "model__lora_dropout": 0.0}
    split["optim__learning_rate"] = 5e-5
    cohort = load(**split)
    task = task_of(**split)
    here = program_of(task, cohort, cache)
    source = task.open(cache)
    before = digest(flat(jax.device_get(here.base)))
    batch = task.fit(CohortBatches(source.train, [0], 16, 1)[0])
    placed = here.put_batch(batch)
    start = here.init()
    moved = nudged(here, start)
    # The first update has no rate: this is the second.
    state, _ = here.compile_step(placed)(moved, here.member, placed, np.int32(2))
    taken = {k: np.asarray(v) for k, v in here.take(state, 0).items()}
    found = {k: v for k, v in taken.items() if k.startswith("params/")}
    mean = np.concatenate([v.ravel() for k, v in taken.items() if "/mu/" in k])
    return found, mean, before, digest(flat(jax.device_get(here.base)))


def nudged(here: Program, state: Any) -> Any:
    """The state with other adapters than fresh ones, whose B, being zero, lets no gradient reach A."""
    taken = here.take(state, 0)
    for name in taken:
        if name.startswith("params/"):
            noise = np.random.default_rng(len(name)).normal(0, 0.05, taken[name].shape)
            taken[name] = taken[name] + jnp.asarray(noise, jnp.float32)
    return here.stack([taken])


@pytest.mark.slow
def test_splits_of_a_batch_give_the_same_update_and_leave_the_base_alone(cache: Path) -> None:
    whole, gradient, *bases = updated(1, "none", cache)
    assert gradient.size == 4096
    for accumulation, remat in ((4, "none"), (16, "block")):
        split, other, *others = updated(accumulation, remat, cache)
        assert max(np.abs(whole[name] - split[name]).max() for name in whole) < 1e-6
        # Where a gradient is next to nothing Adam magnifies its rounding; the gradient itself is the sharper test.
        assert np.abs(gradient - other).max() < 1e-5 * np.abs(gradient).max()
        bases += others
    assert len(set(bases)) == 1
    moved = {
        name for name, value in whole.items() if name.endswith("lora_b/kernel") and np.abs(value).max() > 0
    }
    assert len(moved) == 8
    assert sum(value.size for value in whole.values()) == 4096


def test_a_batch_is_cut_to_its_bucket_and_no_target_is_lost(cache: Path) -> None:
    task = task_of()
    batch = CohortBatches(task.open(cache).train, [0, 1], 4, 1)[0]
    cut = task.fit(batch)
    assert cut["tokens"].shape == cut["targets"].shape == (2, 4, 36 + 112)
    assert (cut["targets"] >= 0).sum() == (batch["targets"] >= 0).sum() > 0
    shorter = {**batch, "targets": np.where(np.arange(228) < 36 + 90, batch["targets"], -100)}
    assert task.fit(shorter)["tokens"].shape == (2, 4, 36 + 96)
    for key in ("patches", "grids", "stage", "row"):
        assert cut[key] is batch[key]


# ------------------------------------------------------------------------------------ order and stages


def rows(arg: str, seed: int, cache: Path) -> list[int]:
    """The training questions of the first epoch, by their number."""
    cohort = load(arg, training__batch_size=19)
    source = task_of(arg, training__batch_size=19).open(cache)
    order = cohort.base.training.order
    return CohortBatches(source.train, [seed], 19, 1, order)[0]["row"][0].tolist()


def test_the_ordered_experiment_sees_the_stages_one_after_another_and_the_random_one_does_not(
    cache: Path,
) -> None:
    ordered = rows("exp2_ordered", 0, cache)
    assert ordered == sorted(ordered) == rows("exp2_ordered", 1, cache)
    stage = task_of().open(cache).rows["train"].stage
    assert list(stage[ordered]) == sorted(stage)
    shuffled = rows("exp1_random", 0, cache)
    assert sorted(shuffled) == ordered
    assert shuffled != ordered
    assert shuffled != rows("exp1_random", 1, cache)


def test_a_stage_trains_and_is_evaluated_on_its_own_questions_from_the_first_one(cache: Path) -> None:
    task = task_of("exp4_curriculum")
    source = task.open(cache)
    for stage, (number, count) in zip(task.stages(), {1: 4, 2: 11, 3: 4}.items(), strict=True):
        own = task.during(stage).data_of_stage(source)
        assert (stage.name, len(own.train)) == (f"stage_{number}", count)
        assert {int(batch["stage"][0]) for batch in own.evaluation} == {number}
        batch = CohortBatches(own.train, [0], count, 1, "file")[0]
        assert batch["index"][0].tolist() == [*range(count)]  # by which `check` sees the order
        first = batch["row"][0]
        assert list(first) == sorted(first)
        assert first[0] == source.rows["train"].row[source.rows["train"].stage == number][0]


@pytest.mark.slow
def test_the_second_stage_of_a_curriculum_starts_from_the_bits_of_the_first_and_experts_do_not(
    cache: Path,
) -> None:
    for arg, name in (("exp4_curriculum", ""), ("exp3_experts", "expert_2/")):
        cohort, task = load(arg), task_of(arg)
        one, two = task.stages()[:2]
        first = program_of(task, cohort, cache, one)
        state = nudged(first, first.init())
        ended = params(first, state)
        second = program_of(task, cohort, cache, two, one.steps)
        begun = params(second, second.carry(state))
        assert ended.keys() == begun.keys()
        assert all(np.array_equal(ended[key], begun[key]) for key in ended)
        trained = {key for key in begun if two.trains(key.removeprefix("params/"))}
        assert trained == {key for key in begun if key.startswith(f"params/{name}")}
    fresh = params(first, first.init())
    experts = [{k.split("/", 2)[2]: v for k, v in fresh.items() if f"/expert_{n}/" in k} for n in (1, 2, 3)]
    alone = flat(nn.unbox(task_of().init(jax.random.key(0))["params"]))
    for expert in experts:
        assert all(np.array_equal(expert[name], alone[name]) for name in alone)


def params(here: Program, state: Any) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in here.take(state, 0).items() if k.startswith("params/")}


# ---------------------------------------------------------------------------------------- the answers


def test_the_expert_of_a_question_is_that_of_its_stage() -> None:
    experts = {f"expert_{k}": {"w": jnp.full(2, float(k))} for k in (1, 3)}
    for stage in (1, 3):
        assert jax.jit(_routed)(experts, jnp.int32(stage))["w"].tolist() == [stage, stage]


def asked(cache: Path, arg: str = "exp1_random", **overrides: Any) -> Examination:
    task = task_of(arg, **overrides)
    return task._examination(task.open(cache))


def said(exam: Examination, texts: dict[int, str]) -> list[dict[str, Continued]]:
    """Outputs of a model that says these texts to these questions, and nothing to the others."""
    found = []
    for batch in exam.batches:
        tokens = np.zeros((len(batch["row"]), exam.limit), np.int32)
        lengths = np.zeros(len(batch["row"]), np.int32)
        for n, number in enumerate(batch["row"].tolist()):
            ids = exam.source.language.text(texts.get(number, ""))
            tokens[n, : len(ids)], lengths[n] = ids, len(ids)
        given: Any = Continued(tokens, lengths, lengths)  # pyright: ignore[reportArgumentType]
        found.append({"p1": given})
    return found


def test_answers_count_and_saying_nothing_does_not(cache: Path) -> None:
    exam = asked(cache, model__answer_tokens=20)
    truth = {number: question.answer for number, question in zip(exam.numbers, exam.questions, strict=True)}
    assert exam.score(said(exam, truth))["exact"] == 1
    assert exam.score(said(exam, {}))["exact"] == 0
    scores = {name: exam.score(given) for name, given in exam.trivial(said(exam, truth)).items()}
    assert scores["empty"]["exact"] == scores["empty"]["smart_match"] == 0
    assert scores["constant"]["exact"] == scores["empty"]["constant_exact"] > 0
    # Which the document's own measure would have let pass.
    assert scores["empty"]["smart_match_faithful"] == 1


def test_an_expert_by_itself_is_asked_the_questions_of_its_stage(cache: Path) -> None:
    whole, alone = asked(cache), asked(cache, "exp3_stage2")
    assert {question.stage for question in alone.questions} == {2}
    assert alone.numbers == [n for n, q in zip(whole.numbers, whole.questions, strict=True) if q.stage == 2]
    assert asked(cache, "exp3_experts").numbers == whole.numbers


def test_what_is_kept_is_every_question_with_its_answer_and_why_there_is_none(cache: Path) -> None:
    whole = asked(cache)
    unfit = (whole.numbers[1], whole.numbers[4])
    rows = whole.source.rows
    fit = rows["test"].taken(np.flatnonzero(~np.isin(rows["test"].row, unfit)))
    source = dataclasses.replace(
        whole.source, rows={**rows, "test": fit}, unfit={**whole.source.unfit, "test": unfit}
    )
    exam = dataclasses.replace(whole, source=source)
    kept = exam.keep(said(exam, dict.fromkeys(exam.numbers, "clip")))
    assert list(kept["row"]) == exam.numbers
    for n, number in enumerate(exam.numbers):
        missing = number in unfit
        assert (kept["p1"][n], kept["error"][n]) == (("", TOO_LONG) if missing else ("clip", ""))
    pictures = [value for name, value in kept.items() if name.startswith("picture_")]
    assert pictures
    assert {picture.shape for picture in pictures} == {(48, 48, 3)}


def test_questions_of_a_stage_that_no_expert_was_trained_for_are_wrong_and_say_so(cache: Path) -> None:
    every = asked(cache, "exp3_experts", model__answer_tokens=20)
    exam = dataclasses.replace(every, untaught={3})
    truth = {number: question.answer for number, question in zip(exam.numbers, exam.questions, strict=True)}
    assert exam.numbers == every.numbers
    found, whole = exam.score(said(exam, truth)), every.score(said(every, truth))
    assert (found["exact_stage2"], found["exact_stage3"]) == (1, 0)
    assert found["exact"] < whole["exact"] == 1
    assert found["constant_exact"] == whole["constant_exact"]
    kept = exam.keep(said(exam, truth))
    untaught = [question.stage == 3 for question in exam.questions]
    assert [error == "no expert of stage 3" for error in kept["error"]] == untaught


# --------------------------------------------------------------------------------------- whole runs


def test_data_of_another_size_than_the_schedules_follow_is_one_line(cache: Path) -> None:
    with pytest.raises(UserError) as caught:
        task_of(data__questions__stage_2=12).open(cache)
    assert "data.questions.stage_2=12: there are 11 training questions of stage 2" in one_line(caught)


@pytest.mark.parametrize("path", ["", "nowhere"])
def test_a_checkpoint_that_is_not_there_is_one_line(cache: Path, path: str) -> None:
    published = load(
        "exp1_random,scale=2b", model__base="folder", model__base_path=path, data__path="questions"
    )
    with pytest.raises(UserError) as caught:
        VqaTask(published.base, "cpu").open(cache)
    assert f"config.model.base_path='{path}': is no folder" in one_line(caught)


def test_a_stage_without_questions_is_skipped_and_said(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The document's data has none of stage 3, and its exp3_stage3 a config all the same."""
    task_of().open(cache)  # draws the scenes
    folder = tmp_path / "questions"
    shutil.copytree(next(cache.glob("scenes/*")), folder)
    for file in (folder / f"{split}.jsonl" for split in ("train", "validation", "test")):
        rows = [line for line in file.read_text().splitlines() if json.loads(line)["stage"] != 3]
        file.write_text("".join(f"{line}\n" for line in rows))
    own = {"data.source": "folder", "data.path": str(folder), "data.questions.stage_3": "0"}
    own |= {"host.workdir": str(tmp_path), "host.cache": str(cache)}
    options = [f"--config.{name}={value}" for name, value in (FEW | own).items()]
    assert main(["--config=configs/vqa.py:exp3_stage3", *options]) == 0
    assert "stage 3: skipped" in caplog.text
    (run,) = tmp_path.glob("vqa_jobs/*/*/attempts.jsonl")
    end = json.loads(run.read_text().splitlines()[-1])
    assert (end["state"], end["step"]) == ("done", 0)
    assert end["reason"].startswith("skipped")
    # Others skip it among their stages.
    stages = task_of("exp3_experts", data__questions__stage_3=0).stages()
    assert [stage.name for stage in stages] == ["stage_1", "stage_2"]
