"""Every arm's program built and, where it is small enough, run once: what the rules look at."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np

from jaxablate.check import values
from jaxablate.check.programs import PLATFORM, Built, Compiler, Observed, build, shapes
from jaxablate.check.values import Draw
from jaxablate.config import RunConfig
from jaxablate.data import Batch, CohortBatches
from jaxablate.errors import UserError
from jaxablate.program import path_name
from jaxablate.task import Source

logger = logging.getLogger(__name__)

# Beyond these an arm is not run unless it is asked for: on two cores a step would take over a minute, or the
# arms' parameters and gradients some gigabytes.
MAX_STEP_FLOPS = 3e11
MAX_PARAMETERS = 30_000_000
BATCHES = 3  # training batches that are looked at
EVALUATION = 3  # evaluation batches, of distinct shapes, that outputs are compared on

T = TypeVar("T")
Execute = Literal["auto", "yes", "no"]


@dataclass(frozen=True)
class Broken:
    """Why something could not be had: the study's own code, or its data, raised."""

    reason: str
    blame: Literal["input", "code"]


@dataclass(frozen=True)
class Skipped:
    """Why something was not tried."""

    reason: str


@dataclass(frozen=True)
class Data:
    """What a task opened: digests of what it trains on first and of all it is evaluated on."""

    fingerprint: str
    count: int
    batches: tuple[str, ...]  # of the first steps, as training with the arm's first seed sees them
    ids: tuple[int, ...] | None  # the items' own "index", if they have one
    evaluation: str


@dataclass(frozen=True)
class Update:
    """The first update of a stage, at perturbed parameters."""

    stage: str
    metrics: Mapping[str, float]
    moved_frozen: tuple[str, ...]  # parameters that no pattern matches, and that changed
    moved_state: tuple[str, ...]  # collections that changed
    dead: tuple[str, ...]  # trained parameters whose whole gradient is 0
    not_finite: tuple[str, ...]  # trained parameters whose gradient is not finite


@dataclass(frozen=True)
class Computed:
    """What an arm gave when it ran."""

    init: Mapping[str, str]  # path -> digest of the initial value
    updates: tuple[Update, ...]
    scores: Mapping[str, float]  # of the untrained model
    trivial: Mapping[str, Mapping[str, float]]  # of predictors that know nothing


@dataclass(frozen=True)
class Probe:
    """An arm, or a combination of levels that an arm is compared with."""

    label: str
    built: Built
    data: Data | Broken | Skipped
    computed: Computed | Broken | Skipped

    @property
    def run(self) -> RunConfig[Any, Any]:
        """The config."""
        return self.built.run


@dataclass(frozen=True)
class _Running:
    """A compiled arm with its data, while it is on the bench."""

    built: Built
    steps: tuple[Callable[..., Any], ...]
    predict: Callable[[Any, Any, Batch], Any]
    variables: Any  # as initialised
    source: Source
    batch: Batch  # of the first step
    evaluation: tuple[Batch, ...]  # the first of each shape
    scores: Mapping[str, float]
    trivial: Mapping[str, Mapping[str, float]]


