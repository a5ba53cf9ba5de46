"""The tables of the report, each made from the findings alone. What is missing is `–`, and the caption says why."""

from __future__ import annotations

import statistics
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
    RatePoint,
    Speed,
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


def _table(
    title: str,
    columns: Sequence[Column],
    rows: Iterable[Sequence[Cell]],
    caption: str,
    fold: Fold = "if long",
) -> Table:
    filled = tuple(tuple(row) for row in rows)
    folded = fold == "always" or (fold == "if long" and len(filled) > FOLD_ABOVE)
    return Table(title, tuple(columns), filled, caption, "folded" if folded else "open")


def _words(*names: str) -> list[Column]:
    return [Column(name, "words") for name in names]


def _numbers(*names: str) -> list[Column]:
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
        *_words("hypothesis", "verdict", "claim"),
        *_numbers("estimate", "p"),
        Column("why", "words", "page"),
    ]
    return _table(
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
    shown = [v for v in analysis.arms if study.response(v.response).reduce != "time_to"]
    rules = "; ".join(
        f"{r.name}: {sentences.rule(r)}, {sentences.goal(r)} is better" for r in study.responses
    )
    lacking = any(not v.complete for v in shown)
    caption = (
        f"Mean ± half of the interval, or mean (low to high), with the seeds behind it. {bars(shown)} {rules}."
        + (" Means of incomplete arms are of the runs that finished." if lacking else "")
    )
    columns = [*_words("arm"), *_numbers(*(r.name for r in study.responses))]
    return _table("", columns, rows, caption, "never")


def _places(scene: Scene, response: Response) -> int | None:
    if response.reduce == "time_to":
        return 0
    return sentences.common_places(v.mean for v in scene.values(response.name))


def _value_cell(value: ArmValue | None, places: int | None) -> Cell:
    if value is None:
        return Cell(sentences.MISSING, "not measured", "warn")
    text = sentences.plus_minus(value.mean, places)
    return Cell(text, sentences.seeds(value), "" if value.complete else "warn")


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
    columns = [*_words("arm", "judgement"), *_numbers("difference", "ratio", "p"), Column("r", where="page"),
               Column("SD ratio", where="page"), *(_numbers("worst-rank p") if ranked else [])]  # fmt: skip
    title = f"{response.name} against {found[0].control}"
    return _table(title, columns, rows, caption, _fold(scene, response))


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
    columns = [*_words("effect", "judgement"), *_numbers("raw", "p", "in percent", "p"),
               Column("means behind it", "words")]  # fmt: skip
    return _table(f"Effects on {response.name}", columns, rows, caption, _fold(scene, response))


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


# ----------------------------------------------------------------------- speed, time, divergence, rates


def speed(scene: Scene) -> Table | None:
    """Speed and memory with hardware and kernels in each row; columns that nothing fills are named below."""
    found = scene.analysis.speed
    if not found:
        return None
    number = sentences.number
    spreads = [s.spread for s in found if s.spread]
    places = sentences.places(statistics.median(spreads)) if spreads else None
    measures: list[tuple[str, Callable[[Speed], str], Callable[[Speed], str]]] = [
        ("steps/s", lambda s: _rate(s, places), lambda s: ""),
        ("vs baseline", lambda s: f"×{number(s.ratio, 2)}" if s.ratio is not None else sentences.MISSING, _no_ratio),
        ("step (ms)", lambda s: number(s.step_ms), lambda s: ""),
        ("examples/s", lambda s: number(s.examples_per_sec), lambda s: ""),
        ("tokens/s", lambda s: number(s.tokens_per_sec), lambda s: ""),
        ("MFU", lambda s: sentences.share(s.mfu), lambda s: ""),
        ("peak memory", lambda s: sentences.gigabytes(s.peak_bytes), lambda s: ""),
        ("compile (s)", lambda s: number(s.compile_sec), lambda s: ""),
        ("parameters", lambda s: number(s.parameters, 0), lambda s: ""),
    ]  # fmt: skip
    filled = [c for c in measures if any(c[1](s) != sentences.MISSING for s in found)]
    empty = [c[0] for c in measures if c not in filled]
    rows = [
        (
            arm_cell(scene, s.arm),
            Cell(s.hardware or "not recorded", f"{sentences.count(s.cohort_size, 'run')} at once{_split(s)}"),
            Cell(s.kernels or "none to choose"),
            *(Cell(show(s), note(s)) for _, show, note in filled),
            Cell(number(s.runs, 0)),
        )
        for s in found
    ]
    caption = (
        "Medians over the runs of an arm, each a median over its steps after warm-up; ± is half the interquartile "
        "range over runs. Compilation is apart. A ratio is given on the same hardware only."
        + (f" Not recorded by any run: {sentences.listed(empty)}." if empty else "")
        + (f" {splits}" if (splits := accumulation(scene)) else "")
    )
    brief = ("steps/s", "vs baseline", "peak memory", "parameters")
    columns = [Column(c[0], where="everywhere" if c[0] in brief else "page") for c in filled]
    return _table("", [*_words("arm", "hardware", "kernels"), *columns, Column("runs")], rows, caption)


def _split(row: Speed) -> str:
    return f", {row.accumulation} micro-batches" if row.accumulation > 1 else ""


def accumulation(scene: Scene) -> str:
    """A sentence on the micro-batches of an update, where not all arms and runs have equally many."""
    found: dict[str, set[int]] = {}
    for run in scene.results.confirm:
        if run.perf:
            found.setdefault(run.arm, set()).add(run.accumulation)
    if len(set().union(*found.values())) < 2:
        return ""
    usual = found.get(scene.results.study.baseline, set())
    others = [arm for arm in scene.arms if arm in found and (len(found[arm]) > 1 or found[arm] != usual)]
    said = [f"{arm} in {' or '.join(str(n) for n in sorted(found[arm]))}" for arm in others]
    base = f"; the baseline in {' or '.join(str(n) for n in sorted(usual))}" if usual else ""
    return (
        f"Updates were not made in equally many micro-batches, which costs speed and saves memory: "
        f"{sentences.listed(said)}{base}."
    )


def _rate(row: Speed, places: int | None) -> str:
    rate = sentences.number(row.steps_per_sec, places)
    return f"{rate} ± {sentences.number(row.spread, places)}" if row.spread is not None else rate


def _no_ratio(row: Speed) -> str:
    return "no baseline on this hardware" if row.ratio is None else ""


def times(scene: Scene, response: Response) -> Table | None:
    """Time to target, censored."""
    found = [t for t in scene.analysis.time_to if t.response == response.name]
    if not found:
        return None
    places = sentences.common_places(t.mean_seconds for t in found)
    rows = [
        (
            arm_cell(scene, t.arm),
            Cell(f"{t.reached} of {t.runs}", tone="" if t.reached == t.runs else "warn"),
            Cell(
                sentences.plus_minus(t.mean_steps, 0),
                "" if t.mean_steps.low is not None else t.mean_steps.note,
            ),
            Cell(
                sentences.plus_minus(t.mean_seconds, places) if t.mean_seconds else sentences.MISSING,
                "" if t.mean_seconds else t.note or "not on one kind of hardware",
            ),
            Cell(
                sentences.number(t.median_steps),
                "" if t.median_steps is not None else "fewer than half reached it",
            ),
        )
        for t in found
    ]
    target = sentences.number(found[0].target)
    caption = (
        f"{sentences.capital(sentences.rule(response))}, which is {target}. Means are restricted to "
        f"{found[0].horizon:,} steps: "
        "a run that did not reach the target counts with its last step, as censored. Seconds are of training "
        "alone, without compilation and evaluation."
    )
    columns = [*_words("arm"), *_numbers("reached it", "mean steps", "mean seconds", "median steps")]
    return _table(response.name, columns, rows, caption)


def divergence(scene: Scene) -> Table | None:
    """How many runs diverged."""
    found = scene.analysis.divergence
    if not any(d.diverged for d in found):
        return None
    rows = [
        (
            arm_cell(scene, d.arm),
            Cell(f"{d.diverged} of {d.ended}", tone="warn" if d.diverged else ""),
            Cell(
                f"{sentences.share(d.low)} to {sentences.share(d.high)}"
                if d.low is not None
                else sentences.MISSING
            ),
            Cell(", ".join(f"{step:,}" for step in d.steps[:8]) or sentences.MISSING),
            Cell(sentences.p_value(d.fisher_p)),
        )
        for d in found
    ]
    caption = (
        "Runs whose loss or gradient was not finite, of the runs that ended. The share has its exact "
        f"{sentences.confidence(scene.level)} interval (Clopper–Pearson); p is Fisher's exact test against the "
        "baseline."
    )
    return _table("", [*_words("arm"), *_numbers("diverged", "share", "at step", "p")], rows, caption)


def rates(scene: Scene) -> Table | None:
    """Learning rates: what was tried, what was chosen."""
    found = scene.analysis.rates
    if not found:
        return None
    rows = []
    for curve in found:
        tried = [f"{p.learning_rate:g}: {sentences.number(p.mean)}{_lost(p)}" for p in curve.points]
        rows.append(
            (
                arm_cell(scene, curve.arm),
                Cell(f"{curve.chosen:g}" if curve.chosen is not None else sentences.MISSING,
                     "at the edge of the grid" if curve.at_edge else curve.note if curve.chosen is None else "",
                     "warn" if curve.at_edge or curve.chosen is None else ""),
                Cell(sentences.number(curve.sensitivity)),
                Cell("; ".join(tried) or sentences.MISSING),
            )
        )  # fmt: skip
    how = {"best_mean": "the best mean", "largest_stable": "the largest at which nothing diverged"}
    tuned = f"Rates were tuned on {found[0].response}"
    if (rule := scene.results.study.learning_rate) is not None:
        seeds = sentences.listed([str(seed) for seed in rule.tuning_seeds])
        tuned += f" with seeds {seeds}, rule: {how[rule.rule]}"
    caption = f"{tuned}; results are from other seeds. Sensitivity: mean shortfall from the best rate over the grid."
    columns = [*_words("arm"), *_numbers("chosen", "sensitivity"), Column("mean at each rate", "words")]
    return _table("", columns, rows, caption)


def _lost(point: RatePoint) -> str:
    return f" ({point.diverged} of {point.runs} diverged)" if point.diverged else ""
