"""What was expected, beside what was measured: expectations in words, of the step, and of the runs' results."""

from __future__ import annotations

from collections.abc import Sequence

from jaxablate.analysis import benchmarks, sentences
from jaxablate.analysis.findings import Expected
from jaxablate.analysis.report import timings
from jaxablate.analysis.report.document import Block, Cell, Column, Point, Points, Table, Tone
from jaxablate.analysis.report.scene import Scene
from jaxablate.study import Expectation

TONE: dict[str, Tone] = {"met": "good", "not met": "bad", "cannot be said": "open"}


def blocks(scene: Scene) -> list[Block | None]:
    """The table, and a sentence for each expectation about results."""
    found = scene.analysis.expectations
    said = tuple(Point(item.sentence, item.answer, TONE[item.answer]) for item in found)
    return [table(scene), Points(said) if said else None]


def table(scene: Scene) -> Table | None:
    """Every expectation in the study's own words, with its judgement."""
    study = scene.results.study
    if not study.expectations:
        return None
    of_results = {item.number: item for item in scene.analysis.expectations}
    benched = [
        {judged.expectation: judged for judged in benchmarks.judge(study, found)}
        for found in scene.results.benchmarks
    ]
    rows = []
    for number, item in enumerate(study.expectations):
        if number in of_results:
            cells = _of_results(scene, of_results[number])
        else:
            cells = _of_steps(scene, item, [found[item] for found in benched])
        rows.append((Cell(item.text), *cells))
    caption = (
        "Met or not: all of the interval says so, over paired seeds where it is a ratio to the baseline (×), over "
        "seeds where it is the arm's own mean. Speed and memory are of `jaxablate bench step`, in which the arms take "
        "turns, on the hardware that it names; training runs show them only roughly. What is in words alone has no "
        "number to be held to: the measured column is of the arms that it names."
    )
    columns = [Column(name, "words") for name in ("expected", "measured", "met?")]
    return Table("", tuple(columns), tuple(rows), caption)


def _of_results(scene: Scene, found: Expected) -> tuple[Cell, Cell]:
    measured, expected = found.measured, scene.results.study.expectations[found.number]
    answer = Cell(found.answer, tone=TONE[found.answer])
    if measured is None:
        return Cell(sentences.MISSING, "nothing to hold it to"), answer
    sign = "×" if expected.relative else ""
    seeds = sentences.count(measured.n, "paired seed" if expected.relative else "seed")
    shown = sentences.interval(measured)
    return Cell(f"{found.arm}: {expected.response} {sign}{shown}", measured.note or seeds), answer


def _of_steps(scene: Scene, item: Expectation, judged: Sequence[benchmarks.Judged]) -> tuple[Cell, Cell]:
    runs = _of_runs(scene, item)
    if not item.response:
        return Cell(runs), Cell(sentences.MISSING, "in words: there is no number to hold it to")
    if not judged:
        return Cell("no benchmark: `jaxablate bench step` makes one", runs), Cell("not measured", tone="none")
    verdicts = {found.verdict for found in judged}
    tone = timings.TONE[judged[0].verdict] if len(verdicts) == 1 else "open"
    of = f"{judged[0].of}. " if judged[0].measured else ""
    return (
        Cell("; ".join(found.reason for found in judged), f"{of}Training runs: {runs}"),
        Cell("; ".join(found.verdict for found in judged), tone=tone),
    )


def _of_runs(scene: Scene, item: Expectation) -> str:
    """What the runs of the factor or the arms that an expectation names came to."""
    study, primary, text = scene.results.study, scene.results.study.response(), item.text
    named = [f.name for f in study.factors if f.name == item.factor or f.name.lower() in text.lower()]
    arms = [a for a in scene.arms if len(set_ := study.set_levels(a)) == 1 and next(iter(set_)) in named]
    arms += [
        a
        for a in scene.arms
        if a not in arms and a != study.baseline and (a == item.arm or a.lower() in text.lower())
    ]
    said = []
    speeds = {s.arm: s for s in scene.comparable}
    base = speeds.get(study.baseline)
    for arm in arms:
        parts = []
        if (own := speeds.get(arm)) is not None:
            if own.ratio is not None:
                parts.append(f"speed ×{sentences.number(own.ratio, 2)}")
            if own.peak_bytes and base is not None and base.peak_bytes:
                parts.append(f"memory ×{sentences.number(own.peak_bytes / base.peak_bytes, 2)}")
        contrast = next((c for c in scene.contrasts(primary.name) if c.arm == arm), None)
        if contrast is not None and contrast.difference.value is not None:
            shown = sentences.interval(contrast.difference, sign="+")
            parts.append(f"{primary.name} {shown}, {sentences.judged(contrast.better)}")
        said.append(f"{arm}: {'; '.join(parts) or 'nothing comparable was measured'}")
    return ". ".join(said) or "names no factor or arm of the study: compare it with the tables above"
