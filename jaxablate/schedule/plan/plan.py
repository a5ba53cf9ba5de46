"""A plan as data: what each arm takes, which cohort runs when and where, what does not fit. Kept as plan.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxablate import disk
from jaxablate.errors import UserError
from jaxablate.structure import from_mapping
from jaxablate.study import Phase
from jaxablate.targets import CPU

FORMAT = 2
FILE = "plan.json"

PlaceKind = Literal["GPU", "process"]  # of what a cohort takes one: processes share the cores of a CPU
PLURAL: Mapping[PlaceKind, str] = {"GPU": "GPUs", "process": "processes"}


@dataclass(frozen=True)
class Request:
    """What is asked of a plan, and what it is made for: a plan answers to an equal request alone.

    Attributes:
        study: digest of the declaration and of the resolved configs of its arms.
        arms: that it is about.
        seeds: of the runs that are reported.
        target: a name of `targets`, or the kind of this machine's devices: `cpu`, `NVIDIA H200`.
        gpus: that it may use; processes at a time on a CPU.
        host: name of this machine where the target is its CPU, of which no two are alike; else empty.
        deadline: hours; None without one.
        rate: money for an hour of a GPU; None: not asked.
        share: of a GPU that a cohort keeps busy.
        max_members: runs of a cohort at most; 0: any number.
    """

    study: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    target: str
    gpus: int
    host: str = ""
    deadline: float | None = None
    rate: float | None = None
    share: float = 1.0
    max_members: int = 0

    @property
    def on_cpu(self) -> bool:
        """Whether cohorts are processes on a CPU."""
        return self.target == CPU

    @property
    def place(self) -> PlaceKind:
        """Of what a cohort takes one."""
        return "process" if self.on_cpu else "GPU"

    def serves(self, other: Request) -> bool:
        """Whether a plan that was made for this one can be followed where the other is asked, on such a machine.

        What the price is and how busy a cohort keeps its GPU is for whoever plans to say.
        """
        same = {name: getattr(self, name) for name in ("target", "host", "rate", "share")}
        return self == dataclasses.replace(other, **same)


@dataclass(frozen=True)
class ArmPlan:
    """What an arm takes. Numbers are None where nobody knows them; `problem` says why there are none at all.

    Attributes:
        parameters, trainable: of one run.
        flops_per_step, steps, examples, tokens: of one run.
        runs: that are left to train, tuning included.
        cohorts: in which they are trained.
        members: runs of the largest cohort.
        memory: bytes that it takes at its peak; memory_source says how that is known.
        capacity: bytes that it may take on a GPU.
        fits: whether it does, with the micro-batches it has.
        largest_micro_batch: examples, the most that fit for the members that it has.
        hours: GPU-hours of all its cohorts: of each its hours, times the GPUs that it takes at once, times its share
            of one on which it is not alone; hours_source says how they are known.
        longest: hours of its longest cohort: what one element of a queue takes.
        cost: at the rate that was given.
        choices: how its batches and cohorts come about, and why.
        problem: why it cannot be planned; empty if it can.
    """

    arm: str
    runs: int
    cohorts: int
    members: int
    parameters: int | None = None
    trainable: int | None = None
    flops_per_step: float | None = None
    steps: int | None = None
    examples: int | None = None
    tokens: int | None = None
    memory: int | None = None
    memory_source: str = ""
    capacity: int | None = None
    fits: bool | None = None
    largest_micro_batch: int | None = None
    hours: float | None = None
    hours_source: str = ""
    longest: float | None = None
    cost: float | None = None
    choices: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Scheduled:
    """A stage of a cohort, with its place. Hours are None, and places with them, where nobody knows them.

    Attributes:
        name: `arm/phase/number`, and `/stage` where there are several; unique.
        rates: learning rates of its runs; empty if they are chosen by what it follows.
        split: times more micro-batches than the config says, so that it fits.
        memory: bytes.
        share: of the GPU that it keeps busy.
        after: elements that must have ended before.
        gpu: counted from 0.
        start, end: hours from the beginning of the study.
        steps: its updates.
    """

    name: str
    arm: str
    phase: Phase
    stage: str
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    members: int
    split: int
    memory: int
    share: float
    after: tuple[str, ...]
    hours: float | None = None
    gpu: int | None = None
    start: float | None = None
    end: float | None = None
    steps: int = 0


@dataclass(frozen=True)
class Chain:
    """Arms that a study's document trains one after another on a GPU: what that takes."""

    arms: tuple[str, ...]
    hours: float
    steps: int


