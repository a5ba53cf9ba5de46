"""How steadily runs trained: divergence, spikes of the loss and the largest gradient, by arm and learning rate.

Spikes and the largest gradient norm are counted in the training step and recorded as `train/spikes` and
`train/largest_grad_norm`; the last row that has them counts.
"""

from __future__ import annotations

from jaxablate.analysis.findings import Instability
from jaxablate.analysis.results import Result, Results

SPIKES, LARGEST = "train/spikes", "train/largest_grad_norm"


def instability(results: Results) -> tuple[Instability, ...]:
    """A row for each arm, rate and phase with runs that ended; none if no run recorded either measure."""
    if all(_last(run, key) is None for run in results.runs for key in (SPIKES, LARGEST)):
        return ()
    groups: dict[tuple[str, float | None, str], list[Result]] = {}
    order = {arm.name: i for i, arm in enumerate(results.study.arms)}
    for run in results.runs:
        if run.state in ("done", "diverged"):
            groups.setdefault((run.arm, run.learning_rate, run.phase), []).append(run)
    found = [_of(runs) for runs in groups.values()]
    return tuple(
        sorted(found, key=lambda row: (order[row.arm], row.phase != "confirm", row.learning_rate or 0.0))
    )


def _of(runs: list[Result]) -> Instability:
    first = runs[0]
    lost = [run for run in runs if run.state == "diverged"]
    spikes = [_last(run, SPIKES) for run in runs]
    norms = [norm for run in runs if (norm := _last(run, LARGEST)) is not None]
    return Instability(
        arm=first.arm,
        learning_rate=first.learning_rate,
        phase=first.phase,
        runs=len(runs),
        diverged=len(lost),
        steps=tuple(sorted(run.diverged_at for run in lost if run.diverged_at is not None)),
        spikes=tuple(int(count) for count in spikes if count is not None),
        largest_grad_norm=max(norms, default=None),
    )


def _last(run: Result, key: str) -> float | None:
    return next((row[key] for row in reversed(run.rows) if row.get(key) is not None), None)
