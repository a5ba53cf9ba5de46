"""The surrogate: sizes, worked-out numbers of its parts, and what each of them may look at."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate.nn.attention import Attention
from jaxablate.nn.channel_attention import ChannelSeparatedAttention
from jaxablate.nn.drop_path import DropPath, depth_rates
from jaxablate.nn.resample import halve, interpolate, pool
from jaxablate.studies.burgers.config import BurgersModel, CoreConfig, EncoderConfig
from jaxablate.studies.burgers.model import Surrogate
from jaxablate.trees import count

SEPARATED: dict[str, Any] = {"attention": "channel_separated"}
TINY = BurgersModel(
    encoder=EncoderConfig(tokens=32, dim=16, stem=8),
    core=CoreConfig(hidden=32, depth=2, depths=(1, 1), heads=4, group=8, drop_path=0.5),
)
CELLS = 128


def parameters(model: BurgersModel, cells: int) -> dict[str, int]:
    """How many each part has."""

    def init() -> Any:
        one = jnp.ones(1)
        return Surrogate(model, cells).init(jax.random.key(0), jnp.zeros((1, cells)), one, one)

    return {name: count(part) for name, part in jax.eval_shape(init)["params"].items()}


@pytest.mark.parametrize(
    ("dim", "tokens", "core", "expected"),
    [
        (64, 128, {}, 3_593_216),
        (192, 256, {"hidden": 384}, 14_420_416),
        (64, 128, SEPARATED, 2_426_496),
        (128, 128, {"kind": "pdet_unet", "hidden": 256, "heads": 8, "group": 32, **SEPARATED}, 4_118_272),
        (
            256,
            256,
            {"kind": "pdet_unet", "hidden": 512, "heads": 8, "group": 32, "depths": (3, 3, 3), **SEPARATED},
            17_293_888,
        ),
        (128, 128, {"hidden": 256, "heads": 8}, 6_418_560),
        (128, 128, {"hidden": 256, "heads": 8, "group": 32, **SEPARATED}, 4_347_008),
        (16, 32, {"hidden": 32, "depth": 2, "heads": 4}, 27_184),
        (16, 32, {"hidden": 32, "depth": 2, "heads": 4, "group": 8, **SEPARATED}, 19_312),
        (
            16,
            32,
            {"kind": "pdet_unet", "hidden": 32, "depths": (1, 1), "heads": 4, "group": 8, **SEPARATED},
            17_728,
        ),
    ],
)
def test_operators_have_the_published_sizes(
    dim: int, tokens: int, core: dict[str, Any], expected: int
) -> None:
    model = BurgersModel(
        encoder=EncoderConfig(tokens=tokens, dim=dim, cells="pooled"),
        core=CoreConfig(**core),
        conditioned_on="dt",
    )
    assert parameters(model, 1024)["operator"] == expected
    told_more = dataclasses.replace(model, conditioned_on="dt_and_viscosity")
    assert parameters(told_more, 1024)["operator"] == expected + dim


@pytest.mark.parametrize(("dim", "hidden", "expected"), [(64, 192, 62_080), (192, 384, 296_256)])
def test_the_corrector_has_the_published_size(dim: int, hidden: int, expected: int) -> None:
    model = BurgersModel(encoder=EncoderConfig(dim=dim, cells="pooled"), core=CoreConfig(hidden=hidden))
    sizes = parameters(model, 1024)
    assert sizes["corrector"] == expected
    assert sizes["encoder"] == 353 + 9 * dim + dim  # the stem, and a projection of nine features


# ------------------------------------------------------------------------------- parts by their numbers

X = jnp.array([[[1.0, 2, 0, -1], [3, -1, 2, 2]]])


def test_channel_separated_attention_runs_the_same_small_matrices_in_each_group() -> None:
    eye = jnp.eye(2)
    params: Any = {name: {"kernel": eye.reshape(2, 1, 2), "bias": jnp.zeros((1, 2))} for name in "qkv"}
    params |= {"out": {"kernel": eye.reshape(1, 2, 2), "bias": jnp.zeros(2)}}
    params |= {name: {"scale": jnp.ones(2)} for name in ("q_norm", "k_norm")}
    found = ChannelSeparatedAttention(1, 2).apply({"params": params}, X)
    expected = [[1.457913, 1.313131, 0.164191, -0.753713], [2.542087, -0.313131, 1.835809, 1.753714]]
    np.testing.assert_allclose(np.asarray(found)[0], expected, rtol=1e-5)


def test_standard_attention_mixes_all_channels() -> None:
    eye = jnp.eye(4)
    params: Any = {name: {"kernel": eye.reshape(4, 1, 4)} for name in "qkv"}
    params |= {"out": {"kernel": eye.reshape(1, 4, 4)}, "q_scale": jnp.ones(4), "k_scale": jnp.ones(4)}
    found = Attention(1, 4, "reference", qk_norm="rms").apply({"params": params}, X)
    expected = [[1.200861, 1.698708, 0.200861, -0.698708], [2.799139, -0.698708, 1.799139, 1.698708]]
    np.testing.assert_allclose(np.asarray(found)[0], expected, rtol=1e-5)


def test_groups_do_not_meet_in_the_attention() -> None:
    attention = ChannelSeparatedAttention(2, 4)
    x = jax.random.normal(jax.random.key(1), (2, 5, 12))
    variables = attention.init(jax.random.key(0), x)
    other = x.at[:, :, 4:8].add(1.0)
    change = np.abs(np.asarray(attention.apply(variables, x)) - np.asarray(attention.apply(variables, other)))
    assert change[..., :4].max() == change[..., 8:].max() == 0
    assert change[..., 4:8].max() > 0.1
    whole = Attention(2, 6, "reference")
    variables = whole.init(jax.random.key(0), x)
    change = np.abs(np.asarray(whole.apply(variables, x)) - np.asarray(whole.apply(variables, other)))
    assert change[..., :4].max() > 1e-3


@pytest.mark.parametrize(("dim", "heads", "group"), [(12, 2, 5), (12, 3, 4)])
def test_groups_that_do_not_divide_are_refused(dim: int, heads: int, group: int) -> None:
    with pytest.raises(ValueError, match="must divide"):
        ChannelSeparatedAttention(heads, group).init(jax.random.key(0), jnp.zeros((1, 3, dim)))


def test_tokens_are_halved_interpolated_and_pooled() -> None:
    tokens = jnp.array([1.0, 3, 5, 7, 11]).reshape(1, 5, 1)
    assert halve(tokens).ravel().tolist() == [2, 6, 11]
    np.testing.assert_allclose(np.ravel(interpolate(halve(tokens), 5)), [2, 3.6, 6, 9, 11], rtol=1e-6)
    assert pool(jnp.arange(10.0).reshape(1, 10, 1), 4).ravel().tolist() == [1, 3, 6, 8]
    assert pool(jnp.arange(8.0).reshape(1, 8, 1), 4).ravel().tolist() == [0.5, 2.5, 4.5, 6.5]


def test_drop_path_leaves_out_some_examples_and_keeps_the_mean() -> None:
    np.testing.assert_allclose(depth_rates(0.1, 8), [0.014286 * i for i in range(8)], rtol=1e-4)
    x = jnp.ones((4000, 3))
    keys = jax.random.split(jax.random.key(0), 4000)

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return DropPath(0.25, name="a")(x, keys), DropPath(0.25, name="b")(x, keys)

    a, b = (np.asarray(y) for y in Two().apply({}, x))
    assert set(np.unique(a).round(5)) == {0.0, np.float32(4 / 3).round(5)}
    assert (a == a[:, :1]).all()  # an example is in or out as a whole
    assert abs(a.mean() - 1) < 0.04
    assert (a != b).any()  # another place, another choice
    assert (np.asarray(DropPath(0.25).apply({}, x, None)) == 1).all()


# ------------------------------------------------------------------------------------------ the whole


def started(model: BurgersModel) -> tuple[Surrogate, Any]:
    surrogate, one = Surrogate(model, CELLS), jnp.ones(1)
    return surrogate, nn.unbox(surrogate.init(jax.random.key(0), jnp.zeros((1, CELLS)), one, one))


@pytest.mark.parametrize("kind", ["pdet_stack", "pdet_unet"])
@pytest.mark.parametrize("attention", ["standard", "channel_separated"])
def test_a_step_depends_on_its_length_and_on_the_viscosity(kind: Any, attention: Any) -> None:
    core = dataclasses.replace(TINY.core, kind=kind, attention=attention)
    surrogate, variables = started(dataclasses.replace(TINY, core=core))
    z = jax.random.normal(jax.random.key(2), (3, 32, 16))

    def step(dt: float, viscosity: float) -> np.ndarray:
        return np.asarray(
            surrogate.apply(variables, z, jnp.full(3, dt), jnp.full(3, viscosity), method="step")
        )

    same = step(0.1, 0.01)
    assert np.abs(step(0.2, 0.01) - same).max() > 1e-4
    assert np.abs(step(0.1, 0.1) - same).max() > 1e-4
    blind, variables = started(dataclasses.replace(TINY, core=core, conditioned_on="dt"))
    told = [blind.apply(variables, z, jnp.full(3, 0.1), jnp.full(3, nu), method="step") for nu in (0.01, 0.1)]
    assert (np.asarray(told[0]) == np.asarray(told[1])).all()


def test_a_gain_of_zero_makes_the_first_step_do_nothing() -> None:
    surrogate, variables = started(dataclasses.replace(TINY, residual_gain="zero"))
    z, one = jax.random.normal(jax.random.key(2), (3, 32, 16)), jnp.ones(3)
    assert (np.asarray(surrogate.apply(variables, z, one, one, method="step")) == np.asarray(z)).all()
    surrogate, variables = started(TINY)
    moved = np.asarray(surrogate.apply(variables, z, one, one, method="step")) - np.asarray(z)
    np.testing.assert_allclose(moved.std(axis=-1), 1.0, rtol=1e-2)


@pytest.mark.parametrize("cells", ["patch", "pooled"])
def test_a_token_is_of_its_own_cells(cells: Any) -> None:
    model = dataclasses.replace(TINY, encoder=dataclasses.replace(TINY.encoder, cells=cells))
    surrogate, variables = started(model)
    u = jax.random.normal(jax.random.key(3), (2, CELLS))
    change = np.abs(
        np.asarray(surrogate.apply(variables, u, method="encode"))
        - np.asarray(surrogate.apply(variables, u.at[:, 41].add(1.0), method="encode"))
    ).max(axis=(0, 2))
    assert change[10] > 1e-3  # cell 41 lies in token 10; the stem starts as the identity
    assert np.delete(change, 10).max() == 0
