"""Evaluations of a cohort while it trains: scores, what follows from them, and the last word on each member."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxablate import distributed
from jaxablate.data import Batch
from jaxablate.errors import UserError
from jaxablate.program import Program, State
from jaxablate.record import Record
from jaxablate.stopping import Stopped, StopRequest
from jaxablate.task import Closing, Source, Task

logger = logging.getLogger(__name__)

WORTH_KEEPING = 1.0  # seconds that a batch of closing metrics takes


class Evaluations:
    """Those of one cohort; only process 0 has records."""

    def __init__(
        self,
        task: Task[Any, Any],
        source: Source,
        records: Sequence[Record],
        stop: StopRequest,
    ):
        self._source, self._records, self._stop = source, records, stop
        self._steps = sum(stage.steps for stage in task.stages())
        self._since = comparable_since(task, source)
        self.closing = task.closing(source)
        self._newest: list[Any] | None = None  # outputs of an evaluation, until it is concluded

    def at(self, current: Program, state: State, step: int) -> tuple[State, list[bool]]:
        """Scores every member that trains on the whole evaluation set of the stage; `state` is consumed.

        Returns:
          The state with what follows from the scores, and which members are at their best.
        """
        return self._judge(current, state, step, lambda record, metrics: record.evaluated(step, metrics))

    def enter(self, current: Program) -> None:
        """Before a stage: its records compare scores of its own data."""
        for record in self._records:
            record.compare_since(self._since[current.stage.name])

    def begin(self, current: Program, state: State, step: int) -> State:
        """At the start of a stage after `step`, which is not the first; `state` is consumed.

        Where a stage goes back to its best, what it begins with takes part and is scored, as before the first step of
        a run. No row is of it: `step` has the scores that the stage before ended with.
        """
        for record in self._records:
            record.warn()  # of the stage before
        if current.policy is None or current.policy.restore == "last":
            self.stand(current, state)
            return state
        state, _ = self._judge(current, state, step, lambda *_: False)
        self.conclude(current, state, step)
        return state

    def _judge(
        self, current: Program, state: State, step: int, note: Callable[[Record, dict[str, float]], bool]
    ) -> tuple[State, list[bool]]:
        """Scores the members that train, and what follows from it; `note` says whether one is at its best."""
        training, source = current.training(state), self._data(current)
        outputs = self._newest = self._predict(current, state, training)

        def score(m: int, record: Record) -> tuple[float, bool]:
            if not training[m]:
                return math.nan, False
            metrics = source.score(_of(m, outputs))
            return _response(current, metrics), note(record, metrics)

        scored = distributed.first(lambda: [score(m, record) for m, record in enumerate(self._records)])
        state = current.judge(state, [response for response, _ in scored], step)
        self.stand(current, state)
        return state, [improved for _, improved in scored]

    def resumed(self, current: Program, state: State, step: int) -> None:
        """After a restore from `step`: its records know how the members stand, and rows after it are made again."""
        self.stand(current, state)
        self.conclude(current, state, step)

    def stand(self, current: Program, state: State) -> None:
        """Tells the records which members are lost and how the others stand."""
        alive, standings = distributed.fetch(state.alive), current.standings(state)
        for m, record in enumerate(self._records):
            record.diverged, record.standing = not alive[m], standings[m]

    def conclude(self, current: Program, state: State, step: int) -> None:
        """The last word on the members whose training ends with `step`: closing metrics, what is kept of predictions.

        A member with other parameters than were evaluated is evaluated once more. Both are recorded as of the step
        after. Call it once the checkpoint of `step` is under way, and after a restore from it, when what was
        recorded as of a later step is gone and is made again.

        Raises:
          Stopped: it was asked for before the closing metrics were there; a resumed run computes them.
        """
        ends, outputs = self._ends(current, state, step), self._newest
        self._newest = None
        if not ends.any():
            return
        restored = current.policy is not None and current.policy.restore == "best"
        if restored or outputs is None:
            outputs = self._predict(current, state, ends)
        closing = None if self.closing is None else self._conclude(current, state, step, ends, self.closing)

        def last(m: int, record: Record) -> None:
            metrics: dict[str, float] = {}
            if restored:
                metrics = self._data(current).score(_of(m, outputs))
                _compare(record, _response(current, metrics))
            if self.closing is not None and closing is not None:
                metrics = together(metrics, self.closing.score(_of(m, closing)))
            if metrics:
                record.evaluated(step + 1, metrics)
            record.keep(current.task.keep(self._source, _of(m, closing or outputs)))

        distributed.first(lambda: [last(m, record) for m, record in enumerate(self._records) if ends[m]])

    def _data(self, current: Program) -> Source:
        return current.task.data_of_stage(self._source)

    def _predict(self, current: Program, state: State, asked: np.ndarray) -> list[Any]:
        batches = self._data(current).evaluation
        return [in_parts(current, current.predict, state, batch, asked) for batch in batches]

    def _conclude(
        self, current: Program, state: State, step: int, asked: np.ndarray, closing: Closing
    ) -> list[Any]:
        """The outputs of the members that are asked on the closing batches.

        Those of batches that take long are kept until the run has finished: it may be stopped among them.
        """
        members = np.flatnonzero(asked).tolist()
        records = [self._records[m] for m in members] if self._records else []
        outputs: list[Any] = []
        for number, batch in enumerate(closing.batches):
            if signal := self._stop.due():
                raise Stopped(f"{signal} before the closing metrics; a resumed run computes them")
            if distributed.first(lambda n=number: all(record.output(step, n) for record in records)):
                kept = {m: record.output(step, number) for m, record in zip(members, records, strict=False)}
                outputs.append(_unpacked(current.abstract_conclude(state, batch), kept))
                continue
            began = time.monotonic()
            outputs.append(in_parts(current, current.conclude, state, batch, asked))
            if time.monotonic() - began >= WORTH_KEEPING:
                for m, record in zip(members, records, strict=False):
                    record.keep_output(step, number, _packed(_of(m, outputs[-1:])))
        return outputs

    def _ends(self, current: Program, state: State, step: int) -> np.ndarray:
        """Which members train no more after `step`, in this stage or another."""
        alive = distributed.fetch(state.alive)
        if current.end < self._steps:
            return np.zeros_like(alive)
        stopped = [s.stopped_at if s else None for s in current.standings(state)]
        return alive & np.array([step == (current.end if at is None else at) for at in stopped])


def comparable_since(task: Task[Any, Any], source: Source) -> dict[str, int]:
    """By stage the step after which evaluations are of the data that it has; -1: they all are."""
    found: dict[str, int] = {}
    since, done, before = -1, 0, source
    for stage in task.stages():
        own = task.during(stage).data_of_stage(source)
        if found and not (own is before is source):
            since = done
        found[stage.name], before = since, own
        done += stage.steps
    return found


def in_parts(
    current: Program, outputs_of: Callable[..., Any], state: State, batch: Batch, asked: np.ndarray
) -> Any:
    """The outputs of all members for one batch, on the host: leaves (members, rows, …).

    After running out of memory, in as many parts as an update has more micro-batches, of tasks that allow it.
    """
    split = current.cohort.base.host.split if current.task.evaluates == "rows" else 1
    rows = len(next(iter(batch.values())))
    size = -(-rows // split)
    parts = [{key: x[i : i + size] for key, x in batch.items()} for i in range(0, rows, size)]
    outputs = [distributed.fetch(outputs_of(state, part, asked)) for part in parts]
    return outputs[0] if len(outputs) == 1 else jax.tree.map(lambda *x: np.concatenate(x, 1), *outputs)


def _packed(outputs: Any) -> bytes:
    """The bytes of all arrays, one after another."""
    return b"".join(np.ascontiguousarray(x).tobytes() for x in jax.tree.leaves(outputs))


def _unpacked(like: Any, packed: Mapping[int, bytes]) -> Any:
    """Outputs of all members, as shapes and dtypes `like`, from the bytes of some; those of others are zeros."""
    outputs, at = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like), 0
    for x in jax.tree.leaves(outputs):
        for m, own in packed.items():
            x[m] = np.frombuffer(own, x.dtype, x[m].size, at).reshape(x[m].shape)
        at += x[0].nbytes
    return outputs


def _of(m: int, outputs: Sequence[Any]) -> list[Any]:
    """A member's own outputs."""
    return [jax.tree.map(lambda x: x[m], output) for output in outputs]


