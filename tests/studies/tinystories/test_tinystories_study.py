"""TinyStories as a user meets it: the declaration, real text, what an arm must not do, what a mistake says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxablate import config, study
from jaxablate.check import check_study
from jaxablate.disk import read_jsonl
from jaxablate.main import main
from jaxablate.studies.tinystories.data.stories import stories

SHARED = Path(os.environ.get("JAXABLATE_SHARED", "../shared")) / "data" / "text"
FEW = [("data.stories_characters", "60000"), ("data.eval_batches", "2")]
DOCUMENT = ["baseline", "no_layer_norm", "post_norm", "no_position_emb", "silu_ffn"]


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def test_other_data_has_no_responses_of_generated_stories_and_the_documents_gates(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(story.text for story in stories(60_000, 1)))
    spec = "configs/tinystories.py:data=text"
    declared = study.load(spec, [("data.train", str(text)), ("data.eval_batches", "2")])
    report = check_study(declared, spec=spec, arms=["baseline"])
    assert not report.failed, report.table(120, verbose=True)
    names = {response.name for response in declared.responses}
    made = study.load("configs/tinystories.py")
    assert {response.name for response in made.responses} - names == {
        "copy_loss",
        "recall_loss",
        "other_loss",
    }
    gates = [
        study.load(f"configs/tinystories.py:scale=paper{data}").expectations for data in ("", ",data=tokens")
    ]
    assert [any(e.against == "nothing" and e.response for e in found) for found in gates] == [False, True]


def train(tmp_path: Path, *options: str, arm: str = "baseline", steps: int = 30) -> dict[str, Any]:
    """The summary of one short run at scale tiny."""
    small = ["data.tokens=0", f"training.steps={steps}", "data.eval_batches=2", *options]
    args = [f"--config.{option}" for option in (*small, f"host.workdir={tmp_path}")]
    assert main([f"--config=configs/tinystories.py:{arm}", *args]) == 0
    (found,) = tmp_path.glob("tinystories/*/*/summary.json")
    return json.loads(found.read_text())


# ------------------------------------------------------------------------------------- declaration


@pytest.mark.slow
def test_every_arm_of_the_document_ablates_what_it_says() -> None:
    spec = "configs/tinystories.py"
    report = check_study(study.load(spec, FEW), spec=spec)
    assert not report.failed, report.table(120, verbose=True)
    assert [row.arm for row in report.rows if row.function == "changed"] == DOCUMENT[1:]


def test_check_catches_a_no_position_arm_that_still_has_positions() -> None:
    """Upstream's: the block passes no positions to an attention that turns by default ones all the same."""
    declared = study.load("configs/tinystories.py", FEW)
    position = study.Factor("position", "model", {"rope": {}, "none": {"model.position": "faithful_none"}})
    arms = (study.Arm("baseline"), study.Arm("no_position_emb", {"position": "none"}))
    broken = study.Study("tinystories", (position,), arms, (0,), declared.responses[:1], base=declared.base)
    report = check_study(broken, arms=["no_position_emb"])
    (finding,) = [f for f in report.of("no_position_emb", "fail") if f.check == "function"]
    assert "model factor 'position'" in finding.reason
    assert "changes nothing" in finding.reason
    # The arm as it ships is not reported.
    report = check_study(declared, arms=["no_position_emb"])
    assert not report.of("no_position_emb", "fail")


@pytest.mark.parametrize("scale", ["tiny", "low_resource", "paper"])
def test_every_rate_of_an_arm_is_tried_on_seeds_that_report_nothing(scale: str) -> None:
    declared = study.load(f"configs/tinystories.py:scale={scale}")
    rule = declared.learning_rate
    assert rule is not None
    assert not set(rule.tuning_seeds) & set(declared.seeds)
    assert len(declared.seeds) >= 3
    default = config.load(f"configs/tinystories.py:scale={scale}").base.optim.learning_rate
    assert all(default in rule.grid_of(arm) for arm in DOCUMENT)
    sweep = rule.grid_of("no_layer_norm")
    assert scale == "tiny" or sweep == (1e-5, 2e-5, 5e-5, 1e-4, 3e-4)


