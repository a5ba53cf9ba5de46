"""Study figures of the ranking: hours, change from the baseline, training against validation, curves by rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxablate.analysis import curves, plots, sentences
from jaxablate.analysis.findings import Estimate, Instability, Place
from jaxablate.analysis.plots import GRID, INK, PALETTE
from jaxablate.analysis.report import figures, rowplots
from jaxablate.analysis.report.figures import WIDTH, Drawn, Plan
from jaxablate.analysis.report.lineplots import End, end_labels
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.results import Result
from jaxablate.analysis.stats.ranking import recorded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HOURS = "total_wallclock_hours"
GAP, LATE_GAP = (
    "generalization_gap.final_train_minus_best_val",
    "generalization_gap.late_train_minus_final_val",
)
MOST = 6  # arms in the figure of curves by rate
Value = Callable[[Result], float | None]


def of_statistics(name: str) -> Value:
    """What a run recorded under that dotted name."""
    return lambda run: recorded(run).get(name)


def of_response(name: str) -> Value:
    """A run's value of that response."""
    return lambda run: run.values.get(name)


# ------------------------------------------------------------------------------------------ the panels


def hours(axes: Axes, scene: Scene, places: Sequence[Place], title: str) -> None:
    """How long a run of each arm took, in the unit that suits the longest."""
    known = {place.arm: place.means.get(HOURS, 0.0) for place in places}
    unit, size = unit_of(max(known.values()))
    for y, (arm, value) in enumerate(known.items()):
        axes.plot([0, value * size], [y, y], color=GRID, linewidth=1.0, zorder=1)
        axes.plot([value * size], [y], "o", color=scene.colors[arm], markersize=6, zorder=2)
        rowplots.beside(axes, y, sentences.duration(value) if value else sentences.MISSING)
    axes.set_xlim(left=0)
    plots.dress(axes, title, f"time of a run ({unit})", "", grid="x")
    rowplots.rows_axis(axes, list(known))
    rowplots.few_ticks(axes)


def changes(axes: Axes, scene: Scene, places: Sequence[Place], title: str) -> None:
    """How far each arm is from the baseline, in percent; grey where the interval holds zero or there is none."""
    ranking = scene.analysis.ranking
    missing = Estimate(None, note="n/a")
    rows = [rowplots.Row(p.arm, p.change or missing, p.better) for p in places]
    rowplots.forest(axes, rows, title, f"change of {ranking.of} (%)", 1 if ranking.goal == "higher" else -1)


def gap(axes: Axes, scene: Scene, places: Sequence[Place], title: str) -> None:
    """Training minus validation loss: by the last batch and the best (ring), by late means (dot)."""
    axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
    for y, place in enumerate(places):
        color, late = scene.colors[place.arm], place.means.get(LATE_GAP)
        if (quick := place.means.get(GAP)) is not None:
            axes.plot([quick], [y], "o", color=color, markersize=7, markerfacecolor="white", zorder=2)
        if late is not None:
            axes.plot([late], [y], "o", color=color, markersize=5, zorder=3)
        rowplots.beside(axes, y, sentences.signed(late))
    span = rowplots.room([0.0, *(p.means.get(name) for p in places for name in (GAP, LATE_GAP))])
    if span:
        axes.set_xlim(*span)
    x = "training − validation loss\nring: last batch − best; dot: late mean − last"
    plots.dress(axes, title, x, "", grid="x")
    rowplots.rows_axis(axes, [place.arm for place in places])
    rowplots.few_ticks(axes)


def unit_of(longest: float) -> tuple[str, float]:
    """The unit in which times of up to `longest` hours are read, and how many of it an hour has."""
    return ("h", 1.0) if longest >= 1 else ("min", 60.0) if longest >= 1 / 60 else ("s", 3600.0)


@dataclass(frozen=True)
class Axis:
    """One side of a scatter plot."""

    name: str
    value: Value


def time_axis(places: Sequence[Place]) -> Axis:
    """How long runs took."""
    unit, size = unit_of(max(place.means.get(HOURS, 0.0) for place in places))
    return Axis(f"time of a run ({unit})", lambda run: (h := recorded(run).get(HOURS)) and h * size)