def together(metrics: Mapping[str, float], closing: Mapping[str, float]) -> dict[str, float]:
    """Metrics of an evaluation and closing ones.

    Raises:
      UserError: one is among both, so that the second would hide the first.
    """
    if both := sorted(metrics.keys() & closing.keys()):
        raise UserError(
            f"closing metric val/{both[0]} is evaluated during training as well; give it another name"
        )
    return {**metrics, **closing}


def _response(current: Program, metrics: dict[str, float]) -> float:
    """The response among the scores.

    Raises:
      UserError: it is not there, and training depends on it.
    """
    name = current.task.response
    value = metrics.get(name.removeprefix("val/"))
    if value is None and current.policy is not None:
        raise UserError(
            f"config.training: early_stop, restore and optim.plateau_factor go by {name}, which is not among the "
            f"scores ({', '.join(sorted(metrics))}); leave them at their defaults"
        )
    return math.nan if value is None else value


def _compare(record: Record, response: float) -> None:
    """Says so if a restored member does not score what it scored there, which another program's rounding could do."""
    standing = record.standing
    if standing and not math.isnan(standing.best) and np.float32(response) != np.float32(standing.best):
        logger.warning(
            "%s: restored from step %d it scores %r, and %r then",
            record.dir.path, standing.best_at, response, standing.best,
        )  # fmt: skip
