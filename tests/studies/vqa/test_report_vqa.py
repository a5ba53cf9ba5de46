"""The study's pages: the guide's files field for field, statistics as others compute them, no claim from chance."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar

from jaxablate import disk
from jaxablate.analysis import results
from jaxablate.analysis.findings import Estimate
from jaxablate.analysis.report.document import Alert, Block, Table
from jaxablate.analysis.report.extra import Extra
from jaxablate.analysis.stats.analyse import analyse
from jaxablate.arms import Arm
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.studies.vqa import report as pages
from jaxablate.studies.vqa.metrics import Answer
from jaxablate.studies.vqa.report import compare, published, runs, schema, tables
from jaxablate.studies.vqa.results import Answers, Kept, examples, keep
from jaxablate.study import Factor, Response, Study
from tests.analysis.made import made_study
from tests.analysis.made_dirs import made_study_dir

IMAGES, SEQUENCES = 120, 8
TYPES = ("procedure", "tools", "tool_count", "advice")
STAGE = {"procedure": 1, "tools": 2, "tool_count": 2, "advice": 3}
ANSWERS = {
    "procedure": ["biopsy", "suture", "ablation"],
    "tools": ["grasper; hook", "hook; grasper", "scissors", "none"],
    "tool_count": ["0", "1", "2", "3"],
    "advice": ["retract", "stop", "go on"],
}
RUN_FIELDS = ["total", "correct", "accuracy", "precision", "recall", "f1", "by_stage", "by_question_type",
              "predictions", "errors"]  # fmt: skip
QUESTIONS = [
    Kept(
        row=4 * image + i,
        question=f"What about the {kind} in this picture?",
        answer=ANSWERS[kind][(image * 7 + i + image // 5) % len(ANSWERS[kind])],
        question_type=kind,
        category=kind.upper(),
        is_multi_label=kind == "tools",
        stage=STAGE[kind],
        sequence=f"seq_{image % SEQUENCES}",
        image_id=f"i{image}",
        image_filename=f"i{image}.png",
    )
    for image in range(IMAGES)
    for i, kind in enumerate(TYPES)
]
SINGLE = ("exp1_random", "exp2_ordered", "exp4_curriculum")
JOBS = (*SINGLE, "exp3_stage1", "exp3_stage2", "exp3_stage3", "exp5_three_pass")


def declared(arms: Sequence[str], seeds: int = 3) -> Study:
    levels: dict[str, Any] = {arm: {"model.name": arm} if i else {} for i, arm in enumerate(arms)}
    return made_study(
        seeds,
        name="vqa",
        title="Surgical VQA",
        factors=(Factor("experiment", "model", levels),),
        arms=tuple(Arm(arm, {"experiment": arm} if i else {}) for i, arm in enumerate(arms)),
        responses=(Response("val/exact", "max"),),
        hypotheses=(),
        expectations=(),
        extra_report="jaxablate.studies.vqa.report:write",
    )


def said(arm: str, seed: int, share: float, questions: Sequence[Kept] = QUESTIONS) -> list[Answer]:
    """Answers of which a share is right; the same pictures are easy for everybody."""
    easy = np.random.default_rng(0).random(IMAGES)
    own = np.random.default_rng([seed, *map(ord, arm)]).standard_normal(4 * IMAGES)
    right = np.repeat(easy, 4) + 0.15 * own < share
    return [q.answer if right[q.row] else "something else" for q in questions]


def picture(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 255, (48, 48, 3), np.uint8)


def made(where: Path, shares: Mapping[str, float], seeds: int = 3, **about: Any) -> Manifest:
    study = declared(tuple(shares), seeds)
    manifest = made_study_dir(where, study, rows=2, **about)
    chosen = {QUESTIONS[place].row: picture(place) for place in examples(QUESTIONS, 3)}
    for run in manifest.runs:
        place = manifest.run_dir(run)
        if not place.summary.exists():
            continue
        data: dict[str, Any] = {"source": "synthetic", "regimen": "single", "stages": [1, 2, 3]}
        questions = QUESTIONS
        if run.arm.startswith("exp3_stage"):
            stage = int(run.arm[-1])
            data |= {"regimen": "experts", "stages": [stage]}
            questions = [q for q in QUESTIONS if q.stage == stage]  # no expert is asked about another stage
        passes = {"p1": said(run.arm, run.seed, shares[run.arm], questions)}
        if "three_pass" in run.arm:
            passes |= {
                name: said(run.arm, 100 * k + run.seed, shares[run.arm]) for k, name in ((2, "p2"), (3, "p3"))
            }
        kept = keep(questions, passes, rows=[q.row for q in questions], pictures=chosen)
        np.savez(place.predictions, allow_pickle=False, **kept)  # pyright: ignore[reportArgumentType]
        disk.write_json(place.config, {"seed": run.seed, "data": data})
    return manifest


def evaluation(where: Path, shares: Mapping[str, float], seeds: int = 3, **about: Any) -> runs.Evaluation:
    return runs.read(results.load(made(where, shares, seeds, **about)))


ALL = dict(zip(JOBS, (0.5, 0.5, 0.55, 0.9, 0.6, 0.3, 0.8), strict=True))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> runs.Evaluation:
    return evaluation(tmp_path_factory.mktemp("jobs"), ALL)


@pytest.fixture(scope="module")
def pairs(jobs: runs.Evaluation) -> dict[tuple[str, str], compare.Comparison]:
    found = compare.compare(jobs, compare.resample(jobs, "image"))
    return {(one.first, one.second): one for one in found}


# ------------------------------------------------------------------------------- what a run keeps


def test_answers_come_back_as_they_were_kept(tmp_path):
    passes = {"p1": ["a", None, "", "ü; b"], "p2": ["a", "x", "", ""]}
    arrays = keep(QUESTIONS[:4], passes, errors={1: "its picture is missing"}, pictures={2: picture(0)})
    np.savez(tmp_path / "p.npz", allow_pickle=False, **arrays)  # pyright: ignore[reportArgumentType]
    found = Answers.read(tmp_path / "p.npz")
    assert list(found.questions) == QUESTIONS[:4]
    assert found.passes == {"p1": ("a", None, "", "ü; b"), "p2": ("a", None, "", "")}
    assert found.errors == ("", "its picture is missing", "", "")
    assert found.final == found.passes["p2"]
    assert np.array_equal(found.pictures[2], picture(0))


def test_large_pictures_are_kept_small():
    wide = np.zeros((300, 1200, 3), np.uint8)
    assert keep(QUESTIONS[:1], {"p1": ["a"]}, pictures={0: wide})["picture_0"].shape == (40, 160, 3)


def test_examples_are_of_all_types_and_the_same_for_all():
    chosen = examples(QUESTIONS, 8)
    assert sorted(QUESTIONS[place].question_type for place in chosen) == sorted(2 * TYPES)
    assert chosen == examples(list(QUESTIONS), 8)
    assert examples([]) == []


@pytest.mark.parametrize("damage", ["torn", "gone", "of something else"])
def test_answers_that_cannot_be_read_are_one_line(tmp_path, damage):
    path = tmp_path / "p.npz"
    if damage != "gone":
        np.savez(path, allow_pickle=False, **keep(QUESTIONS[:2], {"p1": ["a", "b"]}))  # pyright: ignore[reportArgumentType]
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:100])
    if damage == "of something else":
        np.savez(path, allow_pickle=False, prediction=np.zeros(3))
    with pytest.raises(UserError, match=r"train .* again") as caught:
        Answers.read(path)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------- joining experts


def test_experts_of_a_stage_each_are_joined_by_the_stage_of_the_question(jobs):
    assert [one.name for one in jobs.experiments] == [*SINGLE, "exp3", "exp5_three_pass"]
    (joined,) = (one for one in jobs.experiments if one.name == "exp3")
    assert joined.arms == JOBS[3:6]
    assert len(joined.runs) == 3
    for run in joined.runs:
        for stage in (1, 2, 3):
            own = [i for i, q in enumerate(QUESTIONS) if q.stage == stage]
            arm = f"exp3_stage{stage}"
            expected = said(arm, run.seed, ALL[arm], [QUESTIONS[i] for i in own])
            assert [run.answers.final[i] for i in own] == expected


def test_questions_without_an_expert_are_wrong_and_listed(tmp_path):
    found = evaluation(tmp_path, {arm: ALL[arm] for arm in JOBS if arm != "exp3_stage3"}, seeds=2)
    (joined,) = (one for one in found.experiments if one.name == "exp3")
    lost = [i for i, q in enumerate(QUESTIONS) if q.stage == 3]
    assert not joined.hits[:, lost].any()
    assert any(f"exp3, seed 0: {IMAGES} questions of stage 3 had no expert" in note for note in found.notes)
    data = schema.result_json(joined.runs[0], found)
    assert data["total"] == len(QUESTIONS)
    assert [one["index"] for one in data["errors"]] == [QUESTIONS[i].row for i in lost]
    assert {one["error"] for one in data["errors"]} == {"no expert of stage 3"}


def test_experts_are_not_judged_before_all_of_them_are_done(tmp_path):
    found = evaluation(tmp_path, ALL, seeds=2, missing={"exp3_stage3": (0,)})
    (joined,) = (one for one in found.experiments if one.name == "exp3")
    assert joined.seeds == (1,) and joined.missing == 1
    assert "exp3, seed 0: left out: exp3_stage3 not finished" in found.notes


def test_what_the_data_leaves_open_is_said_first(tmp_path):
    manifest = made(tmp_path, dict.fromkeys(SINGLE, 0.5), seeds=1)
    place = manifest.run_dir(manifest.runs[0])
    assert not runs.read(results.load(manifest)).notes
    kept = keep(
        QUESTIONS, {"p1": [q.answer for q in QUESTIONS]}, remarks=("3 pictures of test are trained on too",)
    )
    np.savez(place.predictions, allow_pickle=False, **kept)  # pyright: ignore[reportArgumentType]
    found = runs.read(results.load(manifest))
    (alert,) = tables.before(found)
    assert isinstance(alert, Alert) and alert.items == ("3 pictures of test are trained on too",)


def test_runs_with_other_questions_are_left_out(tmp_path):
    manifest = made(tmp_path, dict.fromkeys(SINGLE, 0.5), seeds=2)
    place = manifest.run_dir(next(run for run in manifest.runs if run.arm == SINGLE[1]))
    others = [Kept(**{**q.__dict__, "answer": "changed"}) for q in QUESTIONS]
    np.savez(place.predictions, allow_pickle=False, **keep(others, {"p1": ["a"] * len(others)}))  # pyright: ignore[reportArgumentType]
    found = runs.read(results.load(manifest))
    assert [(one.name, one.missing) for one in found.experiments] == [
        (SINGLE[0], 0),
        (SINGLE[1], 1),
        (SINGLE[2], 0),
    ]
    assert any("exp2_ordered, seed 0: left out: it was asked other questions" in note for note in found.notes)


# -------------------------------------------------------------------------------------- statistics


def test_mcnemar_is_statsmodels_exact_one(jobs, pairs):
    one = pairs["exp1_random", "exp5_three_pass"]
    hits = {e.name: e.hits for e in jobs.experiments}
    for i, seed in enumerate((0, 1, 2)):
        a, b = hits["exp1_random"][i], hits["exp5_three_pass"][i]
        table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        assert one.mcnemar[seed].p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert compare.Discordant(0, 0).p == 1
    assert compare.Discordant(0, 6).p == pytest.approx(2 / 64)


def test_differences_are_those_of_the_accuracies_and_intervals_hold_them(jobs, pairs):
    mean = {one.name: one.hits.mean() for one in jobs.experiments}
    for (first, second), one in pairs.items():
        for found in (one.by_image, one.by_sequence, one.by_seed):
            assert found.value == pytest.approx(mean[first] - mean[second])
            assert found.low is not None and found.high is not None and found.value is not None
            assert found.low <= found.value <= found.high
        assert sum(one.sequences) == SEQUENCES
        assert one.by_image.p is not None and one.adjusted >= one.by_image.p


def test_a_large_difference_is_told_apart_and_chance_is_not(pairs):
    assert pairs["exp1_random", "exp5_three_pass"].verdict == "below"
    assert pairs["exp1_random", "exp2_ordered"].verdict == "not told apart"
    said = " ".join(compare.support(list(pairs.values()), SEQUENCES, 3))
    assert "exp5_three_pass is above exp1_random by " in said
    assert "exp2_ordered is above" not in said
    assert "exp1_random is above" not in said
    assert "other pictures like these" not in said


@pytest.mark.parametrize("unit", ["image", "sequence"])
def test_resampling_keeps_what_belongs_together(jobs, unit):
    """Its spread is that of the units' own accuracies, which is wider than that of single questions."""
    drawn = compare.resample(jobs, unit, draws=4000)
    one = next(e for e in jobs.answered if e.name == "exp1_random")
    clusters = jobs.clusters(unit)
    of_unit = np.array([one.hits[0, clusters == c].mean() for c in range(drawn.units)])
    expected = of_unit.std() / math.sqrt(drawn.units)
    assert drawn.units == (IMAGES if unit == "image" else SEQUENCES)
    assert drawn.accuracy[one.name][:, 0].std() == pytest.approx(expected, rel=0.06)
    if unit == "image":
        independent = one.hits[0].std() / math.sqrt(one.hits.shape[1])
        assert expected > 1.5 * independent


