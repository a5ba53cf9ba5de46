"""`jaxablate plan`, and what `run --gpus --deadline` has of it: their arguments, and what is done with them."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxablate.errors import UserError, suggestion
from jaxablate.schedule.asked import Asked
from jaxablate.targets import CPU, TARGETS

if TYPE_CHECKING:
    from jaxablate.schedule import local
    from jaxablate.schedule.plan.plan import Plan, Request
    from jaxablate.schedule.plan.work import Remaining
    from jaxablate.schedule.slurm import left
    from jaxablate.schedule.slurm.site import Site
    from jaxablate.study import Study

logger = logging.getLogger(__name__)

Overrides = Sequence[tuple[str, str]]

NOT_MET = 3  # exit code: something does not fit
_HOURS = {"s": 1 / 3600, "m": 1 / 60, "h": 1.0, "d": 24.0}
_DEADLINE = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


@dataclass(frozen=True)
class PlanOptions(Asked):
    """What a plan is asked for.

    Attributes:
        target: a name of `targets`, or `cpu`; empty: this machine.
        gpus: 0: those of this machine, or one of a target.
        deadline: hours.
        rate: money for an hour of a GPU.
        mfu: share of the peak that steps are taken to reach.
        probe: whether steps are timed here.
        share: of a GPU that a cohort keeps busy.
        pilot: directory of a study with finished runs.
        power: of the hypotheses.
    """

    target: str = ""
    gpus: int = 0
    deadline: float | None = None
    rate: float | None = None
    mfu: float | None = None
    probe: bool = False
    share: float = 1.0
    pilot: str = ""
    power: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target not in ("", CPU, *TARGETS):
            raise UserError(
                f"--target={self.target}: unknown target; {suggestion(self.target, (CPU, *TARGETS))}"
            )
        if self.deadline is not None and not self.gpus:
            raise UserError(f"--deadline={self.deadline:g}h: on how many GPUs? Give --gpus=N")
        if self.probe and self.target:
            raise UserError("--probe: times steps on this machine; leave --target out, or give --mfu instead")
        if self.probe and self.mfu is not None:
            raise UserError("--probe: not allowed with --mfu; drop one of them")
        for name, value, least, most in (
            ("rate", self.rate, 0.0, math.inf), ("mfu", self.mfu, 0.0, 1.0), ("share", self.share, 0.0, 1.0),
            ("power", self.power, 0.0, 1.0),
        ):  # fmt: skip
            if value is not None and not (least < value <= most and math.isfinite(value)):
                bounds = f"above {least:g}" + (f" and at most {most:g}" if math.isfinite(most) else "")
                raise UserError(f"--{name}={value:g}: must be {bounds}")


@dataclass(frozen=True)
class Planned:
    """A plan, and where it lies."""

    plan: Plan
    written: tuple[Path, ...]
    detail: str

    @property
    def exit_code(self) -> int:
        """3 if the deadline cannot be met, or an arm does not fit or cannot be estimated."""
        return NOT_MET if self.plan.short or any(arm.problem for arm in self.plan.arms) else 0

    def to_dict(self) -> dict[str, Any]:
        """As data, for `--json`."""
        return {**self.plan.to_dict(), "written": [str(path) for path in self.written]}

    def text(self) -> str:
        """As a table."""
        from jaxablate.schedule.plan.table import table

        files = "\n".join(str(path) for path in self.written)
        return f"{table(self.plan, 'full' if self.detail == 'full' else 'brief')}\n\n{files}"


# ---------------------------------------------------------------------------------------- arguments


def place_arguments(parser: argparse.ArgumentParser) -> None:
    """What `plan`, `run` and `submit` have in common: on how many GPUs, and by when."""
    add = parser.add_argument
    add("--gpus", type=_gpus, default=0, metavar="N", help="GPUs to use; processes at a time on a CPU")
    add(
        "--deadline",
        type=hours,
        default=None,
        metavar="6h",
        help="drop whole seeds that do not fit: 90m, 6h, 2d",
    )


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """What `plan` takes beside STUDY, --group, --arm and --seeds."""
    place_arguments(parser)
    add = parser.add_argument
    add("--target", default="", metavar="GPU", help=f"{', '.join(TARGETS)} or cpu (default: this machine)")
    add("--rate", type=float, metavar="3.5", help="price of an hour of a GPU")
    add("--mfu", type=float, metavar="0.4", help="hours from this share of the GPU's peak")
    add("--probe", action="store_true", help="hours from steps that are timed here")
    add("--share", type=float, default=1.0, metavar="F", help="of a GPU that a cohort keeps busy (default 1)")
    add(
        "--pilot", default="", metavar="DIR", help="a study with finished runs, for the seeds that are needed"
    )
    add("--power", type=float, default=0.8, metavar="P", help="for which seeds are counted (default 0.8)")
    add("--max-members", type=int, default=0, metavar="N", help="runs in one cohort at most")
    add("--site", default="", metavar="FILE", help="a site's profile, for its time limit")
    add("--out", default="", metavar="DIR", help="folder of plan.json and plan.png (default: the study's)")
    add("--explain", action="store_true", help="every choice and every cohort")


def hours(text: str) -> float:
    """Hours of `90m`, `6h` or `2d`."""
    found = _DEADLINE.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"'{text}': write a time as 90m, 6h or 2d")
    return float(found[1]) * _HOURS[found[2]]


def _gpus(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}': must be 1 or more")
    return int(text)


# -------------------------------------------------------------------------------------------- verbs


def plan(args: argparse.Namespace, overrides: Overrides) -> Planned:
    """Makes a plan and writes it down."""
    from jaxablate import study

    options = PlanOptions.of(
        args,
        target=args.target,
        gpus=args.gpus,
        deadline=args.deadline,
        rate=args.rate,
        mfu=args.mfu,
        probe=args.probe,
        share=args.share,
        pilot=args.pilot,
        power=args.power,
    )
    site = None
    if args.site:
        from jaxablate.schedule.slurm.site import load

        site = load(args.site)
    made, folder = make_plan(study.load(args.study, overrides), args.study, overrides, options, site)
    written = _write(made, Path(args.out) if args.out else folder)
    return Planned(made, written, "full" if args.explain else "brief")


def _write(made: Plan, folder: Path) -> tuple[Path, ...]:
    """plan.json, and its picture if its cohorts have places; the files."""
    from jaxablate.schedule.plan import gantt

    path, picture = made.save(folder), folder / "plan.png"
    if not made.elements:
        picture.unlink(missing_ok=True)  # of the plan before
        return (path,)
    gantt.save(made, picture)
    return path, picture


def make_plan(
    study: Study, spec: str, overrides: Overrides, options: PlanOptions, site: Site | None = None
) -> tuple[Plan, Path]:
    """The plan of a study, and the study's directory. Writes nothing but estimates into the cache.

    Args:
        study: as `spec` and `overrides` declare it.
        spec: its file with its argument, from which the processes that estimate load it again.
        overrides: of its base config.
        options: what is asked.
        site: whose time limit the cohorts are held against.

    Raises:
        UserError: bad options, or nothing of the study can be estimated, with the first reason.
    """
    from jaxablate.schedule import local
    from jaxablate.schedule.plan.estimates import Estimator
    from jaxablate.schedule.plan.make import make
    from jaxablate.schedule.plan.seeds import Spread
    from jaxablate.schedule.plan.work import Remaining

    resolved = local.resolve(study)
    work = Remaining.of(study, resolved, options.selection(study))
    wanted = request(work, options)
    estimator = Estimator(
        spec=spec,
        overrides=overrides,
        resolved=resolved,
        target=options.target,
        mfu=options.mfu,
        device="" if options.target else wanted.target,
        probe="yes" if options.probe else "no",
        beside=wanted.gpus if wanted.on_cpu else 1,
    )
    spread = Spread.of(study, work.manifest.path, options.pilot, options.power, options.rate)
    made = make(work, wanted, estimator.estimate, spread.needed)
    problems = [arm.problem for arm in made.arms]
    if problems and all(problems) and not any(arm.memory for arm in made.arms):
        raise UserError(problems[0])
    notes = (*made.notes, *_of_site(made, site))
    return dataclasses.replace(made, notes=notes), work.manifest.path


def wanted(args: argparse.Namespace) -> PlanOptions | None:
    """The plan that `run` asks for; None if it asks for none.

    Raises:
        UserError: a mistake in the command.
    """
    if not args.gpus and args.deadline is None:
        return None
    from jaxablate.schedule import workers

    if args.workers:
        raise UserError(f"--workers={args.workers}: not allowed with --gpus, which says it; drop one of them")
    if 0 < len(gpus := workers.gpus()) < args.gpus:
        raise UserError(f"--gpus={args.gpus}: this machine has {len(gpus)}")
    return PlanOptions.of(args, gpus=args.gpus, deadline=args.deadline, probe=True)


def followed(
    args: argparse.Namespace, overrides: Overrides, study: Study, options: local.RunOptions
) -> local.RunOptions:
    """The options of `run` with a plan to follow, if --gpus asks for one.

    It is the plan that lies in the study's directory if it answers to the same request for such a machine. Else a
    new one is made, with steps timed here, and written there unless it is a dry run.
    """
    if (asked := wanted(args)) is None:
        return options
    from jaxablate.schedule.plan import machine
    from jaxablate.schedule.plan.plan import FILE

    work, kept = _kept(study, asked)
    if kept is not None:
        if machine.matches(kept.request.target, kept.request.host):
            logger.info("following %s of %s", work.manifest.path / FILE, kept.made)
            return _following(kept, options)
        logger.info("%s is for %s: planning anew", work.manifest.path / FILE, kept.request.target)
    made, folder = make_plan(study, args.study, overrides, asked)
    if not args.dry_run:
        _write(made, folder)
    return _following(made, options)


def _following(plan: Plan, options: local.RunOptions) -> local.RunOptions:
    for warning in plan.warnings:  # now, since the outcome, which says them too, is hours away
        logger.warning("%s", warning)
    return dataclasses.replace(options, plan=plan)


def submitted(args: argparse.Namespace, study: Study, options: left.SubmitOptions) -> left.SubmitOptions:
    """The options of `submit` with a plan to follow, if --gpus asks for one: the one in the study's directory.

    Raises:
        UserError: there is none for this request. Where jobs are submitted, nothing can be timed.
    """
    if not args.gpus and args.deadline is None:
        return options
    work, kept = _kept(study, PlanOptions.of(args, gpus=args.gpus, deadline=args.deadline))
    if kept is None:
        by = "" if args.deadline is None else f" --deadline={args.deadline:g}h"
        what = f"--gpus={args.gpus}{by} --target=h200 --mfu=0.4"
        raise UserError(
            f"{work.manifest.path}: holds no plan with hours for this; first: jaxablate plan {args.study} {what}"
        )
    return dataclasses.replace(options, plan=kept)


def _kept(study: Study, asked: PlanOptions) -> tuple[Remaining, Plan | None]:
    """What is left of a study, and the plan in its directory if it has hours and answers to the same request."""
    from jaxablate.schedule import local
    from jaxablate.schedule.plan.plan import Plan
    from jaxablate.schedule.plan.work import Remaining

    work = Remaining.of(study, local.resolve(study), asked.selection(study))
    kept = Plan.load(work.manifest.path)
    if kept is None or kept.makespan is None or not kept.request.serves(request(work, asked)):
        return work, None
    return work, kept


def request(work: Remaining, options: PlanOptions) -> Request:
    """What a plan is made for, defaults filled in."""
    from jaxablate.schedule.plan import machine
    from jaxablate.schedule.plan.plan import Request

    target = options.target or machine.kind()
    if target == CPU and options.share < 1:
        raise UserError(f"--share={options.share:g}: is of a GPU, and this plan is for a CPU; leave it out")
    return Request(
        study=work.digest,
        arms=work.arms,
        seeds=tuple(seed for seed in work.manifest.study.seeds if seed in work.selection.seeds),
        target=target,
        gpus=options.gpus or (1 if options.target else machine.places()),
        host=socket.gethostname() if target == CPU else "",
        deadline=options.deadline,
        rate=options.rate,
        share=options.share,
        max_members=options.max_members,
    )


def _of_site(made: Plan, site: Site | None) -> Iterable[str]:
    """What the cohorts are to the queue of a site."""
    if site is None or made.longest is None:
        return
    limit, longest = _limit(site.time), f"the longest cohort takes {made.longest:.3g} h"
    if limit is None:
        yield f"{longest}, and the site's profile sets no time limit"
    elif made.longest > limit:
        starts = math.ceil(made.longest / limit)
        yield f"{longest}: the site's limit of {site.time} stops and requeues it, {starts} starts in all"
    else:
        yield f"{longest}, within the site's limit of {site.time}"


def _limit(text: str) -> float | None:
    """Hours of a time as SLURM writes it: minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s; None without a limit."""
    if not text or not text[0].isdigit():
        return None
    days, dash, rest = text.rpartition("-")
    parts = [float(part) for part in rest.split(":")]
    if dash:
        hour, minute, second = [*parts, 0.0, 0.0][:3]
    else:
        hour, minute, second = {1: [0.0, *parts, 0.0], 2: [0.0, *parts], 3: parts}[len(parts)]
    return 24 * float(days or 0) + hour + minute / 60 + second / 3600
