"""Two sets of curves beside each other, with what they say: an arm and the baseline, an arm at two learning rates.

A small panel for each arm, and a sentence for each, which is made from the findings alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from jaxablate.analysis import curves, plots, sentences
from jaxablate.analysis.findings import Place, RatePoint
from jaxablate.analysis.plots import PALETTE
from jaxablate.analysis.report import figures, lineplots, standings
from jaxablate.analysis.report.document import Point, Tone
from jaxablate.analysis.report.figures import ROWS, WIDTH, Drawn, Plan
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.report.tables import JUDGED_TONE
from jaxablate.analysis.results import Result
from jaxablate.analysis.stats.expectations import arm_of
from jaxablate.analysis.stats.ranking import ranked_response

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 6  # in one figure; further ones are in the next
T = TypeVar("T")


def draw_all(scene: Scene) -> list[Drawn]:
    """The figures of this module."""
    return [figures.render(plan) for plan in plans(scene)]


def plans(scene: Scene) -> Iterator[Plan]:
    """The figures that the results can fill. Nothing is drawn yet."""
    yield from _beside_baseline(scene)
    yield from _at_default(scene)


def _pages(
    name: str, part: str, caption: str, items: Sequence[tuple[T, str]], panel: Callable[[Axes, T], None]
) -> Iterator[Plan]:
    """Figures of a few panels each, of (what a panel shows, what it says)."""
    for page, start in enumerate(range(0, len(items), PANELS), start=1):
        shown = items[start : start + PANELS]
        columns = min(len(shown), 2)
        lines = -(-len(shown) // columns)

        def draw(figure: Figure, shown=shown, columns=columns, lines=lines) -> None:
            grid = figure.subplots(lines, columns, squeeze=False)
            for axes, (item, _) in zip(grid.flat, shown, strict=False):
                panel(axes, item)
            for axes in grid.flat[len(shown) :]:
                axes.set_visible(False)

        said = " ".join(text for _, text in shown)
        size = (WIDTH if columns > 1 else WIDTH * 0.75, 2.7 * lines)
        yield Plan(name if page == 1 else f"{name}_{page}", part, said, f"{caption} {said}", size, draw)


def _shown(scene: Scene) -> Sequence[str]:
    """The arms that get a panel: all, unless they are very many."""
    return scene.arms if len(scene.arms) <= ROWS else scene.coloured


# ----------------------------------------------------------------------------------- beside the baseline


def beside_baseline(scene: Scene) -> list[Point]:
    """A sentence for each arm: its change with the interval, its rate, and what was expected of it."""
    return [
        Point(_sentence(scene, place), *_judged(place))
        for place in scene.analysis.ranking.places
        if place.arm != scene.results.study.baseline
    ]


def _judged(place: Place) -> tuple[str, Tone]:
    if place.diverged:
        return "diverged", "warn"
    return sentences.judged(place.better), JUDGED_TONE[place.better]


def _sentence(scene: Scene, place: Place) -> str:
    study, change = scene.results.study, place.change
    if place.diverged:
        said = f"{place.arm}: {standings.survivors(place)}, so no change in {scene.analysis.ranking.of} is stated"
    elif change is None or change.value is None:
        said = f"{place.arm}: no change in {scene.analysis.ranking.of} from {study.baseline} can be stated"
    else:
        pairs = sentences.count(change.n, "paired seed")
        bounds = standings.bounds(change)
        why = bounds if bounds.startswith("(") else f"({bounds})"
        said = (
            f"{place.arm}: {scene.analysis.ranking.of} changes by {standings.percent(change)} {why} from "
            f"{study.baseline}'s over {pairs}, {place.label}, {standings.reality(place)}"
        )
    return f"{said}{_rates(scene, place.arm)}. {_expected(scene, place.arm)}"


def _rates(scene: Scene, arm: str) -> str:
    """The learning rates of the two, where they were tuned."""
    rates = [tuned_rate(scene, name) for name in (arm, scene.results.study.baseline)]
    if None in rates:
        return ""
    return f" (learning rate {rates[0]:g}, {scene.results.study.baseline} {rates[1]:g})"


def tuned_rate(scene: Scene, arm: str) -> float | None:
    """The rate that tuning chose for an arm; None without one."""
    return scene.results.rates.get(arm, {}).get("learning_rate")


def _expected(scene: Scene, arm: str) -> str:
    """What the study expected of the arm's results, with the answer."""
    study = scene.results.study
    answers = {found.number: found.answer for found in scene.analysis.expectations}
    said = [
        f"“{item.text}” ({answers.get(number, 'in words: there is no number to hold it to')})"
        for number, item in enumerate(study.expectations)
        if not item.benchmarked and (item.arm or item.factor) and arm_of(study, item) == arm
    ]
    return f"Expected: {'; '.join(said)}." if said else "Nothing was expected of it."


def _beside_baseline(scene: Scene) -> Iterator[Plan]:
    study, response = scene.results.study, ranked_response(scene.results.study)
    metric = response.metric if response.metric in scene.metrics else "train/loss"
    drawn = {arm for arm in _shown(scene) if scene.series(metric, arm)}
    others = [p for p in scene.analysis.ranking.places if p.arm in drawn - {study.baseline}]
    if study.baseline not in drawn or not others:
        return

    def panel(axes: Axes, place: Place) -> None:
        for arm in (study.baseline, place.arm):
            rate = tuned_rate(scene, arm)
            lineplots.arm_curves(axes, scene, metric, arm, arm if rate is None else f"{arm} ({rate:g})")
        change = "diverged" if place.diverged else standings.percent(place.change)
        plots.dress(axes, f"{place.arm}: {change}", "", plots.metric_name(metric))
        _few_steps(axes)
        plots.crop_to_bulk(axes, [c for a in (study.baseline, place.arm) for _, c in scene.series(metric, a)])
        lineplots.by_ratios(axes, scene, metric)
        axes.legend(frameon=False, fontsize=7, loc="best", handlelength=1.2, handletextpad=0.5)

    yield from _pages(
        "against_baseline",
        "contrasts",
        f"{sentences.capital(plots.metric_name(metric))} of each arm and of {study.baseline}, each at its own learning "
        "rate, which is in brackets where it was tuned. Thick: means of the runs that finished; thin: seeds; bands: "
        f"{sentences.confidence(scene.level)} Student t intervals, from three runs on. Above: the change that the "
        "ranking states. Cross: the last finite value of a run that diverged.",
        [(place, _sentence(scene, place)) for place in others],
        panel,
    )


