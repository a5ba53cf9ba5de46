"""`jaxablate run`: its arguments, and what it does with them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxablate.schedule.plan import verbs as planning
from jaxablate.schedule.slurm.verbs import ON_FINISH

if TYPE_CHECKING:
    from jaxablate.schedule.local import Ended


@dataclass(frozen=True)
class Preview:
    """What would be run."""

    plan: str
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As data, for `--json`."""
        return {"dry_run": self.plan.splitlines()}

    def text(self) -> str:
        """In words."""
        return self.plan


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes besides a study, arms, seeds and a group."""
    planning.place_arguments(parser)
    add = parser.add_argument
    add("--only", choices=("all", "missing", "failed"), default="all", help="of what is left")
    add("--fail-fast", action="store_true", help="stop everything at the first failure")
    add("--dry-run", action="store_true", help="print what would run; write nothing")
    add("--max-members", type=int, default=0, metavar="N", help="runs in one cohort at most")
    add(
        "--workers", type=int, default=0, metavar="N", help="cohorts at a time (default: one per GPU, or two)"
    )
    add("--on-finish", default="", metavar="CMD", help=ON_FINISH)


def run(
    args: argparse.Namespace,
    overrides: Sequence[tuple[str, str]],
    show: Callable[[Ended | Preview], int],
) -> int:
    """Carries `run` out; the exit code. `show` says how it came out before `--on-finish` may end the machine."""
    from jaxablate import study
    from jaxablate.schedule import local, on_finish

    program = on_finish.parse(args.on_finish)
    options = local.RunOptions.of(
        args, only=args.only, on_failure="stop" if args.fail_fast else "go on", workers=args.workers
    )
    declared = study.load(args.study, overrides)
    options.selection(declared)  # a mistake in the command is not the end of a launch
    planning.wanted(args)
    if args.dry_run:
        return show(Preview(local.dry_run(declared, planning.followed(args, overrides, declared, options))))
    with on_finish.calling(program, local.directory(declared)) as finish:
        options = planning.followed(args, overrides, declared, options)  # which may time steps for minutes
        finish.exit_code = show(local.run_study(declared, options))
    return finish.exit_code
