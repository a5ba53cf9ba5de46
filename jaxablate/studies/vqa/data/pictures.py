"""The pictures of questions: how they are prepared for a model, one look at all of them, and access to each."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxablate import cache
from jaxablate.studies.vqa.qwen3vl import images
from jaxablate.studies.vqa.qwen3vl.config import VisionConfig
from jaxablate.studies.vqa.qwen3vl.images import Picture

log = logging.getLogger(__name__)

FORMAT = 1  # of what is kept of a look at pictures, part of its cache key
KEPT_BYTES = 256 << 20  # of pictures that a process keeps in memory
_SURVEY = "survey.json"


@dataclass(frozen=True)
class PictureSpec:
    """What a model makes of a picture.

    Attributes:
      image_tokens: most tokens of a picture, which is shrunk to them.
    """

    vision: VisionConfig
    image_tokens: int

    @property
    def patches(self) -> int:
        """Patches that there is room for."""
        return self.image_tokens * self.vision.merge**2

    @property
    def values(self) -> int:
        """Numbers in a patch."""
        return self.vision.patch_size

    @property
    def fingerprint(self) -> str:
        """Tells apart specs that make other patches of a picture."""
        vision = self.vision
        return cache.fingerprint(
            vision.patch, vision.frames, vision.channels, vision.merge, self.image_tokens
        )

    def read(self, path: Path) -> Picture:
        """A picture from its file. Raises UserError, one line, if it cannot be had; see `images.read`."""
        high = self.image_tokens * (self.vision.patch * self.vision.merge) ** 2
        return images.read(path, self.vision, low=min(images.MIN_PIXELS, high), high=high)


@dataclass(frozen=True)
class Survey:
    """Of pictures, in their order.

    Attributes:
      digests: of what the model sees of each: equal for copies, whatever their files are called.
      grids: rows and columns of patches, int32 (pictures, 2).
    """

    digests: tuple[str, ...]
    grids: npt.NDArray[np.int32]


def survey(paths: Sequence[Path], spec: PictureSpec, folder: Path, *, workers: int) -> Survey:
    """Reads every picture once; what is found is kept in `folder` for as long as no file changes.

    Raises UserError, one line, for the first picture that cannot be read.
    """
    states = [(str(path), (state := path.stat()).st_size, state.st_mtime_ns) for path in paths]
    key = cache.fingerprint("pictures", FORMAT, spec.fingerprint, states)

    def look(path: Path) -> tuple[str, tuple[int, int]]:
        picture = spec.read(path)
        digest = hashlib.blake2b(picture.patches.tobytes(), digest_size=16, person=b"%dx%d" % picture.grid)
        return digest.hexdigest(), picture.grid

    def build(scratch: Path) -> None:
        log.info("looking through %d pictures", len(paths))
        with ThreadPoolExecutor(max(1, workers)) as threads:
            found = list(threads.map(look, paths))
        (scratch / _SURVEY).write_text(json.dumps(found))

    cache.built_folder(folder / key, build)
    found = json.loads((folder / key / _SURVEY).read_text())
    return Survey(tuple(digest for digest, _ in found), np.array([grid for _, grid in found], np.int32))


@dataclass(frozen=True)
class Pictures:
    """Access to pictures by their number. Those read first stay in memory; a copy in another process reads anew."""

    paths: tuple[Path, ...]
    spec: PictureSpec
    _kept: dict[int, Picture] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Picture:
        if (kept := self._kept.get(index)) is not None:
            return kept
        picture = self.spec.read(self.paths[index])
        if len(self._kept) * self.spec.patches * self.spec.values < KEPT_BYTES:
            self._kept[index] = picture
        return picture

    def __reduce__(self) -> tuple[type[Pictures], tuple[Any, ...]]:
        return Pictures, (self.paths, self.spec)

    def padded(self, index: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
        """patches (1, P, values) and grids (1, 2) of one picture, with room for the largest."""
        found = images.batch([[self[index]]], pictures=1, patches=self.spec.patches, values=self.spec.values)
        return found.patches[0], found.grids[0]