@dataclass(frozen=True)
class SeedsNeeded:
    """How many seeds a hypothesis needs by the spread of finished runs.

    Attributes:
        seeds: paired seeds with which it is supported with `power`; None: more than anyone can run, or unknown.
        more: seeds beyond those of the plan.
        hours: GPU-hours of those, over all arms of the plan.
        cost: of those.
        why: where the number is from, or why there is none.
    """

    hypothesis: str
    power: float
    seeds: int | None
    more: int | None
    hours: float | None
    cost: float | None
    why: str


@dataclass(frozen=True)
class Plan:
    """A plan of a study.

    Attributes:
        made: when, ISO 8601.
        seeds: that are kept.
        dropped: seeds that do not fit before the deadline; their runs of every arm are left out.
        makespan: hours until everything has ended; None if hours are unknown.
        bound: hours below which no order can come on these GPUs.
        capacity: bytes of a GPU that programs may take; on a CPU what one process may.
        short: why the deadline cannot be met, and what would help; empty if it can.
        notes: what a reader must know.
        chains: those of the study's document, on as many GPUs, to stand beside `makespan`.
    """

    format: int
    study: str
    made: str
    request: Request
    arms: tuple[ArmPlan, ...]
    elements: tuple[Scheduled, ...]
    seeds: tuple[int, ...]
    dropped: tuple[int, ...]
    makespan: float | None
    bound: float | None
    capacity: int
    short: str
    hypotheses: tuple[SeedsNeeded, ...]
    notes: tuple[str, ...]
    chains: tuple[Chain, ...] = ()

    @property
    def runs(self) -> int:
        """Runs to train."""
        return sum(arm.runs for arm in self.arms)

    @property
    def hours(self) -> float | None:
        """GPU-hours of all arms; None if those of one are unknown."""
        return _sum(arm.hours for arm in self.arms)

    @property
    def cost(self) -> float | None:
        """Money for those; None without a rate."""
        return _sum(arm.cost for arm in self.arms)

    @property
    def longest(self) -> float | None:
        """Hours of the longest cohort."""
        known = [arm.longest for arm in self.arms]
        return None if None in known else max((hours for hours in known if hours is not None), default=None)

    @property
    def steps(self) -> int:
        """Updates of the GPU that makes most of them."""
        by_gpu: dict[int, int] = {}
        for element in self.elements:
            if element.gpu is not None:
                by_gpu[element.gpu] = by_gpu.get(element.gpu, 0) + element.steps
        return max(by_gpu.values(), default=0)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What whoever follows the plan must know of what it could not do."""
        found = [f"the deadline cannot be met: {self.short}"] if self.short else []
        if problems := [f"{arm.arm}: {arm.problem}" for arm in self.arms if arm.problem]:
            found.append(f"the plan has no place for these, which are trained last: {'; '.join(problems)}")
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """What `to_dict` gave.

        Raises:
            UserError: it is none.
        """
        return from_mapping(cls, values, "plan.")

    def save(self, folder: Path) -> Path:
        """Writes plan.json into a folder, which is made if it is not there; the file's path."""
        disk.make_private(folder)
        try:
            disk.write_json(folder / FILE, self.to_dict())
        except OSError as error:
            raise UserError(f"{folder / FILE}: cannot be written: {error.strerror}") from None
        return folder / FILE

    @classmethod
    def load(cls, folder: Path) -> Plan | None:
        """The plan of a folder; None if there is none, or one of another version.

        Raises:
            UserError: the file is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        values = disk.read_json(path)
        if not isinstance(values, dict):
            raise UserError(f"{path}: not a plan; delete it")
        if values.get("format") != FORMAT:
            return None
        try:
            return cls.from_dict(values)
        except UserError as error:
            raise UserError(f"{path}: {error}; delete it") from None


def _sum(values: Any) -> float | None:
    known = list(values)
    return None if None in known or not known else sum(known)
