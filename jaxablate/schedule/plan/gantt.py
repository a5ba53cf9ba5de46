"""The picture of a plan: a row for each place, a bar for each cohort, coloured by its arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxablate.analysis import plots, sentences
from jaxablate.analysis.plots import INK, MUTED, PALETTE
from jaxablate.disk import write_bytes
from jaxablate.errors import UserError
from jaxablate.schedule.plan.packing import ROUNDING
from jaxablate.schedule.plan.plan import Plan, Scheduled
from jaxablate.schedule.plan.table import named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

WIDTH = 9.2  # inches
_FAR = 3.0  # times the makespan
_ROW = 0.42  # inches of a place
_PLAIN = "#A8A8A8"  # of arms that no colour is left for
_LETTER = 0.0064  # of the axes' width that a letter of 7 points takes
_UNITS = (("hours", 2.0, 1.0), ("minutes", 1 / 20, 60.0), ("seconds", 0.0, 3600.0))  # from so many hours on


def gantt(plan: Plan) -> bytes:
    """A PNG of a plan whose cohorts have places.

    Raises:
        UserError: they have none, since their hours are unknown.
    """
    if not plan.elements or plan.makespan is None:
        raise UserError(f"plan of {plan.study}: no cohort has a place to be drawn: {'; '.join(plan.notes)}")
    rows = lanes(plan.elements)
    figure = plots.new_figure(WIDTH, 1.5 + _ROW * len(rows))
    with plots.plain_text():
        axes = figure.subplots()
        colors = _colors(plan)
        unit, factor = next((name, by) for name, least, by in _UNITS if plan.makespan >= least)
        deadline = plan.request.deadline
        # A deadline far beyond the end is said in words: drawn, it would press the cohorts into a line.
        near = deadline is not None and deadline <= _FAR * plan.makespan
        end = (max(plan.makespan, deadline) if near and deadline else plan.makespan) * factor
        axes.set_xlim(0, end * 1.01)
        for y, row in enumerate(rows.values()):
            for element in row:
                _bar(axes, element, y, colors[element.arm], factor, end)
        _frame(axes, plan, rows, unit)
        if deadline is not None:
            late = plan.makespan > deadline
            if near:
                axes.axvline(deadline * factor, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
            axes.annotate(
                f"deadline {sentences.duration(deadline)}{': missed' if late else '' if near else ' →'}",
                (deadline * factor if near else end, 1.0),
                xycoords=("data", "axes fraction"), xytext=(-4, 3), textcoords="offset points", ha="right",
                va="bottom", fontsize=8, color=INK,
            )  # fmt: skip
        figure.legend(
            handles=_handles(plan, colors), loc="outside lower center", ncols=min(len(colors) + 1, 5), frameon=False,
            fontsize=8, handlelength=1.2,
        )  # fmt: skip
    return plots.encode(figure, "png")


def save(plan: Plan, path: Path) -> None:
    """Draws a plan into a file."""
    write_bytes(path, gantt(plan))


def lanes(elements: Sequence[Scheduled]) -> dict[tuple[int, int], list[Scheduled]]:
    """(GPU, lane) -> what runs there, one after the other; a GPU that is shared has several lanes."""
    found: dict[tuple[int, int], list[Scheduled]] = {}
    for element in sorted(elements, key=lambda e: (e.start or 0.0, e.end or 0.0)):
        assert element.gpu is not None and element.start is not None, "only what has a place is drawn"
        own = sorted(lane for lane in found if lane[0] == element.gpu)
        begins = element.start * (1 + ROUNDING)
        free = next((lane for lane in own if (found[lane][-1].end or 0.0) <= begins), (element.gpu, len(own)))
        found.setdefault(free, []).append(element)
    return dict(sorted(found.items()))


def _bar(axes: Axes, element: Scheduled, y: int, color: str, factor: float, end: float) -> None:
    assert element.start is not None and element.end is not None, "only what has a place is drawn"
    start, width = element.start * factor, (element.end - element.start) * factor
    tuning = element.phase == "tuning"
    axes.barh(
        y, width, left=start, height=0.72, color="white" if tuning else color, edgecolor=color if tuning else "white",
        linewidth=0.9, hatch="////" if tuning else None,
    )  # fmt: skip
    stage = f"{element.stage} " if element.stage else ""
    seeds = "tuning" if tuning else named(element.seeds)
    for label in (f"{element.arm}\n{stage}{seeds}", f"{stage}\n{seeds}".strip(), seeds.rpartition(" ")[2]):
        longest = max(map(len, label.split("\n")))
        if longest * _LETTER * end < width:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6} if tuning else None
            axes.text(
                start + width / 2, y, label, ha="center", va="center", fontsize=7, linespacing=1.05, bbox=box,
                color=INK if tuning else _ink_on(color), clip_on=True,
            )  # fmt: skip
            break


def _frame(axes: Axes, plan: Plan, rows: dict[tuple[int, int], list[Scheduled]], unit: str) -> None:
    title = f"{plan.study}: {sentences.count(plan.runs, 'run')} finished after {sentences.duration(plan.makespan)}"
    if plan.dropped:
        title += f", without {named(plan.dropped)}"
    plots.dress(axes, title, f"{unit} from the start, on {plan.request.target}", "", grid="x")
    labels = [f"{plan.request.place} {gpu}" if lane == 0 else "" for gpu, lane in rows]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=INK)
    axes.spines["left"].set_visible(False)


def _handles(plan: Plan, colors: dict[str, str]) -> list[Patch]:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=color, label=arm) for arm, color in colors.items() if color != _PLAIN]
    if _PLAIN in colors.values():
        handles.append(Patch(facecolor=_PLAIN, label="other arms"))
    if any(e.phase == "tuning" for e in plan.elements):
        handles.append(Patch(facecolor="white", edgecolor=MUTED, hatch="////", label="tuning"))
    return handles


def _colors(plan: Plan) -> dict[str, str]:
    arms = [arm.arm for arm in plan.arms]
    return dict.fromkeys(arms, _PLAIN) | dict(zip(arms, PALETTE, strict=False))


def _ink_on(color: str) -> str:
    """Black or white, whichever can be read on a colour (relative luminance of WCAG 2, roughly)."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return "white" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.25 else "#000000"
