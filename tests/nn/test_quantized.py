"""Matrices in NF4 and int8, against their definitions written out in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from jaxablate.nn import quantized
from jaxablate.nn.quantized import NF4_LEVELS, Int8, Nf4, dynamic_levels

LEVELS = np.asarray(NF4_LEVELS, np.float32)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=0.02, size=shape).astype(np.float32)


def nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return np.abs(x[..., None].astype(np.float64) - levels.astype(np.float64)).argmin(-1)


def defined(weight: np.ndarray) -> dict[str, np.ndarray]:
    """NF4 with double quantisation, step by step as the paper has it."""
    flat = weight.reshape(-1)
    blocks = np.pad(flat, (0, -len(flat) % 64)).reshape(-1, 64)
    absmax = np.abs(blocks).max(1)
    offset = absmax.mean(dtype=np.float64)
    centred = np.pad(absmax - offset, (0, -len(absmax) % 256)).reshape(-1, 256)
    scale = np.abs(centred).max(1)
    codes = nearest(blocks / absmax[:, None], LEVELS)
    seconds = nearest(centred / scale[:, None], dynamic_levels()).reshape(-1)[: len(absmax)]
    magnitudes = dynamic_levels()[seconds] * np.repeat(scale, 256)[: len(absmax)] + offset
    values = (LEVELS[codes] * magnitudes[:, None]).reshape(-1)[: len(flat)].reshape(weight.shape)
    return {"codes": codes, "seconds": seconds, "scale": scale, "offset": offset, "values": values}


def unpacked(stored: Nf4) -> np.ndarray:
    packed = np.asarray(stored.codes)
    return np.stack([packed // 16, packed % 16], -1).reshape(len(packed), -1)


def test_the_levels_are_quantiles_of_the_normal_distribution() -> None:
    """Eight above zero and seven below it, from 1 - (1/32 + 1/30) / 2 to one half, over the largest."""
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    above = norm.ppf(np.linspace(outermost, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    expected = np.sort(np.concatenate([below, [0.0], above]))
    np.testing.assert_allclose(LEVELS, expected / expected.max(), atol=2e-6)
    uniform = np.linspace(-1, 1, 16)
    assert np.abs(LEVELS - uniform).max() > 0.1


def test_the_dynamic_levels_are_256_and_nearly_symmetric() -> None:
    levels = dynamic_levels()
    assert len(np.unique(levels)) == 256
    assert levels[-1] == 1
    np.testing.assert_array_equal(-levels[:127][::-1], levels[128:-1])
    np.testing.assert_allclose(
        levels[128:131], [5.5e-7, 3.25e-6, 7.75e-6], rtol=1e-6
    )  # 10^-6, then two of 10^-5


@pytest.mark.parametrize("shape", [(4, 64), (3, 50), (300, 70)])
def test_nf4_is_its_definition(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    stored = quantized.quantize(jnp.asarray(weight), "nf4")
    wanted = defined(weight)
    assert isinstance(stored, Nf4)
    np.testing.assert_array_equal(unpacked(stored), wanted["codes"])
    np.testing.assert_array_equal(stored.absmax, wanted["seconds"])
    np.testing.assert_allclose(stored.scale, wanted["scale"], rtol=1e-5)
    np.testing.assert_allclose(stored.offset, wanted["offset"], rtol=1e-6)
    values = np.asarray(quantized.dequantize(stored, jnp.float32))
    np.testing.assert_allclose(values, wanted["values"], rtol=1e-5, atol=1e-9)
    assert np.abs(values - weight).max() > 1e-4  # it is not the weight itself that comes back


def test_two_codes_share_a_byte_the_first_one_high() -> None:
    weight = np.tile(LEVELS, 4)[None]
    stored = quantized.quantize(jnp.asarray(weight), "nf4")
    assert np.asarray(stored.codes)[0, :8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    np.testing.assert_array_equal(quantized.dequantize(stored, jnp.float32), weight)  # one block: exact


@settings(max_examples=12)
@given(st.integers(0, 10**6), st.sampled_from([1e-6, 0.02, 1e3]))
def test_errors_stay_within_half_a_gap(seed: int, size: float) -> None:
    weight = (size * np.random.default_rng(seed).standard_t(3, size=(40, 64))).astype(np.float32)
    absmax = np.abs(weight).max(1, keepdims=True)
    second = np.abs(absmax - absmax.mean()).max() * np.diff(dynamic_levels()).max() / 2
    bounds = {"nf4": absmax * np.diff(LEVELS).max() / 2 + second, "int8": absmax / 254}
    error = {
        kind: np.abs(
            quantized.dequantize(quantized.quantize(jnp.asarray(weight), kind), jnp.float32) - weight
        )
        for kind in ("nf4", "int8")
    }
    for kind, bound in bounds.items():
        assert (error[kind] <= 1.0001 * bound).all()
    assert (error["nf4"] > bounds["int8"]).any()  # which the coarser of the two does break


def test_int8_is_its_definition() -> None:
    weight = normal(5, 100)
    blocks = np.pad(weight.reshape(-1), (0, 12)).reshape(-1, 64)
    scale = np.abs(blocks).max(1) / 127
    stored = quantized.quantize(jnp.asarray(weight), "int8")
    assert isinstance(stored, Int8)
    np.testing.assert_array_equal(stored.codes, np.rint(blocks / scale[:, None]))
    np.testing.assert_allclose(stored.scale, scale, rtol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_zeros_and_constants_come_back(kind: quantized.Kind) -> None:
    weight = np.zeros((4, 64), np.float32)
    weight[1:] = 0.5
    back = quantized.dequantize(quantized.quantize(jnp.asarray(weight), kind), jnp.float32)
    np.testing.assert_allclose(back, weight, atol=1e-6 if kind == "int8" else 0.004)


def test_bits_a_weight() -> None:
    shape = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    bits = {
        k: quantized.bits(jax.eval_shape(lambda w, k=k: quantized.quantize(w, k), shape))
        for k in ("nf4", "int8")
    }
    assert bits["nf4"] == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-5)
    assert bits["nf4"] == pytest.approx(4.127, abs=1e-3)
    assert bits["int8"] == pytest.approx(8.5)


def test_bf16_inside_jit_is_float32_rounded_once() -> None:
    stored = quantized.quantize(jnp.asarray(normal(8, 64)), "nf4")
    low = jax.jit(quantized.dequantize, static_argnums=1)(stored, jnp.bfloat16)
    full = jax.jit(quantized.dequantize, static_argnums=1)(stored, jnp.float32)
    np.testing.assert_array_equal(low, full.astype(jnp.bfloat16))


def kept_floats(f, x: jax.Array) -> list[tuple[int, ...]]:
    """Shapes of the real arrays that the backward pass of `f` holds on to."""
    _, pull = jax.vjp(f, x)
    return [leaf.shape for leaf in jax.tree.leaves(pull) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def test_a_product_keeps_no_unpacked_matrix_for_its_gradient() -> None:
    x, stored = jnp.asarray(normal(5, 8, 16)), quantized.quantize(jnp.asarray(normal(32, 128)), "nf4")
    matrix = quantized.dequantize(stored, jnp.float32)
    frozen = lambda x: quantized.product(x, stored, (8, 16), (4, 8))
    plain = lambda x: jnp.tensordot(
        x, quantized.dequantize(stored, jnp.float32).reshape(4, 8, 8, 16), ((1, 2), (2, 3))
    )
    np.testing.assert_allclose(frozen(x), (x.reshape(5, 128) @ matrix.T).reshape(5, 4, 8), atol=1e-6)
    gradients = [jax.grad(lambda x, f=f: jnp.sin(f(x)).sum())(x) for f in (frozen, plain)]
    np.testing.assert_allclose(*gradients, atol=1e-6)
    sizes = [max((int(np.prod(s)) for s in kept_floats(f, x)), default=0) for f in (frozen, plain)]
    assert sizes[0] < 32 * 128 == sizes[1]


def test_kernels_of_stacked_layers_are_stored_one_by_one() -> None:
    """In the layout of Flax: (layers, inputs…, outputs…); each layer as if it were alone."""
    kernels = jnp.asarray(normal(2, 64, 3, 8))
    like = jax.eval_shape(
        jax.vmap(lambda w: quantized.quantize(w, "nf4")), jax.ShapeDtypeStruct((2, 24, 64), jnp.float32)
    )
    params = {"q": {"kernel": kernels, "bias": jnp.zeros(24)}}
    rest, stored = quantized.quantize_params(params, {"q": {"kernel": like}})
    assert list(rest["q"]) == ["bias"]
    alone = quantized.quantize(kernels[1].reshape(64, 24).T, "nf4")
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[1], stored["q"]["kernel"]), alone)
    with pytest.raises(ValueError, match="no stack"):
        quantized.quantize_like(kernels[:, :32], like)


def test_bitsandbytes_stores_the_same() -> None:
    """Optional: needs torch and bitsandbytes. A weight between two levels may be rounded the other way."""
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = normal(300, 128)
    packed, state = functional.quantize_4bit(
        torch.from_numpy(weight), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    stored = quantized.quantize(jnp.asarray(weight), "nf4")
    assert (np.asarray(stored.codes).reshape(-1) == packed.numpy().reshape(-1)).mean() > 0.999
    assert (np.asarray(stored.absmax) == state.absmax.numpy()).mean() > 0.99
    np.testing.assert_allclose(state.state2.code, dynamic_levels(), rtol=2e-7)  # a last bit
    np.testing.assert_allclose(stored.offset, state.offset.numpy(), rtol=1e-6)
    theirs = functional.dequantize_4bit(packed, state).numpy()
    ours = np.asarray(quantized.dequantize(stored, jnp.float32))
    assert np.isclose(ours, theirs, rtol=1e-5, atol=1e-8).mean() > 0.99
