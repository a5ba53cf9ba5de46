"""The tables of how the runs went: speed, time to target, divergence and instability, learning rates."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from jaxablate.analysis import sentences
from jaxablate.analysis.findings import RatePoint, Speed
from jaxablate.analysis.report.document import Cell, Column, Table
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.report.tables import arm_cell, numbers, table_of, words
from jaxablate.study import Response


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
    return table_of("", [*words("arm", "hardware", "kernels"), *columns, Column("runs")], rows, caption)


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
    columns = [*words("arm"), *numbers("reached it", "mean steps", "mean seconds", "median steps")]
    return table_of(response.name, columns, rows, caption)


def divergence(scene: Scene) -> Table | None:
    """How many runs diverged."""
    found = [d for d in scene.analysis.divergence if d.ended]
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
        "Confirmatory runs whose loss or gradient was not finite, of those that ended. The share has its exact "
        f"{sentences.confidence(scene.level)} interval (Clopper–Pearson); p is Fisher's exact test against the "
        "baseline."
    )
    return table_of("", [*words("arm"), *numbers("diverged", "share", "at step", "p")], rows, caption)


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
    columns = [*words("arm"), *numbers("chosen", "sensitivity"), Column("mean at each rate", "words")]
    return table_of("", columns, rows, caption)


def _lost(point: RatePoint) -> str:
    return f" ({point.diverged} of {point.runs} diverged)" if point.diverged else ""


def instability(scene: Scene) -> Table | None:
    """Divergence, spikes and the largest gradient, by arm and learning rate; None for a study without measures."""
    found = scene.analysis.instability
    if not found:
        return None
    rows = [
        (
            arm_cell(scene, row.arm),
            Cell("–" if row.learning_rate is None else f"{row.learning_rate:g}",
                 "tuning seeds" if row.phase == "tuning" else ""),
            Cell(f"{row.diverged} of {row.runs}", tone="warn" if row.diverged else ""),
            Cell(sentences.number(row.steps[0], 0) if row.steps else sentences.MISSING),
            Cell(sentences.number(statistics.median(row.steps)) if row.steps else sentences.MISSING),
            Cell(_spikes(row.spikes), tone="warn" if any(row.spikes) else ""),
            Cell(sentences.number(row.largest_grad_norm)),
        )
        for row in found
    ]  # fmt: skip
    caption = (
        "Spikes: steps whose loss exceeded 1.5 times the median of up to 100 finite losses before it; over the runs "
        "of a row, the median and the most. The largest gradient norm is before clipping, of all runs of the row, up "
        "to where a run diverged. A step that is not finite ends a run. Rows of tuning seeds chose the rates and "
        "enter no other table of results."
    )
    columns = [*words("arm"), *numbers("learning rate", "diverged", "first non-finite step", "median of these",
                                       "spikes", "largest gradient norm")]  # fmt: skip
    return table_of("", columns, rows, caption)


def _spikes(counts: Sequence[int]) -> str:
    if not counts:
        return sentences.MISSING
    middle, most = statistics.median(counts), max(counts)
    return sentences.number(middle) if middle == most else f"{sentences.number(middle)}, at most {most}"
