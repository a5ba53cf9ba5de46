"""Features kept on disk: streamed there once, found again by what they are made of, and proved when they are found.

Whoever wants one representation wants the others too: the adapters are read once for all descriptors of all tensors,
and each representation of each set of tensors takes its columns from what was found. What is as large as the adapters
themselves (`flat_vec`), or seldom wanted (`product`), is made by itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
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
      among: those of all tensors that some arm may look at, `shapes` among them.
      legacy_key: the document's name for them, which is written down beside them and finds nothing.
    """

    digest: str
    shapes: Mapping[str, Shape]
    among: Mapping[str, Shape]
    representation: str
    variant: Variant
    legacy_key: str

    @property
    def key(self) -> str:
        """Name of the folder. The variant matters where there is a condition number."""
        spectral = self.representation in ("spectral", "ensemble", "product")
        return self._key(self.representation, self.variant if spectral else "", self.shapes)

    @property
    def described_key(self) -> str:
        """Name of the folder of what this is taken from."""
        return self._key("described", self.variant, self.among)

    def _key(self, what: str, variant: str, shapes: Mapping[str, Shape]) -> str:
        return cache.fingerprint(
            "lora_features", descriptors.VERSION, self.digest, what, variant, sorted(shapes.items())
        )

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
        log.info("%s: %d features into %s", wanted.representation, wanted.dim, place)
        if wanted.representation in ("flat_vec", "product"):
            alone = (wanted.representation,)
            _stream(alone, wanted.shapes, wanted.variant, reader, workers, {alone[0]: scratch / FEATURES})
        else:
            _take(wanted, described(wanted, reader, folder, workers), scratch / FEATURES)
        about = {
            "representation": wanted.representation,
            "adapters": wanted.digest,
            "tensors": sorted(wanted.shapes),
            "legacy_key": wanted.legacy_key,
        }
        (scratch / ABOUT).write_text(json.dumps(about, indent=1))

    cache.built_folder(place, build)
    if not made:
        _prove(place / FEATURES, wanted, reader, workers)
    return place / FEATURES, not made


def described(wanted: Wanted, reader: Reader, folder: Path, workers: int) -> Path:
    """The folder with what the descriptors find in all tensors, a file float32 (N, dim) for each of them."""
    place, all_of_them = folder / wanted.described_key, tuple(descriptors.OF_TENSOR)

    def build(scratch: Path) -> None:
        log.info("describing %d tensors of %d adapters", len(wanted.among), len(reader.labels))
        files = {one: scratch / f"{one}.npy" for one in all_of_them}
        _stream(all_of_them, wanted.among, wanted.variant, reader, workers, files)

    cache.built_folder(place, build)
    return place


def _take(wanted: Wanted, source: Path, into: Path) -> None:
    """The columns of some tensors, a stretch of adapters at a time."""
    parts = compute.parts(wanted.representation)
    found = [np.load(source / f"{part}.npy", mmap_mode="r", allow_pickle=False) for part in parts]
    there = [compute.columns_of(wanted.among, part) for part in parts]
    chosen = [(i, there[i][name]) for name in sorted(wanted.shapes) for i in range(len(parts))]
    out = np.lib.format.open_memmap(into, mode="w+", dtype=np.float32, shape=(len(found[0]), wanted.dim))
    length = max(1, AT_ONCE // (4 * sum(one.shape[1] for one in found)))
    for start in range(0, len(out), length):
        rows = [np.asarray(one[start : start + length]) for one in found]
        np.concatenate([rows[i][:, own] for i, own in chosen], axis=1, out=out[start : start + length])
    out.flush()


def _stream(
    representations: Sequence[str],
    shapes: Mapping[str, Shape],
    variant: Variant,
    reader: Reader,
    workers: int,
    files: Mapping[str, Path],
) -> None:
    """Writes the features of all adapters; the next stretch of them is read while one is described. All stretches are
    equally long, so that one program serves them: the last begins earlier than it would have to."""
    count, size = len(reader.labels), sum(4 * math.prod(shape) for shape in shapes.values())
    stretches = -(-count // max(1, AT_ONCE // size))
    length = -(-count // stretches)
    starts = [min(i * length, count - length) for i in range(stretches)]
    out = {
        one: np.lib.format.open_memmap(
            files[one], mode="w+", dtype=np.float32, shape=(count, compute.feature_dim(shapes, one))
        )
        for one in representations
    }
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(_read, reader, starts[0], length, shapes, workers)
        for start, after in zip(starts, [*starts[1:], None], strict=True):
            weights = coming.result()
            if after is not None:
                coming = ahead.submit(_read, reader, after, length, shapes, workers)
            rows = range(start, start + length)
            for one, found in _features(weights, representations, variant, reader, rows, workers).items():
                out[one][start : start + length] = found
            log.info("%d of %d adapters", start + length, count)
    for one in out.values():
        one.flush()


def _read(reader: Reader, start: int, length: int, shapes: Mapping[str, Shape], workers: int) -> Weights:
    weights = reader.read(start, start + length, sorted(shapes), workers)
    check_finite(weights, reader, start)
    return weights


def _features(
    weights: Weights,
    representations: Sequence[str],
    variant: Variant,
    reader: Reader,
    rows: Sequence[int],
    workers: int,
) -> compute.Found:
    """Of the adapters `rows`, whose weights these are. Raises UserError, naming the adapter, if one is not finite."""
    found = compute.features(weights, representations, variant=variant, workers=workers)
    for one, values in found.items():
        if not np.isfinite(values).all():
            row = rows[int(np.argwhere(~np.isfinite(values))[0, 0])]
            raise UserError(
                f"{reader.where(row)}: its weights are so large that {one} overflows; leave that adapter out"
            )
    return found


def _prove(path: Path, wanted: Wanted, reader: Reader, workers: int) -> None:
    """Raises UserError if features on disk are not those of their adapters, up to rounding on another machine."""
    kept = np.load(path, mmap_mode="r", allow_pickle=False)
    if kept.shape != (len(reader.labels), wanted.dim):
        raise UserError(f"{path}: has the shape {kept.shape}, and the data makes {wanted.dim} features of "
                        f"{len(reader.labels)} adapters; delete its folder")  # fmt: skip
    rows = sorted({0, len(kept) // 2, len(kept) - 1})[:PROVED]
    read = [_read(reader, row, 1, wanted.shapes, workers) for row in rows]
    weights = {name: np.concatenate([one[name] for one in read]) for name in read[0]}
    one = wanted.representation
    again = _features(weights, [one], wanted.variant, reader, rows, workers)[one]
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
