"""Training steps of ours and of PyTorch, timed in turns: what the benchmarks of whole models have in common.

A case is prepared, which compiles it and makes its first step; what cannot run here becomes a row that says why.
PyTorch starts from the same parameters, and its first loss must be ours.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxablate import provenance, runstore
from jaxablate.analysis.findings import Estimate
from jaxablate.bench import limits, step_stats
from jaxablate.bench.step import commit
from jaxablate.bench.step_programs import Runnable, StepProgram
from jaxablate.bench.timing import Call, Clock, Samples, time_interleaved, wall_clock
from jaxablate.config import OptimConfig, RunConfig
from jaxablate.data import Batch
from jaxablate.errors import UserError, suggestion
from jaxablate.footprint import NOT_HERE, memory_of
from jaxablate.trees import count
from jaxablate_gpus import peak_flops

logger = logging.getLogger(__name__)

LEVEL = 0.95
PRECISIONS = ("bfloat16", "float32")
TORCH = ("compile", "reduce-overhead", "max-autotune", "eager", "none")
# What a step raises that cannot be had here, by compiling or by running; XLA's and PyTorch's are RuntimeErrors.
CANNOT = (*NOT_HERE, ImportError, RuntimeError, ValueError)


@dataclass
class Row:
    """What is known of one case.

    Attributes:
      members: of the cohort; numbers of steps, examples, tokens and FLOPs are of all together.
      kernels: the implementation in each slot.
      parameters: those that are trained, of one member.
      loss: of the first step, of the first member.
      examples, tokens, flops: of a step; useful floating-point operations.
      speedup: PyTorch's time for as many members, one after another, over the case's.
      cohort_speedup: the time of as many steps of one member over the cohort's.
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
    examples: int | None = None
    tokens: int | None = None
    flops: float | None = None
    samples: Samples | None = None
    step_seconds: float | None = None
    steps_per_second: float | None = None
    examples_per_second: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    matmul_share: float | None = None
    speedup: Estimate | None = None
    cohort_speedup: Estimate | None = None
    problem: str = ""


@dataclass(frozen=True)
class Ready:
    """A case that has made its first step."""

    row: Row
    step: Call
    clock: Clock = wall_clock


@dataclass(frozen=True)
class Start:
    """What PyTorch starts from: the initial parameters, as arrays of the host, and the loss with them.

    Attributes:
      parameters: number of those that are trained.
      examples, tokens, flops: of a step.
    """

    params: Any
    parameters: int
    loss: float
    examples: int
    tokens: int
    flops: float

    @classmethod
    def of(cls, built: StepProgram, batch: Batch) -> Start:
        """That of a program of one member, whose forward pass is compiled for this."""
        built.rows = built.cohort.base.training.batch_size
        arguments = built.init(), built.member, built.put_micro(batch), built.base
        loss = built.compile(built.forward, *arguments)(*arguments)
        params = jax.tree.map(lambda x: np.asarray(x[0]), arguments[0].params)
        return cls(params, trained(built), float(loss[0]), *work(built))


def trained(built: StepProgram) -> int:
    """Number of parameters that a program trains, of one member."""
    params = built.abstract_member.params
    if built.trained is True:
        return count(params)
    return count(jax.tree.map(lambda x, own: x if own else None, params, built.trained))


def work(built: StepProgram) -> tuple[int, int, float]:
    """Examples, tokens and FLOPs of a step, of all members."""
    examples = len(built.cohort.runs) * built.cohort.base.training.batch_size
    task = built.task
    return examples, examples * task.tokens_per_example, examples * (task.flops_per_example or 0.0)


# ------------------------------------------------------------------------------------------- preparing


def jax_case(row: Row, make: Callable[[], StepProgram], batch: Callable[[], Batch]) -> Ready | Row:
    """Our step: the program that the training loop runs."""
    logger.info("%s: %s", row.precision, row.name)
    try:
        built = make()
        task = built.task
        row.kernels = {slot: kernel.name for slot, kernel in task.kernels.items()}
        row.parameters = trained(built)
        row.examples, row.tokens, row.flops = work(built)
        began = time.perf_counter()
        compiled = built.compile_step()
        row.compile_seconds = time.perf_counter() - began
        memory = memory_of(compiled.compiled)
        row.peak_bytes = memory["peak"] if memory else None
        step = Runnable(built, compiled, batch(), ("step",)).call("step")
        row.loss = float(step()["train/loss"][0])
    except CANNOT as error:
        return lost(row, error)
    return Ready(row, step)


