"""A parquet table of adapters: a row each, with its category and a column for each tensor.

Needs pyarrow, which is asked for when a table is opened. The formats that a column of a tensor may have are nested
lists, (rows, columns) of numbers, and flat lists, whose rows then follow from the column `rank`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxablate import cache
from jaxablate.errors import UserError
from jaxablate.studies.lora_space.data import files, names
from jaxablate.studies.lora_space.data.names import Shape
from jaxablate.studies.lora_space.data.reader import Weights, different_shape, room, sorted_categories

LABEL, NAME, RANK = "category_label", "category_name", "rank"
_AT_ONCE = 64  # rows that are decoded together


class Columnar:
    """The rows of a table, or of the tables of a folder in order (a `Reader`). Made by `of`."""

    def __init__(
        self, paths: Sequence[Path], shapes: Mapping[str, Shape], category: Sequence[str], kept: Path
    ):
        self._paths, self._kept = tuple(paths), kept
        self._counts = [_parquet(path).metadata.num_rows for path in paths]
        self._reading = threading.Lock()
        self._stream: tuple[tuple[str, ...], int, Iterator[Any]] | None = None  # columns, next row, slices
        self.shapes = shapes
        self.categories = _in_order(category, paths)
        number = {name: i for i, name in enumerate(self.categories)}
        self.labels = np.array([number[name] for name in category], np.int32)

    @classmethod
    def of(cls, path: Path, kept: Path) -> Columnar:
        """Looks at schemas, categories and the first row. Raises UserError if they are not what is needed.

        Args:
          kept: where digests of files are kept.
        """
        paths = _tables(path)
        return cls(paths, _shapes(paths[0]), [name for one in paths for name in _category(one)], kept)

    @property
    def parts(self) -> None:
        return None

    def digest(self) -> str:
        return cache.fingerprint("columnar", files.digests(self._paths, self._kept, len(self._paths)))

    def where(self, row: int) -> str:
        table, within = self._place(row)
        return f"{self._paths[table]}: row {within}"

    def read(self, start: int, stop: int, names: Sequence[str], workers: int) -> Weights:
        del workers  # pyarrow has threads of its own
        found = room(self.shapes, names, stop - start)
        with self._reading:
            for row, batch in self._rows(start, stop, tuple(names)):
                for name in names:
                    values = _values(
                        batch.column(name), name, self.shapes[name], functools.partial(self._at, row)
                    )
                    found[name][row - start : row - start + len(batch)] = values
        return found

    def _at(self, first: int, number: int) -> str:
        return self.where(first + number)

    def _place(self, row: int) -> tuple[int, int]:
        """Table and row within it."""
        ends = np.cumsum(self._counts)
        table = int(np.searchsorted(ends, row, side="right"))
        return table, row - int(ends[table]) + self._counts[table]

    def _rows(self, start: int, stop: int, columns: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
        """(first row, record batch) of a stretch. One that follows the last is read on, so that no row group need
        be in memory as a whole; another begins at the row group that it is in."""
        if self._stream is None or self._stream[:2] != (columns, start):
            self._stream = columns, start, self._from(start, columns)
        batches, row = self._stream[2], start
        while row < stop:
            batch = next(batches)
            taken = min(len(batch), stop - row)
            if taken < len(batch):
                batches = _before(batch.slice(taken), batches)
            yield row, batch.slice(0, taken)
            row += taken
        self._stream = columns, stop, batches

    def _from(self, row: int, columns: tuple[str, ...]) -> Iterator[Any]:
        """Record batches from a row on, through all tables."""
        first, skipped = self._place(row)
        for path in self._paths[first:]:
            file, groups = _parquet(path), []
            for group in range(file.metadata.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if skipped >= size and not groups:
                    skipped -= size
                else:
                    groups.append(group)
            with _readable(path):
                for batch in file.iter_batches(_AT_ONCE, row_groups=groups, columns=list(columns)):
                    if skipped < len(batch):
                        yield batch.slice(skipped)
                    skipped = max(0, skipped - len(batch))


def _before(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def describe(path: Path) -> tuple[Mapping[str, Shape], tuple[str, ...]]:
    """Factors of the first row, and the categories of all."""
    paths = _tables(path)
    return _shapes(paths[0]), _in_order([name for one in paths for name in _category(one)], paths)


def _tables(path: Path) -> list[Path]:
    paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not paths:
        raise UserError(f"data.path={path}: has no *.parquet; give a table or a folder of them")
    return paths


def _parquet(path: Path) -> Any:
    """A table whose footer is read. Raises UserError without pyarrow, and for a file that is no table."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            "data.source=columnar: needs the package 'pyarrow', which is not installed: pip install "
            "'jaxablate[parquet]', or use another source"
        ) from None
    with _readable(path):
        return parquet.ParquetFile(path)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says in one line what pyarrow finds wrong with a file."""
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as parquet ({reason}); fetch it again") from None


def _category(path: Path) -> list[str]:
    """The name of each row's category: its name where there is one, else the label."""
    file = _parquet(path)
    there = file.schema_arrow.names
    column = NAME if NAME in there else LABEL
    if column not in there:
        raise UserError(f"{path}: has no column '{LABEL}'; add the category of each adapter")
    with _readable(path):
        found = file.read(columns=[column]).column(0).to_pylist()
    if None in found:
        raise UserError(f"{path}: row {found.index(None)} has no {column}; give it or leave the row out")
    return [str(value) for value in found]


