"""Stacked adapters in safetensors, in parts: `train__<tensor>` is (adapters, *shape), and so on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jaxablate import cache
from jaxablate.errors import UserError
from jaxablate.studies.lora_space.data import files, names
from jaxablate.studies.lora_space.data.names import Shape
from jaxablate.studies.lora_space.data.reader import Weights, different_shape, room
from jaxablate.studies.lora_space.data.split import Split

PARTS = ("train", "val", "test")
LABELS = ("labels", "label", "category_label")
MAPPING = "label_mapping"  # in the file's metadata: JSON {category: number}, or {number: category}


@dataclass(frozen=True)
class Preprocessed:
    """The adapters of a file or of a folder of files, training first, then validation, then test (a `Reader`).

    Attributes:
      shapes: of the factors of one adapter.
      at: the file that has a key.
      counts: adapters of each part.
      categories, labels: names of the categories, and the number of each adapter's, int32 (N,).
      kept: where digests of files are kept.
    """

    path: Path
    shapes: Mapping[str, Shape]
    at: Mapping[str, Path]
    counts: tuple[int, int, int]
    categories: tuple[str, ...]
    labels: npt.NDArray[np.int32]
    kept: Path

    @classmethod
    def of(cls, path: Path, kept: Path) -> Preprocessed:
        """Looks at headers. Raises UserError if parts are missing or do not fit together."""
        shapes, at, counts = _contents(path)
        labels = _labels(path, at, counts)
        return cls(path, shapes, at, counts, _categories(path, at, labels), labels, kept)

    @property
    def parts(self) -> Split:
        ends = np.cumsum((0, *self.counts))
        return Split(*(np.arange(ends[i], ends[i + 1]) for i in range(len(PARTS))))

    def digest(self) -> str:
        paths = sorted(set(self.at.values()))
        return cache.fingerprint("preprocessed", files.digests(paths, self.kept, len(paths)))

    def where(self, row: int) -> str:
        part, number = self._place(row)
        return f"{self.path}: adapter {number} of {PARTS[part]}"

    def read(self, start: int, stop: int, names: Sequence[str], workers: int) -> Weights:
        del workers  # a stretch of a tensor lies in one piece
        found = room(self.shapes, names, stop - start)
        row = start
        while row < stop:
            part, first = self._place(row)
            count = min(stop - row, self.counts[part] - first)
            for name in names:
                path = self.at[f"{PARTS[part]}__{name}"]
                with files.opened(path) as file:
                    values = file.get_slice(f"{PARTS[part]}__{name}")[first : first + count]
                into = found[name][row - start : row - start + count]
                into[...] = files.floats(values, name, path).reshape(into.shape)
            row += count
        return found

    def _place(self, row: int) -> tuple[int, int]:
        """Part and number within it."""
        ends = np.cumsum(self.counts)
        part = int(np.searchsorted(ends, row, side="right"))
        return part, row - int(ends[part]) + self.counts[part]


def describe(path: Path) -> tuple[Mapping[str, Shape], tuple[str, ...]]:
    """Factors and categories, from headers and labels."""
    shapes, at, counts = _contents(path)
    return shapes, _categories(path, at, _labels(path, at, counts))


def _contents(path: Path) -> tuple[dict[str, Shape], dict[str, Path], tuple[int, int, int]]:
    """Shape of each factor of one adapter, the file of each key, and the adapters of each part."""
    paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not paths:
        raise UserError(f"data.path={path}: has no *.safetensors; give a file or a folder of them")
    at, shapes = {}, {}
    for file in paths:
        for key, shape in files.shapes_of(file).items():
            at[key], shapes[key] = file, shape
    by_part = []
    for part in PARTS:
        own = {
            key.removeprefix(f"{part}__"): shape
            for key, shape in shapes.items()
            if key.startswith(f"{part}__")
        }
        factors = {name: shape for name, shape in own.items() if names.direction(name) and shape}
        if not factors:
            raise UserError(f"data.path={path}: has no key {part}__<tensor>; give all of train, val and test")
        by_part.append(factors)
    one = names.of_adapter({name: shape[1:] for name, shape in by_part[0].items()}, f"data.path={path}")
    counts = [_adapters_of(factors, one, part, path) for part, factors in zip(PARTS, by_part, strict=True)]
    return one, at, (counts[0], counts[1], counts[2])


def _adapters_of(factors: Mapping[str, Shape], needed: Mapping[str, Shape], part: str, path: Path) -> int:
    """How many adapters a part has; UserError if its tensors do not agree on it or with the first part's."""
    if other := sorted(set(factors) ^ set(needed)):
        raise UserError(
            f"data.path={path}: tensor '{other[0]}' is in one of train and {part} alone; make it anew"
        )
    count = factors[min(factors)][0]
    for name, shape in factors.items():
        if shape[1:] != needed[name]:
            raise different_shape(f"data.path={path}: {part}", name, shape[1:], needed[name])
        if shape[0] != count:
            raise UserError(
                f"data.path={path}: {part}__{name} has {shape[0]} adapters and another tensor {count}; make it anew"
            )
    if not count:
        raise UserError(f"data.path={path}: the part {part} has no adapter; give one of each category")
    return count


def _labels(path: Path, at: Mapping[str, Path], counts: Sequence[int]) -> npt.NDArray[np.int32]:
    found = []
    for part, count in zip(PARTS, counts, strict=True):
        key = next((key for name in LABELS if (key := f"{part}__{name}") in at), None)
        if key is None:
            raise UserError(f"data.path={path}: has no {part}__{LABELS[0]}; add the category of each adapter")
        with files.opened(at[key]) as file:
            labels = file.get_tensor(key)
        if labels.dtype.kind not in "iu" or math.prod(labels.shape) != count or labels.min() < 0:
            raise UserError(
                f"data.path={path}: {key} is {labels.dtype} of shape {labels.shape}; it must be {count} whole "
                f"numbers of 0 and more"
            )
        found.append(labels.reshape(-1))
    together = np.concatenate(found)
    if len(np.unique(together)) < 2:
        raise UserError(
            f"data.path={path}: has adapters of one category, {together[0]}; there is nothing to tell apart, give two "
            f"or more"
        )
    return together.astype(np.int32)


def _categories(path: Path, at: Mapping[str, Path], labels: npt.NDArray[np.int32]) -> tuple[str, ...]:
    """Names from a file's metadata, else the numbers."""
    count = int(labels.max()) + 1
    for file in sorted(set(at.values())):
        with files.opened(file) as contents:
            text = (contents.metadata() or {}).get(MAPPING)
        if text:
            return _named(text, count, f"{file}: metadata '{MAPPING}'")
    width = len(str(count - 1))
    return tuple(f"{i:0{width}}" for i in range(count))


def _named(text: str, count: int, where: str) -> tuple[str, ...]:
    try:
        mapping = {str(key): str(value) for key, value in json.loads(text).items()}
        turned = all(key.isdecimal() for key in mapping)
        by_number = {
            int(key if turned else value): value if turned else key for key, value in mapping.items()
        }
        return tuple(by_number[i] for i in range(max(count, len(by_number))))
    except (ValueError, AttributeError, KeyError):
        raise UserError(
            f"{where}: is no JSON of {count} categories with their numbers from 0; mend or remove it"
        ) from None
