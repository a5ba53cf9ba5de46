"""The rule on throughput: batch = micro-batch x accumulation x data shards, the same in all arms."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from jaxablate.check.case import Case, Said, fail, ok
from jaxablate.config import RunConfig


def batch(case: Case) -> Generator[Said, None, Said | None]:
    """An arm's batch comes out even on the mesh that the config asks for, and is as large as the others'.

    `check` builds every arm on one device, where any micro-batch is good: without this rule it is the launch
    that finds an arm whose micro-batches the devices do not divide. Only a factor that changes
    training.batch_size may change the batch.
    """
    run = case.probe.run
    size, accumulation = run.training.batch_size, run.accumulation
    rows, shards = size // accumulation, _shards(run)
    if rows % shards:
        yield fail(
            f"training.batch_size={size} in accumulation={accumulation} micro-batches is {rows} examples each, which "
            f"host.mesh, data x fsdp = {shards} devices, do not divide",
            batch=size, accumulation=accumulation, shards=shards,
        )  # fmt: skip
    for beside in case.beside:
        there = beside.probe.run.training.batch_size
        if size != there and not beside.declares("training.batch_size"):
            yield fail(
                f"the effective batch is {size}, in {beside.name} it is {there}, and the change of "
                f"{', '.join(beside.paths)} declares no such thing: training.batch_size would",
                arm=size, beside=there,
            )  # fmt: skip
            break
    return ok(
        f"batch {size} = {rows // shards} x {accumulation} x {shards} (micro-batch, accumulation, data shards)",
        batch=size, micro_batch=rows // shards, accumulation=accumulation, shards=shards,
    )  # fmt: skip


def _shards(run: RunConfig[Any, Any]) -> int:
    """Parts of a micro-batch on a mesh; where the config leaves the number open, one that divides is chosen."""
    return (run.host.mesh.data or 1) * (run.host.mesh.fsdp or 1)
