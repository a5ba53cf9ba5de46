"""Random access to the items of one split; what a grain loader reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from jaxablate import cache


@runtime_checkable
class Volumes(Protocol):
    """Where the volumes of a split lie."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> npt.NDArray[np.float16]:
        """Volume `index`, (T, H, W) in thousands of HU."""
        ...


class Lazy:
    """What is opened on first use stays behind when the object is pickled."""

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass(frozen=True)
class ArrayVolumes(Lazy):
    """One .npy file (n, T, H, W) float16, memory-mapped."""

    path: Path

    @cached_property
    def _array(self) -> npt.NDArray[np.float16]:
        return np.load(self.path, mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return len(self._array)

    def read(self, index: int) -> npt.NDArray[np.float16]:
        """Volume `index`, (T, H, W) in thousands of HU."""
        return self._array[index]


@dataclass(frozen=True)
class FileVolumes:
    """One .npy file (T, H, W) float16 a volume, memory-mapped when read."""

    folder: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> npt.NDArray[np.float16]:
        """Volume `index`, (T, H, W) in thousands of HU."""
        return np.load(self.folder / self.names[index], mmap_mode="r", allow_pickle=False)


@dataclass(frozen=True)
class Split:
    """One split before its reports become ids: `labels` is (n, 18), `digest` names all its content."""

    volumes: Volumes
    names: tuple[str, ...]
    reports: tuple[str, ...]
    labels: npt.NDArray[np.float32]
    digest: str


@dataclass(frozen=True)
class Items(Lazy):
    """A split as a sequence of {image (T, H, W) float32, text (L,) int32, labels (18,) float32}.

    Pickles to a few paths: images, ids, labels and reports are files that each process maps itself.
    """

    volumes: Volumes
    text_file: Path
    labels_file: Path
    reports_file: Path

    @cached_property
    def text(self) -> npt.NDArray[np.int32]:
        """(n, L) ids of the reports."""
        return np.load(self.text_file, mmap_mode="r", allow_pickle=False)

    @cached_property
    def labels(self) -> npt.NDArray[np.float32]:
        """(n, 18), 0 or 1, columns in the order of `FINDINGS`."""
        return np.load(self.labels_file, mmap_mode="r", allow_pickle=False)

    @cached_property
    def reports(self) -> list[str]:
        """The n cleaned reports."""
        return json.loads(self.reports_file.read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[Any]]:
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"item {index} of {n}")
        index %= n
        return {
            "image": np.array(self.volumes.read(index), np.float32),
            "text": np.array(self.text[index]),
            "labels": np.array(self.labels[index]),
        }


def make_items(split: Split, text: npt.NDArray[np.int32], folder: Path) -> Items:
    """Write ids, labels and reports below `folder`, each under its own digest, and return the items."""
    reports: Sequence[str] = split.reports
    return Items(
        volumes=split.volumes,
        text_file=cache.keep(folder, ".npy", cache.npy_bytes(text)),
        labels_file=cache.keep(folder, ".npy", cache.npy_bytes(split.labels)),
        reports_file=cache.keep(folder, ".json", json.dumps(list(reports)).encode()),
    )
