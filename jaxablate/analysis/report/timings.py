"""The step benchmark of a study as tables and a figure, for the report, for Markdown and for a terminal alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

from jaxablate.analysis import sentences
from jaxablate.analysis.benchmarks import (
    ArmBenchmark,
    BatchBenchmark,
    Judgement,
    StepBenchmark,
    Timing,
    slug,
    span,
)
from jaxablate.analysis.findings import Estimate
from jaxablate.analysis.plots import PALETTE
from jaxablate.analysis.report.document import (
    Alert,
    Block,
    Cell,
    Column,
    Document,
    Paragraph,
    Section,
    Table,
    Tone,
)
from jaxablate.analysis.report.figures import WIDTH, Drawn, Plan, render
from jaxablate.analysis.report.rowplots import ratios
from jaxablate.analysis.report.scene import PLAIN, Scene

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TONE: dict[Judgement, Tone] = {
    "met": "good",
    "not met": "bad",
    "inconclusive": "open",
    "not measured": "none",
}
Colors = Mapping[str, str]


def document(found: StepBenchmark) -> Document:
    """A benchmark by itself."""
    colors = default_colors(found)
    parts = [
        ("arms", "Time and memory", [arms(found, colors), *warnings(found)]),
        ("effects", "Effects of the factors", [effects(found)]),
        ("verdicts", "What was expected", [expected(found)]),
    ]
    sections = [Section(key, title, tuple(b for b in blocks if b)) for key, title, blocks in parts]
    return Document(
        f"{found.study}: the training step of each arm, timed in turns",
        f"{found.hardware}; {about(found)}",
        tuple(section for section in sections if section.blocks),
    )


def about(found: StepBenchmark) -> str:
    """What was measured, in a line."""
    scale = f"scale {found.scale}, " if found.scale else ""
    return (
        f"{scale}batch {found.batch_size}{_of_what(found)}, {sentences.count(found.rounds, 'round')}; "
        f"data: {found.data}; {sentences.day(found.time)}"
    )


def _of_what(found: StepBenchmark | BatchBenchmark) -> str:
    """Which step: of the cohort's, if it has several members, and of the task's, if it has several stages."""
    members = f" for each of {found.members} members that differ in seed" if found.members > 1 else ""
    return members + (f", stage {found.stage}" if found.stage not in ("", "main") else "")


def blocks(found: StepBenchmark, colors: Colors) -> list[Block]:
    """What a report says of a benchmark, in its section on speed."""
    title = f"Benchmark, timed in turns, on {found.hardware}"
    return [b for b in (arms(found, colors, title), *warnings(found), effects(found)) if b]


def warnings(found: StepBenchmark) -> list[Block]:
    """What to know before the numbers are believed."""
    if not found.warnings:
        return []
    return [Alert("Before you trust the intervals", tuple(f"{w}." for w in found.warnings))]


def arms(found: StepBenchmark, colors: Colors, title: str = "") -> Table:
    """A row for each arm: times of its programs and their ratios to the baseline's, rates, memory, kernels."""
    shown = [*found.arms, *([found.control] if found.control else [])]
    number = sentences.number
    made: list[tuple[Column, Callable[[ArmBenchmark], Cell]]] = [
        (Column("arm", "words"), lambda a: _name(found, a, colors))
    ]
    narrow: Literal["everywhere", "page"] = "page" if len(found.whats) > 1 else "everywhere"
    for what in found.whats:
        made.append((Column(f"{what} (ms)"), lambda a, what=what: _time(a.timing(what))))
        made.append(
            (Column(f"{what}, ×"), lambda a, what=what: _ratio(t.ratio if (t := a.timing(what)) else None))
        )
    made += [
        (Column("steps/s", where=narrow), lambda a: Cell(number(a.steps_per_sec if found.members > 1 else None))),
        (Column("examples/s", where=narrow), lambda a: Cell(number(a.examples_per_sec))),
        (Column("tokens/s", where="page"), lambda a: Cell(number(a.tokens_per_sec))),
        (Column("MFU"), lambda a: Cell(sentences.share(a.mfu))),
        (Column("memory"), lambda a: _memory(a, found.baseline)),
        (Column("compile (s)", where=narrow), lambda a: Cell(number(a.compile_sec, 1))),
        (Column("parameters", where="page"), lambda a: Cell(number(a.parameters, 0))),
        (Column(_how_title(found), "words"), lambda a: Cell(_how(found, a), tone="bad" if a.problem else "")),
    ]  # fmt: skip
    filled = [(c, cell) for c, cell in made if any(cell(arm).text != sentences.MISSING for arm in shown)]
    rows = tuple(tuple(cell(arm) for _, cell in filled) for arm in shown)
    return Table(title, tuple(column for column, _ in filled), rows, _caption(found, title))


