"""What an opened source gives: tokens with targets, batches of one stage each, one picture for each question."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxablate.data import CohortBatches
from jaxablate.errors import UserError
from jaxablate.studies.vqa.config import StageQuestions, VqaData
from jaxablate.studies.vqa.data import (
    Language,
    PictureSpec,
    VqaSource,
    open_captions,
    open_vqa,
    read_questions,
    scenes,
    synthetic_questions,
    write_questions,
)
from jaxablate.studies.vqa.data.prompts import PASSES, filled
from jaxablate.studies.vqa.data.rows import NO_ROW, NOT_ASKED
from jaxablate.studies.vqa.data.stages import SEQUENCES
from jaxablate.studies.vqa.data.synthetic import counts
from jaxablate.studies.vqa.qwen3vl.config import TINY
from jaxablate.studies.vqa.qwen3vl.images import patches_of
from jaxablate.task import Source

LIMIT = 20  # tokens of an answer
SPEC = PictureSpec(TINY.vision, image_tokens=36)
LANGUAGE = Language.characters(TINY.image_token)
DATA = VqaData(
    source="synthetic", scenes=6, sequences=5, questions=StageQuestions(18, 54, 18), wording="short",
    max_text=192, image_tokens=36, buckets=(192,),
)  # fmt: skip
SPLITS = tuple(SEQUENCES)


def from_(data: VqaData, cache: Path, passes: int = 1) -> VqaSource:
    return open_vqa(data, LANGUAGE, SPEC, cache, eval_batch_size=7, answer_tokens=LIMIT, passes=passes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def source(cache) -> VqaSource:
    return from_(DATA, cache)


@pytest.fixture
def folder(source, tmp_path) -> Path:
    """The drawn scenes as a user's folder, to be spoiled; pictures apart."""
    for split in SPLITS:
        write_questions(tmp_path / f"{split}.jsonl", source.questions_of(split))
    (tmp_path / "images").mkdir()
    for path in source.train.pictures.paths:
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    return tmp_path


def opened(folder: Path, cache: Path, **changes) -> VqaSource:
    own = {"source": "folder", "path": str(folder), "image_root": str(folder / "images")}
    return from_(replace(DATA, **own, **changes), cache)


def told(source, row):
    """Of a row with its answer: the text before it, and it."""
    asked = row["targets"] != NOT_ASKED
    first, visual = int(np.argmax(asked)), int(np.sum(row["tokens"] == TINY.image_token))
    before = source.language.vocabulary.decode(row["tokens"][visual : first + 1])
    return before, source.language.vocabulary.decode(row["targets"][asked])


def test_it_is_a_source(source):
    assert isinstance(source, Source)


def test_a_row_is_the_picture_the_instruction_and_the_answer(source):
    for index in range(0, len(source.train), 7):
        row = source.train[index]
        question = source.questions_of("train")[row["row"]]
        assert told(source, row) == (f"{question.instruction} ", f"{question.answer}<|endoftext|>")
        assert (row["tokens"][:36] == TINY.image_token).all() and row["tokens"].shape == (36 + 192,)
        asked = np.flatnonzero(row["targets"] != NOT_ASKED)
        # Targets are the tokens behind those beside them, and stand in one piece.
        assert (np.diff(asked) == 1).all()
        assert (row["targets"][asked[:-1]] == row["tokens"][asked[1:]]).all()
        path = source.train.pictures.paths[0].parent / question.image_filename
        drawn = patches_of(np.asarray(Image.open(path)), TINY.vision)
        assert (row["patches"] == drawn.patches[None]).all() and row["grids"].tolist() == [[6, 6]]
        assert row["stage"] == question.stage


def test_training_lies_stage_by_stage_and_in_order_inside(source):
    questions = source.questions_of("train")
    stages = [question.stage for question in questions]
    assert stages == sorted(stages) and source.train.row.tolist() == list(range(len(questions)))
    for stage in (1, 2, 3):
        places = [(int(q.sequence), int(q.frame)) for q in questions if q.stage == stage]
        order = {number: i for i, number in enumerate(SEQUENCES["train"])}
        assert places == sorted(places, key=lambda place: (order[place[0]], place[1]))


