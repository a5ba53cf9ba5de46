"""`jaxablate bench step`: the training step of every arm, timed in turns on one batch. Nothing is trained.

The arms are compiled one after another. Then the step of all is timed in turns, and where that is asked for the
forward passes of all, and the backward passes; what these are is said in `step_programs`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from jaxablate import config, disk, inputs, provenance, runstore
from jaxablate.analysis import benchmarks
from jaxablate.analysis.benchmarks import FORMAT, ArmBenchmark, BatchBenchmark, StepBenchmark, Timing, What
from jaxablate.analysis.stats.effects import design
from jaxablate.bench import step_report, step_stats
from jaxablate.bench.step_programs import Batches, Runnable, StepProgram, make_program
from jaxablate.bench.timing import Samples, time_interleaved
from jaxablate.config import RunConfig
from jaxablate.errors import UserError, suggestion
from jaxablate.footprint import NOT_HERE, memory_of, out_of_memory
from jaxablate.program import Step
from jaxablate.study import Study
from jaxablate.task import Variables
from jaxablate.trees import count, digest, flat
from jaxablate_gpus import peak_flops

logger = logging.getLogger(__name__)

WHATS: tuple[What, ...] = get_args(What)
CONTROL = "baseline, again"
_FEWER = "the states of all arms side by side; take fewer with --arm, or a smaller --batch"


@dataclass(frozen=True)
class Options:
    """What to measure, and how."""

    group: str = ""
    arms: tuple[str, ...] = ()  # the baseline is measured with them
    stage: str = ""  # of the task, by name; default: the first
    members: int = 1  # of the cohort that a step is of; they differ in seed
    rounds: int = 40
    what: tuple[str, ...] = ("step",)
    data: Literal["real", "synthetic"] = "real"
    control: Literal["with", "without"] = (
        "with"  # a second copy of the baseline, which shows what chance does
    )
    out: str = ""  # directory; default: <workdir>/<study>/bench

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"--rounds={self.rounds}: must be 1 or more; leave it out for 40")
        check_members(self.members)
        for what in self.what:
            if what not in WHATS:
                raise UserError(f"--what={what}: {suggestion(what, WHATS)}")
        if not self.what:
            raise UserError(f"--what: is empty; valid: {', '.join(WHATS)}")


def check_members(members: int) -> None:
    """Raises UserError if a cohort cannot have so many."""
    if members < 1:
        raise UserError(f"--members={members}: must be 1 or more; leave it out for 1")


@dataclass(frozen=True)
class Outcome:
    """What was measured, what that is in a terminal, and where it was written."""

    benchmark: StepBenchmark | BatchBenchmark
    tables: str
    files: tuple[Path, ...]

    @property
    def exit_code(self) -> int:
        """1 if an arm could not be measured."""
        return int(any(arm.problem for arm in self.benchmark.arms))

    def to_dict(self) -> dict[str, Any]:
        """As data, for `--json`."""
        found = disk.plain(dataclasses.asdict(self.benchmark))
        return {**found, "files": [str(path) for path in self.files], "exit_code": self.exit_code}

    def text(self) -> str:
        """The tables, in a terminal."""
        return f"{self.tables}\n\nwritten: {self.files[0]}"


def bench_step(study: Study, options: Options) -> Outcome:
    """Measures the arms of a study, and writes what it found.

    Raises:
      UserError: no such arm, group or stage, a config that does not resolve, or programs that do not fit together.
    """
    runs = selected(study, options.group, options.arms)
    bench = _Bench(runs, study.baseline, options)
    found = bench.measure(study)
    where = Path(options.out) if options.out else folder(runs[study.baseline], study)
    return Outcome(found, step_report.text(found), step_report.write(found, where))


def selected(study: Study, group: str, arms: Sequence[str]) -> dict[str, RunConfig[Any, Any]]:
    """arm -> config of its first seed, of the arms asked for and the baseline, as declared."""
    chosen = {arm.name for arm in study.select(group, arms)}
    if not chosen:
        raise UserError(f"--group={group} --arm={' '.join(arms)}: no arm is in both; drop one of them")
    return {
        arm.name: config.resolve(study.config(arm.name)).base
        for arm in study.arms
        if arm.name in chosen or arm.name == study.baseline
    }


def folder(run: RunConfig[Any, Any], study: Study) -> Path:
    """Where a study's benchmarks are written by default."""
    return benchmarks.folder(Path(run.host.workdir) / study.name)


