"""Estimates and studies that are made up, so that plans can be tested without compiling anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from jaxablate.estimate.facts import BatchFacts, Estimate, MemoryFacts, StageFacts, TimeFacts
from jaxablate.schedule.plan.estimates import Cohort, Problem
from jaxablate.schedule.plan.packing import Item, pack
from jaxablate.schedule.plan.plan import FORMAT, Plan, Request, Scheduled

GB = 10**9
CAPACITY = 100  # of the GPUs of `made_plan`


def made(
    arm: str = "baseline",
    members: int = 1,
    hours: float | None = 1.0,
    peak: int = 10 * GB,
    capacity: int = 80 * GB,
    largest: int | None = 64,
    stages: Mapping[str, int] | None = None,
    devices: int = 1,
) -> Estimate:
    """An estimate of a cohort that takes so many hours, all of them in its steps."""
    steps = {"main": 100} if stages is None else stages
    total = None if hours is None else 3600 * hours
    return Estimate(
        arm=arm,
        fingerprint="f" * 16,
        scale="tiny",
        target="h200",
        parameters=23_430_000,
        trainable=23_430_000,
        flops_per_step=1.25e12,
        flops_source="model",
        examples=3200,
        tokens=0,
        steps=sum(steps.values()),
        stages=tuple(StageFacts(name, count, 23_430_000) for name, count in steps.items()),
        members=members,
        devices=devices,
        batch=BatchFacts(32, 32, 1, 1, "none", 0, "as the config says"),
        memory=MemoryFacts(
            peak, 1, 1, 1, 1, 0, "step of main", {"step of main": peak}, "", "compiled for NVIDIA H200", capacity,
            "75% of what there is", peak <= capacity, largest,
        ),
        time=None
        if total is None
        else TimeFacts(
            start_s=0.0,
            compile_s=0.0,
            compiled="anew",
            step_s=total / sum(steps.values()),
            evaluate_s=0.0,
            save_s=0.0,
            evaluations=1,
            saves=1,
            total_s=total,
            source="stated MFU 0.4",
        ),
    )  # fmt: skip


class Made:
    """Answers for estimates: each member takes an hour and 10 GB unless an arm says otherwise."""

    def __init__(self, **of_arm: Mapping[str, object] | str):
        self.of_arm, self.asked = of_arm, list[Cohort]()

    def __call__(self, cohorts: Iterable[Cohort]) -> dict[Cohort, Estimate | Problem]:
        found: dict[Cohort, Estimate | Problem] = {}
        for cohort in cohorts:
            self.asked.append(cohort)
            own = self.of_arm.get(cohort.arm, {})
            if isinstance(own, str):
                found[cohort] = Problem(own)
                continue
            each = {"hours": 1.0, "peak": 10 * GB, **own}
            hours, peak = each.pop("hours"), each.pop("peak")
            assert isinstance(peak, int)
            found[cohort] = made(
                cohort.arm,
                cohort.members,
                None if hours is None else float(str(hours)) * cohort.members,
                peak * cohort.members,
                **each,  # pyright: ignore[reportArgumentType]
            )
        return found


def made_plan(items: Sequence[Item], gpus: int, target: str = "h200") -> Plan:
    """A plan of cohorts that are named `arm/phase`, of one seed each."""
    elements = tuple(
        Scheduled(
            name=p.item.name, arm=p.item.name.split("/")[0], phase="confirm", stage="", seeds=(0,), rates=(),
            members=1, split=1, memory=p.item.memory, share=p.item.share, after=p.item.after, hours=p.item.hours,
            gpu=p.gpu, start=p.start, end=p.end,
        )
        for p in pack(items, gpus, CAPACITY)
    )  # fmt: skip
    request = Request("s", (), (0,), target, gpus)
    end = max(e.end or 0.0 for e in elements)
    return Plan(FORMAT, "toy", "", request, (), elements, (0,), (), end, end, CAPACITY, "", (), ())
