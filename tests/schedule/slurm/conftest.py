"""Real clusters for the tests of `jaxablate.schedule.slurm`."""

from tests.slurm_fixtures import (
    slurm,
    slurm_cluster,
    slurm_with_accounting,
    slurm_with_accounting_cluster,
)

__all__ = ["slurm", "slurm_cluster", "slurm_with_accounting", "slurm_with_accounting_cluster"]
