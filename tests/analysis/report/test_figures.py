"""Figures of a study: what is drawn is what was found, names do not cover each other, captions say what bars are."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from jaxablate.analysis import plots, results
from jaxablate.analysis.plots import PALETTE
from jaxablate.analysis.report import figures, lineplots, overview, rowplots
from jaxablate.analysis.report.scene import PLAIN, Scene
from jaxablate.analysis.results import Results
from jaxablate.analysis.stats.analyse import analyse
from jaxablate.study import Arm, Factor
from tests.analysis.made import RESPONSES, made_results, made_study, tuned_study
from tests.analysis.made_dirs import made_study_dir


def scene_of(found: Results) -> Scene:
    return Scene(found, analyse(found))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The 2^3 study with three seeds, of which some diverged and one is missing."""
    where = tmp_path_factory.mktemp("scene")
    lost = {"rms_only": (2,), "optimized_full": (0, 1)}
    return scene_of(
        results.load(
            made_study_dir(where, made_study(3), rows=24, diverged=lost, missing={"flash_rms": (1,)})
        )
    )


def drawn(plan: figures.Plan) -> Figure:
    figure = plots.new_figure(*plan.size)
    plan.draw(figure)
    figure.draw_without_rendering()
    return figure


def plans(scene: Scene) -> dict[str, figures.Plan]:
    return {plan.name: plan for plan in figures.plans(scene)}


