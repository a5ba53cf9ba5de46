"""Which experiments answer better than which, and whether so many questions can say so.

Questions about one picture, and pictures of one sequence, go right and wrong together, and so do the answers of one
seed. The bootstrap therefore draws whole pictures or whole sequences, and whole seeds, the same ones for both
experiments. Three seeds are too few for a bootstrap to be wide enough, so that Student's t over the seeds has to agree.
McNemar's test looks at one seed alone and takes every question for a case of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from jaxablate.analysis import sentences
from jaxablate.analysis.findings import Estimate
from jaxablate.analysis.stats.hypotheses import holm
from jaxablate.analysis.stats.intervals import MIN_SEEDS, MIN_SIGNS, estimate, paired
from jaxablate.studies.vqa.report.runs import Evaluation, Experiment

LEVEL = 0.95
DRAWS = 10_000
AT_ONCE = 500  # draws whose counts of pictures are held in memory together
MANY = 20  # units from which a percentile interval holds about what it says

Float = NDArray[np.float64]
Unit = Literal["image", "sequence"]
Verdict = Literal["above", "below", "not told apart"]


@dataclass(frozen=True)
class Discordant:
    """Questions that one of two runs alone is right about, with McNemar's exact p (binomial, two-sided)."""

    first: int
    second: int

    @property
    def p(self) -> float:
        """Of both being equally likely to be the one that is right."""
        n = self.first + self.second
        return float(stats.binomtest(self.first, n).pvalue) if n else 1.0


@dataclass(frozen=True)
class Comparison:
    """Exact accuracy of `first` minus that of `second`, as a share.

    Attributes:
      by_image, by_sequence: the same difference with the intervals of either bootstrap, over seeds as well.
      by_seed: with Student's interval over the seeds alone.
      sequences: in how many of them `first` is above, level with, and below `second`.
      mcnemar: by seed.
      adjusted: p of `by_image` after Holm's correction over all pairs.
    """

    first: str
    second: str
    by_image: Estimate
    by_sequence: Estimate
    by_seed: Estimate
    sequences: tuple[int, int, int]
    mcnemar: Mapping[int, Discordant]
    adjusted: float = 1.0

    @property
    def verdict(self) -> Verdict:
        """Told apart if the corrected p is below 5 % and no interval that there is holds zero."""
        others = (self.by_sequence, self.by_seed)
        if self.adjusted >= 1 - LEVEL or any(_holds_zero(one) for one in others):
            return "not told apart"
        return "above" if (self.by_image.value or 0.0) > 0 else "below"


def _holds_zero(one: Estimate) -> bool:
    return one.low is not None and one.high is not None and one.low <= 0 <= one.high


@dataclass(frozen=True)
class Resampled:
    """Accuracies of redrawn pictures or sequences.

    Attributes:
      questions: that were drawn from.
      accuracy: by experiment (draws, runs); the draws are the same for all of them.
      units: how many there are to be drawn.
      sums: by experiment the right answers on each unit, (runs, units).
    """

    unit: Unit
    questions: int
    accuracy: Mapping[str, Float]
    units: int
    sums: Mapping[str, Float]


def resample(
    evaluation: Evaluation, unit: Unit, draws: int = DRAWS, own: NDArray[np.bool_] | None = None
) -> Resampled:
    """Draws as many pictures or sequences as there are, with replacement; a fixed random seed.

    Of the questions that `own` selects, all without it.
    """
    own = np.full(len(evaluation.questions), True) if own is None else own
    clusters = np.unique(evaluation.clusters(unit)[own], return_inverse=True)[1]
    units = int(clusters.max()) + 1
    sizes = np.bincount(clusters, minlength=units).astype(float)
    sums = {
        one.name: np.array([np.bincount(clusters, hits, units) for hits in one.hits[:, own]], float)
        for one in evaluation.answered
    }
    rng, parts = np.random.default_rng(0), dict[str, list[Float]]()
    for start in range(0, draws, AT_ONCE):
        drawn = rng.multinomial(units, np.full(units, 1 / units), min(AT_ONCE, draws - start)).astype(float)
        for name, right in sums.items():
            parts.setdefault(name, []).append(drawn @ right.T / (drawn @ sizes)[:, None])
    return Resampled(
        unit, len(clusters), {name: np.concatenate(found) for name, found in parts.items()}, units, sums
    )


def accuracy(one: Experiment, drawn: Resampled) -> Estimate:
    """Exact accuracy of an experiment on what was drawn from, with the interval over other such questions and seeds."""
    value = float(drawn.sums[one.name].sum(1).mean() / drawn.questions)
    return _estimate(value, _over_seeds(drawn.accuracy[one.name]), drawn, len(one.runs))


