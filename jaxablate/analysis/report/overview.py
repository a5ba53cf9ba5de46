"""`ablation_comparison.png`: curves, means with intervals, effects and speed of a study on one page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxablate.analysis import plots, sentences
from jaxablate.analysis.plots import INK, MUTED, encode, metric_name, new_figure
from jaxablate.analysis.report import lineplots, rowplots
from jaxablate.analysis.report.figures import ROWS, forest_of
from jaxablate.analysis.report.scene import Scene, drawn_responses

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, LOWEST = 11.5, 3.3  # inches: of the page, and of a row of it


@dataclass(frozen=True)
class _Panel:
    draw: Callable[[Axes], None]
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
        panel.draw(axes)
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
    responses = drawn_responses(scene.results.study.responses)
    shown = scene.arms if len(scene.arms) <= ROWS else scene.coloured
    some = "" if len(shown) == len(scene.arms) else f" ({len(shown)} of {len(scene.arms)} arms)"
    for metric in [m for m in (*(r.metric for r in responses[:1]), "train/loss") if m in scene.metrics]:
        yield _Panel(
            lambda axes, m=metric: lineplots.curve_bands(axes, scene, m, _curve_title(scene, m), "none")
        )
    for primary in responses[:1]:
        values = [value for value in scene.values(primary.name) if value.arm in shown]
        if any(value.values for value in values):
            title = f"{primary.name}: seeds, means, intervals{some}"
            yield _Panel(
                lambda axes, r=primary, v=values, t=title: rowplots.dots(axes, scene, r, v, t), len(values)
            )
        forest = forest_of(scene, primary)
        rows, side = forest.rows[:ROWS], primary.better
        if any(row.estimate.value is not None for row in rows):
            yield _Panel(
                lambda axes, f=forest, r=rows, s=side: rowplots.forest(
                    axes, r, f"{f.title} (open: exploratory)", f.axis, s
                ),
                len(rows),
            )
    if scene.comparable:
        speeds = [speed for speed in scene.comparable if speed.arm in shown]
        yield _Panel(
            lambda axes: rowplots.speeds(axes, scene, speeds, f"Speed, with peak memory{some}"), len(speeds)
        )
        for primary in responses[:1]:
            title = f"{primary.name} against speed; area: memory"
            yield _Panel(lambda axes, r=primary, t=title: lineplots.pareto(axes, scene, r, t, "none"))


def _curve_title(scene: Scene, metric: str) -> str:
    means = [scene.mean_curve(metric, arm) for arm in scene.coloured]
    banded = any(mean is not None and mean.low is not None for mean in means)
    shown = f"means with {sentences.confidence(scene.level)} bands" if banded else "means and seeds"
    return f"{sentences.capital(metric_name(metric))}: {shown}"