# ----------------------------------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.parametrize("level", ["char", "bpe"])
@pytest.mark.parametrize("name", ["tinystories_sample.txt", "tinyshakespeare.txt", "generated"])
def test_real_text_is_learned_beyond_its_frequencies(
    name: str, level: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SHARED / name
    if name == "generated":
        text = tmp_path / "stories.txt"
        text.write_text("<|endoftext|>".join(story.text for story in stories(200_000, 1)))
    elif not text.exists():
        pytest.skip(f"{text} is not here")
    where = [f"data.train={text}", "data.source=text", f"data.level={level}", "optim.learning_rate=5e-3"]
    summary = train(tmp_path, *where, "optim.warmup_steps=10", "model.layers=1", "model.dim=64", steps=120)
    loss, unigram = (summary["statistics"][key]["final"] for key in ("val_loss", "val_unigram_loss"))
    assert loss < unigram - 0.2
    assert f"(val/unigram_loss is {unigram:.3f})" in capsys.readouterr().out
    # It is what the frequencies give, and no straw man: far below a guess among all ids.
    assert unigram < np.log(512) - 0.5


def test_evaluation_is_passive(tmp_path: Path) -> None:
    """Upstream's shared the training generator: another cadence, other batches."""

    def losses(every: int) -> list[float]:
        where = tmp_path / str(every)
        train(
            where,
            f"training.eval_every={every}",
            "host.log_every=1",
            "data.stories_characters=60000",
            steps=6,
        )
        (metrics,) = where.glob("tinystories/*/*/metrics.jsonl")
        return [row["train/loss"] for row in read_jsonl(metrics)[0] if "train/loss" in row]

    assert losses(2) == losses(6)
    assert len(losses(6)) == 6


# ------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["training.steps=7"], ("training.steps=7", "data.tokens=409600 makes 400", "data.tokens=0")),
        (["model.heads=5"], ("model.heads=5", "model.dim=96")),
        (["model.dim=12", "model.heads=2"], ("model.dim=12", "no width")),
        (["data.context=1"], ("data.context=1", "2 or more")),
        (["model.loss_impl=chunky"], ("model.loss_impl='chunky'", "chunked")),
        (["data.vocab_size=200"], ("vocab", "257")),
        (["data.source=tokens"], ("data.train", "give its path")),
        (["data.stories_characters=300"], ("data.stories_characters=300",)),
    ],
)
def test_a_mistake_is_one_line(options, says, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [f"--config.{option}" for option in (*options, f"host.workdir={tmp_path}")]
    assert main(["--config=configs/tinystories.py", *args]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert all(part in line for part in says), line
    assert not (tmp_path / "tinystories").exists()


def test_files_of_tokens_that_are_not_right_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    files = {
        "good": rng.integers(0, 512, 5000).astype(np.uint16),
        "other": rng.integers(0, 512, 3000).astype(np.uint16),
        "beyond": np.full(5000, 512, np.uint16),
        "short": np.zeros(20, np.uint16),
        "flat": rng.random(5000),
    }
    for name, ids in files.items():
        np.save(tmp_path / f"{name}.npy", ids)
    whole = (tmp_path / "good.npy").read_bytes()
    (tmp_path / "torn.npy").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.npy").write_bytes(b"")

    def error(train: str, val: str) -> str:
        args = ["data.source=tokens", f"data.train={tmp_path / train}.npy", f"data.val={tmp_path / val}.npy"]
        args = [f"--config.{option}" for option in (*args, f"host.workdir={tmp_path / 'runs'}")]
        assert main(["--config=configs/tinystories.py", *args]) == 2
        (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
        return line

    assert "512" in error("beyond", "other")
    assert "data.train" in error("beyond", "other")
    assert "20 tokens" in error("short", "good")
    assert "same as" in error("good", "good")
    for bad in ("torn", "empty", "flat", "missing"):
        assert f"{bad}.npy" in error(bad, "other")
        assert "data.val" in error("good", bad)
