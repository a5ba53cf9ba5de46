"""The ranking: the published degradations, words that know better from worse, and nobody flattered by a lost run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from jaxablate.analysis.findings import Place
from jaxablate.analysis.report import standings
from jaxablate.analysis.report.document import Table
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.results import Result, Results
from jaxablate.analysis.stats import ranking
from jaxablate.analysis.stats.analyse import analyse
from jaxablate.study import Arm, Factor, Response
from tests.analysis.made import made_study

# Table 7 of the study's document: best validation loss, one seed.
PUBLISHED = {"baseline": 1.390205, "post_norm": 1.389722, "no_position_emb": 1.390213,
             "no_layer_norm": 1.398479, "silu_ffn": 1.410135}  # fmt: skip
DEGRADED = {
    "post_norm": -0.034743,
    "no_position_emb": 0.000575,
    "no_layer_norm": 0.595164,
    "silu_ffn": 1.433602,
}
SIXTH = 0.5e-6  # both are given to six decimals
LOSS = Response("val/loss", "min", "best", scale="log")
AUROC = Response("val/macro_auroc", "max", chance=0.5)


def with_losses(losses: Mapping[str, Sequence[float | None]], **changes: Any) -> Results:
    """A study whose runs have these values of its first response, by arm and seed; None: the run diverged."""
    factor = Factor("v", "model", {arm: {"model.width": i} if i else {} for i, arm in enumerate(losses)})
    arms = tuple(Arm(arm, {"v": arm}) for arm in losses)
    n = len(next(iter(losses.values())))
    fields: dict[str, Any] = {"responses": (LOSS,), "hypotheses": (), "expectations": ()}
    study = made_study(n, factors=(factor,), arms=arms, **(fields | changes))
    runs = [
        Result(
            arm, seed, "diverged" if loss is None else "done",
            {r.name: None for r in study.responses} | {study.response().name: loss},
            statistics={"val_loss": {"min": loss}, "total_steps": 40},
        )
        for arm, own in losses.items()
        for seed, loss in enumerate(own)
    ]  # fmt: skip
    return Results(study, tuple(runs))


def places(results: Results) -> dict[str, Place]:
    return {place.arm: place for place in ranking.ranking(results).places}


def test_the_published_degradations() -> None:
    found = places(with_losses({arm: (loss,) for arm, loss in PUBLISHED.items()}))
    assert list(found) == ["post_norm", "baseline", "no_position_emb", "no_layer_norm", "silu_ffn"]
    for arm, percent in DEGRADED.items():
        change = found[arm].change
        assert change is not None and change.value == pytest.approx(percent, abs=SIXTH * 1.01)
        assert found[arm].better == "unclear" and change.low is None  # one seed: nothing is real
    labels = {arm: found[arm].label for arm in DEGRADED}
    assert labels == dict.fromkeys(DEGRADED, "MINOR") | {"post_norm": "IMPROVEMENT (MINOR)"}


@pytest.mark.parametrize(
    ("percent", "better", "label"),
    [
        (10.1, -1, "CRITICAL"), (10.0, -1, "MODERATE"), (5.1, -1, "MODERATE"), (5.0, -1, "MINOR"),
        (-5.1, -1, "IMPROVEMENT (MODERATE)"), (-10.1, -1, "IMPROVEMENT (CRITICAL)"), (0.0, -1, "MINOR"),
        (-10.1, 1, "CRITICAL"), (10.1, 1, "IMPROVEMENT (CRITICAL)"),
    ],
)  # fmt: skip
def test_labels_know_the_size_and_the_side(percent: float, better: int, label: str) -> None:
    assert ranking.label(percent, better) == label


def test_real_is_what_the_interval_over_paired_seeds_says() -> None:
    base = (1.0, 2.0, 4.0)  # seeds differ far more than arms do
    found = places(
        with_losses(
            {"base": base, "worse": (1.02, 2.03, 4.09), "noisy": (1.3, 1.9, 4.1), "better": (0.9, 1.79, 3.6)}
        )
    )
    assert {arm: place.better for arm, place in found.items()} == {
        "base": "unclear", "worse": "worse", "noisy": "unclear", "better": "better",
    }  # fmt: skip
    change = found["worse"].change
    assert change is not None and change.low is not None and 0 < change.low < change.value < change.high
    assert found["better"].label == "IMPROVEMENT (CRITICAL)"


def test_an_arm_of_which_a_run_diverged_ranks_last_without_a_change() -> None:
    found = places(
        with_losses({"base": (2.0, 2.0), "lost": (1.0, None), "gone": (None, None), "worst": (9.0, 9.0)})
    )
    assert list(found) == ["base", "worst", "lost", "gone"]
    assert found["lost"].change is None and found["gone"].change is None
    assert found["lost"].value.value == 1.0 and "1 of 2 diverged" in found["lost"].note
    assert found["gone"].value.value is None
    sound = places(with_losses({"base": (2.0, 2.0), "lost": (1.0, 1.0)}))
    assert list(sound) == ["lost", "base"]  # it would have been first


@pytest.mark.parametrize("base", [(None, None), ()])
def test_without_a_baseline_there_is_no_degradation_and_it_is_said(base: tuple[None, ...]) -> None:
    results = with_losses({"base": (None, None), "arm": (1.0, 1.1)})
    if not base:  # it was never run
        results = dataclasses.replace(results, runs=tuple(r for r in results.runs if r.arm != "base"))
    found = ranking.ranking(results)
    assert "no degradation can be stated" in found.note and "base" in found.note
    assert all(place.change is None and not place.label for place in found.places)
    assert "no degradation" in standings.commentary(Scene(results, analyse(results)), found)[0]
    assert not ranking.ranking(with_losses({"base": (1.0, 1.0), "arm": (1.0, 1.1)})).note


def test_the_first_response_is_ranked_whatever_else_was_recorded() -> None:
    values = {"base": (0.70, 0.72, 0.74), "arm": (0.77, 0.79, 0.82)}
    results = with_losses(values, responses=(AUROC, LOSS))
    runs = [  # the loss says the opposite
        dataclasses.replace(run, statistics={"val_loss": {"min": {"base": 1.0, "arm": 2.0}[run.arm]}})
        for run in results.runs
    ]
    found = ranking.ranking(dataclasses.replace(results, runs=tuple(runs)))
    assert (found.of, found.goal, found.scale) == ("macro_auroc", "higher", "raw")
    assert [place.arm for place in found.places] == ["arm", "base"]
    change = found.places[0].change
    assert change is not None and change.value == pytest.approx(100 * (0.22 / 3) / 0.72)
    assert change.low is not None and found.places[0].label == "IMPROVEMENT (CRITICAL)"
    assert found.places[0].means["val_loss.min"] == 2.0  # it is there to be shown
    swapped = with_losses(values, responses=(LOSS, AUROC))
    found = ranking.ranking(swapped)
    assert (found.of, found.scale, found.places[0].arm) == ("loss_best", "log", "base")


def test_what_counts_as_ratios_and_what_is_called_the_best_loss() -> None:
    raw = Response("val/loss", "min")
    assert ranking.scale_of(raw) == ranking.scale_of(Response("val/copy_loss", "min")) == "log"
    assert ranking.scale_of(Response("val/nrmse", "min", scale="log")) == "log"
    assert ranking.scale_of(Response("val/nrmse", "min")) == ranking.scale_of(AUROC) == "raw"
    assert ranking.is_best_loss(LOSS) and not ranking.is_best_loss(raw) and not ranking.is_best_loss(AUROC)
    timed = made_study(5, responses=(Response("val/x", "max", "time_to", target=1.0), raw))
    assert ranking.ranked_response(timed).name == "loss"


def test_an_arm_with_a_lost_run_is_never_called_the_best() -> None:
    lost = {"base": (1.50, 1.52, 1.51), "no_norm": (1.2, None, None), "worse": (1.7, 1.71, 1.69)}
    results = with_losses(lost)
    scene = Scene(results, analyse(results))
    (text,) = standings.commentary(scene, scene.analysis.ranking)
    assert "the best arm, of the arms without a run that diverged, is base (1.51" in text
    assert "the worst worse (" in text
    assert "no_norm (2 of 3 diverged; mean of the survivor 1.2)" in text
    sound = with_losses(lost | {"no_norm": (1.2, 1.21, 1.2)})
    scene = Scene(sound, analyse(sound))
    assert "the best arm is no_norm" in standings.commentary(scene, scene.analysis.ranking)[0]
    none = with_losses({"base": (1.5, None), "no_norm": (1.2, None)})
    scene = Scene(none, analyse(none))
    assert "No arm is called the best" in standings.commentary(scene, scene.analysis.ranking)[0]


def test_the_best_loss_has_the_promised_column_once() -> None:
    def names(response: Response) -> list[str]:
        results = with_losses({"base": (1.0, 1.1), "arm": (1.2, 1.1)}, responses=(response,))
        table = standings.blocks(Scene(results, analyse(results)))[0]
        assert isinstance(table, Table)
        return [column.name for column in table.columns]

    assert names(LOSS) == ["Ablation", "Steps", "Best Val", "Δ", "label"]
    assert names(AUROC) == ["Ablation", "Steps", "Best Val", "macro_auroc", "Δ", "label"]


def test_the_words_claim_no_order_that_the_interval_does_not_support() -> None:
    results = with_losses({"base": (1.0, 2.0, 4.0), "worse": (1.02, 2.03, 4.09), "noisy": (1.3, 1.9, 4.1)})
    scene = Scene(results, analyse(results))
    (text,) = standings.commentary(scene, scene.analysis.ranking)
    really, _, rest = text.partition("Not told apart from the baseline: ")
    assert "Really worse than the baseline, by the interval: worse (" in really and "noisy (+" not in really
    assert rest.startswith("noisy.")
