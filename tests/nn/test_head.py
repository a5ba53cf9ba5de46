"""The vocabulary head: its loss is that of its logits, whatever the kernel, and on several devices."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxablate.nn.head import VocabularyHead
from jaxablate.nn.layout import laid_out_on
from jaxablate.sharding import AXES
from jaxablate_kernels import implementations, kernels_in

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 6, 8))
TARGETS = jax.random.randint(KEY, (4, 6), 0, 50).at[0, 0].set(-100)


def head(impl: str = "reference") -> VocabularyHead:
    return VocabularyHead(8, 50, impl=impl, z_loss=0.01, softcap=5.0)


VARIABLES = head().init(KEY, X)


def value_and_gradient(impl: str):
    def total(variables, x):
        nll, z = head(impl).apply(variables, x, TARGETS, method="losses")
        return (nll + z).sum(), nll

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(VARIABLES, X)


def test_the_loss_is_that_of_the_logits() -> None:
    logits = head().apply(VARIABLES, X)
    assert np.abs(logits).max() < 5.0
    expected = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), np.maximum(TARGETS, 0)[..., None], axis=-1
    )[..., 0]
    expected[0, 0] = 0.0  # ignored
    (_, nll), _ = value_and_gradient("reference")
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(np.roll(expected, 1) - nll).max() > 0.1  # the control: targets shifted by one


@pytest.mark.parametrize("impl", [n for n in implementations("cross_entropy") if n != "reference"])
def test_kernel_choice_does_not_change_the_function(impl: str) -> None:
    (mine, _), gradients = value_and_gradient(impl)
    (reference, _), expected = value_and_gradient("reference")
    np.testing.assert_allclose(mine, reference, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    losses = lambda variables: head(impl).apply(variables, X, TARGETS, method="losses")
    assert kernels_in(jax.make_jaxpr(losses)(VARIABLES)) == {f"cross_entropy_{impl}"}


@pytest.mark.alone
@pytest.mark.parametrize("impl", implementations("cross_entropy"))
def test_each_device_takes_its_own_examples(impl: str) -> None:
    whole = value_and_gradient(impl)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 2, 2, 1), AXES)
    with laid_out_on(mesh):
        split = value_and_gradient(impl)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert whole[0][0] > 1.0  # there is something to compare
