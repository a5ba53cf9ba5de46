"""Confusion matrices, learning curves and the comparison of all settings as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxablate.analysis.plots import INK, MUTED, PALETTE, dress, new_figure
from jaxablate.studies.lora_space.config import TENSORS
from jaxablate.studies.lora_space.report.runs import Setting, Settings, representations

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def confusion(one: Setting) -> Figure:
    """Of the test adapters and all runs: rows are true labels, all of them, and sum to one where there are any."""
    counts = np.sum([run.kept.confusion("test") for run in one.runs], axis=0)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = one.runs[0].kept.categories
    size = 1.9 + 0.34 * len(names)
    figure = new_figure(size + 0.6, size)
    axes = figure.subplots()
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    dress(axes, one.name, "taken for", "is")
    axes.grid(visible=False)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if shares[row, column] > 0.5 else INK
            axes.text(column, row, str(count), ha="center", va="center", fontsize=6, color=color)
    figure.colorbar(drawn, ax=axes, pad=0.02).ax.tick_params(labelsize=7)
    return figure


def curves(settings: Sequence[Setting], tensors: str) -> Figure:
    """Validation accuracy and training loss over epochs: a line for each run, a colour for each representation."""
    figure = new_figure(9.2, 3.8)
    left, right = figure.subplots(1, 2)
    for number, one in enumerate(settings):
        style = {
            "color": PALETTE[number % len(PALETTE)],
            "linestyle": ("-", "--")[number // len(PALETTE) % 2],
            "linewidth": 0.9,
            "alpha": 0.7,
        }
        for i, run in enumerate(one.runs):
            label = one.representation if i == 0 else None
            left.plot(100 * np.array(run.accuracy_history), label=label, **style)  # pyright: ignore[reportArgumentType]
            losses = run.loss_history
            right.plot(np.arange(1, len(losses) + 1), losses, **style)  # pyright: ignore[reportArgumentType]
    dress(left, f"{tensors}: validation accuracy", "evaluation", "%")
    dress(right, f"{tensors}: training loss", "epoch", "nats")
    right.set_yscale("log")
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def bars(found: Settings) -> Figure:
    """Test accuracy of every setting: mean over the runs, each run, and chance."""
    names = representations(found)
    kinds = [kind for kind in TENSORS if any(kind == own for _, own in found)]
    figure = new_figure(max(6.0, 1.6 + 0.8 * len(names)), 3.8)
    axes = figure.subplots()
    width = 0.8 / len(kinds)
    for k, kind in enumerate(kinds):
        scored = {
            i: found[name, kind].scores("test") for i, name in enumerate(names) if (name, kind) in found
        }
        scored = {i: 100 * scores for i, scores in scored.items() if len(scores)}
        at = np.array(list(scored), float) + (k - (len(kinds) - 1) / 2) * width
        heights = [scores.mean() for scores in scored.values()]
        axes.bar(at, heights, 0.95 * width, color=PALETTE[k], label=kind if scored else None)
        for x, scores in zip(at, scored.values(), strict=True):
            axes.plot(np.full(len(scores), x), scores, "o", ms=2, color=INK, alpha=0.6)
    chances = [run.final("test_chance") for one in found.values() for run in one.runs]
    if chances:
        axes.axhline(100 * chances[0], color=MUTED, linestyle=(0, (2, 2)), label="largest class")
    else:
        axes.text(0.5, 0.5, "no run has finished", transform=axes.transAxes, ha="center", color=MUTED)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    dress(axes, "Test accuracy", "", "%")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure
