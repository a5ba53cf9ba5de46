"""`ablation_comparison.png`: curves, means with intervals, the ranking, effects and speed of a study on one page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxablate.analysis import plots, sentences
from jaxablate.analysis.plots import INK, MUTED, encode, metric_name, new_figure
from jaxablate.analysis.report import lineplots, rowplots, standingplots
from jaxablate.analysis.report.figures import ROWS, forest_of
from jaxablate.analysis.report.scene import Scene, drawn_responses
from jaxablate.analysis.report.standingplots import Axis, of_response, of_statistics
from jaxablate.analysis.stats.ranking import ranked_response
from jaxablate.analysis.stats.recorded import BEST_VAL, FINAL_TRAIN, HOURS, LATE_GAP

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, LOWEST = 11.5, 3.3  # inches: of the page, and of a row of it


@dataclass(frozen=True)
class _Panel:
    title: str
    draw: Callable[[Axes, str], None]
    rows: int = 0  # arms or effects that need a line each

    @property
    def height(self) -> float:
        return max(LOWEST, 0.9 + 0.3 * self.rows)


def overview(scene: Scene) -> bytes:
    """The page as a PNG, two panels in a row; what has not been measured has none."""
    with plots.plain_text():
        return encode(_draw(scene), "png")


def _draw(scene: Scene):
    from matplotlib.lines import Line2D

    panels = list(_panels(scene))
    pairs = [panels[i : i + 2] for i in range(0, len(panels), 2)]
    heights = [max(panel.height for panel in pair) for pair in pairs] or [LOWEST]
    figure = new_figure(WIDTH, sum(heights))
    grid = figure.subplots(len(heights), 2, squeeze=False, height_ratios=heights)
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel.draw(axes, panel.title)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    if not panels:
        figure.text(0.5, 0.5, "no run has finished yet", ha="center", color=MUTED)
    figure.legend(
        handles=[Line2D([], [], color=scene.colors[arm], linewidth=2.2, label=arm) for arm in scene.coloured],
        loc="outside lower center", ncols=min(len(scene.coloured), 8), frameon=False, fontsize=8.5,
    )  # fmt: skip
    layout = figure.get_layout_engine()
    assert layout is not None
    layout.set(h_pad=0.14, w_pad=0.1)  # pyright: ignore[reportCallIssue]
    study = scene.results.study
    figure.suptitle(study.title or study.name, fontsize=12, fontweight="bold", color=INK, x=0.012, ha="left")
    return figure


def _panels(scene: Scene) -> Iterator[_Panel]:
    yield from _curves(scene)
    yield from _ranking(scene)
    yield from _forest(scene)
    if scene.comparable:
        speeds = [speed for speed in scene.comparable if speed.arm in _shown(scene)]
        yield _Panel(
            f"Speed, with peak memory{_some(scene)}",
            lambda axes, title: rowplots.speeds(axes, scene, speeds, title),
            len(speeds),
        )


def _curves(scene: Scene) -> Iterator[_Panel]:
    primary = ranked_response(scene.results.study)
    for metric in [m for m in dict.fromkeys((primary.metric, "train/loss")) if m in scene.metrics]:
        yield _Panel(
            _curve_title(scene, metric),
            lambda axes, title, m=metric: lineplots.curve_bands(axes, scene, m, title, "none"),
        )


def _ranking(scene: Scene) -> Iterator[_Panel]:
    """Best value, change from the baseline, time, and how training and validation loss lie to each other."""
    ranking, primary, some = scene.analysis.ranking, ranked_response(scene.results.study), _some(scene)
    places = [place for place in ranking.places if place.arm in _shown(scene)]
    finished = [place for place in places if place.done]
    others = [place for place in places if place.arm != scene.results.study.baseline]
    values = [value for value in scene.values(primary.name) if value.arm in _shown(scene)]
    valued = any(value.values for value in values)
    best = Axis(rowplots.axis_name(primary), of_response(primary.name))

    def recorded(name: str) -> bool:
        return any(name in place.means for place in finished)

    if valued and primary.reduce != "time_to":
        yield _Panel(
            f"{primary.name}: seeds, means, intervals{some}",
            lambda axes, title: rowplots.dots(axes, scene, primary, values, title),
            len(values),
        )
    if any(place.change for place in others):
        yield _Panel(
            f"{sentences.capital(ranking.of)}: change from {scene.results.study.baseline}{some}",
            lambda axes, title: standingplots.changes(axes, scene, others, title),
            len(others),
        )
    if recorded(HOURS):
        yield _Panel(
            f"Time{some}",
            lambda axes, title: standingplots.hours(axes, scene, finished, title),
            len(finished),
        )
        if valued:
            time = standingplots.time_axis(finished)
            yield _Panel(
                f"{primary.name} against time",
                lambda axes, title: standingplots.scatter(axes, scene, time, best, title),
            )
    if recorded(FINAL_TRAIN):
        x = Axis("final training loss", of_statistics(FINAL_TRAIN))
        y = Axis("best validation loss", of_statistics(BEST_VAL)) if recorded(BEST_VAL) else best
        yield _Panel(
            f"{sentences.capital(y.name)} against final training loss",
            lambda axes, title: standingplots.scatter(axes, scene, x, y, title),
        )
    if recorded(LATE_GAP):
        yield _Panel(
            f"Generalisation gap{some}",
            lambda axes, title: standingplots.gap(axes, scene, finished, title),
            len(finished),
        )


def _forest(scene: Scene) -> Iterator[_Panel]:
    """The effects; where there are none the contrasts, unless the ranking's panel has said the same."""
    for primary in drawn_responses(scene.results.study.responses)[:1]:
        forest = forest_of(scene, primary)
        rows = forest.rows[:ROWS]
        said = forest.kind == "contrasts" and any(place.change for place in scene.analysis.ranking.places)
        if any(row.estimate.value is not None for row in rows) and not said:
            yield _Panel(
                f"{forest.title} (open: exploratory)",
                lambda axes, title, r=rows, f=forest, s=primary.better: rowplots.forest(
                    axes, r, title, f.axis, s
                ),
                len(rows),
            )


def _shown(scene: Scene) -> tuple[str, ...]:
    """The arms that get a row of their own."""
    return scene.arms if len(scene.arms) <= ROWS else scene.coloured


def _some(scene: Scene) -> str:
    shown = len(_shown(scene))
    return "" if shown == len(scene.arms) else f" ({shown} of {len(scene.arms)} arms)"


def _curve_title(scene: Scene, metric: str) -> str:
    means = [scene.mean_curve(metric, arm) for arm in scene.coloured]
    banded = any(mean is not None and mean.low is not None for mean in means)
    shown = f"means with {sentences.confidence(scene.level)} bands" if banded else "means and seeds"
    return f"{sentences.capital(metric_name(metric))}: {shown}"
