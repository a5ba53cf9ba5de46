"""Reading runs: what a damaged file costs is said, and no run is taken for what it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxablate.analysis import results
from jaxablate.analysis.board import write_board
from jaxablate.analysis.export import frame
from jaxablate.analysis.results import Result, Results
from jaxablate.analysis.stats.analyse import analyse
from jaxablate.analysis.stats.outcomes import times_to_target
from jaxablate.manifest import Manifest
from tests.analysis.made import made_study
from tests.analysis.made_dirs import made_study_dir


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return made_study_dir(tmp_path, made_study(3), rows=12, effects={"swiglu": 0.05})


def run_of(found: Results, index: int) -> Result:
    return found.runs[index]


@pytest.mark.parametrize("name", ["summary", "metrics", "perf"])
def test_a_finished_run_with_a_damaged_file_is_still_finished(manifest: Manifest, name: str) -> None:
    whole = results.load(manifest)
    assert run_of(whole, 0).state == "done" and not run_of(whole, 0).without_result and whole.notes == ()
    where = manifest.run_dir(manifest.runs[0])
    getattr(where, name).write_bytes(b"{\n{}\n")
    found = results.load(manifest)
    run = run_of(found, 0)
    assert (run.state, run.without_result, set(run.values.values())) == ("done", True, {None})
    assert [where.path.name in note for note in found.notes] == [True]
    assert frame(found)["state"].tolist()[0] == "done"
    analysis = analyse(found)
    assert any("baseline: 1 of 3 seeds have no result (1 unreadable)" in w for w in analysis.warnings)
    # It is no run that failed to reach its target.
    time = next(t for t in times_to_target(found) if t.arm == "baseline")
    assert time.runs == 2
    assert not any("did not reach" in v.reason for v in analysis.verdicts)


def test_a_damaged_history_is_unreadable_and_not_pending(manifest: Manifest) -> None:
    manifest.run_dir(manifest.runs[0]).attempts.write_bytes(b"{\n{}\n")
    found = results.load(manifest)
    assert run_of(found, 0).state == "unreadable"
    assert run_of(found, 1).state == "done"
    assert any("1 unreadable" in w for w in analyse(found).warnings)
    assert analyse(found).compute["runs_unreadable"] == 1


def test_the_start_is_that_of_the_first_attempt(manifest: Manifest) -> None:
    first, second = "2026-02-01T00:00:00.000+00:00", "2026-03-01T00:00:00.000+00:00"
    rows = [
        {"attempt": 1, "state": "running", "time": first},
        {"attempt": 1, "state": "bug", "time": first},
        {"attempt": 2, "state": "running", "time": second},
        {"attempt": 2, "state": "done", "time": second},
    ]
    history = "".join(json.dumps(row) + "\n" for row in rows)
    manifest.run_dir(manifest.runs[0]).attempts.write_text(history)
    found = results.load(manifest)
    assert (run_of(found, 0).started, run_of(found, 1).started) == (first, None)


def test_more_micro_batches_are_read(manifest: Manifest) -> None:
    where = manifest.run_dir(manifest.runs[0])
    where.summary.write_text(json.dumps({**json.loads(where.summary.read_text()), "accumulation": 4}))
    found = results.load(manifest)
    assert (run_of(found, 0).accumulation, run_of(found, 1).accumulation) == (4, 1)
    rows = [speed for speed in analyse(found).speed if speed.arm == "baseline"]
    assert {(speed.accumulation, speed.runs) for speed in rows} == {(4, 1), (1, 2)}


def test_a_damaged_config_costs_the_board_nothing_but_a_note(manifest: Manifest, tmp_path: Path) -> None:
    for run in manifest.runs:
        manifest.run_dir(run).config.write_text('{"seed": 1}')
    manifest.run_dir(manifest.runs[0]).config.write_text("{")
    found = results.load(manifest)
    out = write_board(found, analyse(found), tmp_path / "board")
    said = b"".join(path.read_bytes() for path in out.glob("events.out.tfevents.*"))
    assert b"config.json: not valid JSON" in said
    manifest.run_dir(manifest.runs[0]).config.write_text('{"seed": 1}')
    out = write_board(found, analyse(found), tmp_path / "sound")
    assert b"config.json" not in b"".join(path.read_bytes() for path in out.glob("events.out.tfevents.*"))
