"""Pictures as the published processor prepares them: resized to whole visual tokens, cut into patches, normalised.

Patches are bytes until they are on the device: a quarter of what has to be kept and carried, and the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxablate.errors import UserError
from jaxablate.studies.vqa.qwen3vl.config import VisionConfig

# Pixels after resizing, as preprocessor_config.json has them (there as shortest_edge and longest_edge).
MIN_PIXELS, MAX_PIXELS = 65_536, 16_777_216
NARROWEST = 200  # the longer side is at most so many times the shorter one
MODES = ("RGB", "RGBA", "L", "LA", "P", "1")  # what becomes RGB without a colour profile


class Picture(NamedTuple):
    """A prepared picture.

    Attributes:
      patches: bytes in blocks of merge x merge patches, which become one visual token; a patch is
        (channels, frames, rows, columns).
      grid: rows and columns of patches.
    """

    patches: UInt8[np.ndarray, "patches values"]
    grid: tuple[int, int]

    def visual_tokens(self, merge: int) -> int:
        """How many places the picture takes in a row."""
        return self.grid[0] * self.grid[1] // merge**2


class Batch(NamedTuple):
    """The pictures of some rows: padded to equally many, of equally many patches."""

    patches: UInt8[np.ndarray, "rows pictures patches values"]
    grids: np.ndarray  # int32 (rows, pictures, 2); 0 x 0 where there is none


def resized(
    height: int, width: int, *, factor: int, low: int = MIN_PIXELS, high: int = MAX_PIXELS
) -> tuple[int, int]:
    """Height and width that a picture is brought to: multiples of `factor`, from `low` to `high` pixels.

    The nearest multiples, or where these are too many or too few pixels, the picture's shape scaled to the bound.

    Raises:
      ValueError: one side is more than NARROWEST times the other.
    """
    if max(height, width) > NARROWEST * min(height, width):
        raise ValueError(f"{width} x {height} pixels: one side is more than {NARROWEST} times the other")
    sides = [round(side / factor) * factor for side in (height, width)]
    area = height * width
    if math.prod(sides) > high:
        shrink = math.sqrt(area / high)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif math.prod(sides) < low:
        grow = math.sqrt(low / area)
        sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def read(path: str | Path, config: VisionConfig, *, low: int = MIN_PIXELS, high: int = MAX_PIXELS) -> Picture:
    """A picture from a file.

    Raises:
      UserError: the file is missing, no picture, or cut short; its colours are of a kind that needs a profile
        (CMYK); it is one pixel wide or far too narrow.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError:
        raise UserError(f"{path}: is no image of a known format; restore it") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: {error}; make the image smaller") from None
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such image; restore it, or leave its questions out") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on damage
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: the image cannot be read ({reason}); restore it") from None
    if image.mode not in MODES:
        raise UserError(
            f"{path}: an image in {image.mode}, which has no agreed way to RGB; convert it to RGB first"
        )
    if min(image.size) < 2:
        width, height = image.size
        raise UserError(f"{path}: {width} x {height} pixels; an image must be two pixels or more each way")
    try:
        return prepare(image, config, low=low, high=high)
    except ValueError as error:
        raise UserError(f"{path}: {error}; cut it to a wider shape") from None


def prepare(
    image: Image.Image, config: VisionConfig, *, low: int = MIN_PIXELS, high: int = MAX_PIXELS
) -> Picture:
    """A picture in memory, made RGB, resized (bicubic) and cut into patches.

    Raises:
      ValueError: see `resized`.
    """
    height, width = resized(image.height, image.width, factor=config.patch * config.merge, low=low, high=high)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return patches_of(np.asarray(image), config)


def patches_of(pixels: UInt8[np.ndarray, "height width channels"], config: VisionConfig) -> Picture:
    """The patches of pixels whose sides are multiples of patch * merge; each frame of a patch is the same."""
    patch, merge = config.patch, config.merge
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    # block row, row in it, pixel row; the same of columns; channel
    cut = pixels.reshape(rows // merge, merge, patch, columns // merge, merge, patch, config.channels)
    ordered = cut.transpose(0, 3, 1, 4, 6, 2, 5)
    frames = np.repeat(ordered[:, :, :, :, :, None], config.frames, axis=5)
    return Picture(frames.reshape(rows * columns, config.patch_size), (rows, columns))


def batch(rows: Sequence[Sequence[Picture]], *, pictures: int, patches: int, values: int) -> Batch:
    """The pictures of each row, padded with nothing.

    Args:
      pictures: of each row; patches: of each picture; both are what a program is compiled for.
      values: numbers in a patch.

    Raises:
      ValueError: a row has more pictures, or a picture more patches.
    """
    padded = np.zeros((len(rows), pictures, patches, values), np.uint8)
    grids = np.zeros((len(rows), pictures, 2), np.int32)
    for i, row in enumerate(rows):
        if len(row) > pictures:
            raise ValueError(f"a row has {len(row)} pictures, but there is room for {pictures}")
        for j, picture in enumerate(row):
            if len(picture.patches) > patches:
                raise ValueError(
                    f"a picture has {len(picture.patches)} patches, but there is room for {patches}"
                )
            padded[i, j, : len(picture.patches)] = picture.patches
            grids[i, j] = picture.grid
    return Batch(padded, grids)


def normalised(
    patches: UInt8[Array, "*batch values"], dtype: Literal["float32", "bfloat16"] = "float32"
) -> Float[Array, "*batch values"]:
    """What the tower takes: bytes from 0 to 255 as numbers from -1 to 1 (mean and deviation 0.5)."""
    return (patches.astype(jnp.float32) / 127.5 - 1.0).astype(dtype)
