"""Every arm's program built and, where it is small enough, run once: what the rules look at."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
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
from jaxablate.evaluation import together
from jaxablate.inputs import load_base
from jaxablate.task import Closing, Source, Variables
from jaxablate.trees import path_name

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
    closing: frozenset[str]  # those of them that a run has at its end alone
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
    conclude: Callable[[Any, Any, Batch], Any]
    variables: Any  # as initialised
    base: Variables
    source: Source  # of the last stage, which is what is reported
    closing: Closing | None
    batches: tuple[_Given, ...]  # of the first step of each stage
    evaluation: tuple[Batch, ...]  # the first of each shape
    scores: Mapping[str, float] = field(default_factory=dict)
    late: frozenset[str] = frozenset()  # names of closing ones among them
    trivial: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Given:
    """A training batch, and the stage whose own data it is of; empty where all stages have the same."""

    stage: str
    batch: Batch

    @property
    def kind(self) -> Any:
        """Arms that are given this kind get the same one."""
        return self.stage, shapes(self.batch)


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
        with self._at_work():
            outputs = _outputs(running, *self._variables(running, 0))
        return {name: value for measure, given in outputs for name, value in measure.score(given).items()}

    def concluded(self, label: str) -> str:
        """Digest of what the arm gives for its first closing batch at perturbed parameters; empty without closing."""
        running = self._running[label]
        if running.closing is None:
            return ""
        with self._at_work():
            given = running.conclude(*self._variables(running, 0), running.closing.batches[0])
        return values.digest(values.host(given))

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
        variables = self._compiler.init(built.task)(np.int32(built.run.seed))
        base = jax.device_get(load_base(built.task, self._cache))
        last = built.programs[-1].task  # what is reported is of the last stage
        reported, kept = last.data_of_stage(source), dict[Any, Batch]()
        for batch in reported.evaluation:
            kept.setdefault(shapes(batch), batch)
        running = _Running(
            built=built,
            steps=tuple(self._compiler.step(traced) for traced in built.traced),
            predict=self._compiler.evaluate(last.predict, base),
            conclude=self._compiler.evaluate(last.conclude, base),
            variables=variables,
            base=base,
            source=reported,
            closing=last.closing(source),
            batches=tuple(_given(program, source) for program in built.programs),
            evaluation=tuple(kept.values())[:EVALUATION],
        )
        return _scored(running)

    # -------------------------------------------------------------------------------------- running

    def _share(self, running: _Running) -> None:
        for path, value in values.host(running.variables).items():
            self._parameters.setdefault((path, value.shape, value.dtype), value)
        for given in (*running.batches, *(_Given("", batch) for batch in running.evaluation)):
            self._batches.setdefault(given.kind, given.batch)

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
        batches = [self._batches[given.kind] for given in running.batches]
        programs = running.built.programs
        with self._at_work():
            taken = [
                step(params, collections, program.one_member, batch, running.base)
                for step, program, batch in zip(running.steps, programs, batches, strict=True)
            ]
            outputs = {}
            for own in running.evaluation:
                shared = self._batches[_Given("", own).kind]
                outputs[values.digest(shared)] = values.host(running.predict(params, collections, shared))
        losses, gradients = dict[str, float](), dict[str, np.ndarray]()
        for program, (_, _, metrics, gradient) in zip(programs, taken, strict=True):
            stage = program.stage.name
            losses[stage] = float(metrics["train/loss"])
            of = f"{stage}: " if len(programs) > 1 else ""
            gradients |= {f"{of}{path}": slope for path, slope in values.host(gradient).items()}
        given = " ".join(dict.fromkeys(map(values.digest, batches)))
        self._draws[label, number] = Draw(given, losses, gradients, outputs)
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
            closing=running.late,
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


def _outputs(running: _Running, params: Any, collections: Any) -> list[tuple[Source | Closing, list[Any]]]:
    """What is measured during training and, if there is such a thing, what is measured after it."""
    source, closing = running.source, running.closing
    outputs: list[tuple[Source | Closing, list[Any]]] = [
        (source, [running.predict(params, collections, batch) for batch in source.evaluation])
    ]
    if closing is not None:
        outputs.append((closing, [running.conclude(params, collections, batch) for batch in closing.batches]))
    return outputs


def _scored(running: _Running) -> _Running:
    """With the scores of the untrained model, and of the predictors that know nothing."""
    scores: list[dict[str, float]] = [{}, {}]  # during training, after it
    trivial: dict[str, dict[str, float]] = {}
    for own, (measure, outputs) in zip(scores, _outputs(running, *_parted(running.variables)), strict=False):
        own.update(measure.score(outputs))
        for name, given in measure.trivial(outputs).items():
            trivial.setdefault(name, {}).update(measure.score(given))
    return replace(running, scores=together(*scores), late=frozenset(scores[1]), trivial=trivial)


def _given(program: Observed, source: Source) -> _Given:
    """The batch of a stage's first step, as the program of one member is given it."""
    own = program.task.data_of_stage(source)
    first = _batches(program.cohort.base, own)[0]
    batch = {key: first[key][0] for key in program.task.example()}
    return _Given("" if own is source else program.stage.name, batch)


def _look(built: Built, source: Source) -> Data:
    own = built.programs[0].task.data_of_stage(source)
    batches = _batches(built.run, own)
    seen = [batches[i] for i in range(min(BATCHES, len(batches)))]
    index = seen[0].get("index")
    numbered = index is not None and np.issubdtype(index.dtype, np.integer)
    reported = built.programs[-1].task.data_of_stage(source)
    evaluation = [values.digest(batch) for batch in reported.evaluation]
    return Data(
        fingerprint=source.fingerprint,
        count=len(own.train),
        batches=tuple(values.digest(batch) for batch in seen),
        ids=tuple(int(i) for batch in seen for i in batch["index"].ravel()) if numbered else None,
        evaluation=hashlib.sha256("".join(evaluation).encode()).hexdigest()[:16],
    )


def _batches(run: RunConfig[Any, Any], source: Source) -> CohortBatches:
    training = run.training
    return CohortBatches(source.train, [run.seed], training.batch_size, training.steps, training.order)


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
