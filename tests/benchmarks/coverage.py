"""How often intervals hold the truth, and how often a study comes to a wrong verdict, in simulated studies.

    python tests/benchmarks/coverage.py [--draws=20000]

All draws of a row go through the functions of the analysis at once, as arrays; the tests run the same with
fewer draws, and hold it against `analyse` of the same numbers. The noise of a run is normal, and its seed
adds something that all arms have in common.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxablate.analysis.results import Result, Results
from jaxablate.analysis.stats import intervals
from jaxablate.analysis.stats.effects import design, fit_effects
from jaxablate.analysis.stats.hypotheses import holm, weigh
from jaxablate.analysis.stats.pairing import Float
from jaxablate.study import Hypothesis, Response, Study
from tests.analysis.made import made_study

SEED_SD, ALPHA = 2.0, 0.05


def factorial(hypotheses: Sequence[Hypothesis] = (), seeds: int = 3) -> Study:
    """A 2^3 study of one response, in which more is better."""
    return made_study(seeds, responses=(Response("val/y", "max"),), hypotheses=tuple(hypotheses))


def draw(draws: int, seeds: int, means: Float, rng: np.random.Generator, noisy: float = 1.0) -> Float:
    """(draws, seeds, arms): noise of SD 1, of `noisy` in the last arm, about the arms' means."""
    sd = np.where(np.arange(len(means)) == len(means) - 1, noisy, 1.0)
    shared = SEED_SD * rng.normal(size=(draws, seeds, 1))
    return means + shared + sd * rng.normal(size=(draws, seeds, len(means)))


def results_of(study: Study, values: Float) -> Results:
    """One draw, (seeds, arms) in the order of the study's arms, as results."""
    runs = [
        Result(arm.name, seed, "done", {"y": float(values[row, column])})
        for column, arm in enumerate(study.arms)
        for row, seed in enumerate(study.seeds)
    ]
    return Results(study, tuple(runs), locked="2026-01-01")


# --------------------------------------------------------------------------------------------- effects


@dataclass(frozen=True)
class Coverage:
    """Of 95 % intervals of each main effect."""

    ours: Float  # share of the draws whose interval holds the truth, by effect
    bootstrap: float  # the same of a percentile bootstrap over seeds, for comparison
    half_width: float  # mean, in units of the runs' SD
    pooled: float  # share of the draws that were pooled


def coverage(seeds: int, draws: int, noisy: float = 1.0, rng: int = 0) -> Coverage:
    """Main effects of a 2^3 in which the first is 1 and the others are nothing."""
    generator = np.random.default_rng(rng)
    crossed, _ = design(factorial())
    assert crossed is not None
    weights = crossed.weights(crossed.terms)[:3]
    truth = np.array([1.0, 0.0, 0.0])
    means = np.array([0.5 if cell[next(iter(cell))] == "on" else -0.5 for cell in crossed.cells])
    values = draw(draws, seeds, means, generator, noisy)
    found = fit_effects(values, weights)
    low, high = found.fit.limits(1 - ALPHA)
    by_seed = (values @ weights.T)[..., 0]
    resampled = by_seed[:, generator.integers(seeds, size=(500, seeds))].mean(-1)
    edges = np.quantile(resampled, [ALPHA / 2, 1 - ALPHA / 2], axis=1)
    return Coverage(
        ((low <= truth) & (truth <= high)).mean(0),
        float(((edges[0] <= 1) & (edges[1] >= 1)).mean()),
        float((high - low).mean() / 2),
        float(found.pooled.mean()),
    )


# -------------------------------------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class Claim:
    """A hypothesis of the study with what is true: the arm's difference from the baseline."""

    h: Hypothesis
    truth: float

    @property
    def holds(self) -> bool:
        """Whether the claim is true."""
        if self.h.claim == "superiority":
            return self.truth > self.h.margin
        if self.h.claim == "non_inferiority":
            return self.truth > -self.h.margin
        return abs(self.truth) < self.h.margin


def no_effect_anywhere() -> list[Claim]:
    """Seven arms like the baseline, each claimed to be better. Any conclusion is a wrong one."""
    others = [arm.name for arm in factorial().arms[1:]]
    return [Claim(Hypothesis(f"h{i}", "superiority", arm), 0.0) for i, arm in enumerate(others)]


def at_the_border() -> list[Claim]:
    """Claims of each kind whose truth is at, or just beside, the point where they are hardest; one is plain."""
    others = [arm.name for arm in factorial().arms[1:]]
    asked = [
        ("superiority", 0.0, 4.0), ("superiority", 0.0, 0.0), ("superiority", 1.0, 1.0),
        ("non_inferiority", 1.0, -1.0), ("non_inferiority", 1.0, -0.999),
        ("equivalence", 2.0, 2.0), ("equivalence", 2.0, -1.999),
    ]  # fmt: skip
    return [
        Claim(Hypothesis(f"h{i}", claim, arm, margin=margin), truth)
        for i, (arm, (claim, margin, truth)) in enumerate(zip(others, asked, strict=True))
    ]


def p_values(claims: Sequence[Claim], values: Float) -> tuple[Float, Float]:
    """(p for, p against) of each claim in each draw, (draws, claims)."""
    pairs = []
    names = [arm.name for arm in factorial().arms]
    for claim in claims:
        treatment = values[..., names.index(claim.h.treatment)]
        pairs.append(weigh(claim.h.claim, intervals.paired(treatment, values[..., 0]), claim.h.margin))
    return np.stack([p for p, _ in pairs], -1), np.stack([p for _, p in pairs], -1)


def wrong_verdicts(claims: Sequence[Claim], seeds: int, draws: int, rng: int = 0) -> tuple[float, float]:
    """Share of studies with any wrong verdict: with Holm's correction, and without.

    Where a superiority claim without margin meets no difference at all, both verdicts count as wrong.
    """
    means = np.array([0.0, *(claim.truth for claim in claims)])
    p, p_against = p_values(claims, draw(draws, seeds, means, np.random.default_rng(rng)))
    nothing = np.array([c.truth == c.h.margin == 0 for c in claims])
    wrong = np.where(np.array([c.holds for c in claims]), p_against < p, p < p_against) | nothing
    decisive = np.minimum(p, p_against)
    with_holm = ((holm(decisive) <= ALPHA) & wrong).any(-1).mean()
    return float(with_holm), float(((decisive <= ALPHA) & wrong).any(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=20_000)
    draws = parser.parse_args().draws
    print(f"main effects of a 2^3, {draws} draws: coverage of 95 % intervals")
    print("seeds  noisy arm  coverage  bootstrap  half-width / SD  pooled")
    for noisy in (1.0, 4.0):
        for seeds in (3, 4, 5, 8, 10):
            c = coverage(seeds, draws, noisy)
            shares = f"{c.ours.mean():8.3f}  {c.bootstrap:9.3f}  {c.half_width:15.2f}  {c.pooled:6.2f}"
            print(f"{seeds:5}  {noisy:8g}x  {shares}")
    print(f"\nany wrong verdict among seven primary hypotheses, {draws} studies")
    print("seeds  truth               with Holm  without")
    for name, claims in (("no effect anywhere", no_effect_anywhere()), ("at the border", at_the_border())):
        for seeds in (3, 5, 10):
            corrected, plain = wrong_verdicts(claims, seeds, draws)
            print(f"{seeds:5}  {name:18}  {corrected:9.3f}  {plain:7.3f}")


if __name__ == "__main__":
    main()
