"""The study's own pages: the document's ablation report, its selection guide and its milestones, from the findings.

No page says that an arm is better than another: that is a verdict's or a judgement's to say, with its interval.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxablate.analysis import sentences
from jaxablate.analysis.findings import Outcome, Verdict
from jaxablate.analysis.report import tables
from jaxablate.analysis.report.document import (
    Alert,
    Block,
    Cell,
    Column,
    Document,
    Paragraph,
    Point,
    Points,
    Section,
    Table,
)
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.sentences import MISSING, capital, count, number
from jaxablate.studies.burgers.report.facts import CHOSEN, CORRECTED, PLAIN, Facts, by_arm, mean

DEFINITIONS = (
    "nRMSE is PDEBench's, of fields in their own unit, unless a row says that it is of tokens: those of arms with "
    "another encoder cannot be compared. The baseline of every row is the operator alone, without a corrector; TTC is "
    "test-time conditioning, the choice among candidates around the corrector. Doing nothing predicts that the field "
    "stays as it is; the floor is what encoder and decoder lose by themselves."
)


def _title(scene: Scene) -> str:
    return scene.results.study.title or scene.results.study.name


def _document(scene: Scene, subtitle: str, *sections: tuple[str, Sequence[Block | None]]) -> Document:
    made = [
        Section(title.lower().replace(" ", "_"), title, tuple(block for block in blocks if block is not None))
        for title, blocks in sections
    ]
    return Document(_title(scene), subtitle, tuple(made))


# -------------------------------------------------------------------------------------- ablation report


def ablation_report(scene: Scene, facts: Sequence[Facts], notes: Sequence[str]) -> Document:
    """The document's report, in its four sections."""
    return _document(
        scene,
        "Ablation of the latent operator's architecture.",
        ("Summary", _summary(scene, facts, notes)),
        ("Results by Token Count", _by_tokens(scene, facts)),
        ("Hypothesis Testing", _hypotheses(scene)),
        ("Recommendations", [Points(tuple(_recommendations(scene, facts)))]),
    )


def _summary(scene: Scene, facts: Sequence[Facts], notes: Sequence[str]) -> list[Block | None]:
    done = sum(one.run.state == "done" for one in facts)
    tally = dict.fromkeys(("supported", "refuted", "inconclusive", "not run"), 0)
    for verdict in scene.analysis.verdicts:
        tally[verdict.outcome] += 1
    verdicts = ", ".join(f"{n} {outcome}" for outcome, n in tally.items() if n)
    asked = f"Hypotheses: {verdicts}." if verdicts else "No hypothesis was declared."
    warnings = [f"{text.rstrip('.')}." for text in dict.fromkeys([*scene.analysis.warnings, *notes])]
    return [
        Paragraph(f"{done} of {count(len(facts), 'run')} finished. {asked}", "lead"),
        Paragraph(_against_nothing(facts)),
        Paragraph(DEFINITIONS, "small"),
        Alert("Before you read the numbers", tuple(warnings)) if warnings else None,
    ]


def _against_nothing(facts: Sequence[Facts]) -> str:
    """How far the arms are from a prediction that knows nothing."""
    idle = _idle(facts)
    scored = [arm for arm, runs in by_arm(facts).items() if _ratio_to_nothing(runs) is not None]
    if not scored:
        return "No run has a score yet."
    if not idle:
        return f"Every scored arm ({len(scored)}) has a lower mean error than doing nothing."
    return f"No lower mean error than doing nothing: {sentences.listed(idle)}."


def _ratio_to_nothing(runs: Sequence[Facts]) -> float | None:
    """The mean error of the operator's runs as a share of what doing nothing has."""
    error, still = (
        mean([one.error("nrmse", PLAIN) for one in runs]),
        mean([one.doing_nothing for one in runs]),
    )
    return error / still if error is not None and still else None


def _idle(facts: Sequence[Facts]) -> list[str]:
    ratios = {arm: _ratio_to_nothing(runs) for arm, runs in by_arm(facts).items()}
    return [arm for arm, ratio in ratios.items() if ratio is not None and ratio >= 1]


def _by_tokens(scene: Scene, facts: Sequence[Facts]) -> list[Block]:
    """A table for each number of tokens."""
    groups: dict[int | None, dict[str, list[Facts]]] = {}
    for arm, runs in by_arm(facts).items():
        tokens = next((one.tokens for one in runs if one.tokens is not None), None)
        groups.setdefault(tokens, {})[arm] = runs
    known = sorted(tokens for tokens in groups if tokens is not None)
    blocks: list[Block] = [_table(scene, f"{tokens} tokens", groups[tokens]) for tokens in known]
    if None in groups:
        names = sentences.listed(list(groups[None]))
        blocks.append(Paragraph(f"Not begun, or without a readable config: {names}."))
    return blocks


