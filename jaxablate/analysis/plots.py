"""Figures of runs. Matplotlib through its object API: no global state, no display, imported when needed."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxablate.analysis.curves import Rows, Series, diverged_at, load, series, smooth
from jaxablate.disk import write_bytes
from jaxablate.runstore import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008), distinguishable with every common colour blindness. Their yellow is lost on white, so
# the eighth is the wine of Tol's muted scheme: eight arms of a 2^3 study are told apart by colour alone.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
INK, MUTED, GRID = "#222222", "#666666", "#E6E6E6"
STYLES = ("-", "--", ":", "-.")

Source = RunDir | str | os.PathLike[str] | Rows

_NAMES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1",
    "loss": "loss",
    "val": "validation",
    "train": "training",
}


def lettering(color: str) -> str:
    """A colour of the palette, dark enough for small letters on white."""
    mixed = (round(int(color[i : i + 2], 16) * 0.72) for i in (1, 3, 5))
    return "#" + "".join(f"{part:02X}" for part in mixed)


def metric_name(key: str) -> str:
    """`val/macro_auroc` -> `validation macro AUROC`."""
    words = key.removeprefix("perf/").replace("/", " ").replace("_", " ").split()
    return " ".join(_NAMES.get(word, word) for word in words)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that lays itself out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, title: str, x: str, y: str, grid: Literal["x", "y"] = "y") -> None:
    """Title, labels and grid lines, as all figures here have them."""
    axes.set_title(title, loc="left", fontsize=9.5, color=INK, pad=8)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=MUTED, length=3, width=0.7)
    axes.grid(axis=grid, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set(fontsize=8, color=MUTED)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
        spine.set_linewidth(0.7)


def step_axis(axes: Axes) -> None:
    """Whole steps along x, `100k` where they are many."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlabel("optimiser step", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if axes.get_xlim()[1] >= 20_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