def test_reader_processes_get_little_and_see_the_same(source):
    sent = pickle.dumps(source.train)
    assert len(sent) < 50_000  # no picture is among it
    there = pickle.loads(sent)[5]
    assert all((there[key] == value).all() for key, value in source.train[5].items())


def test_one_stage_alone(source):
    only = source.of_stage(3)
    assert set(only.train.stage.tolist()) == {3} and only.fingerprint == source.fingerprint
    assert len(only.train) == synthetic_questions(DATA)[2]
    assert {int(stage) for batch in only.evaluation for stage in batch["stage"]} == {3}
    assert only.evaluation[0]["tokens"].shape == source.evaluation[0]["tokens"].shape
    assert len(only.test()) == len(source.test())
    first = CohortBatches(only.train, [0], 4, steps=1, order="file")[0]["row"][0]
    assert first.tolist() == only.train.row[:4].tolist()


def test_evaluation_batches_have_one_stage_and_every_question_once(source):
    for batches, split in ((source.evaluation, "validation"), (source.test(), "test")):
        shapes = {tuple((key, value.shape) for key, value in batch.items()) for batch in batches}
        assert len(shapes) == 1
        rows = np.concatenate([batch["row"] for batch in batches])
        assert sorted(rows[rows != NO_ROW]) == list(range(len(source.questions_of(split))))
        assert NO_ROW in rows  # 7 do not divide them
        for batch in batches:
            assert len(set(batch["stage"].tolist())) == 1
    for batch in source.evaluation:
        assert (batch["targets"][batch["row"] == NO_ROW] == NOT_ASKED).all()


def test_test_prompts_end_where_the_answer_begins_and_hold_none(source):
    vocabulary = source.language.vocabulary
    for batch in source.test():
        assert "targets" not in batch
        for tokens, length, row in zip(batch["tokens"], batch["length"], batch["row"], strict=True):
            if row == NO_ROW:
                continue
            question = source.questions_of("test")[row]
            assert vocabulary.decode(tokens[36:length]) == f"{question.instruction} "
            assert (tokens[length:] == 0).all()


def test_loss_weighs_tokens_and_not_batches(source):
    """The document's example: answers of 1 and 3 tokens, losses [2] and [1, 1, 1]; 1.25, and not 1.5."""
    outputs = [
        {"nll": np.array([2.0]), "count": np.array([1])},
        {"nll": np.array([3.0]), "count": np.array([3])},
    ]
    assert source.score(outputs) == {"loss": 1.25}


def test_predictors_that_know_nothing(source):
    scores = {name: source.score(given)["loss"] for name, given in source.trivial([]).items()}
    assert np.isclose(scores["uniform"], math.log(source.language.vocabulary.size))
    assert 1 < scores["frequency"] < scores["uniform"]


def test_the_longest_third_pass_fits_tiny(source):
    full = replace(DATA, scenes=60, sequences=15)
    assert counts(60, 15)["train"] == (540, 1620, 540) == synthetic_questions(full)
    added = source.language.added_by(PASSES["short"], LIMIT)
    longest = max(len(q.instruction) + 1 for split in SPLITS for q in source.questions_of(split))
    assert longest + added + LIMIT <= 192