def _table(scene: Scene, title: str, arms: dict[str, list[Facts]]) -> Table:
    primary = scene.results.study.response().name
    words = [Column(name, "words") for name in ("arm", "architecture", "attention", "seeds")]
    numbers = (
        *("nRMSE, operator", "nRMSE, corrector", "nRMSE, TTC", "gain of both %", primary),
        *("doing nothing", "floor", "mass gap"),
    )
    rows = []
    for arm, runs in arms.items():
        value = scene.analysis.arm(arm, primary)
        shape = next((one.architecture for one in runs if one.config), {})
        means = [
            *(mean([one.error("nrmse", name) for one in runs]) for name in (PLAIN, CORRECTED, CHOSEN)),
            mean([one.improvement for one in runs]),
        ]
        beside = [
            mean([one.doing_nothing for one in runs]),
            mean([one.final("nrmse_reconstruction") for one in runs]),
            mean([one.law("conservation_gap") for one in runs]),
        ]
        rows.append(
            (
                Cell(arm, "of tokens" if any(one.in_latent_space for one in runs) else ""),
                Cell(str(shape.get("architecture", MISSING))),
                Cell(str(shape.get("attention", MISSING))),
                Cell(sentences.seeds(value)),
                *(Cell(number(x)) for x in means),
                Cell(sentences.plus_minus(value.mean), value.mean.note),
                *(Cell(number(x)) for x in beside),
            )
        )
    columns = (*words, *(Column(name) for name in numbers))
    caption = (
        f"Means over the finished seeds; of {primary} with the {sentences.confidence(scene.level)} interval."
    )
    return Table(title, columns, tuple(rows), caption)


def _hypotheses(scene: Scene) -> list[Block | None]:
    if not scene.analysis.verdicts:
        return [Paragraph("This study declares no hypothesis: what its tables show is exploratory.")]
    points = [
        Point(
            f"{v.text or v.hypothesis}. {capital(v.reason)}",
            v.outcome.upper(),
            tables.OUTCOME_TONE[v.outcome],
        )
        for v in scene.analysis.verdicts
    ]
    return [Points(tuple(points)), tables.verdicts(scene)]


_ADVICE: dict[Outcome, tuple[str, str]] = {
    "supported": ("build on it", "good"),
    "refuted": ("do not build on it", "bad"),
    "inconclusive": ("leave it open", "open"),
    "not run": ("run it first", "none"),
}


def _recommendations(scene: Scene, facts: Sequence[Facts]) -> list[Point]:
    """What follows from each verdict, and from what doing nothing scores."""
    points = [
        Point(
            f"{arm} is at the level of doing nothing: train it longer or on longer strides before comparing it"
        )
        for arm in _idle(facts)
    ]
    points += [Point(_follows(scene, v), *_ADVICE[v.outcome]) for v in scene.analysis.verdicts]  # pyright: ignore[reportArgumentType]
    points.append(Point(_on_conditioning(facts)))
    return points


def _follows(scene: Scene, verdict: Verdict) -> str:
    advice = f"; {verdict.advice}" if verdict.advice else ""
    if verdict.claim == "equivalence" and verdict.outcome == "refuted":
        advice += f"; {_side(scene, verdict)}"
    figures = verdict.reason if verdict.outcome == "not run" else _bounds(verdict)
    return f"{verdict.text or verdict.hypothesis} ({figures}){advice}"


def _side(scene: Scene, verdict: Verdict) -> str:
    """On which side of its control the treatment of a refuted equivalence lies: not being alike has two."""
    assert verdict.estimate.value is not None, "it is outside of the margin"
    above = verdict.estimate.value - (1 if verdict.scale == "ratio" else 0)
    side = "better" if above * scene.results.study.response(verdict.response).better > 0 else "worse"
    return f"{verdict.treatment} is not alike because it is {side}"


def _bounds(verdict: Verdict) -> str:
    shown = sentences.interval(verdict.estimate)
    if verdict.estimate.low is None:
        return verdict.estimate.note or "no interval"
    what = "ratio" if verdict.scale == "ratio" else "difference"
    return f"{what} {shown} at {sentences.level(verdict.estimate)}"


def _on_conditioning(facts: Sequence[Facts]) -> str:
    """What the corrector does, and what the choice among its candidates adds to that: each its own."""
    corrector = [gain for one in facts if (gain := one.gain(PLAIN, CORRECTED)) is not None]
    choice = [gain for one in facts if (gain := one.gain(CORRECTED, CHOSEN)) is not None]
    said = [_change("The corrector", "operator's", corrector)] if corrector else []
    said += [_change("The choice among candidates", "corrected", choice)] if choice else []
    if not choice:
        said.append("Test-time conditioning was not measured.")
    return " ".join(said)