def texts(figure: Figure) -> list[Text]:
    return [
        t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_visible() and t.get_text().strip()
    ]


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of labels beside the axes that cover each other by more than a hair."""
    boxes = [
        # An annotation's own extent has its arrow in it; that of the text alone does not.
        (t.get_text(), Text.get_window_extent(t))
        for axes in figure.axes
        for t in axes.texts
    ]
    return [
        (a, b) for (a, one), (b, two) in itertools.combinations(boxes, 2)
        if min(one.x1, two.x1) - max(one.x0, two.x0) > 1 and min(one.y1, two.y1) - max(one.y0, two.y0) > 2
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------- every figure


def test_every_kind_of_figure_is_there(scene: Scene, tmp_path: Path) -> None:
    tuned = results.load(made_study_dir(tmp_path, tuned_study(3), rows=12))
    found = plans(scene).keys() | plans(scene_of(tuned)).keys()
    assert found == {
        "arms_macro_auroc", "arms_loss", "effects_macro_auroc", "effects_loss", "contrasts_macro_auroc",
        "contrasts_loss", "interactions_macro_auroc", "curve_val_macro_auroc", "curve_val_loss",
        "curve_train_loss", "pareto", "reached_macro_auroc_time", "divergence", "learning_rates",
    }  # fmt: skip
    nothing = made_results(made_study(3), missing={arm.name: (0, 1, 2) for arm in made_study(3).arms})
    assert not plans(scene_of(nothing))


def test_captions_say_what_the_bars_are_and_of_how_many_seeds(scene: Scene) -> None:
    two = scene_of(made_results(made_study(2)))
    for plan in plans(scene).values():
        assert re.search(r"[Bb]ars:|[Bb]ands:|[Nn]o intervals|Lines: exact", plan.caption), plan.name
        assert plan.alt.endswith(".") and len(plan.alt) > 40
    caption = plans(scene)["arms_loss"].caption
    assert "95 % intervals of the mean (Student t over seeds), n = 3 seeds" in caption
    assert "rms_only 2 of 3, 1 diverged" in plans(scene)["arms_loss"].caption
    for name in ("arms_loss", "effects_loss"):
        assert "2 seeds: no interval below 3" in plans(two)[name].caption


@pytest.mark.parametrize(
    "name",
    ["arms_macro_auroc", "curve_val_macro_auroc", "pareto", "reached_macro_auroc_time", "contrasts_loss"],
)
def test_labels_do_not_cover_each_other(scene: Scene, name: str) -> None:
    assert overlaps(drawn(plans(scene)[name])) == []


def test_the_overview_of_many_arms_can_be_read(tmp_path: Path) -> None:
    factor = Factor("v", "model", {f"v{i}": {"model.width": i} if i else {} for i in range(13)})
    arms = tuple(Arm(f"without_part_{i}", {"v": f"v{i}"}) for i in range(13))
    study = made_study(3, factors=(factor,), arms=arms, hypotheses=(), responses=RESPONSES[1:])
    figure = overview._draw(scene_of(results.load(made_study_dir(tmp_path, study, rows=12))))
    figure.draw_without_rendering()
    titles = [axes.get_title("left") for axes in figure.axes if axes.get_visible()]
    assert len(set(titles)) == len(titles) >= 8
    for words in (
        "change from",
        "Time",
        "against time",
        "final training loss",
        "Generalisation gap",
        "Training loss",
    ):
        assert any(words in title for title in titles), words
    assert overlaps(figure) == []


def test_covering_labels_would_be_seen() -> None:
    figure = plots.new_figure(4, 3)
    axes = figure.subplots()
    axes.text(0.5, 0.5, "one")
    axes.text(0.5, 0.5, "two")
    figure.draw_without_rendering()
    assert overlaps(figure) == [("one", "two")]


def test_equal_scenes_give_equal_files(scene: Scene) -> None:
    plan = plans(scene)["arms_loss"]
    first, second = figures.render(plan), figures.render(plan)
    assert (first.png, first.svg, first.pdf) == (second.png, second.svg, second.pdf)
    assert first.png != figures.render(plans(scene)["arms_macro_auroc"]).png
    assert first.png.startswith(b"\x89PNG") and b"<svg" in first.svg and first.pdf.startswith(b"%PDF")


def test_a_dollar_in_a_name_is_a_dollar() -> None:
    found = scene_of(made_results(made_study(3, title=r"costs $\bad{ and $5"), rng=1))
    assert overview.overview(found).startswith(b"\x89PNG")


# --------------------------------------------------------------------------------------- truth of lines


def test_an_arm_has_one_colour_everywhere(scene: Scene) -> None:
    assert list(scene.colors.values()) == list(PALETTE)
    figure = drawn(plans(scene)["curve_val_macro_auroc"])
    lines = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    assert all(lines[arm] == color for arm, color in scene.colors.items() if arm in lines)
    assert "baseline" in lines


def test_of_many_arms_the_baseline_and_the_most_different_are_coloured() -> None:
    factor = Factor("v", "model", {f"v{i}": {"model.width": i} if i else {} for i in range(12)})
    arms = tuple(Arm(f"arm{i}", {"v": f"v{i}"}) for i in range(12))
    study = made_study(3, factors=(factor,), arms=arms, hypotheses=())
    many = scene_of(made_results(study, effects={"v=v11": 0.1, "v=v5": -0.1}, noise=0.001))
    assert len(many.coloured) == len(PALETTE) and {"arm0", "arm11", "arm5"} <= set(many.coloured)
    assert many.colors["arm11"] != PLAIN and list(many.colors.values()).count(PLAIN) == 4
    assert "the other 4 are grey" in plans(many)["pareto"].caption


def test_the_mean_curve_is_of_the_runs_that_finished(scene: Scene) -> None:
    mean = scene.mean_curve("val/macro_auroc", "rms_only")
    assert mean is not None and mean.runs == 2 and mean.low is None
    values = [
        curve.values[-1] for run, curve in scene.series("val/macro_auroc", "rms_only") if run.state == "done"
    ]
    assert mean.mean[-1] == pytest.approx(np.mean(values))
    whole = scene.mean_curve("val/macro_auroc", "baseline")
    assert whole is not None and whole.runs == 3 and whole.high is not None
    spread = np.std([c.values[-1] for _, c in scene.series("val/macro_auroc", "baseline")], ddof=1)
    assert (whole.high - whole.mean)[-1] == pytest.approx(
        4.302653 * spread / np.sqrt(3), rel=1e-6
    )  # t of 2 degrees of freedom
    labels = [t.get_text() for t in drawn(plans(scene)["curve_val_macro_auroc"]).axes[0].texts]
    assert "rms_only (2 of 3)" in labels and "baseline" in labels


def test_a_forest_calls_a_higher_loss_worse_and_says_where_better_lies() -> None:
    found = scene_of(made_results(made_study(5), effects={"rms": -0.06, "swiglu": 0.06}, noise=0.002))
    figure = drawn(plans(found)["effects_loss"])
    names, beside = figure.axes[0].get_yticklabels(), figure.axes[0].texts
    said = {name.get_text(): text.get_text() for name, text in zip(names, beside, strict=True)}
    assert "worse" in said["rms"] and said["rms"].startswith("+")
    assert "better" in said["swiglu"] and said["swiglu"].startswith("−")
    assert "← lower is better" in figure.axes[0].get_xlabel()
    assert "higher is better →" in drawn(plans(found)["effects_macro_auroc"]).axes[0].get_xlabel()
    assert rowplots.JUDGED["better"] != rowplots.JUDGED["worse"]


def test_the_share_that_reached_a_target_counts_the_censored() -> None:
    # Five runs: three reach it at 10, 20, 20; one stopped at 15 without; one went to the end without.
    runs = [(10.0, 50, False), (20.0, 50, False), (20.0, 50, False), (None, 15, False), (None, 50, False)]
    steps, shares = lineplots.reached_share(runs, 50)
    assert steps == [0, 10, 20, 50]
    assert shares == pytest.approx([0, 0.2, 1 - 0.8 * (1 / 3), 1 - 0.8 / 3])  # Kaplan-Meier by hand
    diverged = [*runs[:3], (None, 15, True), runs[4]]
    assert lineplots.reached_share(diverged, 50)[1][-1] == pytest.approx(3 / 5)  # it stays at risk
    assert lineplots.reached_share([(None, 50, False)], 50) == ([0, 50], [0, 0])


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.01, 0.08))
def test_labels_are_spread_in_order_and_apart(wanted: list[float], gap: float) -> None:
    found = lineplots.spread(wanted, gap, 0.0, 1.0)
    ordered = [place for _, place in sorted(zip(wanted, found, strict=True), key=lambda pair: pair)]
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(sorted(found)))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in found)
    assert ordered == pytest.approx(sorted(found)) or len(set(wanted)) < len(wanted)
    if all(b - a >= gap for a, b in itertools.pairwise(sorted(wanted))):
        assert found == pytest.approx(wanted)
