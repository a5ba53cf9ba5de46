"""The chain gives the numbers of studies/ctclip.md section 9 and of an independent interpolation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from jaxablate.studies.ctclip.data.preprocess import (
    Chain,
    centre_crop,
    clip_hu,
    crop_bounds,
    pad,
    pad_widths,
    preprocess,
    resample,
    resampled_shape,
    rescale,
    to_zxy,
)

TARGET = (1.5, 0.75, 0.75)


def oracle(volume: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Trilinear with half-pixel centres through scipy's general interpolator, in float64."""
    axes = [(np.arange(m) + 0.5) * n / m - 0.5 for n, m in zip(volume.shape, shape, strict=True)]
    return map_coordinates(
        volume.astype(np.float64), np.meshgrid(*axes, indexing="ij"), order=1, mode="nearest"
    )


SHAPES = [
    ((5, 7, 9), (9, 7, 4)),
    ((3, 4, 5), (1, 1, 1)),
    ((1, 2, 3), (4, 5, 6)),
    ((40, 33, 21), (37, 50, 43)),
]


@pytest.mark.parametrize("have, want", SHAPES)
def test_resample_equals_an_independent_trilinear(have, want):
    volume = np.random.default_rng(0).uniform(-1, 1, have).astype(np.float32)
    result = resample(volume, want)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, oracle(volume, want), rtol=0, atol=1e-5)


def test_the_oracle_tells_corner_alignment_apart():
    volume = np.arange(4, dtype=np.float32).reshape(1, 1, 4)
    corners = np.linspace(0, 3, 6)  # what align_corners=True would give
    assert np.abs(resample(volume, (1, 1, 6))[0, 0] - corners).max() > 0.1


@pytest.mark.parametrize("have, want", SHAPES)
def test_resample_equals_torch(have, want):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    volume = np.random.default_rng(1).uniform(-1, 1, have).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(volume)[None, None], size=want, mode="trilinear", align_corners=False
    )
    np.testing.assert_allclose(resample(volume, want), expected[0, 0].numpy(), rtol=0, atol=1e-5)


def row(values: list[float]) -> np.ndarray:
    return np.array(values, np.float32).reshape(1, 1, -1)


def test_clip_before_or_after_resampling_gives_the_golden_rows():
    raw = row([-1000, 3000, 0, 500])
    first = resample(clip_hu(raw), (1, 1, 6)) / 1000
    last = clip_hu(resample(raw, (1, 1, 6))) / 1000
    np.testing.assert_allclose(first[0, 0], [-1, 0, 0.833333, 0.166667, 0.25, 0.5], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(last[0, 0], [-1, 1, 1, 0.5, 0.25, 0.5], rtol=1e-5, atol=1e-6)


def test_the_chain_clips_where_the_config_says():
    raw = np.array([-1000, 3000, 0, 500], np.int16).reshape(1, 4, 1)
    chains = {
        clip: Chain(volume=(1, 1, 6), spacing=(1.0, 1.0, 1.0), clip=clip)
        for clip in ("before_resampling", "faithful")
    }
    # 4 voxels of 1.5 mm become 6 of 1 mm along y, the last axis of (z, x, y)
    out = {clip: preprocess(raw, 1.0, 0.0, (1.0, 1.5, 1.0), chain)[0, 0] for clip, chain in chains.items()}
    np.testing.assert_allclose(out["before_resampling"], [-1, 0, 0.8333, 0.16667, 0.25, 0.5], atol=5e-4)
    np.testing.assert_allclose(out["faithful"], [-1, 1, 1, 0.5, 0.25, 0.5], atol=5e-4)


@pytest.mark.parametrize(
    "xyz, spacing, zxy",
    [
        ((512, 512, 100), (0.68, 0.68, 3.0), (200, 464, 464)),
        ((512, 512, 301), (0.8203125, 0.8203125, 1.0), (200, 560, 560)),
        ((480, 480, 240), (0.75, 0.75, 1.5), (240, 480, 480)),
        ((10, 11, 5), (0.75, 0.75, 0.29), (0, 10, 11)),  # rounds down, never to the nearest
    ],
)
def test_resampled_shape_is_the_golden_one(xyz, spacing, zxy):
    shape = resampled_shape((xyz[2], xyz[0], xyz[1]), (spacing[2], spacing[0], spacing[1]), TARGET)
    assert shape == zxy


def test_crop_and_pad_widths_are_the_golden_ones():
    assert pad_widths(200, 240) == (20, 20)
    assert pad_widths(464, 480) == (8, 8)
    assert crop_bounds(560, 480) == (40, 520)
    assert crop_bounds(464, 480) == (0, 464)
    assert crop_bounds(7, 4) == (1, 5)
    assert pad_widths(4, 7) == (1, 2)  # the odd voxel goes behind


def test_crop_keeps_the_centre_and_pad_adds_air():
    volume = np.arange(7 * 2 * 4, dtype=np.float32).reshape(7, 2, 4)
    out = pad(centre_crop(volume, (4, 3, 4)), (4, 3, 4))
    np.testing.assert_array_equal(out[:, :2], volume[1:5])
    np.testing.assert_array_equal(out[:, 2], -1.0)


def test_axes_slope_and_storage():
    raw = np.zeros((2, 3, 4), np.int16)
    raw[1, 2, 3] = 600
    chain = Chain(volume=(4, 2, 3), spacing=(1.0, 1.0, 1.0))
    out = preprocess(raw, 2.0, -1024.0, (1.0, 1.0, 1.0), chain)
    assert out.dtype == np.float16
    assert out.shape == (4, 2, 3)
    assert out.flags["C_CONTIGUOUS"]
    assert out[3, 1, 2] == np.float16(0.176)
    assert out[0, 0, 0] == -1.0  # -1024 HU, clipped
    assert to_zxy(rescale(raw, 1.0, 0.0)).shape == (4, 2, 3)


def test_a_volume_thinner_than_one_target_voxel_is_refused():
    with pytest.raises(ValueError, match="resample to"):
        preprocess(
            np.zeros((4, 4, 1), np.int16), 1.0, 0.0, (1.0, 1.0, 0.5), Chain((2, 2, 2), (1.0, 1.0, 1.0))
        )