def _change(who: str, whose: str, gains: Sequence[float]) -> str:
    lower = sum(gain > 0 for gain in gains)
    return (
        f"{who} lowers the {whose} error in {lower} of {count(len(gains), 'run')}; the mean change is "
        f"{sentences.signed(-sum(gains) / len(gains))} %."
    )


# ---------------------------------------------------------------------------------------- the guide


def selection_guide(scene: Scene, facts: Sequence[Facts]) -> Document:
    """Which architecture to take, as far as these runs can say."""
    return _document(
        scene,
        "Architecture selection guide, written from the results of this study.",
        ("Which factors matter", _factors(scene)),
        ("Which arms stand out", _arms(scene)),
        ("Is it worth anything", [Paragraph(_against_nothing(facts)), *_margins(facts)]),
        ("Test-time conditioning", [Paragraph(_on_conditioning(facts))]),
        ("What it costs", _costs(scene)),
    )


_JUDGED = {
    "better": "take it",
    "worse": "leave it off",
    "unclear": "these runs cannot tell: choose by cost",
    "same": "it makes no difference: choose by cost",
}


def _factors(scene: Scene) -> list[Block]:
    """The main effects on the primary response, with what follows from each."""
    table = scene.effect_table(scene.results.study.response().name)
    if table is None or not table.effects:
        why = f" ({table.note})" if table is not None and table.note else ""
        return [Paragraph(f"Main effects cannot be had from these runs{why}; see the arms below.")]
    main = [effect for effect in table.effects if len(effect.factors) == 1]
    points = []
    for effect in main:
        change = sentences.log_in_percent(effect.estimate) if effect.scale == "log" else effect.estimate
        unit = " %" if effect.scale == "log" else ""
        figures = f"{sentences.interval(change, sign='+')}{unit} in {effect.response}"
        points.append(
            Point(f"{figures}, averaged over the other factors: {_JUDGED[effect.better]}", effect.factors[0])
        )
    return [Points(tuple(points))]


def _arms(scene: Scene) -> list[Block]:
    """The arms that differ from the baseline by more than their intervals; exploratory unless declared."""
    primary = scene.results.study.response().name
    points = []
    for contrast in scene.contrasts(primary):
        if contrast.better not in ("better", "worse"):
            continue
        change = (
            sentences.ratio_in_percent(contrast.ratio) if contrast.ratio is not None else contrast.difference
        )
        unit = " %" if contrast.ratio is not None else ""
        text = f"{sentences.interval(change, sign='+')}{unit} in {primary} against {contrast.control}"
        points.append(Point(f"{text}: {contrast.better}, {scene.standing(contrast)}", contrast.arm))
    if not points:
        return [Paragraph("No arm differs from the baseline by more than the seeds do: choose by cost.")]
    return [Points(tuple(points))]


def _margins(facts: Sequence[Facts]) -> list[Block]:
    ratios = {arm: _ratio_to_nothing(runs) for arm, runs in by_arm(facts).items()}
    points = [
        Point(f"{number(ratio)} × the error of doing nothing", arm)
        for arm, ratio in ratios.items()
        if ratio is not None
    ]
    return [Points(tuple(points))] if points else []


def _costs(scene: Scene) -> list[Block]:
    speeds = scene.comparable
    if not speeds:
        return [Paragraph("No speed was measured.")]
    columns = (Column("arm", "words"), Column("parameters"), Column("steps/s"), Column("peak memory"))
    rows = tuple(
        (
            Cell(s.arm),
            Cell(number(s.parameters, 0)),
            Cell(number(s.steps_per_sec)),
            Cell(sentences.gigabytes(s.peak_bytes)),
        )
        for s in speeds
    )
    where = (
        f"On {speeds[0].hardware}, {count(speeds[0].cohort_size, 'member')} a cohort; medians over the runs."
    )
    return [Table("", columns, rows, where)]


# --------------------------------------------------------------------------------------- milestones


def milestones_page(scene: Scene, facts: Sequence[Facts]) -> Document:
    """How many runs of each arm reached each milestone."""
    arms = by_arm(facts)
    names = list(facts[0].milestones) if facts else []
    rows = []
    for arm, runs in arms.items():
        cells = [Cell(arm)]
        for name in names:
            answers = [reached for one in runs if (reached := one.milestones[name]) is not None]
            sign = "✅" if answers and all(answers) else "❌"
            cells.append(Cell(f"{sign} {sum(answers)} of {len(answers)}" if answers else MISSING))
        rows.append(tuple(cells))
    columns = (Column("arm", "words"), *(Column(name, "words") for name in names))
    caption = "Runs that reached a milestone, of those for which it has a meaning."
    return _document(
        scene, "Milestones of the runs.", ("Milestones", [Table("", columns, tuple(rows), caption)])
    )
