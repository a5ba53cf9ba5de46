"""What a check found: a verdict and a reason for every arm and rule, as a table, as JSON."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jaxablate.analysis.terminal import as_text
from jaxablate.disk import plain

if TYPE_CHECKING:
    from rich.table import Table

Verdict = Literal["ok", "fail", "note", "skipped"]
ORDER: tuple[Verdict, ...] = ("fail", "skipped", "note", "ok")  # as they are shown


@dataclass(frozen=True)
class Finding:
    """One rule's verdict on one arm, with the reason in words and the numbers behind it."""

    arm: str
    check: str
    verdict: Verdict
    reason: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One arm in the table; None where it is not known."""

    arm: str
    changes: Mapping[str, Any]
    function: str  # "same" or "changed", against the baseline; "" if not known or nothing was to change
    parameters: int | None
    flops: float | None  # per training example
    kernel: str


@dataclass(frozen=True)
class Report:
    """All findings on a study's arms."""

    study: str
    baseline: str
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether any rule failed for any arm."""
        return any(finding.verdict == "fail" for finding in self.findings)

    def of(self, arm: str, *verdicts: Verdict) -> list[Finding]:
        """An arm's findings, those with one of the verdicts if any is given."""
        return [f for f in self.findings if f.arm == arm and (not verdicts or f.verdict in verdicts)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data in JSON's types; what is not finite is null."""
        arms = [
            {
                "arm": row.arm,
                "verdict": "fail" if self.of(row.arm, "fail") else "ok",
                "changes": dict(row.changes),
                "function": row.function or None,
                "parameters": row.parameters,
                "flops_per_example": row.flops,
                "kernel": row.kernel or None,
                "findings": [
                    {"check": f.check, "verdict": f.verdict, "reason": f.reason, "values": dict(f.values)}
                    for f in self.of(row.arm)
                ],
            }
            for row in self.rows
        ]
        found = {"study": self.study, "baseline": self.baseline, "failed": self.failed}
        return plain({**found, "seconds": round(self.seconds, 1), "arms": arms})

    def table(self, width: int | None = None, *, verbose: bool = False) -> str:
        """A row for each arm, and below it what is not ok; with `verbose` every finding.

        `width` in characters; default: the terminal's, or 120 where there is none. A table that is wider
        goes without its FLOP, which findings name wherever they matter.
        """
        from rich.console import Console

        width = width or max(shutil.get_terminal_size((120, 24)).columns, 60)
        console = Console(width=width, color_system=None, highlight=False, markup=False)
        table = self._rows("with FLOP")
        if console.measure(table, options=console.options.update(max_width=1000)).maximum > width:
            table = self._rows("without FLOP")
        below = list(self._below(width, ORDER if verbose else ORDER[:-1]))
        return "\n".join(
            [
                as_text(table, width),
                *([""] if below else []),
                *below,
                "",
                *self._not_run(width),
                self._summary(),
            ]
        )

    def _rows(self, flop: Literal["with FLOP", "without FLOP"]) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        columns = ["arm", "changes", "function", "params", "GFLOP", "kernel", "verdict"]
        if flop == "without FLOP":
            columns.remove("GFLOP")
        for name in columns:
            right = name in ("params", "GFLOP")
            whole = right or name in ("arm", "kernel")
            table.add_column(name, justify="right" if right else "left", no_wrap=whole, overflow="fold")
        base = next((row for row in self.rows if row.arm == self.baseline), None)
        for row in self.rows:
            changes = "\n".join(f"{_short(path)}={_word(value)}" for path, value in row.changes.items())
            cells = {
                "arm": row.arm,
                "changes": changes or "–",
                "function": row.function or "–",
                "params": _count(row.parameters) + _against(row.parameters, base and base.parameters),
                "GFLOP": _giga(row.flops) + _against(row.flops, base and base.flops),
                "kernel": row.kernel or "–",
                "verdict": self._verdict(row.arm),
            }
            table.add_row(*(cells[name] for name in columns))
        return table

    def _verdict(self, arm: str) -> str:
        failed = list(dict.fromkeys(f.check for f in self.of(arm, "fail")))
        if failed:
            return f"FAIL: {', '.join(failed)}"
        return "ok, not run" if self.of(arm, "skipped") else "ok"

    def _below(self, width: int, verdicts: tuple[Verdict, ...]) -> Iterator[str]:
        """Findings by verdict; what several arms share is said once."""
        everyone = [row.arm for row in self.rows]
        for verdict in verdicts:
            arms_of: dict[tuple[str, str], list[str]] = {}
            for finding in self.findings:
                if finding.verdict == verdict:
                    arms_of.setdefault((finding.check, finding.reason), []).append(finding.arm)
            checks_of: dict[tuple[str, ...], list[str]] = {}
            for (check, reason), arms in arms_of.items():
                checks_of.setdefault((reason, *dict.fromkeys(arms)), []).append(check)
            for (reason, *arms), checks in checks_of.items():
                who = "all arms" if arms == everyone and len(arms) > 1 else ", ".join(arms)
                word = verdict.upper() if verdict == "fail" else verdict
                text = f"{word:<8}{who}: {', '.join(dict.fromkeys(checks))}: {reason}"
                yield from textwrap.wrap(text, width, subsequent_indent=" " * 8, break_on_hyphens=False)

    def _not_run(self, width: int) -> list[str]:
        """That something was left out, what it is, and how to have it."""
        skipped = [finding for finding in self.findings if finding.verdict == "skipped"]
        if not skipped:
            return []
        arms, checks = len({f.arm for f in skipped}), ", ".join(dict.fromkeys(f.check for f in skipped))
        text = (
            f"NOT RUN: {arms} of {len(self.rows)} arms, so checks are missing there, wholly or in part: {checks}; "
            f"check --execute runs them here, whatever that takes, and at a smaller scale it takes less"
        )
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _summary(self) -> str:
        counts = {v: sum(f.verdict == v for f in self.findings) for v in ("ok", "fail", "note", "skipped")}
        said = [f"{counts['ok']} checks ok"]
        said += [
            f"{counts[v]} {word}"
            for v, word in (("fail", "failed"), ("note", "noted"), ("skipped", "skipped, not run"))
            if counts[v]
        ]
        arms = f"{len(self.rows)} arm{'s' if len(self.rows) > 1 else ''}"
        return f"{self.study}: {arms}, {', '.join(said)}, {self.seconds:.0f} s"


def _short(path: str) -> str:
    """`model.image.attention.impl` -> `attention.impl`: the last two names say enough."""
    return ".".join(path.split(".")[1:][-2:])


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _count(parameters: int | None) -> str:
    if parameters is None:
        return "–"
    return f"{parameters:,}" if parameters < 1_000_000 else f"{parameters / 1e6:.2f} M"


def _giga(flops: float | None) -> str:
    return "–" if flops is None else f"{flops / 1e9:.4g}"


def _against(value: float | None, base: float | None) -> str:
    """Whether the baseline has as many, fewer or more."""
    if value is None or base is None:
        return ""
    return " =" if value == base else " +" if value > base else " −"
