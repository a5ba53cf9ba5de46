"""The tables of what was found, each made from the findings alone. What is missing is `–`, and the caption says why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from jaxablate.analysis import sentences
from jaxablate.analysis.findings import (
    ArmValue,
    Effect,
    EffectTable,
    Estimate,
    Judgement,
    Outcome,
    TimeTo,
    Verdict,
)
from jaxablate.analysis.report.document import Cell, Column, Table, Tone
from jaxablate.analysis.report.figures import bars
from jaxablate.analysis.report.scene import Scene
from jaxablate.study import Response

OUTCOME_TONE: dict[Outcome, Tone] = {
    "supported": "good",
    "refuted": "bad",
    "inconclusive": "open",
    "not run": "none",
}
JUDGED_TONE: dict[Judgement, Tone] = {"better": "good", "worse": "bad", "unclear": "none", "same": "none"}
FOLD_ABOVE = 16  # rows; longer tables are folded on the page
_EXPLORATORY = "Exploratory, but for what is marked as declared by a hypothesis."
Fold = Literal["never", "if long", "always"]


def table_of(
    title: str,
    columns: Sequence[Column],
    rows: Iterable[Sequence[Cell]],
    caption: str,
    fold: Fold = "if long",
) -> Table:
    """A table; on the page a long one, or one of detail, is folded."""
    filled = tuple(tuple(row) for row in rows)
    folded = fold == "always" or (fold == "if long" and len(filled) > FOLD_ABOVE)
    return Table(title, tuple(columns), filled, caption, "folded" if folded else "open")


def words(*names: str) -> list[Column]:
    """Columns of words."""
    return [Column(name, "words") for name in names]


def numbers(*names: str) -> list[Column]:
    """Columns of numbers."""
    return [Column(name) for name in names]


def _bounds(estimate: Estimate, show: Callable[[float | None], str]) -> str:
    if estimate.low is None or estimate.high is None:
        return f"no interval: {estimate.note}" if estimate.note else "no interval"
    return f"({show(estimate.low)} to {show(estimate.high)})"


def _fold(scene: Scene, response: Response) -> Fold:
    """Of several tables alike only that of the primary response is open."""
    return "if long" if response.name == scene.results.study.response().name else "always"


def arm_cell(scene: Scene, arm: str) -> Cell:
    """An arm's name with its colour; the baseline is marked."""
    note = "baseline" if arm == scene.results.study.baseline != "baseline" else ""
    return Cell(arm, note, swatch=scene.colors[arm])


# ---------------------------------------------------------------------------------------- verdicts


def verdicts(scene: Scene) -> Table | None:
    """The declared hypotheses and what became of them."""
    found = scene.analysis.verdicts
    if not found:
        return None
    rows = []
    for v in found:
        response = scene.results.study.response(v.response)
        places = sentences.common_places([v.estimate])
        value, show = _on_own_scale(v, places)
        bounds = "no interval"
        if v.estimate.low is not None:
            bounds = f"{sentences.level(v.estimate)}: {show(v.estimate.low)} to {show(v.estimate.high)}"
        second = [f"Holm {sentences.p_value(v.p_holm)}"] if v.p_holm is not None else []
        second += [f"against {sentences.p_value(v.p_against)}"] if v.p_against is not None else []
        rows.append(
            (
                Cell(v.hypothesis, v.text),
                Cell(v.outcome, f"{v.declared},\n{'primary' if v.primary else 'secondary'}"
                     + ("" if v.locked else ";\nnot in the locked plan"), OUTCOME_TONE[v.outcome]),
                Cell(f"{sentences.compared(v)}: {sentences.claim(v)}",
                     f"{v.response}, {sentences.goal(response)} is better"),
                Cell(value, bounds),
                Cell(sentences.p_value(v.p), ";\n".join(second)),
                Cell(sentences.capital(v.reason), v.advice),
            )
        )  # fmt: skip
    columns = [
        *words("hypothesis", "verdict", "claim"),
        *numbers("estimate", "p"),
        Column("why", "words", "page"),
    ]
    return table_of(
        "",
        columns,
        rows,
        "Estimates are differences, treatment minus control, or ratios (×), treatment over control, with the interval "
        "that says the same as the test. p is for the claim, with the one against it; Holm's correction is of "
        "the smaller one, over the primary hypotheses.",
    )


