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
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import jax

from jaxablate import disk
from jaxablate.bench import limits
from jaxablate.config import RunConfig
from jaxablate.errors import UserError
from tests.benchmarks.against_torch import (
    MATMUL,
    MEMORY,
    MFU,
    SPEEDUP,
    TIME,
    TOKENS,
    Ready,
    Row,
    Start,
    facts,
    jax_case,
    over,
    table,
    timed,
    torch_case,
)
from tests.benchmarks.language_model_cases import (
    BASELINE,
    SLOTS,
    Options,
    batch,
    cases,
    make_program,
    read,
    run_of,
)

COLUMNS = (TIME, TOKENS, MFU, MATMUL, MEMORY, SPEEDUP)
# How far PyTorch's first loss may be from ours: bfloat16 has 8 bits, and TF32 multiplies in 11.
SAME_LOSS = {"float32": 1e-3, "bfloat16": 1e-2}
NOTES = (
    "speedup: PyTorch's time over the case's; of a cohort: the time of as many steps of one member over the cohort's",
    "mfu: useful FLOPs (attention as if not causal) over the data sheet's bfloat16 peak; unknown in float32",
    "matmul_share: the same over the fastest large matrix product that jax made here in this precision",
    "peak_bytes: what XLA laid out; of PyTorch what its allocator counted",
    "jax's steps give the same bits each time, which PyTorch's were not asked for",
)


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
        return jax_case(row, lambda: make_program(run, members), lambda: batch(run, members))

    def _torch(self, mode: str) -> Ready | Row:
        run = run_of(self.options, self.precision)
        row = Row(f"torch {mode}", "torch", BASELINE, self.precision)

        def model() -> Any:
            from tests.benchmarks import torch_lm

            return torch_lm.TorchLm(run.model, run.data.vocab_size, run.data.context)

        def given(device: Any) -> Sequence[Any]:
            from tests.benchmarks import torch_lm

            return torch_lm.batch_of(batch(run)["tokens"][0], device)

        tolerance = SAME_LOSS[self.precision]
        return torch_case(row, lambda: self._start, model, given, run.optim, mode=mode, tolerance=tolerance)

    @cached_property
    def _start(self) -> Start:
        run = run_of(self.options, "float32", **{f"{slot}_impl": "reference" for slot in SLOTS})
        return Start.of(make_program(run), batch(run))

    def _timed(self, prepared: Sequence[Ready | Row]) -> list[Row]:
        options = self.options
        return timed(prepared, rounds=options.rounds, seconds=options.seconds, matmul=self.matmul)

    def _cohort(self, name: str, kernels: Mapping[str, str]) -> list[Row]:
        """One step of one member, and one of all."""
        run = run_of(self.options, self.precision, **kernels)
        sizes = (1, self.options.cohort)
        rows = self._timed([self._jax(f"cohort of {n}, {name}", run, n) for n in sizes])
        one, many = (row.samples for row in rows)
        if one and many:
            rows[1].speedup = over(one, many, self.options.cohort)
        return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, writes; 2 if the command makes no sense."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    try:
        options = read(argv)
        roofs = limits.measure(
            options.precisions, jax.default_backend(), rounds=min(options.rounds, limits.ROUNDS)
        )
        run, rows = run_of(options, options.precisions[0]), list[Row]()
        about = {
            **facts(run, roofs, options.commit),
            "context": run.data.context,
            "data": "made up: windows of words as often as 1 / rank",
            "notes": NOTES,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        for precision in options.precisions:
            rows += Bench(options, precision, roofs.matmul[precision]).measure()
            disk.write_json(options.out, disk.plain({**about, "cases": [asdict(row) for row in rows]}))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{about['hardware']}, {options.scale}, {about['batch_size']} x {about['context']} tokens a step\n")
    print(table(rows, COLUMNS))
    print(f"\nwritten: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
