"""How many seeds a claim needs. Seeds are pairs: every arm is run on each of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats
from statsmodels.stats.power import TTestPower

from jaxablate.analysis.stats.pairing import Float
from jaxablate.study import Hypothesis

MOST = 100  # seeds; beyond, the answer is that no reasonable number will do
POWER = 0.8


def seeds_needed(
    claim: str, difference: float, margin: float, sd: float, alpha: float, power: float = POWER
) -> int | None:
    """The fewest paired seeds with which a claim is supported with that power; None if more than 100 are.

    Args:
      claim: `superiority` (two-sided at alpha), `non_inferiority` (one-sided at alpha) or `equivalence` (two
        one-sided tests at alpha).
      difference: treatment - control that is taken to be true, more being better.
      margin: the claim's, as a positive number on the scale of `difference`.
      sd: of the paired differences.
      alpha: for one of several primary hypotheses, what Holm's first step leaves of it.
    """
    seeds = np.arange(2.0, MOST + 1)
    known: dict[str, Callable[[], Float]] = {
        "superiority": lambda: _t_power((difference - margin) / sd, seeds, alpha, "two-sided"),
        "non_inferiority": lambda: _t_power((difference + margin) / sd, seeds, alpha, "larger"),
        "equivalence": lambda: tost_power(difference / sd, margin / sd, seeds, alpha),
    }
    beyond = {
        "superiority": difference <= margin,
        "non_inferiority": difference <= -margin,
        "equivalence": abs(difference) >= margin,
    }
    if beyond[claim] or sd <= 0:
        return None
    enough = np.flatnonzero(known[claim]() >= power)
    return int(seeds[enough[0]]) if len(enough) else None


def _t_power(effect: float, seeds: Float, alpha: float, alternative: str) -> Float:
    return np.asarray(TTestPower().power(effect, seeds, alpha, alternative=alternative))


def tost_power(effect: float, margin: float, seeds: Float, alpha: float) -> Float:
    """Power of two one-sided paired t tests, all in units of the SD of the differences.

    Integrates over the sample SD what the normal mean then leaves (Owen 1965; Phillips 1990): with s the
    sample SD, both tests reject if the mean lies within margin - t s / sqrt(n) of zero.
    """
    n = seeds[:, None]
    shares = (np.arange(400) + 0.5) / 400  # quantiles of the sample SD
    s = np.sqrt(stats.chi2.ppf(shares, n - 1) / (n - 1))
    reach = np.maximum(margin - stats.t.isf(alpha, n - 1) * s / np.sqrt(n), 0.0)
    inside = stats.norm.cdf((reach - effect) * np.sqrt(n)) - stats.norm.cdf((-reach - effect) * np.sqrt(n))
    return inside.mean(-1)


def advice(
    h: Hypothesis, difference: float, margin: float, sd: float, alpha: float, now: int, measured: str
) -> str:
    """What an inconclusive verdict needs, in a sentence.

    Args:
      difference, margin, sd, alpha: as in `seeds_needed`.
      now: paired seeds so far.
      measured: what the advice takes for the true difference, in words.
    """
    needed = seeds_needed(h.claim, difference, margin, sd, alpha)
    if needed is None:
        return f"no reasonable number of seeds (up to {MOST}) is likely to support this if {measured} is the truth"
    if needed <= now:
        return f"{now} seeds had 80 % power if {measured} is the truth: tell by a fresh study with more"
    return (
        f"about {needed} seeds would give 80 % power at this spread if {measured} is the truth ({now} now); "
        f"add them as fresh seeds, and label the result if you looked in between"
    )
