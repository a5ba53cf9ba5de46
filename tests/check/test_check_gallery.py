"""Every broken study of the gallery is caught with a message that names the defect; its repaired twin passes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from jaxablate import study
from jaxablate.check import Report, check_study

FAMILIES = ("pairing", "cover", "answers", "order", "updates", "transformer", "files")
EXHIBITS = [
    (family, defect, exhibit)
    for family in FAMILIES
    for defect, exhibit in importlib.import_module(f"tests.gallery.{family}").EXHIBITS.items()
]


def checked(repo: Path, family: str, defect: str, arms: tuple[str, ...] | None = None) -> Report:
    spec = f"{repo}/tests/gallery/{family}.py:defect={defect}"
    return check_study(study.load(spec), spec=spec, arms=arms)


@pytest.mark.parametrize("family, defect, exhibit", EXHIBITS, ids=[f"{f}-{d}" for f, d, _ in EXHIBITS])
def test_a_broken_study_is_caught_by_name(repo: Path, family, defect, exhibit) -> None:
    report = checked(repo, family, defect, (exhibit.arm, *exhibit.beside))
    said = [f.reason for f in report.of(exhibit.arm, exhibit.verdict) if f.check == exhibit.check]
    caught = [reason for reason in said if all(word in reason for word in exhibit.words)]
    assert caught, report.table(120, verbose=True)
    assert report.failed == (exhibit.verdict == "fail")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_repaired_twin_passes(repo: Path, family: str) -> None:
    twins = {"transformer": ("baseline", "flash", "rms", "nope", "swiglu", "flash_rms", "flash_offsets")}
    report = checked(repo, family, "none", twins.get(family))
    assert not report.failed, report.table(120, verbose=True)
    assert {finding.verdict for finding in report.findings} <= {"ok", "note"}
