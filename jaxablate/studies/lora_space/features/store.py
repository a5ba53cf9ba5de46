"""Features kept on disk: streamed there once, found again by what they are made of, and proved when they are found."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from jaxablate import cache
from jaxablate.errors import UserError
from jaxablate.studies.lora_space.data.names import Shape
from jaxablate.studies.lora_space.data.reader import Reader, Weights, check_finite
from jaxablate.studies.lora_space.features import compute, descriptors
from jaxablate.studies.lora_space.features.descriptors import Variant

log = logging.getLogger(__name__)

FEATURES, ABOUT, SCALE = "features.npy", "about.json", "scale.npy"
AT_ONCE = 1 << 26  # bytes of weights that are in memory at a time, and as many being read
CONSTANT = 1e-6  # a deviation below this share of the mean is rounding
PROVED = 3  # adapters whose features are computed again when they are found


@dataclass(frozen=True)
class Wanted:
    """What features are made of, and so what they are known by.

    Attributes:
      digest: of the adapters.
      shapes: of the tensors that are looked at, by name.
    """

    digest: str
    shapes: Mapping[str, Shape]
    representation: str
    variant: Variant

    @property
    def key(self) -> str:
        """Name of the folder. The variant matters where there is a condition number."""
        spectral = self.representation in ("spectral", "ensemble", "product")
        variant = self.variant if spectral else ""
        return cache.fingerprint(
            "lora_features", descriptors.VERSION, self.digest, self.representation, variant, sorted(self.shapes.items())
        )  # fmt: skip

    @property
    def dim(self) -> int:
        """Features of an adapter."""
        return compute.feature_dim(self.shapes, self.representation)


def legacy_key(dataset: str, representation: str, configuration: str, names: Iterable[str]) -> str:
    """The document's name for cached features: MD5 of what they are called, not of what is in them.

    Args:
      dataset: `1k`, `50k`, or what else it is called.
      configuration: `all_layers` or `visual_only`.
      names: of the tensors.
    """
    text = f"{dataset}_{representation}_{configuration}_" + "_".join(sorted(names))
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def stored(wanted: Wanted, reader: Reader, folder: Path, workers: int) -> tuple[Path, bool]:
    """The file with the features float32 (N, dim) of all adapters, and whether it was there.

    Weights and features are in memory a stretch at a time. Of features that were there, those of the first, the
    middle and the last adapter are computed again and compared.

    Raises:
      UserError: adapters that cannot be read, weights or features that are not finite, features that are not those of
        the adapters.
    """
    place = folder / wanted.key
    made = False

    def build(scratch: Path) -> None:
        nonlocal made
        made = True
        log.info("%s: computing %d features into %s", wanted.representation, wanted.dim, place)
        out = np.lib.format.open_memmap(
            scratch / FEATURES, mode="w+", dtype=np.float32, shape=(len(reader.labels), wanted.dim)
        )
        for start, found in _streamed(wanted, reader, workers):
            out[start : start + len(found)] = found
            log.info("%s: %d of %d adapters", wanted.representation, start + len(found), len(out))
        out.flush()
        about = {
            "representation": wanted.representation,
            "adapters": wanted.digest,
            "tensors": sorted(wanted.shapes),
        }
        (scratch / ABOUT).write_text(json.dumps(about, indent=1))

    cache.built_folder(place, build)
    if not made:
        _prove(place / FEATURES, wanted, reader, workers)
    return place / FEATURES, not made


def _streamed(wanted: Wanted, reader: Reader, workers: int) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """(first adapter, features of a stretch); the next stretch is read meanwhile. All stretches are equally long,
    so that one program serves them: the last begins earlier than it would have to."""
    count, size = len(reader.labels), sum(4 * int(np.prod(shape)) for shape in wanted.shapes.values())
    stretches = -(-count // max(1, AT_ONCE // size))
    length = -(-count // stretches)
    starts = [min(i * length, count - length) for i in range(stretches)]
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(_read, reader, starts[0], length, wanted, workers)
        for start, after in zip(starts, [*starts[1:], None], strict=True):
            weights = coming.result()
            if after is not None:
                coming = ahead.submit(_read, reader, after, length, wanted, workers)
            yield start, _features(weights, wanted, reader, start, workers)


def _read(reader: Reader, start: int, length: int, wanted: Wanted, workers: int) -> Weights:
    weights = reader.read(start, start + length, sorted(wanted.shapes), workers)
    check_finite(weights, reader, start)
    return weights


def _features(
    weights: Weights, wanted: Wanted, reader: Reader, start: int, workers: int
) -> npt.NDArray[np.float32]:
    one = wanted.representation
    found = compute.features(weights, [one], variant=wanted.variant, workers=workers)[one]
    if not np.isfinite(found).all():
        row = int(np.argwhere(~np.isfinite(found))[0, 0])
        raise UserError(
            f"{reader.where(start + row)}: its weights are so large that {one} overflows; leave that adapter out"
        )
    return found


def _prove(path: Path, wanted: Wanted, reader: Reader, workers: int) -> None:
    """Raises UserError if features on disk are not those of their adapters, up to rounding on another machine."""
    kept = np.load(path, mmap_mode="r", allow_pickle=False)
    if kept.shape != (len(reader.labels), wanted.dim):
        raise UserError(f"{path}: has the shape {kept.shape}, and the data makes {wanted.dim} features of "
                        f"{len(reader.labels)} adapters; delete its folder")  # fmt: skip
    rows = sorted({0, len(kept) // 2, len(kept) - 1})[:PROVED]
    read = [_read(reader, row, 1, wanted, workers) for row in rows]
    weights = {name: np.concatenate([one[name] for one in read]) for name in read[0]}
    again = _features(weights, wanted, reader, rows[0], workers)
    for row, is_kept, is_now in zip(rows, kept[rows], again, strict=True):
        if not np.allclose(is_kept, is_now, rtol=1e-3, atol=1e-5):
            raise UserError(
                f"{path}: features of {reader.where(row)} are not what is computed from it now; delete its folder"
            )


# ------------------------------------------------------------------------------------------- columns


def scaled(
    path: Path, key: str, rows: npt.NDArray[np.integer], how: Literal["unbiased", "biased"], folder: Path
) -> tuple[Path, int]:
    """The file with what normalises features, float32 (2, dim): a mean, and a factor; and how many are near-constant.

    A column whose deviation over the training adapters is below a millionth of its mean holds rounding errors, which
    a division by the deviation would blow up: its factor is 0. Of the others it is 1 / (unbiased deviation + 1e-8), or
    1 / biased deviation.

    Args:
      path: of the features (N, dim).
      key: what these are known by.
      rows: the training adapters.
    """
    place = folder / cache.fingerprint(
        "lora_scale", descriptors.VERSION, key, hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest(), how
    )

    def build(scratch: Path) -> None:
        mean, squares = _moments(np.load(path, mmap_mode="r", allow_pickle=False), np.sort(rows))
        std = np.sqrt(squares / (max(1, len(rows) - 1) if how == "unbiased" else len(rows)))
        constant = std <= CONSTANT * np.abs(mean)
        factor = np.where(constant, 0, 1 / np.where(constant, 1, std + (1e-8 if how == "unbiased" else 0)))
        np.save(scratch / SCALE, np.stack([mean, factor]).astype(np.float32), allow_pickle=False)

    cache.built_folder(place, build)
    return place / SCALE, int(np.sum(np.load(place / SCALE, allow_pickle=False)[1] == 0))


def _moments(
    features: npt.NDArray[np.float32], rows: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and sum of squared distances from it, of each column, in double precision (Chan et al. 1983)."""
    length = max(1, AT_ONCE // (8 * features.shape[1]))
    mean = squares = np.zeros(features.shape[1])
    count = 0
    for start in range(0, len(rows), length):
        part = features[rows[start : start + length]].astype(np.float64)
        own = part.mean(axis=0)
        step, total = own - mean, count + len(part)
        squares = squares + ((part - own) ** 2).sum(axis=0) + step**2 * (count * len(part) / total)
        mean = mean + step * (len(part) / total)
        count = total
    return mean, squares
