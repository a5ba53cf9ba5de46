"""The classifier: the document's parameter counts, batch norm and dropout as torch defines them, per example."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate.studies.lora_space.config import LoraSpaceModel
from jaxablate.studies.lora_space.model import Classifier, Dropout
from jaxablate.trees import count

SMALL = LoraSpaceModel(hidden=8)


def made(model: Classifier, dim: int, seed: int = 0):
    return nn.unbox(model.init(jax.random.key(seed), jnp.zeros((1, dim)), None))


def keys(count: int, seed: int = 1) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize(
    ("dim", "parameters"), [(640, 861_706), (4096, 2_631_178), (8576, 4_924_938), (99_648, 51_553_802)]
)
def test_it_has_as_many_parameters_as_the_document_says(dim: int, parameters: int) -> None:
    model = Classifier(LoraSpaceModel(), classes=10)
    shapes = jax.eval_shape(lambda: made(model, dim))
    assert count(shapes["params"]) == parameters
    # A layer more or a norm less would show.
    assert (
        count(jax.eval_shape(lambda: made(Classifier(LoraSpaceModel(layers=2), 10), dim))["params"])
        < parameters
    )


def by_hand(variables, x: jax.Array, moments=None) -> np.ndarray:
    """Logits without dropout: Linear, BatchNorm, ReLU in float64, by the batch's own moments if none are given."""
    params = jax.tree.map(lambda v: np.asarray(v, np.float64), variables["params"])
    h = np.asarray(x).astype(np.float64)
    for i in range(3):
        h = h @ params[f"linear_{i}"]["kernel"] + params[f"linear_{i}"]["bias"]
        own = (
            jax.tree.map(np.asarray, moments[f"norm_{i}"])
            if moments
            else {"mean": h.mean(0), "var": h.var(0)}
        )
        h = (h - own["mean"]) / np.sqrt(np.asarray(own["var"]) + 1e-5)
        h = np.maximum(h * params[f"norm_{i}"]["scale"] + params[f"norm_{i}"]["bias"], 0)
    return h @ params["head"]["kernel"] + params["head"]["bias"]


def test_it_is_what_it_is_by_hand_in_training_and_in_evaluation() -> None:
    model = Classifier(LoraSpaceModel(hidden=8, dropout=0.0), classes=4)
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (32, 6)), jnp.float32)
    variables = made(model, 6)
    logits, new = model.apply(variables, x, keys(32), mutable=["batch_stats"])
    np.testing.assert_allclose(logits, by_hand(variables, x), rtol=1e-4, atol=1e-5)
    moments = new["batch_stats"]
    layer = jax.tree.map(np.asarray, variables["params"]["linear_0"])
    first = np.asarray(x) @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(moments["norm_0"]["mean"], first.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments["norm_0"]["var"], first.var(0), rtol=1e-4)
    evaluated = model.apply({**variables, "batch_stats": moments}, x[:5], None)
    np.testing.assert_allclose(evaluated, by_hand(variables, x[:5], moments), rtol=1e-4, atol=1e-5)
    # In evaluation no example looks at its neighbours; in training they do.
    alone = model.apply({**variables, "batch_stats": moments}, x[:1], None)
    np.testing.assert_allclose(alone[0], evaluated[0], rtol=1e-5, atol=1e-6)
    half, _ = model.apply(variables, x[:16], keys(16), mutable=["batch_stats"])
    assert not np.allclose(half, logits[:16], atol=1e-3)


def test_dropout_is_of_the_example_and_keeps_the_mean() -> None:
    x, own = jnp.ones((2000, 16)), keys(2000)
    dropped = Dropout(0.3).apply({}, x, own)
    np.testing.assert_allclose(np.unique(np.asarray(dropped)), [0, 1 / 0.7], rtol=1e-6)
    assert abs(float(jnp.mean(dropped)) - 1) < 4 * np.sqrt(0.3 / 0.7 / dropped.size)
    np.testing.assert_array_equal(Dropout(0.3).apply({}, x[5:9], own[5:9]), dropped[5:9])
    assert not np.array_equal(Dropout(0.3).apply({}, x, keys(2000, seed=2)), dropped)
    np.testing.assert_array_equal(Dropout(0.3).apply({}, x, None), x)


def test_two_widths_of_features_share_the_start_of_all_other_layers() -> None:
    """So runs of one seed are a pair, whatever the representation."""
    narrow, wide = (made(Classifier(SMALL, 4), dim)["params"] for dim in (6, 30))
    for layer in ("linear_1", "linear_2", "head"):
        np.testing.assert_array_equal(narrow[layer]["kernel"], wide[layer]["kernel"])
    assert not np.array_equal(
        narrow["linear_1"]["kernel"], made(Classifier(SMALL, 4), 6, seed=1)["params"]["linear_1"]["kernel"]
    )
    bound = 30**-0.5
    kernel = np.asarray(wide["linear_0"]["kernel"])
    assert bound * 0.9 < np.abs(kernel).max() <= bound
