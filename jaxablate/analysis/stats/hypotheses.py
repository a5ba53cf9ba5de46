"""Verdicts on the declared hypotheses.

With d = treatment - control and more being better, a claim is a statement about d and a margin m:

    claim             holds       p for it                        p against it                interval
    superiority       d > m       2 x one-sided, of d <= m        2 x one-sided, of d >= m    1 - alpha
    non-inferiority   d > -m      one-sided, of d <= -m           one-sided, of d >= -m       1 - 2 alpha
    equivalence       |d| < m     larger of two one-sided (TOST)  2 x smaller of two outside  1 - 2 alpha

A claim is `supported` if the p for it, and `refuted` if the p against it, is at most alpha: the interval lies
inside of the claim, or outside. A wrong refutation is an error like a wrong support; whatever the truth is,
a claim is open to only one of the two, and each is tested at alpha. The smaller p of each primary hypothesis
goes through Holm's correction, so that the chance of any wrong primary verdict of either kind is at most
alpha. (For step-down tests that decide in two directions that is proved for independent statistics, Shaffer
1980; for hypotheses that share a control it is simulated in the tests.) Secondary ones are not adjusted.

On scale `ratio` all of this is done with logs. m becomes ln(1 + m); of a superiority claim on a
lower-is-better response -ln(1 - m), so that "better by 10 %" is a ratio below 0.90 and not below 1/1.1.

Lost runs (diverged, or without reaching their target) make the t test one of the survivors. A verdict that
they could have flattered then also needs a signed-rank test over seeds in which lost runs are the worst: its
p is the larger of the two, and 1 with fewer than 6 seeds. Losses of the side that a one-sided claim speaks
for cannot flatter its refutation, nor those of the other side its support.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxablate.analysis import sentences
from jaxablate.analysis.findings import Estimate, Outcome, Verdict
from jaxablate.analysis.results import Results
from jaxablate.analysis.stats import effects, intervals, power
from jaxablate.analysis.stats.intervals import Fit
from jaxablate.analysis.stats.locked import Standing, standing
from jaxablate.analysis.stats.pairing import Blocks, Float, blocks, losing_sides, seeds_in, worst_case
from jaxablate.study import Hypothesis, Response, Study

# ------------------------------------------------------------------------------------- the arithmetic


class Evidence(Protocol):
    """What can say how far a difference, more being better, lies from a bound."""

    def p_above(self, bound: float) -> Any:
        """p of "it is not above"."""
        ...

    def p_below(self, bound: float) -> Any:
        """p of "it is not below"."""
        ...


def weigh(claim: str, evidence: Evidence, margin: float) -> tuple[Any, Any]:
    """(p for the claim, p against it); arrays where the evidence is. See the table above."""
    if claim == "superiority":
        return _twice(evidence.p_above(margin)), _twice(evidence.p_below(margin))
    if claim == "non_inferiority":
        return evidence.p_above(-margin), evidence.p_below(-margin)
    inside = np.maximum(evidence.p_above(-margin), evidence.p_below(margin))
    outside = np.minimum(evidence.p_above(margin), evidence.p_below(-margin))
    return inside, _twice(outside)


def _twice(p: Any) -> Any:
    return np.minimum(1.0, 2 * p)


def holm(p: Float) -> Float:
    """Adjusted p-values of a family in the last axis (Holm 1979); leading axes are studies of their own.

    The same numbers as statsmodels' `multipletests`, which takes one family at a time and collects garbage
    at every call: a tenth of a second each.
    """
    order = np.argsort(p, axis=-1)
    steps = np.take_along_axis(p, order, -1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.minimum(1.0, np.maximum.accumulate(steps, axis=-1))
    return np.take_along_axis(adjusted, np.argsort(order, axis=-1), -1)


def scaled_margin(h: Hypothesis, better: int) -> float:
    """The margin on the scale that is tested: of differences, or of log ratios."""
    if h.scale == "difference":
        return h.margin
    return -math.log1p(-h.margin) if h.claim == "superiority" and better < 0 else math.log1p(h.margin)


def level_of(h: Hypothesis, alpha: float) -> float:
    """The level of the interval that says the same as the test."""
    return 1 - alpha if h.claim == "superiority" else 1 - 2 * alpha


@dataclass(frozen=True)
class Ranks:
    """Signed ranks of differences, more being better."""

    differences: Float

    def p_above(self, bound: float) -> float:
        """p of "it is not above", 1 if there are too few differences to say."""
        p = intervals.signed_rank(self.differences - bound, "greater")
        return 1.0 if p is None else p

    def p_below(self, bound: float) -> float:
        """p of "it is not below", 1 if there are too few differences to say."""
        p = intervals.signed_rank(self.differences - bound, "less")
        return 1.0 if p is None else p


# ------------------------------------------------------------------------------------ asking the runs


@dataclass(frozen=True)
class Tested:
    """A hypothesis with what the runs say of it."""

    h: Hypothesis
    response: Response
    data: Blocks
    fit: Fit | None = None  # treatment - control, of logs on scale `ratio`
    p: float | None = None
    p_against: float | None = None
    problem: str = ""  # why it cannot be tested
    ran: bool = True

    @property
    def decisive(self) -> float:
        """The p that enters the family: of what the data lean to. What cannot be tested still counts in it."""
        return 1.0 if self.p is None or self.p_against is None else min(self.p, self.p_against)


def verdicts(results: Results) -> tuple[Verdict, ...]:
    """The verdicts on all hypotheses of a study, in the order of their declaration."""
    tested = [_test(results, h) for h in results.study.hypotheses]
    primary = [t for t in tested if t.h.primary]
    adjusted = holm(np.array([t.decisive for t in primary]))
    p_holm = {t.h.name: float(p) for t, p in zip(primary, adjusted, strict=True)}
    plan = standing(results)
    return tuple(_verdict(results.study, t, p_holm.get(t.h.name), len(primary), plan) for t in tested)


def _test(results: Results, h: Hypothesis) -> Tested:
    study, response = results.study, results.study.response(h.response)
    if h.treatment:
        arms, weights = (h.treatment, h.control or study.baseline), np.array([1.0, -1.0])
    else:
        crossed, why = effects.design(study)
        if crossed is None or h.factor not in crossed.factors:
            outside = why or f"the arms do not cross '{h.factor}' with the other factors"
            return Tested(h, response, blocks(results, (), response), problem=outside)
        term = next(t for t in crossed.terms if t.names == (h.factor,))
        arms, weights = crossed.arms, crossed.weights((term,))[0]
    data = blocks(results, arms, response)
    if data.untried:
        return Tested(h, response, data, problem=f"no run has ended of {', '.join(data.untried)}", ran=False)
    by_arm = [np.array(list(data.columns[arm].values())) for arm in arms]
    paired = h.test == "paired"
    if (paired and not data.seeds) or not all(map(len, by_arm)):
        what = "seed" if paired else "run"
        return Tested(
            h, response, data, problem=f"no {what} to compare has a value in each arm: {data.left_out}"
        )
    if h.factor and (why := effects.refusal(response, data)):
        return Tested(h, response, data, problem=why)
    table = data.values
    if h.scale == "ratio":
        if any(column.min() <= 0 for column in by_arm):
            return Tested(h, response, data, problem="a ratio needs values above zero, and some are not")
        table, by_arm = np.log(table), [np.log(column) for column in by_arm]
    if not paired:
        fit = intervals.welch(by_arm, weights)
    elif h.treatment:
        fit = intervals.paired(table[:, 0], table[:, 1])
    else:
        fit = effects.fit_effects(table, weights[None]).term(0)
    if fit.problem:
        return Tested(h, response, data, fit, problem=fit.problem)
    p, p_against = _with_lost(h, response, data, weights, fit)
    return Tested(h, response, data, fit, p, p_against)


def _with_lost(
    h: Hypothesis, response: Response, data: Blocks, weights: Float, fit: Fit
) -> tuple[float, float]:
    """(p for, p against), with what lost runs do to them."""
    better = response.better
    margin = scaled_margin(h, better)
    p, p_against = (float(x) for x in weigh(h.claim, fit.towards(better), margin))
    if not data.lost:
        return p, p_against
    ranks = Ranks(worst_case(data, weights, response, "log" if h.scale == "ratio" else "raw"))
    ranked, ranked_against = (float(x) for x in weigh(h.claim, ranks, margin))
    of_treatment, of_control = losing_sides(data, weights)
    if h.claim == "equivalence":
        of_treatment = of_control = True
    return max(p, ranked) if of_treatment else p, max(p_against, ranked_against) if of_control else p_against


# ------------------------------------------------------------------------------------------- in words


def _verdict(study: Study, t: Tested, p_holm: float | None, family: int, plan: Standing) -> Verdict:
    h, alpha = t.h, study.alpha
    decisive = t.decisive if p_holm is None else p_holm
    outcome: Outcome = "inconclusive"
    if not t.ran:
        outcome = "not run"
    elif t.p is not None and t.p_against is not None and decisive <= alpha:
        outcome = "supported" if t.p <= t.p_against else "refuted"
    shown = Estimate(None, level=level_of(h, alpha), note=t.problem)
    if t.fit is not None:
        note = "of the survivors" if t.data.lost else ""
        to = math.exp if h.scale == "ratio" else intervals.identity
        shown = intervals.estimate(t.fit, level_of(h, alpha), to, note)
    why = plan.exploratory.get(h.name, "")
    parts = [_figures(t, shown, outcome, p_holm, alpha), *_caveats(t, shown)]
    if plan.seeds_changed:
        parts.append("seeds were changed after the lock")
    return Verdict(
        hypothesis=h.name,
        claim=h.claim,
        text=h.text,
        response=t.response.name,
        treatment=h.treatment or h.factor,
        control=(h.control or study.baseline) if h.treatment else "",
        primary=h.primary,
        outcome=outcome,
        estimate=shown,
        margin=h.margin,
        scale=h.scale,
        p=t.p,
        p_holm=p_holm if t.p is not None else None,
        p_against=t.p_against,
        reason="; ".join(parts),
        advice=_advice(study, t, family) if outcome == "inconclusive" else "",
        locked=not why,
        declared="exploratory" if why else "confirmatory",
    )


def _figures(t: Tested, shown: Estimate, outcome: Outcome, p_holm: float | None, alpha: float) -> str:
    """The estimate, the claim it is held against, and the p that decides."""
    if shown.value is None:
        return t.problem
    what = f"main effect of {t.h.factor} " if t.h.factor else "difference "
    if t.h.scale == "ratio":
        what = f"ratio{' over the levels of ' + t.h.factor if t.h.factor else ''} "
    sign = "+" if t.h.scale == "difference" else ""
    figures = what + sentences.interval(shown, sign=sign)
    if t.p is None or t.p_against is None:
        return f"{figures}; {t.problem}"
    holds, fails = _claim(t.h, t.response.better)
    p = f"p {_p(min(t.p, t.p_against))}" + (f", Holm p {_p(p_holm)}" if p_holm is not None else "")
    if t.fit is not None and t.fit.value == 0 and t.fit.se == 0:
        p += ", the same in every seed"
    figures += f" at {sentences.level(shown)} over {shown.n} seeds"
    if outcome == "supported":
        return f"{figures}: {holds} ({p})"
    if outcome == "refuted":
        return f"{figures}: {fails} ({p} against the claim)"
    if t.decisive <= alpha:
        return f"{figures}: {holds if t.p <= t.p_against else fails}, but not after Holm's correction ({p})"
    return f"{figures}: cannot tell {holds} from {fails} ({p})"


def _p(p: float) -> str:
    text = sentences.p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _claim(h: Hypothesis, better: int) -> tuple[str, str]:
    """What the shown number is if the claim holds, and if it fails."""
    if h.scale == "difference":
        m = sentences.number(h.margin)
        if h.claim == "equivalence":
            return f"within ±{m}", f"outside ±{m}"
        if h.claim == "non_inferiority":
            return f"no worse than by {m}", f"worse by more than {m}"
        return (
            (f"better by more than {m}", f"better by less than {m} or worse")
            if h.margin
            else ("better", "worse")
        )
    bound = math.exp(scaled_margin(h, better))
    if h.claim == "equivalence":
        ends = f"{sentences.number(1 / bound)} to {sentences.number(bound)}"
        return f"within {ends}", f"outside {ends}"
    edge = sentences.number(bound if (h.claim == "superiority") == (better > 0) else 1 / bound)
    sides = f"above {edge}", f"below {edge}"
    return sides if better > 0 else (sides[1], sides[0])


def _caveats(t: Tested, shown: Estimate) -> list[str]:
    found = []
    if t.fit is None:
        return found
    if t.data.lost:
        enough = len(seeds_in(t.data)) >= intervals.MIN_SIGNS
        test = (
            "p is that of a signed-rank test with these as the worst, where it is larger"
            if enough
            else f"below {intervals.MIN_SIGNS} seeds no test can make up for that"
        )
        found.append(f"of the survivors ({t.data.toll}); {test}")
    elif t.data.gaps:
        found.append(f"without {t.data.left_out}")
    if t.h.scale == "ratio" and "loss" in t.response.metric and shown.value is not None and t.data.seeds:
        # The last arm is the control; of a factorial, the mean over its cells is close enough for words.
        loss = float(t.data.values[:, -1].mean() if t.h.treatment else t.data.values.mean())
        found.append(loss_ratio_in_words(shown.value, loss))
    return found


def loss_ratio_in_words(ratio: float, loss: float) -> str:
    """What a ratio of losses is as a ratio of perplexities: 1.05 of 3.3 nats is exp(0.165), 18 % more.

    Args:
      ratio: treatment over control.
      loss: the control's, in nats.
    """
    change = 100 * math.expm1(loss * (ratio - 1))
    more = "more" if change >= 0 else "less"
    percent = 100 * abs(ratio - 1)
    return (
        f"{sentences.number(percent, sentences.places(percent))} % {more} of a loss of {sentences.number(loss)} nats "
        f"is {sentences.number(abs(change), sentences.places(abs(change)))} % {more} perplexity"
    )


def seeds_needed(results: Results, target: float) -> list[tuple[str, int | None, str]]:
    """How many paired seeds each hypothesis needs if what was measured is the truth.

    Args:
      results: runs that have ended; their spread is taken for that of more seeds.
      target: power.

    Returns:
      (hypothesis, seeds, where that is from); None seeds if it is not known or beyond `power.MOST`.
    """
    tested = [_test(results, h) for h in results.study.hypotheses]
    family = sum(t.h.primary for t in tested)
    found = []
    for t in tested:
        if (why := _no_spread(t)) or t.fit is None:
            found.append((t.h.name, None, why))
            continue
        value, margin, sd, alpha = _spread(results.study, t, family)
        seeds = power.seeds_needed(t.h.claim, value, margin, sd, alpha, target)
        beyond = "" if seeds else f": more than {power.MOST} seeds"
        n = f"{t.fit.n} finished seeds"
        found.append((t.h.name, seeds, f"{_measured(t)}, SD {sentences.number(sd)} over {n}{beyond}"))
    return found


def _no_spread(t: Tested) -> str:
    """Why no spread is known by which seeds could be counted; empty if one is."""
    if t.problem or t.fit is None:
        return t.problem or "nothing was measured"
    if t.data.lost:
        return f"runs were lost ({t.data.toll})"
    return "" if t.fit.se else "the same in every seed"


def _spread(study: Study, t: Tested, family: int) -> tuple[float, float, float, float]:
    """(difference, more being better; margin; SD of the differences; level), as `power.seeds_needed` takes them."""
    assert t.fit is not None, "asked of what has been measured"
    better = t.response.better
    sd = float(t.fit.se) * math.sqrt(t.fit.n)
    alpha = study.alpha / family if t.h.primary else study.alpha
    return float(t.fit.towards(better).value), scaled_margin(t.h, better), sd, alpha


def _measured(t: Tested) -> str:
    assert t.fit is not None, "asked of what has been measured"
    shown = math.exp(float(t.fit.value)) if t.h.scale == "ratio" else float(t.fit.value)
    return f"the measured {t.h.scale} of {sentences.number(shown)}"


def _advice(study: Study, t: Tested, family: int) -> str:
    if t.fit is None:
        return ""
    if t.fit.n < intervals.MIN_SEEDS:
        return f"run at least {intervals.MIN_SEEDS} seeds; below that no spread can be told"
    if t.data.lost:
        few = len(seeds_in(t.data)) < intervals.MIN_SIGNS
        more = f"; from {intervals.MIN_SIGNS} seeds a test that ranks them worst can decide" if few else ""
        return f"find out why runs were lost{more}"
    value, margin, sd, alpha = _spread(study, t, family)
    return "" if sd == 0 else power.advice(t.h, value, margin, sd, alpha, t.fit.n, _measured(t))
