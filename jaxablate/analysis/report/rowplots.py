"""Study figures with a row for each arm or effect: means with intervals, effects, divergence, speed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxablate.analysis import plots, sentences
from jaxablate.analysis.findings import ArmValue, Divergence, Estimate, Judgement, Speed
from jaxablate.analysis.plots import GRID, INK, MUTED
from jaxablate.analysis.report.scene import Scene, Standing
from jaxablate.study import Response

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by every eye (ColorBrewer RdBu), and always beside the word itself.
JUDGED: dict[Judgement, str] = {"better": "#2166AC", "worse": "#B2182B", "unclear": MUTED, "same": MUTED}


@dataclass(frozen=True)
class Row:
    """A line of a forest plot."""

    label: str
    estimate: Estimate
    better: Judgement
    standing: Standing = "exploratory"


def room(values: Iterable[float | None], pad: float = 0.08) -> tuple[float, float] | None:
    """Limits of an axis that shows all of the values; None if there are none."""
    known = [v for v in values if v is not None and np.isfinite(v)]
    if not known:
        return None
    low, high = min(known), max(known)
    margin = pad * (high - low) or 0.02 * abs(high) or 1.0
    return low - margin, high + margin


def beside(axes: Axes, y: float, text: str, color: str = INK, linespacing: float = 1.2) -> None:
    """A text to the right of the axes, in the line of y."""
    axes.annotate(
        text, (1.0, y), xycoords=axes.get_yaxis_transform(), xytext=(6, 0), textcoords="offset points",
        ha="left", va="center", color=color, annotation_clip=False, fontsize=8, linespacing=linespacing,
    )  # fmt: skip


def _towards_better(axes: Axes, side: int) -> None:
    """Says below the axis where the better values lie."""
    axes.set_xlabel(f"{axes.get_xlabel()}\n{'higher is better →' if side > 0 else '← lower is better'}")


def rows_axis(axes: Axes, labels: Sequence[str]) -> None:
    """A line for each label, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=INK)
    axes.spines["left"].set_visible(False)


