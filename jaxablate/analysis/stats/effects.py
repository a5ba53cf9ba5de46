"""Main effects and interactions of a factorial over seeds.

The design is blocked: `y ~ seed + A*B*C`. An effect is a weighted sum of the cells' means, and its error comes
from either of two places:

* per seed: the effect is computed within each seed, and Student's t is on those numbers. Assumes nothing of
  the arms' spreads, and costs degrees of freedom. The method from 5 seeds on.
* pooled: the residual of the whole model, (n - 1)(cells - 1) degrees of freedom. Half as wide at 3 seeds, and
  too narrow if one arm is noisier than the rest. Used at 3 and 4 seeds if the arms' SDs are alike.

"Alike" is decided by Cochran's C, the largest arm variance over their sum, tested at 10 % on what is left of
each arm after its seeds' means: it finds the single noisy arm that breaks pooling. With one arm of eight at
4 times the SD, 3 seeds, 95 % intervals of main effects then hold 93 % (always pooled: 91 %; simulated).
Comparisons of two arms are never pooled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

from jaxablate.analysis import sentences
from jaxablate.analysis.findings import Effect, EffectTable, Judgement, Scale
from jaxablate.analysis.results import Results
from jaxablate.analysis.stats import intervals
from jaxablate.analysis.stats.intervals import MIN_SEEDS, Fit
from jaxablate.analysis.stats.pairing import Blocks, Float, blocks, losing_sides, worst_case
from jaxablate.study import Response, Study

PER_SEED_FROM = 5  # seeds
ALIKE_AT = 0.10  # level of Cochran's test
Method = Literal["per_seed", "pooled", "none"]


# ------------------------------------------------------------------------------------------ the design


@dataclass(frozen=True)
class Term:
    """A main effect or an interaction: for each factor in it, the level that is compared with the reference."""

    levels: tuple[tuple[str, str], ...]  # (factor, level)
    names: tuple[str, ...]  # as the report has them: the factor, or "factor=level" if it has more than two


@dataclass(frozen=True)
class Design:
    """Arms that hold every combination of the levels of some factors."""

    factors: Mapping[str, tuple[str, ...]]  # factor -> its levels in use, the reference first
    cells: tuple[Mapping[str, str], ...]  # factor -> level
    arms: tuple[str, ...]  # in the order of the cells
    note: str = ""  # which arms are no part of it

    @property
    def terms(self) -> tuple[Term, ...]:
        """All main effects, then all interactions by order."""
        found = []
        for order in range(1, len(self.factors) + 1):
            for chosen in itertools.combinations(self.factors, order):
                for levels in itertools.product(*(self.factors[f][1:] for f in chosen)):
                    pairs = tuple(zip(chosen, levels, strict=True))
                    names = tuple(f if len(self.factors[f]) == 2 else f"{f}={level}" for f, level in pairs)
                    found.append(Term(pairs, names))
        return tuple(found)

    def weights(self, terms: tuple[Term, ...]) -> Float:
        """(terms, cells): what each cell's mean counts in each effect.

        Level minus reference, averaged over the cells of the other factors; halved at each order. With two
        levels each that is +-1 / 2^(k-1), Montgomery's coding.
        """
        rows = []
        for term in terms:
            chosen = dict(term.levels)
            row = []
            for cell in self.cells:
                weight = 2.0 ** (1 - len(chosen))
                for factor, level in cell.items():
                    if factor not in chosen:
                        weight /= len(self.factors[factor])
                    elif level == self.factors[factor][0]:
                        weight = -weight
                    elif level != chosen[factor]:
                        weight = 0.0
                row.append(weight)
            rows.append(row)
        return np.array(rows).reshape(len(terms), len(self.cells))


def design(study: Study) -> tuple[Design | None, str]:
    """The factorial that the arms hold; or None, and why.

    It is the largest set of factors that the arms cross completely, others at the baseline's level. An arm
    that is no part of it may change one other factor by itself; an arm that combines factors without
    completing their cells makes the design an incomplete factorial, of which no effects are given. One
    factor counts only if it is the study's only one: next to others its effect is a contrast of arms.
    """
    base = study.levels(study.baseline)
    arms = {tuple(study.levels(arm.name).items()): arm.name for arm in reversed(study.arms)}
    varied = {
        factor.name: levels
        for position, factor in enumerate(study.factors)
        if len(levels := [lv for lv in factor.levels if any(key[position][1] == lv for key in arms)]) > 1
    }
    combining = {name for key, name in arms.items() if sum(base[f] != level for f, level in key) > 1}
    for size in range(len(varied), 1 if len(varied) > 1 else 0, -1):
        for chosen in itertools.combinations(varied, size):
            if math.prod(len(varied[f]) for f in chosen) > len(arms):
                continue
            cells = _cells({f: varied[f] for f in chosen})
            keys = [tuple((base | cell).items()) for cell in cells]
            if not all(key in arms for key in keys):
                continue
            crossed = tuple(arms[key] for key in keys)
            if combining <= set(crossed):
                others = [arm.name for arm in study.arms if arm.name not in crossed]
                note = f"no part of the factorial: {', '.join(others)}" if others else ""
                return Design({f: tuple(varied[f]) for f in chosen}, cells, crossed, note), ""
    if not varied:
        return None, ""
    if not combining:
        return (
            None,
            "one factor at a time: no factorial, so each arm's contrast with the baseline is its effect",
        )
    total = math.prod(map(len, varied.values()))
    missing = f"{total - len(arms)} of {total}"
    if total <= 4 * len(arms):
        absent = [cell for cell in _cells(varied) if tuple((base | cell).items()) not in arms]
        missing = "; ".join(", ".join(f"{f}={level}" for f, level in cell.items()) for cell in absent)
    return (
        None,
        f"an incomplete factorial of {' x '.join(varied)}, without effects; cells that no arm has: {missing}",
    )


def _cells(levels: Mapping[str, Sequence[str]]) -> tuple[dict[str, str], ...]:
    """All combinations of the levels of some factors."""
    return tuple(dict(zip(levels, cell, strict=True)) for cell in itertools.product(*levels.values()))


# ------------------------------------------------------------------------------------- the arithmetic


@dataclass(frozen=True)
class Effects:
    """All effects of a design at once, in the last axis."""

    fit: Fit
    pooled: Float  # bool, one for each study in the leading axes
    sd_ratio: Float  # largest over smallest SD of the arms
    residual_sd: Float

    def term(self, index: int) -> Fit:
        """One effect of one study."""
        how = "Student t on the pooled residual of y ~ seed + cells" if self.pooled else self.fit.how
        fit = self.fit
        return replace(
            fit, value=float(fit.value[index]), se=float(fit.se[index]), df=float(fit.df[index]), how=how
        )


def fit_effects(values: Float, weights: Float) -> Effects:
    """Effects with their errors, by the rule of this module.

    Args:
      values: (…, seeds, cells); leading axes are studies of their own.
      weights: (terms, cells).
    """
    n, cells = values.shape[-2:]
    by_seed = values @ weights.T  # (…, seeds, terms)
    size = np.abs(values).max((-2, -1))[..., None, None]
    by_seed = np.where(np.abs(by_seed) <= 1e-13 * size, 0.0, by_seed)
    own = intervals.per_seed(by_seed, f"Student t on the effect in each of {n} seeds", axis=-2)

    within = values - values.mean(-1, keepdims=True)  # without what a seed's arms have in common
    residual = within - within.mean(-2, keepdims=True)
    squares = (residual**2).sum(-2)  # (…, cells)
    df = (n - 1) * (cells - 1)
    variance = squares.sum(-1) / max(df, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        sd_ratio = np.sqrt(squares.max(-1) / squares.min(-1))
        share = np.where(squares.sum(-1) > 0, squares.max(-1) / squares.sum(-1), 0.0)
    pooled = (share <= _cochran_limit(cells, n)) & (1 < n < PER_SEED_FROM)
    pooled_se = np.sqrt(variance[..., None] * (weights**2).sum(-1) / n)
    fit = replace(
        own,
        se=np.where(pooled[..., None], pooled_se, own.se),
        df=np.where(pooled[..., None], float(df), own.df),
    )
    return Effects(fit, pooled, sd_ratio, np.sqrt(variance))


def _cochran_limit(cells: int, n: int) -> float:
    """The largest share of one arm in the sum of `cells` variances that equal SDs allow (Cochran 1941)."""
    if cells < 2 or n < 2:
        return 1.0
    f = stats.f.isf(ALIKE_AT / cells, n - 1, (n - 1) * (cells - 1))
    return float(1 / (1 + (cells - 1) / f))


# --------------------------------------------------------------------------------------------- tables


def effect_tables(results: Results) -> tuple[EffectTable, ...]:
    """Effects of every response, raw and, where all values are positive, log."""
    study = results.study
    crossed, why = design(study)
    if crossed is None:
        return tuple(
            EffectTable(r.name, r.scale, (), "none", None, None, (), why) for r in study.responses if why
        )
    tables = []
    for response in study.responses:
        data = blocks(results, crossed.arms, response)
        scales: list[Scale] = ["raw", "log"]
        for scale in scales:
            if scale == "log" and data.values.size and data.values.min() <= 0:
                continue
            tables.append(_table(response, scale, crossed, data, 1 - study.alpha))
    return tuple(tables)


def refusal(response: Response, data: Blocks) -> str:
    """Why effects would mislead; empty if they do not."""
    if response.reduce == "time_to" and data.lost:
        return f"times are censored ({data.left_out}): a mean of those that reached the target would flatter"
    if not data.seeds:
        return f"no seed has a value in every cell; cells missing: {data.left_out}"
    return ""


def _table(response: Response, scale: Scale, crossed: Design, data: Blocks, level: float) -> EffectTable:
    if why := refusal(response, data):
        return EffectTable(response.name, scale, (), "none", None, None, data.seeds, why)
    values = np.log(data.values) if scale == "log" else data.values
    terms = crossed.terms
    weights = crossed.weights(terms)
    found = fit_effects(values, weights)
    n, ratio = len(data.seeds), float(found.sd_ratio)
    note = "of the survivors" if data.lost else ""
    effects = []
    for index, term in enumerate(terms):
        fit = found.term(index)
        better = judge(fit, level, data, weights[index], response, scale)
        effects.append(
            Effect(
                factors=term.names,
                response=response.name,
                scale=scale,
                estimate=intervals.estimate(fit, level, note=note),
                better=better,
                level_means=_level_means(term, crossed, values.mean(0), scale),
                primary=scale == response.scale,
                text=_effect_text(term, response, scale, fit, level, better, note),
            )
        )
    method: Method = "none" if n < MIN_SEEDS else "pooled" if found.pooled else "per_seed"
    notes = [_method_note(method, n, ratio)]
    if data.gaps:
        notes.append(f"complete seeds only; left out: {data.left_out}")
    if data.lost:
        notes.append("effects are of the survivors")
    notes += [crossed.note] if crossed.note else []
    return EffectTable(
        response.name,
        scale,
        tuple(effects),
        method,
        float(found.residual_sd) if n > 1 else None,
        ratio if math.isfinite(ratio) else None,
        data.seeds,
        "; ".join(notes),
    )


def judge(
    fit: Fit, level: float, data: Blocks, weights: Float, response: Response, scale: Scale
) -> Judgement:
    """What a difference of arms says. One that lost runs could have flattered must hold with them as the worst."""
    better = intervals.judge(fit, level, response.better)
    of_treatment, of_control = losing_sides(data, weights)
    if (better == "better" and of_treatment) or (better == "worse" and of_control):
        p = intervals.signed_rank(worst_case(data, weights, response, scale))
        return better if p is not None and p <= 1 - level else "unclear"
    return better


def _method_note(method: Method, n: int, ratio: float) -> str:
    spread = (
        f"largest arm SD {ratio:.1f} times the smallest" if math.isfinite(ratio) else "an arm has no spread"
    )
    if method == "none":
        return f"{n} complete seed{'s' if n > 1 else ''}: no interval below {MIN_SEEDS}"
    if method == "pooled":
        return f"pooled over {n} seeds: arm SDs are alike ({spread}; Cochran's C within its 10 % limit)"
    if n < PER_SEED_FROM:
        return f"per seed, not pooled: arm SDs differ ({spread}; Cochran's C beyond its 10 % limit)"
    return f"per seed, the method from {PER_SEED_FROM} seeds on ({spread})"


def _level_means(term: Term, crossed: Design, means: Float, scale: Scale) -> dict[str, float]:
    """Means of the cells at each level, or combination of levels, of a term; geometric ones for logs."""
    found = {}
    pairs = [(crossed.factors[f][0], level) for f, level in term.levels]
    for levels in itertools.product(*pairs):
        chosen = {f: level for (f, _), level in zip(term.levels, levels, strict=True)}
        there = [all(cell[f] == level for f, level in chosen.items()) for cell in crossed.cells]
        mean = float(means[np.array(there)].mean())
        name = levels[0] if len(levels) == 1 else ",".join(f"{f}={level}" for f, level in chosen.items())
        found[name] = math.exp(mean) if scale == "log" else mean
    return found


def _effect_text(
    term: Term, response: Response, scale: Scale, fit: Fit, level: float, better: Judgement, note: str
) -> str:
    if scale == "log":
        shown = intervals.percents(intervals.estimate(fit, level, math.exp))
    else:
        shown = sentences.interval(intervals.estimate(fit, level), sign="+")
    shown += f" {note}" if note else ""
    name = " × ".join(term.names)
    if better == "same":
        return f"{name}: {response.name} is the same in every seed"
    if len(term.names) > 1:
        return f"{name}: {'clear' if better != 'unclear' else 'no clear'} interaction on {response.name}, {shown}"
    if better == "unclear":
        return f"{name}: no clear effect on {response.name}, {shown}"
    # After a verb that says the direction the number itself has no sign; its interval keeps its own.
    return (
        f"{name} {'raises' if fit.value > 0 else 'lowers'} {response.name} by {shown.lstrip('+−')}: {better}"
    )
