"""What the analysis of a study says, as data: the one thing that pages, tables, figures and papers are made from.

`analyse` (in `analyse`) makes it from `Results`. Nothing here computes. Imports no jax.

Signs: differences are treatment minus control in the response's own unit. `better` has been through the
response's direction; nobody downstream looks at a sign to say what is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxablate.study import Phase

Judgement = Literal[
    "better", "worse", "unclear", "same"
]  # unclear: the interval holds zero, or there is none
Outcome = Literal["supported", "refuted", "inconclusive", "not run"]
Scale = Literal["raw", "log"]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval. Without one, `note` says why; a missing interval is never a zero-width one."""

    value: float | None
    low: float | None = None
    high: float | None = None
    level: float = 0.95
    p: float | None = None  # two-sided, of no difference, unless `how` says another
    n: int = 0  # seeds or pairs behind it
    df: float | None = None
    how: str = ""  # the method in words: "Student t on 5 paired differences"
    note: str = ""  # why there is no interval, or what to beware of


@dataclass(frozen=True)
class ArmValue:
    """One response of one arm over its seeds."""

    arm: str
    response: str
    mean: Estimate  # Student t over seeds; of the survivors if some diverged, and then `note` says so
    sd: float | None  # ddof 1
    median: float | None
    minimum: float | None
    maximum: float | None
    values: Mapping[int, float]  # seed -> value
    planned: int  # seeds declared
    done: int
    diverged: int
    unfinished: int  # failed, cancelled or not run yet

    @property
    def complete(self) -> bool:
        """Every declared seed finished and has a value."""
        return self.done == self.planned == len(self.values)


@dataclass(frozen=True)
class Contrast:
    """An arm against the baseline. Exploratory, unless a hypothesis declares it."""

    arm: str
    control: str
    response: str
    difference: Estimate
    ratio: Estimate | None  # treatment / control, from log differences; None unless all values are positive
    better: Judgement
    correlation: float | None  # of paired seeds: does pairing help?
    sd_ratio: float | None  # larger over smaller arm SD
    worst_rank_p: float | None  # with diverged runs ranked worst (None: nobody diverged, or too few seeds)
    note: str = ""


@dataclass(frozen=True)
class Effect:
    """A main effect (one factor) or an interaction (several) of the factorial, from low to high level.

    Coded as the mean over the other factors' cells of (on - off); interactions halve at each order, as in
    Montgomery, so that a main effect is a difference of two means of half the cells each.
    """

    factors: tuple[str, ...]
    response: str
    scale: Scale
    estimate: Estimate
    better: Judgement
    level_means: Mapping[str, float]  # "off" / "on" (main), or "rms=off,swiglu=on"; geometric ones for logs
    primary: bool  # on the scale that the response declares
    text: str = ""  # in words: "rms raises macro_auroc by 0.004 (−0.002 to 0.010)"


@dataclass(frozen=True)
class EffectTable:
    """All effects of one response on one scale, or why there are none."""

    response: str
    scale: Scale
    effects: tuple[Effect, ...]
    method: Literal["per_seed", "pooled", "none"]
    residual_sd: float | None
    sd_ratio: float | None  # largest over smallest within-arm SD
    seeds: tuple[int, ...]  # complete blocks that it rests on
    note: str = ""  # refusal ("cells missing: rms_only (seed 2)"), or the reason for the method


@dataclass(frozen=True)
class Verdict:
    """What the data say of a declared hypothesis."""

    hypothesis: str
    claim: str
    text: str  # the claim in words
    response: str
    treatment: str
    control: str
    primary: bool
    outcome: Outcome
    estimate: Estimate  # difference, or ratio minus nothing: on the hypothesis' own scale
    margin: float
    scale: Literal["difference", "ratio"]
    p: float | None  # for the claim: one-sided, and twice that for superiority, as its interval is
    p_holm: float | None  # of the smaller of p and p_against, over the primary ones; None for others
    reason: str  # one sentence with the figures
    advice: str = ""  # of an inconclusive verdict: seeds needed, or that no number of seeds is likely to help
    locked: bool = False  # was in the plan when it was locked; if not, it is exploratory
    declared: Literal["confirmatory", "exploratory"] = "confirmatory"
    p_against: float | None = None  # against the claim: small where it is refuted


@dataclass(frozen=True)
class Divergence:
    """How many of an arm's runs diverged: an outcome like any other."""

    arm: str
    diverged: int
    ended: int  # done or diverged
    low: float | None  # Clopper-Pearson, of the share
    high: float | None
    steps: tuple[int, ...]  # at which they did
    fisher_p: float | None  # against the baseline; None for the baseline


