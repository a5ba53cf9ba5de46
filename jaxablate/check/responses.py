"""The rule on responses: they are recorded, they can be read as declared, and knowing nothing does not pay."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from jaxablate.check.case import Case, Said, fail, missing, note, ok
from jaxablate.check.probes import Computed
from jaxablate.check.rules import Saying
from jaxablate.errors import suggestion
from jaxablate.study import Response

# Of the way from chance to a perfect score: how far a predictor that knows nothing may be beyond chance.
TRIVIAL_TOLERANCE = 0.05
PERFORMANCE = ("steps_per_sec", "step_ms", "examples_per_sec", "tokens_per_sec", "mfu", "peak_bytes",
               "compile_sec")  # fmt: skip


def response(case: Case) -> Saying:
    """Every response of the study, in this arm."""
    for one in case.study.responses:
        yield from _declaration(case, one)
        if one.metric.startswith("val/"):
            yield from _scores(case, one)
        else:
            known = {*case.probe.built.recorded, *(f"perf/{name}" for name in PERFORMANCE)}
            if one.metric not in known:
                yield fail(
                    f"response '{one.name}': no run records {one.metric}; {suggestion(one.metric, known)}"
                )
    names = ", ".join(one.name for one in case.study.responses)
    return ok(f"recorded, finite, and with direction: {names}")


def _declaration(case: Case, one: Response) -> Saying:
    """What can be seen before anything runs."""
    task, training = case.probe.built.task, case.probe.run.training
    natural = task.directions.get(one.metric)
    if natural is not None and natural != one.direction:
        yield fail(
            f"response '{one.name}' is declared '{one.direction}', and of {one.metric} the task says '{natural}': "
            f"worse would be reported as better",
            declared=one.direction, task=natural,
        )  # fmt: skip
    if one.target is not None and one.chance is not None and _up(one) * (one.target - one.chance) <= 0:
        yield fail(
            f"response '{one.name}': target={one.target:g} is no better than chance={one.chance:g}, so every run is "
            f"there at once"
        )
    if one.scale == "log" and (values := [v for v in (one.target, one.chance) if v is not None and v <= 0]):
        yield fail(f"response '{one.name}' is on a log scale, which has no {values[0]:g}; use scale='raw'")
    if not one.metric.startswith("val/"):
        return None
    if one.metric.removeprefix("val/") in _closing(case):
        if one.reduce in ("at", "time_to"):
            yield fail(
                f"response '{one.name}' is read during training, and {one.metric} is measured when that has ended; "
                f"use reduce='final'"
            )
        return None
    steps, done = set[int](), 0
    for stage in case.probe.built.stages:  # as the loop evaluates
        own = range(1, stage.steps + 1)
        steps |= {done + n for n in own if stage.evaluates(n, done, training.eval_every)}
        done += stage.steps
    if one.reduce == "best" and len(steps) == 1:
        yield fail(
            f"response '{one.name}' takes the best of one evaluation, at step {done} (eval_every="
            f"{training.eval_every}): best is last",
            evaluations=1,
        )  # fmt: skip
    if one.reduce == "time_to" and len(steps) == 1:
        yield fail(
            f"response '{one.name}' asks when a target is reached, and the only evaluation is at the end, step {done} "
            f"(eval_every={training.eval_every})"
        )
    if one.reduce == "at" and one.step not in steps:
        nearest = min(steps, key=lambda s: abs(s - one.step))
        yield fail(
            f"response '{one.name}' is read at step {one.step}, where nothing is evaluated; the nearest is {nearest}",
            nearest=nearest,
        )  # fmt: skip
    return None


def _closing(case: Case) -> Collection[str]:
    """Names of the metrics that are measured at the end alone, as far as they are known."""
    return case.probe.computed.closing if isinstance(case.probe.computed, Computed) else ()


def _scores(case: Case, one: Response) -> Saying:
    """What the untrained model and predictors that know nothing score."""
    computed = case.probe.computed
    if not isinstance(computed, Computed):
        yield missing(computed)
        return None
    key = one.metric.removeprefix("val/")
    if key not in computed.scores:
        valid = [f"val/{name}" for name in computed.scores]
        yield fail(
            f"response '{one.name}': evaluation gives no {one.metric}; {suggestion(one.metric, valid)}"
        )
        return None
    start = computed.scores[key]
    if not math.isfinite(start):
        yield fail(
            f"response '{one.name}': {one.metric} of the untrained model is {start}, not a number to compare"
        )
        return None
    if one.scale == "log" and start <= 0:
        yield fail(
            f"response '{one.name}' is on a log scale, and {one.metric} of the untrained model is {start:g}; "
            f"use scale='raw'"
        )
    if one.target is not None and _up(one) * (start - one.target) >= 0:
        yield fail(
            f"response '{one.name}': the untrained model is at {start:g}, which is beyond target={one.target:g} already"
        )
    trivial = {name: scores[key] for name, scores in computed.trivial.items() if key in scores}
    if not trivial:
        yield note(
            f"response '{one.name}': the task names no predictor that knows nothing (Source.trivial) to hold it to"
        )
        return None
    if set(trivial.values()) == {start} and case.bench.moved_scores(case.arm).get(key) == start:
        yield fail(
            f"response '{one.name}': {one.metric} is {start:g} whatever is predicted, by models and by "
            f"{_shown(trivial)}: it is constant",
            value=start,
        )  # fmt: skip
        return None
    said = _too_good(one, trivial)
    # What an arm does not change is said once.
    if said is not None and (said.verdict == "fail" or case.arm == case.study.baseline):
        yield said
    return None


def _too_good(one: Response, trivial: Mapping[str, float]) -> Said | None:
    """Whether a predictor that knows nothing does well: beyond chance, or perfectly where none is declared."""
    name, best = max(trivial.items(), key=lambda item: _up(one) * item[1])
    if not math.isfinite(best):
        return None
    largest = max(abs(best), abs(one.chance or 0.0))
    perfect = 0.0 if one.direction == "min" else 1.0 if largest <= 1 else 100.0
    knows_nothing = f"response '{one.name}': the predictor '{name}', which knows nothing, scores {best:.4g}"
    if _up(one) * (best - perfect) >= 0:
        return fail(f"{knows_nothing}, as good as can be", predictor=name, score=best)
    if one.chance is None:
        return note(
            f"response '{one.name}' declares no chance to hold it to; knowing nothing scores {_shown(trivial)}"
        )
    if _up(one) * (best - one.chance) > TRIVIAL_TOLERANCE * abs(perfect - one.chance):
        return fail(
            f"{knows_nothing}, better than the declared chance={one.chance:g}",
            predictor=name, score=best, chance=one.chance,
        )  # fmt: skip
    return None


def _up(one: Response) -> int:
    """Which way the metric is better; a time to reach a target, made from it, is always better short."""
    return 1 if one.direction == "max" else -1


def _shown(trivial: Mapping[str, float]) -> str:
    return ", ".join(f"{value:.4g} ('{name}')" for name, value in trivial.items())