def _on_own_scale(v: Verdict, places: int | None) -> tuple[str, Callable[[float | None], str]]:
    """The estimate of a verdict, and how its bounds are written: as a difference or as a ratio."""
    if v.scale == "difference":
        return sentences.signed(v.estimate.value, places), lambda x: sentences.signed(x, places)
    text = sentences.number(v.estimate.value, places)
    return (f"×{text}" if v.estimate.value is not None else text), lambda x: sentences.number(x, places)


# -------------------------------------------------------------------------------------------- arms


def arms(scene: Scene) -> Table:
    """Arms x responses: mean, interval, and how many seeds it rests on."""
    study, analysis = scene.results.study, scene.analysis
    values = {(v.arm, v.response): v for v in analysis.arms}
    times = {(t.arm, t.response): t for t in analysis.time_to}
    rows = []
    columns = {r.name: _places(scene, r) for r in study.responses}
    for arm in scene.arms:
        cells = [arm_cell(scene, arm)]
        for response in study.responses:
            if response.reduce == "time_to":
                cells.append(_time_cell(times.get((arm, response.name)), columns[response.name]))
            else:
                cells.append(_value_cell(values.get((arm, response.name)), columns[response.name]))
        rows.append(cells)
    nothing = [_nothing_cell(scene, r, columns[r.name]) for r in study.responses]
    nothing_known = any(cell.text != sentences.MISSING for cell in nothing)
    if nothing_known:
        rows.append([Cell("knowing nothing"), *nothing])
    shown = [v for v in analysis.arms if study.response(v.response).reduce != "time_to"]
    rules = "; ".join(
        f"{r.name}: {sentences.rule(r)}, {sentences.goal(r)} is better" for r in study.responses
    )
    lacking = any(not v.complete for v in shown)
    caption = (
        f"Mean ± half of the interval, or mean (low to high), with the seeds behind it. {bars(shown)} {rules}."
        + (" Means of incomplete arms are of the runs that finished." if lacking else "")
        + (" Knowing nothing: what a predictor without knowledge scores there." if nothing_known else "")
    )
    columns = [*words("arm"), *numbers(*(r.name for r in study.responses))]
    return table_of("", columns, rows, caption, "never")


def _places(scene: Scene, response: Response) -> int | None:
    if response.reduce == "time_to":
        return 0
    return sentences.common_places(v.mean for v in scene.values(response.name))


def _value_cell(value: ArmValue | None, places: int | None) -> Cell:
    if value is None:
        return Cell(sentences.MISSING, "not measured", "warn")
    text = sentences.plus_minus(value.mean, places)
    return Cell(text, sentences.seeds(value), "" if value.complete else "warn")


def _nothing_cell(scene: Scene, response: Response, places: int | None) -> Cell:
    """What a predictor that knows nothing scores in the response's own metric, where runs recorded that."""
    found = [run.nothing[response.metric] for run in scene.results.confirm if response.metric in run.nothing]
    if not found or response.reduce == "time_to":
        return Cell(sentences.MISSING)
    low, high = (sentences.number(f(x.value for x in found), places) for f in (min, max))
    return Cell(low if low == high else f"{low} to {high}", found[0].metric)


def _time_cell(time: TimeTo | None, places: int | None) -> Cell:
    if time is None:
        return Cell(sentences.MISSING, "not measured", "warn")
    whole = time.reached == time.runs
    text = sentences.plus_minus(time.mean_steps, places)
    steps = f"{text} steps" if text != sentences.MISSING else text
    return Cell(steps, f"{time.reached} of {time.runs} reached it", "" if whole else "warn")


# ----------------------------------------------------------------------------- contrasts and effects


