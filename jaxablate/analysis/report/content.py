"""What the report says, in which order. The same document becomes the page, the Markdown and the plain text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from jaxablate.analysis import sentences
from jaxablate.analysis.findings import Contrast, Effect, Outcome, Verdict
from jaxablate.analysis.origin import Origin
from jaxablate.analysis.report import comparisons, expected, paper, standings, tables, timings, training
from jaxablate.analysis.report.document import (
    Alert,
    Block,
    Cell,
    Column,
    Document,
    Link,
    Links,
    Paragraph,
    Pictures,
    Point,
    Points,
    Section,
    Table,
)
from jaxablate.analysis.report.figures import Drawn
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.stats.locked import begun_before_lock
from jaxablate.runstore import OUTCOMES

LARGEST = 3  # effects that the summary names


def compose(
    scene: Scene, drawn: Sequence[Drawn], origin: Origin, files: Sequence[Link], own: Sequence[Block]
) -> Document:
    """The whole report; `own` is what the study alone adds to it. What it warns of stands with the other warnings."""
    study = scene.results.study

    def pictures(part: str) -> list[Block]:
        found = tuple(d for d in drawn if d.part == part)
        return [Pictures(found)] if found else []

    alerts = [block for block in own if isinstance(block, Alert)]
    tables_per_response = [r for r in study.responses if scene.contrasts(r.name)]
    sections = [
        _section("summary", "In short", [*summary(scene, origin), *alerts]),
        _section("verdicts", "Verdicts on the declared hypotheses", _verdicts(scene)),
        _section("arms", "Arms", [tables.arms(scene), *pictures("arms")]),
        _section("ranking", "Ranking", standings.blocks(scene)),
        _section("effects", "Effects of the factors", [*_effects(scene), *pictures("effects")]),
        _section(
            "contrasts",
            "Each arm against the baseline",
            [
                _points(comparisons.beside_baseline(scene)),
                *(tables.contrasts(scene, r) for r in tables_per_response),
                *pictures("contrasts"),
            ],
        ),
        _section("curves", "Curves", pictures("curves") or [Paragraph(_no_curves(scene))]),
        _section("speed", "Speed and memory", [*_speed(scene), *pictures("speed")]),
        _section(
            "time",
            "Time to target",
            [*(training.times(scene, r) for r in study.responses), *pictures("time")],
        ),
        _section("divergence", "Divergence", [*_divergence(scene), *pictures("divergence")]),
        _section("instability", "Instability", [training.instability(scene)]),
        _section(
            "rates",
            "Learning rates",
            [training.rates(scene), _points(comparisons.default_rates(scene)), *pictures("rates")],
        ),
        _section("expectations", "What was expected", expected.blocks(scene)),
        _section("own", "Of this study alone", [block for block in own if block not in alerts]),
        _section("methods", "How this was computed", _methods(scene, origin)),
        _section("provenance", "Where this comes from", [_provenance(scene, origin), Links(tuple(files))]),
    ]
    planned = f"{sentences.count(len(study.arms), 'arm')}, {sentences.count(len(study.seeds), 'seed')} each"
    name = f"Study {study.name}: " if study.title else ""
    return Document(
        study.title or study.name, f"{name}{planned}", tuple(s for s in sections if s is not None)
    )


def _section(key: str, title: str, blocks: Iterable[Block | None]) -> Section | None:
    kept = tuple(block for block in blocks if block is not None)
    return Section(key, title, kept) if kept else None


def _points(points: Iterable[Point]) -> Points | None:
    found = tuple(points)
    return Points(found) if found else None


# ------------------------------------------------------------------------------------------ summary


def summary(scene: Scene, origin: Origin) -> list[Block]:
    """The first thing to be read: what was asked, what was found, what to beware of."""
    results, analysis = scene.results, scene.analysis
    warnings = list(dict.fromkeys([*analysis.warnings, *results.notes, *origin.differences, *origin.unread]))
    blocks: list[Block] = [Paragraph(_asked(scene))]
    if analysis.verdicts:
        blocks.append(Paragraph(_tally(scene), "lead"))
        blocks.append(
            Points(
                tuple(
                    Point(_finding(v), v.outcome, tables.OUTCOME_TONE[v.outcome]) for v in analysis.verdicts
                )
            )
        )
    else:
        blocks.append(Paragraph("No hypothesis was declared: everything here is exploratory.", "lead"))
    largest = _largest(scene)
    if largest:
        blocks.append(
            Paragraph(f"Largest on {results.study.response().name}, exploratory unless it says declared:")
        )
        blocks.append(Points(tuple(largest)))
    blocks.append(Paragraph(plan(scene), "small"))
    if warnings:
        blocks.append(Alert("Before you read the numbers", tuple(f"{w.rstrip('.')}." for w in warnings)))
    return blocks


def _finding(verdict: Verdict) -> str:
    advice = f". {sentences.capital(verdict.advice)}" if verdict.advice else ""
    return f"{verdict.text or verdict.hypothesis} — {verdict.reason}{advice}"


def _asked(scene: Scene) -> str:
    study = scene.results.study
    primary = study.response()
    factors = [f"{f.name} ({f.kind}: {_few(list(f.levels))})" for f in study.factors]
    varied = (
        f"{sentences.count(len(factors), 'factor')} varied: {sentences.listed(factors)}. " if factors else ""
    )
    values = scene.values(primary.name)
    planned, done = sum(v.planned for v in values), sum(v.done for v in values)
    lost, open_ = sum(v.diverged for v in values), sum(v.unfinished for v in values)
    state = f"{done} of {sentences.count(planned, 'run')} finished"
    if lost:
        state += f", {lost} diverged"
    if open_:
        state += f", {open_} have no result"
    return (
        f"{varied}The primary response is {primary.name}, the {sentences.rule(primary)}; "
        f"{sentences.goal(primary)} is better. {state}."
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])}, … ({len(names)} levels)"


def _tally(scene: Scene) -> str:
    counts: dict[Outcome, int] = {}
    for verdict in scene.analysis.verdicts:
        counts[verdict.outcome] = counts.get(verdict.outcome, 0) + 1
    total = len(scene.analysis.verdicts)
    if len(counts) == 1:
        outcome = next(iter(counts))
        which = "The declared hypothesis is" if total == 1 else f"All {total} declared hypotheses are"
        return f"{which} {outcome}."
    said = [f"{n} {'is' if n == 1 else 'are'} {outcome}" for outcome, n in counts.items()]
    return f"Of {total} declared hypotheses {sentences.listed(said)}."


def _largest(scene: Scene) -> list[Point]:
    """The effects, or without a factorial the differences from the baseline, that are furthest from zero.

    Those that the analysis judges come first; by what they are worth no sign is looked at here.
    """
    response = scene.results.study.response()
    table = scene.effect_table(response.name)
    found: list[Effect | Contrast] = list(table.effects if table else ()) or list(
        scene.contrasts(response.name)
    )

    def size(item: Effect | Contrast) -> tuple[bool, float]:
        value = _estimate(item).value
        return item.better in ("better", "worse"), abs(value) if value is not None else -1.0

    ranked = sorted((i for i in found if _estimate(i).value is not None), key=size, reverse=True)
    return [
        Point(
            _effect_sentence(item),
            f"{sentences.judged(item.better)}, {scene.standing(item)}",
            tables.JUDGED_TONE[item.better],
        )
        for item in ranked[:LARGEST]
    ]


def _estimate(item: Effect | Contrast):
    return item.estimate if isinstance(item, Effect) else item.difference


def _effect_sentence(item: Effect | Contrast) -> str:
    estimate = _estimate(item)
    if isinstance(item, Contrast):
        name, unit = f"{item.arm} vs {item.control}", ""
    else:
        name, unit = sentences.effect_name(item), " %" if item.scale == "log" else ""
    shown = sentences.log_in_percent(estimate) if unit else estimate
    why = f" ({estimate.note})" if estimate.note else ""  # no interval, or a mean of survivors
    return f"{name}: {sentences.interval(shown, sign='+')}{unit}{why}"


def plan(scene: Scene) -> str:
    """Whether and when the analysis plan was locked, and what was changed since."""
    results = scene.results
    if results.source:
        return f"Read from {results.source}. A table has no locked plan: everything here is exploratory."
    if not results.locked:
        return (
            f"The analysis plan (hash {results.plan_hash or 'none'}) was not locked before the runs: everything "
            "here is exploratory."
        )
    text = (
        f"The analysis plan was locked on {sentences.day(results.locked)}; its hash is {results.plan_hash}."
    )
    if early := len(begun_before_lock(results)):
        text += (
            f" {sentences.count(early, 'confirmatory run')} had begun before: all verdicts are exploratory."
        )
    if not results.amendments:
        return f"{text} It has not been changed since."
    changes = [
        f"{sentences.day(str(a.get('time', '')))}, hash {a.get('hash', '–')}: {'; '.join(a.get('changes', ()))}"
        for a in results.amendments
    ]
    return f"{text} It was amended {sentences.count(len(changes), 'time')} after that: {' | '.join(changes)}."


# ------------------------------------------------------------------------------------------ sections


def _verdicts(scene: Scene) -> list[Block | None]:
    table = tables.verdicts(scene)
    if table is None:
        return [Paragraph("The study declares no hypotheses.")]
    return [table]


def _effects(scene: Scene) -> list[Block | None]:
    if not scene.analysis.effects:
        return []
    blocks: list[Block | None] = []
    without: dict[str, list[str]] = {}  # why there are none -> of which responses
    for response in scene.results.study.responses:
        table = tables.effects(scene, response)
        leading = scene.effect_table(response.name)
        if table is not None:
            blocks.append(table)
        elif leading is not None:
            without.setdefault(tables.method(leading), []).append(response.name)
    return blocks + [Paragraph(f"{', '.join(names)}: {why}") for why, names in without.items()]


def _no_curves(scene: Scene) -> str:
    if scene.results.source:
        return "A table holds no curves."
    return "No run has left a curve yet."


def _speed(scene: Scene) -> list[Block | None]:
    table = training.speed(scene)
    blocks: list[Block | None] = [table or Paragraph("No run has recorded its speed.")]
    for found in scene.results.benchmarks:
        blocks += timings.blocks(found, scene.colors)
    for found in scene.results.batches:
        blocks.append(timings.batches(found, f"Largest batch that fits, on {found.hardware}"))
    return blocks


def _divergence(scene: Scene) -> list[Block | None]:
    found = [d for d in scene.analysis.divergence if d.ended]
    tuning = _tuning_divergence(scene)
    if table := training.divergence(scene):
        return [table, Paragraph(f"{sentences.capital(tuning)}.") if tuning else None]
    if not found:
        said = "No confirmatory run has ended"
        return [Paragraph(f"{said}; {tuning}.")] if tuning else []
    fewest = min(found, key=lambda d: d.ended)
    said = (
        f"No confirmatory run diverged{'; ' + tuning if tuning else ''}. The fewest ended in {fewest.arm}, "
        f"{fewest.ended}: there a share of up to {sentences.share(fewest.high)} cannot be excluded."
    )
    return [Paragraph(said)]


def _tuning_divergence(scene: Scene) -> str:
    """How many of the tuning runs diverged, and of which arms; empty if there were none."""
    ended = [run for run in scene.results.runs if run.phase == "tuning" and run.state in OUTCOMES]
    if not ended:
        return ""
    lost = Counter(run.arm for run in ended if run.state == "diverged")
    arms = f" ({sentences.listed([f'{arm} {lost[arm]}' for arm in scene.arms if lost[arm]])})" if lost else ""
    return f"of {sentences.count(len(ended), 'tuning run')} {lost.total() or 'none'} diverged{arms}"


def _methods(scene: Scene, origin: Origin) -> list[Block | None]:
    return [Paragraph(text) for text in paper.methods_paragraphs(scene, origin)]


def _provenance(scene: Scene, origin: Origin) -> Table:
    results, compute = scene.results, scene.analysis.compute
    rows = [
        ("plan", results.plan_hash or "none"),
        ("locked", sentences.day(results.locked) if results.locked else "no"),
        ("amendments", sentences.number(len(results.amendments), 0)),
        *paper.compute_words(compute),
        *((question, origin.answer(question)) for question in origin.answers),
    ]
    if results.source:
        rows.insert(0, ("table", results.source))
    caption = (
        f"From the records of {sentences.count(origin.runs, 'run')}."
        if origin.runs
        else "No run has a record of its code, packages and hardware."
    )
    caption += f" {paper.TIMES}" if "run_hours" in compute else ""
    columns = (Column("what", "words"), Column("value", "words"))
    return Table("", columns, tuple((Cell(what), Cell(value)) for what, value in rows), caption)
