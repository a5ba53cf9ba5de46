"""Training steps of the Burgers study's operators, of one member and of cohorts, beside PyTorch on the same device.

    python -m tests.benchmarks.burgers [--scale=paper] [--operators=128tokens_pure] [--cohorts=1,4] …

The operators are the arms of `configs/burgers.py:arms=faithful`, the document's own at `paper`: a U and a stack at
two numbers of tokens, and a stack with channel-separated attention. A step is one update of the stage `operator`:
encoding by the frozen encoder, a step in time and the steps of the roll-out, the loss with its spectral term,
AdamW, the average of the parameters. PyTorch has the same parameters, batch and precision, is timed by the same
clock and in turns, and its first loss must be ours. It trains members one after another.

Left out on both sides is drop path, whose noise two libraries draw differently, and accumulation. The residual's gain
starts at 1, so that the first loss depends on all parameters. The study's data is not read: the batch is made up.

Writes one JSON file with every sample, anew after each operator; prints a table. A case that cannot run here is a
row that says why.
"""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxablate import config, disk, study
from jaxablate.bench import limits
from jaxablate.bench.step_programs import make_program
from jaxablate.config import MeshConfig, RunConfig, import_task
from jaxablate.errors import UserError
from jaxablate_kernels import dispatch
from tests.benchmarks.against_torch import (
    COHORT,
    EXAMPLES,
    MEMORY,
    MFU,
    SPEEDUP,
    STEPS,
    TIME,
    Ready,
    Row,
    Start,
    arguments,
    check,
    facts,
    jax_case,
    modes,
    names,
    over,
    table,
    timed,
    torch_case,
)
from tests.benchmarks.against_torch import PRECISIONS as ALL_PRECISIONS

STUDY = Path(__file__).resolve().parents[2] / "configs" / "burgers.py"
STAGE = "operator"
CONFIGS_OWN = "config"
MOST = 64  # examples of a step unless --batch says more: cohorts of four fit beside each other at `paper`
COLUMNS = (TIME, STEPS, EXAMPLES, MFU, MEMORY, SPEEDUP, COHORT)
NOTES = (
    "steps, examples and tokens per second are of all members of a cohort together",
    "speedup: the time of the first PyTorch case for as many members, one after another, over the case's",
    "cohort_speedup: the time of as many steps of one member over the cohort's",
    "mfu: useful FLOPs over the data sheet's bfloat16 peak; unknown in float32",
    "peak_bytes: what XLA laid out; of PyTorch what its allocator counted",
    "jax's steps give the same bits each time, which PyTorch's were not asked for",
)


@dataclass(frozen=True)
class Options:
    """What to measure. `attention`: kernels, of which `config` is the config's own. `batch`: 0 for the default."""

    scale: str
    precisions: tuple[str, ...]
    operators: tuple[str, ...]
    attention: tuple[str, ...]
    cohorts: tuple[int, ...]
    torch: tuple[str, ...]
    batch: int
    rounds: int
    seconds: float
    commit: str
    out: Path
    overrides: tuple[tuple[str, str], ...]


def read(argv: Sequence[str] | None = None) -> Options:
    """The command line.

    Raises:
      UserError: a name that is none, or a number out of range.
    """
    about, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=about, epilog="--config.PATH=VALUE changes the study's config"
    )
    add = parser.add_argument
    add("--scale", default="paper", help="of configs/burgers.py (default paper; tiny for a CPU)")
    add("--operators", default="", metavar="A,B", help="arms of the study (default: all)")
    add(
        "--attention",
        default=f"{CONFIGS_OWN},flash",
        metavar="A,B",
        help="kernels; `config`: the config's own",
    )
    add("--cohorts", default="1,4", metavar="A,B", help="numbers of members (default 1,4)")
    arguments(parser, precision=("float32",), torch=("compile", "eager"), out="burgers.json")
    args, rest = parser.parse_known_args(argv)
    check(args)
    overrides = config.read_overrides(rest, [f"--{name}" for name in vars(args)])
    arms = [arm.name for arm in _study(args.scale, overrides).arms]
    cohorts = [text for text in args.cohorts.split(",") if text]
    if wrong := [text for text in cohorts if not text.isdecimal() or int(text) < 1]:
        raise UserError(f"--cohorts={wrong[0]}: must be a number of members, 1 or more")
    if args.batch is not None and args.batch < 1:
        raise UserError(
            f"--batch={args.batch}: must be 1 or more; leave it out for the config's, {MOST} at most"
        )
    return Options(
        scale=args.scale,
        precisions=names("precision", args.precision, ALL_PRECISIONS),
        operators=names("operators", args.operators, arms) or tuple(arms),
        attention=tuple(_kernel(name) for name in args.attention.split(",") if name),
        cohorts=tuple(int(text) for text in cohorts),
        torch=modes(args.torch),
        batch=args.batch or 0,
        rounds=args.rounds,
        seconds=args.seconds,
        commit=args.commit,
        out=Path(args.out),
        overrides=tuple(overrides),
    )


def _kernel(name: str) -> str:
    """A kernel's name that the operation has on some platform; whether it runs here is for its row to say."""
    if name != CONFIGS_OWN:
        try:
            dispatch.resolve("attention", name, "gpu")
        except ValueError as error:
            raise UserError(f"--attention={name}: {error}") from None
    return name


