"""All facts of one arm."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np

from jaxablate import config, study
from jaxablate.config import Cohort, MeshConfig, RunConfig
from jaxablate.errors import UserError
from jaxablate.estimate import hours, memory, places, probe
from jaxablate.estimate.facts import BatchFacts, Estimate, StageFacts
from jaxablate.estimate.places import Place
from jaxablate.footprint import NOT_HERE
from jaxablate.program import Program
from jaxablate.trees import path_name


def cohort_of(run: RunConfig[Any, Any], members: int) -> Cohort:
    """So many runs like this one, with the seeds that follow its own."""
    return Cohort(tuple(replace(run, seed=run.seed + i) for i in range(members)))


@dataclass(frozen=True)
class Options:
    """What to estimate.

    Attributes:
      arm: of the study.
      target: where its programs would run.
      members: runs in the cohort.
      hours: where the time is from: timed here, or from the stated share of the target's peak.
      mfu: that share.
      beside: how many such processes are at work at the same time: they share a CPU's memory, and a probe has as
        many copies train beside it.
    """

    arm: str
    target: str = places.HERE
    members: int = 1
    hours: Literal["unknown", "probed", "stated"] = "unknown"
    mfu: float = 0.0
    beside: int = 0

    def __post_init__(self) -> None:
        if self.members < 1:
            raise UserError(f"--members={self.members}: must be 1 or more; leave it out for 1")
        if self.hours == "stated" and not 0 < self.mfu <= 1:
            raise UserError(f"--mfu={self.mfu:g}: must be a share of the peak in (0, 1], such as 0.4")
        if self.beside < 0:
            raise UserError(f"--beside={self.beside + 1}: must be 1 or more; leave it out for 1")


def of_study(
    spec: str, overrides: Iterable[tuple[str, str]], options: Options, command: Sequence[str], began: float
) -> Estimate:
    """What an arm of a study costs.

    Args:
      spec: `file.py:arg`.
      overrides: of its base config.
      options: what to estimate.
      command: the arguments of this process, with which a probe starts its copies.
      began: `time.perf_counter()` when this process started.

    Raises:
      UserError: anything that is wrong with the study, an option, or the arm at the target.
    """
    cohort = cohort_of_arm(spec, overrides, options)
    run = cohort.base
    needed, cache = memory.devices_needed(run), config.cache_dir(run.host)
    with places.place(options.target, needed, cache) as place, _refusals(place):
        time, place = None, places.shared(place, options.beside + 1)
        if options.hours == "probed":
            with probe.copies(command, options.beside) as waited:
                time = probe.measure(cohort, _same_here(place), began + waited, options.beside)
        found = estimate(cohort, place)
        if options.hours == "stated":
            time = hours.stated(found, place, run.training.compute_dtype, options.mfu)
    return replace(found, time=time)


def cohort_of_arm(spec: str, overrides: Iterable[tuple[str, str]], options: Options) -> Cohort:
    """The runs that the options ask about.

    Raises:
      UserError: anything that is wrong with the study, or there is no such arm.
    """
    run = config.resolve(study.load(spec, overrides).config(options.arm)).base
    return cohort_of(run, options.members)


def busy(cohort: Cohort, target: str) -> None:
    """Trains here until standard input ends: what a probe has beside itself."""
    with places.place(
        target, memory.devices_needed(cohort.base), config.cache_dir(cohort.base.host)
    ) as place:
        probe.busy(cohort, _same_here(place))


def _same_here(place: Place) -> Place:
    """The place if programs can run there, or such a device that is here."""
    if place.presence == "present" and place.name in (places.HERE, "cpu"):
        return place
    here = places.present(places.HERE)
    if here.kind != place.kind:
        raise UserError(
            f"--probe: times this machine, a {here.kind}, which is no {place.name}; leave out --target, "
            "or state a share of its peak with --mfu"
        )
    return here


@contextlib.contextmanager
def _refusals(place: Place) -> Iterator[None]:
    """What an arm cannot do on a device becomes a line."""
    try:
        yield
    except NOT_HERE as error:
        raise UserError(str(error)) from error
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"cannot be carried out on {place.kind}: {' '.join(str(error).split())[:300]}"
        ) from error


def estimate(cohort: Cohort, place: Place) -> Estimate:
    """What a cohort costs at a place, but for its time.

    Raises:
      UserError: the config cannot be carried out there.
    """
    run, stages = cohort.base, memory.programs(cohort, place)
    task, training = stages[0].task, run.training
    steps = sum(program.stage.steps for program in stages)
    flops, source = flops_per_step(run, stages)
    return Estimate(
        arm=run.arm,
        fingerprint=run.fingerprint,
        scale=run.scale,
        target=place.name,
        parameters=_parameters(stages[0], ("*",)) + task.base_parameters,
        trainable=_parameters(stages[0], [pattern for p in stages for pattern in p.stage.trainable]),
        flops_per_step=flops,
        flops_source=source,
        examples=steps * training.batch_size,
        tokens=steps * training.batch_size * task.tokens_per_example,
        steps=steps,
        stages=tuple(
            StageFacts(p.stage.name, p.stage.steps, _parameters(p, p.stage.trainable)) for p in stages
        ),
        members=len(cohort.runs),
        devices=memory.devices_needed(run),
        batch=batch_facts(run, stages[0].mesh),
        memory=memory.measure(stages, place),
        time=None,
    )


def batch_facts(run: RunConfig[Any, Any], mesh: jax.sharding.Mesh) -> BatchFacts:
    """How a run divides the examples of an update on a mesh."""
    training, host = run.training, run.host
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    micro = training.batch_size // run.accumulation // shards
    reasons = [f"training.accumulation={training.accumulation}"]
    if host.split > 1:
        reasons.append(f"split {host.split} times more after running out of memory (host.split)")
    axes = [f"{axis}={mesh.shape[axis]}" for axis in ("data", "fsdp") if mesh.shape[axis] > 1]
    reasons.append(
        f"examples over {' x '.join(axes)} devices (host.mesh)" if axes else "examples on one device"
    )
    reasons.append(
        "activations of each block computed again (training.remat=block)"
        if training.remat == "block"
        else "all activations kept (training.remat=none)"
    )
    reasons.append(
        f"{host.workers} processes read (host.workers)"
        if host.workers
        else "read by threads (host.workers=0)"
    )
    return BatchFacts(
        effective=training.batch_size,
        micro=micro,
        accumulation=run.accumulation,
        shards=shards,
        remat=training.remat,
        workers=host.workers,
        why=f"{training.batch_size} = {micro} x {run.accumulation} x {shards}: {'; '.join(reasons)}",
    )


def flops_per_step(
    run: RunConfig[Any, Any], stages: Sequence[Program]
) -> tuple[float | None, Literal["model", "compiler", ""]]:
    """Floating-point operations of one member's update, and who counted them.

    The compiler counts operations of the program for one CPU, without accumulation, since it takes the body of
    a loop as run once. Of several stages it is the mean over all steps, if there are any.
    """
    steps = [program.stage.steps for program in stages]
    weights = steps if any(steps) else None
    counted = [own for program in stages if (own := program.task.flops_per_example) is not None]
    if len(counted) == len(stages):
        return float(np.average(counted, weights=weights)) * run.training.batch_size, "model"
    unsplit = memory.split(run, 1)
    alone = replace(unsplit, host=replace(unsplit.host, mesh=MeshConfig(1, 1, 1, 1)))
    counts = []
    for program in memory.programs(Cohort((alone,)), places.present("cpu")):
        cost: Any = program.lower_step().cost_analysis()
        counts.append((cost or {}).get("flops"))
    if any(n is None or not n > 0 for n in counts):
        return None, ""
    return float(np.average(counts, weights=weights)), "compiler"


def _parameters(program: Program, patterns: Sequence[str]) -> int:
    """How many of the parameters of a member's own some pattern matches."""
    stage = replace(program.stage, trainable=tuple(patterns))
    leaves = jax.tree_util.tree_leaves_with_path(program.abstract_member.params)
    return sum(math.prod(x.shape) for path, x in leaves if stage.trains(path_name(path)))
