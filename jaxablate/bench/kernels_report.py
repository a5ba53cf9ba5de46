"""What `bench kernels` says: text, Markdown, JSON, each with where and under which limits it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxablate import provenance
from jaxablate.bench import roofline
from jaxablate.bench.kernel_results import CALLS, FORMAT, CaseResult, Entry, Summary, summaries
from jaxablate.bench.limits import Limits
from jaxablate.bench.work import MATMULS
from jaxablate.disk import plain, write_bytes, write_json

FAILED, WRONG = 1, 3
ON_A_CPU = "CPU figures: they show that everything runs and is right, and say nothing about a GPU."
COLUMNS = (
    "implementation",
    "direction",
    "ms",
    "±",
    "TFLOP/s",
    "TB/s",
    "of limit",
    "× reference",
    "× best other",
    "peak MB",
    "compile s",
    "error",
)
LEGEND = (
    "ms: median of the work done once, ± half the interquartile range; with ! a call took less than "
    f"{CALLS:g} calls that do nothing, so it is compared with nothing. TFLOP/s, TB/s: useful FLOPs and fewest "
    "bytes of the case over the median. of limit: the least time that the measured limits allow, over the median. "
    "× reference, × best other: times faster than these. peak: of the program by the compiler, with * as the "
    "device counted it. On a GPU a program repeats short work, but torch_sdpa is called from Python each time. "
    "error: the largest, as a share of the oracle's root mean square."
)
GROUPS = {"paper": "the studies' shapes", "library": "the libraries' shapes", "small": "small cases"}


@dataclass(frozen=True)
class Outcome:
    """Everything that was measured.

    Attributes:
      facts: machine, versions, commit, date, options.
      limits: of the device, measured in the same process.
      results: of the cases, in order.
      path: of the JSON file.
    """

    facts: Mapping[str, Any]
    limits: Limits
    results: tuple[CaseResult, ...]
    path: Path

    @property
    def exit_code(self) -> int:
        """3 if an implementation was wrong, 1 if one failed, else 0."""
        states = {entry.status for result in self.results for entry in result.entries}
        return WRONG if "wrong" in states else FAILED if "failed" in states else 0

    @property
    def files(self) -> tuple[Path, Path, Path]:
        """The JSON file, the table and the figure."""
        return self.path, self.path.with_suffix(".md"), self.path.with_suffix(".png")

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file: `format`, `facts`, `limits`, `cases`, `summary`."""
        return plain(
            {
                "format": FORMAT,
                "note": ON_A_CPU if self.facts["platform"] == "cpu" else "",
                "facts": self.facts,
                "limits": self.limits.to_dict(),
                "cases": [result.to_dict(self.limits) for result in self.results],
                "summary": [vars(summary) for summary in summaries(self.results)],
            }
        )

    def text(self) -> str:
        """For a terminal."""
        lines = [*self._head(), ""]
        for result in self.results:
            lines.append(f"{result.op} {result.case}   {result.shape}, {result.dtype}")
            rows = [_cells(row, entry) for entry, row in _timed(result, self.limits)]
            lines += [f"  {line}" for line in _aligned([COLUMNS, *rows])] if rows else []
            lines.append("")
        left = _untimed(self.results)
        lines += ["not timed:", *(f"  {text}" for text in left), ""] if left else []
        lines += [*self._summary(), LEGEND, "", *(f"written: {path}" for path in self.files)]
        return "\n".join(lines)

    def markdown(self) -> str:
        """The same as tables, one for each operation."""
        lines = ["# Kernels", "", *(f"{line}  " for line in self._head())]
        for op in dict.fromkeys(result.op for result in self.results):
            of_op = [result for result in self.results if result.op == op]
            lines += ["", f"## {op}", "", _line(("case", "shape", "type", *COLUMNS))]
            lines.append(_line(["---"] * 5 + ["---:"] * (len(COLUMNS) - 2)))
            for result in of_op:
                for entry, row in _timed(result, self.limits):
                    lines.append(_line((result.case, result.shape, result.dtype, *_cells(row, entry))))
        left = [f"- {text}" for text in _untimed(self.results)]
        lines += ["", "## Not timed", "", *left] if left else []
        summary = self._summary()
        lines += ["", "## Over the cases", "", *(f"- {text}" for text in summary)] if summary else []
        return "\n".join([*lines, "", LEGEND, ""])

    def _head(self) -> list[str]:
        facts, limits = self.facts, self.limits
        commit = (facts["git"]["commit"] or "unknown")[:12] + (
            " with changes" if facts["git"]["dirty"] else ""
        )
        machine = [
            provenance.hardware(facts),
            *(f"{name} {facts['packages'][name]}" for name in ("jax", "jaxlib")),
            f"Python {facts['python']}",
            *([f"driver {facts['driver']}"] if facts["driver"] else []),
            f"commit {commit}",
            facts["date"],
        ]
        measured = [
            f"copy {limits.copy / 1e12:.3g} TB/s",
            *(f"{dtype} product {rate / 1e12:.3g} TFLOP/s" for dtype, rate in limits.matmul.items()),
            f"a call {limits.call * 1e6:.3g} µs",
        ]
        note = [ON_A_CPU] if facts["platform"] == "cpu" else []
        return [*note, ", ".join(machine), f"limits measured here: {', '.join(measured)}"]

    def _summary(self) -> list[str]:
        found = summaries(self.results)
        return [
            _sentence(s) for s in found if s.direction == "both" and s.cases > 1 and s.name != "reference"
        ]


