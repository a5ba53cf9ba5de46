"""Study figures with a line or a point for each arm: curves, interactions, speed against quality, time to target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from jaxablate.analysis import plots, sentences
from jaxablate.analysis.findings import Effect, RateCurve
from jaxablate.analysis.plots import INK, MUTED, PALETTE
from jaxablate.analysis.report.rowplots import few_ticks, room
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.stats.bands import Band
from jaxablate.study import Response

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Labels = Literal["direct", "none"]
SEEDS_DRAWN = 5  # thin curves of one arm, so that a figure of many seeds stays readable and quick
_LINE = 11.0  # points between two labels


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones that lie at least `gap` apart, in the same order, within low..high.

    Neighbours that are too close become a block around the mean of what its members want.
    """
    order = np.argsort(wanted, kind="stable")
    blocks: list[tuple[float, int]] = []  # mean of the wanted centres, members
    for i in order:
        block = (float(wanted[i]), 1)
        while blocks and block[0] - blocks[-1][0] < gap * (block[1] + blocks[-1][1]) / 2:
            mean, n = blocks.pop()
            total = n + block[1]
            block = ((mean * n + block[0] * block[1]) / total, total)
        blocks.append(block)
    places = [centre + gap * (k - (n - 1) / 2) for centre, n in blocks for k in range(n)]
    for k in range(len(places)):  # up from the floor
        places[k] = max(places[k], low + k * gap)
    for k in range(len(places)):  # and down from the ceiling, which wins
        places[-1 - k] = min(places[-1 - k], high - k * gap)
    found = [0.0] * len(places)
    for place, i in zip(places, order, strict=True):
        found[i] = place
    return found


def interaction(axes: Axes, scene: Scene, effect: Effect, response: Response) -> None:
    """Cell means of two factors: parallel lines mean that the one does not depend on the other."""
    study = scene.results.study
    first, second = (study.factor(name.partition("=")[0]) for name in effect.factors)
    levels = [x for x in first.levels if any(f"{first.name}={x}," in key for key in effect.level_means)]
    for level, color, marker in zip(second.levels, PALETTE, "osD^v<>P", strict=False):
        keys = [f"{first.name}={x},{second.name}={level}" for x in levels]
        points = [(x, effect.level_means[key]) for x, key in enumerate(keys) if key in effect.level_means]
        if points:
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, color=color, marker=marker, markersize=5, linewidth=1.6,
                      markeredgecolor="white", label=f"{second.name} {level}")  # fmt: skip
    axes.set_xticks(range(len(levels)), [f"{first.name}\n{level}" for level in levels])
    axes.set_xlim(-0.35, len(levels) - 0.65)
    plots.dress(axes, "", "", plots.metric_name(response.metric))
    axes.set_title(sentences.effect_name(effect), loc="left", fontsize=9, color=INK, pad=5)
    axes.legend(frameon=False, fontsize=8, loc="best", handlelength=1.4, borderaxespad=0.1)


