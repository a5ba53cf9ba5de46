"""A folder tree of adapters: `<category>/<adapter>/` with the weights, as diffusers and peft write them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jaxablate import cache
from jaxablate.errors import UserError
from jaxablate.studies.lora_space.data import files, names
from jaxablate.studies.lora_space.data.names import Shape
from jaxablate.studies.lora_space.data.reader import Weights, different_shape, room, sorted_categories

log = logging.getLogger(__name__)

WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers, of peft


@dataclass(frozen=True)
class Folder:
    """The adapters of a tree, by category and name (a `Reader`).

    Attributes:
      shapes: of the factors of the first adapter, which all must have.
      paths: of the weights of each adapter.
      categories, labels: names of the categories, and the number of each adapter's, int32 (N,).
      kept: where digests of files are kept.
      workers: threads that read files for their digest.
    """

    root: Path
    shapes: Mapping[str, Shape]
    paths: tuple[Path, ...]
    categories: tuple[str, ...]
    labels: npt.NDArray[np.int32]
    kept: Path
    workers: int

    @classmethod
    def of(cls, root: Path, kept: Path, workers: int) -> Folder:
        """Lists a tree. Raises UserError if it is none, or an adapter's weights are not there."""
        found = [(name, path) for name in _category_folders(root) for path in _adapters(root / name)]
        category, paths = [name for name, _ in found], tuple(path for _, path in found)
        categories = _several(category, root)
        labels = np.searchsorted(categories, category).astype(np.int32)
        return cls(root, _shapes(paths[0]), paths, categories, labels, kept, workers)

    @property
    def parts(self) -> None:
        return None

    def digest(self) -> str:
        found = files.digests(self.paths, self.kept, self.workers)
        return cache.fingerprint("folder", self.categories, self.labels.tolist(), found)

    def where(self, row: int) -> str:
        return str(self.paths[row])

    def read(self, start: int, stop: int, names: Sequence[str], workers: int) -> Weights:
        found = room(self.shapes, names, stop - start)

        def fill(row: int) -> None:
            for name, values in self._adapter(row, names):
                found[name][row - start] = values

        with ThreadPoolExecutor(max(1, workers)) as threads:
            for done in [threads.submit(fill, row) for row in range(start, stop)]:
                done.result()
        return found

    def _adapter(self, row: int, wanted: Sequence[str]) -> list[tuple[str, np.ndarray]]:
        path = self.paths[row]
        with files.opened(path) as file:
            there = {name for name in file.keys() if names.direction(name)}  # noqa: SIM118 no mapping
            if there != set(self.shapes):
                raise _other_tensors(path, there, self.shapes, self.paths[0])
            found = [(name, files.floats(file.get_tensor(name), name, path)) for name in wanted]
        for name, values in found:
            if values.shape != self.shapes[name]:
                raise different_shape(str(path), name, values.shape, self.shapes[name])
        return found


def describe(root: Path) -> tuple[Mapping[str, Shape], tuple[str, ...]]:
    """Factors of the first adapter, and the categories: from listings and one header."""
    first, categories = None, []
    for name in _category_folders(root):
        path = next(_adapters(root / name), None)
        if path:
            first = first or path
            categories.append(name)
    found = _several(categories, root)
    assert first
    return _shapes(first), found


def _several(found: Sequence[str], root: Path) -> tuple[str, ...]:
    if not found:
        raise UserError(
            f"data.path={root}: has no <category>/<adapter>/{WEIGHTS[0]}; give the folder of the categories"
        )
    return sorted_categories(found, f"data.path={root}")


def _shapes(path: Path) -> dict[str, Shape]:
    return names.of_adapter(files.shapes_of(path), str(path))


def _category_folders(root: Path) -> list[str]:
    return [entry.name for entry in _folders(root, f"data.path={root}")]


def _adapters(category: Path) -> Iterator[Path]:
    """The weights of each adapter of a category, by the adapter's name; warns if there is none."""
    listed = _folders(category, str(category))
    if not listed:
        log.warning("%s: holds no adapter; it is left out", category)
    for entry in listed:
        there = [path for name in WEIGHTS if (path := Path(entry.path) / name).is_file()]
        if not there:
            raise UserError(
                f"{entry.path}: has no {WEIGHTS[0]} (nor {WEIGHTS[1]}); fetch it, or remove the folder"
            )
        yield there[0]


def _folders(place: Path, what: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(place) as entries:
            found = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{what}: cannot be listed ({error.strerror}); mend the path") from None
    return sorted(found, key=lambda entry: entry.name)


def _other_tensors(path: Path, there: set[str], needed: Mapping[str, Shape], first: Path) -> UserError:
    if missing := sorted(set(needed) - there):
        return UserError(
            f"{path}: has no tensor '{missing[0]}' ({len(missing)} in all), which {first} has; leave one of them out"
        )
    return UserError(
        f"{path}: has a tensor '{min(there - set(needed))}', which {first} has not; leave one of them out"
    )
