"""A plan in words, for a terminal: what each arm takes, what the study takes, when which cohort runs where."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Literal

from jaxablate.analysis import sentences
from jaxablate.analysis.sentences import MISSING, duration, gigabytes, number
from jaxablate.analysis.terminal import as_text
from jaxablate.schedule.plan.plan import PLURAL, ArmPlan, Plan, Scheduled

_ROWS = 24  # of the schedule, beyond which --explain shows them
Detail = Literal["brief", "full"]


def table(plan: Plan, detail: Detail = "brief", width: int | None = None) -> str:
    """The whole plan as text.

    Args:
        plan: to be shown.
        detail: `full` shows every choice and every cohort.
        width: characters; default: the terminal's, or 120 where there is none.
    """
    width = width or max(shutil.get_terminal_size((120, 24)).columns, 80)
    parts = [_arms(plan, width), "\n".join(_wrapped(_totals(plan), width))]
    if plan.elements:
        parts.append(_schedule(plan, detail, width))
    if hypotheses := [_hypothesis(plan, n) for n in range(len(plan.hypotheses))]:
        parts.append("\n".join(["seeds that the hypotheses need", *_wrapped(hypotheses, width, "  ")]))
    if choices := list(_choices(plan, detail)):
        parts.append("\n".join(["choices", *_wrapped(choices, width, "  ")]))
    said = [f"problem: {arm.arm}: {arm.problem}" for arm in plan.arms if arm.problem]
    said += [f"note: {note}" for note in plan.notes]
    if said:
        parts.append("\n".join(_wrapped(said, width)))
    return "\n\n".join(parts)


def cohort(element: Scheduled) -> str:
    """`rms_only, seeds 0,1,2`; of a tuning cohort and of a stage with its name."""
    tuning = (
        f" tuning at {', '.join(f'{rate:g}' for rate in element.rates)}" if element.phase == "tuning" else ""
    )
    stage = f" {element.stage}" if element.stage else ""
    return f"{element.arm}{tuning}{stage}, {named(element.seeds)}"


def named(seeds: Sequence[int]) -> str:
    """`seed 0`, `seeds 0,1,2`."""
    return f"seed{'s' if len(seeds) > 1 else ''} {','.join(map(str, seeds))}"


# ------------------------------------------------------------------------------------------- parts


def _arms(plan: Plan, width: int) -> str:
    """A row for each arm. A terminal that is too narrow for all columns goes without the least needed ones."""
    rows = [_arm(arm) for arm in plan.arms]
    if len(rows) > 1:
        total = {"arm": "all", "runs": number(plan.runs, 0), "cohorts": number(_cohorts(plan), 0)}
        rows.append(
            {**total, "hours": _hours(plan.hours), "longest": _hours(plan.longest), "cost": _money(plan.cost)}
        )
    names = ["arm", "params", "FLOP/step", "steps", "examples", "tokens", "memory", "fits", "micro ≤", "runs",
             "cohorts", "hours", "longest", "cost"]  # fmt: skip
    if not any(arm.tokens for arm in plan.arms):
        names.remove("tokens")
    if plan.request.rate is None:
        names.remove("cost")
    for least in ("", "steps", "examples", "FLOP/step", "longest"):
        names = [name for name in names if name != least]
        text = _grid(names, rows, total=len(rows) > 1)
        if max(map(len, text.splitlines())) <= width:
            break
    return text


def _arm(arm: ArmPlan) -> dict[str, str]:
    about = "~" if arm.memory_source.startswith("estimate") else ""
    largest = arm.largest_micro_batch
    return {
        "arm": arm.arm,
        "params": _short(arm.parameters),
        "FLOP/step": MISSING
        if arm.flops_per_step is None
        else f"{arm.flops_per_step:.3g}".replace("e+", "e"),
        "steps": number(arm.steps, 0),
        "examples": _short(arm.examples),
        "tokens": _short(arm.tokens),
        "memory": MISSING if arm.memory is None else f"{about}{gigabytes(arm.memory)}",
        "fits": MISSING if arm.fits is None else "yes" if arm.fits else "OOM",
        "micro ≤": number(largest, 0) if largest is not None or arm.memory is None else "none",
        "runs": number(arm.runs, 0),
        "cohorts": number(arm.cohorts, 0),
        "hours": _hours(arm.hours),
        "longest": _hours(arm.longest),
        "cost": _money(arm.cost),
    }


def _cohorts(plan: Plan) -> int:
    return sum(arm.cohorts for arm in plan.arms)


def _totals(plan: Plan) -> Iterable[str]:
    asked, places = plan.request, _places(plan)
    text = (
        f"{plan.study} on {asked.target}: {sentences.count(plan.runs, 'run')} in "
        f"{sentences.count(_cohorts(plan), 'cohort')}"
    )
    if plan.hours is not None:
        text += f", {_hours(plan.hours)} {_unit(plan)}"
        if plan.cost is not None and asked.rate is not None:
            text += f", {_money(plan.cost)} at {asked.rate:g} an hour"
        text += f"; the longest cohort takes {duration(plan.longest)}"
    yield text
    if known := sorted({(a.memory_source, a.hours_source) for a in plan.arms if a.memory_source}):
        hours = sorted({h for _, h in known if h})
        sources = f"memory: {sentences.listed(sorted({m for m, _ in known}))}"
        yield f"{sources}; hours: {sentences.listed(hours)}" if hours else sources
    if plan.makespan is not None:
        bound = f", {duration(plan.bound)} at best" if plan.bound is not None else ""
        rent = (
            f"; {_money(plan.makespan * asked.gpus * asked.rate)} for {places}"
            if asked.rate is not None
            else ""
        )
        yield f"finished after {duration(plan.makespan)} on {places}{bound}{rent}"
        yield from _chained(plan)
    if plan.dropped:
        yield (
            f"for the deadline of {duration(asked.deadline)}, {named(plan.dropped)} of every arm "
            f"{'is' if len(plan.dropped) == 1 else 'are'} dropped; {named(plan.seeds)} are kept"
        )
    if plan.short:
        yield f"the deadline cannot be met: {plan.short}"
    elif asked.deadline is not None and plan.makespan is not None:
        spare = duration(asked.deadline - plan.makespan)
        yield f"the deadline of {duration(asked.deadline)} is met, with {spare} to spare"


def _chained(plan: Plan) -> Iterable[str]:
    """What the placement of the study's document would take instead."""
    if not plan.chains:
        return
    longest = max(plan.chains, key=lambda chain: chain.hours)
    each = "; ".join(f"{' → '.join(chain.arms)} {duration(chain.hours)}" for chain in plan.chains)
    yield (
        f"as the document places them, after {duration(longest.hours)} on "
        f"{sentences.count(len(plan.chains), plan.request.place, PLURAL[plan.request.place])}, with "
        f"{number(longest.steps, 0)} updates on one instead of {number(plan.steps, 0)}: {each}"
    )


