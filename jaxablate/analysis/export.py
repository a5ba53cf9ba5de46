"""Results as one long table, out: `arm,<factors…>,seed,…,<responses…>`, a row per run, or as rliable's scores.

`from_csv` reads the table back. Imports no jax.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from jaxablate import disk
from jaxablate.analysis.results import Results
from jaxablate.errors import UserError, suggestion

if TYPE_CHECKING:
    from pandas import DataFrame

Format = Literal["csv", "json", "parquet", "rliable"]
FORMATS: tuple[Format, ...] = get_args(Format)

# Columns about the run itself, which need no direction, and families of such columns (perf/steps_per_sec):
# fields of `Result` by the same name.
ABOUT: Mapping[str, type] = {
    "learning_rate": float,
    "run_id": str,
    "steps": int,
    "diverged_at": int,
    "parameters": int,
    "cohort_size": int,
    "hardware": str,
}
FAMILIES: Mapping[str, type] = {"seconds": float, "kernels": str, "perf": float}


def frame(results: Results) -> DataFrame:
    """The long table: a row per run, tuning runs included; a number that a run does not have is missing."""
    import pandas as pd

    table = pd.DataFrame(_rows(results))
    kinds: dict[str, type] = {**ABOUT, **{response.name: float for response in results.study.responses}}
    kinds |= {column: FAMILIES.get(column.partition("/")[0], str) for column in table if "/" in str(column)}
    dtypes = {
        int: "Int64",
        float: "float64",
    }  # Int64: an integer that is missing makes no float of the others
    return table.astype({column: dtypes[kind] for column, kind in kinds.items() if kind in dtypes})


def export(results: Results, format: Format, out: Path) -> None:
    """Writes results to the file `out`, atomically.

    `csv`, `parquet` and `json` hold the long table, `json` with the responses' directions. `rliable` holds the
    scores as that library takes them, {arm: matrix of runs x responses}: as arrays if `out` ends in .npz, else
    under `scores` in JSON. More is better in all of them: responses to minimise have their sign turned.

    Raises:
      UserError: an unknown format, a file that cannot be written, or for rliable a cell without a number.
    """
    if format not in FORMATS:
        raise UserError(f"--format={format}: {suggestion(format, FORMATS)}")
    if format == "csv":
        data = frame(results).to_csv(index=False).encode()
    elif format == "parquet":
        data = _parquet(results)
    elif format == "rliable" and out.suffix == ".npz":
        data = _npz(_scores(results))
    else:
        described = _scores_described(results) if format == "rliable" else _described(results)
        data = (json.dumps(disk.plain(described), indent=2) + "\n").encode()
    try:
        disk.write_bytes(out, data)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; give another --out") from None


def _rows(results: Results) -> list[dict[str, Any]]:
    study = results.study
    families = {family: _members(results, family) for family in FAMILIES}
    rows = []
    for run in results.runs:
        own: dict[str, Any] = {"seed": run.seed, "phase": run.phase, "state": run.state}
        own |= {name: getattr(run, name) for name in ABOUT}
        parts = [{"arm": run.arm}, study.levels(run.arm), own, run.values]
        parts += [
            {f"{family}/{key}": getattr(run, family).get(key) for key in keys}
            for family, keys in families.items()
        ]
        if twice := [key for i, part in enumerate(parts) for key in part if any(key in p for p in parts[:i])]:
            raise UserError(f"study {study.name}: '{twice[0]}' is a column of the table already; rename it")
        rows.append({key: value for part in parts for key, value in part.items()})
    return rows


def _members(results: Results, family: str) -> list[str]:
    """The keys of a family that some run has a value for."""
    found = (getattr(run, family).items() for run in results.runs)
    return list(dict.fromkeys(key for items in found for key, value in items if value is not None))


def _described(results: Results) -> dict[str, Any]:
    study = results.study
    return {
        "study": study.name,
        "plan_hash": results.plan_hash,
        "locked": results.locked,
        "source": results.source,
        "baseline": study.baseline,
        "factors": {factor.name: list(factor.levels) for factor in study.factors},
        "responses": {r.name: {"metric": r.metric, "direction": r.direction} for r in study.responses},
        "runs": _rows(results),
    }


def _parquet(results: Results) -> bytes:
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            "--format=parquet: needs pyarrow; pip install 'jaxablate[parquet]', or use --format=csv"
        ) from None
    del pyarrow  # pandas uses it
    buffer = io.BytesIO()
    frame(results).to_parquet(buffer, engine="pyarrow", index=False)
    return buffer.getvalue()


def _scores(results: Results) -> dict[str, list[list[float]]]:
    """arm -> [run][response], more is better. rliable's matrices have no room for a missing number."""
    study, scores, missing = results.study, {}, []
    for arm in study.arms:
        by_seed = {run.seed: run for run in results.of(arm.name)}
        scores[arm.name] = []
        for seed in study.seeds:
            run, row = by_seed.get(seed), []
            for response in study.responses:
                value = run.values.get(response.name) if run is not None and run.state == "done" else None
                if value is None:
                    missing.append(f"{arm.name} seed {seed} {response.name}")
                else:
                    row.append(response.better * value)
            scores[arm.name].append(row)
    if missing:
        more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
        raise UserError(
            f"--format=rliable: no number for {', '.join(missing[:6])}{more}; rliable takes complete matrices only: "
            "finish those runs, or use --format=csv"
        )
    return scores


def _scores_described(results: Results) -> dict[str, Any]:
    study = results.study
    return {
        "study": study.name,
        "orientation": "more is better; the sign of each response with sign -1 was turned",
        "tasks": [
            {"response": r.name, "metric": r.metric, "reduce": r.reduce, "sign": r.better}
            for r in study.responses
        ],
        "seeds": list(study.seeds),
        "scores": _scores(results),
    }


def _npz(scores: Mapping[str, Any]) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    # What np.savez writes; that function takes names as keywords, and cannot take an arm named `file`.
    with zipfile.ZipFile(buffer, "w") as archive:
        for arm, matrix in scores.items():
            with archive.open(f"{arm}.npy", "w") as entry:
                np.lib.format.write_array(entry, np.asarray(matrix), allow_pickle=False)
    return buffer.getvalue()
