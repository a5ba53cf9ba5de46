"""The bundle for a paper: `tables.tex` (booktabs), `numbers.tex` (a macro per number), `methods.md`.

Macros have names of letters alone, since TeX knows no others: digits are spelled out, words are joined in
capitals. `flash_only`'s mean macro AUROC in study `ctclip` is `\\ctclipFlashOnlyMacroAurocMean`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from jaxablate import runstore
from jaxablate.analysis import sentences
from jaxablate.analysis.findings import Estimate
from jaxablate.analysis.origin import Origin
from jaxablate.analysis.report import tables, training
from jaxablate.analysis.report.document import Cell, Table
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.sentences import MISSING, count, listed, number
from jaxablate.analysis.stats.locked import begun_before_lock
from jaxablate.study import LearningRate

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\ensuremath{<}",
    ">": r"\ensuremath{>}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "−": r"\ensuremath{-}",
    "×": r"\ensuremath{\times}",
    "±": r"\ensuremath{\pm}",
    "–": "--",
    "—": "---",
    "≤": r"\ensuremath{\leq}",
    "≥": r"\ensuremath{\geq}",
    "→": r"\ensuremath{\to}",
    "²": r"\textsuperscript{2}",
    "…": r"\ldots{}",
}
_P_FOR = {
    "superiority": "two-sided p for the claim",
    "non_inferiority": "one-sided p for the claim",
    "equivalence": "p for the claim, the larger of two one-sided",
}
TIMES = (
    "Times are of runs that finished or diverged: their steps at the median speed, and compilation. Not counted are "
    "evaluation, checkpoints, steps repeated after an interruption, and runs that failed or have not ended."
)
_DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")


def escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_SPECIAL.get(char, char) for char in " ".join(text.split()))


# ------------------------------------------------------------------------------------------- macros


def macro_name(*words: str) -> str:
    """Letters only: `("ctclip", "flash_only", "lr 3")` -> `ctclipFlashOnlyLrThree`."""
    parts = []
    for word in words:
        for piece in re.findall(r"[A-Za-z]+|[0-9]", word):
            parts.append(_DIGITS[int(piece)] if piece.isdigit() else piece[0].upper() + piece[1:])
    name = "".join(parts) or "X"
    return name[0].lower() + name[1:]


def numbers_tex(scene: Scene) -> str:
    """One `\\newcommand` for each number of the study.

    Two things whose names come to the same letters (`a_b`, `a-b`) are told apart by a last `B`, `C`, …, in the
    order in which they were declared; the comment beside a macro says what it is.
    """
    lines = [
        f"% The numbers of study {_comment(scene.results.study.name)}: \\input this file and write \\name{{}}.",
        f"% {_comment(_plan_line(scene))}",
        "% A number that is missing is printed as --.",
    ]
    taken: set[str] = set()
    for words, text, what in _numbers(scene):
        name = _unused(macro_name(*words), taken)
        taken.add(name)
        lines.append(f"\\newcommand{{\\{name}}}{{{escape(text)}}} % {_comment(what)}")
    return "\n".join(lines) + "\n"


def _unused(name: str, taken: Set[str]) -> str:
    if name not in taken:
        return name
    return next(
        free for n in itertools.count(1) if (free := name + "Z" * (n // 26) + chr(65 + n % 26)) not in taken
    )


def _comment(text: str) -> str:
    return " ".join(text.split())


def _plan_line(scene: Scene) -> str:
    results = scene.results
    if results.source:
        return f"Read from {results.source}."
    locked = f"locked on {sentences.day(results.locked)}" if results.locked else "not locked"
    return f"Plan {results.plan_hash or 'without a hash'}, {locked}."


def _numbers(scene: Scene) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """(words of the name, value, what it is) for every number."""
    study, analysis = scene.results.study, scene.analysis
    name = study.name
    yield (name, "seeds"), number(len(study.seeds), 0), "seeds declared for each arm"
    yield (name, "arms"), number(len(study.arms), 0), "arms"
    yield (name, "plan hash"), scene.results.plan_hash or MISSING, "hash of the analysis plan"
    places = {r.name: sentences.common_places(v.mean for v in scene.values(r.name)) for r in study.responses}
    for v in analysis.arms:
        key, digits = (name, v.arm, v.response), places[v.response]
        what = f"{v.arm}, {v.response}"
        yield from _estimate(key, v.mean, what, digits, "mean")
        yield (*key, "sd"), number(v.sd), f"{what}: SD over seeds, ddof 1"
        yield (*key, "n"), number(len(v.values), 0), f"{what}: runs behind the mean, of {v.planned} planned"
        yield (*key, "diverged"), number(v.diverged, 0), f"{what}: runs that diverged"
    for c in analysis.contrasts:
        key, what = (name, c.arm, "versus", c.control, c.response), f"{c.arm} - {c.control}, {c.response}"
        yield from _estimate(key, c.difference, what, None, "difference", sign="+")
        yield (
            (*key, "p"),
            sentences.p_value(c.difference.p),
            f"{what}: two-sided p, not corrected; {scene.standing(c)}",
        )
        if c.ratio is not None:
            yield from _estimate(
                (*key, "ratio"), c.ratio, f"{c.arm} / {c.control}, {c.response}", None, "ratio"
            )
    for table in analysis.effects:
        for e in table.effects:
            key = (name, "effect", *e.factors, e.response, table.scale)
            what = f"effect of {sentences.effect_name(e)} on {e.response}, {table.scale} scale"
            yield from _estimate(key, e.estimate, what, None, "effect", sign="+")
            yield (
                (*key, "p"),
                sentences.p_value(e.estimate.p),
                f"{what}: two-sided p, not corrected; {scene.standing(e)}",
            )
    for v in analysis.verdicts:
        key, what = (name, "hypothesis", v.hypothesis), f"hypothesis {v.hypothesis}"
        yield (*key, "outcome"), v.outcome, f"{what}: {v.declared}"
        yield from _estimate(
            key, v.estimate, what, None, v.scale, sign="+" if v.scale == "difference" else ""
        )
        yield (*key, "p"), sentences.p_value(v.p), f"{what}: {_P_FOR[v.claim]}"
        yield (*key, "p against"), sentences.p_value(v.p_against), f"{what}: p against the claim"
        yield (*key, "p holm"), sentences.p_value(v.p_holm), f"{what}: the smaller p, after Holm's correction"
    for s in scene.comparable:
        key, what = (name, s.arm), f"{s.arm} on {s.hardware or 'unrecorded hardware'}"
        yield (*key, "steps per second"), number(s.steps_per_sec), f"{what}: median steps/s"
        yield (*key, "speed ratio"), number(s.ratio, 2), f"{what}: steps/s over the baseline's"
        yield (*key, "peak memory"), sentences.gigabytes(s.peak_bytes), f"{what}: peak memory"
        yield (*key, "parameters"), number(s.parameters, 0), f"{what}: parameters"
    for t in analysis.time_to:
        key, what = (name, t.arm, t.response), f"{t.arm}, {t.response}"
        yield (*key, "reached"), number(t.reached, 0), f"{what}: runs at the target, of {t.runs}"
        yield from _estimate((*key, "steps"), t.mean_steps, f"{what}: restricted steps", 0, "mean")


def _estimate(
    key: tuple[str, ...], estimate: Estimate, what: str, digits: int | None, suffix: str, sign: str = ""
) -> Iterator[tuple[tuple[str, ...], str, str]]:
    digits = sentences.common_places([estimate]) if digits is None else digits
    show = sentences.signed if sign else number
    bounds = (
        f"{sentences.level(estimate)} interval"
        if estimate.low is not None
        else f"no interval: {estimate.note}"
    )
    last = () if key[-1] == suffix else (suffix,)
    yield (*key, *last), show(estimate.value, digits), f"{what}: {suffix}, {estimate.how or 'value'}"
    yield (*key, "low"), show(estimate.low, digits), f"{what}: {bounds}"
    yield (*key, "high"), show(estimate.high, digits), f"{what}: {bounds}"


# ------------------------------------------------------------------------------------------- tables


def tables_tex(scene: Scene) -> str:
    """Arms, effects and verdicts as booktabs tables."""
    study = scene.results.study
    label = macro_name(study.name)
    parts = [
        f"% Tables of study {_comment(study.name)}. Needs \\usepackage{{booktabs}} and \\usepackage[T1]{{fontenc}}.",
        f"% {_comment(_plan_line(scene))}",
        "",
    ]
    found = [("arms", tables.arms(scene))]
    found += [(f"effects-{r.name}", t) for r in study.responses if (t := tables.effects(scene, r))]
    if not scene.analysis.effects:
        found += [(f"contrasts-{r.name}", t) for r in study.responses if (t := tables.contrasts(scene, r))]
    if (verdicts := tables.verdicts(scene)) is not None:
        found.append(("verdicts", verdicts))
    if (speed := training.speed(scene)) is not None:
        found.append(("speed", speed))
    parts += [_table_tex(table, f"tab:{label}-{key}") for key, table in found]
    return "\n".join(parts)


def _table_tex(table: Table, label: str) -> str:
    """One table; sentences (the reason of a verdict) stay in the report, since a column has no room for them."""
    kept = [
        i for i, column in enumerate(table.columns) if column.where == "everywhere" and column.name != "why"
    ]
    columns = [table.columns[i] for i in kept]
    form = "".join("l" if column.kind == "words" else "r" for column in columns)
    caption = f"{table.title}. {table.caption}" if table.title else table.caption
    lines = [
        r"\begin{table}[t]",
        r"  \centering\small",
        f"  \\caption{{{escape(caption)}}}",
        f"  \\label{{{escape_label(label)}}}",
        f"  \\begin{{tabular}}{{{form}}}",
        r"    \toprule",
        "    " + " & ".join(escape(column.name) for column in columns) + r" \\",
        r"    \midrule",
    ]
    lines += [
        "    " + " & ".join(_cell_tex(row[i], first=i == 0) for i in kept) + r" \\" for row in table.rows
    ]
    lines += [r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


def _cell_tex(cell: Cell, first: bool) -> str:
    note = f" {{\\footnotesize {escape(cell.note)}}}" if cell.note and not first else ""
    return escape(cell.text) + note


def escape_label(text: str) -> str:
    """A label: letters, digits, `-`, `:` and `.`; TeX takes others for commands."""
    return re.sub(r"[^A-Za-z0-9:.-]", "-", text)


# ------------------------------------------------------------------------------------------ methods


def methods_md(scene: Scene, origin: Origin) -> str:
    """What a reviewer asks for (NeurIPS checklist 7 and 8), as paragraphs to adapt."""
    title = f"# Methods: {scene.results.study.title or scene.results.study.name}"
    return "\n\n".join([title, *methods_paragraphs(scene, origin)]) + "\n"


def methods_paragraphs(scene: Scene, origin: Origin) -> list[str]:
    """Design, bars, tests, learning rates, compute, software: each a paragraph, from the records alone."""
    return [
        p for p in (_design(scene), _bars(scene), _tests(scene), _tuning(scene), _compute(scene, origin)) if p
    ]


def _design(scene: Scene) -> str:
    results, study = scene.results, scene.results.study
    planned = len(study.arms) * len(study.seeds)
    done = sum(run.state == "done" for run in results.confirm)
    lost = sum(run.state == "diverged" for run in results.confirm)
    text = (
        f"Each of {count(len(study.arms), 'arm')} was planned with the same {count(len(study.seeds), 'training seed')} "
        f"({listed([str(s) for s in study.seeds[:10]])}{', …' if len(study.seeds) > 10 else ''}); {done} of {planned} "
        f"runs finished and {lost} diverged. The unit of replication is the training seed. "
    )
    rules = "; ".join(
        f"{r.name} is the {sentences.rule(r)} ({sentences.goal(r)} is better)" for r in study.responses
    )
    text += f"Responses: {rules}. "
    if results.source:
        return f"{text}The values were read from {results.source}; no analysis plan was locked."
    if not results.locked:
        return f"{text}The analysis plan (hash {results.plan_hash or 'none'}) was not locked before the runs."
    fixed = f"Hypotheses, margins, responses and seeds were fixed on {sentences.day(results.locked)}"
    if early := len(begun_before_lock(results)):
        text += (
            f"{fixed} (plan hash {results.plan_hash}), after {count(early, 'confirmatory run')} had begun: all "
            "verdicts are exploratory."
        )
    else:
        text += f"{fixed}, before the first confirmatory run (plan hash {results.plan_hash})."
    n = len(results.amendments)
    return f"{text} The plan was amended {count(n, 'time')} afterwards." if n else text


def _bars(scene: Scene) -> str:
    values = scene.analysis.arms
    with_bars = [v for v in values if v.mean.low is not None]
    if not with_bars:
        note = next((v.mean.note for v in values if v.mean.note), "")
        return f"No intervals are given{f': {note}' if note else ''}; a ± would not mean anything."
    level, n = sentences.level(with_bars[0].mean), sorted({v.mean.n for v in with_bars})
    runs = f"n = {n[0]}" if len(n) == 1 else f"n = {n[0]} to {n[-1]}"
    text = (
        f"Error bars are {level} confidence intervals of the mean over training seeds (Student t, {runs}; not standard "
        "deviations and not standard errors); they capture the variation between seeds, which set initialisation and "
        "the order of the data, and not that of the evaluation set. Standard deviations use n − 1."
    )
    timed = {r.name for r in scene.results.study.responses if r.reduce == "time_to"}
    lacking = [v for v in values if not v.complete and v.response not in timed]
    partial = list(dict.fromkeys(f"{v.arm} ({sentences.seeds(v)})" for v in lacking))
    if partial:
        text += f" Not every seed has a value in {listed(partial[:12])}; means are of the runs that finished."
    return text


def _tests(scene: Scene) -> str:
    analysis = scene.analysis
    fitted = [t for t in analysis.effects if t.effects]
    parts = []
    if fitted:
        primary = fitted[0]
        parts.append(
            "Main effects and interactions of the factorial were estimated with seeds as blocks. "
            f"{primary.response}: {tables.method(primary)}"
        )
    hows = list(dict.fromkeys(c.difference.how for c in analysis.contrasts if c.difference.how))
    if hows:
        parts.append(f"Arms were compared with {scene.results.study.baseline} by {listed(hows[:3])}.")
    if analysis.verdicts:
        primary = sum(v.primary for v in analysis.verdicts)
        parts.append(
            f"{count(len(analysis.verdicts), 'hypothesis', 'hypotheses')} were declared, {primary} of them primary: "
            "equivalence was tested by two one-sided tests, and p-values of the primary ones were corrected by Holm's "
            "method. Everything else is exploratory and uncorrected."
        )
    return " ".join(parts)


def _tuning(scene: Scene) -> str:
    rule = scene.results.study.learning_rate
    if rule is None:
        rates = sorted({run.learning_rate for run in scene.results.confirm if run.learning_rate is not None})
        if not rates:
            return "Learning rates were not recorded."
        return f"Learning rates were not tuned: {listed([f'{rate:g}' for rate in rates[:8]])} in all runs."
    how = {
        "best_mean": "the one with the best mean among those at which no run diverged",
        "largest_stable": "the largest at which no run diverged",
    }[rule.rule]
    edge = [curve.arm for curve in scene.analysis.rates if curve.at_edge]
    text = (
        f"Each arm's learning rate was chosen from {_grids(rule)} on the tuning seeds "
        f"{listed([str(s) for s in rule.tuning_seeds])}: {how}. Results are from other seeds."
    )
    return f"{text} The chosen rate lies at the edge of the grid for {listed(edge)}." if edge else text


def _grids(rule: LearningRate) -> str:
    own = (f"for {arm} from {_rates(grid)}" for arm, grid in rule.grids.items())
    return ", ".join([_rates(rule.grid), *own])


def _rates(grid: Sequence[float]) -> str:
    return listed([f"{rate:g}" for rate in grid])


def _compute(scene: Scene, origin: Origin) -> str:
    hardware = list(dict.fromkeys(s.hardware for s in scene.analysis.speed if s.hardware))
    parts = [f"Hardware: {listed(hardware)}." if hardware else "The hardware was not recorded."]
    if splits := training.accumulation(scene):
        parts.append(splits)
    words = compute_words(scene.analysis.compute)
    if words:
        parts.append("Compute: " + "; ".join(f"{key} {value}" for key, value in words) + ".")
        parts += [TIMES] if "run_hours" in scene.analysis.compute else []
    else:
        parts.append("The compute used was not recorded.")
    asked = [q for q in origin.answers if q not in ("hardware", "XLA flags")]
    if asked:
        parts.append("Software: " + "; ".join(f"{q} {origin.answer(q)}" for q in asked) + ".")
    else:
        parts.append("Software versions were not recorded.")
    return " ".join(parts)


def compute_words(compute: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, how much) of the compute that was used, in all and per run; what was not recorded is left out."""
    words = []
    if (runs := compute.get("runs")) is not None:
        states = [f"{n} {key.removeprefix('runs_')}" for key, n in compute.items() if key in _STATES]
        words.append(("runs", f"{runs}" + (f" ({', '.join(states)})" if states else "")))
    if tuning := compute.get("runs_tuning"):
        words.append(("of them to tune learning rates", f"{tuning}"))
    hours, left_out = compute.get("run_hours"), compute.get("runs_without_times", 0)
    if hours is not None:
        timed = sum(compute.get(key, 0) for key in ("runs_done", "runs_diverged")) - left_out
        words.append(("training time of the runs that ended", sentences.duration(hours)))
        if timed > 0:
            words.append(("training time of each of them", sentences.duration(hours / timed)))
    if (hours := compute.get("device_hours")) is not None:
        words.append(("device time in all (runs of a cohort share a device)", sentences.duration(hours)))
    for place, hours in compute.get("device_hours_on", {}).items():
        words.append((f"device time on {place}", sentences.duration(hours)))
    if left_out:
        words.append(("runs without recorded times, in none of these", f"{left_out}"))
    return words


_STATES = frozenset(f"runs_{state}" for state in (*runstore.STATES, "unreadable"))
