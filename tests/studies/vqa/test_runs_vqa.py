"""A curriculum as a whole run: what a stage starts from, stops in the middle, and its adapter outside of the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxablate import config, disk, trained
from jaxablate.config import Cohort
from jaxablate.data import CohortBatches
from jaxablate.inputs import load_base
from jaxablate.main import main
from jaxablate.peft import WEIGHTS
from jaxablate.runstore import RunDir
from jaxablate.stopping import Stopped, StopRequest
from jaxablate.studies.vqa import evaluate, export
from jaxablate.studies.vqa.results import Answers
from jaxablate.studies.vqa.task import VqaTask
from jaxablate.train import train
from jaxablate.trees import flat
from tests.studies.vqa.few import FEW

pytestmark = pytest.mark.slow
# Steps enough that a stage has a middle.
RUN = FEW | {
    "model.lora_dropout": "0.0", "data.epochs": "4", "training.batch_size": "8", "training.restore": "last",
    "optim.learning_rate": "0.01", "host.log_every": "1", "host.keep_last": "20",
}  # fmt: skip
FIRST, STEPS = 4, 16  # steps of the first stage, and of all three


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


@dataclass(frozen=True)
class Curriculum:
    """A finished run of exp4, and what the commands said of it."""

    dir: RunDir
    cache: Path
    said: tuple[str, ...]

    def settings(self, workdir: Path) -> dict[str, str]:
        return RUN | {"host.workdir": str(workdir), "host.cache": str(self.cache)}

    def cohort(self, workdir: Path) -> Cohort:
        return config.load("configs/vqa.py:exp4_curriculum", self.settings(workdir).items())


@pytest.fixture(scope="module")
def ran(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Curriculum:
    """Trained by the guide's two commands."""
    workdir, cache = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("cache")
    where = RUN | {"host.workdir": str(workdir), "host.cache": str(cache)}
    options = [f"--config.{name}={value}" for name, value in where.items()]
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        for arm in ("exp4_stage1", "exp4_stage2"):
            assert main([f"--config=configs/vqa.py:{arm}", *options]) == 0
            (attempts,) = workdir.glob("vqa/*/*/attempts.jsonl")
            said.append(RunDir(attempts.parent).history()[-1]["paused"])
        train(config.load("configs/vqa.py:exp4_curriculum", where.items()))
    return Curriculum(RunDir(attempts.parent), cache, tuple(said))


def checkpoint(run: Cohort, where: RunDir) -> dict[str, np.ndarray]:
    task = VqaTask(run.base, "cpu")
    return {
        k: np.asarray(v) for k, v in flat(trained.restore(task, run.base, where, "final").variables).items()
    }


def rows(where: RunDir, metric: str) -> dict[int, float]:
    """By step."""
    return {row["step"]: row[metric] for row in disk.read_jsonl(where.metrics)[0] if metric in row}


def test_the_guides_two_configs_are_one_run(ran: Curriculum) -> None:
    assert ran.said == ("stage_1", "stage_2")
    assert ran.dir.state() == "done"
    assert max(rows(ran.dir, "train/loss")) == STEPS


def first_loss(ran: Curriculum, stage: int, variables: Any) -> float:
    """Of the batch that a stage begins with, by an adapter and the run's base."""
    run = ran.cohort(ran.dir.path).base
    whole = VqaTask(run, "cpu")
    task = whole.during(whole.stages()[stage - 1])
    source = task.data_of_stage(whole.open(ran.cache))
    batch = CohortBatches(source.train, [run.seed], 8, 1, run.training.order)[0]
    given = {name: value[0] for name, value in task.fit(batch).items()}
    loss = jax.jit(lambda given, of: task.loss(of, task.predict(of, given))[0])
    return float(loss(given, {**variables, **load_base(task, ran.cache)}))


def test_a_stage_begins_with_the_adapter_that_the_one_before_has_left(
    ran: Curriculum, tmp_path: Path
) -> None:
    """Its first loss, before any update of it, is that adapter's and no fresh one's."""
    run = ran.cohort(ran.dir.path).base
    task, losses = VqaTask(run, "cpu"), rows(ran.dir, "train/loss")
    fresh = nn.unbox(task.init(jax.random.key(run.seed)))
    assert losses[1] == pytest.approx(first_loss(ran, 1, fresh), rel=1e-5)
    at = RunDir(tmp_path / "run")
    shutil.copytree(ran.dir.path, at.path)
    summary = disk.read_json(at.summary)
    for stage, before in ((2, FIRST), (3, FIRST + 8)):
        disk.write_json(at.summary, {**summary, "final_checkpoint": before})
        left = trained.restore(task, run, at, "final").variables
        begun, anew = losses[before + 1], first_loss(ran, stage, fresh)
        assert begun == pytest.approx(first_loss(ran, stage, left), rel=1e-5)
        assert abs(begun - anew) > 0.01 * anew
    assert begun < anew - 0.1  # by then it knows which characters answers are written in


