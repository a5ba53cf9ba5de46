"""Thousands of studies whose truth is known: do intervals hold it, and how often is a verdict wrong?

`python tests/benchmarks/coverage.py` prints the same at greater length.
"""

from __future__ import annotations

import numpy as np
import pytest

from jaxablate.analysis.stats.analyse import analyse
from jaxablate.analysis.stats.effects import design, fit_effects
from jaxablate.analysis.stats.hypotheses import holm
from tests.benchmarks.coverage import (
    at_the_border,
    coverage,
    draw,
    factorial,
    no_effect_anywhere,
    p_values,
    results_of,
    wrong_verdicts,
)

DRAWS = 2000


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_of_main_effects_hold_the_truth(seeds: int) -> None:
    """93 to 97 % of 95 % intervals, each main effect by itself. A percentile bootstrap does not come near."""
    found = coverage(seeds, DRAWS)
    assert np.all(found.ours > 0.93)
    assert np.all(found.ours < 0.97)
    assert found.bootstrap < {3: 0.80, 5: 0.88, 10: 0.925}[seeds]


def test_a_noisy_arm_costs_little_coverage() -> None:
    """At 3 seeds with one arm of 4 times the SD: 91 % if always pooled."""
    assert coverage(3, 2 * DRAWS, noisy=4.0).ours.mean() > 0.92
    assert coverage(5, DRAWS, noisy=4.0).ours.mean() > 0.93


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_without_any_effect_few_studies_come_to_a_verdict(seeds: int) -> None:
    """At most 6 % of studies with seven primary hypotheses; uncorrected it is one in five or more."""
    with_holm, without = wrong_verdicts(no_effect_anywhere(), seeds, DRAWS)
    assert with_holm <= 0.06
    assert without > 0.18


@pytest.mark.parametrize("seeds", [3, 5])
def test_claims_at_their_border_are_rarely_judged_wrongly(seeds: int) -> None:
    """Of every kind, beside one that is plainly true, whose right verdict makes Holm's correction milder."""
    with_holm, without = wrong_verdicts(at_the_border(), seeds, DRAWS)
    assert with_holm <= 0.06
    assert without > 0.10


@pytest.mark.parametrize("seeds", [3, 6])
def test_the_simulation_is_of_what_the_report_says(seeds: int) -> None:
    """Array by array and study by study: the same p-values, verdicts and intervals."""
    claims = at_the_border()
    study = factorial([claim.h for claim in claims], seeds)
    means = np.array([0.0, *(claim.truth for claim in claims)])
    values = draw(8, seeds, means, np.random.default_rng(3))
    p, p_against = p_values(claims, values)
    adjusted = holm(np.minimum(p, p_against))
    crossed, _ = design(study)
    assert crossed is not None
    order = [[arm.name for arm in study.arms].index(name) for name in crossed.arms]
    fits = fit_effects(values[..., order], crossed.weights(crossed.terms))
    low, high = fits.fit.limits(0.95)
    outcomes = set()
    for i in range(len(values)):
        analysis = analyse(results_of(study, values[i]))
        assert [v.p for v in analysis.verdicts] == pytest.approx(list(p[i]), rel=1e-9)
        assert [v.p_holm for v in analysis.verdicts] == pytest.approx(list(adjusted[i]), rel=1e-9)
        conclusive = [v.outcome in ("supported", "refuted") for v in analysis.verdicts]
        assert conclusive == list(adjusted[i] <= 0.05)
        outcomes |= {v.outcome for v in analysis.verdicts}
        table = analysis.effects[0]
        assert (table.method == "pooled") == bool(fits.pooled[i])
        assert [e.estimate.low for e in table.effects] == pytest.approx(list(low[i]), rel=1e-9)
        assert [e.estimate.high for e in table.effects] == pytest.approx(list(high[i]), rel=1e-9)
    assert {"supported", "inconclusive"} <= outcomes
