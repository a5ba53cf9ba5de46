"""The ranking of the arms: the table for a terminal, the statistics of each arm, and what they say in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxablate.analysis import sentences
from jaxablate.analysis.findings import Estimate, Place, Ranking
from jaxablate.analysis.report.document import Block, Cell, Paragraph, Table, Tone
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.report.tables import arm_cell, numbers, table_of, words
from jaxablate.analysis.stats.ranking import BEST_LOSS, CRITICAL, MODERATE

_MEASURES = ("initial", "final", "min", "max", "mean")
_GAPS = {
    "gap": "generalization_gap.final_train_minus_best_val",
    "late gap": "generalization_gap.late_train_minus_final_val",
}


def blocks(scene: Scene) -> list[Block | None]:
    """The section of the ranking; empty before a run has ended."""
    found = scene.analysis.ranking
    if not found.places:
        return []
    said = [Paragraph(text) for text in commentary(scene, found)]
    return [_comparison(scene, found), *said, _statistics(scene, found)]


def commentary(scene: Scene, found: Ranking) -> list[str]:
    """Best and worst, and which differences from the baseline are real: an order of means is never called more."""
    known = [place for place in found.places if place.value.value is not None]
    if not known:
        return [f"No finished run has a {found.of}."]
    sign = -1 if found.goal == "lower" else 1
    ranked = sorted(known, key=lambda place: -sign * (place.value.value or 0.0))
    best, worst = (f"{place.arm} ({_value(place)})" for place in (ranked[0], ranked[-1]))
    text = [
        f"By its mean {found.of} the best arm is {best}"
        + (f", the worst {worst}." if len(known) > 1 else ".")
    ]
    if found.note:
        text.append(f"{found.note}.")
    judged = {
        "better": [p for p in known if p.better == "better"],
        "worse": [p for p in known if p.better == "worse"],
    }
    for which, places in judged.items():
        if places:
            named = [f"{p.arm} ({_percent(p.change)}, {p.label})" for p in places]
            text.append(f"Really {which} than the baseline, by the interval: {sentences.listed(named)}.")
    unclear = [p.arm for p in known if p.change is not None and p.better in ("unclear", "same")]
    if unclear:
        text.append(f"Not told apart from the baseline: {sentences.listed(unclear)}.")
    if lost := [p.arm for p in found.places if p.diverged]:
        text.append(f"Runs diverged, so that the rank is last: {sentences.listed(lost)}.")
    return [" ".join(text)]


def _value(place: Place) -> str:
    return sentences.plus_minus(place.value)


def _percent(change: Estimate | None) -> str:
    if change is None or change.value is None:
        return "n/a"
    return f"{sentences.signed(change.value, _places(change))} %"


def _places(change: Estimate) -> int:
    half = sentences.half_width(change)
    return max(sentences.places(half if half else abs(change.value or 0.0)), 1)


def _bounds(change: Estimate) -> str:
    if change.low is None or change.high is None:
        return change.note
    low, high = (sentences.signed(x, _places(change)) for x in (change.low, change.high))
    return f"({low} to {high})"


def _comparison(scene: Scene, found: Ranking) -> Table:
    digits = sentences.common_places(place.value for place in found.places)

    def mean(name: str) -> Callable[[Place], str]:
        return lambda place: sentences.number(place.means.get(name), digits)

    measures: Mapping[str, Callable[[Place], str]] = {
        "Steps": lambda place: sentences.number(place.means.get("total_steps"), 0),
        "Time": lambda place: sentences.duration(place.means.get("total_wallclock_hours")),
        "Train Loss": mean("train_loss.final"),
        "Val Loss": mean("val_loss.final"),
    }
    filled = {
        name: show
        for name, show in measures.items()
        if any(show(place) != sentences.MISSING for place in found.places)
    }
    rows = [
        (
            arm_cell(scene, place.arm),
            *(Cell(show(place)) for show in filled.values()),
            Cell(sentences.plus_minus(place.value, digits), place.note, "warn" if place.diverged else ""),
            _change(scene, place),
            _label(scene, place),
        )
        for place in found.places
    ]
    best = "Best Val" if found.of == BEST_LOSS else found.of
    caption = (
        f"Best first by the mean {found.of}; {found.goal} is better. Δ: change from the baseline in percent of it, "
        f"the geometric mean over paired seeds with its interval. By its size it is CRITICAL (above {CRITICAL:g} %), "
        f"MODERATE (above {MODERATE:g} %) or MINOR; one to the better is an IMPROVEMENT. Real: the interval excludes "
        "0. Exploratory, and not corrected for the number of arms. An arm of which runs diverged ranks last, its Δ "
        "n/a. Loss and time are means of finished runs; time is that of a run, which the members of a cohort share, "
        "with compilation, evaluation and checkpoints."
    )
    columns = [*words("Ablation"), *numbers(*filled, best, "Δ"), *words("label")]
    return table_of("", columns, rows, caption, "never")


def _change(scene: Scene, place: Place) -> Cell:
    if place.arm == scene.results.study.baseline:
        return Cell("baseline")
    if place.change is None or place.change.value is None:
        return Cell("n/a")
    return Cell(_percent(place.change), _bounds(place.change))


def _label(scene: Scene, place: Place) -> Cell:
    if place.diverged:
        return Cell("DIVERGED", f"{place.diverged} of {place.done + place.diverged}", "bad")
    if not place.label:
        why = (
            "" if place.arm == scene.results.study.baseline else scene.analysis.ranking.note and "no baseline"
        )
        return Cell(sentences.MISSING, why)
    tones: Mapping[str, Tone] = {"better": "good", "worse": "bad"}
    real = "real" if place.better in tones else "not told apart from 0"
    if place.change is not None and place.change.low is None:
        real = "no interval"
    return Cell(place.label, real, tones.get(place.better, "none"))


def _statistics(scene: Scene, found: Ranking) -> Table | None:
    """Both losses of each arm; None if no run recorded one."""
    rows = []
    for place in found.places:
        for name, loss, gaps in (("training", "train_loss", {}), ("validation", "val_loss", _GAPS)):
            values = [place.means.get(f"{loss}.{measure}") for measure in _MEASURES]
            if any(value is not None for value in values):
                values += [place.means.get(gaps.get(gap, "")) for gap in _GAPS]
                cells = (Cell(sentences.number(value, 4)) for value in values)
                rows.append((arm_cell(scene, place.arm), Cell(name), *cells))
    if not rows:
        return None
    caption = (
        "Losses of each arm, means over its finished runs; the least validation loss is the best. Gap: final training "
        "loss minus best validation loss, one noisy batch against a minimum; late gap: the mean of the last 5 % of "
        "the logged training losses minus the final validation loss."
    )
    columns = [*words("arm", "loss"), *numbers(*_MEASURES, *_GAPS)]
    return table_of("Statistics of each arm", columns, rows, caption)
