"""Smooth shapes on a small picture: strokes, a round opening, light. Pixels are floats (size, size, 3), 0 to 255."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.float64]
Point = tuple[
    float, float
]  # x to the right, y down; pixel (row, column) has its middle at (column + .5, row + .5)
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """How a camera shows what it sees.

    Attributes:
      tint: factor of each channel.
      brightness: factor of all.
      noise: standard deviation of what each pixel's channels are off.
    """

    tint: Colour
    brightness: float
    noise: float


def middles(size: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """x and y of all pixels, (size, size) each."""
    at = np.arange(size, dtype=np.float64) + 0.5
    x, y = np.meshgrid(at, at)
    return x, y


def blend(picture: Pixels, cover: npt.NDArray[np.float64], colour: Colour | Pixels) -> Pixels:
    """`colour` over the picture where `cover` (size, size), 0 to 1, is."""
    return picture + cover[..., None] * (np.asarray(colour, np.float64) - picture)


def stroke(size: int, start: Point, end: Point, radius: float) -> npt.NDArray[np.float64]:
    """Cover of a line with round ends, (size, size); its edge is a pixel wide."""
    x, y = middles(size)
    along = np.subtract(end, start)
    length = max(float(along @ along), 1e-9)
    t = np.clip(((x - start[0]) * along[0] + (y - start[1]) * along[1]) / length, 0, 1)
    distance = np.hypot(x - start[0] - t * along[0], y - start[1] - t * along[1])
    return np.clip(radius + 0.5 - distance, 0, 1)


def opening(size: int, radius: float) -> npt.NDArray[np.float64]:
    """Cover of all that is outside a round opening in the middle, (size, size)."""
    x, y = middles(size)
    return np.clip(np.hypot(x - size / 2, y - size / 2) - radius + 0.5, 0, 1)


def seen(picture: Pixels, look: Look, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The picture as a camera takes it, in bytes."""
    lit = picture * (look.brightness * np.asarray(look.tint)) + rng.normal(0, look.noise, picture.shape)
    return np.clip(np.round(lit), 0, 255).astype(np.uint8)
