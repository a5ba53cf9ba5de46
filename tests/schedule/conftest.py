"""Launchers in processes of their own, as a user has them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxablate.manifest import Manifest

Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def launch(repo: Path, child_env: dict[str, str], tmp_path: Path) -> Launch:
    """`launch("slow", workers=1)`: a launcher of a toy study in `tmp_path`."""

    def start(study: str, workdir: Path = tmp_path, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.schedule.toy_studies", study, str(workdir)]
        return subprocess.Popen(
            [*command, json.dumps(options)],
            cwd=repo,
            env=child_env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def histories() -> Callable[[Path], dict[str, list[str]]]:
    """`arm seed rate` -> the states of a run's history, of every run below a workdir."""

    def read(workdir: Path) -> dict[str, list[str]]:
        manifest = Manifest.load(workdir / "toy")
        return {
            f"{run.arm} {run.seed} {run.learning_rate:g}": [
                row["state"] for row in manifest.run_dir(run).history()
            ]
            for run in manifest.runs
        }

    return read