class Bench:
    """Builds the arms of a study, and runs each that is small enough.

    Numbers are comparable between arms because a parameter that two arms share gets the value of the arm
    that comes first, with noise that depends on its path alone, and because a batch is that of the first
    arm that has examples of these shapes. So a wrong init or a wrong batch is reported as such, once.
    """

    def __init__(self, cache: Path, execute: Execute, jobs: int) -> None:
        self._cache, self._execute, self._jobs = cache, execute, jobs
        self._compiler = Compiler()
        self._running: dict[str, _Running] = {}
        self._parameters: dict[Any, np.ndarray] = {}
        self._batches: dict[Any, Batch] = {}
        self._draws: dict[tuple[str, int], Draw] = {}

    def probe(self, runs: Mapping[str, RunConfig[Any, Any]]) -> dict[str, Probe | Broken]:
        """What can be known of each run, in the order given: the first ones lend the others their values."""
        with ThreadPoolExecutor(self._jobs) as pool:
            started = list(pool.map(self._start, runs, runs.values()))
        for label, (_, _, running) in zip(runs, started, strict=True):
            if isinstance(running, _Running):
                self._running[label] = running
                self._share(running)
        probes: dict[str, Probe | Broken] = {}
        for label, (made, data, running) in zip(runs, started, strict=True):
            if isinstance(made, Broken):
                probes[label] = made
                continue
            ran = running
            if isinstance(ran, _Running):
                ran = guarded(lambda label=label: self._compute(label))
            probes[label] = Probe(label, made, data, ran)
        return probes

    def draw(self, label: str, number: int) -> Draw:
        """The arm's loss, gradient and outputs at a draw of the parameters, of which there are as many as asked for."""
        if (label, number) not in self._draws:
            self._take(label, number)
        return self._draws[label, number]

    def moved_scores(self, label: str) -> dict[str, float]:
        """Scores at perturbed parameters: a metric that looks at its input has others there."""
        running = self._running[label]
        params, collections = self._variables(running, 0)
        with self._at_work():
            outputs = [running.predict(params, collections, batch) for batch in running.source.evaluation]
        return running.source.score(outputs)

    # ------------------------------------------------------------------------------------- building

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """In any thread, one at a time; and on the CPU, so that a check says the same on every machine."""
        with self._compiler.python, jax.default_device(jax.local_devices(backend=PLATFORM)[0]):
            yield

    def _start(
        self, label: str, run: RunConfig[Any, Any]
    ) -> tuple[Built | Broken, Data | Broken | Skipped, _Running | Broken | Skipped]:
        began = time.perf_counter()
        with self._at_work():
            built = guarded(lambda: build(run))
            if isinstance(built, Broken):
                return built, built, built
            if why_not := self._too_much(built):
                return built, Skipped(why_not), Skipped(why_not)
            source = guarded(lambda: built.task.open(self._cache))
            if isinstance(source, Broken):
                elsewhere = source.blame == "input" and self._execute != "yes"
                failed = Skipped(source.reason) if elsewhere else source
                return built, failed, failed
            data = guarded(lambda: _look(built, source))
            running = guarded(lambda: self._compile(built, source))
        logger.info("%-24s built in %.1f s", label, time.perf_counter() - began)
        return built, data, running

    def _too_much(self, built: Built) -> str:
        """Why the arm is not run; empty if it is."""
        if self._execute == "no":
            return "not run, as asked"
        flops, parameters = built.step_flops, built.parameters
        if self._execute == "yes" or (flops <= MAX_STEP_FLOPS and parameters <= MAX_PARAMETERS):
            return ""
        return (
            f"too large to run here, beyond {MAX_PARAMETERS:,} parameters or {MAX_STEP_FLOPS / 1e9:g} GFLOP a step, "
            f"so its data was not opened either; check it at scale=tiny, or give --execute"
        )

    def _compile(self, built: Built, source: Source) -> _Running:
        run, task = built.run, built.task
        variables = self._compiler.init(task)(np.int32(run.seed))
        params, collections = _parted(variables)
        predict = self._compiler.predict(built.programs[-1].task)  # what is reported is of the last stage
        outputs, kept = [], dict[Any, Batch]()
        for batch in source.evaluation:
            kept.setdefault(shapes(batch), batch)
            outputs.append(predict(params, collections, batch))
        first = _batches(built, source)[0]
        return _Running(
            built=built,
            steps=tuple(self._compiler.step(traced) for traced in built.traced),
            predict=predict,
            variables=variables,
            source=source,
            batch={key: first[key][0] for key in task.example()},
            evaluation=tuple(kept.values())[:EVALUATION],
            scores=source.score(outputs),
            trivial={name: source.score(given) for name, given in source.trivial(outputs).items()},
        )

    # -------------------------------------------------------------------------------------- running

    def _share(self, running: _Running) -> None:
        for path, value in values.host(running.variables).items():
            self._parameters.setdefault((path, value.shape, value.dtype), value)
        for batch in (running.batch, *running.evaluation):
            self._batches.setdefault(shapes(batch), batch)

    def _variables(self, running: _Running, draw: int) -> tuple[Any, dict[str, Any]]:
        """Parameters and collections as every arm has them at this draw; only parameters are perturbed."""

        def shared(path: Any, value: Any) -> np.ndarray:
            name = path_name(path)
            start = self._parameters[name, value.shape, value.dtype]
            return values.perturbed(name, start, draw) if name.startswith("params/") else start

        return _parted(jax.tree_util.tree_map_with_path(shared, running.variables))

    def _take(self, label: str, number: int) -> list[Any]:
        """Takes a draw; what the first update of each stage gave."""
        running = self._running[label]
        params, collections = self._variables(running, number)
        batch = self._batches[shapes(running.batch)]
        programs = running.built.programs
        with self._at_work():
            taken = [
                step(params, collections, program.one_member, batch)
                for step, program in zip(running.steps, programs, strict=True)
            ]
            outputs = {}
            for own in running.evaluation:
                shared = self._batches[shapes(own)]
                outputs[values.digest(shared)] = values.host(running.predict(params, collections, shared))
        losses, gradients = dict[str, float](), dict[str, np.ndarray]()
        for program, (_, _, metrics, gradient) in zip(programs, taken, strict=True):
            stage = program.stage.name
            losses[stage] = float(metrics["train/loss"])
            of = f"{stage}: " if len(programs) > 1 else ""
            gradients |= {f"{of}{path}": slope for path, slope in values.host(gradient).items()}
        self._draws[label, number] = Draw(values.digest(batch), losses, gradients, outputs)
        return taken

    def _compute(self, label: str) -> Computed:
        running = self._running[label]
        taken = self._take(label, 0)
        before = self._variables(running, 0)
        params, _ = _parted(running.variables)
        return Computed(
            init={path: values.digest({"": value}) for path, value in values.host(params).items()},
            updates=tuple(
                _update(program, *before, *step)
                for program, step in zip(running.built.programs, taken, strict=True)
            ),
            scores=running.scores,
            trivial=running.trivial,
        )


