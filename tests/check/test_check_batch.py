"""The rule on throughput by itself: an arm's batch that nobody declared cannot come from a config, so it is made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jaxablate import config
from jaxablate.check.batch import batch
from jaxablate.check.case import Beside, Said
from jaxablate.study import switch


def probe(**overrides: Any) -> Any:
    pairs = {key.replace("__", "."): str(value) for key, value in overrides.items()}
    return SimpleNamespace(run=config.load("tests/configs/toy.py", pairs.items()).base)


def judged(here: Any, there: Any, declared: str) -> list[Said]:
    factor = switch("f", "training", {declared: 0})
    beside = Beside("baseline", "the baseline", there, (factor,), (declared,))
    case: Any = SimpleNamespace(probe=here, beside=(beside,))
    saying, said = batch(case), []
    try:
        while True:
            said.append(next(saying))
    except StopIteration as end:
        return said or [end.value]


@pytest.fixture(autouse=True)
def _in_repo(repo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def test_another_batch_is_reported_unless_a_factor_declares_it() -> None:
    here, there = probe(training__batch_size=16), probe(training__batch_size=8)
    (found,) = judged(here, there, "optim.b2")
    assert found.verdict == "fail" and "effective batch is 16, in the baseline it is 8" in found.reason
    assert [said.verdict for said in judged(here, there, "training.batch_size")] == ["ok"]


def test_the_same_batch_in_other_parts_is_right() -> None:
    here = probe(training__batch_size=16, training__accumulation=2, host__mesh__data=4)
    (found,) = judged(here, probe(training__batch_size=16), "training.accumulation")
    assert found.verdict == "ok" and "batch 16 = 2 x 2 x 4" in found.reason


def test_parts_that_do_not_come_out_even_are_reported() -> None:
    here = probe(training__batch_size=16, training__accumulation=8, host__mesh__data=4)
    (found,) = judged(here, probe(training__batch_size=16), "training.accumulation")
    assert found.verdict == "fail" and "2 examples each" in found.reason
