"""What is known of an arm before it is trained. Imports no jax, so that a plan can read it anywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxablate.structure import from_mapping


@dataclass(frozen=True)
class StageFacts:
    """A stage of the run.

    Attributes:
      name: as the task calls it.
      steps: its updates.
      trainable: parameters that it trains, of one member.
    """

    name: str
    steps: int
    trainable: int


@dataclass(frozen=True)
class BatchFacts:
    """How the effective batch comes about: effective = micro x accumulation x shards.

    Attributes:
      effective: examples of an update, of one member.
      micro: examples that a device works on at a time.
      accumulation: micro-batches of an update.
      shards: devices over which the examples of a micro-batch lie.
      remat: what is computed again in the backward pass, `none` or `block`.
      workers: processes that read batches; 0 reads in threads of the training process.
      why: where these are from, in words.
    """

    effective: int
    micro: int
    accumulation: int
    shards: int
    remat: str
    workers: int
    why: str


@dataclass(frozen=True)
class MemoryFacts:
    """Bytes of one device that the programs of a cohort take, all members together.

    Attributes:
      peak: of the largest program, with what lies beside it.
      argument, temp, output, alias: of that program as its compiler says; what is in `alias` is counted in both
        `argument` and `output`.
      beside: what lies on the device while it runs and is none of its own, such as the next batch.
      program: which it is, in words: `step of main`, `evaluation`, `start`, `save`.
      programs: the peak of each.
      left_out: what could not be counted and why, in words; empty if nothing.
      source: `compiled for NVIDIA H200`, or `estimate from the CPU program`.
      capacity: what a program may have.
      reserve: how the capacity comes about, in words.
      fits: whether the peak is within the capacity.
      largest_micro_batch: examples of a micro-batch, the most that fit at this effective batch; None if not
        even one example does.
    """

    peak: int
    argument: int
    temp: int
    output: int
    alias: int
    beside: int
    program: str
    programs: Mapping[str, int]
    left_out: str
    source: str
    capacity: int
    reserve: str
    fits: bool
    largest_micro_batch: int | None


@dataclass(frozen=True)
class TimeFacts:
    """Seconds of the whole cohort, in one process: total = start + compile + steps + evaluations + saves + closing.

    Attributes:
      start_s: from the start of the process until the data is open; None where only the steps are known.
      compile_s: tracing and compiling all programs of all stages.
      compiled: whether they came out of the cache of compiled programs, where a later process finds them too.
      step_s: of one step, the mean over all stages' steps.
      evaluate_s: of one evaluation of every member.
      save_s: of one checkpoint of every member, waited for.
      evaluations: how often the run evaluates.
      saves: how often it saves; the best one so far may be saved besides.
      total_s: of the run from start to end; of the steps alone where nothing else is known.
      source: `probe on …`, or `stated MFU 0.4`.
      closing_s: of the closing metrics of every member, with their compilation; 0 where a task has none.
    """

    start_s: float | None
    compile_s: float | None
    compiled: Literal["from the cache", "anew", ""]
    step_s: float
    evaluate_s: float | None
    save_s: float | None
    evaluations: int
    saves: int
    total_s: float
    source: str
    closing_s: float | None = None


@dataclass(frozen=True)
class Estimate:
    """One arm's cost.

    Attributes:
      arm, scale: as the study names them.
      fingerprint: of the arm's first run.
      target: the device that `memory` is about: `h200`, `cpu`, or its kind.
      parameters, trainable: of one member: all, with a base that it shares, and those that some stage trains.
      flops_per_step: of one member's update; None if unknown.
      flops_source: `model`: the task counts its own; `compiler`: operations of the CPU program, in which the body of
        a loop counts once; empty if unknown.
      examples, tokens: that one member sees in the whole run; 0 tokens where the word has no meaning.
      steps: of the whole run.
      stages: in order.
      members: runs in the cohort that `memory` and `time` are of.
      devices: over which the cohort lies, all at once (`host.mesh`).
      batch: how an update's examples are divided.
      memory: on the target, of each of these devices.
      time: None if nobody has timed it or stated a rate.
    """

    arm: str
    fingerprint: str
    scale: str
    target: str
    parameters: int
    trainable: int
    flops_per_step: float | None
    flops_source: Literal["model", "compiler", ""]
    examples: int
    tokens: int
    steps: int
    stages: tuple[StageFacts, ...]
    members: int
    devices: int
    batch: BatchFacts
    memory: MemoryFacts
    time: TimeFacts | None

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Estimate:
        """What `to_dict` gave.

        Raises:
          UserError: a field is missing, unknown or of another type.
        """
        return from_mapping(cls, values, "estimate.")
