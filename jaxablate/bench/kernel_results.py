"""What `bench kernels` found, as data: JSON in, JSON out, and the comparisons between implementations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxablate.bench.limits import Limits
from jaxablate.bench.problems import Group
from jaxablate.bench.timing import Memory, Samples
from jaxablate.bench.work import Direction, Passes, roof_seconds

FORMAT = 1
CALLS = 3.0  # calls that do nothing: what takes less is as much call as work
Status = Literal["timed", "wrong", "unsupported", "out of memory", "failed"]
ConfigSource = Literal["tuned", "heuristic"]


@dataclass(frozen=True)
class Error:
    """How far a result lies from the oracle's, as a share of what the oracle has.

    Attributes:
      overall: root mean square of the difference, over that of the oracle.
      worst_row: the largest norm of a difference along the last axis, over the norm of the oracle's row or
        the root mean square of those, whichever is larger.
      limit: what `overall` may be; `worst_row` may be `ROW` times that, see `jaxablate.bench.oracle`.
    """

    overall: float
    worst_row: float
    limit: float


@dataclass(frozen=True)
class Timed:
    """One program: an implementation of a case in one direction.

    Attributes:
      samples: seconds of the work done once.
      compile_seconds: to trace, lower and compile it.
      memory: the peak while it runs.
      repeats: how often a call of the program does the work.
      call_seconds: of a call of a program that does nothing, see `limits.Limits`.
    """

    samples: Samples
    compile_seconds: float
    memory: Memory
    repeats: int = 1
    call_seconds: float = 0.0

    @property
    def counts(self) -> bool:
        """Whether a call is long beside one that does nothing; else the time says nothing of the kernel."""
        return self.samples.median * self.repeats >= CALLS * self.call_seconds


@dataclass(frozen=True)
class Entry:
    """What became of one implementation of a case.

    Attributes:
      name: the implementation.
      status: `timed`, or why not: `wrong` beside the oracle, `unsupported` by what it says itself or for
        want of a package, `out of memory`, or `failed` with any other error.
      reason: in one line; of a timed one, why a direction is missing, or "".
      config: its blocks and warps; None if it has none.
      config_from: `tuned` if a table had them for this problem, else the implementation's `heuristic`.
      errors: by the name of the result or gradient, the largest over the directions.
      timed: by direction; empty unless timed.
    """

    name: str
    status: Status
    reason: str = ""
    config: Mapping[str, Any] | None = None
    config_from: ConfigSource | None = None
    errors: Mapping[str, Error] = field(default_factory=dict)
    timed: Mapping[Direction, Timed] = field(default_factory=dict)


@dataclass(frozen=True)
class CaseResult:
    """One case with all its implementations, which were timed in turns."""

    op: str
    case: str
    group: Group
    shape: str
    dtype: str
    spec: Mapping[str, Any]
    passes: Passes
    entries: tuple[Entry, ...]

    def seconds(self, direction: Direction) -> dict[str, float]:
        """Medians by implementation, of those that were timed and whose time counts."""
        return {
            entry.name: timed.samples.median
            for entry in self.entries
            if (timed := entry.timed.get(direction)) is not None and timed.counts
        }

    def speedup(self, name: str, direction: Direction) -> tuple[float | None, float | None]:
        """How many times faster than the reference, and than the best of the others; None without such."""
        seconds = self.seconds(direction)
        if name not in seconds:
            return None, None
        others = [s for other, s in seconds.items() if other != name]
        reference = seconds.get("reference")
        return (
            reference / seconds[name] if reference is not None else None,
            min(others) / seconds[name] if others else None,
        )

    def fraction(self, seconds: float, direction: Direction, limits: Limits) -> float:
        """The least time that the measured limits allow for the useful work, over the time taken."""
        return self.least_seconds(direction, limits) / seconds

    def least_seconds(self, direction: Direction, limits: Limits) -> float:
        """By the lower roof at this case's intensity."""
        return roof_seconds(self.passes.of(direction), limits.matmul[self.dtype], limits.copy)

    def rows(self, limits: Limits) -> Iterator[dict[str, Any]]:
        """One flat record for each implementation and direction that was timed."""
        for entry in self.entries:
            for direction, timed in entry.timed.items():
                seconds, work = timed.samples.median, self.passes.of(direction)
                over_reference, over_best = self.speedup(entry.name, direction)
                yield {
                    "op": self.op,
                    "case": self.case,
                    "group": self.group,
                    "implementation": entry.name,
                    "direction": direction,
                    "median_seconds": seconds,
                    "spread_seconds": timed.samples.spread,
                    "flops_per_second": work.flops / seconds,
                    "bytes_per_second": work.bytes / seconds,
                    "fraction_of_limit": self.fraction(seconds, direction, limits),
                    "speedup_over_reference": over_reference,
                    "speedup_over_best_other": over_best,
                    "compile_seconds": timed.compile_seconds,
                    "peak_bytes": timed.memory.bytes,
                    "peak_bytes_from": timed.memory.source,
                    "samples_seconds": list(timed.samples.seconds),
                    "calls_in_a_sample": timed.samples.inner,
                    "repeats_in_a_call": timed.repeats,
                    "counts": timed.counts,
                }

    def to_dict(self, limits: Limits) -> dict[str, Any]:
        """In JSON's types."""
        directions: tuple[Direction, ...] = ("forward", "backward", "both")
        work = {d: {"flops": self.passes.of(d).flops, "bytes": self.passes.of(d).bytes} for d in directions}
        rows = list(self.rows(limits))
        return {
            "op": self.op,
            "case": self.case,
            "group": self.group,
            "shape": self.shape,
            "dtype": self.dtype,
            "spec": dict(self.spec),
            "useful_work": work,
            "implementations": [
                {
                    "name": entry.name,
                    "status": entry.status,
                    "reason": entry.reason,
                    "config": dict(entry.config) if entry.config is not None else None,
                    "config_from": entry.config_from,
                    "errors": {name: vars(error) for name, error in entry.errors.items()},
                    "timings": [
                        {k: v for k, v in row.items() if k not in ("op", "case", "group", "implementation")}
                        for row in rows
                        if row["implementation"] == entry.name
                    ],
                }
                for entry in self.entries
            ],
        }


@dataclass(frozen=True)
class Summary:
    """How one implementation did over the cases of a group, in one direction.

    Attributes:
      cases: in which it was timed beside another.
      over_reference, over_best_other: geometric means of how many times faster it was.
      least: the smallest of the second.
    """

    op: str
    group: Group
    name: str
    direction: Direction
    cases: int
    over_reference: float | None
    over_best_other: float
    least: float


def summaries(results: tuple[CaseResult, ...]) -> list[Summary]:
    """For every operation, group, implementation and direction, in the order of the results."""
    found: dict[tuple[str, Group, str, Direction], list[tuple[float | None, float]]] = {}
    for result in results:
        for entry in result.entries:
            for direction in entry.timed:
                over_reference, over_best = result.speedup(entry.name, direction)
                if over_best is not None:
                    key = (result.op, result.group, entry.name, direction)
                    found.setdefault(key, []).append((over_reference, over_best))
    return [
        Summary(
            *key,
            cases=len(pairs),
            over_reference=_geometric_mean([first for first, _ in pairs if first is not None]),
            over_best_other=math.exp(statistics.fmean(math.log(second) for _, second in pairs)),
            least=min(second for _, second in pairs),
        )
        for key, pairs in found.items()
    ]


def _geometric_mean(ratios: list[float]) -> float | None:
    return statistics.geometric_mean(ratios) if ratios else None