def curve_bands(axes: Axes, scene: Scene, metric: str, title: str, labels: Labels = "direct") -> None:
    """The mean of each arm with its band, its seeds thin, and the runs that diverged up to their last value."""
    chance = next((r.chance for r in scene.results.study.responses if r.metric == metric), None)
    ends: list[End] = []
    plain_first = sorted(scene.arms, key=lambda arm: arm in scene.coloured)
    for arm in plain_first:
        in_colour = arm in scene.coloured
        mean = arm_curves(axes, scene, metric, arm, arm, "whole" if in_colour else "mean")
        if mean is not None and in_colour:
            planned = len(scene.results.of(arm))
            short = "" if mean.runs == planned else f" ({mean.runs} of {planned})"
            ends.append(End(float(mean.steps[-1]), float(mean.mean[-1]), arm + short, scene.colors[arm]))
    plots.dress(axes, title, "", plots.metric_name(metric))
    plots.step_axis(axes)
    drawn = [c for arm in scene.coloured for _, c in scene.series(metric, arm)]
    plots.crop_to_bulk(axes, drawn)
    by_ratios(axes, scene, metric)
    if chance is not None:
        axes.axhline(chance, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        axes.annotate(
            f"chance ({chance:g})", (1.0, chance), xycoords=("axes fraction", "data"), xytext=(-2, 3),
            textcoords="offset points", ha="right", fontsize=8, color=MUTED,
        )  # fmt: skip
    if labels == "direct":
        end_labels(axes, ends)


def arm_curves(
    axes: Axes, scene: Scene, metric: str, arm: str, label: str, look: Literal["whole", "mean"] = "whole"
) -> Band | None:
    """One arm's mean with its band and its seeds, or the mean alone as a hairline; what diverged ends in a cross."""
    color, own, whole = scene.colors[arm], scene.series(metric, arm), look == "whole"
    if whole:
        kept = [curve for run, curve in own if run.state == "done"]
        for curve in kept[:SEEDS_DRAWN]:
            plots.line(axes, curve, color=color, linewidth=0.5, alpha=0.3, markersize=2, zorder=2)
    lost = [curve for run, curve in own if run.state == "diverged"]
    for curve in lost[:SEEDS_DRAWN]:
        last = curve.finite
        axes.plot(last.steps, last.values, color=color, linewidth=0.9, linestyle=":", zorder=2)
        axes.plot(
            last.steps[-1:], last.values[-1:], "x", color=color, markersize=7, markeredgewidth=2, zorder=6
        )
    mean = scene.mean_curve(metric, arm)
    if mean is None:
        return None
    if mean.low is not None and mean.high is not None and whole:
        axes.fill_between(mean.steps, mean.low, mean.high, color=color, alpha=0.1, linewidth=0)
    style = {"linewidth": 1.8, "zorder": 4} if whole else {"linewidth": 0.7, "zorder": 1}
    marker = {"marker": "o", "markersize": 3} if len(mean.steps) == 1 else {}
    axes.plot(mean.steps, mean.mean, color=color, label=label, **style, **marker)
    return mean


def by_ratios(axes: Axes, scene: Scene, metric: str) -> None:
    """A logarithmic axis where the study declares that ratios count, so that losses are told apart at the end too."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    declared = any(r.metric == metric and r.scale == "log" for r in scene.results.study.responses)
    if not declared or axes.dataLim.ymin <= 0:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


@dataclass(frozen=True)
class End:
    """Where the line or point of an arm is that a name belongs to, in data coordinates."""

    x: float
    y: float
    name: str
    color: str


def end_labels(axes: Axes, ends: Sequence[End]) -> None:
    """Names in a column to the right, moved apart, each joined to its own line or point."""
    if not ends:
        return
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top)
    figure = axes.get_figure()
    assert figure is not None
    height = (
        figure.bbox.height / figure.dpi * 72 * axes.get_position().height * 0.96
    )  # in points, near enough
    wanted = [(min(max(end.y, bottom), top) - bottom) / (top - bottom) for end in ends]
    for end, place in zip(ends, spread(wanted, _LINE / height, 0.0, 1.02), strict=True):
        axes.annotate(
            end.name, (end.x, min(max(end.y, bottom), top)), xytext=(1.07, place), textcoords="axes fraction",
            ha="left", va="center", fontsize=8.5, color=plots.lettering(end.color), annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": end.color, "linewidth": 0.6, "alpha": 0.7,
                        "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 2},
        )  # fmt: skip


def pareto(axes: Axes, scene: Scene, response: Response, title: str, labels: Labels = "direct") -> None:
    """Quality against speed; the area of a point is its memory. A line joins the arms no other one beats in both."""
    values = {value.arm: value.mean for value in scene.values(response.name)}
    points = [
        (speed.arm, speed.steps_per_sec, mean.value, mean, speed.peak_bytes or 0.0)
        for speed in sorted(scene.comparable, key=lambda speed: speed.arm in scene.coloured)
        if speed.steps_per_sec is not None
        and (mean := values.get(speed.arm)) is not None
        and mean.value is not None
    ]
    sign, best, front = response.better, -np.inf, []
    for _, x, y, *_ in sorted(points, key=lambda point: -point[1]):
        if sign * y > best:
            best = sign * y
            front.append((x, y))
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    peak = max((memory for *_, memory in points), default=0.0)
    for arm, x, y, mean, memory in points:
        color = scene.colors[arm]
        if mean.low is not None and mean.high is not None:
            axes.plot([x, x], [mean.low, mean.high], color=color, linewidth=1.0, zorder=2)
        area = 160 * memory / peak if memory else 40
        axes.scatter([x], [y], s=area, color=color, alpha=0.85, edgecolors="white", linewidths=0.8, zorder=3)
    axes.margins(x=0.14, y=0.12)
    plots.dress(axes, title, "training speed (steps/s)", plots.metric_name(response.metric))
    few_ticks(axes)
    if labels == "direct":
        end_labels(
            axes, [End(x, y, arm, scene.colors[arm]) for arm, x, y, *_ in points if arm in scene.coloured]
        )


def reached(axes: Axes, scene: Scene, response: Response, title: str) -> None:
    """Share of an arm's runs that have reached the target, by step (one minus Kaplan and Meier's estimate)."""
    ends = []
    horizon = max((run.steps or 0 for run in scene.results.confirm), default=0)
    for place, arm in enumerate(scene.coloured):
        color = scene.colors[arm]
        runs = [run for run in scene.results.of(arm) if not run.without_result]
        if not runs:
            continue
        steps, shares = reached_share(
            [
                (run.values.get(response.name), run.steps or 0, run.state == "diverged" or run.stopped_at is not None)
                for run in runs
            ],
            horizon,
        )  # fmt: skip
        # A little apart, so that equal shares do not hide each other.
        shift = 0.007 * (place - (len(scene.coloured) - 1) / 2)
        axes.step(steps, [s + shift for s in shares], where="post", color=color, linewidth=1.7, label=arm)
        hits = sum(run.values.get(response.name) is not None for run in runs)
        ends.append(End(steps[-1], shares[-1] + shift, f"{arm} ({hits} of {len(runs)})", color))
    plots.dress(axes, title, "", "share of runs at the target")
    axes.set_ylim(-0.03, 1.05)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    plots.step_axis(axes)
    if horizon:
        axes.set_xlim(0, horizon)
    end_labels(axes, ends)


def reached_share(
    runs: Sequence[tuple[float | None, int, bool]], horizon: int
) -> tuple[list[float], list[float]]:
    """The steps at which the share of runs that reached a target rises, and the share from there on.

    Args:
      runs: for each the step at which it reached the target or None, its last step, whether it would never have.
      horizon: the last step of the study, to which the curve goes on.

    A run that was shorter than others, and did not reach the target, is censored there and leaves the runs at risk
    (Kaplan and Meier 1958). One that diverged, or stopped as it got no better, never will: it stays among them.
    """
    waiting = 1.0
    steps, shares = [0.0], [0.0]
    ends = [(at if at is not None else float("inf") if lost else float(last), at is not None)
            for at, last, lost in runs]  # fmt: skip
    for step in sorted({at for at, hit in ends if hit}):
        at_risk = sum(at >= step for at, _ in ends)
        waiting *= 1 - sum(hit and at == step for at, hit in ends) / at_risk
        steps.append(step)
        shares.append(1 - waiting)
    return [*steps, float(max(horizon, steps[-1]))], [*shares, shares[-1]]


def rate_curves(
    axes: Axes, scene: Scene, curves: Sequence[RateCurve], response: Response, title: str
) -> None:
    """The response over the learning rate; a ring around the chosen one, a cross where runs diverged."""
    ends = []
    axes.set_xscale("log")
    span = room(p.mean for curve in curves for p in curve.points) or (0.0, 1.0)
    bad_end = span[0] if response.better > 0 else span[1]
    for curve in curves:
        if curve.arm not in scene.coloured:
            continue
        color = scene.colors[curve.arm]
        known = [(p.learning_rate, p.mean) for p in curve.points if p.mean is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "-o", color=color, linewidth=1.5, markersize=3.5)
            ends.append(End(*known[-1], curve.arm, color))
        for rate, mean in known:
            if rate == curve.chosen:
                axes.plot([rate], [mean], "o", markersize=9, markerfacecolor="none", markeredgecolor=color,
                          markeredgewidth=1.4)  # fmt: skip
        lost = [p.learning_rate for p in curve.points if p.diverged]
        axes.plot(
            lost, [bad_end] * len(lost), "x", color=color, markersize=6, markeredgewidth=1.6, clip_on=False
        )
    axes.set_ylim(*span)
    plots.dress(axes, title, "learning rate", plots.metric_name(response.metric))
    rates = sorted({p.learning_rate for curve in curves for p in curve.points})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    end_labels(axes, ends)
