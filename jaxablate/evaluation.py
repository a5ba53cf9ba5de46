"""Evaluations of a cohort while it trains: scores, what follows from them, and the last word on each member."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxablate import distributed
from jaxablate.errors import UserError
from jaxablate.program import Program, State
from jaxablate.record import Record
from jaxablate.task import Source

logger = logging.getLogger(__name__)


class Evaluations:
    """Those of one cohort, which trains `steps` steps over all stages; only process 0 has records."""

    def __init__(self, source: Source, records: Sequence[Record], steps: int):
        self._source, self._records, self._steps = source, records, steps

    def at(self, current: Program, state: State, step: int) -> tuple[State, list[bool]]:
        """Scores every member that trains on the whole evaluation set; `state` is consumed.

        Returns:
          The state with what follows from the scores, and which members are at their best.
        """
        outputs = self._predict(current, state)
        training = current.training(state)

        def score(m: int, record: Record) -> tuple[float, bool]:
            if not training[m]:
                return math.nan, False
            metrics = self._source.score(_of(m, outputs))
            return _response(current, metrics), record.evaluated(step, metrics)

        scored = distributed.first(lambda: [score(m, record) for m, record in enumerate(self._records)])
        state = current.judge(state, [response for response, _ in scored], step)
        self.stand(current, state)
        self._conclude(current, state, step, outputs)
        return state, [improved for _, improved in scored]

    def resumed(self, current: Program, state: State, step: int) -> None:
        """After a restore from `step`: its records know how the members stand, and rows after it are made again."""
        self.stand(current, state)
        if current.policy and current.policy.restore == "best":
            self._conclude(current, state, step, None)

    def stand(self, current: Program, state: State) -> None:
        """Tells the records which members are lost and how the others stand."""
        alive, standings = distributed.fetch(state.alive), current.standings(state)
        for m, record in enumerate(self._records):
            record.diverged, record.standing = not alive[m], standings[m]

    def _predict(self, current: Program, state: State) -> list[Any]:
        return [distributed.fetch(current.predict(state, batch)) for batch in self._source.evaluation]

    def _conclude(self, current: Program, state: State, step: int, outputs: list[Any] | None) -> None:
        """Of the members whose training ends with `step`: what is kept of their predictions.

        A member with other parameters than were evaluated is evaluated once more, as the step after.
        """
        ends = self._ends(current, state, step)
        if not ends.any():
            return
        restored = current.policy is not None and current.policy.restore == "best"
        if restored:
            outputs = self._predict(current, state)

        def last(m: int, record: Record) -> None:
            own = _of(m, outputs or [])
            if restored:
                metrics = self._source.score(own)
                _compare(record, _response(current, metrics))
                record.evaluated(step + 1, metrics)
            record.keep(current.task.keep(self._source, own))

        distributed.first(lambda: [last(m, record) for m, record in enumerate(self._records) if ends[m]])

    def _ends(self, current: Program, state: State, step: int) -> np.ndarray:
        """Which members train no more after `step`, in this stage or another."""
        alive = distributed.fetch(state.alive)
        if current.end < self._steps:
            return np.zeros_like(alive)
        stopped = [s.stopped_at if s else None for s in current.standings(state)]
        return alive & np.array([step == (current.end if at is None else at) for at in stopped])


def _of(m: int, outputs: Sequence[Any]) -> list[Any]:
    """A member's own outputs."""
    return [jax.tree.map(lambda x: x[m], output) for output in outputs]


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
