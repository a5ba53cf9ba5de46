"""Pictures: the sizes they are brought to, the order of their patches, and one line for what is no good picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxablate.errors import UserError
from jaxablate.studies.vqa.qwen3vl import images
from jaxablate.studies.vqa.qwen3vl.config import QWEN3_VL_2B

VISION = QWEN3_VL_2B.vision


@pytest.mark.parametrize(
    "size, wanted",
    [
        ((1024, 1280), (1024, 1280)),  # already whole visual tokens
        ((1000, 1270), (992, 1280)),  # the nearest multiples of 32
        ((272, 272), (256, 256)),  # halves go to the even multiple
        ((304, 304), (320, 320)),
        ((100, 100), (256, 256)),  # grown to 65,536 pixels
        ((48, 48), (256, 256)),
        ((10, 1000), (32, 2560)),
        ((5000, 5000), (4096, 4096)),  # shrunk to 16,777,216
        ((2, 400), (32, 3648)),
    ],
)
def test_sizes(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    height, width = images.resized(*size, factor=32)
    assert (height, width) == wanted
    assert height % 32 == width % 32 == 0
    assert images.MIN_PIXELS <= height * width <= images.MAX_PIXELS


def test_a_shape_that_is_too_narrow_is_refused() -> None:
    images.resized(10, 2000, factor=32)
    with pytest.raises(ValueError, match="more than 200 times"):
        images.resized(10, 2001, factor=32)


def test_patches_of_a_visual_token_stand_together() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 96, 3), np.uint8)
    picture = images.patches_of(pixels, VISION)
    assert picture.grid == (4, 6) and picture.visual_tokens(2) == 6
    expected = [
        np.stack([pixels[16 * y : 16 * y + 16, 16 * x : 16 * x + 16].transpose(2, 0, 1)] * 2, axis=1).ravel()
        for block_y in range(2)
        for block_x in range(3)
        for y in (2 * block_y, 2 * block_y + 1)
        for x in (2 * block_x, 2 * block_x + 1)
    ]
    np.testing.assert_array_equal(picture.patches, expected)
    assert not np.array_equal(images.patches_of(pixels[:, ::-1], VISION).patches, expected)


def test_numbers_from_minus_one_to_one() -> None:
    every = jnp.arange(256, dtype=jnp.uint8)[None]
    np.testing.assert_allclose(images.normalised(every)[0], (np.arange(256) / 255 - 0.5) / 0.5, atol=1e-6)
    assert images.normalised(every, "bfloat16").dtype == jnp.bfloat16


def test_a_batch_is_padded_with_nothing() -> None:
    small, large = (images.patches_of(np.full((32, width, 3), width, np.uint8), VISION) for width in (32, 64))
    found = images.batch([[small, large], []], pictures=2, patches=8, values=VISION.patch_size)
    assert found.patches.shape == (2, 2, 8, 1536) and found.patches.dtype == np.uint8
    assert found.grids.tolist() == [[[2, 2], [2, 4]], [[0, 0], [0, 0]]]
    assert (found.patches[0, 0, :4] == 32).all() and not found.patches[0, 0, 4:].any()
    for pictures, patches, message in ((1, 8, "2 pictures"), (2, 4, "8 patches")):
        with pytest.raises(ValueError, match=message):
            images.batch([[small, large]], pictures=pictures, patches=patches, values=VISION.patch_size)


@pytest.mark.parametrize("mode", images.MODES)
def test_modes_that_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    Image.new(mode, (70, 50)).save(path)
    assert images.read(path, VISION).patches.shape[1] == 1536


def test_a_turned_photograph_stands_upright(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by a quarter
    image = Image.new("RGB", (640, 320))
    image.save(path)
    assert images.read(path, VISION).grid == (20, 40)
    image.save(path, exif=exif)
    assert images.read(path, VISION).grid == (40, 20)


# ---------------------------------------------------------------------------------------------- faults


def whole(path: Path, size: tuple[int, int] = (64, 64), mode: str = "RGB", kind: str = "JPEG") -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, kind)
    return path


def cut_short(kind: str) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        data = whole(path, kind=kind).read_bytes()
        path.write_bytes(data[: len(data) // 2])

    return damage


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "there is no such image"),
        (lambda path: path.mkdir(), "cannot be read (Is a directory)"),
        (lambda path: path.write_bytes(b""), "is no image of a known format"),
        (lambda path: path.write_text("not a picture"), "is no image of a known format"),
        (cut_short("JPEG"), "the image cannot be read (image file is truncated"),
        (cut_short("PNG"), "the image cannot be read ("),
        (lambda path: whole(path, mode="CMYK"), "an image in CMYK, which has no agreed way to RGB"),
        (lambda path: Image.new("F", (40, 40)).save(path, "TIFF"), "an image in F,"),
        (lambda path: whole(path, size=(1, 64)), "1 x 64 pixels; an image must be two pixels or more"),
        (lambda path: whole(path, size=(64, 1)), "64 x 1 pixels"),
        (lambda path: whole(path, size=(2, 500)), "2 x 500 pixels: one side is more than 200 times"),
    ],
)  # fmt: skip
def test_what_is_no_good_picture_is_one_line(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "frame001.img"
    make(path)
    with pytest.raises(UserError) as error:
        images.read(path, VISION)
    text = str(error.value)
    assert str(path) in text and message in text and "\n" not in text


def test_a_whole_picture_is_read(tmp_path: Path) -> None:
    """The negative control of the above."""
    for kind in ("JPEG", "PNG"):
        assert images.read(whole(tmp_path / f"a.{kind}", kind=kind), VISION).grid == (16, 16)