def compare(evaluation: Evaluation, images: Resampled) -> list[Comparison]:
    """Every pair of experiments that share a seed; all pairs are one family. `images` was drawn from all questions."""
    sequences = resample(evaluation, "sequence")
    pairs = [
        _pair(first, second, images, sequences)
        for first, second in itertools.combinations(evaluation.answered, 2)
        if set(first.seeds) & set(second.seeds)
    ]
    adjusted = holm(np.array([pair.by_image.p for pair in pairs], float)) if pairs else []
    return [replace(pair, adjusted=float(p)) for pair, p in zip(pairs, adjusted, strict=True)]


def _pair(first: Experiment, second: Experiment, images: Resampled, sequences: Resampled) -> Comparison:
    seeds = [seed for seed in first.seeds if seed in second.seeds]
    mine, other = ([one.seeds.index(seed) for seed in seeds] for one in (first, second))
    value = float(first.hits[mine].mean() - second.hits[other].mean())

    def redrawn(drawn: Resampled) -> Estimate:
        apart = drawn.accuracy[first.name][:, mine] - drawn.accuracy[second.name][:, other]
        return _estimate(value, _over_seeds(apart), drawn, len(seeds))

    right = sequences.sums[first.name][mine].sum(0) - sequences.sums[second.name][other].sum(0)
    return Comparison(
        first.name,
        second.name,
        redrawn(images),
        redrawn(sequences) if sequences.units > 1 else Estimate(value, note="no sequences are known"),
        estimate(paired(first.hits[mine].mean(1), second.hits[other].mean(1)), LEVEL),
        (int((right > 0).sum()), int((right == 0).sum()), int((right < 0).sum())),
        {
            seed: discordant(first.hits[i], second.hits[j])
            for seed, i, j in zip(seeds, mine, other, strict=True)
        },
    )


def discordant(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Discordant:
    """Of two runs on the same questions, (questions,) each."""
    return Discordant(int((first & ~second).sum()), int((second & ~first).sum()))


def _over_seeds(numbers: Float) -> Float:
    """Means over redrawn runs: (draws, runs) -> (draws,)."""
    draws, runs = numbers.shape
    drawn = np.random.default_rng(1).multinomial(runs, np.full(runs, 1 / runs), draws)
    return (numbers * drawn).sum(1) / runs


def _estimate(value: float, redrawn: Float, drawn: Resampled, runs: int) -> Estimate:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(redrawn, (tail, 1 - tail))
    beyond = min(int((redrawn <= 0).sum()), int((redrawn >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (len(redrawn) + 1))
    what = sentences.count(drawn.units, drawn.unit)
    how = f"percentile bootstrap of {what} and {sentences.count(runs, 'seed')}, {len(redrawn):,} draws"
    few = drawn.units < MANY
    note = f"{what}: so few make a bootstrap's interval too short" if few else ""
    return Estimate(value, float(low), float(high), LEVEL, p, drawn.units, None, how, note)


# -------------------------------------------------------------------------------------------- in words


def support(comparisons: Sequence[Comparison], sequences: int, seeds: int) -> list[str]:
    """What the differences between the experiments support, a sentence each.

    Args:
      sequences: of the test questions; 1 where nobody named any.
      seeds: of each experiment.
    """
    if not comparisons:
        return ["Nothing can be compared: no two experiments have a finished run of the same seed."]
    apart = [one for one in comparisons if one.verdict != "not told apart"]
    pairs = sentences.count(len(comparisons), "pair")
    if not apart:
        widest = max(abs(one.by_image.value or 0.0) for one in comparisons)
        largest = sentences.number(100 * widest, 2)
        said = [
            f"No ranking is supported: of {pairs} none is told apart (largest difference {largest} points)."
        ]
    else:
        said = [_sentence(one) for one in apart]
        if rest := len(comparisons) - len(apart):
            said.append(f"Of the other {sentences.count(rest, 'pair')} nothing is supported.")
    if sequences < MIN_SIGNS:
        what = sentences.count(sequences, "sequence") if sequences > 1 else "no known sequences"
        said.append(
            f"This is of other pictures like these: with {what} no test can speak of other sequences "
            f"(that takes {MIN_SIGNS} at least)."
        )
    if seeds < MIN_SEEDS:
        said.append(f"With {sentences.count(seeds, 'seed')} nothing here speaks of other trainings.")
    return said


def _sentence(one: Comparison) -> str:
    found = one.by_image
    values = [100 * x for x in (found.value, found.low, found.high) if x is not None]
    higher, lower = (one.first, one.second) if one.verdict == "above" else (one.second, one.first)
    if one.verdict == "below":
        values = [-values[0], -values[2], -values[1]]
    size, low, high = (sentences.number(value, 2) for value in values)
    above, _, below = one.sequences if one.verdict == "above" else one.sequences[::-1]
    return (
        f"{higher} is above {lower} by {size} points ({low} to {high}; p {sentences.p_value(one.adjusted)} after "
        "Holm)"
        + (f", in {above} of {sum(one.sequences)} sequences" if sum(one.sequences) > 1 else "")
        + (f", and below it in {below}." if below else ".")
    )
