"""The leaderboard: only added to, ranked in the response's own direction, and by whole arms alone."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jaxablate import disk
from jaxablate.analysis.leaderboard import Leaderboard, leaderboard, write
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.study import Response
from tests.frozen import COMMIT, freeze, toy_study, write_run

LOSSES = {
    "baseline": (1.0, 1.1, 1.2),
    "wide": (0.5, 0.6, 0.7),
    "noisy": (2.0, 2.1, 2.2),
    "wide_noisy": (1.5, 1.6, 1.7),
}


def study(workdir: Path, losses: Mapping[str, Sequence[float | None]] = LOSSES, **changes: Any) -> Manifest:
    """A study that ran: losses by arm and seed (None: diverged), and a score that goes the other way."""
    seeds = tuple(range(max(map(len, losses.values()))))
    manifest = freeze(toy_study(workdir, seeds=seeds, **changes)).lock()
    for run in manifest.runs:
        if run.seed < len(losses.get(run.arm, ())):
            loss = losses[run.arm][run.seed]
            metrics = {} if loss is None else {"val/loss": loss, "val/score": -10 * loss}
            write_run(manifest, run, "done" if loss is not None else "diverged", metrics)
    return manifest


def table(board: Leaderboard) -> list[dict[str, str]]:
    with board.csv.open(newline="") as file:
        return list(csv.DictReader(file))


def order(board: Leaderboard) -> list[str]:
    return [entry["arm"] for entry in board.ranked]


# ------------------------------------------------------------------------------------------- ranking


def test_less_loss_ranks_first_and_so_does_more_score(tmp_path: Path):
    manifest = study(tmp_path)
    by_loss = leaderboard([manifest], tmp_path / "board")
    assert (by_loss.response, by_loss.direction) == ("loss", "min")
    assert order(by_loss) == ["wide", "baseline", "wide_noisy", "noisy"]
    upside_down = {arm: tuple(-loss for loss in losses) for arm, losses in LOSSES.items()}
    by_score = leaderboard([study(tmp_path / "b", upside_down)], tmp_path / "other", response="score")
    assert (by_score.response, by_score.direction) == ("score", "max")
    assert order(by_score) == ["noisy", "wide_noisy", "baseline", "wide"]


def test_values_and_intervals_are_those_of_the_analysis(tmp_path: Path):
    row = next(row for row in table(leaderboard([study(tmp_path)], tmp_path / "b")) if row["arm"] == "wide")
    half = 4.302652729696142 * 0.1 / 3**0.5  # t(0.975, 2 df) SD / sqrt(n)
    assert float(row["metric:loss"]) == pytest.approx(0.6)
    assert float(row["metric:loss:low"]) == pytest.approx(0.6 - half)
    assert float(row["metric:loss:high"]) == pytest.approx(0.6 + half)
    assert (row["seeds"], row["done"], row["diverged"], row["label"], row["plan"]) == (
        "3",
        "3",
        "0",
        "wide",
        "locked",
    )
    assert row["commit"] == f"commit {COMMIT[:12]}"
    assert (row["extra:parameters"], row["extra:steps_per_sec"]) == ("49", "20.0")
    assert row["timestamp"].endswith("+00:00")


def test_an_arm_that_lost_a_seed_is_shown_and_not_ranked(tmp_path: Path):
    losses = {**LOSSES, "wide": (0.1, None, 0.1), "noisy": (0.1, 0.1)}
    board = leaderboard([study(tmp_path, losses)], tmp_path / "b")
    assert order(board) == ["baseline", "wide_noisy"]
    assert {entry["arm"] for entry in board.unranked} == {"wide", "noisy"}
    page = board.markdown.read_text()
    assert "2 of 3, 1 diverged" in page
    assert "of the seeds that survived" in page


def test_arms_without_any_result_have_no_row(tmp_path: Path):
    board = leaderboard([study(tmp_path, {"wide": (0.5, 0.6, 0.7)})], tmp_path / "b")
    assert [row["arm"] for row in table(board)] == ["wide"]


def test_the_page_is_a_table_with_intervals(tmp_path: Path):
    board = leaderboard([study(tmp_path)], tmp_path / "b", notes="a | b")
    lines = board.markdown.read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 4
    assert {line.count("|") for line in rows} == {rows[0].count("|")}
    assert "| 1 | toy | wide | wide | 0.6 | 0.3516 to 0.8484 | 3 | 49 | locked |" in rows[2]
    assert "less is better" in board.markdown.read_text()


def test_the_html_page_has_the_cells_of_the_markdown_and_is_escaped(tmp_path: Path):
    losses = {**LOSSES, "noisy": (0.1, None, 0.1)}
    board = leaderboard([study(tmp_path, losses)], tmp_path / "b")
    page = board.html.read_text()
    rows = [line for line in board.markdown.read_text().splitlines() if line.startswith("|")][2:]
    assert page.count("<tr>") == 1 + len(rows) == 5
    for line in rows:
        for cell in line.strip("| ").split(" | "):
            assert f">{html.escape(cell)}<" in page, cell
    assert "of the seeds that survived" in page
    assert "http" not in page.replace("http-equiv", "")
    hostile = [{**board.ranked[0], "arm": "<script>alert(1)</script>", "id": "other"}]
    found = write(hostile, tmp_path / "b", Response("val/loss", "min"))
    assert "<script>" not in found.html.read_text()
    assert "&lt;script&gt;" in found.html.read_text()


def test_a_promoted_arm_is_a_new_row_of_its_own_and_only_once(tmp_path: Path):
    manifest, out = study(tmp_path), tmp_path / "b"
    before = leaderboard([manifest], out).csv.read_text().splitlines()
    board = leaderboard([manifest], out, promoted={"wide": "best"})
    after = board.csv.read_text().splitlines()
    assert [line + "," for line in before[1:]] == after[1 : len(before)]  # a column more, blank there
    assert (board.added, board.older) == (1, 1)
    assert [row["extra:promoted"] for row in table(board)] == [""] * 4 + ["best"]
    assert "wide (promoted: best)" in board.markdown.read_text()
    assert leaderboard([manifest], out, promoted={"wide": "best"}).added == 0


# ------------------------------------------------------------------------------------------ adding


def test_the_same_result_is_added_once(tmp_path: Path):
    manifest, out = study(tmp_path), tmp_path / "b"
    first = leaderboard([manifest], out)
    before = first.csv.read_bytes()
    second = leaderboard([manifest.path], out)
    assert (first.added, second.added) == (4, 0)
    assert second.csv.read_bytes() == before
    assert order(second) == order(first)


def test_a_new_result_is_a_new_row_and_the_old_one_stays(tmp_path: Path):
    manifest, out = study(tmp_path, {"wide": (0.5, 0.6), "baseline": (1.0, 1.1, 1.2)}), tmp_path / "b"
    before = leaderboard([manifest], out).csv.read_text().splitlines()
    last = next(run for run in manifest.runs if (run.arm, run.seed) == ("wide", 2))
    write_run(manifest, last, metrics={"val/loss": 0.9, "val/score": 0.0})
    board = leaderboard([manifest], out)
    after = board.csv.read_text().splitlines()
    assert after[: len(before)] == before
    assert (board.added, board.older) == (1, 1)
    assert order(board) == ["wide", "baseline"]
    assert "1 older rows" in board.markdown.read_text()


def test_columns_are_the_union_over_studies_blank_where_unknown(tmp_path: Path):
    out = tmp_path / "b"
    first = leaderboard([study(tmp_path / "1")], out)
    count = len(table(first)[0])
    other = study(
        tmp_path / "2", name="other", responses=(Response("val/loss", "min"), Response("val/extra", "max"))
    )
    board = leaderboard([other], out, tags=["a", "b"], notes="n")
    rows = table(board)
    assert len(rows) == 8
    assert len(rows[0]) == count + 4
    assert {row["metric:extra"] for row in rows} == {""}
    assert [row["metric:score"] != "" for row in rows] == [True] * 4 + [False] * 4
    assert [(row["tags"], row["notes"]) for row in rows] == [("", "")] * 4 + [("a b", "n")] * 4
    assert len(board.ranked) == 8
    assert "compare only where data and evaluation are the same" in board.markdown.read_text()


def test_columns_and_rows_of_ones_own_are_kept(tmp_path: Path):
    out = tmp_path / "b"
    board = leaderboard([study(tmp_path / "1")], out)
    rows = [{**row, "reviewer": "me"} for row in table(board)]
    with board.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    again = table(leaderboard([study(tmp_path / "2", name="other")], out))
    assert [row["reviewer"] for row in again] == ["me"] * 4 + [""] * 4


def test_writers_at_the_same_time_lose_no_row(tmp_path: Path):
    manifests = [study(tmp_path / str(i), name=f"s{i}") for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda manifest: leaderboard([manifest], tmp_path / "b"), manifests))
    rows = table(leaderboard(manifests, tmp_path / "b"))
    assert len(rows) == 16
    assert len({row["id"] for row in rows}) == 16


# ---------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_one_line(tmp_path: Path):
    manifest, out = study(tmp_path), tmp_path / "b"
    with pytest.raises(UserError, match="no study has it; did you mean 'score'"):
        leaderboard([manifest], out, response="scoer")
    with pytest.raises(UserError, match="no such directory"):
        leaderboard([tmp_path / "none"], out)
    with pytest.raises(UserError, match="no study; give at least one"):
        leaderboard([], out)
    other = study(tmp_path / "2", name="other", responses=(Response("val/loss", "max"),), hypotheses=())
    with pytest.raises(UserError, match="toy wants the min, other the max"):
        leaderboard([manifest, other], out)
    assert not out.exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a,b\n1,2\n", b"arm,study\n"])
def test_a_file_that_is_no_leaderboard_is_left_alone(tmp_path: Path, content: bytes):
    out = tmp_path / "b"
    out.mkdir()
    (out / "leaderboard.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"leaderboard\.csv: not a leaderboard"):
        leaderboard([study(tmp_path)], out)
    assert (out / "leaderboard.csv").read_bytes() == content


def test_a_torn_leaderboard_is_named(tmp_path: Path):
    board = leaderboard([study(tmp_path)], tmp_path / "b")
    board.csv.write_bytes(board.csv.read_bytes()[:-40])
    with pytest.raises(UserError, match="row 5 has not as many cells"):
        leaderboard([study(tmp_path)], tmp_path / "b")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        leaderboard([study(tmp_path)], tmp_path / "file")


def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    manifest = study(tmp_path)
    leaderboard([manifest], tmp_path / "board")

    @contextlib.contextmanager
    def no_locks(fd: int) -> Iterator[bool]:
        yield False

    before = (tmp_path / "board" / "leaderboard.csv").read_bytes()
    monkeypatch.setattr(disk, "locked", no_locks)
    with pytest.raises(UserError, match=r"has no locks.*give another --out") as raised:
        leaderboard([manifest], tmp_path / "board", notes="more")
    assert "\n" not in str(raised.value)
    assert (tmp_path / "board" / "leaderboard.csv").read_bytes() == before


def test_json_and_text_hold_the_ranking(tmp_path: Path):
    board = leaderboard([study(tmp_path)], tmp_path / "b")
    data = board.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert [entry["arm"] for entry in data["ranked"]] == order(board)
    assert board.markdown.read_text().strip() in board.text()
    assert "4 new rows" in board.text()


def test_an_amended_plan_is_said(tmp_path: Path):
    manifest = study(tmp_path)
    amended = dataclasses.replace(manifest, amendments=({"time": "t", "hash": "h", "changes": []},))
    board = leaderboard([amended], tmp_path / "b")
    assert {entry["plan"] for entry in board.ranked} == {"amended"}
