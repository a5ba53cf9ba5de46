"""Batches as a function of (seed, step), read by grain. Imports no jax."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

Batch = dict[str, Any]  # arrays with a leading axis of examples
Order = Literal["shuffle", "file", "random"]  # see `batch_indices`


class Items(Protocol):
    """Random access to examples; must pickle to reader processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Batch: ...


@lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def batch_indices(seed: int, step: int, batch_size: int, count: int, order: Order = "shuffle") -> np.ndarray:
    """Which examples make the batch of a step, counted from 1: int (batch_size,).

    Nothing but (seed, step) decides. `shuffle` and `file` follow one another through the `count` examples,
    in a fresh permutation per epoch or always as they lie, so that each is seen once an epoch; `random`
    draws each anew with replacement, as for windows of a text, of which there are too many to permute.
    """
    if order == "random":
        return np.random.Generator(np.random.Philox(key=[seed, step])).integers(count, size=batch_size)
    positions = np.arange((step - 1) * batch_size, step * batch_size)
    if order == "file":
        return positions % count
    return np.array([_permutation(seed, int(p // count), count)[p % count] for p in positions])


@runtime_checkable
class Several(Items, Protocol):
    """Items of which several are read faster together than one by one."""

    def several(self, indices: np.ndarray, /) -> Batch:
        """The items of these numbers, in their order, as one batch."""
        ...


class CohortBatches:
    """Random access to a cohort's batches; element i is the batch of step i + 1, with a member axis first."""

    def __init__(
        self,
        items: Items,
        seeds: Sequence[int],
        batch_size: int,
        steps: int,
        order: Order = "shuffle",
    ):
        self._items, self._seeds, self._batch_size, self._steps = items, tuple(seeds), batch_size, steps
        self._order: Order = order

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> Batch:
        found: Batch = {}
        for m, seed in enumerate(self._seeds):
            first = self._seeds.index(seed)
            rows = self._rows(seed, index + 1) if first == m else {key: x[first] for key, x in found.items()}
            for key, x in rows.items():  # at once: those of all members side by side may be gigabytes
                found.setdefault(key, np.empty((len(self._seeds), *x.shape), x.dtype))[m] = x
        return found

    def _rows(self, seed: int, step: int) -> Batch:
        chosen = batch_indices(seed, step, self._batch_size, len(self._items), self._order)
        if isinstance(self._items, Several):
            return self._items.several(chosen)
        rows = [self._items[int(i)] for i in chosen]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


@dataclass(frozen=True)
class Arrays:
    """Items that lie in memory: arrays with the same leading axis."""

    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int, /) -> Batch:
        return {key: column[index] for key, column in self.columns.items()}


@dataclass(frozen=True)
class ArraySource:
    """A `Source` (see `task`) of arrays in memory, for a task whose data is small.

    Args:
      training: arrays of the training examples, by key.
      held_out: arrays of the evaluation examples.
      batch_size: of evaluation; the last batch may be smaller.
      metrics: from the concatenated `predict` outputs of one member to its metrics.
      know_nothing: outputs of predictors that know nothing, by name, one row per evaluation example.
    """

    training: Mapping[str, np.ndarray]
    held_out: Mapping[str, np.ndarray]
    batch_size: int
    metrics: Callable[[dict[str, np.ndarray]], dict[str, float]]
    know_nothing: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)

    @property
    def train(self) -> Arrays:
        return Arrays(self.training)

    @cached_property
    def evaluation(self) -> list[Batch]:
        count = len(next(iter(self.held_out.values())))
        return [
            {key: column[i : i + self.batch_size] for key, column in self.held_out.items()}
            for i in range(0, count, self.batch_size)
        ]

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.training, self.held_out):
            for key in sorted(part):
                column = np.ascontiguousarray(part[key])
                digest.update(f"{key}:{column.dtype}:{column.shape}".encode())
                digest.update(column.tobytes())
        return digest.hexdigest()

    def score(self, outputs: Sequence[Any]) -> dict[str, float]:
        return self.metrics({key: np.concatenate([o[key] for o in outputs]) for key in outputs[0]})

    def trivial(self, outputs: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        del outputs
        return {name: [dict(rows)] for name, rows in self.know_nothing.items()}


def read(batches: CohortBatches, start: int, workers: int, ahead: int = 2) -> Iterator[Batch]:
    """The batches from element `start` on, `ahead` of them read ahead by threads, or more by `workers` processes."""
    import grain  # its import takes a second, which a look at the config need not spend

    dataset = grain.MapDataset.source(batches)[start:]
    reading = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
    stream = dataset.to_iter_dataset(reading)
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain reads flags of its own, which only an absl app would parse
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        )
    return iter(stream)