def _update(
    program: Observed, params: Any, collections: Any, new_params: Any, new_collections: Any, metrics: Any, gradient: Any
) -> Update:  # fmt: skip
    old, new, slopes = values.host(params), values.host(new_params), values.host(gradient)
    state, new_state = values.host(collections), values.host(new_collections)
    trained = {path for path in old if program.stage.trains(path)}
    return Update(
        stage=program.stage.name,
        metrics={key: float(value) for key, value in metrics.items()},
        moved_frozen=tuple(p for p in old if p not in trained and not np.array_equal(old[p], new[p])),
        moved_state=tuple(p for p in state if not np.array_equal(state[p], new_state[p])),
        dead=tuple(p for p in sorted(trained) if not slopes[p].any()),
        not_finite=tuple(p for p in sorted(trained) if not np.isfinite(slopes[p]).all()),
    )


def _look(built: Built, source: Source) -> Data:
    batches = _batches(built, source)
    seen = [batches[i] for i in range(min(BATCHES, len(batches)))]
    index = seen[0].get("index")
    numbered = index is not None and np.issubdtype(index.dtype, np.integer)
    evaluation = [values.digest(batch) for batch in source.evaluation]
    return Data(
        fingerprint=source.fingerprint,
        count=len(source.train),
        batches=tuple(values.digest(batch) for batch in seen),
        ids=tuple(int(i) for batch in seen for i in batch["index"].ravel()) if numbered else None,
        evaluation=hashlib.sha256("".join(evaluation).encode()).hexdigest()[:16],
    )


def _batches(built: Built, source: Source) -> CohortBatches:
    training = built.run.training
    return CohortBatches(source.train, [built.run.seed], training.batch_size, training.steps, training.order)


def _parted(variables: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    return variables["params"], {key: value for key, value in variables.items() if key != "params"}


def guarded(work: Callable[[], T]) -> T | Broken:
    """Runs a study's own code, which may raise anything; that is a finding and not the end of the check."""
    try:
        return work()
    except UserError as error:
        return Broken(str(error), "input")
    except Exception as error:  # whatever a user's model or data raises
        logger.debug("a study's code raised", exc_info=True)
        text = " ".join(str(error).split())
        return Broken(f"{type(error).__name__}: {text[:300]}", "code")
