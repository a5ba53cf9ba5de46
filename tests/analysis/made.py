"""Studies with known effects, made up in memory: what the analysis is tested on.

    results = made_results(effects={"swiglu": 0.02, "flash*rms": -0.01}, seeds=5, noise=0.004)

No files and no training; every run is a `Result` as `results.load` would have read it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxablate.analysis import plots
from jaxablate.analysis.report.extra import Extra
from jaxablate.analysis.results import Result, Results
from jaxablate.runstore import State
from jaxablate.study import Expectation, Hypothesis, LearningRate, Response, Study, factorial, switch

FACTORS = (
    switch("flash", "implementation", {"model.image.attention.impl": "flash"}),
    switch("rms", "model", {"model.image.norm": "rmsnorm"}),
    switch("swiglu", "model", {"model.image.ffn": "swiglu"}),
)
NAMES = {
    frozenset(): "baseline",
    frozenset({"flash"}): "flash_only",
    frozenset({"rms"}): "rms_only",
    frozenset({"swiglu"}): "swiglu_only",
    frozenset({"flash", "rms"}): "flash_rms",
    frozenset({"flash", "swiglu"}): "flash_swiglu",
    frozenset({"rms", "swiglu"}): "rms_swiglu",
    frozenset({"flash", "rms", "swiglu"}): "optimized_full",
}
RESPONSES = (
    Response("val/macro_auroc", "max", chance=0.5),
    Response("val/loss", "min", scale="log"),
    Response("val/macro_auroc", "max", reduce="time_to", fraction=0.95, chance=0.5),
)
HYPOTHESES = (
    Hypothesis("flash_equal", "equivalence", factor="flash", margin=0.02, text="flash leaves the AUROC as it is"),
    Hypothesis("rms_no_worse", "non_inferiority", factor="rms", margin=0.02, text="RMSNorm costs no AUROC"),
    Hypothesis("swiglu_better", "superiority", factor="swiglu", text="SwiGLU raises the AUROC"),
    Hypothesis("full_no_worse", "non_inferiority", "optimized_full", margin=0.02, text="all three cost nothing"),
    Hypothesis(
        "full_loss", "superiority", "optimized_full", response="loss", margin=0.05, scale="ratio", primary=False,
        text="all three lower the loss by 5 %",
    ),
)  # fmt: skip
BASE, STEPS, EVERY = 0.7, 300, 25
HARDWARE = "1 x NVIDIA H200"


def made_study(seeds: int = 5, **changes: Any) -> Study:
    """A 2^3 study with the arms of CT-CLIP; `changes` replaces fields of it."""
    fields: dict[str, Any] = {
        "name": "made",
        "title": "Made up: flash x RMSNorm x SwiGLU",
        "factors": FACTORS,
        "arms": factorial(FACTORS, names=NAMES),
        "seeds": tuple(range(seeds)),
        "responses": RESPONSES,
        "hypotheses": HYPOTHESES,
        "expectations": (Expectation("flash attention: 2 to 4 times faster"),),
    }
    return Study(**(fields | changes))


def wide_picture(results: Results, analysis: Any, folder: Path) -> list[Extra]:
    """What a study adds of its own (`extra_report`): a picture twice as wide as the report's, and a text."""
    figure = plots.new_figure(9.4, 3)
    figure.subplots().plot(range(len(results.runs)))
    picture, text = folder / "figures" / "wide.png", folder / "guide.md"
    picture.write_bytes(plots.encode(figure, "png"))
    text.write_text("Take the first.")
    return [
        Extra(picture, "A line as long as the runs are many.", "a line"),
        Extra(text, "what to take"),
    ]


def tuned_study(seeds: int = 5, **changes: Any) -> Study:
    """The same with a learning-rate rule."""
    rule = LearningRate(grid=(3e-4, 1e-3, 3e-3), tuning_seeds=(100, 101))
    return made_study(seeds, **({"learning_rate": rule} | changes))