@contextlib.contextmanager
def plain_text() -> Iterator[None]:
    """Texts made within are shown as they are: a `$` in the name of a study starts no formula."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        yield


def encode(figure: Figure, form: Literal["png", "svg", "pdf"]) -> bytes:
    """The figure as a file. Equal figures give equal files: no dates, no versions, no random ids."""
    import matplotlib

    stamps = {
        "png": ("Software",),
        "svg": ("Date", "Creator"),
        "pdf": ("CreationDate", "Creator", "Producer"),
    }
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "jaxablate", "pdf.fonttype": 42}):
        figure.savefig(buffer, format=form, metadata=dict.fromkeys(stamps[form]))
    return buffer.getvalue()


def line(axes: Axes, curve: Series, **style: Any) -> None:
    """Draw a curve with its gaps; a lone point, which a line would not show, gets a marker."""
    if not len(curve.finite):
        return
    values = curve.values
    there = np.isfinite(values)
    alone = there & ~np.append(False, there[:-1]) & ~np.append(there[1:], False)
    if alone.any():
        style |= {"marker": "o", "markevery": np.flatnonzero(alone).tolist()}
    axes.plot(curve.steps, values, **style)


def _mark_divergence(axes: Axes, step: int, color: str, row: int) -> None:
    """A vertical line where the loss was lost for good. `row` keeps the labels of several runs apart."""
    axes.axvline(step, color=color, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1)
    left, right = axes.get_xlim()
    at_right = step > (left + right) / 2
    axes.annotate(
        f"diverged at step {step:,}",
        (step, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if at_right else 4, -3 - 11 * row),
        textcoords="offset points",
        ha="right" if at_right else "left",
        va="top",
        fontsize=8,
        color=color,
    )


def crop_to_bulk(axes: Axes, curves: Sequence[Series]) -> None:
    """Keep a few wild first or last losses from squeezing the rest of the plot into one line.

    The range is that of the values, unless their extremes lie far outside of the bulk of them.
    """
    values = np.concatenate([curve.finite.values for curve in curves] or [np.empty(0)])
    if len(values) < 20:
        return
    low, q1, q3, high = np.quantile(values, (0.0, 0.05, 0.95, 1.0))
    bulk = max(q3 - q1, 1e-12)
    bottom, top = max(low, q1 - 2.0 * bulk), min(high, q3 + 2.0 * bulk)
    if (bottom, top) != (low, high):
        pad = 0.05 * (top - bottom)
        axes.set_ylim(bottom - pad, top + pad)


def loss_curves(
    runs: Source | Mapping[str, Source],
    out_path: str | os.PathLike[str],
    *,
    title: str | None = None,
    response: str | None = "val/macro_auroc",
    chance: float | None = None,
    loss_label: str = "loss",
) -> None:
    """Draw the loss of one run, or of several by label, and the study's response beside it, as a PNG.

    Args:
      runs: a run directory, the path of one, or its rows; or a mapping from labels to such.
      out_path: where the PNG goes; replaced atomically.
      title: over the whole figure: the name of the arm.
      response: the key drawn on the right; nothing is drawn there if no run has it.
      chance: the value of the response that guessing gives, drawn as a labelled line.
      loss_label: of the axis of the loss, with its unit, such as `loss (nats)`.

    Training loss is drawn twice, thin as it is and thick smoothed; validation loss as a dashed line with
    points. One run has a colour for each; of several runs each has its own colour. Values that are not finite
    are gaps, and where a run never recovered the step is marked.
    """
    by_label: dict[str, Rows] = (
        {label: load(source) for label, source in runs.items()}
        if isinstance(runs, Mapping)
        else {"": load(runs)}
    )
    right = {label: series(rows, response) for label, rows in by_label.items()} if response else {}
    right = {label: curve for label, curve in right.items() if len(curve.finite)}
    figure = new_figure(9.2 if right else 5.2, 3.5)
    grid = figure.subplots(1, 2 if right else 1, squeeze=False, sharex=True)
    several = len(by_label) > 1

    axes = grid[0, 0]
    drawn: list[Series] = []
    diverged: list[tuple[int, str]] = []
    for number, (label, rows) in enumerate(by_label.items()):
        color, style = PALETTE[number % len(PALETTE)], STYLES[number // len(PALETTE) % len(STYLES)]
        train, val = series(rows, "train/loss"), series(rows, "val/loss")
        if len(train) > 20:
            if len(by_label) <= 3:  # of more runs the noise would hide the curves
                line(axes, train, color=color, linewidth=0.6, alpha=0.30, markersize=2)
            train = smooth(train, len(train) / 25)
        line(
            axes, train, color=color, linewidth=1.9, linestyle=style, markersize=5,
            label=label if several else "training (smoothed)" if len(train) > 20 else "training",
        )  # fmt: skip
        val_color = color if several else PALETTE[1]
        if len(val.finite):
            axes.plot(
                val.steps, val.values, color=val_color, linewidth=1.1, linestyle="--",
                marker="o", markersize=3.2, markerfacecolor="white", markeredgewidth=1.0,
                label=None if several else "validation",
            )  # fmt: skip
        drawn += [train, val]
        step = diverged_at(rows)
        if step is not None:
            diverged.append((step, color if several else INK))
    crop_to_bulk(axes, drawn)
    if not any(len(curve.finite) for curve in drawn):
        axes.text(0.5, 0.5, "no finite loss recorded", transform=axes.transAxes, ha="center", color=MUTED)
    solid_dashed = (
        ": training solid, validation dashed" if several and any(len(c) for c in drawn[1::2]) else ""
    )
    dress(axes, f"Loss{solid_dashed}", "optimiser step", loss_label)
    step_axis(axes)

    if right and response:
        axes = grid[0, 1]
        for number, label in enumerate(by_label):
            if label in right:
                color, style = PALETTE[number % len(PALETTE)], STYLES[number // len(PALETTE) % len(STYLES)]
                color = color if several else PALETTE[2]
                axes.plot(
                    right[label].steps, right[label].values, color=color, linewidth=1.7, linestyle=style,
                    marker="o", markersize=3.6, markerfacecolor="white", markeredgewidth=1.1, label=label,
                )  # fmt: skip
        name = metric_name(response)
        dress(axes, name[:1].upper() + name[1:], "optimiser step", name.removeprefix("validation "))
        step_axis(axes)
        if chance is not None:
            axes.axhline(chance, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)))
            axes.annotate(
                f"chance ({chance:g})", (1.0, chance), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                textcoords="offset points", ha="right", fontsize=8, color=MUTED,
            )  # fmt: skip
        if not several:
            curve = next(iter(right.values())).finite
            axes.annotate(
                f"{curve.values[-1]:.3f}", (curve.steps[-1], curve.values[-1]), xytext=(0, 7),
                textcoords="offset points", ha="center", fontsize=8.5, color=PALETTE[2], fontweight="bold",
            )  # fmt: skip
        axes.margins(y=0.12)

    steps = {int(step) for curve in [*drawn, *right.values()] for step in curve.steps}
    if len(steps) == 1:
        step = steps.pop()
        grid[0, 0].set_xlim(step - 1, step + 1)
    for row, (step, color) in enumerate(sorted(diverged)):
        _mark_divergence(grid[0, 0], step, color, row)

    handles, labels = grid[0, 0].get_legend_handles_labels()
    if several:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(len(labels), 4),
            frameon=False,
            fontsize=8.5,
        )
    elif handles:
        grid[0, 0].legend(frameon=False, fontsize=8.5, loc="best")
    if title:
        figure.suptitle(title, fontsize=11.5, fontweight="bold", color=INK, x=0.012, ha="left")
    write_bytes(out_path, encode(figure, "png"))


def lr_schedule(run: Source, out_path: str | os.PathLike[str], *, title: str | None = None) -> None:
    """Draw the learning rate of a run over its steps, as a PNG.

    Args:
      run: a run directory, the path of one, or its rows.
      out_path: where the PNG goes; replaced atomically.
      title: over the figure: the name of the arm.
    """
    rates = series(load(run), "train/lr")
    figure = new_figure(5.2, 2.6)
    figure.set_layout_engine("none")  # one axes: it needs no solver, which takes most of the time
    axes = figure.add_axes((0.12, 0.2, 0.84, 0.64))
    line(axes, rates, color=PALETTE[0], linewidth=1.7, markersize=5)
    if not len(rates.finite):
        axes.text(0.5, 0.5, "no learning rate recorded", transform=axes.transAxes, ha="center", color=MUTED)
    dress(axes, "", "optimiser step", "learning rate")
    axes.ticklabel_format(axis="y", scilimits=(-3, 3))
    axes.set_ylim(bottom=0)
    step_axis(axes)
    with plain_text():
        axes.set_title(title or "", loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=14)
        write_bytes(out_path, encode(figure, "png"))
