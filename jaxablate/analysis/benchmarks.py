"""What `jaxablate bench step` found: the records it writes beside a study, as data. Imports no jax.

    <workdir>/<study>/bench/step_<hardware>.json     times and memory of each arm's step
    <workdir>/<study>/bench/batch_<hardware>.json    the largest batch of each arm, of --largest-batch

The benchmark makes it, the report and the benchmark's own table are made from it. Ratios are treatment over
control, of times and of bytes: below 1 is faster, or smaller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jaxablate import disk
from jaxablate.analysis.findings import Estimate
from jaxablate.errors import UserError
from jaxablate.structure import from_mapping
from jaxablate.study import Expectation, Study, expectation_fields

FORMAT = 1
What = Literal["step", "forward", "backward"]
Quantity = Literal["step", "forward", "backward", "memory"]
Judgement = Literal["met", "not met", "inconclusive", "not measured"]


@dataclass(frozen=True)
class Timing:
    """One program of one arm: a sample for each round, and what they come to."""

    what: What
    samples_ms: tuple[float, ...]
    median_ms: float
    spread_ms: float  # half the interquartile range
    ratio: Estimate | None  # over the baseline's time; None: the baseline itself, or it was not measured


@dataclass(frozen=True)
class ArmBenchmark:
    """One arm. `problem` says why it was not measured; then it has no numbers."""

    arm: str
    config: str  # fingerprint of the resolved config
    kernels: Mapping[str, str]  # slot -> the implementation that carried it
    accumulation: int
    remat: str
    compute_dtype: str
    parameters: int | None = None
    compile_sec: float | None = None  # of the step: trace, lower, compile
    timings: tuple[Timing, ...] = ()
    steps_per_sec: float | None = None  # of all members together, as the two below
    examples_per_sec: float | None = None
    tokens_per_sec: float | None = None  # None: the task knows no tokens
    mfu: float | None = None  # None: nobody counted the FLOP, or the device's peak is unknown
    memory: Mapping[str, int] | None = None  # bytes of one device by part; `peak` is their sum less aliases
    memory_ratio: float | None = None  # peak over the baseline's
    problem: str = ""

    def timing(self, what: What) -> Timing | None:
        """The times of one of its programs."""
        return next((timing for timing in self.timings if timing.what == what), None)


@dataclass(frozen=True)
class EffectRatio:
    """What a factor does to a time or to memory: a ratio; of several factors, theirs together over their product.

    A main effect is the geometric mean over the cells of the other factors. Of an interaction below 1 the
    factors save more together than each by itself promises.
    """

    factors: tuple[str, ...]
    quantity: Quantity
    estimate: Estimate


@dataclass(frozen=True)
class Judged:
    """An expectation beside what was measured of it."""

    expectation: Expectation
    verdict: Judgement
    measured: Estimate | None  # in the expectation's own terms: a speed-up, or a ratio of bytes
    of: str  # what was compared: "flash: main effect over 8 arms"
    reason: str


@dataclass(frozen=True)
class StepBenchmark:
    """One benchmark of a study's steps on one machine."""

    format: int
    study: str
    scale: str
    baseline: str
    time: str
    hardware: str
    platform: str
    data: str  # what the batch was made of
    stage: str  # of the task, that the step belongs to
    members: int  # of the cohort that a step is of; they differ in seed
    batch_size: int  # of a member
    micro_batch: int  # examples of a forward and of a backward pass
    rounds: int
    compilation: Literal["anew", "with a cache"]  # with one, compile times are those of whoever came first
    level: float
    arms: tuple[ArmBenchmark, ...]
    effects: tuple[EffectRatio, ...]
    effects_note: str  # why there are none, or which arms are no part of them
    judged: tuple[Judged, ...]
    control: (
        ArmBenchmark | None
    )  # the baseline, compiled again and timed in turns with all: a ratio of 1 is true
    provenance: Mapping[str, Any]

    @property
    def whats(self) -> tuple[What, ...]:
        """The programs that were timed."""
        return tuple(dict.fromkeys(timing.what for arm in self.arms for timing in arm.timings))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to beware of."""
        found = []
        for timing in self.control.timings if self.control else ():
            ratio = timing.ratio
            if ratio is None or ratio.value is None or ratio.low is None or ratio.high is None:
                continue
            if not ratio.low <= 1 <= ratio.high:
                found.append(
                    f"{timing.what}: two copies of the baseline differ by more than chance, {span(ratio)}; a "
                    f"difference of {100 * abs(math.log(ratio.value)):.1f} % means nothing here"
                )
        return tuple(found)


@dataclass(frozen=True)
class ArmBatches:
    """How large an arm's batch may be."""

    arm: str
    config: str  # fingerprint of the resolved config
    batch_size: int  # as declared
    accumulation: int
    fits: int | None = None  # the largest that was found to fit
    fails: int | None = None  # the smallest that was found not to; None: all did
    peaks: Mapping[str, int] = field(default_factory=dict)  # batch size -> bytes, of all that were compiled
    problem: str = ""


