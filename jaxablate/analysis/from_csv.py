"""A plain long table of any framework, as results: `arm,seed,<factors…>,<responses…>`, one row per run.

`export` writes such tables. Imports no jax.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxablate.analysis.csvtable import CsvTable, Row, as_number, is_number_or_none
from jaxablate.analysis.export import ABOUT, FAMILIES
from jaxablate.analysis.results import Result, Results
from jaxablate.errors import UserError, suggestion
from jaxablate.runstore import STATES, State
from jaxablate.study import Arm, Factor, Response, Study

STATE_COLUMNS = ("state", "status")
OTHER_WORDS: Mapping[str, State] = {
    **dict.fromkeys(("finished", "complete", "completed", "success", "succeeded", "ok"), "done"),
    **dict.fromkeys(("failed", "failure", "crashed", "crash", "error", "killed"), "bug"),
    **dict.fromkeys(("canceled", "stopped", "aborted"), "cancelled"),
    **dict.fromkeys(("missing", "unfinished", "queued", "scheduled"), "pending"),
    "nan": "diverged",
}  # fmt: skip


def from_csv(
    path: Path,
    *,
    directions: Mapping[str, str],
    factors: Sequence[str] = (),
    arm: str = "arm",
    seed: str = "seed",
    state: str = "",
    name: str = "",
    baseline: str = "",
    log: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Results:
    """The results in a comma-separated table with a header and a row per run.

    An empty cell, `nan` or `inf` is a run without that number. Without a state a row with some number is done
    and one with none unfinished, as is a seed that an arm has no row for. Columns that `export` writes about a
    run (learning_rate, steps, perf/…) are taken for what they are; a row of phase `tuning` is no result.

    Args:
      path: the file, in UTF-8.
      directions: response column -> `min` or `max`; every column of numbers that is no factor needs one.
      factors: the factor columns. By default they are found: a column is a factor if it is the same in all rows
        of an arm, differs between arms, and holds words, or nothing but 0 and 1.
      arm: the column of the arm's name. Characters that a name cannot have become `_`.
      seed: the column of the seed.
      state: the column of how the run ended (done, diverged, failed, …); default: `state` or `status`, if any.
      name: of the study; default: the file's.
      baseline: an arm; default: `baseline` if there is one, else the first of the table.
      log: response columns of which ratios count, as of losses.
      ignore: columns to leave out.

    Raises:
      UserError: the table, the line or the column that is wrong, and what to do.
    """
    table = CsvTable.read(Path(path))
    for column in (arm, seed, *([state] if state else []), *directions, *factors, *log, *ignore):
        table.require(column)
    state = state or next((c for c in STATE_COLUMNS if c in table.header), "")
    own = {"phase", *ABOUT} - {*directions, *factors}
    rest = [c for c in table.header if c not in {arm, seed, state, *own, *ignore} and not _family(c)]
    notes: list[str] = []
    arms = _arm_names(table, arm, notes)
    found = _find_factors(table, arms, rest, directions, notes) if not factors else list(factors)
    _left_out(table, rest, {*directions, *found}, notes)
    reader = _Reader(seed, state, _responses(table, directions, log), frozenset(own & {*table.header}))
    runs = [reader.run(row, arm) for row, arm in zip(table.rows, arms, strict=True)]
    _no_row_twice(table, runs)
    names = list(dict.fromkeys(arms))
    seeds = sorted({run.seed for run in runs if run.phase == "confirm"})
    if not seeds:
        raise UserError(f"{path}: every row is of phase tuning; there is no result to report")
    baseline = _baseline(table, names, baseline, notes)
    levels = {column: _levels(table, arms, column) for column in found}
    study = Study(
        name=name or _name(table.path.stem),
        factors=tuple(_factor(table, column, levels[column], baseline) for column in found),
        arms=tuple(Arm(a, {_name(column): levels[column][a] for column in found}) for a in names),
        seeds=tuple(seeds),
        responses=tuple(reader.responses.values()),
        baseline=baseline,
    )
    absent = _absent(study, runs, notes)
    return Results(study=study, runs=(*runs, *absent), notes=tuple(notes), source=str(path))


def _name(text: str) -> str:
    """A name of the study's kind: what it cannot have becomes `_`."""
    return re.sub(r"[^\w.-]+", "_", text).lstrip(".-") or "_"


