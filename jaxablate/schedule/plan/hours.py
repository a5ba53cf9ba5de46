"""Hours of a cohort from estimates of cohorts like it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxablate.estimate.facts import Estimate
from jaxablate.schedule.cohorts import Job
from jaxablate.schedule.plan.estimates import Cohort


@dataclass(frozen=True)
class Known:
    """The estimates of a study's cohorts, as far as they were made."""

    estimates: Mapping[Cohort, Estimate]

    def of(self, job: Job) -> Estimate | None:
        """The estimate of the cohort of a job, or of the one of its arm that is nearest in size; None without any."""
        own = [cohort for cohort in self.estimates if cohort.arm == job.arm]
        if not own:
            return None
        return self.estimates[min(own, key=lambda c: (abs(c.members - len(job.runs)), -c.members))]

    def hours(self, job: Job) -> float | None:
        """Hours that a job takes in one process; None if nobody has timed it or stated a rate."""
        found = self.of(job)
        whole = seconds(found, len(job.runs) / found.members) if found else None
        return None if whole is None else whole / 3600

    def gpus(self, job: Job) -> int:
        """GPUs that a job takes, all at once."""
        found = self.of(job)
        return found.devices if found else 1

    def memory(self, job: Job) -> int:
        """Bytes of a GPU that a job holds at its peak, or that a larger cohort of its arm does."""
        found = self.of(job)
        return found.memory.peak if found else 0


def seconds(estimate: Estimate, times: float = 1.0) -> float | None:
    """Seconds of a cohort with `times` as many members as the one that was estimated; None if nobody knows.

    Start and compilation stay as they are; steps, evaluations, saves and closing metrics are taken to grow with the
    members. So they do on a CPU and on a GPU that is full; one that is not gains less from fewer members than this
    says.
    """
    time = estimate.time
    if time is None:
        return None
    grows = estimate.steps * time.step_s
    grows += time.evaluations * (time.evaluate_s or 0.0) + time.saves * (time.save_s or 0.0)
    grows += time.closing_s or 0.0
    return max(time.total_s - grows, 0.0) + grows * times