def test_what_is_too_long_is_dropped_and_counted(cache, source):
    short = replace(DATA, max_text=110, questions=StageQuestions(18, 36, 18))
    lengths = [len(q.instruction) + len(q.answer) + 2 for q in source.questions_of("train")]
    limit = sorted(lengths)[len(lengths) // 2]
    fits = [q for q, length in zip(source.questions_of("train"), lengths, strict=True) if length <= limit]
    left = StageQuestions(*(sum(q.stage == stage for q in fits) for stage in (1, 2, 3)))
    found = from_(replace(short, max_text=limit, questions=left), cache)
    assert len(found.train) == len(fits) and len(found.unfit["train"]) == len(lengths) - len(fits)
    for index in range(len(found.train)):
        row = found.train[index]
        assert told(found, row)[1] == f"{found.questions_of('train')[row['row']].answer}<|endoftext|>"
    # Questions of the test stay in it, unasked.
    assert len(found.questions_of("test")) == len(source.questions_of("test"))
    asked = {int(row) for batch in found.test() for row in batch["row"]} - {NO_ROW}
    assert asked.isdisjoint(found.unfit["test"]) and found.unfit["test"]
    assert any("too long" in remark for remark in found.remarks)
    with pytest.raises(UserError, match=r"data\.questions\.stage_\d=\d+: there are \d+ .* were dropped; set"):
        from_(replace(short, max_text=limit), cache)


def test_three_passes_need_more_room(cache, source):
    longest = max(len(q.instruction) + 1 for q in source.questions_of("test"))
    tight = replace(DATA, max_text=longest + LIMIT)
    assert not from_(tight, cache).unfit["test"]
    with pytest.raises(
        UserError, match=rf"test\.jsonl: none .* data\.max_text={tight.max_text} is of stage 1, 2, 3"
    ):
        from_(tight, cache, passes=3)
    assert not from_(DATA, cache, passes=3).unfit["test"]


def test_the_number_of_questions_is_what_the_config_says(cache):
    with pytest.raises(
        UserError, match=r"data\.questions\.stage_2=53: there are 54 .*; set data\.questions\.stage_2=54"
    ):
        from_(replace(DATA, questions=StageQuestions(18, 53, 18)), cache)
    with pytest.raises(UserError, match=r"data\.sequences=2: .*from 3 to 15"):
        from_(replace(DATA, sequences=2), cache)


def without_stage(file: Path, stage: int) -> None:
    kept = [line for line in file.read_text().splitlines() if json.loads(line)["stage"] != stage]
    file.write_text("".join(f"{line}\n" for line in kept))


def test_a_stage_that_trains_alone_has_questions_to_choose_its_best_by(folder, cache):
    without_stage(folder / "validation.jsonl", 2)
    assert len(opened(folder, cache).of_stage(1).evaluation)
    for regimen in ("experts", "curriculum"):
        with pytest.raises(UserError, match=r"validation\.jsonl: has no question of stage 2 that fits"):
            opened(folder, cache, regimen=regimen)
        assert opened(folder, cache, regimen=regimen, stages=(1, 3))


def test_a_run_that_nothing_is_asked_is_refused_before_it_trains(folder, cache):
    alone = {"regimen": "experts", "stages": (3,)}
    assert opened(folder, cache, **alone)
    with pytest.raises(
        UserError, match=r"test\.jsonl: none of the first data\.max_samples=2 .* is of stage 3"
    ):
        opened(folder, cache, **alone, max_samples=2)
    without_stage(folder / "test.jsonl", 3)
    with pytest.raises(UserError, match=r"test\.jsonl: none of the questions .* is of stage 3"):
        opened(folder, cache, **alone)


def test_samples_are_the_first_of_the_test(cache, source):
    few = from_(replace(DATA, max_samples=5), cache)
    assert few.questions_of("test") == source.questions_of("test")[:5]
    assert len(few.test()) <= 3


def test_a_folder_is_read_as_the_scenes_are(folder, cache, source):
    found = opened(folder, cache)
    assert found.fingerprint == source.fingerprint and found.description == source.description
    first, same = source.train[3], found.train[3]
    assert all((first[key] == same[key]).all() for key in first)


def test_identity_follows_the_content(folder, cache, source):
    questions = list(source.questions_of("test"))
    [other, *_] = [one for one in questions[0].candidates if one != questions[0].answer]
    write_questions(folder / "test.jsonl", [replace(questions[0], answer=other), *questions[1:]])
    changed = {opened(folder, cache).fingerprint}
    write_questions(folder / "test.jsonl", questions)
    path = folder / "images" / questions[0].image_filename
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    changed.add(opened(folder, cache).fingerprint)
    assert len(changed - {source.fingerprint}) == 2


def spoil(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "cmyk":
        Image.new("CMYK", (48, 48)).save(path, "JPEG")
    elif how == "one pixel wide":
        Image.new("RGB", (1, 48)).save(path, "PNG")
    elif how == "no picture":
        path.write_bytes(b"text")
    else:
        path.unlink()


@pytest.mark.parametrize(
    "how, said",
    [
        ("truncated", "cannot be read"),
        ("cmyk", "CMYK"),
        ("one pixel wide", "1 x 48 pixels"),
        ("no picture", "no image of a known format"),
        ("missing", "is not in"),
    ],
)
def test_a_broken_picture_is_one_line_before_training(folder, cache, source, how, said):
    name = source.questions_of("validation")[0].image_filename
    spoil(folder / "images" / name, how)
    with pytest.raises(UserError) as raised:
        opened(folder, cache)
    message = str(raised.value)
    assert name in message and said in message and "\n" not in message and "; " in message


def test_what_measures_nothing_is_said(folder, cache, source):
    constant = [
        replace(q, answer="none") if q.category == "INSTRUMENT_DETECTION" else q
        for q in source.questions_of("test")
    ]
    write_questions(folder / "test.jsonl", constant)
    said = "question type 'instrument_detection' are 'none': nothing is measured"
    assert sum(said in remark for remark in opened(folder, cache).remarks) == 1
    assert not any(said in remark for remark in source.remarks)


def test_pictures_that_are_trained_on_too_are_said(folder, cache, source):
    copied, original = (source.questions_of(split)[0].image_filename for split in ("test", "train"))
    (folder / "images" / copied).write_bytes((folder / "images" / original).read_bytes())
    said = "1 of the 6 pictures of test are trained on too"
    assert said in opened(folder, cache).remarks and said not in source.remarks


def test_a_character_that_is_not_known_is_one_line(folder, cache):
    lines = (folder / "train.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    (folder / "train.jsonl").write_text(
        "\n".join([json.dumps({**first, "instruction": "Größe?"}), *lines[1:]])
    )
    with pytest.raises(UserError, match="'ö'"):
        opened(folder, cache)


def test_captions_are_of_training_scenes_and_held_out_by_scene(cache, source):
    captions = open_captions(DATA, LANGUAGE, SPEC, cache, eval_batch_size=7)
    train, held_out = captions.train, captions.rows.taken(np.arange(len(captions.train), len(captions.rows)))
    assert isinstance(captions, Source)
    assert len(train) + len(held_out) == 3 * 6 * 6 and len(held_out) == 6
    assert set(train.picture.tolist()).isdisjoint(held_out.picture.tolist())
    sequences = {int(path.name[3:5]) for path in captions.rows.pictures.paths}
    assert sequences <= set(SEQUENCES["train"])
    row = train[0]
    asked = row["targets"][row["targets"] != NOT_ASKED]
    scene = scenes.scene(DATA.seed, SEQUENCES["train"][0], 0)
    assert captions.language.vocabulary.decode(asked) == scenes.captions(scene)[0] + "<|endoftext|>"
    assert (row["tokens"][:36] == TINY.image_token).all()
    scores = {name: captions.score(given)["loss"] for name, given in captions.trivial([]).items()}
    assert scores["frequency"] < scores["uniform"]
    with pytest.raises(UserError, match=r"data\.source=folder: has no captions"):
        open_captions(replace(DATA, source="folder", path="x"), LANGUAGE, SPEC, cache, eval_batch_size=7)


def test_damage_in_the_cache_is_mended(cache, source, tmp_path):
    [folder] = [path for path in (cache / "scenes").iterdir() if (path / "train.jsonl").exists()
                and len(read_questions(path / "train.jsonl", path)) == len(source.questions_of("train"))]  # fmt: skip
    (folder / "train.jsonl").write_text("{}")
    assert from_(DATA, cache).fingerprint == source.fingerprint


def test_characters_know_ascii_and_refuse_what_has_a_meaning(source):
    language = Language.characters(127)
    assert language.vocabulary.size <= 127
    text = "C: a; b\n0-9 {~}"
    assert language.vocabulary.decode(language.text(text)) == text
    with pytest.raises(UserError, match="special token"):
        language.answer("yes<|endoftext|>")
    with pytest.raises(ValueError, match="image_token=5"):
        Language.characters(5)


def test_later_passes_name_the_answers_before():
    for passes in PASSES.values():
        second = filled(passes.second, {"p1": "hook"})
        third = filled(passes.third, {"p1": "hook", "p2": "clip"})
        assert "hook" in second and third.index("hook") < third.index("clip")
        assert passes.second.count("p2") == 0