def test_stops_in_the_middle_of_stages_change_no_bit(
    ran: Curriculum, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ran.cohort(tmp_path)
    for after in (2, 5):  # steps of this attempt: in stage 1; then, from the third step on, in stage 2
        asked: list[int] = []

        def due(self: StopRequest, after: int = after, asked: list[int] = asked) -> str:
            asked.append(1)
            return "SIGUSR2" if len(asked) == after else ""

        with monkeypatch.context() as patch:
            patch.setattr(StopRequest, "due", due)
            with pytest.raises(Stopped):
                train(run)
    (attempts,) = tmp_path.glob("vqa/*/*/attempts.jsonl")
    again = RunDir(attempts.parent)
    stopped = [row["step"] for row in again.history() if row["state"] == "preempted"]
    assert 0 < stopped[0] < FIRST < stopped[1] < FIRST + 8
    train(run)
    ended, straight = checkpoint(run, again), checkpoint(run, ran.dir)
    assert ended.keys() == straight.keys()
    assert all(np.array_equal(ended[name], straight[name]) for name in straight)
    assert rows(again, "train/loss") == rows(ran.dir, "train/loss")
    first, second = (Answers.read(where.predictions) for where in (again, ran.dir))
    assert first.passes == second.passes


# ------------------------------------------------------------------------------- outside of the run


@pytest.fixture(scope="module")
def adapter(ran: Curriculum, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "exp4"
    assert export.main([f"--run={ran.dir.path}", f"--output={folder}"]) == 0
    return folder


@dataclass(frozen=True)
class Evaluated:
    code: int
    said: str
    results: Mapping[str, Any]


@pytest.fixture
def evaluated(ran: Curriculum, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command on the run's own test questions, with these flags besides or instead."""
    (scenes,) = ran.cache.glob("scenes/*")

    def run(*flags: str, **changed: Any) -> Evaluated:
        own = {"model_path": adapter, "test_data": scenes / "test.jsonl", "output": tmp_path / "r.json"}
        given = [f"--{name}={value}" for name, value in (own | changed).items() if value is not None]
        kept = [f"--config.{name}={ran.settings(tmp_path)[name]}" for name in KEPT]
        code = evaluate.main([*given, *kept, *flags])
        output = tmp_path / "r.json"
        return Evaluated(code, capsys.readouterr().err, json.loads(output.read_text()) if code == 0 else {})

    return run


KEPT = ("model.base", "model.answer_tokens", "training.eval_batch_size", "host.cache")


def answers(found: Evaluated) -> list[str]:
    return [one["prediction"] for one in found.results["predictions"]]


def test_an_exported_adapter_says_what_its_run_said(
    ran: Curriculum, adapter: Path, evaluated: Any, tmp_path: Path
) -> None:
    own = list(Answers.read(ran.dir.predictions).final)
    found = evaluated()
    assert (answers(found), found.results["total"]) == (own, len(own))
    # As experts the same adapter answers the same, and another one does not; of the first questions alone.
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    tensors = {name: np.flip(value, 0).copy() for name, value in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, other / WEIGHTS, metadata={"format": "pt"})
    experts = {"model_stage1": adapter, "model_stage2": other, "model_stage3": adapter}
    found = evaluated("--max_samples=12", model_path=None, **experts)
    stages = [one["stage"] for one in found.results["predictions"]]
    same = [a == b for a, b in zip(answers(found), own, strict=False)]
    assert len(same) == 12 and {1, 2} <= set(stages)
    assert all(equal for equal, stage in zip(same, stages, strict=True) if stage != 2)
    assert not all(same)


@pytest.mark.parametrize(
    ("flags", "changed", "message"),
    [
        ((), {"model_path": None}, "--model_path: missing; give an adapter's folder, or --model_stage1, 2 and 3"),
        ((), {"model_stage1": "x"}, "not allowed with --model_stage1; drop one of them"),
        ((), {"model_path": "nowhere"}, "nowhere/adapter_config.json: there is no such file; give a folder that"),
        ((), {"test_data": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read: No such file"),
        ((), {"image_dir": "configs"}, "is not in configs; restore the image, or leave its questions out"),
        ((), {"output": "nowhere/r.json"}, "--output=nowhere/r.json: there is no folder nowhere; make it first"),
        ((), {"base_model": "nowhere"}, "nowhere/config.json: there is no such file; give the folder of a Qwen3-VL"),
        (("--config.model.base_seed=9",), {}, "the adapter belongs to the base 'jaxablate/vqa-tiny-random-0', not to"),
        (("--config.model.lora_rank=8",), {}, "r=4, but the model is built with rank=8"),
        (("--model_pth=x",), {}, "--model_pth: unknown argument; did you mean '--model_path'?"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_one_line(
    evaluated: Any, flags: tuple[str, ...], changed: dict[str, Any], message: str
) -> None:
    found = evaluated(*flags, **changed)
    assert found.code == 2
    *_, line = found.said.splitlines()
    assert line.startswith("error: ") and message in line


def test_experts_must_be_given_for_all_stages_that_are_asked(evaluated: Any, adapter: Path) -> None:
    found = evaluated(model_path=None, model_stage1=adapter, model_stage3=adapter)
    assert found.code == 2
    assert "--model_stage2: missing; " in found.said.splitlines()[-1]


def test_an_adapter_without_its_weights_is_one_line(evaluated: Any, adapter: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(adapter, bare)
    (bare / WEIGHTS).unlink()
    found = evaluated(model_path=bare)
    assert (found.code, found.said.splitlines()[-1]) == (
        2, f"error: {bare / WEIGHTS}: there is no such file; give a folder that peft's save_pretrained wrote",
    )  # fmt: skip


def test_only_a_finished_run_is_exported(
    ran: Curriculum, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = RunDir(tmp_path / "run")
    copied.path.mkdir()
    for path in (tmp_path, copied.path):
        assert export.main([f"--run={path}", f"--output={tmp_path / 'out'}"]) == 2
        shutil.copy(ran.dir.config, copied.config)
    first, second = capsys.readouterr().err.splitlines()
    assert f"--run={tmp_path}: holds no config.json" in first
    assert f"--run={copied.path}: is pending, not done" in second
    assert not (tmp_path / "out").exists()
