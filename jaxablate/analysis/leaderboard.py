"""A leaderboard over studies: a CSV that is only ever added to, and a ranked page made from it.

    <out>/leaderboard.csv   a row per arm and result; columns are the union over all studies, blank where unknown
    <out>/leaderboard.md    the newest row of each arm, best first in the response's own direction
    <out>/leaderboard.html  the same as a page

Only arms whose seeds all finished are ranked: a mean of survivors, or of fewer seeds, is no rival to a whole one.
Imports no jax.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from jaxablate import disk, runstore
from jaxablate.analysis import origin, results
from jaxablate.analysis.findings import Analysis
from jaxablate.analysis.results import Results
from jaxablate.config import canonical
from jaxablate.errors import UserError, suggestion
from jaxablate.manifest import Manifest
from jaxablate.study import Response, Study

FIXED = ("id", "timestamp", "study", "arm", "label", "seeds", "done", "diverged", "plan", "plan_hash", "commit",
         "tags", "notes")  # fmt: skip
Entry = Mapping[str, str]  # a row of the CSV: its cells as they stand there


@dataclass(frozen=True)
class Leaderboard:
    """The ranking by one response, as it was written."""

    response: str
    direction: Literal["min", "max"]
    ranked: tuple[Entry, ...]  # best first
    unranked: tuple[Entry, ...]  # incomplete, or without that response
    added: int  # rows that are new in the CSV
    older: int  # rows that newer ones of the same arm replace on the page
    csv: Path
    markdown: Path
    html: Path

    def to_dict(self) -> dict[str, Any]:
        """Plain data in JSON's types; cells are text as in the CSV."""
        return {
            **dataclasses.asdict(self),
            "ranked": [dict(entry) for entry in self.ranked],
            "unranked": [dict(entry) for entry in self.unranked],
            "csv": str(self.csv),
            "markdown": str(self.markdown),
            "html": str(self.html),
        }

    def text(self) -> str:
        """The page, and where it is."""
        return f"{_page(self)}\n{self.added} new rows in {self.csv}; page: {self.html}"


def leaderboard(
    studies: Sequence[Path | Manifest],
    out: Path,
    response: str = "",
    *,
    tags: Sequence[str] = (),
    notes: str = "",
    promoted: Mapping[str, str] = MappingProxyType({}),
) -> Leaderboard:
    """Adds the arms of the studies to the leaderboard in the folder `out`, and writes its page anew.

    A row whose study, arm, plan, seeds and values are there already is not added again.

    Args:
      studies: directories of studies that were run, or their manifests.
      out: the folder; made if need be.
      response: what to rank by; default: the first response of the first study.
      tags, notes: kept with every row that is added.

    Raises:
      UserError: a study that cannot be read, a response that none of them has or that they see differently, or
        a leaderboard.csv that is none.
    """
    from jaxablate.analysis.stats.analyse import analyse

    found = [results.load(s if isinstance(s, Manifest) else Manifest.load(s)) for s in studies]
    if not found:
        raise UserError("leaderboard: no study; give at least one")
    by = _response([one.study for one in found], response)
    new = [
        row for one in found for row in entries(one, analyse(one), tags=tags, notes=notes, promoted=promoted)
    ]
    return write(new, out, by)


def entries(
    found: Results,
    analysis: Analysis,
    *,
    tags: Sequence[str] = (),
    notes: str = "",
    promoted: Mapping[str, str] = MappingProxyType({}),
) -> list[dict[str, str]]:
    """The rows of a study's arms that have a result."""
    plan = "not locked" if not found.locked else "amended" if found.amendments else "locked"
    rows = []
    for arm in found.study.arms:
        values = {value.response: value for value in analysis.arms if value.arm == arm.name}
        first = next(iter(values.values()))
        if not any(value.values for value in values.values()) and not first.diverged:
            continue
        row: dict[str, Any] = {
            "timestamp": runstore.now(),
            "study": found.study.name,
            "arm": arm.name,
            "label": _label(found.study, arm.name),
            "seeds": first.planned,
            "done": first.done,
            "diverged": first.diverged,
            "plan": plan,
            "plan_hash": found.plan_hash,
            "commit": origin.read(dataclasses.replace(found, runs=found.of(arm.name))).answer("code"),
            "tags": " ".join(tags),
            "notes": notes,
        }
        identity = [row[key] for key in ("study", "arm", "plan_hash", "seeds", "done", "diverged")]
        for name, value in values.items():
            identity.append([name, sorted((str(s), v) for s, v in value.values.items())])
            row[f"metric:{name}"] = value.mean.value
            row[f"metric:{name}:low"] = value.mean.low
            row[f"metric:{name}:high"] = value.mean.high
            row[f"metric:{name}:n"] = len(value.values)
        row |= {f"extra:{key}": extra for key, extra in _extras(found, analysis, arm.name).items()}
        if arm.name in promoted:  # a status of its own: what was there before it stays
            row["extra:promoted"] = promoted[arm.name]
            identity.append(["promoted", promoted[arm.name]])
        row["id"] = hashlib.sha256(canonical(identity).encode()).hexdigest()[:12]
        rows.append({key: _cell(value) for key, value in row.items()})
    return rows


