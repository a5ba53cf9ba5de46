"""The document's own numbers, and what a spread of accuracies on so many questions can say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from jaxablate.analysis import sentences

# `smart_match` on the test questions, Qwen3-VL-8B.
KVASIR_QUESTIONS = 8_984
KVASIR_ZERO_SHOT = 4_805
KVASIR = {"exp1": 8_336, "exp2": 8_334, "exp3": 8_290, "exp4": 8_305, "exp5": 8_321}
# In percent. Every one of these answers was the same in its category, since the annotations were not found.
ENDOVIS = {"zero-shot": 31.12, "tuned": 95.18}


@dataclass(frozen=True)
class Spread:
    """Accuracies of several models on equally many questions, as shares.

    Attributes:
      range: the largest minus the smallest.
      se: standard error of one of them, binomial.
      p: how often models that are equally good would be as far apart.
    """

    models: int
    range: float
    se: float
    p: float

    @property
    def supported(self) -> bool:
        """Whether anything can be ranked at all."""
        return self.p < 0.05

    def sentence(self) -> str:
        """What the numbers support, in words."""
        spread, se = (sentences.number(100 * x, 2) for x in (self.range, self.se))
        said = f"Spread {spread} points over {self.models} models, standard error {se}: "
        if self.supported:
            return said + f"more than chance between equals would give (p {sentences.p_value(self.p)})."
        return (
            said + f"equals would be as far apart with probability {sentences.p_value(self.p)}. No ranking "
            "is supported."
        )


def spread(correct: Mapping[str, int], total: int) -> Spread:
    """Of counts of right answers: Tukey's studentised range of binomial shares.

    As if each model had been asked questions of its own: nobody can pair what was not published.
    """
    shares = np.array(list(correct.values()), float) / total
    mean = shares.mean()
    se, width = float(np.sqrt(mean * (1 - mean) / total)), float(np.ptp(shares))
    if width == 0:
        return Spread(len(shares), 0.0, se, 1.0)
    p = float(stats.studentized_range.sf(width / se, len(shares), np.inf))
    return Spread(len(shares), width, se, p)
