"""The roofline of a set of kernels (Williams et al. 2009): what they reach beside what the device can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxablate import provenance
from jaxablate.analysis.plots import INK, MUTED, PALETTE, dress, encode, new_figure, plain_text
from jaxablate.bench.kernel_results import CaseResult
from jaxablate.bench.limits import Limits
from jaxablate.bench.work import MATMULS, Direction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = {"attention": "o", "norm": "s", "gated": "^", "cross_entropy": "D"}
WORDS = {"forward": "forward", "backward": "backward", "both": "forward and backward"}
# With more cases than this, only those are named whose intensities differ: those with matrix products.
NAMED = 24


def figure(results: Sequence[CaseResult], limits: Limits, facts: Mapping[str, Any]) -> bytes:
    """A PNG with one panel: rate against arithmetic intensity, a mark for each case and implementation.

    Drawn is `both` where it was timed, else the first direction that was. Colours are implementations, marks
    operations; the lines are the limits that were measured beside them.
    """
    with plain_text():
        picture = new_figure(9.5, 5.6)
        axes = picture.subplots()
        direction = _direction(results)
        points = _points(results, direction)
        intensities = [x for x, _, _, _, _ in points] or [1.0]
        _roofs(axes, limits, min(intensities) / 3, max(intensities) * 3)
        names = list(dict.fromkeys(name for _, _, name, _, _ in points))
        for x, y, name, op, _ in points:
            axes.plot(
                x, y, MARKERS[op], color=PALETTE[names.index(name) % len(PALETTE)], markersize=6.5,
                markeredgecolor="white", markeredgewidth=0.7, zorder=3,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        crowded = len({(op, case) for _, _, _, op, case in points}) > NAMED
        _name_cases(axes, [p for p in points if not crowded or p[3] in MATMULS])
        where = f"{provenance.hardware(facts)}, jax {facts['packages']['jax']}"
        warning = " – CPU figures, which say nothing about a GPU" if facts["platform"] == "cpu" else ""
        dress(
            axes,
            f"Kernels, {WORDS[direction]}: {where}{warning}",
            "arithmetic intensity (useful FLOP per byte that must be moved)",
            "useful TFLOP/s",
        )
        _key(axes, names, list(dict.fromkeys(op for _, _, _, op, _ in points)))
        return encode(picture, "png")


def _direction(results: Sequence[CaseResult]) -> Direction:
    timed = {way for result in results for entry in result.entries for way in entry.timed}
    return "both" if "both" in timed else "forward" if "forward" in timed else "backward"


def _points(results: Sequence[CaseResult], direction: Direction) -> list[tuple[float, float, str, str, str]]:
    """(intensity, TFLOP/s, implementation, operation, case)."""
    return [
        (work.flops / work.bytes, work.flops / seconds / 1e12, name, result.op, result.case)
        for result in results
        for work in [result.passes.of(direction)]
        for name, seconds in result.seconds(direction).items()
    ]


def _roofs(axes: Axes, limits: Limits, low: float, high: float) -> None:
    """The bandwidth's slope up to the highest flat roof, and the flat roof of each type, named on the line."""
    highest = max(limits.matmul.values())
    high = max(high, 3 * highest / limits.copy)
    corner = highest / limits.copy
    axes.plot([low, corner], [low * limits.copy / 1e12, highest / 1e12], color=INK, linewidth=1.4, zorder=2)
    axes.annotate(
        f"copy {limits.copy / 1e12:.3g} TB/s", (low, low * limits.copy / 1e12), xytext=(6, -12),
        textcoords="offset points", fontsize=8, color=INK,
    )  # fmt: skip
    last = np.inf
    for dtype, rate in sorted(limits.matmul.items(), key=lambda item: -item[1]):
        axes.plot([rate / limits.copy, high], [rate / 1e12] * 2, color=INK, linewidth=1.4, zorder=2)
        close = last / rate < 1.5  # then the lower one's name goes below its line
        axes.annotate(
            f"{dtype} matrix product {rate / 1e12:.3g} TFLOP/s", (high, rate / 1e12),
            xytext=(0, -11 if close else 4), textcoords="offset points", fontsize=8, color=INK, ha="right",
            zorder=4, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )  # fmt: skip
        last = rate
    axes.set_xlim(low, high)


def _name_cases(axes: Axes, points: Sequence[tuple[float, float, str, str, str]]) -> None:
    """Each case's name along the bottom, upright, with a hair line up to its marks."""
    tops: dict[str, tuple[float, float, float]] = {}
    for x, y, _, op, case in points:
        label = f"{op} {case}" if sum(1 for p in points if p[4] == case and p[3] != op) else case
        _, least, most = tops.get(label, (x, y, y))
        tops[label] = (x, min(least, y), max(most, y))
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom / (top / bottom) ** 0.42, top * 1.3)  # room for the names
    low, high = np.log(axes.get_xlim())
    order = sorted(tops, key=lambda label: tops[label][0])
    wanted = [(np.log(tops[label][0]) - low) / (high - low) for label in order]
    for label, place in zip(order, _apart(wanted, min(0.022, 0.96 / max(len(order), 1))), strict=True):
        x, least, _ = tops[label]
        axes.annotate(
            label, (x, least), xytext=(place, 0.015), textcoords="axes fraction", rotation=90,
            fontsize=7, color=MUTED, ha="center", va="bottom",
            arrowprops={"arrowstyle": "-", "color": "#BBBBBB", "linewidth": 0.5, "shrinkB": 4},
        )  # fmt: skip


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Sorted places at least `gap` apart, each block of them centred on what its members want, within 0..1."""
    blocks: list[list[float]] = []  # what the members want

    def centre(block: list[float]) -> float:
        half = gap * (len(block) - 1) / 2
        return min(max(sum(block) / len(block), half + gap), 1 - gap - half)

    for place in wanted:
        block = [place]
        while blocks and centre(block) - centre(blocks[-1]) < gap * (len(block) + len(blocks[-1])) / 2:
            block = blocks.pop() + block
        blocks.append(block)
    return [centre(b) + gap * (i - (len(b) - 1) / 2) for b in blocks for i in range(len(b))]


def _key(axes: Axes, names: Sequence[str], ops: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    def dot(label: str, marker: str, color: str) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, color=color, label=label, markersize=6)

    marks = [dot(name, "o", PALETTE[i % len(PALETTE)]) for i, name in enumerate(names)]
    marks += [dot(op.replace("_", " "), MARKERS[op], MUTED) for op in ops] if len(ops) > 1 else []
    if marks:
        axes.legend(handles=marks, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