def _few_steps(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    plots.step_axis(axes)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


# ------------------------------------------------------------------------------------- at the default rate


@dataclass(frozen=True)
class AtDefault:
    """An arm whose tuned rate is not the study's default one, or that was unstable at the default one."""

    arm: str
    default: float
    tuned: float | None  # None: no rate was stable, or none has been chosen yet
    runs: tuple[Result, ...]  # tuning runs at the default rate that ended
    spikes: int | None  # of all of these; None: nobody counted

    @property
    def diverged(self) -> int:
        """How many of the runs did."""
        return sum(run.state == "diverged" for run in self.runs)


def at_default(scene: Scene) -> list[AtDefault]:
    """The arms of which the default rate is worth a look, as declared."""
    results, found = scene.results, []
    counted = {
        (row.arm, row.learning_rate): row.spikes
        for row in scene.analysis.instability
        if row.phase == "tuning"
    }
    for arm in scene.arms:
        default, tuned = results.default_rates.get(arm), tuned_rate(scene, arm)
        if default is None or not (
            tuning := [r for r in results.runs if (r.arm, r.phase) == (arm, "tuning")]
        ):
            continue
        runs = tuple(r for r in tuning if r.learning_rate == default and r.state in ("done", "diverged"))
        spikes = counted.get((arm, default), ())
        item = AtDefault(arm, default, tuned, runs, sum(spikes) if spikes else None)
        if item.diverged or item.spikes or (arm in results.rates and tuned != default):
            found.append(item)
    return found


def default_rates(scene: Scene) -> list[Point]:
    """A sentence for each of these arms: what its runs did at the default rate and at the tuned one."""
    return [Point(_default_sentence(scene, item)) for item in at_default(scene)]


def _default_sentence(scene: Scene, item: AtDefault) -> str:
    text = f"{item.arm}: at the default rate {item.default:g} {_ran(scene, item, item.default)}"
    if item.tuned == item.default:
        return f"{text}; it is the tuned rate too."
    if item.tuned is None:
        none = "no rate was stable" if item.arm in scene.results.rates else "no rate has been chosen yet"
        return f"{text}; {none}."
    return f"{text}; at the tuned rate {item.tuned:g} {_ran(scene, item, item.tuned)}."


def _ran(scene: Scene, item: AtDefault, rate: float) -> str:
    """How the tuning runs of an arm did at a rate: `0 of 2 diverged, 3 spikes, mean loss_best 1.41`."""
    curve = next((curve for curve in scene.analysis.rates if curve.arm == item.arm), None)
    point: RatePoint | None = next(
        (p for p in (curve.points if curve else ()) if p.learning_rate == rate), None
    )
    if curve is None or point is None:
        return "no tuning run was made"
    said = [f"{point.diverged} of {point.runs} diverged"]
    if rate == item.default and item.spikes is not None:
        said.append(sentences.count(item.spikes, "spike"))
    if point.mean is not None:
        said.append(f"mean {curve.response} {sentences.number(point.mean)}")
    return ", ".join(said)


def _at_default(scene: Scene) -> Iterator[Plan]:
    shown = [
        item for item in at_default(scene) if item.arm in _shown(scene) and any(r.rows for r in item.runs)
    ]
    yield from _pages(
        "default_rate",
        "rates",
        "Training loss, as it is, at the study's default learning rate, beside the rate that was chosen, of the arms "
        "of which these differ or that were unstable at the default one. All lines are of tuning seeds, one each, and "
        "there are no intervals. Cross: the last finite loss of a run that diverged.",
        [(item, _default_sentence(scene, item)) for item in shown],
        lambda axes, item: _by_rate(axes, scene, item),
    )


def _by_rate(axes: Axes, scene: Scene, item: AtDefault) -> None:
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    rates: Mapping[float | None, tuple[str, str]] = {
        item.tuned: ("tuned", PALETTE[0]), item.default: ("default", PALETTE[1]),
    }  # fmt: skip
    values = []
    for rate, (what, color) in rates.items():
        if rate is None:
            continue
        for run in scene.results.runs:
            if (run.arm, run.phase, run.learning_rate) != (item.arm, "tuning", rate):
                continue
            curve = curves.series(run.rows, "train/loss")
            plots.line(axes, curve, color=color, linewidth=0.8, alpha=0.8, markersize=3)
            values.append(curve.finite.values)
            if run.state == "diverged" and len(last := curve.finite):
                axes.plot(
                    last.steps[-1:], last.values[-1:], "x", color=color, markersize=7, markeredgewidth=2
                )
        same = "default = tuned" if item.tuned == item.default else what
        axes.plot([], [], color=color, linewidth=1.6, label=f"{same} {rate:g}")
    found = np.concatenate(values or [np.empty(0)])
    plots.dress(axes, item.arm, "", "training loss")
    if len(found) and found.min() > 0 and found.max() > 3 * found.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    _few_steps(axes)
    axes.legend(frameon=False, fontsize=7.5, loc="upper right", title="tuning seeds", title_fontsize=7.5)
