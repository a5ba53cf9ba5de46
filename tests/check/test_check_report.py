"""What a person and a program read of a check: all that is not ok, said once, in the width that there is."""

from __future__ import annotations

import json

from jaxablate.check import Finding, Report
from jaxablate.check.report import Row

ROWS = (
    Row("baseline", {}, "", 23_430_000, 2.4e12, "reference"),
    Row("flash_only", {"model.image.attention.impl": "flash"}, "same", 23_430_000, 2.4e12, "blockwise"),
    Row("nope", {"model.position": "none"}, "SAME", 22_700_000, None, ""),
)
FINDINGS = (
    Finding("baseline", "size", "ok", "23,430,000 parameters"),
    Finding("baseline", "response", "note", "declares no chance"),
    Finding("flash_only", "response", "note", "declares no chance"),
    Finding("nope", "response", "note", "declares no chance"),
    Finding("nope", "function", "fail", "a model factor that changes nothing", {"loss": float("nan")}),
    Finding("flash_only", "init", "skipped", "too large"),
    Finding("flash_only", "step", "skipped", "too large"),
)
REPORT = Report("clip", "baseline", ROWS, FINDINGS, 12.3)


def test_a_row_for_each_arm_and_below_what_is_not_ok() -> None:
    text = REPORT.table(120)
    lines = text.splitlines()
    (nope,) = [line for line in lines if line.startswith(" nope")]
    for word in ("position=none", "SAME", "22.70 M −", "FAIL: function"):
        assert word in nope
    (flash,) = [line for line in lines if line.startswith(" flash_only")]
    for word in ("attention.impl=flash", "23.43 M =", "2400 =", "blockwise", "ok, not run"):
        assert word in flash
    assert "FAIL    nope: function: a model factor that changes nothing" in lines
    assert "skipped flash_only: init, step: too large" in lines
    assert "note    all arms: response: declares no chance" in lines
    assert "23,430,000" not in text
    assert "23,430,000" in REPORT.table(120, verbose=True)
    assert lines[-1] == "clip: 3 arms, 1 checks ok, 1 failed, 3 noted, 2 skipped, not run, 12 s"
    assert "check --execute runs them here" in " ".join(lines)
    assert "NOT RUN: 1 of 3 arms, so checks are missing there, wholly or in part: init, step" in text


def test_what_ran_in_full_says_nothing_of_it() -> None:
    whole = Report("clip", "baseline", ROWS, FINDINGS[:5], 1.0).table(120)
    assert "not run" not in whole.lower()


def test_no_line_is_wider_than_asked() -> None:
    for width in (80, 120, 200):
        assert max(map(len, REPORT.table(width, verbose=True).splitlines())) <= width


def test_failed_is_what_failed() -> None:
    assert REPORT.failed
    assert not Report("clip", "baseline", ROWS, FINDINGS[:4] + FINDINGS[5:], 1.0).failed


def test_as_data() -> None:
    data = json.loads(json.dumps(REPORT.to_dict(), allow_nan=False))
    assert data["failed"] is True
    assert [arm["verdict"] for arm in data["arms"]] == ["ok", "ok", "fail"]
    (finding,) = [f for f in data["arms"][2]["findings"] if f["verdict"] == "fail"]
    assert finding == {
        "check": "function",
        "verdict": "fail",
        "reason": "a model factor that changes nothing",
        "values": {"loss": None},
    }