def test_accuracy_of_a_part_is_of_that_part(jobs):
    own = jobs.stages["Stage 1"]
    drawn = compare.resample(jobs, "image", 200, own)
    one = jobs.answered[0]
    assert compare.accuracy(one, drawn).value == pytest.approx(one.hits[:, own].mean())


def comparison(apart: float, adjusted: float, sequence: tuple[float, float] | None) -> compare.Comparison:
    low, high = sequence or (None, None)
    return compare.Comparison(
        "a", "b", Estimate(apart, apart - 0.01, apart + 0.01, p=adjusted), Estimate(apart, low, high),
        Estimate(apart), (3, 0, 1), {}, adjusted,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("apart", "adjusted", "sequence", "verdict"),
    [
        (0.1, 0.01, (0.05, 0.2), "above"),
        (-0.1, 0.01, (-0.2, -0.05), "below"),
        (0.1, 0.01, (-0.05, 0.2), "not told apart"),
        (0.1, 0.06, (0.05, 0.2), "not told apart"),
        (0.1, 0.01, None, "above"),
    ],
)
def test_a_verdict_needs_all_of_its_evidence(apart, adjusted, sequence, verdict):
    assert comparison(apart, adjusted, sequence).verdict == verdict


def test_what_few_sequences_and_seeds_cannot_say_is_said():
    few = compare.support([comparison(0.1, 0.01, None)], sequences=4, seeds=1)
    assert (
        few[0]
        == "a is above b by 10.00 points (9.00 to 11.00; p 0.010 after Holm), in 3 of 4 sequences, and below it in 1."
    )
    assert "with 4 sequences no test can speak of other sequences" in few[1]
    assert few[2] == "With 1 seed nothing here speaks of other trainings."
    assert compare.support([comparison(0.1, 0.5, None)], 8, 3) == [
        "No ranking is supported: of 1 pair none is told apart (largest difference 10.00 points)."
    ]
    assert len(compare.support([comparison(0.1, 0.01, None)], 8, 3)) == 1
    assert "Nothing can be compared" in compare.support([], 8, 3)[0]


