"""The document's comparison: one row per run under its own columns, and the errors of the arms as bars."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxablate.analysis.plots import INK, MUTED, PALETTE, dress, new_figure
from jaxablate.analysis.report.scene import Scene
from jaxablate.studies.burgers.report.facts import CHOSEN, PLAIN, Facts, by_arm, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS: tuple[str, ...] = (
    "run_id", "name", "state", "created_at", "tokens", "latent_dim", "architecture", "attention", "depth",
    "drop_path", "hidden_dim", "nrmse_baseline", "nrmse_ttc", "mse_baseline", "mse_ttc", "operator_final_loss",
    "training_time_hours", "conservation_gap", "bc_violation", "negativity_penalty", "ttc_improvement_pct",
)  # fmt: skip


def row(one: Facts) -> dict[str, Any]:
    """A run under the document's columns; None where it has no such number.

    `baseline` is the operator alone, `ttc` with test-time conditioning; both are of fields, and of tokens only
    where nothing decodes them. `depth` counts the layers that a token goes through.
    """
    run = one.run
    return {
        "run_id": run.run_id,
        "name": run.arm,
        "state": run.state,
        "created_at": run.started,
        **one.architecture,
        **{f"{name}_baseline": one.error(name, PLAIN) for name in ("nrmse", "mse")},
        **{f"{name}_ttc": one.error(name, CHOSEN) for name in ("nrmse", "mse")},
        "operator_final_loss": one.loss_at_end_of("operator"),
        "training_time_hours": run.statistics.get("total_wallclock_hours"),
        "conservation_gap": one.law("conservation_gap"),
        "bc_violation": one.law("boundary_violation"),
        "negativity_penalty": one.law("negativity"),
        "ttc_improvement_pct": one.improvement,
    }


def table(facts: Sequence[Facts]) -> str:
    """`architecture_comparison.csv`: a row for each run; an empty cell is a number that is not there."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row(one) for one in facts)
    return buffer.getvalue()


def bars(scene: Scene, facts: Sequence[Facts]) -> Figure:
    """The error of each arm without and with test-time conditioning: mean over seeds, each seed, doing nothing."""
    arms = by_arm(facts)
    figure = new_figure(max(6.0, 1.6 + 1.1 * len(arms)), 3.8)
    axes = figure.subplots()
    for offset, prediction, label, color in (
        (-0.2, PLAIN, "operator", PALETTE[0]),
        (0.2, CHOSEN, "with corrector and test-time conditioning", PALETTE[1]),
    ):
        known = {
            i: [value for one in runs if (value := one.error("nrmse", prediction)) is not None]
            for i, runs in enumerate(arms.values())
        }
        known = {i: values for i, values in known.items() if values}
        at = np.array(list(known), float) + offset
        axes.bar(at, [np.mean(v) for v in known.values()], 0.38, color=color, label=label if known else None)
        for x, values in zip(at, known.values(), strict=True):
            axes.plot(np.full(len(values), x), values, "o", ms=2.5, color=INK, alpha=0.6)
    still = {i: mean([one.doing_nothing for one in runs]) for i, runs in enumerate(arms.values())}
    still = {i: value for i, value in still.items() if value is not None}
    if still:
        at = np.array(list(still))
        style = {"color": MUTED, "linestyle": (0, (2, 2)), "label": "doing nothing"}
        axes.hlines(list(still.values()), at - 0.45, at + 0.45, **style)
    axes.set_xticks(range(len(arms)), list(arms), rotation=20, ha="right")
    dress(axes, scene.results.study.title or scene.results.study.name, "", "nRMSE (lower is better)")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    else:
        axes.text(0.5, 0.5, "no run has a score", transform=axes.transAxes, ha="center", color=MUTED)
    return figure
