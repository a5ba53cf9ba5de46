"""Features against the document's numbers and against float64 numpy, by other routes than the code takes."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from jaxablate.errors import UserError
from jaxablate.studies.lora_space.config import REPRESENTATIONS
from jaxablate.studies.lora_space.data.names import unet_shapes
from jaxablate.studies.lora_space.features import feature_dim, features

DOWN, UP = "net.attn1.to_q.lora.down.weight", "net.attn1.to_q.lora.up.weight"
OF_TENSOR = [name for name in REPRESENTATIONS if name != "product"]
EPS = 1e-8

# ------------------------------------------------------------------------------- the document's numbers

A = [0.5, -1, 2, 0.25, -0.75, 1.5, 0, -0.25, 1, -2, 0.75, 0.125]
QUANTILES = [-1.45, -0.975, -0.375, 0.1875, 0.8125, 1.45, 1.725]
GOLDEN = {
    "simple_stats": [3.710206, 0.1770833, 1.103273, 2, -2],
    "rank_based": [-1.89, *QUANTILES, 1.945, 1.1875, 3.835],
    "stats": [0.1770833, 1.103273, 0.125, -2, 2, -0.2282198, 2.240812],
    "spectral": [3.710206, *[0] * 9, 1, *[0] * 9, 1, *[0] * 8, -7.3e-9, 3.710206e8, 3.710206],
    "matrix_norms": [3.710206, 3.710206, 3.710206, 2, 10.125, 1, 1],
    "distribution": [*QUANTILES, 1.1875, 0.8229167, 6.230247, -0.2282198, 2.240812],
    "frequency": [
        *(5.875, 5.875, 4.875, 4.675829, 4.675829, 2.576941, 2.576941, 2.131401, 2.131401, 2.125),
        *(3.283817, 1.726897, 5.875, 0.9892168),
    ],
    "info_theoretic": [2.484907, 0.6351973],
    "flat_vec": A,
}


def described(values, shape, representation: str, variant="original", dtype=np.float64) -> np.ndarray:
    with jax.enable_x64(dtype is np.float64):
        x = np.asarray(values, dtype).reshape(1, *shape)
        return features({DOWN: x}, [representation], variant=variant)[representation][0]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("representation", GOLDEN)
def test_the_documents_vector(representation, dtype):
    found = described(A, (1, 12), representation, dtype=dtype)
    assert found.dtype == dtype
    expected = GOLDEN[representation]
    tolerance = 0.01 * 7.3e-9 if representation == "spectral" else 1e-12  # -7.3e-9 has two digits
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=tolerance)


def test_what_depends_on_the_direction_and_the_variant():
    np.testing.assert_allclose(described(A, (12, 1), "matrix_norms")[3:5], [10.125, 2])
    assert described(A, (1, 12), "spectral", "optimized")[30] == pytest.approx(1)
    assert described(A, (3, 4), "spectral", "optimized")[30] == pytest.approx(3.382631 / 0.1566822, rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_documents_matrix(dtype):
    spectral = described(A, (3, 4), "spectral", dtype=dtype)
    np.testing.assert_allclose(spectral[:4], [3.382631, 1.516207, 0.1566822, 0], rtol=1e-5)
    np.testing.assert_allclose(spectral[[29, 31]], [0.7377025, 5.055520], rtol=1e-5)
    norms = described(A, (3, 4), "matrix_norms", dtype=dtype)
    np.testing.assert_allclose(
        norms, [3.710206, 5.055520, 3.382631, 4.5, 3.875, 1.362598, 0.9117099], rtol=1e-5
    )
    frequency = described(A, (3, 4), "frequency", dtype=dtype)
    np.testing.assert_allclose(frequency[:5], [5.447190, 5.447190, 4.993301, 4.993301, 4.875], rtol=1e-5)
    np.testing.assert_allclose(frequency[[10, 11, 13]], [3.381003, 1.527888, 0.9668937], rtol=1e-5)


# ---------------------------------------------------------------------------------------- an oracle


def moments(a):
    a = a.ravel()
    mean, std = a.mean(), a.std(ddof=1)
    z = (a - mean) / (std + EPS)
    return mean, std, (z**3).mean(), (z**4).mean()


def of_spectrum(s, variant):
    kept = s[:10]
    top = np.concatenate([kept, np.zeros(10 - len(kept))])
    p = top / (top.sum() + EPS)
    gaps = (top[:-1] - top[1:]) / (top[:-1] + EPS)
    last = top[9] if variant == "original" else kept[-1]
    return [*top, *p, *gaps, -np.sum(p * np.log(p + EPS)), top[0] / (last + EPS), top.sum()]


def distribution(a):
    mean, std, skew, kurtosis = moments(a)
    q = np.quantile(a, [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95])
    return [*q, q[4] - q[2], np.abs(a - mean).mean(), std / (abs(mean) + EPS), skew, kurtosis]


def norms(a):
    frobenius, nuclear, largest = (np.linalg.norm(a, kind) for kind in ("fro", "nuc", 2))
    ratios = nuclear / (frobenius + EPS), largest / (frobenius + EPS)
    return [frobenius, nuclear, largest, np.linalg.norm(a, 1), np.linalg.norm(a, np.inf), *ratios]


def frequency(a):
    size = np.sort(np.abs(np.fft.fft2(a)).ravel())[::-1]
    top = np.concatenate([size, np.zeros(10)])[:10]
    return [*top, size.mean(), size.std(), size[0], (size[:10] ** 2).sum() / ((size**2).sum() + EPS)]


def information(a):
    h = np.histogram(a, 50)[0] / (a.size + EPS)
    entropy = -np.sum(h * np.log(h + EPS))
    return [entropy, entropy / math.log(50)]


def oracle(a, representation, variant):
    """Float64 features of one matrix."""
    a = a.astype(np.float64)
    mean, std, skew, kurtosis = moments(a)
    spectral = of_spectrum(np.linalg.svd(a, compute_uv=False), variant)
    q = np.quantile(a, [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99])
    lower = np.sort(a.ravel())[(a.size - 1) // 2]
    return {
        "simple_stats": [np.linalg.norm(a), mean, std, a.max(), a.min()],
        "rank_based": [*q, q[5] - q[3], q[8] - q[0]],
        "stats": [mean, std, lower, a.min(), a.max(), skew, kurtosis],
        "spectral": spectral,
        "matrix_norms": norms(a),
        "distribution": distribution(a),
        "frequency": frequency(a),
        "info_theoretic": information(a),
        "ensemble": [*spectral, *norms(a), *distribution(a), *frequency(a), *information(a)],
        "flat_vec": a.ravel(),
    }[representation]


def away_from_edges(rng, shape, bins=50):
    """Normal values of which none is so close to an edge of the histogram that rounding decides its bin."""
    x = rng.standard_normal(shape).astype(np.float32)
    for one in x:
        inner = np.sort(one.ravel())[1:-1]
        low, high = float(one.min()), float(one.max())
        place = (inner.astype(np.float64) - low) / (high - low) * bins
        near = np.abs(place - np.round(place)) < 1e-4
        shift = {float(v): np.float32(v + 0.01 * (high - low) / bins) for v in inner[near]}
        for old, new in shift.items():
            one[one == np.float32(old)] = new
    return x


# Both ways round, ranks 1, 4 and 8, more than ten singular values, odd sizes, fewer values than are kept, a vector.
SHAPES = [(1, 37), (40, 1), (4, 48), (33, 4), (8, 25), (12, 17), (3, 3), (2, 1), (19,)]
# Single precision's share of what a feature is made of: a difference of large values has more of it.
SLACK = {"spectral": 2e-6, "matrix_norms": 1e-6, "ensemble": 1e-5, "stats": 1e-5, "distribution": 1e-5}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_representations_are_those_of_the_oracle(shape):
    x = away_from_edges(np.random.default_rng(7), (3, *shape))
    found = features({DOWN: x}, OF_TENSOR, variant="original", workers=2)
    for name, rows in found.items():
        assert rows.dtype == np.float32
        for row, one in zip(rows, x, strict=True):
            matrix = one.reshape(1, -1) if one.ndim == 1 else one
            expected = np.array(oracle(matrix, name, "original"))
            assert row.shape == expected.shape
            slack = SLACK.get(name, 1e-6)
            np.testing.assert_allclose(row, expected, rtol=3e-5, atol=slack, err_msg=f"{name} {shape}")


def test_the_oracle_would_notice_another_convention():
    """Negative control: the biased deviation, the upper median and the unsquared share are reported."""
    x = np.random.default_rng(0).standard_normal((1, 1, 36)).astype(np.float32)
    expected = {
        name: np.array(oracle(x[0], name, "original")) for name in ("simple_stats", "stats", "frequency")
    }
    expected["simple_stats"][2] = x.std()
    expected["stats"][2] = np.sort(x.ravel())[18]
    size = np.sort(np.abs(np.fft.fft2(x[0])).ravel())[::-1]
    expected["frequency"][13] = size[:10].sum() / size.sum()
    found = features({DOWN: x}, list(expected))
    for name, wrong in expected.items():
        assert not np.allclose(found[name][0], wrong, rtol=3e-5, atol=1e-5), name


@pytest.mark.parametrize("rank", [1, 4, 8, 12])
def test_the_product_is_that_of_the_formed_update(rank):
    rng = np.random.default_rng(rank)
    down = rng.standard_normal((3, rank, 14)).astype(np.float32)
    up = (0.02 * rng.standard_normal((3, 11, rank))).astype(np.float32)
    found = features({DOWN: down, UP: up}, ["product"], variant="optimized")["product"]
    for row, d, u in zip(found, down.astype(np.float64), up.astype(np.float64), strict=True):
        w = u @ d
        s = np.linalg.svd(w, compute_uv=False)[: min(rank, 14, 11)]
        rest = [w.mean(), w.std(ddof=1), np.linalg.norm(w, axis=1).max(), np.linalg.norm(w, axis=0).max()]
        np.testing.assert_allclose(row, [*of_spectrum(s, "optimized"), *rest], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 4])
def test_the_product_does_not_see_how_the_update_is_factored(rank):
    rng = np.random.default_rng(3)
    down, up = rng.standard_normal((2, rank, 20)), rng.standard_normal((2, 30, rank))
    mixing = rng.standard_normal((rank, rank)) + 2 * np.eye(rank)
    with jax.enable_x64(True):
        before = features({DOWN: down, UP: up}, ["product", "spectral"])
        after = features({DOWN: mixing @ down, UP: up @ np.linalg.inv(mixing)}, ["product", "spectral"])
    np.testing.assert_allclose(after["product"], before["product"], rtol=1e-9, atol=1e-9)
    assert not np.allclose(after["spectral"], before["spectral"], rtol=1e-2)  # negative control


def test_double_precision_is_not_lost_silently():
    x = np.ones((1, 1, 8))
    with pytest.raises(ValueError, match="x64"):
        features({DOWN: x}, ["stats"])
    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match="workers"),
    ):  # another thread has its own settings
        features({DOWN: x}, ["stats"], workers=2)


def test_tensors_follow_one_another_in_the_order_of_their_names():
    rng = np.random.default_rng(0)
    weights = {f"{n}.lora.down.weight": rng.standard_normal((2, 1, 9)).astype(np.float32) for n in "cab"}
    found = features(weights, ["simple_stats", "flat_vec"], workers=3)
    for i, n in enumerate("abc"):
        alone = features({"x": weights[f"{n}.lora.down.weight"]}, ["simple_stats"])["simple_stats"]
        np.testing.assert_array_equal(found["simple_stats"][:, 5 * i : 5 * i + 5], alone)
        np.testing.assert_array_equal(
            found["flat_vec"][:, 9 * i : 9 * i + 9], weights[f"{n}.lora.down.weight"][:, 0]
        )


def test_an_adapter_has_the_same_features_in_any_company():
    x = np.random.default_rng(0).standard_normal((16, 1, 320)).astype(np.float32)
    together = features({DOWN: x}, ["ensemble"])["ensemble"]
    alone = features({DOWN: x[5:6]}, ["ensemble"])["ensemble"]
    np.testing.assert_allclose(together[5:6], alone, rtol=1e-5, atol=1e-6)


def test_a_constant_tensor_has_finite_features():
    """`up` starts at 0, and an adapter that was never trained still has it."""
    found = features({DOWN: np.zeros((2, 1, 32), np.float32)}, OF_TENSOR)
    assert all(np.isfinite(rows).all() for rows in found.values())
    assert found["info_theoretic"][0, 0] == pytest.approx(0, abs=1e-7)


# --------------------------------------------------------------------------------------- dimensions

SD15 = unet_shapes("sd15", 1)
DIMS = {
    "simple_stats": 640,
    "rank_based": 1408,
    "stats": 896,
    "spectral": 4096,
    "matrix_norms": 896,
    "distribution": 1536,
    "frequency": 1792,
    "info_theoretic": 256,
    "ensemble": 8576,
    "flat_vec": 99_648,
    "product": 64 * 36,
}


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_dimensions_are_the_documents(representation):
    visual = {name: shape for name, shape in SD15.items() if ".attn1." in name}
    assert feature_dim(SD15, representation) == DIMS[representation]
    expected = 49_920 if representation == "flat_vec" else DIMS[representation] // 2
    assert feature_dim(visual, representation) == expected
    weights = {name: np.ones((1, *SD15[name]), np.float32) for name in list(SD15)[:4]}
    few = {name: SD15[name] for name in weights}
    assert features(weights, [representation])[representation].shape == (1, feature_dim(few, representation))


def test_a_factor_alone_has_no_product():
    with pytest.raises(UserError, match=r"no other factor") as caught:
        feature_dim({DOWN: (1, 8)}, "product")
    assert DOWN in str(caught.value)