def test_the_published_spread_supports_no_ranking():
    found = published.spread(published.KVASIR, published.KVASIR_QUESTIONS)
    assert 100 * found.range == pytest.approx(0.51, abs=0.005)
    assert 100 * found.se == pytest.approx(0.28, abs=0.005)
    assert not found.supported
    assert "No ranking is supported" in found.sentence()
    tuned = {"zero-shot": published.KVASIR_ZERO_SHOT, **published.KVASIR}
    assert published.spread(tuned, published.KVASIR_QUESTIONS).supported  # tuning does something
    assert published.spread({"a": 5, "b": 5}, 10).p == 1


# ------------------------------------------------------------------------------------------- pages


def test_the_result_file_has_exactly_the_guides_fields(jobs):
    by_name = {one.name: one for one in jobs.experiments}
    for name, more in (("exp1_random", set()), ("exp5_three_pass", {"stage1_pred", "stage2_pred", "stage3_pred",
                                                                   "final_prediction"})):  # fmt: skip
        run = by_name[name].runs[1]
        data = json.loads(json.dumps(disk.plain(schema.result_json(run, jobs)), allow_nan=False))
        assert list(data) == RUN_FIELDS
        assert data["total"] == len(QUESTIONS) == len(data["predictions"])
        assert data["correct"] == sum(one["correct"] for one in data["predictions"]) == run.marks.exact.sum()
        assert data["accuracy"] == pytest.approx(100 * data["correct"] / data["total"])
        for groups in (data["by_stage"], data["by_question_type"]):
            assert sum(one["total"] for one in groups.values()) == data["total"]
            assert sum(one["correct"] for one in groups.values()) == data["correct"]
        passes = {"stage1_pred", "stage2_pred", "stage3_pred", "final_prediction"}
        assert set(data["predictions"][0]) & passes == more
        if more:
            assert all(
                p["final_prediction"] == p["stage3_pred"] == p["prediction"] for p in data["predictions"]
            )


