"""`jaxablate sample`, on language models trained for it on a text of one sentence."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxablate import cli, config, study, trained, xla
from jaxablate.config import import_task
from jaxablate.decoding import draw
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.record import Record
from jaxablate.sampling.generate import continue_with_members, row_keys
from jaxablate.sampling.page import shown
from jaxablate.sampling.verbs import Options
from jaxablate.studies.tinystories.task import LmTask
from jaxablate.task import TextTask
from jaxablate.text.tokenizer import Vocabulary
from jaxablate.train import train
from jaxablate.worker import rebuild

SENTENCE = "the cat sat on a mat.\n"
STUDY = """
from jaxablate.config import new_config
from jaxablate.studies.tinystories.config import LmData, LmModel
from jaxablate.study import Arm, Factor, Response, Study

def get_study(arg=""):
    data = LmData("text", {text!r}, level="char", vocab_size=32, context=24, tokens=0, eval_batches=1)
    model = LmModel(dim=32, layers=1, heads=2)
    config = new_config(study="letters", task="jaxablate.studies.tinystories.task:LmTask", model=model, data=data)
    config.optim.update(learning_rate=0.02, warmup_steps=5)
    config.training.update(steps=60, batch_size=8, eval_batch_size=8, eval_every=30, order="random")
    config.host.update(workdir={workdir!r}, cache={cache!r}, checkpoint_every=60, log_every=10)
    config.host.mesh.data = 1
    position = Factor("position", "model", {{"rope": {{}}, "none": {{"model.position": "none"}}}})
    rate = Factor("rate", "training", {{"fit": {{}}, "wild": {{"optim.learning_rate": 1e30}}}})
    average = Factor("average", "training", {{"off": {{}}, "on": {{"optim.ema_decay": 0.9}}}})
    no_position = Arm("no_position", {{"position": "none", "average": "on"}})
    return Study(
        name="letters", base=config, factors=(position, rate, average), seeds=(0, 1),
        arms=(Arm("baseline"), no_position, Arm("wild", {{"rate": "wild"}})),
        responses=(Response("val/loss", "min"),),
    )
