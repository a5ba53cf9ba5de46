"""What `bench kernels --tune` finds for one problem, and keeps: configurations, and which implementation is fast."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax

from jaxablate.bench import torch_sdpa
from jaxablate.bench.kernel_results import CaseResult
from jaxablate.bench.limits import Limits
from jaxablate.bench.problems import Call, Problem
from jaxablate.bench.programs import both, repeated, repeats
from jaxablate.bench.work import Direction
from jaxablate_kernels import Implementation, trials, tuning

logger = logging.getLogger(__name__)


def tune(
    problem: Problem, implementations: Mapping[str, Implementation | str], limits: Limits | None = None
) -> dict[str, trials.Timing]:
    """The best configuration of each implementation that has candidates, forward and backward together.

    One of which no candidate runs is left out; the log says why.
    """
    device = jax.devices()[0]
    gradients = problem.cotangents()
    times = repeats(problem, "both", limits, device.platform)
    found = {}
    for name, implementation in implementations.items():
        if isinstance(implementation, str) or implementation.candidates is None:
            continue
        if implementation.supports(problem.spec, device.platform) is not None:
            continue
        configs = implementation.candidates(problem.spec, device.device_kind)

        def program(config: Any, call: Call = implementation.call) -> Callable[..., Any]:
            return repeated(both(problem, functools.partial(call, config=config)), times)

        timings = [
            dataclasses.replace(timing, seconds=timing.seconds and timing.seconds / times)
            for timing in trials.tune(program, (problem.learned, problem.fixed, gradients), configs)
        ]
        for timing in timings:
            if timing.seconds is None:
                logger.warning("  %s: %s: %s", name, timing.config, timing.reason)
        ran = [timing for timing in timings if timing.seconds is not None]
        best = trials.best(timings)
        if best is None or best.seconds is None:
            logger.warning("  %s: none of %d configurations ran; not tuned", name, len(timings))
            continue
        found[name] = best
        logger.info(
            "  %s: %d of %d configurations ran, the best %.4g ms, its own choice %s: %s",
            name, len(ran), len(timings), 1e3 * best.seconds,
            f"{1e3 * timings[0].seconds:.4g} ms" if timings[0].seconds else "did not run", best.config,
        )  # fmt: skip
    return found


def keep(result: CaseResult, problem: Problem, tuned: Mapping[str, trials.Timing]) -> None:
    """Keep the configurations that proved right, and how fast each implementation was, for `auto`."""
    device = jax.devices()[0].device_kind
    for entry in result.entries:
        if entry.status == "timed" and entry.name in tuned:
            tuning.save_config(problem.op, entry.name, problem.spec, device, tuned[entry.name])
    tuning.save_measurements(
        [
            tuning.Measurement(problem.op, name, tuning.spec_fields(problem.spec), direction, seconds)
            for direction in get_args(Direction)
            for name, seconds in result.seconds(direction).items()
            if name != torch_sdpa.NAME
        ],
        device,
    )