def write(new: Iterable[Entry], out: Path, by: Response) -> Leaderboard:
    """Adds the rows that are new to `out/leaderboard.csv` and ranks all of them in `.md` and `.html` beside it."""
    csv_path = out / "leaderboard.csv"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _sole_writer(csv_path):
            header, old = _read(csv_path)
            known = {row["id"] for row in old}
            added = [row for row in new if row["id"] not in known]
            rows = [*old, *added]
            columns = list(dict.fromkeys([*header, *FIXED, *(column for row in added for column in row)]))
            if added:
                disk.write_bytes(csv_path, _encode(columns, rows))
            newest = {(row["study"], row["arm"]): row for row in rows}
            board = _ranked(list(newest.values()), by, len(added), len(rows) - len(newest), csv_path)
            disk.write_bytes(board.markdown, (_page(board) + "\n").encode())
            disk.write_bytes(board.html, _html(board).encode())
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; give another --out") from None
    return board


# -------------------------------------------------------------------------------------- internals


def _response(studies: Sequence[Study], name: str) -> Response:
    """The response to rank by, which all studies that have it must see the same way."""
    name = name or studies[0].responses[0].name
    having = [(study, r) for study in studies for r in study.responses if r.name == name]
    if not having:
        known = dict.fromkeys(r.name for study in studies for r in study.responses)
        raise UserError(f"--response={name}: no study has it; {suggestion(name, known)}")
    (study, response), *others = having
    for other, own in others:
        if own.direction != response.direction:
            raise UserError(
                f"--response={name}: {study.name} wants the {response.direction}, {other.name} the "
                f"{own.direction}; rank them apart"
            )
    return response


def _label(study: Study, arm: str) -> str:
    changed = study.set_levels(arm)
    return ", ".join(f if level == "on" else f"{f}={level}" for f, level in changed.items()) or "reference"


def _extras(found: Results, analysis: Analysis, arm: str) -> dict[str, Any]:
    rates = {run.learning_rate for run in found.of(arm)}
    extras: dict[str, Any] = {"learning_rate": rates.pop() if len(rates) == 1 else None}
    speeds = [speed for speed in analysis.speed if speed.arm == arm]
    extras["hardware"] = "; ".join(dict.fromkeys(speed.hardware for speed in speeds))
    for key in ("parameters", "steps_per_sec", "peak_bytes"):  # of one kind of hardware, or of none
        extras[key] = getattr(speeds[0], key) if len(speeds) == 1 else None
    return extras


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def _read(path: Path) -> tuple[list[str], list[Entry]]:
    """Header and rows of a leaderboard; none of either if the file is empty."""
    try:
        reader = csv.DictReader(io.StringIO(path.read_bytes().decode(), newline=""), strict=True)
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a leaderboard ({error}); restore or move it") from None
    header = list(reader.fieldnames or [])
    if missing := [column for column in FIXED if header and column not in header]:
        raise UserError(f"{path}: not a leaderboard: no column '{missing[0]}'; restore or move it")
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise UserError(f"{path}: row {number} has not as many cells as the header; mend it")
    return header, [dict(row) for row in rows]


def _encode(columns: Sequence[str], rows: Sequence[Entry]) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


@contextlib.contextmanager
def _sole_writer(path: Path) -> Iterator[None]:
    """Holds the lock of the file at `path`, which is created empty; who replaces it holds it too."""
    while True:
        fd = disk.open_append(path)
        try:
            with disk.locked(fd) as held:
                if not held:
                    raise UserError(
                        f"{path.parent}: its file system has no locks, so that rows could be lost; give another --out"
                    )
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    yield
                    return
        finally:
            os.close(fd)


# ----------------------------------------------------------------------------------------- the page

