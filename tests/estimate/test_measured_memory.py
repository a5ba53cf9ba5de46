"""What is predicted of a step's memory on a CPU is what the process comes to take."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.benchmarks import memory


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_predicted_memory_is_measured_within_a_fifth(repo: Path, child_env: dict[str, str]) -> None:
    large = ["--config.training.batch_size=2097152"]  # some hundred megabytes of activations
    found, wide = (
        memory.in_child(str(repo / "tests/configs/toy_study.py"), arm, large, child_env)
        for arm in ("baseline", "wide")
    )
    for arm in (found, wide):
        assert arm["measured"] > 2e8
        assert 0.8 < arm["predicted"] / arm["measured"] < 1.2
    assert wide["measured"] > 1.3 * found["measured"]  # the control: the measure follows the program