def torch_case(
    row: Row,
    start: Callable[[], Start],
    make: Callable[[], Any],
    batch: Callable[[Any], Sequence[Any]],
    optim: OptimConfig,
    *,
    mode: str,
    tolerance: float,
) -> Ready | Row:
    """PyTorch's step.

    Args:
      start: what it begins with.
      make: the model, with a method `take` for the parameters; imports PyTorch, which may not be there.
      batch: its arguments, on a device of PyTorch.
      mode: a key of `torch_step.MODES`.
      tolerance: how far its first loss may be from ours, as a share of that.
    """
    logger.info("%s: %s", row.precision, row.name)
    try:
        from tests.benchmarks import torch_step

        device, model, ours = torch_step.device(jax.default_backend()), make(), start()
        row.examples, row.tokens, row.flops = ours.examples, ours.tokens, ours.flops
        row.parameters = torch_step.count(model)
        if row.parameters != ours.parameters:
            raise ValueError(f"it has {row.parameters} parameters, jax {ours.parameters}")
        model.take(ours.params)
        assert row.precision in PRECISIONS
        step = torch_step.TorchStep(model.to(device), optim, batch(device), row.precision, mode)
        began = time.perf_counter()
        row.loss = float(step())
        row.compile_seconds = time.perf_counter() - began
        if not abs(row.loss - ours.loss) <= tolerance * abs(ours.loss):
            raise ValueError(f"its first loss is {row.loss:.6g}, jax's {ours.loss:.6g}")
        row.peak_bytes = step.peak_bytes()
    except CANNOT as error:
        return lost(row, error)
    return Ready(row, step, step.clock)


def lost(row: Row, error: Exception) -> Row:
    """The row of a case that cannot run here."""
    row.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    logger.warning("%s: %s: %s", row.precision, row.name, row.problem)
    return row


# ---------------------------------------------------------------------------------------------- timing


def timed(prepared: Sequence[Ready | Row], *, rounds: int, seconds: float, matmul: float) -> list[Row]:
    """The rows of these cases, those that are ready timed in turns; the first of PyTorch's is the opponent.

    Args:
      rounds: in which every case has a turn.
      seconds: when they are spent, no further round begins.
      matmul: FLOP/s that matrix products reach here.
    """
    ready = {case.row.name: case for case in prepared if isinstance(case, Ready)}
    if ready:
        logger.info("timing %d cases", len(ready))
        taken = time_interleaved(
            {name: case.step for name, case in ready.items()},
            rounds=rounds,
            warmup=2,
            sample_seconds=0.1,  # calls that queue up, so that the wait for the last is small beside them
            budget=seconds,
            clocks={name: case.clock for name, case in ready.items()},
        )
        opponents = [taken[name] for name, case in ready.items() if case.row.side == "torch"]
        for name, case in ready.items():
            _rate(case.row, taken[name], opponents[0] if opponents else None, matmul)
    return [case.row if isinstance(case, Ready) else case for case in prepared]


def _rate(row: Row, samples: Samples, opponent: Samples | None, matmul: float) -> None:
    """What follows from the times."""
    assert row.flops is not None and row.examples is not None and row.tokens is not None
    rate = row.flops / samples.median
    peak = peak_flops(jax.devices()[0].device_kind, row.precision)
    row.samples, row.step_seconds = samples, samples.median
    row.steps_per_second = row.members / samples.median
    row.examples_per_second = row.examples / samples.median
    row.tokens_per_second = row.tokens / samples.median
    row.mfu = rate / peak if peak else None
    row.matmul_share = rate / matmul
    if opponent is not None and opponent is not samples:
        row.speedup = over(opponent, samples, row.members)


def over(one: Samples, many: Samples, members: int) -> Estimate:
    """How many times faster `many` is than `members` times `one`."""
    apart = [members * seconds for seconds in one.seconds]
    return step_stats.time_ratio(apart, many.seconds, LEVEL)


# ---------------------------------------------------------------------------------------------- telling

Column = tuple[str, Callable[[Row], str]]

