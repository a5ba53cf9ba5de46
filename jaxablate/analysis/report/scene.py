"""What the figures of a study draw from: results, findings, the curves of the runs, and a colour for each arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from jaxablate.analysis import curves
from jaxablate.analysis.curves import Rows, Series
from jaxablate.analysis.findings import Analysis, ArmValue, Contrast, Effect, EffectTable, Speed
from jaxablate.analysis.plots import PALETTE
from jaxablate.analysis.results import Result, Results
from jaxablate.analysis.stats.bands import Band, held, mean_over_seeds
from jaxablate.study import Response

Standing = Literal["declared", "exploratory"]
PLAIN = "#A8A8A8"  # of arms that no colour is left for


@dataclass(frozen=True)
class Scene:
    """A study as its figures see it."""

    results: Results
    analysis: Analysis

    @property
    def level(self) -> float:
        """The level of the study's intervals."""
        return 1 - self.results.study.alpha

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """All arms, as declared."""
        return tuple(arm.name for arm in self.results.study.arms)

    @cached_property
    def coloured(self) -> tuple[str, ...]:
        """The arms with a colour of their own: all if the palette has enough, or the baseline and those
        that differ most from it in the primary response."""
        if len(self.arms) <= len(PALETTE):
            return self.arms
        baseline, primary = self.results.study.baseline, self.results.study.response().name
        size = {
            c.arm: abs(c.difference.value)
            for c in self.analysis.contrasts
            if c.response == primary and c.difference.value is not None and c.control == baseline
        }
        others = [arm for arm in self.arms if arm != baseline]
        far = sorted(others, key=lambda arm: -size.get(arm, 0.0))[: len(PALETTE) - 1]
        return tuple(arm for arm in self.arms if arm == baseline or arm in far)

    @cached_property
    def colors(self) -> Mapping[str, str]:
        """The colour of each arm, the same in every figure and table."""
        return dict.fromkeys(self.arms, PLAIN) | dict(zip(self.coloured, PALETTE, strict=False))

    @cached_property
    def rest(self) -> str:
        """A sentence on the arms without a colour; empty if there are none."""
        left = len(self.arms) - len(self.coloured)
        if not left:
            return ""
        return (
            f"Of {len(self.arms)} arms the baseline and the {len(self.coloured) - 1} that differ most from it "
            f"in {self.results.study.response().name} have a colour; the other {left} are grey."
        )

    # ------------------------------------------------------------------------------------- findings

    def values(self, response: str) -> list[ArmValue]:
        """The values of one response, arms as declared."""
        return [value for value in self.analysis.arms if value.response == response]

    def contrasts(self, response: str) -> list[Contrast]:
        """The arms against the baseline in one response."""
        return [c for c in self.analysis.contrasts if c.response == response]

    def effect_table(self, response: str) -> EffectTable | None:
        """The effects of a response on the scale that it declares."""
        tables = [table for table in self.analysis.effects if table.response == response]
        declared = [t for t in tables if any(effect.primary for effect in t.effects)]
        return next(iter(declared or tables), None)

    def standing(self, found: Effect | Contrast) -> Standing:
        """Whether a confirmatory hypothesis declares this very comparison: same treatment, control, response."""
        if isinstance(found, Contrast):
            asked = (found.arm, found.control)
        else:
            asked = (*found.factors, "")  # of a main effect; no hypothesis declares an interaction
        declared = any(
            (v.treatment, v.control) == asked and v.response == found.response
            for v in self.analysis.verdicts
            if v.declared == "confirmatory"
        )
        return "declared" if declared else "exploratory"

    @cached_property
    def comparable(self) -> tuple[Speed, ...]:
        """One speed for each arm, all on the hardware and cohort size that most arms share."""
        groups: dict[tuple[str, int], dict[str, Speed]] = {}
        for speed in self.analysis.speed:
            if speed.steps_per_sec is None:
                continue
            group = groups.setdefault((speed.hardware, speed.cohort_size), {})
            if speed.arm not in group or group[speed.arm].runs < speed.runs:
                group[speed.arm] = speed
        most = max(groups.values(), key=len, default={})
        return tuple(most[arm] for arm in self.arms if arm in most)

    # --------------------------------------------------------------------------------------- curves

    @cached_property
    def rows(self) -> Mapping[tuple[str, int], Rows]:
        """(arm, seed) -> the rows of every confirmatory run that has some."""
        return {(run.arm, run.seed): run.rows for run in self.results.confirm if run.rows}

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """What is worth a curve: the responses' own metrics, then the losses, as far as runs have them."""
        wanted = [r.metric for r in self.results.study.responses if not r.metric.startswith("perf/")]
        one_each = {arm: rows for (arm, _), rows in self.rows.items()}
        known = {key for rows in one_each.values() for row in rows for key in row}
        return tuple(m for m in dict.fromkeys([*wanted, "train/loss", "val/loss"]) if m in known)

    def series(self, metric: str, arm: str) -> Sequence[tuple[Result, Series]]:
        """The curve of each run of an arm; a training loss is smoothed."""
        if (metric, arm) not in self._series:
            self._series[metric, arm] = self._runs_series(metric, arm)
        return self._series[metric, arm]

    @cached_property
    def _series(self) -> dict[tuple[str, str], Sequence[tuple[Result, Series]]]:
        return {}

    def _runs_series(self, metric: str, arm: str) -> Sequence[tuple[Result, Series]]:
        drawn = []
        for run in self.results.of(arm):
            curve = curves.series(self.rows.get((arm, run.seed), ()), metric)
            if metric.startswith("train/") and len(curve) > 20:
                curve = curves.smooth(curve, len(curve) / 12)
            if len(curve.finite):
                drawn.append((run, curve))
        return drawn

    def mean_curve(self, metric: str, arm: str) -> Band | None:
        """The mean of the finished runs of an arm, at the study's level; None if they share no step."""
        done = [(run, curve) for run, curve in self.series(metric, arm) if run.state == "done"]
        curves = [curve for _, curve in done]
        if metric.startswith("val/"):
            curves = held(curves, [run.stopped_at is not None for run, _ in done])
        return mean_over_seeds(curves, self.level)


def drawn_responses(responses: Sequence[Response]) -> list[Response]:
    """Those with a value axis: a time to a target has figures of its own."""
    return [response for response in responses if response.reduce != "time_to"]
