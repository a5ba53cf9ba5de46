"""How often a run does what, and how long it takes at a stated share of a device's peak."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from jaxablate.config import HostConfig, TrainingConfig
from jaxablate.estimate.facts import Estimate, TimeFacts
from jaxablate.estimate.places import Place
from jaxablate.task import Stage
from jaxablate_gpus import peak_flops

logger = logging.getLogger(__name__)


def evaluations(stages: Sequence[Stage], training: TrainingConfig) -> int:
    """Evaluations of a run of these stages: before the first step, every so often, after each stage.

    Where a stage goes back to its best, also before each of the others.
    """
    if not any(stage.steps for stage in stages):
        return 0
    found, before = len(stages) if training.restore == "best" else 1, 0
    for stage in stages:
        done = range(1, stage.steps + 1)
        found += sum(stage.evaluates(n, before, training.eval_every) for n in done)
        before += stage.steps
    return found


def saves(lengths: Sequence[int], host: HostConfig) -> int:
    """Checkpoints of a run; it may keep the best one so far besides."""
    return sum(n % host.checkpoint_every == 0 or end for n, end in _steps(lengths))


def _steps(lengths: Sequence[int]) -> Iterator[tuple[int, bool]]:
    """Every update, from 1, and whether it is its stage's last."""
    n = 0
    for length in lengths:
        for left in reversed(range(length)):
            n += 1
            yield n, left == 0


def stated(found: Estimate, place: Place, compute_dtype: str, mfu: float) -> TimeFacts | None:
    """The seconds of all steps if the model's FLOPs run at this share of the peak; None if one of them is unknown.

    All of the cohort's devices work on it, so that its device-hours are these times `Estimate.devices`.
    """
    peak = peak_flops(place.kind, compute_dtype)
    if peak is None or found.flops_per_step is None:
        unknown = f"peak of {place.kind} in {compute_dtype}" if peak is None else "number of FLOPs of a step"
        logger.warning("--mfu=%g: the %s is not known, so no time is told", mfu, unknown)
        return None
    step = found.flops_per_step * found.members / (mfu * peak * found.devices)
    return TimeFacts(
        start_s=None,
        compile_s=None,
        compiled="",
        step_s=step,
        evaluate_s=None,
        save_s=None,
        evaluations=0,
        saves=0,
        total_s=step * found.steps,
        source=f"stated MFU {mfu:g}",
    )