def _schedule(plan: Plan, detail: Detail, width: int) -> str:
    rows = [
        {
            plan.request.place: str(e.gpu),
            "start": duration(e.start),
            "end": duration(e.end),
            "cohort": cohort(e),
            "after": ", ".join(e.after),
        }
        for e in plan.elements
    ]
    shown = rows if detail == "full" else rows[:_ROWS]
    names = [name for name in rows[0] if name != "after" or any(row["after"] for row in shown)]
    more = [f"and {len(rows) - len(shown)} more; --explain shows all"] if len(shown) < len(rows) else []
    lines = _grid(names, shown).splitlines()
    if max(map(len, lines)) > width:
        lines = _grid([name for name in names if name != "after"], shown).splitlines()
    return "\n".join([*lines, *more])


def _hypothesis(plan: Plan, n: int) -> str:
    need = plan.hypotheses[n]
    if need.seeds is None:
        return f"{need.hypothesis}: not known: {need.why}"
    text = f"{need.hypothesis}: {need.seeds} for a power of {need.power:g} ({need.why})"
    if not need.more:
        return f"{text}; the plan has {len(plan.seeds)}"
    price = f", {_hours(need.hours)} {_unit(plan)}" if need.hours is not None else ""
    money = f", {_money(need.cost)}" if need.cost is not None else ""
    return f"{text}: {need.more} more than planned{price}{money}"


def _choices(plan: Plan, detail: Detail) -> Iterable[str]:
    """What arms share is said once; in brief, what differs from the common choice or is no matter of course."""
    arms_of: dict[str, list[str]] = {}
    for arm in plan.arms:
        for choice in arm.choices:
            arms_of.setdefault(choice, []).append(arm.arm)
    everyone = [arm.arm for arm in plan.arms if arm.choices]
    for choice, arms in arms_of.items():
        who = "all arms" if arms == everyone and len(arms) > 1 else ", ".join(arms)
        if detail == "full" or not choice.endswith("all runs of the arm in one program"):
            yield f"{who}: {choice}"


# ------------------------------------------------------------------------------------------ pieces


def _places(plan: Plan) -> str:
    return sentences.count(plan.request.gpus, plan.request.place, PLURAL[plan.request.place])


def _unit(plan: Plan) -> str:
    return "hours of a process" if plan.request.on_cpu else "GPU-hours"


def _hours(hours: float | None) -> str:
    if hours is None:
        return "?"
    return number(hours, 1 if hours >= 10 else 2 if hours >= 0.1 else 4)


def _money(amount: float | None) -> str:
    return "?" if amount is None else number(amount, 2 if amount < 1000 else 0)


def _short(count: int | None) -> str:
    """`23.43 M`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count is not None and count >= size:
            return f"{count / size:.2f} {unit}"
    return number(count, 0)


def _wrapped(lines: Sequence[str] | Iterable[str], width: int, indent: str = "") -> list[str]:
    return [
        part
        for line in lines
        for part in textwrap.wrap(
            line, width, initial_indent=indent, subsequent_indent=f"{indent}  ", break_on_hyphens=False
        )
    ]


def _grid(names: Sequence[str], rows: Sequence[dict[str, str]], total: bool = False) -> str:
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        grid.add_column(
            name, justify="left" if name in ("arm", "cohort", "after", "fits") else "right", no_wrap=True
        )
    for at, row in enumerate(rows):
        grid.add_row(*(row.get(name, "") for name in names), end_section=total and at == len(rows) - 2)
    return as_text(grid)
