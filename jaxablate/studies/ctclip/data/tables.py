"""The CSV files beside a folder of volumes: found, read and checked row by row.

Rows are counted as an editor does: the header is row 1.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jaxablate.errors import UserError, suggestion
from jaxablate.studies.ctclip.data.findings import FINDINGS
from jaxablate.studies.ctclip.data.preprocess import Spacing

KEY = "VolumeName"
METADATA = ("RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")
REPORT = "Findings_EN"

_PAIR = re.compile(r"\[\s*([^,\[\]]+?)\s*,\s*([^,\[\]]+?)\s*\]")


@dataclass(frozen=True)
class Row:
    """One line of a table. `where` says which, for messages."""

    path: Path
    number: int
    cells: dict[str, str]

    def where(self, column: str) -> str:
        """ "file row r column c": what an error message starts with."""
        return f"{self.path} row {self.number} column {column}"

    def number_of(self, column: str) -> float:
        """The cell as a finite number; UserError otherwise."""
        text = self.cells[column].strip()
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{self.where(column)}: '{text}' is no finite number; correct it")
        return value


Table = dict[str, Row]


def find_table(folder: Path, kind: str) -> Path | None:
    """`<kind>.csv` of a folder, else the only `*<kind>*.csv` (CT-RATE's names), else None.

    Raises UserError if several match.
    """
    exact = folder / f"{kind}.csv"
    if exact.is_file():
        return exact
    found = sorted(folder.glob(f"*{kind}*.csv"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(
            f"{folder}: {len(found)} files match *{kind}*.csv ({names}); name the right one {kind}.csv"
        )
    return found[0] if found else None


def need_table(folder: Path, kind: str) -> Path:
    """`find_table`, or UserError if there is none."""
    path = find_table(folder, kind)
    if path is None:
        raise UserError(f"{folder}: has no {kind}.csv (nor one file *{kind}*.csv); put it there")
    return path


def read_table(path: Path, columns: Iterable[str]) -> Table:
    """{VolumeName: row} with at least `columns`.

    Raises UserError for text that is not UTF-8, a missing column (naming the nearest), a row with too
    few or too many cells, an empty or repeated VolumeName, or no row at all.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or ())
            for column in (KEY, *columns):
                if column not in header:
                    hint = suggestion(column, header) if header else "the file is empty"
                    raise UserError(f"{path}: has no column '{column}'; {hint}")
            table: Table = {}
            for number, cells in enumerate(reader, start=2):
                if None in cells or None in cells.values():
                    raise UserError(
                        f"{path} row {number}: has not the {len(header)} cells of the header; correct it"
                    )
                name = cells[KEY].strip()
                if not name:
                    raise UserError(
                        f"{path} row {number} column {KEY}: is empty; give the volume's file name"
                    )
                if name in table:
                    raise UserError(
                        f"{path} row {number} column {KEY}: '{name}' is in row {table[name].number} too; "
                        f"delete one"
                    )
                table[name] = Row(path, number, cells)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is no CSV in UTF-8 ({error}); export it again") from error
    if not table:
        raise UserError(f"{path}: has no row; give one for each volume")
    return table


def parse_labels(row: Row) -> npt.NDArray[np.float32]:
    """(18,) of 0 and 1 in the order of `FINDINGS`. Raises UserError for anything else in a cell."""
    values = np.zeros(len(FINDINGS), np.float32)
    for i, name in enumerate(FINDINGS):
        text = row.cells[name].strip()
        if text not in ("0", "1", "0.0", "1.0"):
            raise UserError(f"{row.where(name)}: label '{text}' is neither 0 nor 1; correct it")
        values[i] = float(text)
    return values


def parse_scaling(row: Row) -> tuple[float, float]:
    """(slope, intercept) of a metadata row. Raises UserError if the slope is 0."""
    slope, intercept = row.number_of("RescaleSlope"), row.number_of("RescaleIntercept")
    if slope == 0:
        raise UserError(
            f"{row.where('RescaleSlope')}: is 0, which erases the volume; correct it (CT has 1 mostly)"
        )
    return slope, intercept


def parse_spacing(row: Row) -> Spacing:
    """(x, y, z) mm of a metadata row: XYSpacing is "[a, b]", ZSpacing a number, all above 0."""
    text = row.cells["XYSpacing"].strip()
    match = _PAIR.fullmatch(text)
    try:
        x, y = (float(part) for part in match.groups()) if match else (math.nan, math.nan)
    except ValueError:
        x = y = math.nan
    if not (0 < x < math.inf and 0 < y < math.inf):
        raise UserError(
            f"{row.where('XYSpacing')}: '{text}' is not two lengths in mm; write it like [0.75, 0.75]"
        )
    z = row.number_of("ZSpacing")
    if z <= 0:
        raise UserError(f"{row.where('ZSpacing')}: {z:g} is not a length in mm above 0; correct it")
    return x, y, z
