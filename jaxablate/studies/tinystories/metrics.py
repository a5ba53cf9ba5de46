"""Scores of a language model from the loss of every target token (specification §5), in float64 on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

OTHER, COPY, RECALL = 0, 1, 2  # kinds of a character, or of a target token, of generated stories
KINDS = {"copy": COPY, "recall": RECALL, "other": OTHER}
LOWER_IS_BETTER = ("loss", "perplexity", *(f"{kind}_loss" for kind in KINDS))


def mean_loss(nll: Sequence[NDArray[np.floating]]) -> float:
    """Mean over the batches of each batch's mean, in nats a token; `nll` are (B, context)."""
    return float(np.mean([np.mean(batch, dtype=np.float64) for batch in nll]))


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is beyond a float64."""
    with np.errstate(over="ignore"):
        return float(np.exp(loss))


def loss_by_kind(
    nll: Sequence[NDArray[np.floating]], kinds: Sequence[NDArray[np.uint8]]
) -> Mapping[str, float]:
    """`copy_loss`, `recall_loss` and `other_loss`: means over all target tokens of a kind.

    Args:
      nll: per batch (B, context).
      kinds: per batch (B, context), numbers of `KINDS`.

    A kind that no target is of has no loss, and no entry.
    """
    all_nll = np.concatenate([np.ravel(batch) for batch in nll]).astype(np.float64)
    all_kinds = np.concatenate([np.ravel(batch) for batch in kinds])
    return {
        f"{kind}_loss": float(np.mean(all_nll[all_kinds == number]))
        for kind, number in KINDS.items()
        if np.any(all_kinds == number)
    }


def unigram_nll(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """-ln p of each id, (V,), where p is the add-one smoothed share of `counts`, (V,)."""
    return np.log(counts.sum() + len(counts)) - np.log1p(counts)
