"""`jaxablate bench kernels`: every case of every operation by every implementation, checked, then timed.

    python -m jaxablate.cli bench kernels --ops=attention --cases='ctclip_*'

An implementation is held to the reference in higher precision first (`oracle`), with the very program that
would be timed; one that is wrong is reported and not timed. Those of a case are then timed in turns
(`timing`), beside limits of the machine measured in the same process (`limits`).

It needs jax, numpy, jaxtyping and matplotlib, no network and no git, so that it runs on a bare GPU machine.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import importlib.metadata
import logging
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from jaxablate import provenance
from jaxablate.bench import limits, oracle, problems, torch_sdpa
from jaxablate.bench.kernel_results import CaseResult, ConfigSource, Entry, Error, Status, Timed
from jaxablate.bench.kernel_tuning import keep, tune
from jaxablate.bench.kernels_report import Outcome, write
from jaxablate.bench.limits import Limits
from jaxablate.bench.problems import Group, Problem
from jaxablate.bench.programs import Program, build, repeats
from jaxablate.bench.timing import Samples, time_interleaved
from jaxablate.bench.work import Direction
from jaxablate.errors import UserError, suggestion
from jaxablate.footprint import out_of_memory
from jaxablate_kernels import Implementation, dispatch, tuning

logger = logging.getLogger(__name__)

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
ROUNDS = 30
# Beside those that every run records.
PACKAGES = ("jaxtyping", "tokamax", "jax-triton", "torch", "triton", "jax-cuda13-plugin", "nvidia-cudnn-cu13")


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      ops: operations; empty for all.
      cases: patterns of case names, such as `ctclip_*`; empty for the studies' shapes, and on a GPU also those
        that libraries are built for. A pattern finds the tests' small cases too.
      impls: implementations; empty for all. The reference is always there: the others are compared with it.
      directions: of `forward`, `backward` and `both`; empty for all.
      batch: factor of the studies' batch, which is 1 or so in the cases; 0 for 64 on a GPU and 1 elsewhere.
      dtype: instead of the cases' own; "" for bfloat16 on a GPU and their own elsewhere.
      seconds: of timing for one case; checks and compilations come on top.
      tune: `yes` times the candidate configurations first and keeps the best, and keeps which implementation
        was fastest, for `auto` (see `jaxablate_kernels.tuning`).
      out: the JSON file; a table `.md` and a figure `.png` go beside it. None for `bench/kernels_<device>.json`.
      commit: of the code, for a machine without its repository.
    """

    ops: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    impls: tuple[str, ...] = ()
    directions: tuple[Direction, ...] = ()
    batch: int = 0
    dtype: str = ""
    seconds: float = 10.0
    tune: Literal["no", "yes"] = "no"
    out: Path | None = None
    commit: str = ""


def bench_kernels(options: Options) -> Outcome:
    """Check and time what the options ask for on the default device, and write the results.

    The files are written anew after each case, so that what was measured outlives an interruption.

    Raises:
      UserError: an option that names nothing there is, or a number out of range.
    """
    chosen = _chosen(options)
    device = jax.devices()[0]
    where = options.out or Path("bench") / f"kernels_{slug(device)}.json"
    where.parent.mkdir(parents=True, exist_ok=True)
    dtypes = [_dtype(options, group, case, device.platform) for _, group, case in chosen]
    logger.info("measuring the limits of this %s (%s)", device.platform, device.device_kind)
    outcome = Outcome(_facts(device, options), limits.measure(dtypes, device.platform), (), where)
    for number, ((op, group, case), dtype) in enumerate(zip(chosen, dtypes, strict=True), 1):
        logger.info("%d of %d: %s %s", number, len(chosen), op, case.name)
        batch = 1 if group != "paper" else options.batch or (1 if device.platform == "cpu" else 64)
        problem = problems.problem(op, group, case, batch=batch, dtype=dtype)
        found = available(op, options.impls)
        tuned = tune(problem, found, outcome.limits) if options.tune == "yes" else {}
        result = bench_problem(
            problem,
            found,
            options.directions or DIRECTIONS,
            seconds=options.seconds,
            limits=outcome.limits,
            configs={name: timing.config for name, timing in tuned.items()},
        )
        if options.tune == "yes":
            keep(result, problem, tuned)
        outcome = dataclasses.replace(outcome, results=(*outcome.results, result))
        write(outcome)
    return outcome


def available(op: str, names: Sequence[str] = ()) -> dict[str, Implementation | str]:
    """The implementations of an operation, or why one cannot be imported; the reference first."""
    found: dict[str, Implementation | str] = {}
    for name in dispatch.implementations(op):
        if not names or name in names or name == "reference":
            try:
                found[name] = dispatch.load(op, name)
            except ImportError as error:
                found[name] = str(error)
    return found


