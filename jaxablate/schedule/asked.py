"""What of a study `plan`, `run` and `submit` are asked for: the options that they have in common."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from jaxablate.errors import UserError

if TYPE_CHECKING:
    from jaxablate.schedule.plan.plan import Plan
    from jaxablate.schedule.survey import Only, Selection
    from jaxablate.study import Study


@dataclass(frozen=True)
class Asked:
    """What of a study a command names.

    Attributes:
        group, arms, seeds: of the study; empty: all.
        max_members: runs of a cohort at most; 0: any number.
    """

    group: str = ""
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    max_members: int = 0

    def __post_init__(self) -> None:
        if self.max_members < 0:
            raise UserError(f"--max-members={self.max_members}: must be 0 or more")

    @classmethod
    def of(cls, args: argparse.Namespace, **own: Any) -> Self:
        """As the command line says; `own` are the fields that only this command has."""
        return cls(
            group=args.group,
            arms=tuple(args.arm),
            seeds=tuple(args.seeds),
            max_members=args.max_members,
            **own,
        )

    def selection(self, study: Study) -> Selection:
        """The same, checked against the study.

        Raises:
            UserError: no such group, arm or seed, or nothing is left of them.
        """
        from jaxablate.schedule.survey import Selection

        return Selection.of(study, self.group, self.arms, self.seeds, "all")


@dataclass(frozen=True)
class Launch(Asked):
    """What of a study is to be trained.

    Attributes:
        only: of what is left.
        plan: to follow: its seeds, its order, the members that fit, and where `run` trains its GPUs.
    """

    only: Only = "all"
    plan: Plan | None = None

    def selection(self, study: Study) -> Selection:
        """The same, checked against the study, without the seeds that the plan drops."""
        from jaxablate.schedule.survey import Selection

        seeds = self.plan.seeds if self.plan else self.seeds
        return Selection.of(study, self.group, self.arms, seeds, self.only)