def scatter(axes: Axes, scene: Scene, x: Axis, y: Axis, title: str) -> None:
    """The mean of each arm in two measures, its seeds faint beside it, its name to the right."""
    ends = []
    for arm in sorted(scene.arms, key=lambda arm: arm in scene.coloured):
        runs = [run for run in scene.results.of(arm) if run.state == "done"]
        both = np.array(
            [(a, b) for run in runs if (a := x.value(run)) is not None and (b := y.value(run)) is not None]
        )
        if not len(both):
            continue
        color = scene.colors[arm]
        axes.plot(*both.T, "o", color=color, alpha=0.3, markersize=3.5, markeredgewidth=0, zorder=2)
        mean_x, mean_y = both.mean(0)
        axes.plot([mean_x], [mean_y], "D", color=color, markersize=6, markeredgecolor="white", zorder=3)
        ends.append(End(float(mean_x), float(mean_y), arm, color))
    axes.margins(x=0.1, y=0.1)
    plots.dress(axes, title, x.name, y.name)
    rowplots.few_ticks(axes)
    end_labels(axes, ends)


# ------------------------------------------------------------------------- curves at the default rate


def draw_all(scene: Scene) -> list[Drawn]:
    """The figures of this module that stand alone."""
    return [figures.render(plan) for plan in plans(scene)]


def plans(scene: Scene) -> Iterator[Plan]:
    """Curves at the default and at the tuned rate, of arms that were unstable at the default one."""
    default = scene.results.default_rates
    unstable = [
        row
        for row in scene.analysis.instability
        if row.phase == "tuning" and row.unstable and row.learning_rate == default.get(row.arm)
    ][:MOST]
    if not unstable:
        return
    columns = min(len(unstable), 2)
    lines = -(-len(unstable) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes, row in zip(grid.flat, unstable, strict=False):
            _by_rate(axes, scene, row)
        for axes in grid.flat[len(unstable) :]:
            axes.set_visible(False)

    read = [
        f"{row.arm} at {row.learning_rate:g}: {row.diverged} of {row.runs} diverged, {sum(row.spikes)} spikes"
        for row in unstable
    ]
    yield Plan(
        "default_rate",
        "instability",
        f"Training loss at the default learning rate and at the tuned one, on tuning seeds: {'; '.join(read)}.",
        "Training loss, as it is, of the arms that diverged or had spikes at the study's default learning rate, beside "
        "the rate that was chosen. All lines are of tuning seeds, one each, and there are no intervals. "
        f"{'; '.join(read)}. "
        "Cross: the last finite loss of a run that diverged.",
        (WIDTH if columns > 1 else WIDTH * 0.75, 2.7 * lines),
        draw,
    )


def _by_rate(axes: Axes, scene: Scene, row: Instability) -> None:
    from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

    tuned = scene.results.rates.get(row.arm, {}).get("learning_rate")
    rates: Mapping[float | None, tuple[str, str]] = {
        tuned: ("tuned", PALETTE[0]), row.learning_rate: ("default", PALETTE[1]),
    }  # fmt: skip
    values = []
    for rate, (what, color) in rates.items():
        if rate is None:
            continue
        own = [
            r for r in scene.results.runs if (r.arm, r.phase, r.learning_rate) == (row.arm, "tuning", rate)
        ]
        for run in own:
            curve = curves.series(run.rows, "train/loss")
            plots.line(axes, curve, color=color, linewidth=0.8, alpha=0.8, markersize=3)
            values.append(curve.finite.values)
            if run.state == "diverged" and len(last := curve.finite):
                axes.plot(
                    last.steps[-1:], last.values[-1:], "x", color=color, markersize=7, markeredgewidth=2
                )
        same = "default = tuned" if tuned == row.learning_rate else what
        axes.plot([], [], color=color, linewidth=1.6, label=f"{same} {rate:g}")
    found = np.concatenate(values or [np.empty(0)])
    plots.dress(axes, row.arm, "", "training loss")
    if len(found) and found.min() > 0 and found.max() > 3 * found.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    plots.step_axis(axes)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.legend(frameon=False, fontsize=7.5, loc="upper right", title="tuning seeds", title_fontsize=7.5)
