"""Which runs are trained together: the runs of one arm and phase are one program, and one job."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jaxablate.schedule.retries import Outlook
from jaxablate.study import Phase, Run, Study


@dataclass(frozen=True)
class Job:
    """Runs that one worker trains as a cohort; `behind` is the stage at whose end all of them were left, if any."""

    arm: str
    phase: Phase
    runs: tuple[Run, ...]
    split: int = 1
    behind: str = ""

    def __str__(self) -> str:
        seeds = ",".join(map(str, sorted({run.seed for run in self.runs})))
        rates = ",".join(f"{rate:g}" for rate in sorted({run.learning_rate for run in self.runs}))
        many = f", {len(self.runs)} members" if len(self.runs) > 1 else ""
        split = f", micro-batches split by {self.split}" if self.split > 1 else ""
        return f"{self.arm} ({self.phase}): seeds {seeds}, learning rate {rates}{many}{split}"


def most(study: Study, arms: int, seeds: int, places: int, limit: int = 0) -> dict[Phase, int]:
    """Members of a cohort at most: enough for a whole arm, but no GPU shall idle beside a large one.

    It depends on the declaration alone, not on what is left of it, so that a run that is taken up again
    has the company it had, and rounds as it did.

    Args:
      arms, seeds: how many of them are to be trained.
      places: GPUs; 1 on a CPU.
      limit: what the user allows; 0: any number.
    """
    rule = study.learning_rate
    totals: dict[Phase, int] = {"confirm": arms * seeds, "tuning": 1}
    if rule is not None:
        totals["tuning"] = arms * rule.most_rates * len(rule.tuning_seeds)
    return {phase: limit or -(-total // places) for phase, total in totals.items()}


def plan(runs: Iterable[Run], outlooks: Mapping[Run, Outlook], most: Mapping[Phase, int]) -> list[Job]:
    """The jobs that train `runs`, in the order of the frozen list.

    Args:
      runs: those to train now.
      outlooks: of `runs`, and of any others whose history teaches how much memory their arm needs.
      most: members of a cohort at most, by phase.
    """
    groups: dict[tuple[Phase, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.index):
        groups.setdefault((run.phase, run.arm), []).append(run)
    jobs = []
    for (phase, arm), own in groups.items():
        taught = [look for run, look in outlooks.items() if run.arm == arm]
        split = max(look.split for look in taught)
        limit = min([most[phase], *(look.members for look in taught if look.members)])
        together = [run for run in own if outlooks[run].company == "cohort"]
        parts = [*_parts(together, limit), *((run,) for run in own if outlooks[run].company == "alone")]
        jobs += [Job(arm, phase, part, split, _behind(part, outlooks)) for part in parts]
    return jobs


def _behind(runs: Iterable[Run], outlooks: Mapping[Run, Outlook]) -> str:
    stages = {outlooks[run].behind for run in runs}
    return stages.pop() if len(stages) == 1 else ""


def _parts(runs: Sequence[Run], limit: int) -> list[tuple[Run, ...]]:
    """Equal parts, as far as they go: cohorts of one size share a compiled program."""
    size = math.ceil(len(runs) / max(math.ceil(len(runs) / limit), 1))
    return [tuple(runs[i : i + size]) for i in range(0, len(runs), size or 1)]