def _time(timing: Timing | None) -> Cell:
    if timing is None:
        return Cell(sentences.MISSING)
    return Cell(sentences.number(timing.median_ms), f"± {sentences.number(timing.spread_ms)}")


def _memory(arm: ArmBenchmark, baseline: str) -> Cell:
    ratio = f"×{arm.memory_ratio:.3f}" if arm.memory_ratio and arm.arm != baseline else ""
    return Cell(sentences.gigabytes(arm.memory["peak"] if arm.memory else None), ratio)


def _caption(found: StepBenchmark, title: str) -> str:
    first = next((t.ratio for a in found.arms for t in a.timings if t.ratio and t.ratio.how), None)
    intervals = f", with the {sentences.level(first)} interval ({first.how})" if first else ""
    said = {
        "step": "the step is the training loop's own program",
        "forward": f"forward: the loss of {found.micro_batch} examples",
        "backward": f"backward: from what the forward pass of {found.micro_batch} kept to the gradient, "
        "waited for each time, so one launch is part of it",
    }
    return (
        (f"A benchmark and no training run: {about(found)}. " if title else "")
        + f"Medians of {found.rounds} rounds in which the arms took turns, ± half the interquartile range; "
        f"{'; '.join(said[what] for what in found.whats)}. × is time over the baseline's of the same round{intervals}: "
        "below 1 is faster. "
        + ("The last row is the baseline again, compiled a second time: its true ratio is 1. " if found.control else "")
        + (f"A step is one of {found.members} members, and rates are of all together. " if found.members > 1 else "")
        + _carried(found)
        + ("Compile times are from a machine with a compilation cache. " if found.compilation != "anew" else "")
        + "Memory is what the compiler laid out for the step on one device: state, batch, temporaries."
    )  # fmt: skip


def _carried(found: StepBenchmark) -> str:
    words = [f"{_slot(slot)}: {name}" for slot, name in _common(found).items()]
    return f"All arms: {', '.join(words)}. " if words else ""


def _name(found: StepBenchmark, arm: ArmBenchmark, colors: Colors) -> Cell:
    note = "baseline" if arm.arm == found.baseline != "baseline" else ""
    return Cell(arm.arm, note, swatch=colors.get(arm.arm, PLAIN))


def _ratio(ratio: Estimate | None) -> Cell:
    if ratio is None:
        return Cell(sentences.MISSING)
    if ratio.low is None or ratio.high is None:
        return Cell(f"{ratio.value:.3f}", ratio.note)
    return Cell(f"{ratio.value:.3f}", f"({ratio.low:.3f} to {ratio.high:.3f})")


def _how(found: StepBenchmark, arm: ArmBenchmark) -> str:
    """What carried an arm, less what carried all of them."""
    if arm.problem:
        return f"not measured: {arm.problem}"
    varied = _varied(found)
    carried = {slot: name for slot, name in arm.kernels.items() if slot in varied}
    words = [name if len(varied) == 1 else f"{_slot(slot)}: {name}" for slot, name in carried.items()]
    if arm.accumulation > 1:
        words.append(f"{arm.accumulation} micro-batches")
    if arm.remat != "none":
        words.append(f"remat {arm.remat}")
    return ", ".join(words) or sentences.MISSING


def _how_title(found: StepBenchmark) -> str:
    varied = _varied(found)
    return _slot(varied[0]) if len(varied) == 1 else "carried by"


def _varied(found: StepBenchmark) -> list[str]:
    """The slots in which some arm has another kernel."""
    common = _common(found)
    return list(dict.fromkeys(slot for arm in found.arms for slot in arm.kernels if slot not in common))


def _common(found: StepBenchmark) -> dict[str, str]:
    """The kernels that all arms have in common."""
    first, *others = [arm.kernels for arm in found.arms if not arm.problem] or [{}]
    return {slot: name for slot, name in first.items() if all(o.get(slot) == name for o in others)}


def _slot(path: str) -> str:
    """`model.image.norm_impl` -> `image.norm`."""
    return path.removeprefix("model.").removesuffix("impl").rstrip("._")


def effects(found: StepBenchmark) -> Table | Paragraph | None:
    """Main effects and interactions as ratios, or why there are none."""
    if not found.effects:
        return Paragraph(f"{sentences.capital(found.effects_note)}.") if found.effects_note else None
    quantities = list(dict.fromkeys(effect.quantity for effect in found.effects))
    names = list(dict.fromkeys(effect.factors for effect in found.effects))
    of = {(effect.factors, effect.quantity): effect.estimate for effect in found.effects}
    rows = [(Cell(" × ".join(name)), *(_ratio_cell(of.get((name, q))) for q in quantities)) for name in names]
    caption = (
        "A factor: time (or memory) with it over that without it, the geometric mean over the other factors' cells. "
        "Several factors: theirs together over the product of each; below 1 they save more together than they promise "
        f"one by one, above 1 less.{f' {sentences.capital(found.effects_note)}.' if found.effects_note else ''}"
    )
    columns = (Column("factor", "words"), *(Column(f"{q}, ×") for q in quantities))
    return Table("Effects on time and memory", columns, tuple(rows), caption)


