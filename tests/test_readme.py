"""The README's own study: as short as it says, and a user who copies it gets from check to report."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def study_file(repo: Path) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (repo / "README.md").read_text(), flags=re.S)
    return block


def test_a_study_of_ones_own_is_short(study_file: str) -> None:
    assert len(study_file.splitlines()) < 60


@pytest.mark.slow
def test_the_readmes_study_goes_from_check_to_report(
    study_file: str, tmp_path: Path, child_env: dict[str, str]
) -> None:
    (tmp_path / "my_study.py").write_text(study_file)

    def jaxablate(*argv: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-c", "import sys; from jaxablate.cli import main; sys.exit(main())", *argv]
        return subprocess.run(call, cwd=tmp_path, env=child_env, capture_output=True, text=True, timeout=300)

    short = ("--config.training.steps=20", "--config.training.eval_every=10")
    checked = jaxablate("check", "my_study.py")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    ran = jaxablate("run", "my_study.py", "--seeds=0,1,2", *short)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    reported = jaxablate("report", "my_study.py")
    assert reported.returncode == 0, reported.stderr
    assert "tanh_helps" in reported.stdout
    assert (tmp_path / "runs" / "sine" / "report" / "report.html").is_file()
