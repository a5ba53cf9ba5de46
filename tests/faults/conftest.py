"""One nursery for all fault tests of a session, and the undisturbed run that they compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import TOY, Nursery, environment, finish


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Starts processes of the program."""
    with Nursery(environment(tmp_path_factory.mktemp("cache"))) as nursery:
        yield nursery


@pytest.fixture(scope="session")
def whole(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of the toy, trained without any disturbance."""
    return finish(nursery, TOY, tmp_path_factory.mktemp("whole"))