def _arm_names(table: CsvTable, column: str, notes: list[str]) -> list[str]:
    """The arm of each row, under a name that a study can use."""
    original: dict[str, str] = {}
    for row in table.rows:
        text = row.text(column)
        if original.setdefault(_name(text), text) != text:
            both = f"'{original[_name(text)]}' and '{text}'"
            raise UserError(f"{row.where}: arms {both} would both be named '{_name(text)}'; rename one")
    notes += [f"arm '{text}' is named '{name}' here" for name, text in original.items() if name != text]
    return [_name(row[column]) for row in table.rows]


def _family(column: str) -> str:
    """The family of columns about the run, such as `perf`, that a column belongs to; empty if none."""
    family, slash, key = column.partition("/")
    return family if slash and key and family in FAMILIES else ""


def _find_factors(
    table: CsvTable, arms: Sequence[str], rest: Iterable[str], directions: Mapping[str, str], notes: list[str]
) -> list[str]:
    found = []
    for column in rest:
        cells = [row[column] for row in table.rows]
        if column in directions or len(set(cells)) == 1:
            continue
        by_arm = set(zip(arms, cells, strict=True))
        switch = set(cells) <= {"0", "1"} and len(by_arm) == len(set(arms))
        if not switch and all(map(is_number_or_none, cells)):
            continue
        if not switch and any(as_number(cell) is not None for cell in cells):
            for row in table.rows:
                row.number(column)  # raises at the cell that is no number
        _levels(table, arms, column)  # raises unless it is the same in all rows of an arm
        found.append(column)
    notes += [f"factors, found: {', '.join(found)}"] if found else []
    return found


def _left_out(table: CsvTable, rest: Iterable[str], used: Collection[str], notes: list[str]) -> None:
    """Notes the columns that are neither factor nor response; refuses one that could be a response."""
    for column in rest:
        if column in used:
            continue
        cells = {row[column] for row in table.rows}
        numbers = all(map(is_number_or_none, cells)) and any(as_number(cell) is not None for cell in cells)
        if numbers and len(cells) > 1:
            raise UserError(
                f"{table.path}: column '{column}' holds numbers and has no direction; give "
                f"--direction {column}=min or =max, --factors {column}, or remove the column"
            )
        notes.append(f"column '{column}' is left out: {'all the same' if len(cells) == 1 else 'no factor'}")


def _levels(table: CsvTable, arms: Sequence[str], column: str) -> dict[str, str]:
    """arm -> its level of a factor."""
    levels: dict[str, str] = {}
    for arm, row in zip(arms, table.rows, strict=True):
        level = row.text(column)
        if levels.setdefault(arm, level) != level:
            raise UserError(
                f"{row.where}: factor '{column}' is '{level}' and was '{levels[arm]}' for arm '{arm}', which has "
                f"one level; mend the row, or name the factor columns with --factors"
            )
    return levels


def _factor(table: CsvTable, column: str, level_of: Mapping[str, str], baseline: str) -> Factor:
    levels = dict.fromkeys([level_of[baseline], *level_of.values()])  # the reference first
    if len(levels) < 2:
        raise UserError(
            f"{table.path}: factor '{column}' has one level in all rows; leave it out of --factors"
        )
    name = _name(column)
    changes = {level: {f"factor.{name}": level} for level in levels}
    return Factor(name, "model", {**changes, level_of[baseline]: {}})


def _responses(table: CsvTable, directions: Mapping[str, str], log: Sequence[str]) -> dict[str, Response]:
    """column -> response."""
    if not directions:
        raise UserError(
            f"{table.path}: no response; say which way one is better, as --direction val_loss=min"
        )
    if stray := [column for column in log if column not in directions]:
        raise UserError(f"{table.path}: '{stray[0]}' is to be on the log scale and has no direction")
    made = {}
    for column, direction in directions.items():
        if direction not in ("min", "max"):
            raise UserError(f"--direction {column}={direction}: must be min or max")
        made[column] = Response(
            column,
            "min" if direction == "min" else "max",
            scale="log" if column in log else "raw",
            name=_name(column.removeprefix("val/")),
        )
    return made