def few_ticks(axes: Axes) -> None:
    """No more numbers along x than a narrow figure has room for."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))


def dots(axes: Axes, scene: Scene, response: Response, rows: Sequence[ArmValue], title: str) -> None:
    """Every arm in a row: its seeds as points, its mean as a diamond with the interval."""
    decimals = sentences.common_places(row.mean for row in rows)
    baseline = next((row for row in rows if row.arm == scene.results.study.baseline), None)
    if baseline is not None and baseline.mean.value is not None:
        axes.axvline(baseline.mean.value, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    for y, row in enumerate(rows):
        color, values = scene.colors[row.arm], list(row.values.values())
        jitter = np.linspace(-0.17, 0.17, len(values)) if len(values) > 1 else np.zeros(len(values))
        axes.plot(values, y + jitter, "o", color=color, alpha=0.4, markersize=4, markeredgewidth=0, zorder=2)
        mean = row.mean
        if mean.low is not None and mean.high is not None:
            axes.plot(
                [mean.low, mean.high], [y, y], color=color, linewidth=2.0, solid_capstyle="butt", zorder=3
            )
        if mean.value is not None:
            axes.plot([mean.value], [y], "D", color=color, markersize=6, markeredgecolor="white", zorder=4)
        text = sentences.plus_minus(mean, decimals) if mean.value is not None else "no value"
        whole = row.complete
        note = "" if whole else f"\n{sentences.seeds(row)}"
        beside(axes, y, text + note, INK if whole else JUDGED["worse"], linespacing=1.05)
    span = room(
        [v for row in rows for v in (*row.values.values(), row.mean.value, row.mean.low, row.mean.high)]
    )
    if span:
        axes.set_xlim(*span)
    plots.dress(axes, title, axis_name(response), "", grid="x")
    rows_axis(axes, [row.arm for row in rows])
    few_ticks(axes)
    _towards_better(axes, response.better)


def axis_name(response: Response) -> str:
    """What an axis of this response is called: `validation loss, best`."""
    name = plots.metric_name(response.metric)
    if response.metric.startswith("perf/"):
        return name
    return name + {"final": ", last", "best": ", best", "at": f" at step {response.step:,}"}.get(
        response.reduce, ""
    )


def forest(axes: Axes, rows: Sequence[Row], title: str, x: str, side: int) -> None:
    """Differences with their intervals around zero; coloured by what the analysis says of them, and open if
    exploratory."""
    decimals = sentences.common_places(row.estimate for row in rows)
    axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
    for y, row in enumerate(rows):
        estimate, color = row.estimate, JUDGED[row.better]
        if estimate.low is not None and estimate.high is not None:
            axes.plot(
                [estimate.low, estimate.high], [y, y], color=color, linewidth=2.0, solid_capstyle="butt"
            )
        if estimate.value is not None:
            filled = row.standing == "declared"
            face, edge = (color, "white") if filled else ("white", color)
            axes.plot(
                [estimate.value],
                [y],
                "s",
                markersize=5.5,
                markerfacecolor=face,
                markeredgecolor=edge,
                zorder=3,
            )
        text = sentences.interval(estimate, decimals, sign="+").replace(" (", "\n(", 1)
        if row.better in ("better", "worse"):
            text = text.replace("\n", f"  {row.better}\n") if "\n" in text else f"{text}  {row.better}"
        beside(axes, y, text, color, linespacing=1.05)
    span = room([0.0, *(v for r in rows for v in (r.estimate.value, r.estimate.low, r.estimate.high))])
    if span:
        axes.set_xlim(*span)
    plots.dress(axes, title, x, "", grid="x")
    rows_axis(axes, [row.label for row in rows])
    few_ticks(axes)
    _towards_better(axes, side)


def divergence(axes: Axes, scene: Scene, counts: Sequence[Divergence], title: str) -> None:
    """The share of runs that diverged, with the exact interval."""
    for y, count in enumerate(counts):
        color = scene.colors[count.arm]
        axes.barh(
            [y], [count.diverged / count.ended if count.ended else 0], height=0.55, color=color, alpha=0.8
        )
        if count.low is not None and count.high is not None:
            axes.plot([count.low, count.high], [y, y], color=INK, linewidth=1.0)
        beside(axes, y, f"{count.diverged} of {count.ended}")
    axes.set_xlim(0, 1)
    plots.dress(axes, title, "share of runs that diverged", "", grid="x")
    rows_axis(axes, [count.arm for count in counts])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])


def ratios(axes: Axes, rows: Sequence[tuple[str, Estimate, str]], title: str) -> None:
    """Ratios to the baseline with their intervals, around 1; of (label, ratio, colour)."""
    axes.axvline(1, color=INK, linewidth=0.9, zorder=1)
    for y, (_, ratio, color) in enumerate(rows):
        if ratio.low is not None and ratio.high is not None:
            axes.plot([ratio.low, ratio.high], [y, y], color=color, linewidth=2.0, solid_capstyle="butt")
        if ratio.value is not None:
            axes.plot([ratio.value], [y], "o", color=color, markersize=6, markeredgecolor="white", zorder=3)
            beside(axes, y, f"×{ratio.value:.3f}")
    if span := room([1.0, *(v for _, r, _ in rows for v in (r.value, r.low, r.high))]):
        axes.set_xlim(*span)
    plots.dress(axes, title, "ratio of step times", "", grid="x")
    rows_axis(axes, [label for label, _, _ in rows])
    few_ticks(axes)
    _towards_better(axes, -1)


def speeds(axes: Axes, scene: Scene, rows: Sequence[Speed], title: str) -> None:
    """The speed of each arm, with its peak memory in words."""
    for y, speed in enumerate(rows):
        color = scene.colors[speed.arm]
        axes.plot([0, speed.steps_per_sec or 0], [y, y], color=GRID, linewidth=1.0, zorder=1)
        axes.plot([speed.steps_per_sec or 0], [y], "o", color=color, markersize=6, zorder=2)
        memory = f", {sentences.gigabytes(speed.peak_bytes)}" if speed.peak_bytes else ""
        beside(axes, y, f"{sentences.number(speed.steps_per_sec)}/s{memory}")
    axes.set_xlim(left=0)
    plots.dress(axes, title, "steps/s", "", grid="x")
    rows_axis(axes, [speed.arm for speed in rows])
    few_ticks(axes)
