"""What the programs of a cohort take of one device, and the largest micro-batch that fits.

The step of every stage and the evaluation are compiled. What else lies on a device while the training loop runs
is known from shapes: the next batch beside a step, a member's copy while it is saved, the members' states beside
the cohort's when it starts, a stage's state beside the next one's.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxablate import sharding, targets
from jaxablate.config import Cohort, RunConfig, import_task
from jaxablate.errors import UserError
from jaxablate.estimate.facts import MemoryFacts
from jaxablate.estimate.places import Place
from jaxablate.footprint import memory_of, out_of_memory, search
from jaxablate.program import Program
from jaxablate.task import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Use:
    """Bytes of one device while one thing is done."""

    what: str
    argument: int
    temp: int = 0
    output: int = 0
    alias: int = 0
    beside: int = 0

    @property
    def peak(self) -> int:
        return self.argument + self.temp + self.output - self.alias + self.beside


def devices_needed(run: RunConfig[Any, Any]) -> int:
    """Devices that a run's config asks for; one along an axis that it leaves open."""
    return math.prod(getattr(run.host.mesh, axis) or 1 for axis in sharding.AXES)


def programs(cohort: Cohort, place: Place) -> list[Program]:
    """The programs of all stages, in order, on no more devices than the config asks for.

    Nothing is compiled yet, and nothing allocated.

    Raises:
      UserError: the config cannot be carried out there.
    """
    run = cohort.base
    rows, devices = run.training.batch_size // run.accumulation, place.devices[: devices_needed(run)]
    mesh = sharding.make_mesh(run.host.mesh, len(cohort.runs), rows, devices)
    with place.around(mesh):
        task = import_task(cohort.base.task)(cohort.base, place.platform)
        found, first = [], 0
        for stage in task.stages():
            # Where a CPU stands for a GPU the members are side by side, as they will be there.
            members = "together" if place.name in targets.TARGETS else None
            found.append(Program(task, cohort, stage, mesh, first, members))
            first += stage.steps
    return found


def split(run: RunConfig[Any, Any], accumulation: int) -> RunConfig[Any, Any]:
    """The run with so many micro-batches of an update."""
    return replace(
        run,
        training=replace(run.training, accumulation=accumulation),
        host=replace(run.host, split=1),
    )


def measure(stages: list[Program], place: Place) -> MemoryFacts:
    """The memory facts of a cohort at a place, from the programs that it has there.

    Raises:
      UserError: the compiler does not say what a program needs.
    """
    step = max((_step(program, place) for program in stages), key=lambda use: use.peak)
    evaluation, left_out = _evaluation(stages, place)
    uses = [step, *evaluation, *_between(stages)]
    largest = max(uses, key=lambda use: use.peak)
    fixed = max((use.peak for use in uses[1:]), default=0)
    micro = _largest_micro_batch(stages[0], place, step.peak) if fixed <= place.capacity else None
    parts = {k: v for k, v in dataclasses.asdict(largest).items() if k != "what"}
    return MemoryFacts(
        peak=largest.peak,
        **parts,
        program=largest.what,
        programs={use.what: use.peak for use in uses},
        left_out=left_out,
        source=place.source,
        capacity=place.capacity,
        reserve=place.reserve,
        fits=largest.peak <= place.capacity,
        largest_micro_batch=micro,
    )


def _step(program: Program, place: Place) -> _Use:
    with place.around(program.mesh):
        compiled = program.lower_step().compile(dict(place.options))
    # The loop puts the next batch on the device while the step works.
    return _compiled(f"step of {program.stage.name}", compiled, _bytes(program.abstract_batch()))


def _evaluation(stages: list[Program], place: Place) -> tuple[list[_Use], str]:
    """Of the stage with the largest state; and what cannot be known before the data is read, and why."""
    closing = type(stages[0].task).closing is not Task.closing
    unknown = ["the closing metrics: their batches come with the opened data"] if closing else []
    program = max(stages, key=lambda program: _bytes(program.abstract_state()))
    rows, example = program.cohort.base.training.eval_batch_size, program.task.example()
    batch = {key: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype) for key, x in example.items()}
    with place.around(program.mesh):
        try:
            lowered = program.lower_predict(batch)
        except KeyError as missing:
            evaluation = f"the evaluation: it reads {missing}, which only the opened data has"
            return [], "; ".join([evaluation, *unknown])
        return [_compiled("evaluation", lowered.compile(dict(place.options)))], "; ".join(unknown)


def _compiled(what: str, compiled: jax.stages.Compiled, beside: int = 0) -> _Use:
    memory = memory_of(compiled)
    if memory is None:
        raise UserError(f"{what}: the compiler of this platform does not say what a program needs")
    return _Use(what, **{k: v for k, v in memory.items() if k != "peak"}, beside=beside)


def _between(stages: list[Program]) -> Iterator[_Use]:
    """Where the loop holds more than a step's state; the base that the members share lies beside all of it."""
    base = _bytes(stages[0].abstract_base)
    for before, program in zip([None, *stages], stages, strict=False):
        state = _bytes(program.abstract_state())
        member = _bytes(program.abstract_checkpoint())
        if before is None:
            yield _Use("start", argument=member * len(program.cohort.runs), output=state, beside=base)
        else:
            earlier = _bytes(before.abstract_state())
            yield _Use(f"start of {program.stage.name}", argument=earlier, output=state, beside=base)
        yield _Use(f"save in {program.stage.name}", argument=state, output=member, beside=base)


def _bytes(tree: Any) -> int:
    """Of one device, by the shardings of abstract arrays."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _largest_micro_batch(first: Program, place: Place, known: int) -> int | None:
    """Examples of the largest micro-batch whose steps fit, of those that divide the effective batch evenly.

    `known` is the peak of the steps as the config has them, whose first stage is given.
    """
    cohort, mesh = first.cohort, first.mesh
    base = cohort.base
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = base.training.batch_size // shards
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    own = rows // base.accumulation

    def peak(number: int) -> int | None:
        """Of the size with this number, from 1."""
        if number > len(sizes):
            return None
        size = sizes[number - 1]
        if size == own:
            return known
        try:
            stages = programs(Cohort(tuple(split(run, rows // size) for run in cohort.runs)), place)
            found = max(_step(program, place).peak for program in stages)
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            return None
        logger.info("a micro-batch of %d needs %.4g GB", size, found / 1e9)
        return found

    fits, _ = search(peak, place.capacity, sizes.index(own) + 1, 1)
    return None if fits is None else sizes[fits - 1]
