"""Student t on per-seed numbers: intervals, one-sided tests, and what may be said of them.

The unit of replication is the training seed, and every interval of a report comes from a `Fit` over seeds.
There is no bootstrap: at 3 to 10 seeds a nominal 95 % percentile or BCa interval holds 73 to 90 %.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy import stats

from jaxablate.analysis.findings import Estimate, Judgement
from jaxablate.analysis.stats.pairing import Float
from jaxablate.errors import UserError

MIN_SEEDS = 3  # below, no interval: with one degree of freedom it is 13 standard errors wide
MIN_SIGNS = 6  # below, an exact sign-flip or rank test cannot reach two-sided p = 0.05
EXACT_SIGNS = 14  # above, sign patterns are drawn instead of listed
DRAWN_SIGNS = 20_000
_ROUNDING = 1e-12  # relative; a spread below it is that of floating point


@dataclass(frozen=True)
class Fit:
    """An estimate with its standard error, normal within seeds. Numbers, or arrays of many studies at once."""

    value: Any
    se: Any  # NaN: cannot be known from so few seeds; 0: no spread at all
    df: Any
    n: int  # seeds or pairs behind it
    how: str

    def limits(self, level: float) -> tuple[Any, Any]:
        """The two-sided Student t interval."""
        half = stats.t.isf((1 - level) / 2, self.df) * self.se
        return self.value - half, self.value + half

    def p_above(self, bound: float) -> Any:
        """One-sided p of "the truth is not above `bound`"; small if the data say that it is."""
        return self._p(self.value - bound)

    def p_below(self, bound: float) -> Any:
        """One-sided p of "the truth is not below `bound`"."""
        return self._p(bound - self.value)

    def _p(self, distance: Any) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.divide(distance, self.se)
        # 0 / 0, on the bound without any spread, says nothing either way.
        return np.where((np.asarray(self.se) == 0) & (np.asarray(distance) == 0), 0.5, stats.t.sf(t, self.df))

    def towards(self, better: int) -> Fit:
        """The same with more being better, if `better` is the response's direction."""
        return replace(self, value=better * self.value)

    @property
    def no_spread(self) -> bool:
        """Every seed says the same number, other than zero: nothing to judge its error by."""
        return self.n >= MIN_SEEDS and bool(self.se == 0) and bool(self.value != 0)

    @property
    def problem(self) -> str:
        """Why there is no interval; empty if there is one."""
        if self.n < MIN_SEEDS:
            return f"{self.n} seed{'s' if self.n != 1 else ''}: no interval below {MIN_SEEDS}"
        return "every seed gives the same number: no spread to judge it by" if self.no_spread else ""


def per_seed(numbers: Float, how: str, axis: int = 0) -> Fit:
    """Mean of one number per seed, along `axis`; SD with ddof 1."""
    n = numbers.shape[axis]
    value = numbers.mean(axis)
    sd = numbers.std(axis, ddof=1) if n > 1 else np.full_like(value, np.nan)
    # Equal up to rounding means a spread of 1e-17, and would be infinitely significant.
    same = sd <= _ROUNDING * np.abs(numbers).max(axis)
    se = np.where(same, 0.0, sd / math.sqrt(n))
    return Fit(value, se, np.full_like(value, n - 1), n, how)


def paired(treatment: Float, control: Float) -> Fit:
    """Treatment minus control, along the last axis, which is the pairs."""
    difference = treatment - control
    size = np.maximum(np.abs(treatment), np.abs(control)).max(-1, keepdims=True)
    difference = np.where(np.abs(difference) <= _ROUNDING * size, 0.0, difference)
    return per_seed(difference, f"Student t on {difference.shape[-1]} paired differences", axis=-1)


def welch(columns: list[Float], weights: Float) -> Fit:
    """A weighted sum of the means of independent samples, with Welch's and Satterthwaite's degrees of freedom."""
    n = np.array([len(column) for column in columns])
    value = float(sum(w * column.mean() for w, column in zip(weights, columns, strict=True)))
    how = f"Welch t on {' and '.join(str(k) for k in n) if len(n) == 2 else n.sum()} runs, unpaired"
    if n.min() < 2:
        return Fit(value, math.nan, math.nan, int(n.min()), how)
    parts = weights**2 * np.array([column.var(ddof=1) for column in columns]) / n
    total = parts.sum()
    df = total**2 / (parts**2 / (n - 1)).sum() if total > 0 else float((n - 1).sum())
    return Fit(value, math.sqrt(total), df, int(n.min()), how)


