"""Panels of the ranking: hours, change from the baseline, training against validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxablate.analysis import plots, sentences
from jaxablate.analysis.findings import Estimate, Place
from jaxablate.analysis.plots import GRID, INK
from jaxablate.analysis.report import rowplots
from jaxablate.analysis.report.lineplots import End, end_labels
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.results import Result
from jaxablate.analysis.stats.recorded import GAP, HOURS, LATE_GAP, recorded

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = Callable[[Result], float | None]


def of_statistics(name: str) -> Value:
    """What a run recorded under that dotted name."""
    return lambda run: recorded(run).get(name)


def of_response(name: str) -> Value:
    """A run's value of that response."""
    return lambda run: run.values.get(name)


# ------------------------------------------------------------------------------------------ the panels


def named(place: Place) -> str:
    """The arm; with a word where its means are of the runs that did not diverge."""
    return f"{place.arm}\n(survivors)" if place.diverged else place.arm


def hours(axes: Axes, scene: Scene, places: Sequence[Place], title: str) -> None:
    """How long a run of each arm took, in the unit that suits the longest."""
    known = [place.means.get(HOURS, 0.0) for place in places]
    unit, size = unit_of(max(known))
    for y, (place, value) in enumerate(zip(places, known, strict=True)):
        axes.plot([0, value * size], [y, y], color=GRID, linewidth=1.0, zorder=1)
        axes.plot([value * size], [y], "o", color=scene.colors[place.arm], markersize=6, zorder=2)
        rowplots.beside(axes, y, sentences.duration(value) if value else sentences.MISSING)
    axes.set_xlim(left=0)
    plots.dress(axes, title, f"time of a run ({unit})", "", grid="x")
    rowplots.rows_axis(axes, [named(place) for place in places])
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
    rowplots.rows_axis(axes, [named(place) for place in places])
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
        own = scene.results.of(arm)
        runs = [run for run in own if run.state == "done"]
        both = np.array(
            [(a, b) for run in runs if (a := x.value(run)) is not None and (b := y.value(run)) is not None]
        )
        if not len(both):
            continue
        color = scene.colors[arm]
        axes.plot(*both.T, "o", color=color, alpha=0.3, markersize=3.5, markeredgewidth=0, zorder=2)
        mean_x, mean_y = both.mean(0)
        axes.plot([mean_x], [mean_y], "D", color=color, markersize=6, markeredgecolor="white", zorder=3)
        flattered = " (survivors)" if any(run.state == "diverged" for run in own) else ""
        ends.append(End(float(mean_x), float(mean_y), arm + flattered, color))
    axes.margins(x=0.1, y=0.1)
    plots.dress(axes, title, x.name, y.name)
    rowplots.few_ticks(axes)
    end_labels(axes, ends)
