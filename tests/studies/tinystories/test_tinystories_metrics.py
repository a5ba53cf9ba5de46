"""Scores of language models: the specification's golden values, and what each number is a mean of."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate.studies.tinystories import metrics
from jaxablate_kernels.cross_entropy import linear_cross_entropy

LOGITS = [[2.0, 1.0, 0.0], [0.0, 0.0, 5.0], [1000.0, 0.0, -1000.0]]
TARGETS = [0, 1, 0]


def golden_nll(logits: list[list[float]]) -> np.ndarray:
    """(1, 3): the losses as the model has them, behind a head that changes nothing."""
    found = linear_cross_entropy(
        jnp.array(logits), jnp.eye(3, dtype=jnp.float32), jnp.array(TARGETS, jnp.int32), impl="reference"
    )
    return np.asarray(found.nll)[None]


def test_golden_losses_and_perplexity():
    nll = golden_nll(LOGITS)
    assert nll[0] == pytest.approx([0.40760596, 5.01338590, 0.0], rel=1e-5, abs=1e-7)
    loss = metrics.mean_loss([nll])
    assert loss == pytest.approx(1.80699729, rel=1e-5)
    assert metrics.perplexity(loss) == pytest.approx(6.09212704, rel=1e-5)


def test_other_logits_have_other_losses():
    assert metrics.mean_loss([golden_nll(LOGITS[1:] + LOGITS[:1])]) != pytest.approx(1.80699729, rel=1e-2)


def test_the_loss_is_the_mean_of_the_batches_means():
    batches = [np.full((4, 8), 1.0, np.float32), np.full((1, 8), 3.0, np.float32)]
    assert metrics.mean_loss(batches) == 2.0
    assert np.mean(np.concatenate(batches)) != pytest.approx(2.0)


def test_perplexity_is_of_the_mean_loss_and_may_be_infinite():
    assert metrics.perplexity(0.0) == 1.0
    assert metrics.perplexity(math.log(512)) == pytest.approx(512)
    assert metrics.perplexity(1000.0) == math.inf
    assert math.isnan(metrics.perplexity(math.nan))


def test_each_kind_has_the_mean_of_its_own_tokens():
    nll = [np.array([[1.0, 2.0, 6.0]]), np.array([[4.0, 8.0, 3.0]])]
    kinds = [np.array([[0, 1, 0]], np.uint8), np.array([[1, 2, 0]], np.uint8)]
    assert metrics.loss_by_kind(nll, kinds) == {
        "copy_loss": 3.0,
        "recall_loss": 8.0,
        "other_loss": pytest.approx(10 / 3),
    }
    swapped = [(kind + 1) % 3 for kind in kinds]
    assert metrics.loss_by_kind(nll, swapped)["recall_loss"] == 3.0


def test_a_kind_without_tokens_has_no_loss():
    nll, kinds = [np.ones((2, 3))], [np.zeros((2, 3), np.uint8)]
    assert metrics.loss_by_kind(nll, kinds) == {"other_loss": 1.0}


def test_the_unigram_distribution_is_smoothed_and_sums_to_one():
    nll = metrics.unigram_nll(np.array([6, 1, 0]))
    assert nll == pytest.approx([-math.log(7 / 10), -math.log(2 / 10), -math.log(1 / 10)])
    assert np.exp(-nll).sum() == pytest.approx(1.0)


def test_every_score_is_lower_is_better():
    assert set(metrics.LOWER_IS_BETTER) == {"loss", "perplexity", "copy_loss", "recall_loss", "other_loss"}