# ------------------------------------------------------------------------------------------ measuring


class _Bench:
    """Compiles what can be compiled, then times it."""

    def __init__(self, runs: Mapping[str, RunConfig[Any, Any]], baseline: str, options: Options):
        self.runs, self.baseline, self.options = runs, baseline, options
        self.built: dict[str, StepProgram] = {}
        self.steps: dict[str, Step] = {}
        self.compile_sec: dict[str, float] = {}
        self.problems: dict[str, str] = {}
        self.batches = Batches(options.data, options.members)
        # The same for all arms, whatever their accumulation: only then can their passes be compared.
        self.micro_batch = min(run.training.batch_size // run.accumulation for run in runs.values())

    def measure(self, study: Study) -> StepBenchmark:
        """All of it."""
        for arm, run in self.runs.items():
            self._build(arm, run)
        if not self.built:
            arm, why = next(iter(self.problems.items()))
            raise UserError(f"bench {study.name}: no arm can be measured here; {arm}: {why}")
        if self.options.control == "with" and self.baseline in self.built:
            self._build(CONTROL, self.runs[self.baseline])
        first = next(iter(self.built.values()))
        self._must_fit(first.mesh.devices.flat[0])
        try:
            samples = self._samples()
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            raise UserError(f"bench: out of memory with {_FEWER}") from error
        facts = provenance.collect(jax.devices(), {}, first.mesh.shape)  # each arm has its own kernels
        return self._found(study, samples, facts)

    def _build(self, arm: str, run: RunConfig[Any, Any]) -> None:
        try:
            built = make_program(run, self.options.stage, self.options.members)
            began = time.perf_counter()
            step = built.compile_step()
        except NOT_HERE as error:
            self.problems[arm] = str(error)
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            self.problems[arm] = f"does not fit: {str(error).splitlines()[0]}"
        else:
            self.built[arm], self.steps[arm] = built, step
            self.compile_sec[arm] = time.perf_counter() - began
            logger.info("%s: compiled in %.1f s", arm, self.compile_sec[arm])
        if arm in self.problems:
            logger.warning("%s: %s", arm, self.problems[arm])

    def _must_fit(self, device: Any) -> None:
        """All states lie on the device at once, and the largest program works beside them."""
        limit = (device.memory_stats() or {}).get("bytes_limit")
        parts = [memory for step in self.steps.values() if (memory := memory_of(step.compiled))]
        if not limit or not parts:
            return
        lying = sum(memory["argument"] for memory in parts)
        need = lying + max(memory["peak"] - memory["argument"] for memory in parts)
        if need > limit:
            raise UserError(
                f"bench: {need / 1e9:.1f} GB are needed of a device that has {limit / 1e9:.1f}, with {_FEWER}"
            )

    def _samples(self) -> dict[What, dict[str, Samples]]:
        ready, bases = {}, dict[Any, Variables]()
        for arm, built in self.built.items():
            built.rows = self.micro_batch
            logger.info("%s: starting", arm)
            base = inputs.load_base(built.task, config.cache_dir(built.task.config.host))
            key = digest(flat(base)), built.mesh  # arms that share a base share its memory
            if key not in bases:
                bases[key] = inputs.put_base(base, built.abstract_base)
            built.base = bases[key]
            batch = self.batches.of(built.task)
            ready[arm] = Runnable(built, self.steps[arm], batch, self.options.what)
        return {what: self._time(what, ready) for what in WHATS if what in self.options.what}

    def _time(self, what: What, ready: Mapping[str, Runnable]) -> dict[str, Samples]:
        logger.info("timing %s of %d programs, %d rounds", what, len(ready), self.options.rounds)
        clocks = {arm: clock for arm, r in ready.items() if (clock := r.clock(what))}
        calls = {arm: r.call(what) for arm, r in ready.items()}
        return time_interleaved(calls, rounds=self.options.rounds, warmup=2, clocks=clocks)

    # ------------------------------------------------------------------------------- what it comes to

    def _found(
        self, study: Study, samples: Mapping[What, Mapping[str, Samples]], facts: Mapping[str, Any]
    ) -> StepBenchmark:
        level = 1 - study.alpha
        arms = tuple(self._arm(arm, samples, facts, level) for arm in self.runs)
        control = self._arm(CONTROL, samples, facts, level) if CONTROL in self.built else None
        effects, note = self._effects(study, samples, level)
        run = self.runs[self.baseline]
        found = StepBenchmark(
            format=FORMAT,
            study=study.name,
            scale=run.scale,
            baseline=study.baseline,
            time=runstore.now(),
            hardware=provenance.hardware(facts),
            platform=facts["devices"]["platform"],
            data=self.batches.words,
            stage=stage_of(next(iter(self.built.values()))),
            members=self.options.members,
            batch_size=run.training.batch_size,
            micro_batch=self.micro_batch,
            rounds=self.options.rounds,
            compilation="with a cache" if jax.config.values["jax_compilation_cache_dir"] else "anew",
            level=level,
            arms=arms,
            effects=effects,
            effects_note=note,
            judged=(),
            control=control,
            provenance={**facts, "git": commit(facts["git"])},
        )
        return replace(found, judged=benchmarks.judge(study, found))

    def _arm(
        self,
        arm: str,
        samples: Mapping[What, Mapping[str, Samples]],
        facts: Mapping[str, Any],
        level: float,
    ) -> ArmBenchmark:
        run = self.runs[self.baseline if arm == CONTROL else arm]
        training = run.training
        found = ArmBenchmark(
            arm=arm,
            config=run.fingerprint,
            kernels={},
            accumulation=run.accumulation,
            remat=training.remat,
            compute_dtype=training.compute_dtype,
            problem=self.problems.get(arm, ""),
        )
        if arm not in self.built:
            return found
        built, memory = self.built[arm], memory_of(self.steps[arm].compiled)
        base = memory_of(self.steps[self.baseline].compiled) if self.baseline in self.steps else None
        timings = tuple(self._timing(what, arm, taken, level) for what, taken in samples.items())
        task, rate = built.task, None
        if "step" in samples:
            rate = self.options.members * training.batch_size / samples["step"][arm].median
        peak = peak_flops(facts["devices"]["kind"], training.compute_dtype)
        flops = task.flops_per_example
        return replace(
            found,
            kernels={slot: kernel.name for slot, kernel in task.kernels.items()},
            parameters=count(built.abstract_member.params) + task.base_parameters,
            compile_sec=self.compile_sec[arm],
            timings=timings,
            steps_per_sec=rate / training.batch_size if rate else None,
            examples_per_sec=rate,
            tokens_per_sec=rate * task.tokens_per_example if rate and task.tokens_per_example else None,
            mfu=rate * flops / (peak * built.mesh.size) if rate and flops and peak else None,
            memory=memory,
            memory_ratio=memory["peak"] / base["peak"] if memory and base else None,
        )

    def _timing(self, what: What, arm: str, taken: Mapping[str, Samples], level: float) -> Timing:
        own, base = taken[arm], taken.get(self.baseline)
        ratio = None
        if base is not None and arm != self.baseline:
            ratio = step_stats.time_ratio(own.seconds, base.seconds, level)
        milliseconds = tuple(1000 * seconds for seconds in own.seconds)
        return Timing(what, milliseconds, 1000 * own.median, 1000 * own.spread, ratio)

    def _effects(
        self, study: Study, samples: Mapping[What, Mapping[str, Samples]], level: float
    ) -> tuple[tuple[benchmarks.EffectRatio, ...], str]:
        crossed, why = design(study)
        if crossed is None:
            return (), why
        if missing := [arm for arm in crossed.arms if arm not in self.built]:
            return (), f"no effects: not all arms of the factorial were measured ({', '.join(missing)})"
        effects: list[benchmarks.EffectRatio] = []
        for what, taken in samples.items():
            times = np.array([taken[arm].seconds for arm in crossed.arms]).T
            effects += step_stats.time_effects(times, crossed, what, level)
        peaks = [memory["peak"] for arm in crossed.arms if (memory := memory_of(self.steps[arm].compiled))]
        if len(peaks) == len(crossed.arms):
            effects += step_stats.memory_effects(peaks, crossed)
        return tuple(effects), crossed.note


def stage_of(built: StepProgram) -> str:
    """The name of a program's stage, and where it stands if there are several: `operator, 2 of 4`."""
    name, names = built.stage.name, [stage.name for stage in built.task.stages()]
    return f"{name}, {names.index(name) + 1} of {len(names)}" if len(names) > 1 else name


def commit(git: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The commit without the changes themselves: every run keeps those."""
    return None if git is None else {"commit": git["commit"], "dirty": git["dirty"]}