def contrasts(scene: Scene, response: Response) -> Table | None:
    """Every arm against the baseline, in one response."""
    found = scene.contrasts(response.name)
    if not found:
        return None
    places = sentences.common_places(c.difference for c in found)
    ranked = any(c.worst_rank_p is not None for c in found)
    rows = []
    for c in found:
        ratio = Cell(sentences.MISSING)
        if c.ratio is not None:
            r_places = sentences.common_places([c.ratio])
            bounds = (
                _bounds(c.ratio, lambda x, p=r_places: sentences.number(x, p))
                if c.ratio.low
                else "no interval"
            )
            ratio = Cell(f"×{sentences.number(c.ratio.value, r_places)}", bounds)
        row = [
            arm_cell(scene, c.arm),
            Cell(sentences.judged(c.better), scene.standing(c), JUDGED_TONE[c.better]),
            Cell(sentences.signed(c.difference.value, places),
                 _bounds(c.difference, lambda x: sentences.signed(x, places))),
            ratio,
            Cell(sentences.p_value(c.difference.p)),
            Cell(sentences.number(c.correlation, 2)),
            Cell(sentences.number(c.sd_ratio, 1)),
        ]  # fmt: skip
        if ranked:
            row.append(Cell(sentences.p_value(c.worst_rank_p)))
        rows.append(row)
    how = next((c.difference.how for c in found if c.difference.how), "")
    notes = [f"{c.arm}: {c.note}" for c in found if c.note]
    caption = (
        f"{sentences.capital(sentences.goal(response))} is better. {_EXPLORATORY} "
        + (f"Intervals: {how}. " if how else "")
        + "p is two-sided and not corrected. Pairing helps where r, the correlation of paired seeds, is positive. "
        "SD ratio: the larger over the smaller of the two arms."
        + (" Worst-rank p: with diverged runs ranked last." if ranked else "")
        + (f" {'; '.join(notes[:8])}." if notes else "")
    )
    columns = [*words("arm", "judgement"), *numbers("difference", "ratio", "p"), Column("r", where="page"),
               Column("SD ratio", where="page"), *(numbers("worst-rank p") if ranked else [])]  # fmt: skip
    title = f"{response.name} against {found[0].control}"
    return table_of(title, columns, rows, caption, _fold(scene, response))


def effects(scene: Scene, response: Response) -> Table | None:
    """Main effects and interactions of one response, on both scales, with the means behind them."""
    by_scale = {table.scale: table for table in scene.analysis.effects if table.response == response.name}
    raw, log = by_scale.get("raw"), by_scale.get("log")
    leading = scene.effect_table(response.name)
    if leading is None or not leading.effects:
        return None
    places = sentences.common_places(e.estimate for e in (raw.effects if raw else ()))
    rows = []
    for effect in leading.effects:
        rows.append(
            (
                Cell(sentences.effect_name(effect)),
                Cell(sentences.judged(effect.better), scene.standing(effect), JUDGED_TONE[effect.better]),
                *_effect_cells(_same(raw, effect), places, ""),
                *_effect_cells(_same(log, effect), None, " %"),
                Cell(_means(effect, places)),
            )
        )
    caption = (
        f"{sentences.capital(sentences.goal(response))} is better. {_EXPLORATORY} Mean with the factor at its other "
        "level minus mean at its reference; interactions halve at each order. In percent: from logarithms. "
        f"The judgement is on the {'logarithmic' if leading.scale == 'log' else 'raw'} scale. {method(leading)} "
        "p is two-sided and not corrected."
    )
    columns = [*words("effect", "judgement"), *numbers("raw", "p", "in percent", "p"),
               Column("means behind it", "words")]  # fmt: skip
    return table_of(f"Effects on {response.name}", columns, rows, caption, _fold(scene, response))


def _same(table: EffectTable | None, effect: Effect) -> Effect | None:
    return next((e for e in table.effects if e.factors == effect.factors), None) if table else None


def _effect_cells(effect: Effect | None, places: int | None, unit: str) -> tuple[Cell, Cell]:
    if effect is None:
        return Cell(sentences.MISSING, "not on this scale"), Cell(sentences.MISSING)
    estimate = sentences.log_in_percent(effect.estimate) if unit else effect.estimate
    places = sentences.common_places([estimate]) if places is None else places
    value = sentences.signed(estimate.value, places)
    return (
        Cell(value + (unit if estimate.value is not None else ""),
             _bounds(estimate, lambda x: sentences.signed(x, places) + unit)),
        Cell(sentences.p_value(effect.estimate.p)),
    )  # fmt: skip


def _means(effect: Effect, places: int | None) -> str:
    """`off 0.705, on 0.703`; of two factors `off, off 0.701; …`; the cells of more are the arms themselves."""
    if len(effect.factors) > 2:
        return "see the arms"
    shown = {key: sentences.number(mean, places) for key, mean in effect.level_means.items()}
    if len(effect.factors) == 1:
        return ", ".join(f"{level} {mean}" for level, mean in shown.items())
    short = {
        ", ".join(part.partition("=")[2] for part in key.split(",")): mean for key, mean in shown.items()
    }
    return "; ".join(f"{levels} {mean}" for levels, mean in short.items())


def method(table: EffectTable) -> str:
    """How the intervals of an effect table were made, in words."""
    if table.method == "none":
        return f"No effects: {table.note}." if table.note else "No effects."
    how = {
        "per_seed": "Intervals: Student t on one contrast per seed",
        "pooled": "Intervals: least squares with seeds as blocks, one SD for all arms",
    }[table.method]
    return f"{how}; {table.note.rstrip('.') or sentences.count(len(table.seeds), 'complete seed')}."