def bench_problem(
    problem: Problem,
    implementations: Mapping[str, Implementation | str],
    directions: Sequence[Direction],
    *,
    seconds: float = 10.0,
    rounds: int = ROUNDS,
    limits: Limits | None = None,
    configs: Mapping[str, Any] | None = None,
) -> CaseResult:
    """Check every implementation of one problem on the default device, and time those that are right.

    Args:
      problem: with its arrays.
      implementations: by name, the reference first; a text says why there is none.
      directions: what to time.
      seconds: for all timing together; each direction has an equal share.
      rounds: samples of each, if the time allows.
      limits: of this machine, by which short work is repeated and a time that is all call does not count;
        without them every program is called as it is, and every time counts.
      configs: of implementations that have one, instead of the tuned one or their own choice.
    """
    bench = _Bench(problem, tuple(directions), limits)
    entries: dict[str, Entry] = {}
    for name, implementation in implementations.items():
        if isinstance(implementation, str):
            entries[name] = Entry(name, "unsupported", implementation)
        else:
            entries[name] = bench.prepare(name, implementation, (configs or {}).get(name))
    if bench.platform != "cpu" and problem.op == "attention":
        entries[torch_sdpa.NAME] = bench.prepare_torch()
    for entry in entries.values():
        if entry.reason and entry.status != "unsupported":
            logger.info("  %s: %s: %s", entry.name, entry.status, entry.reason)
    timed: dict[str, dict[Direction, Timed]] = {name: {} for name in entries}
    for direction in directions:
        programs = {name: found[direction] for name, found in bench.ready.items() if direction in found}
        samples: Mapping[str, Samples] = {}
        if programs:
            samples = time_interleaved(
                {name: program.run for name, program in programs.items()},
                rounds=rounds,
                budget=seconds / len(directions),
                clocks={name: program.clock for name, program in programs.items()},
            )
        for name, taken in samples.items():
            program = programs[name]
            once = tuple(seconds / program.repeats for seconds in taken.seconds)
            timed[name][direction] = Timed(
                dataclasses.replace(taken, seconds=once),
                program.compile_seconds,
                program.memory,
                program.repeats,
                limits.call if limits else 0.0,
            )
    return CaseResult(
        op=problem.op,
        case=problem.name,
        group=problem.group,
        shape=problem.shape,
        dtype=problem.dtype,
        spec=tuning.spec_fields(problem.spec),
        passes=problem.passes,
        entries=tuple(dataclasses.replace(entry, timed=timed[name]) for name, entry in entries.items()),
    )


class _Bench:
    """One problem, what is right for it, and the programs that were found to be."""

    def __init__(self, problem: Problem, directions: tuple[Direction, ...], limits: Limits | None):
        device = jax.devices()[0]
        self.problem, self.directions, self.limits = problem, directions, limits
        self.platform, self.device_kind = device.platform, device.device_kind
        self.gradients = problem.cotangents()
        self.expected = oracle.expected(problem, self.gradients)
        self.ready: dict[str, dict[Direction, Program]] = {}
        self._of_reference: Mapping[str, Error] = {}

    def prepare(self, name: str, implementation: Implementation, config: Any) -> Entry:
        reason = implementation.supports(self.problem.spec, self.platform)
        if reason is not None:
            return Entry(name, "unsupported", reason)
        config, source = _configuration(implementation, self.problem, self.device_kind, config)
        call = implementation.call
        if config is not None:
            call = functools.partial(call, config=config)

        def make(way: Direction) -> Program:
            times = repeats(self.problem, way, self.limits, self.platform)
            return build(self.problem, call, self.gradients, way, times)

        entry = self._check(name, make)
        if name == "reference":
            self._of_reference = entry.errors
        fields = None if config is None else dataclasses.asdict(config)
        return dataclasses.replace(entry, config=fields, config_from=source)

    def prepare_torch(self) -> Entry:
        reason = torch_sdpa.unsupported(self.problem)
        if reason is not None:
            return Entry(torch_sdpa.NAME, "unsupported", reason)
        return self._check(torch_sdpa.NAME, lambda way: torch_sdpa.build(self.problem, self.gradients, way))

    def _check(self, name: str, make: Callable[[Direction], Program]) -> Entry:
        """Build the program of each direction and hold its results to the oracle's."""
        errors: dict[str, Error] = {}
        programs: dict[Direction, Program] = {}
        lost: dict[Direction, tuple[Status, str]] = {}
        for direction in self.directions:
            try:
                programs[direction] = make(direction)
                found = oracle.errors(
                    programs[direction].results(),
                    self.expected,
                    op=self.problem.op,
                    dtype=self.problem.dtype,
                    platform=self.platform,
                    reference=None if name == "reference" else self._of_reference,
                )
            # Whatever a library raises when it traces, compiles or runs one of its kernels: the others of
            # the case, and the cases to come, are still to be measured.
            except Exception as error:
                programs.pop(direction, None)
                lost[direction] = _fault(error)
                continue
            for what, error in found.items():
                if what not in errors or not error.overall <= errors[what].overall:  # NaN stays
                    errors[what] = error
        if wrong := oracle.complaint(errors):
            return Entry(name, "wrong", wrong, errors=errors)
        reason = "; ".join(f"{direction}: {text}" for direction, (_, text) in lost.items())
        if not programs:
            return Entry(name, next(iter(lost.values()))[0], reason, errors=errors)
        self.ready[name] = programs
        return Entry(name, "timed", reason, errors=errors)