def _ratio_cell(estimate: Estimate | None) -> Cell:
    if estimate is not None and estimate.how == "exact":
        return Cell(f"{estimate.value:.3f}")
    return _ratio(estimate)


def expected(found: StepBenchmark) -> Table | None:
    """The study's expectations with their verdicts."""
    if not found.judged:
        return None
    rows = [
        (
            Cell(item.expectation.text),
            Cell(item.verdict, tone=TONE[item.verdict]),
            Cell(item.reason, item.of if item.measured else ""),
        )
        for item in found.judged
    ]
    caption = (
        "A verdict needs the whole interval on one side of a bound. It is of this hardware and this scale."
    )
    columns = (
        Column("expected", "words"),
        Column("verdict", "words"),
        Column("why", "words"),
    )
    return Table("", columns, tuple(rows), caption)


def figure(found: StepBenchmark, colors: Colors) -> Plan | None:
    """The ratio of every arm to the baseline, with its interval; None if nothing has one."""
    rows = [
        (arm, found_ratio)
        for arm in (*found.arms, *([found.control] if found.control else []))
        if (timing := arm.timing("step")) and (found_ratio := timing.ratio)
    ]
    if not rows:
        return None
    lines = [(arm.arm, estimate, colors.get(arm.arm, PLAIN)) for arm, estimate in rows]
    read = [f"{name} {span(estimate)}" for name, estimate, _ in lines]
    bars = f" Bars: {sentences.level(rows[0][1])} intervals." if rows[0][1].low is not None else ""

    def draw(canvas: Figure) -> None:
        ratios(canvas.subplots(), lines, f"Step time over {found.baseline}'s, in turns")

    return Plan(
        f"bench_step_{slug(found.hardware)}",
        "speed",
        f"Step time of each arm over the baseline's: {'; '.join(read)}.",
        f"Step time over that of {found.baseline}, a benchmark in turns on {found.hardware}, {about(found)}.{bars}"
        + (" The last row is the baseline again." if found.control else ""),
        (WIDTH, 0.9 + 0.3 * len(lines)),
        draw,
    )


def batch_document(found: BatchBenchmark) -> Document:
    """The largest batches, by themselves."""
    scale = f"scale {found.scale}, " if found.scale else ""
    return Document(
        f"{found.study}: the largest batch of each arm",
        f"{found.hardware}; {scale}{sentences.gigabytes(found.memory)} ({found.memory_source}); "
        f"{sentences.day(found.time)}",
        (Section("arms", "Largest batch", (batches(found),)),),
    )


def batches(found: BatchBenchmark, title: str = "") -> Table:
    """The largest batch of each arm that fits, and what its step needs then."""
    base = next((arm.fits for arm in found.arms if arm.arm == found.baseline), None)
    rows = []
    for arm in found.arms:
        ratio = f"×{arm.fits / base:.3g}" if arm.fits and base and arm.arm != found.baseline else ""
        fails = (
            sentences.number(arm.fails)
            if arm.fails
            else "everything fitted"
            if arm.fits
            else sentences.MISSING
        )
        rows.append((
            Cell(arm.arm),
            Cell("none" if arm.fits is None and arm.fails else sentences.number(arm.fits), ratio),
            Cell(sentences.gigabytes(arm.peaks.get(str(arm.fits)))),
            Cell(fails),
            Cell(sentences.number(arm.accumulation)),
            Cell(arm.problem or sentences.MISSING, tone="bad" if arm.problem else ""),
        ))  # fmt: skip
    caption = (
        f"The largest batch{_of_what(found)}, whose training step fits into {sentences.gigabytes(found.memory)} of one "
        f"device ({found.memory_source}) by what the compiler lays out: arguments, results, temporaries. "
        "Nothing was run; an allocator's losses come on top. The search ends within a sixteenth."
    )
    columns = (Column("arm", "words"), Column("fits"), Column("needs"), Column("does not fit"),
               Column("micro-batches"), Column("problem", "words"))  # fmt: skip
    kept = columns if any(arm.problem for arm in found.arms) else columns[:-1]
    return Table(title, kept, tuple(row[: len(kept)] for row in rows), caption)


def draw_all(scene: Scene) -> list[Drawn]:
    """The figures of a study's benchmarks."""
    plans = [figure(found, scene.colors) for found in scene.results.benchmarks]
    return [render(plan) for plan in plans if plan]


def default_colors(found: StepBenchmark) -> dict[str, str]:
    """A colour for each arm, in order."""
    return dict(zip((arm.arm for arm in found.arms), PALETTE, strict=False))
