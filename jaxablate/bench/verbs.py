"""`jaxablate bench step`, `kernels` and `speedups`: their arguments, and what is done with them.

The arguments are known before anything heavy is imported, so that `--help` starts at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jaxablate.errors import UserError, suggestion

if TYPE_CHECKING:
    from jaxablate.bench.kernels import Options

DIRECTIONS = ("forward", "backward", "both")


class Outcome(Protocol):
    """What a benchmark comes to."""

    @property
    def exit_code(self) -> int: ...

    def to_dict(self) -> dict[str, Any]: ...

    def text(self) -> str: ...


def step_arguments(parser: argparse.ArgumentParser) -> None:
    """What `bench step` takes beside STUDY, --arm and --group."""
    add = parser.add_argument
    add(
        "--rounds",
        type=int,
        default=40,
        metavar="N",
        help="rounds in which every arm has a turn (default 40)",
    )
    add("--what", default="step", metavar="A,B", help="of step, forward, backward (default step)")
    add("--stage", default="", metavar="NAME", help="of the task, whose step is meant (default: the first)")
    add(
        "--members",
        type=int,
        default=1,
        metavar="N",
        help="of the cohort that a step is of, differing in seed (default 1); rates are then of all together",
    )
    add("--batch", metavar="N", help="batch size instead of the config's")
    add("--synthetic", action="store_true", help="a made-up batch instead of the task's data")
    add("--no-control", action="store_true", help="leave out the second copy of the baseline")
    add("--largest-batch", action="store_true", help="find each arm's largest batch instead; runs nothing")
    add("--memory", default="", metavar="24GB", help="of one device, for --largest-batch (default: its own)")
    add("--out", default="", metavar="DIR", help="where to write (default: <study>/bench)")


def step(args: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> Outcome:
    """Times the steps of a study, or searches for its largest batches."""
    from jaxablate import study
    from jaxablate.bench import step, step_memory

    if args.memory and not args.largest_batch:
        raise UserError(f"--memory={args.memory}: is for --largest-batch; add that")
    if args.batch is not None:
        overrides = [*overrides, ("training.batch_size", args.batch)]
    arms = tuple(args.arm)
    if args.largest_batch:
        search = step_memory.Options(args.group, arms, args.stage, args.members, args.memory, args.out)
        return step_memory.largest_batches(study.load(args.study, overrides), search)
    options = step.Options(
        group=args.group,
        arms=arms,
        stage=args.stage,
        members=args.members,
        rounds=args.rounds,
        what=_names(args.what),
        data="synthetic" if args.synthetic else "real",
        control="without" if args.no_control else "with",
        out=args.out,
    )
    return step.bench_step(study.load(args.study, overrides), options)


def kernels_arguments(parser: argparse.ArgumentParser) -> None:
    """What `bench kernels` takes."""
    add = parser.add_argument
    add("--ops", default="", metavar="A,B", help="operations (default: all)")
    add(
        "--cases",
        default="",
        metavar="A,B",
        help="patterns of cases, such as 'ctclip_*' (default: the studies')",
    )
    add("--impls", default="", metavar="A,B", help="implementations, beside the reference (default: all)")
    add("--directions", default="", metavar="A,B", help=f"of {', '.join(DIRECTIONS)} (default: all)")
    add(
        "--batch",
        type=int,
        default=0,
        metavar="N",
        help="factor of the cases' batch (default: 64 on a GPU, else 1)",
    )
    add("--dtype", default="", help="instead of the cases' own (default: bfloat16 on a GPU)")
    add("--seconds", type=float, default=10.0, metavar="S", help="of timing for one case (default 10)")
    add("--tune", action="store_true", help="time the candidate configurations first, and keep the best")
    add("--commit", default="", help="of the code, on a machine without its repository")
    add("--out", default="", metavar="FILE", help="the JSON file (default: bench/kernels_<device>.json)")


def kernels(args: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> Outcome:
    """Checks and times the kernels."""
    if overrides:
        raise UserError("--workdir, --config.PATH: kernels belong to no study; leave them out")
    from jaxablate.bench.kernels import bench_kernels

    return bench_kernels(_kernel_options(args))


def _kernel_options(args: argparse.Namespace) -> Options:
    from jaxablate.bench.kernels import Options

    directions = _names(args.directions)
    for direction in directions:
        if direction not in DIRECTIONS:
            raise UserError(f"--directions={direction}: {suggestion(direction, DIRECTIONS)}")
    return Options(
        ops=_names(args.ops),
        cases=_names(args.cases),
        impls=_names(args.impls),
        directions=directions,
        batch=args.batch,
        dtype=args.dtype,
        seconds=args.seconds,
        tune="yes" if args.tune else "no",
        out=Path(args.out) if args.out else None,
        commit=args.commit,
    )


def speedups_arguments(parser: argparse.ArgumentParser) -> None:
    """What `bench speedups` takes beside STUDY."""
    add = parser.add_argument
    add("--arm", default="", metavar="ARM", help="whose config is taken (default: the baseline)")
    add("--only", default="", metavar="A,B", help="names of speed-ups (default: all)")
    add("--rounds", type=int, default=3, metavar="N", help="rounds in which both have a turn (default 3)")
    add("--seconds", type=float, default=120.0, metavar="S", help="of rounds for one of them (default 120)")
    add("--out", default="", metavar="DIR", help="where to write (default: <study>/bench)")


def speedups(args: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> Outcome:
    """Measures what a study's document says is faster."""
    from jaxablate import study
    from jaxablate.bench.speedups import Options, bench_speedups

    options = Options(args.arm, _names(args.only), args.rounds, args.seconds, args.out)
    return bench_speedups(study.load(args.study, overrides), options)


def _names(text: str) -> tuple[Any, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
