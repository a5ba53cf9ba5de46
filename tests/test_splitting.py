"""After running out of memory: evaluation in parts where rows are apart, and no retry that would be refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from jaxablate import config
from jaxablate.config import import_task
from jaxablate.runstore import RunDir
from jaxablate.schedule.retries import outlook
from jaxablate.task import Task
from jaxablate.train import train
from tests.toy import ToyTask
from tests.toy_tasks import RowsTask, UnsplittableTask, WholeTask, cohort_with
from tests.toy_training import history, metrics

MICRO_BATCH = 8


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def trained(
    task: type[RowsTask], workdir: Path, monkeypatch: pytest.MonkeyPatch, split: int
) -> tuple[set[int], dict[int, dict[str, float]]]:
    """The rows that were predicted at a time, and the scores by step."""
    monkeypatch.setattr(RowsTask, "seen", seen := [])
    (summary,) = train(cohort_with(task, workdir, host__split=split, training__steps=10))
    rows = [row for row in metrics(workdir, summary) if "val/loss" in row or "val/test_loss" in row]
    return set(seen), {row.pop("step"): row for row in rows}


def test_what_goes_by_rows_is_evaluated_in_parts_and_scores_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, whole = trained(RowsTask, tmp_path / "whole", monkeypatch, 1)
    assert seen == {16, 12} and whole.keys() == {0, 10, 11}
    seen, parts = trained(RowsTask, tmp_path / "parts", monkeypatch, 8)
    assert max(seen) == 2  # of 16 rows, and of the 12 of the closing metrics
    for step, scores in whole.items():
        assert parts[step] == pytest.approx(scores, rel=1e-4)


def test_what_compares_its_rows_is_never_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, whole = trained(WholeTask, tmp_path / "whole", monkeypatch, 1)
    assert seen == {16, 12}
    seen, split = trained(WholeTask, tmp_path / "split", monkeypatch, 8)
    assert seen == {16, 12} and split[10] == pytest.approx(whole[10], rel=1e-4)
    monkeypatch.setattr(WholeTask, "evaluates", "rows")  # its scores would be other ones
    _, cut = trained(WholeTask, tmp_path / "cut", monkeypatch, 8)
    assert cut[10] != pytest.approx(whole[10], rel=1e-4)


@pytest.mark.parametrize("spec", ["configs/tinystories.py", "configs/vqa.py:exp1_random"])
def test_studies_that_say_so_have_the_rows_first_in_all_that_they_predict(spec: str, tmp_path: Path) -> None:
    run = config.load(spec).base
    task: Task[Any, Any] = import_task(run.task)(run, "cpu")
    assert task.evaluates == "rows"
    task = task.during(task.stages()[0])

    def rows(count: int) -> set[int]:
        batch = {key: jax.ShapeDtypeStruct((count, *x.shape), x.dtype) for key, x in task.example().items()}
        variables = {**task.abstract, **task.abstract_base}
        return {x.shape[0] for x in jax.tree.leaves(jax.eval_shape(task.predict, variables, batch))}

    assert (rows(3), rows(5)) == ({3}, {5})


# ------------------------------------------------------------------------------------------------ retries


@pytest.mark.parametrize(
    ("task", "next_", "words"), [(ToyTask, "train", ""), (UnsplittableTask, "nothing", "must be 1 here")]
)
def test_a_run_that_cannot_be_split_ends_out_of_memory(
    task: type[ToyTask], next_: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(MemoryError):
        train(cohort_with(task, tmp_path, data__memory=1))
    rows = history(tmp_path)
    found = outlook(rows, MICRO_BATCH)
    assert (found.state, found.next) == ("oom", next_)
    assert "memory is full" in found.reason and words in found.reason


def test_a_cohort_that_cannot_be_split_is_still_halved(tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        train(cohort_with(UnsplittableTask, tmp_path, data__memory=1, seeds="0,1"))
    (where, _) = sorted(tmp_path.glob("toy/base/*/"))
    found = outlook(RunDir(where).history(), MICRO_BATCH)
    assert (found.next, found.members) == ("train", 1)
    assert "must be 1 here" not in found.reason


def test_a_micro_batch_of_one_cannot_be_split() -> None:
    def task(split: int) -> ToyTask:
        return ToyTask(config.load("tests/configs/toy.py", [("host.split", str(split))]).base, "cpu")

    assert task(4).unsplittable == ""
    assert "16 micro-batches divide training.batch_size=8" in task(8).unsplittable


def test_batch_norm_cannot_be_split() -> None:
    run = config.load("configs/lora_space.py").base
    assert "batch norm" in import_task(run.task)(run, "cpu").unsplittable