def write(outcome: Outcome) -> None:
    """The JSON file, the table beside it, and the figure; each atomically."""
    data, table, figure = outcome.files
    write_json(data, outcome.to_dict())
    write_bytes(table, outcome.markdown().encode())
    write_bytes(figure, roofline.figure(outcome.results, outcome.limits, outcome.facts))


def _sentence(s: Summary) -> str:
    over = f"{s.over_reference:.2f} × the reference and " if s.over_reference is not None else ""
    return (
        f"{s.op} by {s.name}, forward and backward, {GROUPS[s.group]}: {over}{s.over_best_other:.2f} × the best "
        f"other (geometric mean of {s.cases} cases, least {s.least:.2f})"
    )


def _timed(result: CaseResult, limits: Limits) -> Iterator[tuple[Entry, dict[str, Any]]]:
    entries = {entry.name: entry for entry in result.entries}
    rows = sorted(
        result.rows(limits), key=lambda row: ("forward", "backward", "both").index(row["direction"])
    )
    for row in rows:
        yield entries[row["implementation"]], row


def _untimed(results: Sequence[CaseResult]) -> list[str]:
    """What was not timed and why; what holds for several cases of an operation is said once."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for entry in result.entries:
            if entry.reason:
                found.setdefault((f"{result.op} {entry.name}", f"{entry.status}: {entry.reason}"), []).append(
                    result.case
                )
    return [f"{who} ({', '.join(cases)}): {why}" for (who, why), cases in found.items()]


def _cells(row: Mapping[str, Any], entry: Entry) -> tuple[str, ...]:
    measured = "*" if row["peak_bytes_from"] == "device" else ""
    matmuls = row["op"] in MATMULS  # of the others the bytes are what matters
    return (
        row["implementation"],
        row["direction"],
        _figure(1e3 * row["median_seconds"]) + ("" if row["counts"] else " !"),
        _figure(1e3 * row["spread_seconds"]),
        _figure(row["flops_per_second"] / 1e12) if matmuls else "–",
        _figure(row["bytes_per_second"] / 1e12),
        f"{row['fraction_of_limit']:.0%}",
        _figure(row["speedup_over_reference"]),
        _figure(row["speedup_over_best_other"]),
        "–" if row["peak_bytes"] is None else f"{_figure(row['peak_bytes'] / 1e6)}{measured}",
        f"{row['compile_seconds']:.1f}",
        f"{max(error.overall for error in entry.errors.values()):.0e}",
    )


def _figure(number: float | None) -> str:
    """Three significant digits, without an exponent: `0.0123`, `1.20`, `123`, `12345`."""
    if number is None:
        return "–"
    if number >= 100:
        return f"{number:.0f}"
    text = f"{number:#.3g}"
    return f"{number:.6f}" if "e" in text else text.rstrip(".")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of text; words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