"""


def freeze(folder: Path) -> Manifest:
    """The study of this module, frozen below `folder`."""
    text = folder / "text.txt"
    text.write_text(SENTENCE * 60)
    file = folder / "letters.py"
    file.write_text(STUDY.format(text=str(text), workdir=str(folder), cache=str(folder / "cache")))
    declared = study.load(str(file))
    resolved = {arm.name: config.resolve(declared.config(arm.name)).base for arm in declared.arms}
    return Manifest.freeze(declared, resolved)


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two arms of two seeds that learned the sentence, and one that diverged."""
    manifest = freeze(tmp_path_factory.mktemp("letters"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "draw", lambda self: None)  # the figures of six runs, which nobody looks at
        for arm in manifest.study.arms:
            train(rebuild(manifest, [run for run in manifest.runs if run.arm == arm.name], {}))
    return manifest


@pytest.fixture
def own(letters: Manifest, tmp_path: Path) -> Path:
    """A copy of the study's directory, to be damaged."""
    return Path(shutil.copytree(letters.path, tmp_path / "letters"))


def sampled(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert cli.main(["sample", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a refused command leaves on stderr."""
    assert cli.main(["sample", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    return lines[0]


def test_what_was_learned_is_written_by_every_arm_and_a_diverged_one_is_said(
    letters: Manifest, capsys
) -> None:
    prompts = ["--prompt=the cat", "--prompt=sat on", "--prompt=the"]
    found = sampled(capsys, str(letters.path), *prompts, "--temperature=0", "--tokens=12", "--seeds=0,1")
    texts = {(s["arm"], s["seed"], s["prompt"]): s["text"] for s in found["samples"]}
    assert texts.keys() == {
        (arm, seed, prompt) for arm in ("baseline", "no_position") for seed in (0, 1) for prompt in range(3)
    }
    for seed in (0, 1):
        assert texts["baseline", seed, 0] == " sat on a ma"
        assert texts["baseline", seed, 1] == " a mat.\nthe "
    assert found["notes"] == ["wild: left out, diverged: seed 0, 1"]
    assert {s["ended"] for s in found["samples"]} == {"limit"}
    summary = json.loads(next(letters.path.glob("baseline/seed0*/summary.json")).read_text())
    assert found["samples"][0]["step"] == summary["best_checkpoint"]


def test_the_table_has_a_row_for_each_arm_and_says_how_it_was_drawn(letters: Manifest, capsys) -> None:
    assert (
        cli.main(["sample", str(letters.path), "--prompt=the cat", "--tokens=20", "--temperature=0.5"]) == 0
    )
    out = capsys.readouterr().out
    for words in (
        "prompt 1: the cat",
        "baseline",
        "no_position",
        "temperature 0.5, top-p 0.95",
        "context full",
    ):
        assert words in out
    assert "wild: left out, diverged: seed 0, 1" in out


def test_a_text_does_not_depend_on_the_other_prompts_arms_and_seeds(letters: Manifest, capsys) -> None:
    asked = ["--temperature=2", "--top-p=1", "--tokens=9"]
    together = sampled(capsys, str(letters.path), "--prompt=on a mat", "--prompt=the", "--seeds=0,1", *asked)[
        "samples"
    ]
    alone = sampled(capsys, str(letters.path), "--prompt=the", "--arm=no_position", *asked)["samples"]
    assert len(alone) == 1
    same = [s for s in together if (s["arm"], s["seed"], s["prompt"]) == ("no_position", 0, 1)]
    assert same[0]["text"] == alone[0]["text"]
    asked = [*asked, "--sampling-seed=1", "--arm=no_position"]
    other = sampled(capsys, str(letters.path), "--prompt=the", "--prompt=the", *asked)["samples"]
    assert (
        len({alone[0]["text"], other[0]["text"], other[1]["text"]}) == 3
    )  # another seed; the same prompt again


def test_a_text_begins_with_a_line_break_where_the_training_text_has_no_end(
    letters: Manifest, capsys
) -> None:
    found = sampled(capsys, str(letters.path), "--temperature=0", "--tokens=7", "--arm=baseline")
    assert found["samples"][0]["text"] == "the cat"


def test_a_text_begins_with_end_of_text_where_training_had_it(letters: Manifest) -> None:
    base = rebuild(letters, letters.runs[:1], {}).base
    task = import_task(base.task)(base, "cpu")
    source = task.open(config.cache_dir(base.host))
    vocabulary = task.vocabulary(source)
    assert vocabulary.decode(task.opening(source, vocabulary)) == "\n"
    separated = replace(source, counts=source.counts + 1)
    assert task.opening(separated, vocabulary) == [vocabulary.end_of_text]


def test_tokens_without_a_tokenizer_need_one(letters: Manifest, tmp_path: Path, capsys, monkeypatch) -> None:
    asked = [str(letters.path), "--prompt=the", "--temperature=0", "--tokens=4", "--arm=baseline"]
    monkeypatch.setattr(LmTask, "vocabulary", lambda self, source: None)
    assert "config.data.tokenizer is empty, and tokens alone" in refused(capsys, *asked)
    file = tmp_path / "tokenizer.json"
    Vocabulary.train([SENTENCE], 32, "char").save(file)
    assert sampled(capsys, *asked, f"--tokenizer={file}")["samples"][0]["text"] == " cat"
    Vocabulary.train([SENTENCE, *map(chr, range(0x391, 0x3A1)), *"BCDEFGHIJK"], 99, "char").save(file)
    assert "ids, and the model 32; give the tokenizer" in refused(capsys, *asked, f"--tokenizer={file}")


@pytest.mark.parametrize(
    ("characters", "limit", "kept"),
    [
        (51, 5, 20),
        (24, 5, 20),  # as long as the context
        (21, 5, 20),
        (20, 5, 20),  # the last that fits: the fifth token is drawn behind the 24th
        (24, 1, 24),
        (24, 100, 12),  # more is asked for than the context holds: half of it
        (12, 100, 12),
    ],
)
def test_of_a_long_prompt_the_end_is_used_and_it_is_said(letters, capsys, characters, limit, kept) -> None:
    prompt = (SENTENCE * 3)[:characters]
    asked = [f"--prompt={prompt}", "--temperature=0", f"--tokens={limit}", "--arm=baseline"]
    found = sampled(capsys, str(letters.path), *asked)
    said = f"prompt 1: its last {kept} of {characters} tokens are used, to leave room in the context of 24"
    assert found["notes"] == ([said] if kept < characters else [])
    (sample,) = found["samples"]
    assert sample["tokens"] == min(limit, 24 + 1 - kept)
    assert sample["ended"] == ("limit" if limit <= 24 + 1 - kept else "context full")
    assert sample["text"] == (SENTENCE * 4)[characters : characters + sample["tokens"]]


def test_prompts_come_from_a_file_too(letters: Manifest, tmp_path: Path, capsys) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("the\n\non a\n")
    found = sampled(
        capsys, str(letters.path), f"--prompt-file={file}", "--tokens=2", "--temperature=0", "--arm=baseline"
    )
    assert found["prompts"] == ["the", "on a"]
    assert [s["text"] for s in found["samples"]] == [" c", " m"]


# ---------------------------------------------------------------------------- the model and its cache


@pytest.mark.parametrize("arm", ["baseline", "no_position"])
def test_what_is_restored_scores_what_was_recorded(letters: Manifest, arm: str) -> None:
    """Also where evaluation was of averaged parameters, as in one of these arms."""
    runs = [run for run in letters.runs if run.arm == arm]
    base = rebuild(letters, runs, {}).base
    task = import_task(base.task)(base, "cpu")
    source = task.open(config.cache_dir(base.host))
    predict = jax.jit(task.predict, compiler_options=dict(xla.quick()))
    recorded = json.loads(letters.run_dir(runs[0]).summary.read_text())["statistics"]["val_loss"]
    assert recorded["initial"] > 2 * recorded["best"]
    for which in ("best", "final"):
        found = trained.restore(task, base, letters.run_dir(runs[0]), which)
        loss = source.score([predict(found.variables, batch) for batch in source.evaluation])["loss"]
        assert loss == pytest.approx(recorded[which], rel=1e-4)
        assert found.data == source.fingerprint


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.5, 0.9)])
def test_tokens_are_those_of_the_model_without_a_cache(
    letters: Manifest, temperature: float, top_p: float
) -> None:
    """Two members and ragged prompts at once, against one member, one prompt, and the whole pass for each token."""
    runs = [run for run in letters.runs if run.arm == "baseline"]
    cohort = rebuild(letters, runs, {})
    task = import_task(cohort.base.task)(cohort.base, "cpu")
    vocabulary = task.open(config.cache_dir(cohort.base.host)).vocabulary
    members = [
        trained.restore(task, own, letters.run_dir(run), "final").variables
        for run, own in zip(runs, cohort.runs, strict=True)
    ]
    options = Options(prompts=("on", "a mat. the", "sat"), tokens=6, temperature=temperature, top_p=top_p)
    prompts, keys = vocabulary.encode(options.prompts), row_keys(options)
    found = continue_with_members(
        task, members, prompts, keys, base={}, vocabulary=vocabulary, options=options
    )

    def following(variables: Any, tokens: jax.Array, at: jax.Array, key: jax.Array) -> jax.Array:
        logits = task.model.apply(variables, tokens)[:, at - 1, : vocabulary.size]
        return draw(logits, jax.random.fold_in(key, at)[None], temperature=temperature, top_p=top_p)[0]

    following = jax.jit(following, compiler_options=dict(xla.quick()))
    for m, variables in enumerate(members):
        for row, prompt in enumerate(prompts):
            tokens = np.zeros((1, task.context), np.int32)
            tokens[0, : len(prompt)] = prompt
            for at in range(len(prompt), len(prompt) + options.tokens):
                tokens[0, at] = following(variables, tokens, at, keys[row])
            expected = tokens[0, len(prompt) : len(prompt) + options.tokens]
            np.testing.assert_array_equal(found.tokens[m * len(prompts) + row], expected)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--temperature=-1"], "--temperature=-1.0: must be 0"),
        (["--temperature=nan"], "--temperature=nan: must be 0"),
        (["--top-p=0"], "--top-p=0.0: is a share, above 0 and up to 1"),
        (["--top-p=1.5"], "--top-p=1.5: is a share"),
        (["--tokens=0"], "--tokens=0: must be 1 or more"),
        (["--sampling-seed=-1"], "--sampling-seed=-1: must be in"),
        (["--seeds=7"], "--seeds=7: is no seed of study letters's results; valid: 0, 1"),
        (["--arm=basline"], "did you mean 'baseline'?"),
        (["--arm=wild"], "no finished run to sample from (wild: left out, diverged: seed 0, 1)"),
        (["--prompt=the dog"], "--prompt='the dog': character 'd' (U+0064)"),
        (["--prompt=the", "--prompt-file=x"], "--prompt-file=x: not allowed with --prompt"),
        (["--prompt-file=/nowhere"], "--prompt-file=/nowhere: cannot be read: No such file"),
        (["--tokenizer=x.json"], "--tokenizer=x.json: the study's data has its own tokenizer"),
        (["--config.model.dim=8"], "is the directory of a study"),
    ],
)
def test_bad_input_is_one_line(letters: Manifest, capsys, argv: list[str], words: str) -> None:
    assert words in refused(capsys, str(letters.path), *argv)


@pytest.mark.parametrize(
    ("content", "words"), [(b"\n \n", "has no prompt"), (b"ab\xff", "byte 2 is not UTF-8")]
)
def test_a_bad_file_of_prompts_is_named(letters: Manifest, tmp_path: Path, capsys, content, words) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert f"{file}: {words}" in refused(capsys, str(letters.path), f"--prompt-file={file}")


def test_a_study_that_has_not_been_run_is_named(tmp_path: Path, capsys) -> None:
    manifest = freeze(tmp_path)
    line = refused(capsys, str(manifest.path), "--arm=baseline")
    assert (
        "no finished run to sample from (baseline: left out, pending: seed 0, 1); run the study first" in line
    )


def test_a_task_without_text_is_named(tmp_path: Path, capsys, repo: Path, monkeypatch) -> None:
    monkeypatch.chdir(repo)
    declared = study.load("tests/configs/toy_study.py", [("host.workdir", str(tmp_path))])
    resolved = {arm.name: config.resolve(declared.config(arm.name)).base for arm in declared.arms}
    manifest = Manifest.freeze(declared, resolved)
    where = manifest.run_dir(manifest.runs[0])
    where.create(manifest.config_of(manifest.runs[0]))
    where.end_attempt(where.begin_attempt(), "done", "")
    assert "study toy: its task gives no text" in refused(capsys, str(manifest.path))
    assert not issubclass(import_task("tests.toy:ToyTask"), TextTask)


def checkpoints(folder: Path, seed: int = 0) -> Path:
    return next(folder.glob(f"baseline/seed{seed}*")) / "checkpoints"


def test_a_checkpoint_that_is_gone_is_named(own: Path, capsys) -> None:
    shutil.rmtree(checkpoints(own))
    line = refused(capsys, str(own))
    assert "checkpoints: the best checkpoint of step" in line
    assert "is gone, there is none" in line


def test_a_damaged_checkpoint_is_named_and_never_used(own: Path, capsys) -> None:
    largest = max(checkpoints(own).rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    line = refused(capsys, str(own), "--checkpoint=final")
    assert "the final checkpoint of step 60 is damaged" in line
    assert "has other bytes than were written" in line
    assert sampled(capsys, str(own), "--checkpoint=final", "--arm=baseline", "--seeds=1", "--tokens=1")[
        "samples"
    ]


def test_data_that_has_changed_since_is_refused(own: Path, letters: Manifest, capsys) -> None:
    text = letters.path.parent / "text.txt"
    before = text.read_text()
    text.write_text(before.replace("cat", "tac"))
    try:
        assert "was trained on other data than its config now names" in refused(capsys, str(own))
    finally:
        text.write_text(before)


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert shown("a\x1b[2Jb\nc\t\u202e") == "a\\x1b[2Jb\nc\\t\\u202e"


def test_options_are_checked_wherever_they_come_from() -> None:
    with pytest.raises(UserError, match="--top-p=0"):
        Options(top_p=0)
