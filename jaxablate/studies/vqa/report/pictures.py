"""Accuracy by stage and experiment, what the passes brought, and a few questions with their pictures and answers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxablate.analysis.plots import INK, MUTED, PALETTE, dress, lettering, new_figure
from jaxablate.studies.vqa.metrics import constant_answers, right
from jaxablate.studies.vqa.report.compare import accuracy, resample
from jaxablate.studies.vqa.report.runs import Evaluation, Experiment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAWS = 2_000  # for a bar's whisker
RIGHT, WRONG = "#009E73", "#D55E00"
WIDTH = 34  # letters of a line beside a picture


def by_stage(evaluation: Evaluation) -> Figure:
    """Bars of exact accuracy, of all questions and of each stage, with intervals and the constant answer."""
    figure = new_figure(7.4, 3.8)
    axes = figure.subplots()
    groups = {"all": np.full(len(evaluation.questions), True), **evaluation.stages}
    nothing = right(constant_answers(evaluation.questions), evaluation.questions)
    width = 0.8 / len(evaluation.answered)
    for place, own in enumerate(groups.values()):
        drawn = resample(evaluation, "image", DRAWS, own)
        for number, one in enumerate(evaluation.answered):
            estimate = accuracy(one, drawn)
            value, low, high = (100 * (x or 0.0) for x in (estimate.value, estimate.low, estimate.high))
            x = place + (number - (len(evaluation.answered) - 1) / 2) * width
            label = one.name if place == 0 else None
            axes.bar(x, value, 0.92 * width, color=PALETTE[number % len(PALETTE)], label=label)
            axes.errorbar(x, value, [[max(value - low, 0)], [max(high - value, 0)]], color=INK, elinewidth=1)
            seeds = 100 * one.hits[:, own].mean(1)
            axes.plot(np.full(len(seeds), x), seeds, "o", ms=2, color=INK, alpha=0.6)
        axes.hlines(
            100 * nothing[own].mean(), place - 0.45, place + 0.45, color=MUTED, linestyle=(0, (2, 2)),
            label="constant answer" if place == 0 else "",
        )  # fmt: skip
    axes.set_xticks(range(len(groups)), list(groups))
    dress(axes, "Exact accuracy", "", "%")
    axes.set_ylim(0, None)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def passes(refined: Sequence[Experiment]) -> Figure:
    """Exact accuracy of each pass and of their majority: a line for each run, thick for the mean."""
    figure = new_figure(5.6, 3.4)
    axes = figure.subplots()
    names = [name for name in refined[0].runs[0].refinement if name.startswith("exact_p")]
    labels = [f"pass {name.removeprefix('exact_p')}" for name in names]
    for number, one in enumerate(refined):
        color = PALETTE[number % len(PALETTE)]
        runs = 100 * np.array([[run.refinement[name] for name in names] for run in one.runs])
        voted = 100 * np.array([run.refinement["exact_majority"] for run in one.runs])
        for run in runs:
            axes.plot(range(len(names)), run, color=color, linewidth=0.8, alpha=0.5)
        axes.plot(range(len(names)), runs.mean(0), "o-", color=color, linewidth=2, label=one.name)
        axes.plot(np.full(len(voted), len(names)), voted, "o", ms=3, color=color, alpha=0.5)
        axes.plot(len(names), voted.mean(), "D", color=color)
    axes.set_xticks(range(len(names) + 1), [*labels, "majority"])
    axes.margins(x=0.08)
    dress(axes, "Exact accuracy over the passes", "", "%")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def examples(evaluation: Evaluation) -> Figure | None:
    """The questions whose pictures were kept, with what the first seed of each experiment said; None without any."""
    kept = {row: shown for one in evaluation.answered for row, shown in one.runs[0].answers.pictures.items()}
    places = [place for place, question in enumerate(evaluation.questions) if question.row in kept]
    if not places:
        return None
    columns = min(2, len(places))
    rows = -(-len(places) // columns)
    lines = 4 + len(evaluation.answered)
    figure = new_figure(4.6 * columns, rows * max(1.6, 0.17 * lines + 0.2))
    grid = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1.7] * columns).ravel()
    for axes in grid:
        axes.set_axis_off()
    for number, place in enumerate(places):
        axes, beside = grid[2 * number], grid[2 * number + 1]
        axes.imshow(kept[evaluation.questions[place].row], interpolation="nearest")
        _tell(beside, evaluation, place)
    return figure


def _tell(axes: Axes, evaluation: Evaluation, place: int) -> None:
    """Question, truth and answers, a line each."""
    question = evaluation.questions[place]
    told = [(line, INK) for line in textwrap.wrap(question.question, WIDTH)[:3]]
    told.append((_short(f"truth: {question.answer}"), MUTED))
    for one in evaluation.answered:
        run = one.runs[0]
        answer = run.answers.final[place]
        said = "no answer" if answer is None else answer or "empty"
        sign, color = ("✓", RIGHT) if run.marks.exact[place] else ("✗", WRONG)
        told.append((_short(f"{sign} {one.name}: {said}"), lettering(color)))
    for number, (line, color) in enumerate(told):
        y = 1 - (number + 0.5) / max(len(told), 6)
        axes.text(0, y, line, transform=axes.transAxes, va="center", fontsize=7, color=color)


def _short(text: str) -> str:
    return textwrap.shorten(text, WIDTH + 4, placeholder=" …")
