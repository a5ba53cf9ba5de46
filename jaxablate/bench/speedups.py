"""`jaxablate bench speedups`: what a study's document says is faster, each on this machine by itself.

The two ways of one speed-up take turns, round for round, on the same data. A first call of each, which compiles
what is compiled, is timed apart. Written: speedups_<hardware>.json and .md.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxablate import config, disk, provenance
from jaxablate.analysis import sentences
from jaxablate.analysis.benchmarks import slug
from jaxablate.analysis.report import plain
from jaxablate.analysis.report.document import Cell, Document, Section
from jaxablate.analysis.report.tables import numbers, table_of, words
from jaxablate.bench.step import folder, selected
from jaxablate.bench.timing import time_interleaved
from jaxablate.config import import_task
from jaxablate.errors import UserError, suggestion
from jaxablate.study import Study
from jaxablate.task import Speedup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What to measure, and how."""

    arm: str = ""  # default: the baseline
    only: tuple[str, ...] = ()  # names of speed-ups; default: all
    rounds: int = 3
    seconds: float = 120.0  # of one speed-up, after which no further round is begun
    out: str = ""  # directory; default: <workdir>/<study>/bench

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"--rounds={self.rounds}: must be 1 or more; leave it out for 3")
        if self.seconds <= 0:
            raise UserError(f"--seconds={self.seconds:g}: must be more than 0; leave it out for 120")


@dataclass(frozen=True)
class Measured:
    """One speed-up. Seconds are one number a round; `first` is of the first call, with compilation."""

    name: str
    claim: str
    original: tuple[float, ...]
    ours: tuple[float, ...]
    first_original: float
    first_ours: float
    agreement: str

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times faster ours is, round by round; below 1 it is slower."""
        return tuple(a / b for a, b in zip(self.original, self.ours, strict=True))


@dataclass(frozen=True)
class Outcome:
    """What was measured, and where it was written."""

    study: str
    arm: str
    hardware: str
    measured: tuple[Measured, ...]
    files: tuple[Path, ...] = ()

    exit_code = 0

    def to_dict(self) -> dict[str, Any]:
        """As data, for `--json` and for the file."""
        found = disk.plain({key: value for key, value in dataclasses.asdict(self).items() if key != "files"})
        for row, one in zip(found["measured"], self.measured, strict=True):
            row["ratio"] = statistics.median(one.ratios)
        return {**found, "files": [str(path) for path in self.files]}

    def document(self) -> Document:
        """The table."""
        rows = [
            (
                Cell(one.name),
                Cell(one.claim),
                Cell(f"{sentences.number(statistics.median(one.ratios))} x"),
                Cell(" to ".join(sentences.number(bound) for bound in (min(one.ratios), max(one.ratios)))),
                Cell(_seconds(statistics.median(one.original))),
                Cell(_seconds(statistics.median(one.ours))),
                Cell(_seconds(one.first_ours)),
                Cell(one.agreement),
            )
            for one in self.measured
        ]
        columns = words("what", "claimed") + numbers("measured", "range", "original", "ours", "first call")
        caption = (
            "How many times faster: median and range of the rounds, in which the two take turns; below 1 is slower. "
            "The first call, of ours, compiles."
        )
        table = table_of("", [*columns, *words("same result?")], rows, caption)
        title = f"{self.study}: the speed-ups of its document"
        return Document(
            title, f"Arm {self.arm}, on {self.hardware}.", (Section("speed", "One at a time", (table,)),)
        )

    def text(self) -> str:
        """The table, in a terminal."""
        written = f"\nwritten: {self.files[0]}" if self.files else ""
        return plain.text(self.document()).rstrip() + "\n" + written


def _seconds(value: float) -> str:
    return f"{sentences.number(value)} s" if value >= 1 else f"{sentences.number(1000 * value)} ms"


def bench_speedups(study: Study, options: Options) -> Outcome:
    """Measures what the study's document says is faster, and writes what it found.

    Raises:
      UserError: no such arm or speed-up, the study declares none, or the folder cannot be written.
    """
    arm = study.arm(options.arm or study.baseline).name
    run = selected(study, "", (arm,))[arm]
    task = import_task(run.task)(run, jax.default_backend())
    hardware = provenance.hardware(provenance.collect(jax.devices(), {}, {}))
    with tempfile.TemporaryDirectory() as scratch:
        declared = {one.name: one for one in task.speedups(config.cache_dir(run.host), Path(scratch))}
        if not declared:
            raise UserError(f"bench speedups: study {study.name} names none; see Task.speedups")
        for name in options.only:
            if name not in declared:
                raise UserError(f"--only={name}: {suggestion(name, declared)}")
        measured = tuple(_measure(declared[name], options) for name in options.only or declared)
    found = Outcome(study.name, arm, hardware, measured)
    return _written(found, Path(options.out) if options.out else folder(run, study))


def _measure(one: Speedup, options: Options) -> Measured:
    logger.info("%s (%s) …", one.name, one.claim)
    original, first_original = _timed(one.original)
    ours, first_ours = _timed(one.ours)
    agreement = one.agreement(original, ours)
    del original, ours
    samples = time_interleaved(
        {"original": one.original, "ours": one.ours},
        rounds=options.rounds,
        warmup=0,
        budget=options.seconds,
        least_rounds=1,
    )
    return Measured(
        name=one.name,
        claim=one.claim,
        original=samples["original"].seconds,
        ours=samples["ours"].seconds,
        first_original=first_original,
        first_ours=first_ours,
        agreement=agreement,
    )


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - began


def _written(found: Outcome, where: Path) -> Outcome:
    stem = where / f"speedups_{slug(found.hardware)}"
    files: Sequence[Path] = (stem.with_suffix(".json"), stem.with_suffix(".md"))
    found = dataclasses.replace(found, files=tuple(files))
    disk.make_private(where)
    try:
        disk.write_json(files[0], {k: v for k, v in found.to_dict().items() if k != "files"})
        disk.write_bytes(files[1], plain.markdown(found.document()).encode())
    except OSError as error:
        raise UserError(f"{where}: cannot be written: {error.strerror}; choose another --out") from None
    return found
