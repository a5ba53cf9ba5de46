"""The ranking of the arms: the table for a terminal, the statistics of each arm, and what they say in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxablate.analysis import sentences
from jaxablate.analysis.findings import Estimate, Place, Ranking, Scale
from jaxablate.analysis.report.document import Block, Cell, Paragraph, Table
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.report.tables import JUDGED_TONE, arm_cell, numbers, table_of, words
from jaxablate.analysis.stats.ranking import CRITICAL, MODERATE, is_best_loss
from jaxablate.analysis.stats.recorded import BEST_VAL, FINAL_TRAIN, FINAL_VAL, GAP, HOURS, LATE_GAP, STEPS

_MEASURES = ("initial", "final", "min", "max", "mean")
_GAPS = {"gap": GAP, "late gap": LATE_GAP}
_HOW: Mapping[Scale, str] = {"log": "geometric mean of its ratios", "raw": "mean difference"}


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
    sound = [place for place in known if not place.diverged]  # in their rank, so best first
    text = []
    if sound:
        best, worst = (f"{place.arm} ({_value(place)})" for place in (sound[0], sound[-1]))
        among = ", of the arms without a run that diverged," if len(sound) < len(found.places) else ""
        worst = f", the worst {worst}." if len(sound) > 1 else "."
        text.append(f"By its mean {found.of} the best arm{among} is {best}{worst}")
    else:
        text.append(
            "No arm is called the best: runs of every one diverged, and a mean of survivors flatters."
        )
    if found.note:
        text.append(f"{found.note}.")
    judged = {
        "better": [p for p in known if p.better == "better"],
        "worse": [p for p in known if p.better == "worse"],
    }
    for which, places in judged.items():
        if places:
            named = [f"{p.arm} ({percent(p.change)}, {p.label})" for p in places]
            text.append(f"Really {which} than the baseline, by the interval: {sentences.listed(named)}.")
    unclear = [p.arm for p in known if p.change is not None and p.better in ("unclear", "same")]
    if unclear:
        text.append(f"Not told apart from the baseline: {sentences.listed(unclear)}.")
    if lost := [f"{p.arm} ({survivors(p)})" for p in found.places if p.diverged]:
        text.append(f"Runs diverged, so that the rank is last: {sentences.listed(lost)}.")
    return [" ".join(text)]


def survivors(place: Place) -> str:
    """`2 of 3 diverged; mean of the survivor 1.2`, of an arm of which runs diverged."""
    lost = f"{place.diverged} of {place.done + place.diverged} diverged"
    who = "survivor" if place.done == 1 else "survivors"
    return lost if place.value.value is None else f"{lost}; mean of the {who} {_value(place)}"


def _value(place: Place) -> str:
    return sentences.plus_minus(place.value)


def percent(change: Estimate | None) -> str:
    """`+1.4 %`, or `n/a`."""
    if change is None or change.value is None:
        return "n/a"
    return f"{sentences.signed(change.value, _places(change))} %"


def _places(change: Estimate) -> int:
    half = sentences.half_width(change)
    return max(sentences.places(half if half else abs(change.value or 0.0)), 1)


def bounds(change: Estimate) -> str:
    """`(+0.2 to +2.6)`, or why there is no interval."""
    if change.low is None or change.high is None:
        return change.note
    low, high = (sentences.signed(x, _places(change)) for x in (change.low, change.high))
    return f"({low} to {high})"


def _comparison(scene: Scene, found: Ranking) -> Table:
    digits = sentences.common_places(place.value for place in found.places)

    def mean(name: str) -> Callable[[Place], str]:
        return lambda place: sentences.number(place.means.get(name), digits)

    by = scene.results.study.response(found.of)
    measures: Mapping[str, Callable[[Place], str]] = {
        "Steps": lambda place: sentences.number(place.means.get(STEPS), 0),
        "Time": lambda place: sentences.duration(place.means.get(HOURS)),
        "Train Loss": mean(FINAL_TRAIN),
        "Val Loss": mean(FINAL_VAL),
    } | ({} if is_best_loss(by) else {"Best Val": mean(BEST_VAL)})
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
    best = "Best Val" if is_best_loss(by) else found.of
    caption = (
        f"Best first by the mean {found.of}; {found.goal} is better. Δ: its change from the baseline in percent, the "
        f"{_HOW[found.scale]} over paired seeds with its interval. By its size it is CRITICAL (above {CRITICAL:g} %), "
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
    return Cell(percent(place.change), bounds(place.change))


def _label(scene: Scene, place: Place) -> Cell:
    if place.diverged:
        return Cell("DIVERGED", f"{place.diverged} of {place.done + place.diverged}", "bad")
    if not place.label:
        why = (
            "" if place.arm == scene.results.study.baseline else scene.analysis.ranking.note and "no baseline"
        )
        return Cell(sentences.MISSING, why)
    return Cell(place.label, reality(place), JUDGED_TONE[place.better])


def reality(place: Place) -> str:
    """Whether a change is more than what seeds do: all of its interval must say so."""
    if place.change is None or place.change.low is None:
        return "no interval"
    return "real" if place.better in ("better", "worse") else "not told apart from 0"


def _statistics(scene: Scene, found: Ranking) -> Table | None:
    """Both losses of each arm; None if no run recorded one."""
    rows = []
    for place in found.places:
        for name, loss, gaps in (("training", "train_loss", {}), ("validation", "val_loss", _GAPS)):
            values = [place.means.get(f"{loss}.{measure}") for measure in _MEASURES]
            if any(value is not None for value in values):
                values += [place.means.get(gaps.get(gap, "")) for gap in _GAPS]
                cells = (Cell(sentences.number(value, 4)) for value in values)
                rows.append((arm_cell(scene, place.arm), Cell(name, place.note), *cells))
    if not rows:
        return None
    caption = (
        "Losses of each arm, means over its finished runs; the least validation loss is the best. Gap: final training "
        "loss minus best validation loss, one noisy batch against a minimum; late gap: the mean of the last 5 % of "
        "the logged training losses minus the final validation loss."
    )
    columns = [*words("arm", "loss"), *numbers(*_MEASURES, *_GAPS)]
    return table_of("Statistics of each arm", columns, rows, caption)