def _in_order(category: Sequence[str], paths: Sequence[Path]) -> tuple[str, ...]:
    """Alphabetical, but numbers as numbers."""
    found = sorted_categories(category, f"data.path={paths[0]}")
    return tuple(sorted(found, key=int)) if all(name.isdecimal() for name in found) else found


def _shapes(path: Path) -> dict[str, Shape]:
    """Of the factors of a table's first row."""
    file = _parquet(path)
    columns = [name for name in file.schema_arrow.names if names.direction(name)]
    asked = [*columns, *({RANK} & set(file.schema_arrow.names))]
    with _readable(path):
        first = next(file.iter_batches(1, columns=asked), None)
    if first is None:
        raise UserError(f"{path}: has no row; give one for each adapter")
    rank = int(first.column(RANK)[0].as_py() or 1) if RANK in asked else 1
    shapes = {}
    for name in columns:
        row = first.column(name)[0].as_py()
        if row is None:
            raise UserError(f"{path}: row 0 has no tensor '{name}'; leave the row or the column out")
        shape = np.shape(row)
        if len(shape) == 1:  # flat
            other = shape[0] // rank
            shape = (rank, other) if names.direction(name) == "down" else (other, rank)
        if math.prod(shape) != np.size(row):
            raise UserError(
                f"{path}: tensor '{name}' has {np.size(row)} values, no multiple of {RANK}={rank}"
            )
        shapes[name] = tuple(shape)
    return names.of_adapter(shapes, str(path))


def _values(column: Any, name: str, shape: Shape, where: Any) -> np.ndarray:
    """(rows, *shape) of a column of lists. Raises UserError if a row has none or others."""
    import pyarrow as pa

    rows, levels = len(column), []
    while pa.types.is_nested(column.type):
        if column.null_count:
            at = int(np.flatnonzero(column.is_null())[0])
            raise UserError(
                f"{where(at // max(1, len(column) // rows))}: has no tensor '{name}'; leave it out"
            )
        levels.append(np.asarray(column.value_lengths()))
        column = column.flatten()
    needed = shape if len(levels) == len(shape) else (math.prod(shape),)
    for level, size in enumerate(needed):
        if (wrong := np.flatnonzero(levels[level] != size)).size:
            at = int(wrong[0]) // math.prod(needed[:level])
            has = tuple(int(lengths[at * (len(lengths) // rows)]) for lengths in levels)
            raise different_shape(where(at), name, has, needed)
    if not pa.types.is_floating(column.type):
        raise UserError(
            f"{where(0)}: tensor '{name}' is of {column.type}; weights are floating-point numbers"
        )
    return np.asarray(column, np.float32).reshape(rows, *shape)
