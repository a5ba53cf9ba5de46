"""What a run recorded of itself in summary.json, as numbers by dotted name: `train_loss.final`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxablate.analysis.results import Result

STEPS, HOURS = "total_steps", "total_wallclock_hours"
FINAL_TRAIN, FINAL_VAL, BEST_VAL = "train_loss.final", "val_loss.final", "val_loss.min"
GAP = "generalization_gap.final_train_minus_best_val"  # one noisy batch against a minimum
LATE_GAP = "generalization_gap.late_train_minus_final_val"  # see `metrics.gaps`


def recorded(run: Result) -> dict[str, float]:
    """The numbers of a run's statistics; what was not finite is not there."""
    return dict(_numbers(run.statistics, ""))


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value
