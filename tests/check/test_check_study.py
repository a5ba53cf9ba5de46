"""How much is checked: all of a small study, shapes and configs of a large one, and no more than was asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxablate import study
from jaxablate.check import Report, check_study, probes
from jaxablate.errors import UserError
from jaxablate.study import Study

COMPUTED = {"init", "data", "trained", "step", "response"}


def toy(repo: Path, **overrides: str) -> tuple[Study, str]:
    spec = f"{repo}/tests/configs/toy_study.py"
    pairs = [(path.replace("__", "."), value) for path, value in overrides.items()]
    return study.load(spec, pairs), spec


def skipped(report: Report) -> set[str]:
    return {finding.check for finding in report.findings if finding.verdict == "skipped"}


def test_a_sound_study_passes_with_every_rule_at_work(repo: Path) -> None:
    declared, spec = toy(repo)
    report = check_study(declared, spec=spec)
    assert not report.failed, report.table(120, verbose=True)
    assert skipped(report) == set()
    for arm in ("baseline", "wide", "split", "wide_split"):
        verdicts = {finding.check: finding.verdict for finding in report.of(arm)}
        assert verdicts.keys() >= {"config", "build", "size", "kernel", "schedule", "batch", *COMPUTED}
    assert [row.function for row in report.rows] == ["", "changed", "same", "changed"]


def test_an_override_of_the_command_line_is_no_fault_of_get_config(repo: Path) -> None:
    declared, spec = toy(repo, optim__learning_rate="0.5")
    report = check_study(declared, spec=spec, arms=["split"])
    assert not report.failed, report.table(120)


def test_static_runs_nothing_and_still_builds(repo: Path) -> None:
    declared, _ = toy(repo)
    report = check_study(declared, execute="no")
    assert not report.failed
    assert skipped(report) >= COMPUTED
    assert "build" not in skipped(report)
    assert report.rows[1].parameters == 97
    (wide,) = [finding for finding in report.of("wide", "ok") if finding.check == "function"]
    assert "reshapes 3 parameter arrays" in wide.reason  # known from shapes alone


def test_what_is_too_large_is_not_run_unless_asked(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MAX_PARAMETERS", 90)
    declared, _ = toy(repo)
    report = check_study(declared, arms=["wide"])
    assert skipped(report) >= COMPUTED
    reason = next(finding.reason for finding in report.findings if finding.check == "init")
    assert "too large to run here, beyond 90 parameters" in reason
    assert "scale=tiny" in reason
    assert "--execute" in reason
    assert skipped(check_study(declared, arms=["wide"], execute="yes")) == set()


@pytest.mark.parametrize("execute, verdict", [("auto", "skipped"), ("yes", "fail")])
def test_data_that_cannot_be_opened(repo: Path, execute, verdict: str) -> None:
    """It may lie on another machine; but who asks for everything is told that it is not there."""
    declared, _ = toy(repo, data__problem="broken")
    report = check_study(declared, arms=["wide"], execute=execute)
    found = [finding for finding in report.findings if finding.check == "data"]
    assert [(f.verdict, f.reason) for f in found] == [(verdict, "toy.csv: is broken; mend it")]
    assert report.failed == (verdict == "fail")


def test_an_arm_that_does_not_resolve_is_its_own_finding(repo: Path) -> None:
    declared, _ = toy(repo, training__batch_size="9")
    report = check_study(declared)
    (finding,) = report.of("split", "fail")
    assert finding.check == "config"
    assert "training.accumulation=2" in finding.reason
    assert not report.of("wide", "fail")


@pytest.mark.parametrize("jobs", [0, -1])
def test_no_threads_are_no_number_of_jobs(repo: Path, jobs: int) -> None:
    declared, _ = toy(repo)
    with pytest.raises(UserError, match=f"--jobs={jobs}: must be 1 or more"):
        check_study(declared, jobs=jobs)


def test_no_arm_is_not_every_arm(repo: Path) -> None:
    declared, _ = toy(repo)
    with pytest.raises(UserError, match="no arm is selected; name one of baseline, "):
        check_study(declared, arms=())


def test_an_unknown_arm_is_named(repo: Path) -> None:
    declared, _ = toy(repo)
    with pytest.raises(UserError, match="no arm 'wid'; did you mean 'wide'"):
        check_study(declared, arms=["wid"])
