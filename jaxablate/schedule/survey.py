"""Which runs a command is about, and how each of them stands right now."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from jaxablate.claims import Claim, Claimed, claim_alive, claim_holder
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest, read_rates
from jaxablate.runstore import FAILURES, OUTCOMES
from jaxablate.schedule.retries import Outlook, outlook
from jaxablate.study import Run, Study

Only = Literal["all", "missing", "failed"]


@dataclass(frozen=True)
class Selection:
    """What of a study a command is about: arms, seeds of the runs that are reported, and which states."""

    arms: frozenset[str]
    seeds: frozenset[int]
    only: Only = "all"
    before: frozenset[int] = frozenset()  # indices of the runs that had failed when the command began
    given: frozenset[int] | None = None  # indices of the only runs it is about; None: all of these arms

    @classmethod
    def of(cls, study: Study, group: str, arms: Iterable[str], seeds: Iterable[int], only: Only) -> Selection:
        """Checked against the study.

        Raises:
          UserError: no such group, arm or seed, or nothing is left of them.
        """
        arms, seeds = tuple(arms), tuple(seeds)
        names = frozenset(arm.name for arm in study.select(group, arms))
        if not names:
            raise UserError(f"--arm={','.join(arms)}: not in group '{group}'; leave one of the two out")
        for seed in seeds:
            if seed not in study.seeds:
                raise UserError(
                    f"--seeds={seed}: is not a seed of study {study.name}; valid: {list(study.seeds)}"
                )
        return cls(names, frozenset(seeds or study.seeds), only)

    def runs(self, manifest: Manifest) -> list[Run]:
        """The runs it is about. Tuning runs of its arms belong to it whatever the seeds."""
        return [
            run
            for run in manifest.runs
            if run.arm in self.arms and (run.phase == "tuning" or run.seed in self.seeds)
            if self.only == "all" or (run.index in self.before) == (self.only == "failed")
            if self.given is None or run.index in self.given
        ]

    def counts_on(self, run: Run) -> bool:
        """Whether the run itself is asked for, and not only what it teaches about the rate of others."""
        return self.given is not None or run.phase == "confirm"


@dataclass
class Survey:
    """Reads how runs stand. Outcomes are final, so they are read once."""

    since: str  # when this launch began
    retries: int
    until: tuple[str, ...] = ()  # the stages at whose end a run has done what is asked of it
    _final: dict[Run, Outlook] = field(default_factory=dict)
    _excused: Counter[Run] = field(default_factory=Counter)

    def look(self, manifest: Manifest, run: Run) -> Outlook:
        """What is to become of a run, by its history; nothing if that cannot be read, which stops no other."""
        if run not in self._final:
            training = manifest.configs[run.arm]["training"]
            micro_batch = training["batch_size"] // training["accumulation"]
            retries = self.retries + self._excused[run]
            try:
                found = outlook(manifest.run_dir(run).history(), micro_batch, self.since, retries, self.until)
            except UserError as error:
                return Outlook("bug", f"unreadable: {error}", "nothing")
            if found.state not in OUTCOMES:
                return found
            self._final[run] = found
        return self._final[run]

    def excuse(self, run: Run) -> None:
        """Leaves an interruption of a run out of the count: it was stopped for the sake of another one."""
        self._excused[run] += 1

    def failed(self, manifest: Manifest) -> frozenset[int]:
        """The indices of the runs that failed, whether or not they are to be tried again."""
        return frozenset(run.index for run in manifest.runs if self.look(manifest, run).state in FAILURES)


def taken_by(manifest: Manifest, run: Run) -> str:
    """Who works on a run, in words; empty if nobody does."""
    path = manifest.run_dir(run).claim
    if holder := claim_alive(path):
        return str(holder)
    unnamed = claim_holder(path) is None and path.exists()
    return f"a process that {path} does not name" if unnamed else ""


def close_abandoned(manifest: Manifest, run: Run) -> None:
    """Ends the attempt of a process that is gone without having said how; nobody else could."""
    where = manifest.run_dir(run)
    with contextlib.suppress(Claimed), Claim(where.claim):
        rows = where.history()
        if rows and rows[-1]["state"] == "running":
            who = f"process {rows[-1]['pid']} on {rows[-1]['host']}"
            where.end_attempt(rows[-1]["attempt"], "node_fail", f"{who} is gone and did not say why")


def without_rate(manifest: Manifest, selection: Selection) -> set[str]:
    """The arms whose rate is to be chosen: none has been, or none that worked on a narrower grid than is listed."""
    if manifest.study.learning_rate is None or selection.given is not None:
        return set()
    grids: dict[str, set[float]] = {}
    for run in manifest.runs:
        if run.phase == "tuning":
            grids.setdefault(run.arm, set()).add(run.learning_rate)
    rates = read_rates(manifest.path)
    confirmed = {run.arm for run in manifest.runs if run.phase == "confirm"}
    in_vain = {arm for arm, row in rates.items() if row["learning_rate"] is None}
    settled = {arm for arm in in_vain if grids.get(arm, set()) <= set(rates[arm].get("grid", ()))}
    return set(selection.arms - confirmed - settled)


def to_come(manifest: Manifest, selection: Selection) -> int:
    """How many runs are not in the list yet, because the rates of their arms are not chosen."""
    return 0 if selection.only == "failed" else len(without_rate(manifest, selection)) * len(selection.seeds)