@dataclass(frozen=True)
class TimeTo:
    """When an arm reaches a target; a run that never does is censored at its last step."""

    arm: str
    response: str
    target: float | None
    reached: int
    runs: int
    mean_steps: Estimate  # restricted mean up to `horizon`
    mean_seconds: Estimate | None  # None, with a note, unless all runs were on the same hardware
    median_steps: float | None  # None if fewer than half reached it
    horizon: int
    note: str = ""


@dataclass(frozen=True)
class Speed:
    """Speed and memory of an arm, on one kind of hardware with one set of kernels and one accumulation."""

    arm: str
    hardware: str
    kernels: str
    cohort_size: int
    accumulation: int  # micro-batches of an update; what ran out of memory is split into more
    runs: int
    steps_per_sec: float | None  # median over runs; each is a median over its stretches after warm-up
    spread: float | None  # half the interquartile range over the arm's runs
    step_ms: float | None
    examples_per_sec: float | None
    tokens_per_sec: float | None
    mfu: float | None
    peak_bytes: float | None
    compile_sec: float | None
    ratio: float | None  # steps/s over the baseline's on the same hardware; None if there is none
    parameters: int | None


@dataclass(frozen=True)
class RatePoint:
    """One learning rate of an arm's grid."""

    learning_rate: float
    mean: float | None  # that the choice went by; before it, over the tuning seeds that finished
    values: Mapping[int, float]
    diverged: int
    runs: int


@dataclass(frozen=True)
class RateCurve:
    """How an arm's response depends on its learning rate."""

    arm: str
    response: str
    points: tuple[RatePoint, ...]
    chosen: float | None
    at_edge: bool
    sensitivity: float | None  # mean shortfall from the best over the grid (Wortsman et al. 2023)
    note: str = ""


@dataclass(frozen=True)
class Place:
    """An arm in the ranking."""

    arm: str
    value: Estimate  # what is ranked, over the arm's finished runs
    change: Estimate | None  # from the baseline, in percent of it, over paired seeds; None: there is none
    better: Judgement  # of the change; "unclear" unless the interval excludes 0
    label: str  # "CRITICAL", "IMPROVEMENT (MINOR)"; empty without a change
    means: Mapping[str, float]  # of what the runs recorded: "train_loss.final" -> mean over the finished runs
    done: int
    diverged: int
    note: str = ""


@dataclass(frozen=True)
class Ranking:
    """The arms by one number, best first; an arm of which runs diverged stands behind those of which none did."""

    of: str  # the response that is ranked
    goal: Literal["lower", "higher"]  # where better values lie
    scale: Scale  # of the changes: geometric means of ratios (log), or mean differences (raw)
    places: tuple[Place, ...]
    note: str = ""  # why there are no changes from the baseline


@dataclass(frozen=True)
class Expected:
    """An expectation about results, held to what was measured."""

    number: int  # among the study's expectations
    arm: str  # that it is of; empty if the study has none
    answer: Literal["met", "not met", "cannot be said"]
    measured: Estimate | None  # a ratio to the baseline, or the arm's own mean
    sentence: str  # what was measured, and what that says


@dataclass(frozen=True)
class Instability:
    """How steadily the runs of an arm trained at one learning rate."""

    arm: str
    learning_rate: float | None
    phase: Phase
    runs: int  # that ended, well or badly
    diverged: int
    steps: tuple[int, ...]  # first non-finite step of those that diverged, in rising order
    spikes: tuple[int, ...]  # steps with a loss far above the running median, of each run that counted them
    largest_grad_norm: float | None  # of all of these runs

    @property
    def unstable(self) -> bool:
        """Whether any run diverged or had a spike."""
        return bool(self.diverged or any(self.spikes))


@dataclass(frozen=True)
class Analysis:
    """All of it. Order everywhere: responses and arms as declared."""

    arms: tuple[ArmValue, ...]
    contrasts: tuple[Contrast, ...]
    effects: tuple[EffectTable, ...]  # empty unless the arms are a factorial
    verdicts: tuple[Verdict, ...]
    divergence: tuple[Divergence, ...]
    time_to: tuple[TimeTo, ...]
    speed: tuple[Speed, ...]
    rates: tuple[RateCurve, ...]
    warnings: tuple[str, ...]  # what a reader must know before the numbers: incomplete arms, amendments, …
    ranking: Ranking
    expectations: tuple[Expected, ...]  # those about results
    instability: tuple[Instability, ...]  # empty for studies that do not measure it
    compute: Mapping[str, Any] = field(
        default_factory=dict
    )  # runs, run hours, device hours, hardware -> hours

    def arm(self, arm: str, response: str) -> ArmValue:
        """The value of one response of one arm."""
        return next(v for v in self.arms if v.arm == arm and v.response == response)