def identity(value: float) -> float:
    """A number on the scale it is on."""
    return float(value)


def estimate(
    fit: Fit, level: float, to: Callable[[float], float] = identity, note: str = "", p: float | None = None
) -> Estimate:
    """A fit as the report has it.

    Args:
      fit: of numbers, not arrays.
      level: of the interval.
      to: from the fit's scale to the shown one, such as `math.exp` of log ratios.
      note: what to beware of; goes before the reason for a missing interval.
      p: default: two-sided, of zero.
    """
    notes = "; ".join(part for part in (note, fit.problem) if part)
    if fit.problem:
        return Estimate(to(fit.value), level=level, n=fit.n, how=fit.how, note=notes)
    low, high = fit.limits(level)
    p = min(1.0, 2 * float(min(fit.p_above(0), fit.p_below(0)))) if p is None else p
    return Estimate(to(fit.value), to(low), to(high), level, p, fit.n, float(fit.df), fit.how, notes)


def judge(fit: Fit, level: float, better: int) -> Judgement:
    """What the interval of a difference says. The one place where a sign becomes a judgement.

    Args:
      fit: of a difference, or of a log ratio: zero is no difference.
      level: of the interval.
      better: the response's direction, +1 if more is better and -1 if less is.
    """
    if fit.problem:
        return "unclear"
    if fit.value == 0 and fit.se == 0:
        return "same"
    low, high = fit.towards(better).limits(level)
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


# ------------------------------------------------------------------------------------- without Student


def sign_flip(
    differences: Float, alternative: Literal["two-sided", "greater", "less"] = "two-sided"
) -> float:
    """p of "the differences are as likely as their negatives", by all sign patterns of their mean.

    Exact up to 14 differences; above, from 20,000 patterns of a fixed random seed.

    Raises:
      UserError: fewer than 6 differences, with which no result could be significant.
    """
    n = len(differences)
    if n < MIN_SIGNS:
        raise UserError(
            f"sign-flip test of {n} pairs: the smallest p it can give is {min(1.0, 2 / 2**n):.3g}; "
            f"use {MIN_SIGNS} or more"
        )
    means = _patterns(n) @ differences / n
    observed, tie = differences.mean(), 1e-12 * np.abs(differences).max()
    if alternative == "two-sided":
        means, observed = np.abs(means), abs(observed)
    as_far = means <= observed + tie if alternative == "less" else means >= observed - tie
    return float(as_far.mean())


@functools.cache
def _patterns(n: int) -> Float:
    """Sign patterns of `n` numbers, one a row: all of them, or many; the observed one, all plus, is the first."""
    if n <= EXACT_SIGNS:
        return np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    drawn = np.random.default_rng(0).choice((1.0, -1.0), (DRAWN_SIGNS, n))
    return np.concatenate([np.ones((1, n)), drawn])


def signed_rank(
    differences: Float, alternative: Literal["two-sided", "greater", "less"] = "two-sided"
) -> float | None:
    """p of Wilcoxon's signed-rank test, exact with ties; infinite differences rank above all others.

    Returns:
      None if there are fewer than 6.
    """
    if len(differences) < MIN_SIGNS:
        return None
    return sign_flip(np.sign(differences) * stats.rankdata(np.abs(differences)), alternative)


# ------------------------------------------------------------------------------------------- in words


def percents(ratio: Estimate) -> str:
    """A ratio as a change: `+5.0 % (+2.1 % to +8.0 %)`; without an interval the value alone."""

    def show(value: float) -> str:
        return f"{100 * (value - 1):+.1f} %".replace("-", "−")

    assert ratio.value is not None
    if ratio.low is None or ratio.high is None:
        return show(ratio.value)
    return f"{show(ratio.value)} ({show(ratio.low)} to {show(ratio.high)})"