TIME: Column = ("ms/step", lambda r: f"{1000 * r.samples.median:.2f} ± {1000 * r.samples.spread:.2f}")
STEPS: Column = ("steps/s", lambda r: f"{r.steps_per_second:,.2f}")
EXAMPLES: Column = ("examples/s", lambda r: f"{r.examples_per_second:,.0f}")
TOKENS: Column = ("tokens/s", lambda r: f"{r.tokens_per_second:,.0f}")
MFU: Column = ("MFU", lambda r: share(r.mfu))
MATMUL: Column = ("of matmul", lambda r: share(r.matmul_share))
MEMORY: Column = ("memory", lambda r: "–" if r.peak_bytes is None else f"{r.peak_bytes / 1e9:.2f} GB")
SPEEDUP: Column = ("speedup", lambda r: interval(r.speedup))
COHORT: Column = ("cohort", lambda r: interval(r.cohort_speedup))


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """The rows for a terminal; one that was not timed says why."""
    lines = [["", "precision", *(title for title, _ in columns)]]
    for row in rows:
        found = [row.name, row.precision]
        lines.append([*found, *(cell(row) for _, cell in columns)] if row.samples else [*found, row.problem])
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    widths[0] = max(len(line[0]) for line in lines)
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)).rstrip()
        for line in lines
    )


def share(value: float | None) -> str:
    """As per cent."""
    return "–" if value is None else f"{value:.1%}"


def interval(ratio: Estimate | None) -> str:
    """`1.52x (1.49 to 1.55)`."""
    if ratio is None:
        return "–"
    value = f"{ratio.value:.2f}x"
    return value if ratio.low is None else f"{value} ({ratio.low:.2f} to {ratio.high:.2f})"


def facts(run: RunConfig[Any, Any], roofs: limits.Limits, commit_of_code: str) -> dict[str, Any]:
    """Where the numbers come from."""
    found = provenance.collect(jax.devices(), {}, {})
    there = importlib.util.find_spec("torch") is not None
    return {
        "format": 1,
        "study": run.study,
        "scale": run.scale,
        "batch_size": run.training.batch_size,
        "time": runstore.now(),
        "hardware": provenance.hardware(found),
        "float32_matmul": {
            "jax": jax.config.values["jax_default_matmul_precision"] or "default: TF32 on a GPU",
            "torch": "high: TF32 on a GPU; highest on a CPU",
        },
        "torch": importlib.metadata.version("torch") if there else None,
        "limits": roofs.to_dict(),
        "provenance": {
            **found,
            "git": {"commit": commit_of_code} if commit_of_code else commit(found["git"]),
        },
    }


# ----------------------------------------------------------------------------------------------- asking


def arguments(
    parser: argparse.ArgumentParser, *, precision: Sequence[str], torch: Sequence[str], out: str
) -> None:
    """What every such benchmark takes, with the defaults that are its own."""
    add = parser.add_argument
    modes = ", ".join(TORCH)
    add("--precision", default=",".join(precision), metavar="A,B", help=f"of {', '.join(PRECISIONS)}")
    add("--torch", default=",".join(torch), metavar="A,B", help=f"of {modes} (default {','.join(torch)})")
    add("--batch", type=int, metavar="N", help="examples of a step, of one member")
    add("--rounds", type=int, default=30, metavar="N", help="in which every case has a turn")
    add("--seconds", type=float, default=60, metavar="S", help="when spent, no further round begins")
    add("--commit", default="", help="of the code, on a machine without its repository")
    add("--out", default=out, metavar="FILE")


def check(args: argparse.Namespace) -> None:
    """Raises UserError if a number of `arguments` is out of range."""
    if args.rounds < 1:
        raise UserError(f"--rounds={args.rounds}: must be 1 or more; leave it out for 30")


def names(flag: str, text: str, valid: Sequence[str]) -> tuple[str, ...]:
    """Of a comma-separated list.

    Raises:
      UserError: one that is none of `valid`.
    """
    chosen = tuple(name for name in text.split(",") if name)
    for name in chosen:
        if name not in valid:
            raise UserError(f"--{flag}={name}: {suggestion(name, valid)}")
    return chosen


def modes(text: str) -> tuple[str, ...]:
    """How PyTorch competes."""
    return tuple(mode for mode in names("torch", text, TORCH) if mode != "none")
