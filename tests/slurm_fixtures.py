"""The clusters of the tests: a conftest.py imports from here what its tests use.

    from tests.slurm_fixtures import slurm, slurm_cluster

One cluster serves a session, and each test finds it idle. While a test runs, SLURM_CONF names its cluster.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm_lab import Accounting, Lab, missing

__all__ = ["slurm", "slurm_cluster", "slurm_with_accounting", "slurm_with_accounting_cluster"]

REQUIRE = "JAXABLATE_REQUIRE_SLURM"  # set where a machine without SLURM is a mistake


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Lab]:
    """Four nodes of four CPUs and two GPUs (made of air), no accounting: `sacct` answers nothing."""
    _need("none")
    with Lab(nodes=4) as lab:
        yield lab


@pytest.fixture(scope="session")
def slurm_with_accounting_cluster() -> Iterator[Lab]:
    """Two nodes, and slurmdbd, whose database takes some seconds to make.

    squeue soon forgets what has ended, and the limits of accounts and QOS hold; there are none at first.
    """
    _need("slurmdbd")
    limits = "AccountingStorageEnforce=associations,limits,qos"
    with Lab(nodes=2, accounting="slurmdbd", min_job_age=2, extra=limits) as lab:
        yield lab


@pytest.fixture
def slurm(slurm_cluster: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """The cluster of four nodes, with an empty queue."""
    yield from _for_one_test(slurm_cluster, monkeypatch)


@pytest.fixture
def slurm_with_accounting(
    slurm_with_accounting_cluster: Lab, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Lab]:
    """The cluster whose `sacct` answers, with an empty queue."""
    yield from _for_one_test(slurm_with_accounting_cluster, monkeypatch)


def _for_one_test(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(lab.conf))
    yield lab
    lab.reset()


def _need(accounting: Accounting) -> None:
    if lacking := missing(accounting):
        what = f"{', '.join(lacking)}: not on this machine; .ci/run says which packages have them"
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{what} ({REQUIRE}=1)")
        pytest.skip(what)
