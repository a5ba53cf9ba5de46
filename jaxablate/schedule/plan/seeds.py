"""How many seeds the declared hypotheses need, by the spread of runs that have ended, and what more of them cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxablate.analysis import results
from jaxablate.analysis.results import Results
from jaxablate.analysis.stats import hypotheses
from jaxablate.manifest import Manifest
from jaxablate.schedule.plan.plan import SeedsNeeded
from jaxablate.study import Study


@dataclass(frozen=True)
class Spread:
    """Finished runs of a study, or of its pilot.

    Attributes:
        found: those; None if there are none to go by.
        power: with which a hypothesis shall be supported if what was measured is the truth.
        rate: money for an hour of a GPU; None: not asked.
    """

    study: Study
    found: Results | None
    power: float
    rate: float | None

    @classmethod
    def of(cls, study: Study, path: Path, pilot: str, power: float, rate: float | None) -> Spread:
        """Of the pilot, if one is given, else of the runs in the study's own directory.

        Raises:
            UserError: the directory of the pilot holds no study.
        """
        if not pilot and not (path / "study.json").is_file():
            return cls(study, None, power, rate)
        manifest = Manifest.load(pilot or path)
        # The pilot's runs are asked the questions of this study, which may be other ones.
        asked = dataclasses.replace(manifest, study=study)
        return cls(study, results.load(asked), power, rate)

    def needed(self, seeds: int, hours: float | None) -> Sequence[SeedsNeeded]:
        """What each hypothesis needs.

        Args:
            seeds: of the plan.
            hours: GPU-hours of one more seed over all arms; None if unknown.
        """
        if self.found is None:
            return ()
        return tuple(
            self._priced(h, n, why, seeds, hours)
            for h, n, why in hypotheses.seeds_needed(self.found, self.power)
        )

    def _priced(
        self, name: str, needed: int | None, why: str, seeds: int, hours: float | None
    ) -> SeedsNeeded:
        more = None if needed is None else max(needed - seeds, 0)
        extra = None if more is None or hours is None else more * hours
        cost = None if extra is None or self.rate is None else extra * self.rate
        return SeedsNeeded(name, self.power, needed, more, extra, cost, why)