def made_results(
    study: Study | None = None,
    *,
    effects: Mapping[str, float] | None = None,
    seeds: int = 5,
    noise: float = 0.005,
    seed_sd: float = 0.01,
    noise_of: Mapping[str, float] | None = None,
    diverged: Mapping[str, Sequence[int]] | None = None,
    missing: Mapping[str, Sequence[int]] | None = None,
    missing_state: State = "pending",
    hardware: Mapping[str, str] | None = None,
    rng: int = 0,
    **about: Any,
) -> Results:
    """All runs of a study.

    Args:
      study: default: `made_study(seeds)`; its own seeds count.
      effects: on the quality that all responses follow (`val/macro_auroc` is it): of a factor or an interaction
        ("flash*rms") coded -1/+1 as in Montgomery, or of one level ("position=none") against the rest.
      seeds: number of seeds of the default study.
      noise: SD of each run. noise_of: arm -> its own SD.
      seed_sd: SD of what all arms of a seed have in common.
      diverged: arm -> seeds that diverged. missing: arm -> seeds in `missing_state`.
      hardware: arm -> hardware other than `HARDWARE`.
      rng: seed of the random numbers.
      about: further fields of `Results`, such as `amendments`.
    """
    study = study or made_study(seeds)
    draw = np.random.default_rng(rng)
    shared = {seed: seed_sd * draw.standard_normal() for seed in study.seeds}
    diverged, missing, hardware = diverged or {}, missing or {}, hardware or {}
    means = {arm.name: _mean(study, arm.name, effects or {}) for arm in study.arms}
    targets = {r.name: _target(r, means[study.baseline]) for r in study.responses if r.reduce == "time_to"}
    runs = []
    rates = {}
    if study.learning_rate is not None:
        for arm in study.arms:
            runs += _tuning(study, arm.name, means[arm.name], noise, draw, targets)
            rates[arm.name] = {"learning_rate": study.learning_rate.grid[1], "edge": False}
    for arm in study.arms:
        sd = (noise_of or {}).get(arm.name, noise)
        for seed in study.seeds:
            quality = means[arm.name] + shared[seed] + sd * draw.standard_normal()
            state: State = "done"
            if seed in diverged.get(arm.name, ()):
                state = "diverged"
            elif seed in missing.get(arm.name, ()):
                state = missing_state
            rate = rates.get(arm.name, {}).get("learning_rate", 1e-3)
            where = hardware.get(arm.name, HARDWARE)
            runs.append(_run(study, arm.name, seed, state, quality, rate, where, targets, draw))
    fields = {"locked": "2026-01-01T00:00:00.000+00:00", "plan_hash": study.plan_hash, "rates": rates}
    return Results(study, tuple(runs), targets=targets, **(fields | about))


def _target(response: Response, baseline: float) -> float:
    if response.target is not None:
        return response.target
    assert response.fraction is not None and response.chance is not None
    return response.chance + response.fraction * (baseline - response.chance)


def _mean(study: Study, arm: str, effects: Mapping[str, float]) -> float:
    levels, changed = study.levels(arm), study.set_levels(arm)
    total = BASE
    for term, effect in effects.items():
        if "=" in term:
            factor, _, level = term.partition("=")
            total += effect * (levels[factor] == level)
        else:
            signs = [1 if factor in changed else -1 for factor in term.split("*")]
            total += effect / 2 * math.prod(signs)
    return total


def _value(response: Response, quality: float, targets: Mapping[str, float]) -> float | None:
    """What a run of that quality scores: AUROC-like, or its loss, or when it reaches a target."""
    if response.reduce == "time_to":
        # The curve comes up to its quality like 1 - exp(-4 t); evaluations are EVERY steps apart.
        chance = response.chance or 0.0
        share = (targets[response.name] - chance) / (quality - chance)
        step = EVERY * math.ceil(-math.log(max(1 - share, 1e-9)) / 4 * STEPS / EVERY)
        return float(step) if step <= STEPS else None
    if "loss" in response.metric:
        return 2.5 * math.exp(-3 * (quality - BASE))
    return quality if response.direction == "max" else 1 - quality


def _run(
    study: Study, arm: str, seed: int, state: State, quality: float, rate: float, hardware: str,
    targets: Mapping[str, float], draw: np.random.Generator,
) -> Result:  # fmt: skip
    ended = state in ("done", "diverged")
    values = {r.name: _value(r, quality, targets) if state == "done" else None for r in study.responses}
    changed = study.set_levels(arm)
    speed = 20.0 * (1.5 if "flash" in changed else 1.0) * (1 + 0.02 * draw.standard_normal())
    perf = {
        "steps_per_sec": speed,
        "step_ms": 1000 / speed,
        "examples_per_sec": 16 * speed,
        "tokens_per_sec": None,
        "mfu": 0.3,
        "compile_sec": 12.0,
        "peak_bytes": 2**30 * (1 if "flash" in changed else 2),
    }
    return Result(
        arm=arm,
        seed=seed,
        state=state,
        values=values,
        run_id=f"seed{seed}-lr{rate!r}-{arm}",
        learning_rate=rate,
        seconds={
            r.name: None if (step := values[r.name]) is None else step / speed
            for r in study.responses
            if r.reduce == "time_to"
        },
        steps=(STEPS if state == "done" else 40) if ended else None,
        diverged_at=40 if state == "diverged" else None,
        parameters=87_360 if ended else None,
        perf=perf if ended else {},
        kernels={"attention": "blockwise" if "flash" in changed else "reference"} if ended else {},
        hardware=hardware if ended else "",
        cohort_size=len(study.seeds) if ended else 1,
    )


def _tuning(
    study: Study, arm: str, mean: float, noise: float, draw: np.random.Generator, targets: Mapping[str, float]
) -> list[Result]:
    rule = study.learning_rate
    assert rule is not None
    best = rule.grid[len(rule.grid) // 2]
    runs = []
    for rate in rule.grid:
        for seed in rule.tuning_seeds:
            quality = mean - 0.02 * math.log(rate / best) ** 2 + noise * draw.standard_normal()
            run = _run(study, arm, seed, "done", quality, rate, HARDWARE, targets, draw)
            runs.append(dataclasses.replace(run, phase="tuning"))
    return runs
