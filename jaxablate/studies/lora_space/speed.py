"""The ten speed-ups of the document, each beside what it replaces, on the adapters of the run's config.

`original` is the document's algorithm, written here as it describes it: one adapter and one tensor at a time, in
double loops. `ours` is what the study runs, its training the loop's own program. Some change the result, and say so.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxablate import data, sharding
from jaxablate.clock import Clock
from jaxablate.config import Cohort, RunConfig
from jaxablate.data import Batch
from jaxablate.inputs import Inputs
from jaxablate.program import Program, State
from jaxablate.steps import Steps, read
from jaxablate.studies.lora_space.config import LoraSpaceData, epoch_steps
from jaxablate.studies.lora_space.data import Adapters, Reader, describe, open_adapters, open_reader
from jaxablate.studies.lora_space.data.reader import Weights
from jaxablate.studies.lora_space.features import features, store
from jaxablate.task import Source, Speedup

if TYPE_CHECKING:
    from jaxablate.studies.lora_space.task import LoraSpaceTask

ADAPTERS = 50  # whose features are computed, or files read; the original takes a second for about so many
ORIGINAL_BATCH, ORIGINAL_EPOCHS, EPOCHS = 64, 300, 200
TENTH = 10  # of the epochs are trained, by both
STEPS = 20  # on one batch, compiled or operation by operation
READERS = 4

Floats = NDArray[np.floating[Any]]


def speedups(task: LoraSpaceTask, cache: Path, scratch: Path) -> Iterator[Speedup]:
    """All of them, in the document's order; see `Task.speedups`."""
    at = _Setting(task, cache, scratch)
    yield Speedup(
        "svd", "5 to 10 x", lambda: spectral_one_by_one(at.weights), lambda: at.features("spectral"), _apart
    )
    yield Speedup("normalisation", "5 to 10 x", at.normalised_in_double, at.normalised, _apart)
    yield Speedup("preload", "2 to 3 x", at.read_tensor_by_tensor, at.read_at_once, _equal)
    half, whole = (at.trained(compute_dtype=dtype) for dtype in ("bfloat16", "float32"))
    yield Speedup("half precision", "1.5 to 2 x", whole.on_one_batch, half.on_one_batch, _losses)
    small = at.trained(batch_size=ORIGINAL_BATCH)
    yield Speedup("batch", "1.5 to 2 x", lambda: small.epochs(1), lambda: whole.epochs(1), _other)
    yield Speedup("workers", "1.2 to 1.5 x", lambda: at.batches(0), lambda: at.batches(READERS), _equal)
    yield Speedup(
        "epochs",
        "1.5 to 2 x",
        lambda: whole.epochs(ORIGINAL_EPOCHS // TENTH),
        lambda: whole.epochs(EPOCHS // TENTH),
        lambda *_: f"no: {EPOCHS} epochs of the same, not {ORIGINAL_EPOCHS}; arithmetic",
    )
    yield Speedup("compilation", "1.2 to 1.5 x", whole.operation_by_operation, whole.on_one_batch, _losses)
    yield Speedup("half of the layers", "2 x", at.features, lambda: at.features(share=0.5), _fewer)
    yield Speedup("cache", "10 to 100 x", at.opened_anew, at.opened, lambda a, b: _same(a == b))


# ------------------------------------------------------------------------------------- what is original


def spectral_one_by_one(weights: Weights) -> Floats:
    """(N, 32 per tensor): a full singular value decomposition for each tensor of each adapter."""
    count = len(next(iter(weights.values())))
    return np.stack(
        [np.concatenate([_spectral(weights[name][i]) for name in sorted(weights)]) for i in range(count)]
    )


def _spectral(tensor: Floats, top: int = 10, least: float = 1e-8) -> Floats:
    _, found, _ = np.linalg.svd(tensor.reshape(len(tensor), -1), full_matrices=False)
    values = np.zeros(top)
    values[: len(found)] = found[:top]
    total = values.sum()
    shares = values / (total + least)
    gaps = (values[:-1] - values[1:]) / (values[:-1] + least)
    entropy = -np.sum(shares * np.log(shares + least))
    condition = found[0] / (found[:top][-1] + least)
    return np.concatenate([values, shares, gaps, [entropy, condition, total]])


# --------------------------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class _Setting:
    """The data of a run's config, opened when it is first asked for."""

    task: LoraSpaceTask
    cache: Path
    scratch: Path

    @property
    def config(self) -> RunConfig[Any, LoraSpaceData]:
        return self.task.config

    @cached_property
    def source(self) -> Adapters:
        return self.task.open(self.cache)

    @cached_property
    def reader(self) -> Reader:
        return open_reader(self.config.data, self.cache, self.source.workers)

    @cached_property
    def count(self) -> int:
        return min(ADAPTERS, len(self.source.labels))

    @cached_property
    def weights(self) -> Weights:
        return self.reader.read(
            0, self.count, sorted(describe(self.config.data).tensors), self.source.workers
        )

    def features(self, representation: str = "", share: float = 1.0) -> Floats:
        """Of some adapters, with the share of the layers."""
        config = dataclasses.replace(self.config.data, sample_layers=share)
        chosen = {name: self.weights[name] for name in describe(config).tensors if name in self.weights}
        wanted = representation or config.representation
        found = features(chosen, [wanted], variant=config.spectral_variant, workers=self.source.workers)
        return found[wanted]

    # ---------------------------------------------------------------------------- normalisation, reading

    def normalised_in_double(self) -> Floats:
        """Copies in double precision, parts one by one, by the biased deviation with 0 taken as 1."""
        columns = np.load(self.source.features, allow_pickle=False).astype(np.float64)
        parts = [columns[rows] for rows in self.source.parts.parts]
        mean, std = parts[0].mean(axis=0), parts[0].std(axis=0)
        std[std == 0] = 1
        return np.concatenate([(part - mean) / std for part in parts]).astype(np.float32)

    def normalised(self) -> Floats:
        """By the study's own pass over the training adapters."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            rows, how = self.source.parts.train, self.config.data.normalise
            path, _ = store.scaled(self.source.features, "speed", rows, how, Path(folder))
            mean, factor = np.load(path, allow_pickle=False)
        order = np.concatenate(self.source.parts.parts)
        return (np.load(self.source.features, mmap_mode="r", allow_pickle=False)[order] - mean) * factor

    @cached_property
    def _tree(self) -> LoraSpaceData:
        """Some adapters as a folder of files, by its config."""
        root = self.scratch / "adapters"
        for i in range(self.count):
            place = root / self.source.categories[self.source.labels[i]] / f"folder_{i:05d}"
            place.mkdir(parents=True)
            one = {name: np.ascontiguousarray(values[i]) for name, values in self.weights.items()}
            save_file(one, place / "pytorch_lora_weights.safetensors")
        plain = LoraSpaceData()
        of_generated = {"classes": plain.classes, "rank": plain.rank, "architecture": plain.architecture}
        return dataclasses.replace(
            self.config.data, source="folder", path=str(root), seed=plain.seed, **of_generated
        )

    def read_tensor_by_tensor(self) -> Weights:
        """A file is opened anew for every tensor of every adapter."""
        paths = sorted(Path(self._tree.path).glob("*/*/*.safetensors"))
        found: dict[str, list[Floats]] = {name: [] for name in sorted(self.weights)}
        for name, values in found.items():
            for path in paths:
                with safe_open(path, "numpy") as file:
                    values.append(file.get_tensor(name))
        return {name: np.stack(values) for name, values in found.items()}

    def read_at_once(self) -> Weights:
        """By the study's own reader."""
        reader = open_reader(self._tree, self.scratch, self.source.workers)
        return reader.read(0, self.count, sorted(self.weights), self.source.workers)

    def batches(self, processes: int) -> Batch:
        """Reads as many epochs of training batches as are trained, and returns the last; processes have to start."""
        training, items = self.config.training, self.source.train
        steps = EPOCHS // TENTH * epoch_steps(len(items), training.batch_size)
        batches = data.CohortBatches(items, [self.config.seed], training.batch_size, steps, training.order)
        last: Batch = {}
        for batch in data.read(batches, 0, processes):
            last = batch
        return last

    def opened_anew(self) -> str:
        """From the adapters to what can be trained on, with an empty cache; the fingerprint of it."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            return self._opened(Path(folder))

    def opened(self) -> str:
        """The same a second time."""
        return self._opened(self.cache)

    def _opened(self, cache: Path) -> str:
        size = self.config.training.eval_batch_size
        return open_adapters(self.config.data, cache, eval_batch_size=size).fingerprint

    def trained(self, **training: Any) -> _Training:
        """Training with some fields of its section changed."""
        changed = dataclasses.replace(self.config.training, **training)
        config = dataclasses.replace(self.config, training=changed)
        return _Training(type(self.task)(config, self.task.platform), self.cache)


@dataclass(frozen=True)
class _Training:
    """One run as the loop trains it, by the loop's own program and batches; without evaluations."""

    task: LoraSpaceTask
    cache: Path

    @cached_property
    def _source(self) -> Source:
        return Inputs.open(self.task, self.cache).source

    @cached_property
    def _program(self) -> Program:
        run = self.task.config
        mesh = sharding.make_mesh(run.host.mesh, 1, run.training.batch_size)
        return Program(self.task, Cohort((run,)), self.task.stages()[0], mesh)

    @cached_property
    def _step(self) -> Steps:
        return Steps(self._program, Clock(self.task.config.training.batch_size, tokens=0))

    @cached_property
    def _start(self) -> State:
        return self._program.init()

    @cached_property
    def _batch(self) -> Batch:
        return next(read(self._program, self._source, 0))

    def _trained(self, batches: Iterable[Batch]) -> jax.Array:
        """The loss after a step on each of the batches."""
        state, loss = jax.tree.map(jnp.copy, self._start), jnp.zeros(())  # a step consumes its state
        for n, batch in enumerate(batches, start=1):
            state, metrics = self._step(state, batch, n)
            loss = metrics["train/loss"][0]
        return loss

    def on_one_batch(self) -> jax.Array:
        """The loss after some steps on the first batch."""
        return self._trained(itertools.repeat(self._batch, STEPS))

    def operation_by_operation(self) -> jax.Array:
        """The same, nothing compiled as a whole."""
        first = functools.partial(jax.tree.map, lambda x: jnp.asarray(x)[0])  # the only member
        state, member, batch = map(first, (self._start, self._program.member, self._batch))
        loss = jnp.zeros(())
        with jax.disable_jit():
            for n in range(1, STEPS + 1):
                state, metrics = self._program.member_step(state, member, batch, jnp.int32(n), {})
                loss = metrics["train/loss"]
        return loss

    def epochs(self, count: int) -> jax.Array:
        """The loss after some epochs, reading included."""
        steps = count * epoch_steps(len(self._source.train), self.task.config.training.batch_size)
        return self._trained(itertools.islice(read(self._program, self._source, 0, steps=steps), steps))


# ------------------------------------------------------------------------------- whether they are the same


def _same(equal: bool) -> str:
    return "yes" if equal else "no"


def _equal(a: Any, b: Any) -> str:
    return _same(a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a))


def _apart(a: Floats, b: Floats) -> str:
    """The largest difference, as a share of the largest value in its column."""
    size = np.maximum(np.abs(a).max(axis=0), 1e-6)
    return f"within {np.max(np.abs(a - b) / size):.1g}"


def _losses(a: jax.Array, b: jax.Array) -> str:
    return f"loss within {abs(float(a) - float(b)) / max(abs(float(a)), 1e-9):.1g}"


def _other(a: Any, b: Any) -> str:
    del a, b
    return "no: another training"


def _fewer(a: Floats, b: Floats) -> str:
    return f"no: {b.shape[1]} of {a.shape[1]} features"
