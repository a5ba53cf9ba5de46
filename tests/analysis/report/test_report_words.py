"""What a report could be misread on: counts, runs that were lost, rates, what knows nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from jaxablate.analysis import results
from jaxablate.analysis.report import comparisons, content, tables
from jaxablate.analysis.report.document import Paragraph
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.results import Results
from jaxablate.analysis.stats.analyse import analyse
from jaxablate.study import LearningRate, Study, factorial, switch
from tests.analysis.made import RESPONSES, made_results, made_study
from tests.analysis.made_dirs import made_study_dir

FACTORS = (
    switch("rms", "model", {"model.norm": "rmsnorm"}),
    switch("swiglu", "model", {"model.ffn": "swiglu"}),
)


def small_study(seeds: int, **changes) -> Study:
    fields = {"factors": FACTORS, "arms": factorial(FACTORS), "responses": RESPONSES, "hypotheses": ()}
    return made_study(seeds, **(fields | changes))


def scene_of(found: Results) -> Scene:
    return Scene(found, analyse(found))


def test_tuning_runs_that_diverged_are_counted_beside_the_confirmatory_ones() -> None:
    study = small_study(3, learning_rate=LearningRate((3e-4, 1e-3), (100,)))
    made = made_results(study)
    calm = divergence_of(made)
    assert calm.startswith("No confirmatory run diverged; of 8 tuning runs none diverged.")
    runs = tuple(
        dataclasses.replace(run, state="diverged") if (run.arm, run.phase) == ("rms", "tuning") else run
        for run in made.runs
        if run.phase == "tuning" or run.arm != "swiglu"  # which has not been run
    )
    said = divergence_of(dataclasses.replace(made, runs=runs))
    assert said.startswith("No confirmatory run diverged; of 8 tuning runs 2 diverged (rms 2). The fewest")
    assert "swiglu" not in said and ", 3: there a share of up to 63 %" in said


def divergence_of(found: Results) -> str:
    (block,) = (b for b in content._divergence(scene_of(found)) if b is not None)
    assert isinstance(block, Paragraph)
    return block.text


def test_finished_runs_are_counted_against_all_that_were_declared() -> None:
    made = made_results(small_study(3))
    assert "12 of 12 runs finished." in content._asked(scene_of(made))
    few = dataclasses.replace(made, runs=tuple(run for run in made.runs if run.arm in ("baseline", "rms")))
    assert "6 of 12 runs finished, 6 have no result." in content._asked(scene_of(few))


@pytest.mark.parametrize(("default", "moved"), [(3e-4, True), (1e-3, False), (9e-4, True)])
def test_an_arm_with_a_rate_of_its_own_is_held_to_the_default_one(
    tmp_path: Path, default: float, moved: bool
) -> None:
    study = small_study(2, learning_rate=LearningRate((3e-4, 1e-3), (100,)))
    scene = scene_of(results.load(made_study_dir(tmp_path, study, rows=12, default_rate=default)))
    said = [point.text for point in comparisons.default_rates(scene)]
    names = [plan.name for plan in comparisons.plans(scene)]
    assert len(said) == (4 if moved else 0)
    assert ("default_rate" in names) == (default == 3e-4)  # there are curves only of what was tried
    assert all(f"at the default rate {default:g}" in text for text in said)
    if default == 9e-4:
        assert "no tuning run was made; at the tuned rate 0.001 0 of 1 diverged, mean" in said[0]


def test_what_knows_nothing_stands_below_the_arms(tmp_path: Path) -> None:
    manifest = made_study_dir(tmp_path, small_study(2), rows=12)
    for path in manifest.path.glob("*/*/summary.json"):
        summary = json.loads(path.read_text())
        summary["beside"] = {"val/loss": "val/unigram_loss", "val/macro_auroc": "val/absent"}
        summary["statistics"]["val_unigram_loss"] = {"final": 3.25}
        path.write_text(json.dumps(summary))
    table = tables.arms(scene_of(results.load(manifest)))
    last = dict(zip((column.name for column in table.columns), table.rows[-1], strict=True))
    assert last["arm"].text == "knowing nothing"
    assert last["loss"].text.startswith("3.25") and last["loss"].note == "val/unigram_loss"
    assert last["macro_auroc"].text == "–"
    plain = tables.arms(scene_of(made_results(small_study(2))))
    assert all(row[0].text != "knowing nothing" for row in plain.rows)


def test_what_can_be_done_is_said_where_runs_were_lost() -> None:
    study = small_study(3)
    lost = analyse(made_results(study, diverged={"rms": (0,)}, missing={"swiglu": (1,)}, missing_state="oom"))
    rms, swiglu = (next(w for w in lost.warnings if w.startswith(f"{arm}: 1")) for arm in ("rms", "swiglu"))
    assert rms.endswith("try a lower learning rate") and "--config.training.accumulation=" in swiglu
    assert not any("try a" in warning for warning in analyse(made_results(study)).warnings)
