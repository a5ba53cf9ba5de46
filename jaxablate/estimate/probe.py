"""Times what a run does, on this machine: some steps of every stage, an evaluation, a checkpoint, and the start.

Nothing is left behind but prepared data and compiled programs, which the run then finds.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.monitoring
import numpy as np

from jaxablate import config, inputs, provenance, xla
from jaxablate.checkpoint import Checkpoints
from jaxablate.clock import Clock
from jaxablate.config import Cohort
from jaxablate.errors import UserError
from jaxablate.estimate import hours, memory
from jaxablate.estimate.facts import TimeFacts
from jaxablate.estimate.places import Place
from jaxablate.inputs import Inputs
from jaxablate.program import Program, State
from jaxablate.steps import Steps, read

logger = logging.getLogger(__name__)

WARMUP = 4  # steps: the reader has read ahead before the first
FEWEST, SECONDS = 3, 3.0  # so many steps are timed at least, and so long
PATIENCE = 60.0  # seconds; an evaluation that takes longer is taken to go on as it began
READY = b"ready\n"
# Events of jax's cache of compiled programs; it puts there what took long to compile.
PUT, FOUND = "/jax/compilation_cache/cache_misses", "/jax/compilation_cache/cache_hits"


def _existing(path: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


@dataclass(frozen=True)
class _Times:
    """Seconds of a stage: `first` of all that is done once when it begins, of which the others are a part."""

    first: float
    compiled: Literal["from the cache", "anew"]
    step: float
    evaluate: float
    save: float

    @property
    def compile(self) -> float:
        return max(self.first - self.step - self.evaluate - self.save, 0.0)


def measure(cohort: Cohort, place: Place, began: float, beside: int) -> TimeFacts:
    """Times the cohort.

    Args:
      cohort: the runs.
      place: of devices that are here.
      began: `time.perf_counter()` when the process started.
      beside: how many other processes train at the same time, in words of the result.

    Raises:
      UserError: the config or the data is not as it must be.
    """
    cache = config.cache_dir(cohort.base.host)
    xla.keep_compiled(cache)
    stages = memory.programs(cohort, place)
    made = time.perf_counter()
    _given(stages, cache)  # which may prepare the data, and make the base, once for all runs
    again = time.perf_counter()
    given = _given(stages, cache)
    start = made - began + time.perf_counter() - again
    lengths = [program.stage.steps for program in stages]
    facts = provenance.collect(jax.devices(), {}, {})
    others = f", {beside} beside it" if beside else ""
    source = f"probe on {provenance.hardware(facts)}{others}"
    if not any(lengths):  # nothing to train on, so the loop skips all of it
        return TimeFacts(start, 0.0, "", 0.0, 0.0, 0.0, evaluations=0, saves=0, total_s=start, source=source)
    times, state = [], None
    with tempfile.TemporaryDirectory(dir=_existing(Path(cohort.base.host.workdir))) as folder:
        for program in stages:
            found, state = _time_stage(program, state, given, Path(folder) / program.stage.name)
            times.append(found)
            logger.info("probe of stage %s: %.4g s a step", program.stage.name, found.step)
    assert state is not None, "a run has a stage"
    closing = _time_closing(stages[-1], state, given)
    evaluations = hours.evaluations([program.stage for program in stages], cohort.base.training)
    counts = evaluations, hours.saves(lengths, cohort.base.host)
    step = float(np.average([t.step for t in times], weights=lengths))
    evaluate, save = (float(np.mean([getattr(t, what) for t in times])) for what in ("evaluate", "save"))
    compiling = sum(t.compile for t in times)
    return TimeFacts(
        start_s=start,
        compile_s=compiling,
        compiled="anew" if any(t.compiled == "anew" for t in times) else "from the cache",
        step_s=step,
        evaluate_s=evaluate,
        save_s=save,
        evaluations=counts[0],
        saves=counts[1],
        total_s=start + compiling + sum(lengths) * step + counts[0] * evaluate + counts[1] * save + closing,
        closing_s=closing,
        source=source,
    )


def busy(cohort: Cohort, place: Place) -> None:
    """Trains until standard input ends, and says on standard output when it has begun; nothing is kept."""
    cache = config.cache_dir(cohort.base.host)
    xla.keep_compiled(cache)
    program = memory.programs(cohort, place)[0]
    work = _Work(program, None, _given([program], cache))
    done = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
    work.steps(1)
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    while not done.is_set():
        work.steps(1)


@contextlib.contextmanager
def copies(command: Sequence[str], count: int) -> Iterator[float]:
    """So many processes of `busy` at work, all of which have begun; gives the seconds that it took them.

    Raises:
      UserError: one has ended before it began.
    """
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        started = []
        for _ in range(count):
            copy = subprocess.Popen(
                [sys.executable, "-m", "jaxablate.estimate", *command, "--busy"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            stack.callback(_end, copy)
            started.append(copy)
        for copy in started:
            assert copy.stdout is not None
            if copy.stdout.readline() != READY:
                raise UserError("--beside: a copy ended before it had trained a step; its message is above")
        yield time.perf_counter() - began


def _end(copy: subprocess.Popen[bytes]) -> None:
    try:
        copy.communicate(timeout=30)  # the end of its input ends it after a step
    except subprocess.TimeoutExpired:
        copy.kill()
        copy.communicate()


# ------------------------------------------------------------------------------------- one stage


def _given(stages: Sequence[Program], cache: Path) -> Inputs:
    """The opened data; the base is on the devices then, for all of the stages."""
    given = Inputs.open(stages[0].task, cache)
    base = inputs.put_base(given.base, stages[0].abstract_base)
    for program in stages:
        program.base = base
    return given


class _Work:
    """A stage at work, as the training loop has it."""

    def __init__(self, program: Program, previous: State | None, given: Inputs):
        self.program, self.source = program, program.task.data_of_stage(given.source)
        training = program.cohort.base.training
        self.state = program.init() if previous is None else program.carry(previous)
        self._step = Steps(program, Clock(training.batch_size, program.task.tokens_per_example))
        self._n = program.first
        # A stage may be shorter than what is timed of it.
        self._batches = read(program, given.source, program.first, steps=10**6)

    def steps(self, count: int) -> None:
        """Does so many updates, with the next one under way while one is waited for."""
        before = None
        for _ in range(count):
            self._n += 1
            self.state, metrics = self._step(self.state, next(self._batches), self._n)
            if before is not None:
                jax.block_until_ready(before)
            before = metrics
        jax.block_until_ready(before)

    def evaluate(self) -> float:
        """Seconds of an evaluation of every member."""
        began, outputs = time.perf_counter(), []
        batches = self.source.evaluation
        for batch in batches:
            outputs.append(jax.device_get(self.program.predict(self.state, batch)))
            if time.perf_counter() - began > PATIENCE:
                return (time.perf_counter() - began) * len(batches) / len(outputs)
        for m in range(len(self.program.cohort.runs)):
            self.source.score([jax.tree.map(lambda x, m=m: x[m], output) for output in outputs])
        return time.perf_counter() - began

    def save(self, checkpoints: Sequence[Checkpoints], step: int) -> None:
        """Saves every member, and waits for it."""
        for m, own in enumerate(checkpoints):
            own.save(step, self.program.take(self.state, m), regular=True)
        for own in checkpoints:
            own.wait()


def _time_stage(
    program: Program, previous: State | None, given: Inputs, folder: Path
) -> tuple[_Times, State]:
    with contextlib.ExitStack() as stack:
        checkpoints = [
            stack.enter_context(contextlib.closing(Checkpoints(folder / str(m) / "checkpoints", "probe", 1)))
            for m in range(len(program.cohort.runs))
        ]
        steps = iter(range(1, 10))

        def begin() -> _Work:
            work = _Work(program, previous, given)
            work.steps(1)
            work.evaluate()
            work.save(checkpoints, next(steps))
            return work

        with _cache_events() as events:
            first, work = _timed(begin)
        if events[PUT]:  # the run will find them, so it is the second time that counts
            del work
            jax.clear_caches()
            with _cache_events() as events:
                first, work = _timed(begin)
        work.steps(WARMUP)
        one, _ = _timed(lambda: work.steps(FEWEST))
        count = max(FEWEST, int(SECONDS * FEWEST / one))
        took, _ = _timed(lambda: work.steps(count))
        evaluate = work.evaluate()
        save, _ = _timed(lambda: work.save(checkpoints, next(steps)))
    return _Times(
        first, "from the cache" if events[FOUND] else "anew", took / count, evaluate, save
    ), work.state


def _time_closing(program: Program, state: State, given: Inputs) -> float:
    """Seconds of the closing metrics of every member, as they come once; 0 if there are none."""
    closing = program.task.closing(given.source)
    if closing is None:
        return 0.0
    began, outputs = time.perf_counter(), []
    for batch in closing.batches:
        outputs.append(jax.device_get(program.conclude(state, batch)))
        if time.perf_counter() - began > PATIENCE:
            return (time.perf_counter() - began) * len(closing.batches) / len(outputs)
    for m in range(len(program.cohort.runs)):
        closing.score([jax.tree.map(lambda x, m=m: x[m], output) for output in outputs])
    return time.perf_counter() - began


def _timed(do: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    done = do()
    return time.perf_counter() - began, done


@contextlib.contextmanager
def _cache_events() -> Iterator[Counter[str]]:
    """Counts what happens to the cache of compiled programs."""
    events: Counter[str] = Counter()

    def note(event: str, **about: Any) -> None:
        events[event] += 1

    jax.monitoring.register_event_listener(note)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_listener(note)
