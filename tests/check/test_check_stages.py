"""A task of several stages is looked at in each of them."""

from __future__ import annotations

from pathlib import Path

from jaxablate import study
from jaxablate.check import Report, check_study


def checked(repo: Path, defect: str) -> Report:
    """Of a study in two stages: the factor `late` is a penalty in the second one's loss alone."""
    spec = f"{repo}/tests/gallery/updates.py:defect={defect}"
    return check_study(study.load(spec), spec=spec, arms=["late"])


def test_a_factor_that_acts_in_the_second_stage_alone_has_an_effect(repo: Path) -> None:
    report = checked(repo, "none")
    assert not report.failed, report.table(120, verbose=True)
    (said,) = [finding for finding in report.of("late", "ok") if finding.check == "function"]
    assert "training factor 'late'" in said.reason
    assert "gradients differ by" in said.reason


def test_a_factor_that_acts_in_no_stage_is_caught(repo: Path) -> None:
    report = checked(repo, "dead_in_all_stages")
    (said,) = [finding for finding in report.of("late", "fail") if finding.check == "function"]
    assert "is set and has no effect" in said.reason
    assert "stages" in said.reason
