"""What `language_model.py` is asked to measure: the command line, configs of its cases, programs, batch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxablate import config, sharding, study
from jaxablate.bench.step_programs import StepProgram
from jaxablate.config import Cohort, MeshConfig, RunConfig, import_task
from jaxablate.errors import UserError
from tests.benchmarks.against_torch import PRECISIONS, TORCH, arguments, check, modes, names

STUDY = Path(__file__).resolve().parents[2] / "configs" / "tinystories.py"
BASELINE = "baseline"
ARMS = (BASELINE, "no_layer_norm", "post_norm", "no_position_emb", "silu_ffn")
SLOTS = ("attention", "norm", "ffn", "loss")
CONFIGS_OWN = "config"
KERNELS = (
    "attention=reference",
    "attention=blockwise",
    "attention=flash",
    "attention=cudnn",
    "norm=reference+ffn=reference",
    "norm=fused+ffn=fused",
    "loss=reference",
    "loss=chunked",
    "attention=flash+norm=fused+ffn=fused",
    "attention=cudnn+norm=fused+ffn=fused",
)


@dataclass(frozen=True)
class Options:
    """What to measure. `kernels` and `cohort_kernels`: by name, the fields of `config.model` that are changed."""

    scale: str
    precisions: tuple[str, ...]
    arms: tuple[str, ...]
    kernels: Mapping[str, Mapping[str, str]]
    torch: tuple[str, ...]
    cohort: int
    cohort_kernels: Mapping[str, Mapping[str, str]]
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
    add("--scale", default="paper", help="of configs/tinystories.py (default paper; tiny for a CPU)")
    add("--arms", default=",".join(ARMS), metavar="A,B", help="with their config's kernels")
    add(
        "--kernels",
        default=",".join(KERNELS),
        metavar="A,B",
        help="of the baseline: attention=flash+norm=fused",
    )
    add(
        "--cohort",
        type=int,
        default=0,
        metavar="N",
        help="members of a cohort to time against N steps of one",
    )
    add(
        "--cohort-kernels",
        default=CONFIGS_OWN,
        metavar="A,B",
        help="as --kernels; `config`: the config's own",
    )
    arguments(parser, precision=PRECISIONS, torch=TORCH[:1], out="language_model.json")
    args, rest = parser.parse_known_args(argv)
    check(args)
    if args.cohort and args.cohort < 2:
        raise UserError(f"--cohort={args.cohort}: must be 2 or more; leave it out for none")
    overrides = config.read_overrides(rest, [f"--{name.replace('_', '-')}" for name in vars(args)])
    if args.batch is not None:
        overrides.append(("training.batch_size", str(args.batch)))
    return Options(
        scale=args.scale,
        precisions=names("precision", args.precision, PRECISIONS),
        arms=names("arms", args.arms, ARMS),
        kernels=_kernels("kernels", args.kernels),
        torch=modes(args.torch),
        cohort=args.cohort,
        cohort_kernels=_kernels("cohort-kernels", args.cohort_kernels),
        rounds=args.rounds,
        seconds=args.seconds,
        commit=args.commit,
        out=Path(args.out),
        overrides=tuple(overrides),
    )


def _kernels(flag: str, text: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for choice in filter(None, text.split(",")):
        changes = dict(part.partition("=")[::2] for part in choice.split("+") if choice != CONFIGS_OWN)
        for slot, name in changes.items():
            if slot not in SLOTS or not name:
                raise UserError(f"--{flag}={choice}: write it as slot=name+…; slots: {', '.join(SLOTS)}")
        found[choice] = {f"{slot}_impl": name for slot, name in changes.items()}
    return found


def run_of(options: Options, precision: str, arm: str = BASELINE, **kernels: str) -> RunConfig[Any, Any]:
    """The config of an arm on one device, at a precision, with fields of `config.model` changed."""
    declared = study.load(f"{STUDY}:scale={options.scale}", options.overrides)
    run = config.resolve(declared.config(arm)).base
    return replace(
        run,
        host=replace(run.host, mesh=MeshConfig(1, 1, 1, 1)),
        training=replace(run.training, compute_dtype=precision),
        model=replace(run.model, **kernels),
    )


def cases(options: Options, precision: str) -> dict[str, RunConfig[Any, Any]]:
    """The arms, and the baseline with other kernels than these have."""
    found = {arm: run_of(options, precision, arm) for arm in options.arms}
    for name, kernels in options.kernels.items():
        run = run_of(options, precision, **kernels)
        if run.fingerprint not in {known.fingerprint for known in found.values()}:
            found[f"{BASELINE}, {name}"] = run
    return found


def make_program(run: RunConfig[Any, Any], members: int = 1) -> StepProgram:
    """The program of members that differ in seed and in one of four rates."""
    task = import_task(run.task)(run, jax.default_backend())
    rates = [run.optim.learning_rate * share for share in (1.0, 0.5, 0.25, 0.125)]
    cohort = tuple(
        replace(run, seed=run.seed + n // 4, optim=replace(run.optim, learning_rate=rates[n % 4]))
        for n in range(members)
    )
    mesh = sharding.make_mesh(run.host.mesh, members, run.training.batch_size // run.accumulation)
    return StepProgram(task, Cohort(cohort), task.stages()[0], mesh)


def batch(run: RunConfig[Any, Any], members: int = 1) -> dict[str, np.ndarray]:
    """A training batch of made-up windows, (members, B, T + 1), whose words come as often as 1 / rank (Zipf)."""
    shares = 1 / np.arange(1, run.data.vocab_size + 1)
    shape = (members, run.training.batch_size, run.data.context + 1)
    ids = np.random.default_rng(0).choice(run.data.vocab_size, shape, p=shares / shares.sum())
    return {"tokens": ids.astype(np.int32)}