@dataclass(frozen=True)
class BatchBenchmark:
    """The largest batch of each arm that fits into one device's memory, by what the compiler lays out."""

    format: int
    study: str
    scale: str
    baseline: str
    time: str
    hardware: str
    stage: str  # of the task, that the step belongs to
    members: int  # of the cohort that a step is of
    memory: int
    memory_source: str
    arms: tuple[ArmBatches, ...]
    provenance: Mapping[str, Any]


# ------------------------------------------------------------------------------------------ reading


def folder(study_dir: Path) -> Path:
    """Where the benchmarks of a study are."""
    return study_dir / "bench"


def slug(hardware: str) -> str:
    """A hardware's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-") or "unknown"


def read(study_dir: Path, notes: list[str]) -> tuple[tuple[StepBenchmark, ...], tuple[BatchBenchmark, ...]]:
    """The benchmarks of a study, by file name; adds a note for each file that cannot be read."""
    return _read_all(StepBenchmark, study_dir, "step", notes), _read_all(
        BatchBenchmark, study_dir, "batch", notes
    )


def load(path: Path) -> StepBenchmark:
    """One benchmark of steps from its file.

    Raises:
      UserError: it cannot be read, or is of another format.
    """
    return _load(StepBenchmark, path)


def _read_all(kind: type[Any], study_dir: Path, name: str, notes: list[str]) -> tuple[Any, ...]:
    found = []
    for path in sorted(folder(study_dir).glob(f"{name}_*.json")):
        try:
            found.append(_load(kind, path))
        except UserError as error:
            notes.append(f"left out: {error}")
    return tuple(found)


def _load(kind: type[Any], path: Path) -> Any:
    values = disk.read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f"{path}: is no benchmark of format {FORMAT}; run `jaxablate bench step` again")
    values = _of_members(kind, values)
    if isinstance(judged := values.get("judged"), list):
        values["judged"] = [
            {**item, "expectation": expectation_fields(item.get("expectation"))} for item in judged
        ]
    return from_mapping(kind, values, f"{path}: ")


def _of_members(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """What was written before a benchmark knew members and stages, with what it was then: of one, of the first."""
    if "members" in values:
        return values
    values = {"stage": "", **values, "members": 1}
    if kind is not StepBenchmark:
        return values

    def rated(arm: Any) -> Any:
        rate = arm and arm["examples_per_sec"]
        return arm and {**arm, "steps_per_sec": rate and rate / values["batch_size"]}

    return {**values, "arms": [rated(arm) for arm in values["arms"]], "control": rated(values["control"])}


# ------------------------------------------------------------------------------------- expectations


def judge(study: Study, found: StepBenchmark) -> tuple[Judged, ...]:
    """Holds the expectations of a study against a benchmark; those about the runs' results are not its to judge.

    A factor is judged by its main effect where the arms measured are a whole factorial, else by the arm that
    changes it alone.
    """
    own = (e for e in study.expectations if e.benchmarked or not e.response)
    return tuple(_judge(study, expected, found) for expected in own)


def _judge(study: Study, expected: Expectation, found: StepBenchmark) -> Judged:
    if not expected.response:
        return Judged(expected, "not measured", None, "", "is in words: there is no number to hold it to")
    quantity: Quantity = "memory" if expected.response == "memory" else "step"
    ratio, of = _measured(study, expected, quantity, found)
    if ratio is None or ratio.value is None:
        return Judged(expected, "not measured", None, of, of)
    own = ratio if quantity == "memory" else inverse(ratio)
    verdict, why = _verdict(expected, own)
    beware = "; measured on a CPU, this says nothing about a GPU" if found.platform == "cpu" else ""
    return Judged(expected, verdict, own, of, f"{span(own)} on {found.hardware}: {why}{beware}")


def inverse(ratio: Estimate) -> Estimate:
    """The ratio seen from the other side: of a time, the speed-up."""

    def under(value: float | None) -> float | None:
        return None if value is None else 1 / value

    return replace(ratio, value=under(ratio.value), low=under(ratio.high), high=under(ratio.low))


def _measured(
    study: Study, expected: Expectation, quantity: Quantity, found: StepBenchmark
) -> tuple[Estimate | None, str]:
    """What was measured of an expectation, and of what; or None, and why."""
    for effect in found.effects:
        if effect.factors == (expected.factor,) and effect.quantity == quantity:
            return effect.estimate, f"main effect of {expected.factor} over the factorial"
    alone = (arm.name for arm in study.arms if list(study.set_levels(arm.name)) == [expected.factor])
    name = expected.arm or next(alone, "")
    if not name:
        return None, f"no arm changes {expected.factor} alone"
    arm = next((arm for arm in found.arms if arm.arm == name), None)
    if arm is None or arm.problem:
        return None, f"{name}: {arm.problem if arm else 'was not in the benchmark'}"
    timing = arm.timing("step")
    if quantity == "memory":
        ratio = None if arm.memory_ratio is None else exact(arm.memory_ratio)
    else:
        ratio = timing.ratio if timing else None
    what = "compiler gave no memory" if quantity == "memory" else "step of both arms was not timed"
    return ratio, f"{name} against {found.baseline}" if ratio else f"{name}: the {what}"


def exact(ratio: float) -> Estimate:
    """A ratio of numbers that the compiler gives, and gives again."""
    return Estimate(ratio, how="exact", note="the compiler's figure: exact, so without an interval")


def _verdict(expected: Expectation, found: Estimate) -> tuple[Judgement, str]:
    value = found.value
    assert value is not None
    low, high = (value, value) if found.how == "exact" else (found.low, found.high)
    bounds = (expected.low or 0.0, math.inf if expected.high is None else expected.high)
    asked = _asked(expected)
    if low is None or high is None:
        return "inconclusive", f"expected {asked}, and without an interval nothing can be said"
    if bounds[0] <= low and high <= bounds[1]:
        return "met", f"within the expected {asked}"
    if high < bounds[0]:
        return "not met", f"less than the expected {asked}"
    if low > bounds[1]:
        return "not met", f"more than the expected {asked}"
    return "inconclusive", f"the interval crosses the border of the expected {asked}"


def _asked(expected: Expectation) -> str:
    if expected.low is None:
        return f"×{expected.high:g} at most"
    return (
        f"×{expected.low:g} or more" if expected.high is None else f"×{expected.low:g} to ×{expected.high:g}"
    )


def span(ratio: Estimate) -> str:
    """`×2.413 (2.390 to 2.440)`."""
    if ratio.low is None or ratio.high is None:
        return f"×{ratio.value:.3f}"
    return f"×{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
