"""From the voxels a scanner stored to the (T, H, W) float16 volume a model reads.

The chain is that of CT-CLIP's data preparation (studies/ctclip.md, section 3), one pure function a
step: rescale, clip, axes, resample, divide by 1000, centre crop, pad, float16. Intensities are
Hounsfield units (HU) up to the division, thousands of HU after it. Names of axes: a NIfTI array is
(x, y, z); everything after `to_zxy` is (z, x, y), which the model calls (T, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]

HU_LOW, HU_HIGH = -1000.0, 1000.0
HU_SCALE = 1000.0
PAD_VALUE = -1.0  # air, in thousands of HU


@dataclass(frozen=True)
class Chain:
    """What the chain brings a volume to: `volume` (T, H, W) voxels of `spacing` (z, x, y) mm.

    `clip="faithful"` clips after resampling, as upstream does; interpolated values near metal differ.
    """

    volume: Triple
    spacing: Spacing
    clip: Literal["before_resampling", "faithful"] = "before_resampling"


def rescale(raw: npt.NDArray[np.generic], slope: float, intercept: float) -> Array:
    """Stored values to HU: `slope * raw + intercept`, any shape, float32."""
    return raw.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def clip_hu(hu: Array) -> Array:
    """Limit to [-1000, 1000] HU, any shape."""
    return np.clip(hu, np.float32(HU_LOW), np.float32(HU_HIGH))


def to_zxy(volume: Array) -> Array:
    """(x, y, z) -> (z, x, y). A view."""
    return volume.transpose(2, 0, 1)


def resampled_shape(shape: Triple, spacing: Spacing, target: Spacing) -> Triple:
    """Voxels per axis after resampling: `int(n * spacing / target)`, spacings in mm."""
    sizes = [int(n * have / want) for n, have, want in zip(shape, spacing, target, strict=True)]
    return sizes[0], sizes[1], sizes[2]


def resample(volume: Array, shape: Triple) -> Array:
    """Trilinear interpolation of a 3-D volume to `shape`, half-pixel centres, edges repeated.

    The same function as `torch.nn.functional.interpolate(mode="trilinear", align_corners=False)`
    with `size=shape`: no smoothing before shrinking. Trilinear weights are products, so the axes are
    done one after the other, the one that shrinks most first.
    """
    for axis in sorted(range(3), key=lambda a: shape[a] / volume.shape[a]):
        volume = _resample_axis(volume, axis, shape[axis])
    return volume


def _resample_axis(volume: Array, axis: int, size: int) -> Array:
    length = volume.shape[axis]
    if size == length:
        return volume
    # float32 positions, as torch has them for float32 input: the tie with torch is then at rounding
    # level even 500 voxels from the origin, where a float64 position would differ by 3e-5 voxel.
    scale = np.float32(length) / np.float32(size)
    position = np.maximum(scale * (np.arange(size, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
    low = np.minimum(position.astype(np.int64), length - 1)
    high = np.minimum(low + 1, length - 1)
    weight: Array = (position - low.astype(np.float32)).astype(np.float32)
    weight = weight.reshape([size if a == axis else 1 for a in range(3)])
    below, above = volume.take(low, axis), volume.take(high, axis)
    return (below * (np.float32(1) - weight) + above * weight).astype(np.float32, copy=False)


def crop_bounds(size: int, target: int) -> tuple[int, int]:
    """(start, stop) of the centre crop of one axis: start = max((n - t) // 2, 0)."""
    start = max((size - target) // 2, 0)
    return start, min(start + target, size)


def pad_widths(size: int, target: int) -> tuple[int, int]:
    """(before, after) of one axis after the crop: before = (t - k) // 2."""
    before = (target - size) // 2
    return before, target - size - before


def centre_crop(volume: Array, target: Triple) -> Array:
    """Cut each axis that is longer than `target` to its centre. A view."""
    return volume[tuple(slice(*crop_bounds(n, t)) for n, t in zip(volume.shape, target, strict=True))]


def pad(volume: Array, target: Triple) -> Array:
    """Fill each axis that is shorter than `target` with -1 (air), half before and half after."""
    widths = [pad_widths(n, t) for n, t in zip(volume.shape, target, strict=True)]
    return np.pad(volume, widths, constant_values=np.float32(PAD_VALUE))


def preprocess(
    raw: npt.NDArray[np.generic], slope: float, intercept: float, spacing: Spacing, chain: Chain
) -> npt.NDArray[np.float16]:
    """The whole chain: raw (x, y, z) of `spacing` (x, y, z) mm -> float16 (T, H, W) in thousands of HU.

    Raises ValueError if an axis resamples to no voxel at all.
    """
    volume = rescale(raw, slope, intercept)
    if chain.clip == "before_resampling":
        volume = clip_hu(volume)
    volume = to_zxy(volume)
    zxy = (spacing[2], spacing[0], spacing[1])
    shape = resampled_shape((volume.shape[0], volume.shape[1], volume.shape[2]), zxy, chain.spacing)
    if min(shape) < 1:
        raise ValueError(f"{raw.shape} voxels of {spacing} mm resample to {shape} at {chain.spacing} mm")
    volume = resample(volume, shape)
    if chain.clip == "faithful":
        volume = clip_hu(volume)
    volume = volume / np.float32(HU_SCALE)
    volume = pad(centre_crop(volume, chain.volume), chain.volume)
    return np.ascontiguousarray(volume, dtype=np.float16)
