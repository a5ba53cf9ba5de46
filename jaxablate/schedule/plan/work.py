"""What of a study remains to be trained, as the cohorts in which `run` will train it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxablate.config import RunConfig, canonical
from jaxablate.manifest import Manifest
from jaxablate.runstore import OUTCOMES, now
from jaxablate.schedule import cohorts
from jaxablate.schedule.cohorts import Job
from jaxablate.schedule.retries import PENDING, Outlook
from jaxablate.schedule.survey import Selection, Survey, without_rate
from jaxablate.study import Run, Study

TO_BE_CHOSEN = 0.0  # the learning rate of a run whose arm has none yet


@dataclass(frozen=True)
class Fit:
    """What the memory of a GPU leaves to an arm."""

    members: int | None = None  # of a cohort at most; None: any number
    split: int = 1  # times more micro-batches than the config says


@dataclass(frozen=True)
class Remaining:
    """What of a study has no outcome yet.

    Attributes:
        manifest: the study as it is frozen, or would be.
        selection: what of it is asked for.
        outlooks: of every run that is listed.
        waiting: arms whose learning rate is to be chosen, so that their confirmatory runs are not listed yet.
    """

    manifest: Manifest
    selection: Selection
    outlooks: Mapping[Run, Outlook]
    waiting: frozenset[str]

    @classmethod
    def of(cls, study: Study, resolved: Mapping[str, RunConfig[Any, Any]], selection: Selection) -> Remaining:
        """Looks at the study's directory, if there is one. Writes nothing."""
        manifest, survey = Manifest.preview(study, resolved), Survey(now(), 1)
        looks = {run: survey.look(manifest, run) for run in manifest.runs}
        return cls(manifest, selection, looks, frozenset(without_rate(manifest, selection)))

    @property
    def digest(self) -> str:
        """Of the declaration and the arms' configs, whatever of them has run."""
        what = {
            "plan": self.manifest.study.plan,
            "configs": {arm: self.manifest.configs[arm] for arm in self.arms},
        }
        return hashlib.sha256(canonical(what).encode()).hexdigest()[:16]

    @property
    def arms(self) -> tuple[str, ...]:
        """Those that are asked for, as declared."""
        return tuple(arm.name for arm in self.manifest.study.arms if arm.name in self.selection.arms)

    @property
    def begun(self) -> frozenset[int]:
        """The seeds of which some arm has an outcome: to drop one of these would leave the design unbalanced."""
        return frozenset(
            run.seed
            for run, look in self.outlooks.items()
            if run.phase == "confirm" and look.state in OUTCOMES and run.arm in self.selection.arms
        )

    @property
    def ended(self) -> int:
        """Runs that are asked for and have their outcome."""
        return sum(self.outlooks[run].state in OUTCOMES for run in self.selection.runs(self.manifest))

    @property
    def given_up(self) -> int:
        """Runs that are asked for and that nobody trains unless `retry` says so: failed ones, and cancelled ones."""
        return (
            sum(self.outlooks[run].next == "nothing" for run in self.selection.runs(self.manifest))
            - self.ended
        )

    def jobs(
        self,
        seeds: Sequence[int],
        places: int,
        max_members: int = 0,
        rooms: Mapping[str, Fit] | None = None,
        of: Literal["what is left", "all"] = "what is left",
    ) -> list[Job]:
        """The cohorts of these seeds alone, as a launcher with so many GPUs forms them.

        `all`: as if nothing had run yet.
        """
        rooms = rooms or {}
        kept = dataclasses.replace(self.selection, seeds=frozenset(seeds))
        runs = [run for run in kept.runs(self.manifest) if of == "all" or self.outlooks[run].next == "train"]
        runs += [
            Run(len(self.manifest.runs) + n, arm, "confirm", seed, TO_BE_CHOSEN, "", "")
            for arm in (arm.name for arm in self.manifest.study.arms)
            if arm in self.waiting
            for n, seed in enumerate(sorted(seeds, key=self.manifest.study.seeds.index))
        ]
        most = cohorts.most(self.manifest.study, len(kept.arms), len(kept.seeds), places, max_members)
        looks = {run: self._look(run, rooms.get(run.arm, Fit())) for run in runs}
        return cohorts.plan(runs, looks, most)

    def _look(self, run: Run, room: Fit) -> Outlook:
        look = self.outlooks.get(run, PENDING)
        limits = [limit for limit in (look.members, room.members) if limit]
        return dataclasses.replace(look, members=min(limits, default=None), split=max(look.split, room.split))