def _study(scale: str, overrides: Sequence[tuple[str, str]]) -> study.Study:
    return study.load(f"{STUDY}:scale={scale},arms=faithful", overrides)


def run_of(
    options: Options, precision: str, operator: str, attention: str = CONFIGS_OWN
) -> RunConfig[Any, Any]:
    """The config of an operator on one device, without what the benchmark leaves out."""
    run = config.resolve(_study(options.scale, options.overrides).config(operator)).base
    training, core = run.training, replace(run.model.core, drop_path=0.0)
    if attention != CONFIGS_OWN:
        core = replace(core, attention_impl=attention)
    size = options.batch or min(training.batch_size // run.accumulation, MOST)
    return replace(
        run,
        host=replace(run.host, mesh=MeshConfig(1, 1, 1, 1)),
        training=replace(training, compute_dtype=precision, batch_size=size, accumulation=1),
        model=replace(run.model, core=core, residual_gain="one"),
        data=replace(run.data, source="generated", train="", val=""),
    )


def made_up(run: RunConfig[Any, Any], members: int = 1) -> dict[str, np.ndarray]:
    """A training batch: waves that travel, (members, B, frames, X), and both viscosities in turn, (members, B)."""
    frames, cells = import_task(run.task)(run, "cpu").example()["u"].shape
    draw, shape = np.random.default_rng(0), (members, run.training.batch_size)
    waves = np.arange(1, 5)
    # Members one after another, so that the first has the same in every cohort.
    size, phase = np.moveaxis(draw.normal(size=(*shape, 1, 1, len(waves), 2)), -1, 0)
    at = (np.arange(cells) / cells - 0.05 * np.arange(frames)[:, None])[..., None]
    u = (size * np.sin(2 * np.pi * (waves * at + phase))).sum(-1)
    viscosity = np.resize(np.array(run.data.viscosities), shape)
    dt = np.full(shape, run.data.time_stride * run.data.interval)
    return {"u": u.astype("f4"), "viscosity": viscosity.astype("f4"), "dt": dt.astype("f4")}


def tolerance(precision: str) -> float:
    """How far PyTorch's first loss may be from ours: bfloat16 has 8 bits, and TF32 multiplies in 11."""
    if precision == "bfloat16":
        return 1e-2
    return 1e-4 if jax.default_backend() == "cpu" else 1e-3


def measure(options: Options, precision: str, operator: str, matmul: float) -> list[Row]:
    """The rows of one operator, all timed in turns; `matmul`: FLOP/s that matrix products reach here."""
    prepared: list[Ready | Row] = []
    for attention in options.attention:
        run = run_of(options, precision, operator, attention)
        for members in options.cohorts:
            kernel = "" if attention == CONFIGS_OWN else f", attention={attention}"
            row = Row(operator + kernel + _of(members), "jax", operator, precision, members)
            build = functools.partial(make_program, run, STAGE, members)
            prepared.append(jax_case(row, build, functools.partial(made_up, run, members)))
    start = functools.cache(functools.partial(_start, options, operator))
    prepared += [_torch(options, precision, operator, mode, start) for mode in options.torch]
    rows = timed(prepared, rounds=options.rounds, seconds=options.seconds, matmul=matmul)
    taken = {row.name: row.samples for row in rows}
    for row in rows:
        one = taken.get(row.name.removesuffix(_of(row.members)))
        if row.members > 1 and one and row.samples:
            row.cohort_speedup = over(one, row.samples, row.members)
    return rows


def _of(members: int) -> str:
    return f", cohort of {members}" if members > 1 else ""


def _start(options: Options, operator: str) -> Start:
    run = run_of(options, "float32", operator, "reference")
    return Start.of(make_program(run, STAGE), made_up(run))


def _torch(
    options: Options, precision: str, operator: str, mode: str, start: Callable[[], Start]
) -> Ready | Row:
    run = run_of(options, precision, operator)

    def model() -> Any:
        from tests.benchmarks import torch_burgers

        return torch_burgers.TorchBurgers(run.model, run.data.cells)

    def batch(device: Any) -> Sequence[Any]:
        from tests.benchmarks import torch_burgers

        return torch_burgers.batch_of({key: values[0] for key, values in made_up(run).items()}, device)

    row = Row(f"{operator}, torch {mode}", "torch", operator, precision)
    return torch_case(row, start, model, batch, run.optim, mode=mode, tolerance=tolerance(precision))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, writes; 2 if the command makes no sense."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    try:
        options = read(argv)
        roofs = limits.measure(
            options.precisions, jax.default_backend(), rounds=min(options.rounds, limits.ROUNDS)
        )
        run, rows = run_of(options, options.precisions[0], options.operators[0]), list[Row]()
        about = {
            **facts(run, roofs, options.commit),
            "stage": STAGE,
            "cells": run.data.cells,
            "data": "made up: waves that travel",
            "left_out": "drop path and accumulation, on both sides",
            "notes": NOTES,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        for precision in options.precisions:
            for operator in options.operators:
                rows += measure(options, precision, operator, roofs.matmul[precision])
                disk.write_json(options.out, disk.plain({**about, "cases": [asdict(row) for row in rows]}))
                gc.collect()  # the states, before those of the next
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{about['hardware']}, {options.scale}, {about['batch_size']} examples a step of each member\n")
    print(table(rows, COLUMNS))
    print(f"\nwritten: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