def _baseline(table: CsvTable, names: Sequence[str], asked: str, notes: list[str]) -> str:
    if not asked and "baseline" not in names:
        notes.append(f"baseline: '{names[0]}', the first arm of the table; --baseline=ARM takes another")
        return names[0]
    baseline = _name(asked or "baseline")
    if baseline not in names:
        raise UserError(f"{table.path}: no arm '{baseline}'; {suggestion(baseline, names)}")
    return baseline


@dataclass(frozen=True)
class _Reader:
    """Which columns say what of a run."""

    seed: str
    state: str  # empty: no column does
    responses: Mapping[str, Response]  # by column
    own: frozenset[str]  # phase and those of ABOUT

    def run(self, row: Row, arm: str) -> Result:
        phase = row["phase"] or "confirm" if "phase" in self.own else "confirm"
        if phase not in ("tuning", "confirm"):
            raise UserError(f"{row.where}: phase='{phase}': must be tuning or confirm")
        seed = row.integer(self.seed)
        if seed is None:
            raise UserError(f"{row.where}: '{self.seed}' is empty; fill it in")
        values = {response.name: row.number(column) for column, response in self.responses.items()}
        state = self._state(row, values.values())
        about = {name: _cell(row, name, ABOUT[name]) for name in self.own & ABOUT.keys()}
        families: dict[str, dict[str, Any]] = {name: {} for name in FAMILIES}
        for column in row.cells:
            if (family := _family(column)) and row[column] and column not in self.responses:
                families[family][column.removeprefix(f"{family}/")] = _cell(row, column, FAMILIES[family])
        fields: dict[str, Any] = {
            name: value for name, value in about.items() if value is not None
        } | families
        return Result(
            arm=arm,
            seed=seed,
            state=state,
            values=values if state == "done" else dict.fromkeys(values),
            phase="tuning" if phase == "tuning" else "confirm",
            **fields,
        )

    def _state(self, row: Row, values: Iterable[float | None]) -> State:
        word = row[self.state].lower() if self.state else ""
        if not word:
            return "done" if any(value is not None for value in values) else "pending"
        known: dict[str, State] = {**OTHER_WORDS, **{state: state for state in STATES}}
        if word not in known:
            raise UserError(f"{row.where}: {self.state}='{row[self.state]}': {suggestion(word, known)}")
        return known[word]


def _cell(row: Row, column: str, kind: type) -> Any:
    return row[column] if kind is str else row.integer(column) if kind is int else row.number(column)


def _no_row_twice(table: CsvTable, runs: Sequence[Result]) -> None:
    seen: dict[tuple[Any, ...], tuple[Result, Row]] = {}
    for run, row in zip(runs, table.rows, strict=True):
        rate = run.learning_rate if run.phase == "tuning" else None
        before, first = seen.setdefault((run.arm, run.seed, run.phase, rate), (run, row))
        if before is not run:
            rates = before.learning_rate != run.learning_rate
            advice = (
                "keep each arm's chosen rate, or write 'tuning' in a column 'phase'" if rates else "keep one"
            )
            raise UserError(
                f"{row.where}: arm '{run.arm}' has seed {run.seed} already ({first.where}); {advice}"
            )


def _absent(study: Study, runs: Iterable[Result], notes: list[str]) -> list[Result]:
    """Unfinished runs for the seeds that some arms have and others have not, so that they are counted."""
    there = {(run.arm, run.seed) for run in runs if run.phase == "confirm"}
    absent = []
    for arm in study.arms:
        seeds = [seed for seed in study.seeds if (arm.name, seed) not in there]
        if seeds:
            notes.append(f"arm '{arm.name}' has no row for seed {', '.join(map(str, seeds))}: unfinished")
        empty = {response.name: None for response in study.responses}
        absent += [Result(arm.name, seed, "pending", empty) for seed in seeds]
    return absent