def titled(blocks: Sequence[Block], title: str) -> Table:
    (found,) = (block for block in blocks if isinstance(block, Table) and block.title.startswith(title))
    return found


def test_tables_say_what_the_runs_did(jobs, pairs):
    images = compare.resample(jobs, "image", 200)
    blocks = list(tables.blocks(jobs, list(pairs.values()), images))
    rows = {row[0].text: row for row in titled(blocks, "Experiments").rows}
    one = next(e for e in jobs.answered if e.name == "exp4_curriculum")
    assert rows[one.name][2].text == tables.percent(one.hits.mean())
    assert rows["exp3"][0].note == "exp3_stage1 + exp3_stage2 + exp3_stage3"
    assert "constant answer" in rows
    assert [row[0].text for row in titled(blocks, "Three passes").rows] == ["exp5_three_pass"]
    assert {row[0].text for row in titled(blocks, "By type").rows} == set(TYPES)
    assert {row[0].text for row in titled(blocks, "By stage").rows} == {"Stage 1", "Stage 2", "Stage 3"}
    assert len(titled(blocks, "McNemar").rows) == len(jobs.answered) - 1
    assert not [
        b for b in blocks if isinstance(b, Table) and b.title == "Published"
    ]  # these scenes are not theirs


@pytest.mark.parametrize(
    ("accuracy", "constant", "different", "words"),
    [
        (0.6, 0.5, 3, ""),
        (0.5, 0.5, 3, "nothing was measured"),
        (0.4, 0.5, 3, "below the constant answer"),
        (1.0, 1.0, 1, "one answer alone"),
    ],
)
def test_an_accuracy_that_measures_nothing_says_so(accuracy, constant, different, words):
    assert words in tables.standing(accuracy, constant, different)
    assert bool(words) == bool(tables.standing(accuracy, constant, different))