def _fault(error: Exception) -> tuple[Status, str]:
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}"
    if out_of_memory(error):
        return "out of memory", "more memory than the device has"
    return "failed", text if len(text) <= 300 else f"{text[:300]} …"


def _configuration(
    implementation: Implementation, problem: Problem, device: str, given: Any
) -> tuple[Any, ConfigSource | None]:
    """The blocks and warps to use, and where they come from; None for an implementation without."""
    if implementation.candidates is None:
        return None, None
    if given is not None:
        return given, "tuned"
    own = implementation.candidates(problem.spec, device)[0]
    tuned = tuning.config_for(implementation.op, implementation.name, problem.spec, device, type(own))
    return (own, "heuristic") if tuned is None else (tuned, "tuned")


# --------------------------------------------------------------------------------------- what to measure


def _chosen(options: Options) -> list[tuple[str, Group, Any]]:
    """The (operation, group, case)s that are asked for."""
    known = dispatch.operations()
    ops = options.ops or known
    names = {name for op in known for name in dispatch.implementations(op)}
    for flag, given, valid in (
        ("--ops", ops, known),
        ("--impls", options.impls, names),
        ("--directions", options.directions, DIRECTIONS),
        ("--dtype", [options.dtype] if options.dtype else [], oracle.LIMITS),
    ):
        for word in given:
            if word not in valid:
                raise UserError(f"{flag}={word}: there is none of that name; {suggestion(word, valid)}")
    if options.batch < 0:
        raise UserError(f"--batch={options.batch}: must be 1 or more; leave it out for the default")
    if not options.seconds > 0:
        raise UserError(f"--seconds={options.seconds:g}: must be more than 0; leave it out for 10")
    if options.out is not None and options.out.suffix != ".json":
        raise UserError(
            f"--out={options.out}: must end in .json; the table and the figure are named after it"
        )
    everything: list[tuple[str, Group, Any]] = [
        (op, group, case) for op in ops for group, case in problems.cases(op).values()
    ]
    if not options.cases:
        wanted = ("paper",) if jax.default_backend() == "cpu" else ("paper", "library")
        return [found for found in everything if found[1] in wanted]
    chosen = []
    for pattern in options.cases:
        matching = [found for found in everything if fnmatch.fnmatchcase(found[2].name, pattern)]
        if not matching:
            advice = suggestion(pattern, (case.name for _, _, case in everything))
            raise UserError(f"--cases={pattern}: no case of {', '.join(ops)} has that name; {advice}")
        chosen += [found for found in matching if found not in chosen]
    return chosen


def _dtype(options: Options, group: Group, case: Any, platform: str) -> str:
    if options.dtype or platform == "cpu" or group != "paper":
        return options.dtype or case.dtype
    return "bfloat16" if case.dtype == "float32" else case.dtype


def slug(device: Any) -> str:
    """`NVIDIA H200` -> `nvidia-h200`, for file names."""
    return tuning.file_for(device.device_kind, Path()).stem


def _facts(device: Any, options: Options) -> dict[str, Any]:
    """Where the numbers come from: machine, versions, commit, date, what was asked for."""
    facts = provenance.collect(jax.devices(), {}, {})
    for name in ("kernels", "mesh"):  # of a training run
        del facts[name]
    git = facts["git"]
    facts["git"] = {
        "commit": options.commit or (git and git["commit"]),
        "dirty": None if options.commit or not git else git["dirty"],
    }
    for package in PACKAGES:
        try:
            facts["packages"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts["packages"][package] = None
    return facts | {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": slug(device),
        "platform": device.platform,
        "runtime": " ".join(device.client.platform_version.split()),
        "driver": _driver() if device.platform == "gpu" else None,
        # With a cache, the seconds of a compilation may be those of finding the program.
        "compilation_cache": jax.config.jax_compilation_cache_dir,  # pyright: ignore[reportAttributeAccessIssue]
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
    }


def _driver() -> str | None:
    """The version of NVIDIA's driver; None where its tool is missing."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
