"""`jaxablate bench step --largest-batch`: the largest batch of each arm whose training step fits into a memory.

Nothing is run: the step is compiled at one batch size after another, and what the compiler lays out for it
(arguments, results and temporaries, less what they share) is held against the memory of one device. What an
allocator loses between blocks, and libraries take for themselves, is not in it.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from jaxablate import disk, provenance, runstore
from jaxablate.analysis import benchmarks
from jaxablate.analysis.benchmarks import ArmBatches, BatchBenchmark
from jaxablate.analysis.report import plain, timings
from jaxablate.bench.step import Outcome, check_members, commit, folder, selected, stage_of
from jaxablate.bench.step_programs import StepProgram, make_program
from jaxablate.config import RunConfig
from jaxablate.errors import UserError
from jaxablate.footprint import NOT_HERE, device_memory, memory_of, out_of_memory, search
from jaxablate.study import Study

logger = logging.getLogger(__name__)

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
         "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """For which arms, and how much memory there is."""

    group: str = ""
    arms: tuple[str, ...] = ()
    stage: str = ""  # of the task, by name; default: the first
    members: int = 1  # of the cohort that a step is of
    memory: str = ""  # such as 24GB; default: the device's own
    out: str = ""

    def __post_init__(self) -> None:
        check_members(self.members)


def largest_batches(study: Study, options: Options) -> Outcome:
    """Searches for the largest batch of each arm, and writes what it found.

    Raises:
      UserError: no such arm or stage, a config that does not resolve, a memory that is no size, or one that nobody
        knows.
    """
    limit, source = memory_limit(options.memory)
    runs = selected(study, options.group, options.arms)
    arms = tuple(_largest(arm, run, limit, options) for arm, run in runs.items())
    searched = next((found for found in arms if not found.problem), None)
    if searched is None:
        raise UserError(f"bench {study.name}: no arm can be compiled here; {arms[0].arm}: {arms[0].problem}")
    facts = provenance.collect(jax.devices(), {}, {})
    found = BatchBenchmark(
        format=benchmarks.FORMAT,
        study=study.name,
        scale=runs[study.baseline].scale,
        baseline=study.baseline,
        time=runstore.now(),
        hardware=provenance.hardware(facts),
        stage=stage_of(make_program(runs[searched.arm], options.stage)),
        members=options.members,
        memory=limit,
        memory_source=source,
        arms=arms,
        provenance={**facts, "git": commit(facts["git"])},
    )
    where = Path(options.out) if options.out else folder(runs[study.baseline], study)
    disk.make_private(where)
    file = where / f"batch_{benchmarks.slug(found.hardware)}.json"
    disk.write_json(file, dataclasses.asdict(found))
    return Outcome(found, plain.text(timings.batch_document(found)).rstrip(), (file,))


def memory_limit(text: str) -> tuple[int, str]:
    """Bytes of one device, and where the number is from.

    Args:
      text: such as `24GB` (10^9), `24GiB` (2^30) or plain bytes; empty asks the device, and for a CPU the host.
    """
    if text:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
        if match is None or match[2] not in UNITS or float(match[1]) <= 0:
            raise UserError(f"--memory={text}: is no size; write it as 24GB or 22.5GiB")
        return int(float(match[1]) * UNITS[match[2]]), "--memory"
    device = jax.devices()[0]
    if (found := device_memory(device)) is None:
        raise UserError(f"--memory: {device.device_kind} does not say how much it has; give it, such as 24GB")
    return found


def _largest(arm: str, run: RunConfig[Any, Any], limit: int, options: Options) -> ArmBatches:
    def build(size: int) -> StepProgram:
        sized = replace(run, training=replace(run.training, batch_size=size))
        return make_program(sized, options.stage, options.members)

    found = ArmBatches(arm, run.fingerprint, run.training.batch_size, run.accumulation)
    peaks: dict[int, int] = {}

    def peak(size: int) -> int | None:
        """Bytes at a batch size; None where even the compiler runs out of memory."""
        try:
            memory = memory_of(build(size).compile_step().compiled)
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            return None
        if memory is None:
            raise UserError("the compiler of this platform does not say what a program needs")
        peaks[size] = memory["peak"]
        logger.info("%s: batch %d needs %.4g GB", arm, size, memory["peak"] / 1e9)
        return memory["peak"]

    try:
        mesh = build(run.training.batch_size).mesh.shape
        unit = run.accumulation * mesh["data"] * mesh["fsdp"]
        fits, fails = search(peak, limit, run.training.batch_size, unit)
    except NOT_HERE as error:
        return replace(found, problem=str(error))
    return replace(found, fits=fits, fails=fails, peaks={str(size): peaks[size] for size in sorted(peaks)})
