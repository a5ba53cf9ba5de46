"""A leaderboard over studies: a CSV that is only ever added to, and a ranked page made from it.

    <out>/leaderboard.csv   a row per arm and result; columns are the union over all studies, blank where unknown
    <out>/leaderboard.md    the newest row of each arm, best first in the response's own direction

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

    def to_dict(self) -> dict[str, Any]:
        """Plain data in JSON's types; cells are text as in the CSV."""
        return {
            **dataclasses.asdict(self),
            "ranked": [dict(entry) for entry in self.ranked],
            "unranked": [dict(entry) for entry in self.unranked],
            "csv": str(self.csv),
            "markdown": str(self.markdown),
        }

    def text(self) -> str:
        """The page, and where it is."""
        return f"{_page(self)}\n{self.added} new rows in {self.csv}; page: {self.markdown}"


def leaderboard(
    studies: Sequence[Path | Manifest],
    out: Path,
    response: str = "",
    *,
    tags: Sequence[str] = (),
    notes: str = "",
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
    new = [row for one in found for row in entries(one, analyse(one), tags=tags, notes=notes)]
    return write(new, out, by)


def entries(
    found: Results, analysis: Analysis, *, tags: Sequence[str] = (), notes: str = ""
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
        row["id"] = hashlib.sha256(canonical(identity).encode()).hexdigest()[:12]
        rows.append({key: _cell(value) for key, value in row.items()})
    return rows


def write(new: Iterable[Entry], out: Path, by: Response) -> Leaderboard:
    """Adds the rows that are new to `out/leaderboard.csv` and ranks all of them in `out/leaderboard.md`."""
    csv_path, page_path = out / "leaderboard.csv", out / "leaderboard.md"
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
            board = _ranked(
                list(newest.values()), by, len(added), len(rows) - len(newest), csv_path, page_path
            )
            disk.write_bytes(page_path, (_page(board) + "\n").encode())
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


def _ranked(
    rows: Sequence[Entry], by: Response, added: int, older: int, csv_path: Path, page_path: Path
) -> Leaderboard:
    key = f"metric:{by.name}"

    def complete(row: Entry) -> bool:
        return bool(row.get(key)) and row.get(f"{key}:n") == row["seeds"] == row["done"]

    ranked = sorted(filter(complete, rows), key=lambda row: -by.better * float(row[key]))
    unranked = [row for row in rows if not complete(row)]
    direction = "max" if by.better > 0 else "min"
    return Leaderboard(by.name, direction, tuple(ranked), tuple(unranked), added, older, csv_path, page_path)


def _page(board: Leaderboard) -> str:
    better = "less is better" if board.direction == "min" else "more is better"
    lines = [
        "# Leaderboard",
        "",
        f"By `{board.response}`, {better}. Intervals are Student t over seeds, at the level of each study.",
        "",
        f"| rank | study | arm | changes | {board.response} | interval | seeds | parameters | plan | code | date |",
        "|---:|---|---|---|---:|---|---|---:|---|---|---|",
    ]
    lines += [_line(str(rank), row, board.response) for rank, row in enumerate(board.ranked, start=1)]
    lines += [_line("–", row, board.response) for row in board.unranked]
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
    return "\n".join([*lines, *(line for remark in remarks for line in ("", remark))])


def _line(rank: str, row: Entry, response: str) -> str:
    key = f"metric:{response}"
    low, high = row.get(f"{key}:low"), row.get(f"{key}:high")
    seeds = row["done"] if row["done"] == row["seeds"] else f"{row['done']} of {row['seeds']}"
    if row["diverged"] not in ("", "0"):
        seeds += f", {row['diverged']} diverged"
    cells = [
        rank, row["study"], row["arm"], row["label"], _short(row.get(key)),
        f"{_short(low)} to {_short(high)}" if low and high else "–", seeds, row.get("extra:parameters") or "–",
        row["plan"], row["commit"], row["timestamp"][:10],
    ]  # fmt: skip
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def _short(text: str | None) -> str:
    return f"{float(text):.4g}" if text else "–"
