"""A comma-separated file as text, with errors that name the file, the line and the column."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxablate.errors import UserError, suggestion

NO_NUMBER = ("", "nan", "na", "n/a", "none", "null", "-", "inf", "+inf", "-inf")


def as_number(text: str) -> float | None:
    """The finite number that a cell holds; None if it holds anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


def is_number_or_none(text: str) -> bool:
    """Whether a cell could stand in a column of numbers, some of which are missing."""
    return text.lower() in NO_NUMBER or as_number(text) is not None


@dataclass(frozen=True)
class Row:
    """A row: its cells, stripped of spaces, by column."""

    where: str  # file:line
    cells: Mapping[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]

    def text(self, column: str) -> str:
        """A cell that must not be empty."""
        if not self[column]:
            raise UserError(f"{self.where}: '{column}' is empty; fill it in")
        return self[column]

    def number(self, column: str) -> float | None:
        """A finite number; None if the cell says that there is none."""
        if not is_number_or_none(self[column]):
            raise UserError(f"{self.where}: {column}='{self[column]}': must be a number, or empty")
        return as_number(self[column])

    def integer(self, column: str) -> int | None:
        """A whole number, which may be written 3.0; None if the cell says that there is none."""
        value = self.number(column)
        if value is not None and not value.is_integer():
            raise UserError(f"{self.where}: {column}='{self[column]}': must be an integer")
        return None if value is None else int(value)


@dataclass(frozen=True)
class CsvTable:
    """A CSV file with a header and at least one row."""

    path: Path
    header: tuple[str, ...]
    rows: tuple[Row, ...]

    @classmethod
    def read(cls, path: Path) -> CsvTable:
        """Reads a file in UTF-8; empty lines are skipped.

        Raises:
          UserError: it cannot be read, is no such table, or holds no rows.
        """
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            raise UserError(f"{path}: is not text in UTF-8; give a comma-separated table")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines: list[tuple[str, list[str]]] = []
        try:
            for cells in reader:
                if any(cells := [cell.strip() for cell in cells]):
                    lines.append((f"{path}:{reader.line_num}", cells))
        except csv.Error as error:
            where = f"{path}:{reader.line_num}"
            raise UserError(f"{where}: not a comma-separated table: {error}; mend the line") from None
        if len(lines) < 2:
            raise UserError(
                f"{path}: holds no rows; give a header such as arm,seed,val_loss and a row per run"
            )
        (_, header), *rest = lines
        if twice := [column for column in header if header.count(column) > 1]:
            raise UserError(f"{path}: two columns are named '{twice[0]}'; rename one")
        for where, cells in rest:
            if len(cells) != len(header):
                raise UserError(f"{where}: {len(cells)} cells, the header has {len(header)}; mend the line")
        rows = tuple(Row(where, dict(zip(header, cells, strict=True))) for where, cells in rest)
        return cls(path, tuple(header), rows)

    def require(self, column: str) -> None:
        """Raises UserError, with the nearest column, if there is none of that name."""
        if column in self.header:
            return
        if len(self.header) == 1 and re.search(r"[;\t|]", self.header[0]):
            raise UserError(f"{self.path}: the columns are not separated by commas; write it with commas")
        raise UserError(f"{self.path}: no column '{column}'; {suggestion(column, self.header)}")
