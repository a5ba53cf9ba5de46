"""Training steps as the loop takes them: the batches of a stage, each cut to its size, and a program for each size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxablate import data
from jaxablate.clock import LARGEST, Clock
from jaxablate.data import Batch, CohortBatches
from jaxablate.errors import UserError
from jaxablate.program import Program, State, Step
from jaxablate.task import Source

LARGE = 256 << 20  # bytes of a cohort's batch: of such, no more than one is read ahead


def read(program: Program, source: Source, done: int, *, steps: int = 0) -> Iterator[Batch]:
    """The cohort's batches of a stage after the first `done` steps of the run.

    A stage with data of its own begins with that data's first batch, whenever it comes.

    Args:
      steps: how many there are in the stage, if more than it has.
    """
    own, training = program.task.data_of_stage(source), program.cohort.base.training
    example = program.task.example().values()
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in example) * training.batch_size
    before = program.first if own is source else 0
    batches = CohortBatches(
        own.train,
        [run.seed for run in program.cohort.runs],
        training.batch_size,
        max(program.end, program.first + steps) - program.first + before,
        training.order,
    )
    start, workers = done - program.first + before, program.cohort.base.host.workers
    ahead = 2 if size * len(program.cohort.runs) <= LARGE else 1
    return data.read(batches, start, workers, ahead)


class Steps:
    """The step of a stage, compiled when the first batch of a size comes; the clock is told of both."""

    def __init__(self, program: Program, clock: Clock):
        self._program, self._clock = program, clock
        self._compiled: dict[str, Step] = {}

    def __call__(self, state: State, batch: Batch, n: int) -> tuple[State, dict[str, jax.Array]]:
        """Dispatches update `n` with a batch as `read` gives it; `state` is consumed."""
        program = self._program
        _check(program.task.example(), batch)
        placed = program.put_batch(program.task.fit(batch))
        size = _size(program.task.example(), placed)
        if size not in self._compiled:
            self._compiled[size] = self._clock.compile(program, placed)
        self._clock.stepped(n, size)
        return self._compiled[size](state, program.member, placed, np.int32(n))


def _check(example: Any, batch: Batch) -> None:
    """Raises UserError unless the data has the shapes that the task says; its numbers may be wider."""
    for key, like in example.items():
        dtype = jax.dtypes.canonicalize_dtype(batch[key].dtype)
        if batch[key].shape[2:] != like.shape or dtype != like.dtype:
            raise UserError(
                f"the training data's '{key}' is {dtype}{list(batch[key].shape[2:])} an example, and the task says "
                f"{like.dtype}{list(like.shape)}; mend its example(), or prepare the data anew"
            )


def _size(example: Any, placed: Batch) -> str:
    """The name of a batch's size: its arrays that are shorter than the largest, `targets[64] tokens[64]`."""
    shorter = {
        key: placed[key].shape[2:] for key, like in example.items() if placed[key].shape[2:] != like.shape
    }
    return " ".join(f"{key}{list(shape)}" for key, shape in sorted(shorter.items())) or LARGEST
