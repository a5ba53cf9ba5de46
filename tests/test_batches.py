"""The batches of a training: which examples, in which order, whoever reads them ahead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxablate import config, data
from tests.toy import ToyTask


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def test_batches_depend_on_seed_and_step_alone() -> None:
    source = ToyTask(config.load("tests/configs/toy.py").base, "cpu").open(Path())
    alone = data.CohortBatches(source.train, [3], 8, 30)
    joined = data.CohortBatches(source.train, [0, 3, 3], 8, 100)
    for step in (0, 7, 8, 29):  # the seventh ends the first epoch of 64
        np.testing.assert_array_equal(joined[step]["index"][1], alone[step]["index"][0])
        np.testing.assert_array_equal(joined[step]["index"][1], joined[step]["index"][2])
        assert (joined[step]["index"][0] != joined[step]["index"][1]).any()
    first = np.concatenate([alone[i]["index"][0] for i in range(8)])
    assert sorted(first) == list(range(64))
    second = np.concatenate([alone[i]["index"][0] for i in range(8, 16)])
    assert sorted(second) == list(range(64))
    assert (first != second).any()


def test_epoch_that_does_not_divide_still_shows_each_example_once() -> None:
    drawn = np.concatenate([data.batch_indices(0, step, 7, 10) for step in range(1, 11)])
    for epoch in range(7):
        assert sorted(drawn[epoch * 10 : epoch * 10 + 10]) == list(range(10))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 5])
def test_reading_ahead_changes_no_batch(workers: int, start: int) -> None:
    source = ToyTask(config.load("tests/configs/toy.py").base, "cpu").open(Path())
    batches = data.CohortBatches(source.train, [0, 1], 8, 12)
    read = list(data.read(batches, start, workers))
    assert len(read) == 12 - start
    for i, batch in enumerate(read):
        np.testing.assert_array_equal(batch["index"], batches[start + i]["index"])
