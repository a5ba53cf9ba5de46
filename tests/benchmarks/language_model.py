"""Training steps of the TinyStories models against each other, and against PyTorch, on one device of this machine.

    python -m tests.benchmarks.language_model [--scale=paper] [--precision=bfloat16,float32] [--torch=compile] …

Cases are the arms with their config's kernels, and the baseline with other kernels. With them competes a PyTorch
model of the baseline's shape, where PyTorch is installed: with the same parameters, batch and precision, timed by
the same clock and in turns. Its first loss must be ours. With --cohort=16 one compiled step of 16 members is timed
against 16 steps of one, too.

Writes one JSON file with every sample, anew after each precision; prints a table. A case that cannot run here is a
row that says why. The study's data is not read: the batch is made up.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from jaxablate import disk, program, provenance, runstore
from jaxablate.analysis.findings import Estimate
from jaxablate.bench import limits, step_stats
from jaxablate.bench.step import commit
from jaxablate.bench.step_programs import Runnable
from jaxablate.bench.timing import Call, Clock, Samples, time_interleaved, wall_clock
from jaxablate.config import RunConfig
from jaxablate.errors import UserError
from jaxablate.footprint import NOT_HERE, memory_of
from jaxablate_gpus import peak_flops
from tests.benchmarks.language_model_cases import (
    BASELINE,
    PRECISIONS,
    SLOTS,
    Options,
    batch,
    cases,
    make_program,
    read,
    run_of,
)

logger = logging.getLogger(__name__)

LEVEL = 0.95
# How far PyTorch's first loss may be from ours: bfloat16 has 8 bits, and TF32 multiplies in 11.
SAME_LOSS = {"float32": 1e-3, "bfloat16": 1e-2}
# What a step raises that cannot be had here, by compiling or by running; XLA's and PyTorch's are RuntimeErrors.
CANNOT = (*NOT_HERE, ImportError, RuntimeError, ValueError)
NOTES = (
    "speedup: PyTorch's time over the case's; of a cohort: the time of as many steps of one member over the cohort's",
    "mfu: useful FLOPs (attention as if not causal) over the data sheet's bfloat16 peak; unknown in float32",
    "matmul_share: the same over the fastest large matrix product that jax made here in this precision",
    "peak_bytes: what XLA laid out; of PyTorch what its allocator counted",
    "jax's steps give the same bits each time, which PyTorch's were not asked for",
)


@dataclass
class Row:
    """What is known of one case.

    Attributes:
      kernels: the implementation in each slot.
      loss: of the first step, in nats.
      flops: useful floating-point operations of a step.
      problem: why there is nothing else.
    """

    name: str
    side: str
    arm: str
    precision: str
    members: int = 1
    kernels: Mapping[str, str] | None = None
    parameters: int | None = None
    loss: float | None = None
    compile_seconds: float | None = None
    peak_bytes: int | None = None
    flops: float | None = None
    samples: Samples | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    matmul_share: float | None = None
    speedup: Estimate | None = None
    problem: str = ""


@dataclass(frozen=True)
class Ready:
    """A case that has made its first step."""

    row: Row
    step: Call
    clock: Clock = wall_clock


# -------------------------------------------------------------------------------------------- measuring


class Bench:
    """The cases of one precision."""

    def __init__(self, options: Options, precision: str, matmul: float):
        """`matmul`: FLOP/s that matrix products reach here."""
        self.options, self.precision, self.matmul = options, precision, matmul

    def measure(self) -> list[Row]:
        """All rows: of the steps, then of the cohorts."""
        prepared = [self._jax(name, run) for name, run in cases(self.options, self.precision).items()]
        prepared += [self._torch(mode) for mode in self.options.torch]
        rows = self._timed(prepared)
        del prepared  # and with it the states, before those of cohorts
        gc.collect()
        if self.options.cohort:
            for name, kernels in self.options.cohort_kernels.items():
                rows += self._cohort(name, kernels)
        return rows

    def _jax(self, name: str, run: RunConfig[Any, Any], members: int = 1) -> Ready | Row:
        row = Row(name, "jax", run.arm, self.precision, members)
        logger.info("%s: %s", self.precision, name)
        try:
            built = make_program(run, members)
            task = built.task
            row.kernels = {slot: kernel.name for slot, kernel in task.kernels.items()}
            row.parameters = program.count(built.abstract_member.params)
            row.flops = members * run.training.batch_size * (task.flops_per_example or 0.0)
            began = time.perf_counter()
            compiled = built.compile_step()
            row.compile_seconds = time.perf_counter() - began
            memory = memory_of(compiled)
            row.peak_bytes = memory["peak"] if memory else None
            step = Runnable(built, compiled, batch(run, members), ("step",)).call("step")
            row.loss = float(step()["train/loss"][0])
        except CANNOT as error:
            return self._lost(row, error)
        return Ready(row, step)

    def _torch(self, mode: str) -> Ready | Row:
        row = Row(f"torch {mode}", "torch", BASELINE, self.precision)
        logger.info("%s: %s", self.precision, row.name)
        try:
            from tests.benchmarks import torch_lm

            device = torch_lm.device(jax.default_backend())
            model = torch_lm.TorchLm(self._run.model, self._run.data.vocab_size, self._run.data.context)
            row.parameters, row.flops = model.count(), self._start.flops
            if row.parameters != self._start.parameters:
                raise ValueError(f"it has {row.parameters} parameters, jax {self._start.parameters}")
            model.take(self._start.params)
            tokens = batch(self._run)["tokens"][0]
            step = torch_lm.TorchStep(model.to(device), self._run.optim, tokens, self.precision, mode)
            began = time.perf_counter()
            row.loss = float(step())
            row.compile_seconds = time.perf_counter() - began
            if not abs(row.loss - self._start.loss) <= SAME_LOSS[self.precision] * self._start.loss:
                raise ValueError(f"its first loss is {row.loss:.6g}, jax's {self._start.loss:.6g}")
            row.peak_bytes = step.peak_bytes()
        except CANNOT as error:
            return self._lost(row, error)
        return Ready(row, step, step.clock)

    def _lost(self, row: Row, error: Exception) -> Row:
        row.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        logger.warning("%s: %s: %s", self.precision, row.name, row.problem)
        return row

    @cached_property
    def _run(self) -> RunConfig[Any, Any]:
        return run_of(self.options, self.precision)

    @cached_property
    def _start(self) -> Start:
        return Start.of(run_of(self.options, "float32", **{f"{slot}_impl": "reference" for slot in SLOTS}))

    def _timed(self, prepared: Sequence[Ready | Row]) -> list[Row]:
        """The rows of these cases, those that are ready timed in turns."""
        ready = {case.row.name: case for case in prepared if isinstance(case, Ready)}
        if ready:
            logger.info("%s: timing %d cases", self.precision, len(ready))
            taken = time_interleaved(
                {name: case.step for name, case in ready.items()},
                rounds=self.options.rounds,
                warmup=2,
                sample_seconds=0.1,  # calls that queue up, so that the wait for the last is small beside them
                budget=self.options.seconds,
                clocks={name: case.clock for name, case in ready.items()},
            )
            opponents = [taken[name] for name, case in ready.items() if case.row.side == "torch"]
            for name, case in ready.items():
                self._rate(case.row, taken[name], opponents[0] if opponents else None)
        return [case.row if isinstance(case, Ready) else case for case in prepared]

    def _rate(self, row: Row, samples: Samples, opponent: Samples | None) -> None:
        """What follows from the times."""
        assert row.flops is not None, "of a case that is ready"
        rate = row.flops / samples.median
        peak = peak_flops(jax.devices()[0].device_kind, self.precision)
        row.samples, row.step_seconds = samples, samples.median
        tokens = row.members * self._run.training.batch_size * self._run.data.context
        row.tokens_per_second = tokens / samples.median
        row.mfu = rate / peak if peak else None
        row.matmul_share = rate / self.matmul
        if opponent is not None and opponent is not samples:
            row.speedup = step_stats.time_ratio(opponent.seconds, samples.seconds, LEVEL)

    def _cohort(self, name: str, kernels: Mapping[str, str]) -> list[Row]:
        """One step of one member, and one of all."""
        run = run_of(self.options, self.precision, **kernels)
        sizes = (1, self.options.cohort)
        rows = self._timed([self._jax(f"cohort of {n}, {name}", run, n) for n in sizes])
        one, many = (row.samples for row in rows)
        if one and many:
            apart = [self.options.cohort * seconds for seconds in one.seconds]
            rows[1].speedup = step_stats.time_ratio(apart, many.seconds, LEVEL)
        return rows


@dataclass(frozen=True)
class Start:
    """The initial parameters, as arrays of the host, their number, the loss with them, and the FLOPs of a step."""

    params: Any
    parameters: int
    loss: float
    flops: float

    @classmethod
    def of(cls, run: RunConfig[Any, Any]) -> Start:
        """That of a run, whose forward pass is compiled for this."""
        built, size = make_program(run), run.training.batch_size
        built.rows = size
        arguments = built.init(), built.member, built.put_micro(batch(run))
        loss = built.compile(built.forward, *arguments)(*arguments)
        params = jax.tree.map(lambda x: np.asarray(x[0]), arguments[0].params)
        flops = size * (built.task.flops_per_example or 0.0)
        return cls(params, program.count(built.abstract_member.params), float(loss[0]), flops)


# ---------------------------------------------------------------------------------------------- telling


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""
    lines = [["", "precision", "ms/step", "tokens/s", "MFU", "of matmul", "memory", "speedup"]]
    for row in rows:
        found = [row.name, row.precision]
        if row.samples is None or row.tokens_per_second is None:
            lines.append([*found, row.problem])
            continue
        found.append(f"{1000 * row.samples.median:.2f} ± {1000 * row.samples.spread:.2f}")
        found.append(f"{row.tokens_per_second:,.0f}")
        found += ["–" if share is None else f"{share:.1%}" for share in (row.mfu, row.matmul_share)]
        found.append("–" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f} GB")
        found.append("–" if row.speedup is None else _interval(row.speedup))
        lines.append(found)
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    widths[0] = max(len(line[0]) for line in lines)
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)).rstrip()
        for line in lines
    )


def _interval(ratio: Estimate) -> str:
    value = f"{ratio.value:.2f}x"
    return value if ratio.low is None else f"{value} ({ratio.low:.2f} to {ratio.high:.2f})"


def facts(options: Options, roofs: limits.Limits) -> dict[str, Any]:
    """Where the numbers come from."""
    found = provenance.collect(jax.devices(), {}, {})
    there = importlib.util.find_spec("torch") is not None
    run = run_of(options, PRECISIONS[0])
    return {
        "format": 1,
        "study": run.study,
        "scale": run.scale,
        "batch_size": run.training.batch_size,
        "context": run.data.context,
        "data": "made up: windows of words as often as 1 / rank",
        "time": runstore.now(),
        "hardware": provenance.hardware(found),
        "float32_matmul": {
            "jax": jax.config.values["jax_default_matmul_precision"] or "default: TF32 on a GPU",
            "torch": "high: TF32 on a GPU; highest on a CPU",
        },
        "torch": importlib.metadata.version("torch") if there else None,
        "limits": roofs.to_dict(),
        "notes": NOTES,
        "provenance": {
            **found,
            "git": {"commit": options.commit} if options.commit else commit(found["git"]),
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, writes; 2 if the command makes no sense."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    try:
        options = read(argv)
        roofs = limits.measure(
            options.precisions, jax.default_backend(), rounds=min(options.rounds, limits.ROUNDS)
        )
        about, rows = facts(options, roofs), list[Row]()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        for precision in options.precisions:
            rows += Bench(options, precision, roofs.matmul[precision]).measure()
            disk.write_json(options.out, disk.plain({**about, "cases": [asdict(row) for row in rows]}))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{about['hardware']}, {options.scale}, {about['batch_size']} x {about['context']} tokens a step\n")
    print(table(rows))
    print(f"\nwritten: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
