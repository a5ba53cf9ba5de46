"""Two settings compared on the same adapters, or on the same splits of them.

Runs of one split differ in their start alone, so their spread says nothing of other adapters. Of one split the unit
is therefore the test adapter, with the share of the runs that were right about it; of several splits it is the split.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxablate.analysis.findings import Estimate
from jaxablate.analysis.stats.hypotheses import holm
from jaxablate.analysis.stats.intervals import MIN_SEEDS, Fit, per_seed
from jaxablate.studies.lora_space.config import TENSORS
from jaxablate.studies.lora_space.report.runs import Finished, Setting, Settings, representations

LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """Test accuracy of `first` minus that of `second`; `adjusted` is p after Holm's correction within its family."""

    first: str
    second: str
    difference: Estimate
    adjusted: float | None = None


@dataclass(frozen=True)
class Compared:
    """All comparisons of a study.

    Attributes:
      representations: every pair of them, by set of tensors.
      without_text: every representation, with all layers and with self-attention alone.
    """

    representations: Mapping[str, Sequence[Comparison]]
    without_text: Sequence[Comparison]

    @classmethod
    def of(cls, found: Settings) -> Compared:
        """Those whose two settings have finished runs on the same adapters."""
        return cls({kind: of_representations(found, kind) for kind in TENSORS}, without_text(found))

    @property
    def all(self) -> list[Comparison]:
        """Of one set of tensors after another, then those without the text's."""
        pairs = [one for comparisons in self.representations.values() for one in comparisons]
        return [*pairs, *self.without_text]


def of_representations(found: Settings, tensors: str) -> list[Comparison]:
    """Every pair of representations of one set of tensors; all pairs are one family."""
    own = [found[name, tensors] for name in representations(found) if (name, tensors) in found]
    return _family(itertools.combinations(own, 2))


def without_text(found: Settings) -> list[Comparison]:
    """All layers against self-attention alone, for every representation; together they are one family."""
    pairs = [
        (found[name, "all_layers"], found[name, "visual_only"])
        for name in representations(found)
        if (name, "all_layers") in found and (name, "visual_only") in found
    ]
    return _family(pairs)


def _family(pairs: Any) -> list[Comparison]:
    made = [(a, b, fit) for a, b in pairs if (fit := compare(a, b)) is not None]
    known = [
        i for i, (_, _, fit) in enumerate(made) if np.isfinite(fit.se) and (fit.se > 0 or fit.value == 0)
    ]
    p = [2 * min(float(made[i][2].p_above(0)), float(made[i][2].p_below(0))) for i in known]
    adjusted = dict(zip(known, holm(np.minimum(p, 1)).tolist(), strict=True)) if known else {}
    return [
        Comparison(
            a.name, b.name, _estimate(fit, p[known.index(i)] if i in adjusted else None), adjusted.get(i)
        )
        for i, (a, b, fit) in enumerate(made)
    ]


def _estimate(fit: Fit, p: float | None) -> Estimate:
    value = float(fit.value)
    if p is None:
        return Estimate(
            value, level=LEVEL, n=fit.n, how=fit.how, note=f"{fit.n} units have no spread to judge it by"
        )
    low, high = fit.limits(LEVEL)
    return Estimate(value, float(low), float(high), LEVEL, min(p, 1.0), fit.n, float(fit.df), fit.how)


def compare(a: Setting, b: Setting) -> Fit | None:
    """The difference in test accuracy, a - b; None if the two have no test adapter in common."""
    by_split = [_by_split(one) for one in (a, b)]
    common = sorted(by_split[0].keys() & by_split[1].keys())
    pairs = [(by_split[0][split], by_split[1][split]) for split in common]
    if not pairs:
        return None
    if len(pairs) == 1:
        return _over_adapters(*pairs[0])
    return _over_splits(pairs)


def _by_split(one: Setting) -> dict[int, list[Finished]]:
    found: dict[int, list[Finished]] = {}
    for run in one.runs:
        found.setdefault(run.config["data"]["split_seed"], []).append(run)
    return found


def hits(runs: Sequence[Finished]) -> NDArray[np.float64]:
    """Share of the runs that are right about each test adapter, (adapters,)."""
    return np.mean([np.equal(*run.kept.of("test")) for run in runs], axis=0)


def _over_adapters(a: Sequence[Finished], b: Sequence[Finished]) -> Fit | None:
    """Student t on the adapters' differences; as many as there are, so that a t of binomial shares is close."""
    labels = [runs[0].kept.of("test")[0] for runs in (a, b)]
    if not len(labels[0]) or not np.array_equal(labels[0], labels[1]):
        return None
    how = f"Student t on {len(labels[0])} test adapters, each the mean of {len(a)} and {len(b)} runs"
    return per_seed(hits(a) - hits(b), how)


def _over_splits(pairs: Sequence[tuple[Sequence[Finished], Sequence[Finished]]]) -> Fit:
    """Corrected for the adapters that splits share: variance x (1/k + test/training) (Nadeau & Bengio 2003)."""
    differences = np.array([hits(a).mean() - hits(b).mean() for a, b in pairs])
    kept, k = pairs[0][0][0].kept, len(pairs)
    share = len(kept.of("test")[0]) / max(len(kept.of("train")[0]), 1)
    sd = differences.std(ddof=1) if k >= MIN_SEEDS else np.nan
    how = f"Student t on {k} splits, corrected for the adapters that they share"
    return Fit(differences.mean(), sd * np.sqrt(1 / k + share), k - 1, k, how)