COLUMNS = ("rank", "study", "arm", "changes", "", "interval", "seeds", "parameters", "plan", "code", "date")
NUMBERS = ("rank", "", "parameters")  # "": the response


def _ranked(rows: Sequence[Entry], by: Response, added: int, older: int, csv_path: Path) -> Leaderboard:
    key = f"metric:{by.name}"

    def complete(row: Entry) -> bool:
        return bool(row.get(key)) and row.get(f"{key}:n") == row["seeds"] == row["done"]

    ranked = sorted(filter(complete, rows), key=lambda row: -by.better * float(row[key]))
    unranked = [row for row in rows if not complete(row)]
    return Leaderboard(
        by.name,
        "max" if by.better > 0 else "min",
        tuple(ranked),
        tuple(unranked),
        added,
        older,
        csv_path,
        csv_path.with_suffix(".md"),
        csv_path.with_suffix(".html"),
    )


def _explained(board: Leaderboard) -> tuple[str, str]:
    """By what is ranked, and what the intervals are."""
    better = "less is better" if board.direction == "min" else "more is better"
    return better, "Intervals are Student t over seeds, at the level of each study."


def _rows(board: Leaderboard) -> list[list[str]]:
    """The cells of the page, as `COLUMNS` names them."""
    numbered = [(str(rank), row) for rank, row in enumerate(board.ranked, start=1)]
    return [
        _cells(rank, row, board.response) for rank, row in [*numbered, *(("–", r) for r in board.unranked)]
    ]


def _remarks(board: Leaderboard) -> list[str]:
    remarks = []
    if board.unranked:
        remarks.append("Arms without a rank are incomplete: a value of theirs is of the seeds that survived.")
    seeds = sorted({int(row["seeds"]) for row in board.ranked})
    if len(seeds) > 1:
        remarks.append(f"The ranked arms have from {seeds[0]} to {seeds[-1]} seeds.")
    if len({row["study"] for row in (*board.ranked, *board.unranked)}) > 1:
        remarks.append("Arms of different studies compare only where data and evaluation are the same.")
    if board.older:
        remarks.append(f"{board.older} older rows of these arms are in {board.csv.name}.")
    return remarks


def _page(board: Leaderboard) -> str:
    better, intervals = _explained(board)
    names = [name or board.response for name in COLUMNS]
    rules = ["---:" if name in NUMBERS else "---" for name in COLUMNS]
    lines = ["# Leaderboard", "", f"By `{board.response}`, {better}. {intervals}", ""]
    lines += [f"| {' | '.join(names)} |", f"|{'|'.join(rules)}|"]
    for cells in _rows(board):
        lines.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    return "\n".join([*lines, *(line for remark in _remarks(board) for line in ("", remark))])


def _html(board: Leaderboard) -> str:
    from jaxablate.analysis.report.document import (  # with what draws figures, which the tables need not
        Cell,
        Column,
        Document,
        Paragraph,
        Point,
        Points,
        Section,
        Table,
    )
    from jaxablate.analysis.report.page import render

    better, intervals = _explained(board)
    columns = tuple(
        Column(name or board.response, "number" if name in NUMBERS else "words") for name in COLUMNS
    )
    rows = tuple(tuple(Cell(cell) for cell in cells) for cells in _rows(board))
    blocks = (Paragraph(f"By {board.response}, {better}."), Table("", columns, rows, intervals))
    remarks = Points(tuple(Point(remark) for remark in _remarks(board)))
    ranking = Section("ranking", "Ranking", (*blocks, remarks))
    return render(Document("Leaderboard", f"all rows: {board.csv.name}", (ranking,)))


def _cells(rank: str, row: Entry, response: str) -> list[str]:
    key = f"metric:{response}"
    low, high = row.get(f"{key}:low"), row.get(f"{key}:high")
    seeds = row["done"] if row["done"] == row["seeds"] else f"{row['done']} of {row['seeds']}"
    if row["diverged"] not in ("", "0"):
        seeds += f", {row['diverged']} diverged"
    promoted = row.get("extra:promoted")
    label = row["label"] + (f" (promoted: {promoted})" if promoted else "")
    return [
        rank, row["study"], row["arm"], label, _short(row.get(key)),
        f"{_short(low)} to {_short(high)}" if low and high else "–", seeds, row.get("extra:parameters") or "–",
        row["plan"], row["commit"], row["timestamp"][:10],
    ]  # fmt: skip


def _short(text: str | None) -> str:
    return f"{float(text):.4g}" if text else "–"
