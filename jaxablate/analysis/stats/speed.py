"""Speed and memory, always beside the hardware and the kernels that they were measured with; and compute used."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxablate.analysis.findings import Speed
from jaxablate.analysis.results import Result, Results
from jaxablate.runstore import OUTCOMES


@dataclass(frozen=True)
class Measured:
    """What a speed was measured with; numbers of several of these are never averaged."""

    hardware: str
    kernels: str
    cohort_size: int
    accumulation: int


def measured_with(run: Result) -> Measured:
    """What the speed of a run was measured with."""
    kernels = ", ".join(f"{slot}: {name}" for slot, name in sorted(run.kernels.items()))
    return Measured(run.hardware, kernels, run.cohort_size, run.accumulation)


def speeds(results: Results) -> tuple[Speed, ...]:
    """A row for each arm on each hardware with each set of kernels, cohort size and accumulation.

    Numbers are medians over runs, of which each is a median over its stretches after warm-up. A ratio is to
    the baseline's row on the same hardware and with the same cohort size, and to nothing else. Accumulation
    may be what an arm needs to fit, so it does not forbid a ratio; the report says where it differs.
    """
    groups: dict[tuple[str, Measured], list[Result]] = {}
    for arm in results.study.arms:
        for run in results.of(arm.name):
            if run.perf:
                groups.setdefault((arm.name, measured_with(run)), []).append(run)
    rows = [_row(arm, measured, runs) for (arm, measured), runs in groups.items()]
    baseline: dict[tuple[str, int], Speed] = {}
    for row in rows:
        place = row.hardware, row.cohort_size
        if row.arm == results.study.baseline and (place not in baseline or row.runs > baseline[place].runs):
            baseline[place] = row
    return tuple(
        replace(row, ratio=_ratio(row, baseline.get((row.hardware, row.cohort_size)))) for row in rows
    )


def _row(arm: str, measured: Measured, runs: Sequence[Result]) -> Speed:
    def median(name: str) -> float | None:
        known = [run.perf[name] for run in runs if run.perf.get(name) is not None]
        return float(statistics.median(known)) if known else None

    rates = [run.perf["steps_per_sec"] for run in runs if run.perf.get("steps_per_sec") is not None]
    return Speed(
        arm=arm,
        hardware=measured.hardware,
        kernels=measured.kernels,
        cohort_size=measured.cohort_size,
        accumulation=measured.accumulation,
        runs=len(runs),
        steps_per_sec=median("steps_per_sec"),
        spread=float(np.subtract(*np.percentile(rates, [75, 25]))) / 2 if len(rates) > 1 else None,
        step_ms=median("step_ms"),
        examples_per_sec=median("examples_per_sec"),
        tokens_per_sec=median("tokens_per_sec"),
        mfu=median("mfu"),
        peak_bytes=median("peak_bytes"),
        compile_sec=median("compile_sec"),
        ratio=None,
        parameters=next((run.parameters for run in runs if run.parameters is not None), None),
    )


def _ratio(row: Speed, baseline: Speed | None) -> float | None:
    if baseline is None or not row.steps_per_sec or not baseline.steps_per_sec or not row.hardware:
        return None
    return row.steps_per_sec / baseline.steps_per_sec


def compute(results: Results) -> dict[str, Any]:
    """What the study used: number of runs in all and by state, and training hours.

    `run_hours` adds up the runs that ended, from their steps, median speed and compile time. `device_hours`
    shares that of a cohort among its members and counts each device. In neither are evaluation, checkpoints,
    steps that were trained again after an interruption, and runs that failed or have not ended;
    `runs_without_times` says how many runs that ended have no times on record.
    """
    hours: dict[str, float] = {}
    run_hours, unknown = 0.0, 0
    for run in results.runs:
        own = _hours(run)
        if own is None:
            unknown += run.state in OUTCOMES
            continue
        run_hours += own
        place = run.hardware or "unknown hardware"
        hours[place] = hours.get(place, 0.0) + own * _devices(run.hardware) / max(run.cohort_size, 1)
    found: dict[str, Any] = {"runs": len(results.runs)}
    found |= {f"runs_{state}": count for state, count in Counter(run.state for run in results.runs).items()}
    tuning = sum(run.phase == "tuning" for run in results.runs)
    found |= {"runs_tuning": tuning} if tuning else {}
    found |= {"runs_without_times": unknown} if unknown else {}
    if hours:
        found |= {"run_hours": run_hours, "device_hours": sum(hours.values()), "device_hours_on": hours}
    return found


def _hours(run: Result) -> float | None:
    rate = run.perf.get("steps_per_sec")
    if not rate or run.steps is None:
        return None
    return (run.steps / rate + (run.perf.get("compile_sec") or 0.0)) / 3600


def _devices(hardware: str) -> int:
    """`4 x NVIDIA H200` are four; a CPU is one."""
    match = re.match(r"(\d+) x ", hardware)
    return int(match[1]) if match else 1