def test_tables_as_csv_are_whole(jobs, pairs):
    found = list(csv.DictReader(io.StringIO(tables.comparisons_csv(list(pairs.values())))))
    assert len(found) == 3 * len(pairs)
    assert tuple(found[0]) == tables.COLUMNS
    rows = list(csv.DictReader(io.StringIO(tables.groups_csv(jobs))))
    assert len(rows) == len(jobs.answered) * 3 * (1 + 3 + len(TYPES))
    (own,) = (r for r in rows if (r["experiment"], r["seed"], r["group"]) == ("exp2_ordered", "1", "Stage 3"))
    run = next(e for e in jobs.answered if e.name == "exp2_ordered").runs[1]
    assert float(own["exact"]) == pytest.approx(run.marks.exact[jobs.stages["Stage 3"]].mean())


def test_the_whole_report_is_written_from_the_run_directories(tmp_path):
    shares = {name: ALL[name] for name in ("exp1_random", "exp5_three_pass")}
    manifest = made(tmp_path, shares, seeds=2, missing={"exp1_random": (1,)})
    (where := tmp_path / "report" / "figures").mkdir(parents=True)
    found = results.load(manifest)
    written = pages.write(found, analyse(found), where.parent)
    files = [one.path.relative_to(where.parent).as_posix() for one in written if isinstance(one, Extra)]
    assert files == [
        "figures/by_stage.png", "figures/passes.png", "figures/examples.png", "comparisons.csv", "groups.csv",
        "results_exp1_random_seed0.json", "results_exp5_three_pass_seed0.json", "results_exp5_three_pass_seed1.json",
    ]  # fmt: skip
    assert sorted(files) == sorted(
        p.relative_to(where.parent).as_posix() for p in where.parent.rglob("*") if p.is_file()
    )
    (alert,) = (block for block in written if isinstance(block, Alert))
    assert alert.items == ("exp1_random: 1 seed without a result",)


def test_a_study_without_a_finished_run_has_a_page(tmp_path):
    manifest = made(tmp_path, dict.fromkeys(SINGLE, 0.5), seeds=1, missing=dict.fromkeys(SINGLE, (0,)))
    found = results.load(manifest)
    alert, text = pages.write(found, analyse(found), tmp_path)
    assert isinstance(alert, Alert)
    assert "No experiment has a finished run" in str(text)
