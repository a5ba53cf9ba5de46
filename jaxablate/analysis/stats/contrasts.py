"""Every arm against the baseline, on paired seeds."""

from __future__ import annotations

import math

import numpy as np

from jaxablate.analysis.findings import Contrast, Estimate, Scale
from jaxablate.analysis.results import Results
from jaxablate.analysis.stats import effects, intervals
from jaxablate.analysis.stats.pairing import Float, blocks, worst_case
from jaxablate.study import Response

TREATMENT_MINUS_CONTROL = np.array([1.0, -1.0])


def contrasts(results: Results) -> tuple[Contrast, ...]:
    """Each arm but the baseline, for every response. Exploratory: a hypothesis is what declares a comparison."""
    study = results.study
    others = [arm.name for arm in study.arms if arm.name != study.baseline]
    return tuple(_contrast(results, arm, response) for response in study.responses for arm in others)


def _contrast(results: Results, arm: str, response: Response) -> Contrast:
    study, level = results.study, 1 - results.study.alpha
    data = blocks(results, (arm, study.baseline), response)
    note, worst = "", None
    if data.lost:
        note = f"of the survivors: {data.left_out}"
        worst = intervals.signed_rank(worst_case(data, TREATMENT_MINUS_CONTROL, response))
    elif data.gaps:
        note = f"left out: {data.left_out}"
    if not data.seeds:
        none = Estimate(None, level=level, note="; ".join(filter(None, [note, "no pair of finished runs"])))
        return Contrast(
            arm, study.baseline, response.name, none, None, "unclear", None, None, worst, note
        )  # fmt: skip
    fit = intervals.paired(*data.values.T)
    positive = data.values.min() > 0
    logs = intervals.paired(*np.log(data.values.T)) if positive else fit
    scale: Scale = "log" if positive and response.scale == "log" else "raw"
    judged = logs if scale == "log" else fit
    return Contrast(
        arm=arm,
        control=study.baseline,
        response=response.name,
        difference=intervals.estimate(fit, level, note=note),
        ratio=intervals.estimate(logs, level, math.exp, note) if positive else None,
        better=effects.judge(judged, level, data, TREATMENT_MINUS_CONTROL, response, scale),
        correlation=_correlation(data.values),
        sd_ratio=_sd_ratio(data.values),
        worst_rank_p=worst,
        note=note,
    )


def _correlation(pairs: Float) -> float | None:
    """Of treatment and control over seeds: above zero, pairing them has helped."""
    if len(pairs) < intervals.MIN_SEEDS or pairs.std(0).min() == 0:
        return None
    return float(np.corrcoef(pairs[:, 0], pairs[:, 1])[0, 1])


def _sd_ratio(pairs: Float) -> float | None:
    if len(pairs) < 2 or (sds := pairs.std(0, ddof=1)).min() == 0:
        return None
    return float(sds.max() / sds.min())
