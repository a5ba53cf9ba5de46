"""`jaxablate submit`: its arguments, and what it does with them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxablate.errors import UserError
from jaxablate.schedule.plan import verbs as planning

if TYPE_CHECKING:
    from jaxablate.schedule.slurm.site import Site
    from jaxablate.schedule.slurm.submit import Submitted

ON_FINISH = (
    "call this program once, with its arguments in one text, when all has ended, well or not, or a signal has "
    "stopped it; not for a job that goes back into the queue"
)


def submit_arguments(parser: argparse.ArgumentParser) -> None:
    """What `submit` takes besides a study, arms, seeds and a group."""
    planning.place_arguments(parser)
    add = parser.add_argument
    add("--only", choices=("all", "missing", "failed"), default="all", help="of what is left")
    add("--site", default="", metavar="FILE.toml", help="profile of the site (default: SLURM's own defaults)")
    add("--array-limit", type=int, metavar="K", help="elements at a time")
    add("--time", metavar="HH:MM:SS", help="of one attempt; what has not ended is requeued")
    add("--signal", metavar="NAME@SECONDS", help="what stops an element before its time is over")
    add("--max-members", type=int, default=0, metavar="N", help="runs in one cohort at most")
    add("--max-attempts", type=int, metavar="N", help="starts of one element at most")
    add("--stages", choices=("whole", "chained"), default="whole", help="chained: an element for each stage")
    add("--on-finish", default="", metavar="CMD", help=ON_FINISH)
    add(
        "--prepare",
        action="store_true",
        help="freeze study and elements, print the sbatch lines; submit nothing",
    )
    add("--dry-run", action="store_true", help="print the sbatch lines and the script; write nothing")


def _at_a_time(gpus: int, site: Site) -> int:
    """How many elements may run together on so many GPUs."""
    from jaxablate.schedule.slurm.elements import places

    if gpus < (own := places(site)):
        raise UserError(
            f"--gpus={gpus}: an element takes {own} on this site (gres={site.gres!r}); give {own} or more"
        )
    return gpus // own


def submit(args: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> Submitted:
    """Carries `submit` out."""
    from jaxablate import study
    from jaxablate.schedule import on_finish
    from jaxablate.schedule.slurm import site as sites
    from jaxablate.schedule.slurm.left import SubmitOptions
    from jaxablate.schedule.slurm.submit import submit

    if args.dry_run and args.prepare:
        raise UserError("--dry-run: not allowed with --prepare; drop one of them")
    site = sites.load(args.site)
    for name in ("array_limit", "time", "signal", "max_attempts"):
        if (value := getattr(args, name)) is not None:
            site = sites.replaced(site, {name: value}, f"--{name.replace('_', '-')}")
    options = SubmitOptions.of(
        args, only=args.only, stages=args.stages, on_finish=on_finish.parse(args.on_finish)
    )
    declared = study.load(args.study, overrides)
    options = planning.submitted(args, declared, options)
    if options.plan is not None:
        own = _at_a_time(args.gpus, site)
        site = sites.replaced(site, {"array_limit": min(own, site.array_limit or own)}, "--gpus")
    mode: Any = "dry run" if args.dry_run else "prepare" if args.prepare else "submit"
    return submit(declared, site, options, mode)
