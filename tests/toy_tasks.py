"""Toy tasks with what few have: a base, closing metrics, data of their own in each stage, batches of two sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxablate.config import Cohort
from jaxablate.data import Arrays, Batch
from jaxablate.rules import Rule
from jaxablate.task import Closing, Source, Stage, Variables
from tests.toy import ToyItems, ToySource, ToyTask
from tests.toy_training import cohort_of


def cohort_with(task: type[ToyTask], workdir: Path, **overrides: Any) -> Cohort:
    """The toy cohort with another task."""
    cohort = cohort_of(workdir, **overrides)
    name = f"{task.__module__}:{task.__name__}"
    return Cohort(tuple(dataclasses.replace(run, task=name) for run in cohort.runs))


class BasedTask(ToyTask):
    """A matrix that is not trained, of bfloat16 and int8, between two that are."""

    seed: ClassVar[int] = 0  # of the base

    @cached_property
    def abstract_base(self) -> Variables:
        shape = (self.config.model.width,) * 2
        kernel = nn.Partitioned(jax.ShapeDtypeStruct(shape, jnp.bfloat16), ("embed", "mlp"))
        return {"base": {"kernel": kernel}, "quantized": {"codes": jax.ShapeDtypeStruct(shape, jnp.int8)}}

    def base(self, cache: Path) -> Variables:
        width, rng = self.config.model.width, np.random.default_rng(self.seed)
        kernel = (rng.normal(size=(width, width)) * width**-0.5).astype(jnp.bfloat16)
        codes = rng.integers(-7, 8, size=(width, width)).astype(np.int8)
        return {"base": {"kernel": kernel}, "quantized": {"codes": codes}}

    def init(self, rng: jax.Array) -> Variables:
        first, last = jax.random.split(rng)
        width = self.config.model.width
        return {
            "params": {
                "first": {"kernel": jax.random.normal(first, (4, width)) / 2},
                "out": {"kernel": jax.random.normal(last, (width, 1)) * width**-0.5},
            },
            "average": {"seed": jax.random.key_data(rng)[-1].astype(jnp.int32), "steps": jnp.int32(0)},
        }

    def _apply(self, variables: Variables, x: jax.Array) -> jax.Array:
        params, base = variables["params"], variables["base"]["kernel"].astype(jnp.float32)
        mixed = base + variables["quantized"]["codes"] * (0.02 * self.config.model.width**-0.5)
        return jnp.tanh(jnp.tanh(x @ params["first"]["kernel"]) @ mixed) @ params["out"]["kernel"][:, 0]

    def encode(self, variables: Variables, batch: Batch, rngs: jax.Array) -> tuple[Any, Any]:
        predicted = self._apply(variables, batch["x"])
        return {"error": predicted - batch["y"], "predicted": predicted}, {}

    def advance(self, collections: Variables, sums: Any) -> Variables:
        average = collections["average"]
        return {"average": {**average, "steps": average["steps"] + 1}}

    def predict(self, variables: Variables, batch: Batch) -> Any:
        error = self._apply(variables, batch["x"]) - batch["y"]
        return {"error": error, "seed": variables["average"]["seed"]}


class OwnTask(BasedTask):
    """The same with the matrix among the parameters of each member."""

    @cached_property
    def abstract_base(self) -> Variables:
        return {}

    def base(self, cache: Path) -> Variables:
        return {}

    def init(self, rng: jax.Array) -> Variables:
        made = super().init(rng)
        shape = (self.config.model.width,) * 2
        return {**made, "params": {**made["params"], "kernel": jnp.zeros(shape)}}

    def _apply(self, variables: Variables, x: jax.Array) -> jax.Array:
        codes = {"codes": jnp.zeros((), jnp.int8)}
        own = {"kernel": variables["params"]["kernel"]}
        return super()._apply({**variables, "base": own, "quantized": codes}, x)


class ClashingTask(BasedTask):
    """Its base has a collection that `init` makes too."""

    @cached_property
    def abstract_base(self) -> Variables:
        return {"average": {"x": jax.ShapeDtypeStruct((1,), jnp.float32)}}


class ClosingTask(ToyTask):
    """Measured at the end on examples of its own, which the training never sees."""

    name: ClassVar[str] = "test_loss"
    directions: ClassVar[Mapping[str, Any]] = {**ToyTask.directions, "val/test_loss": "min"}

    def closing(self, source: Source) -> Closing:
        rows = ToyItems(12, 2)
        batches = [{k: rows[i][k][None] for k in ("x", "y")} for i in range(12)]
        return Closing(
            batches, self._score, lambda outputs: {"zero": [{"square": b["y"] ** 2} for b in batches]}
        )

    def _score(self, outputs: Sequence[Any]) -> dict[str, float]:
        return {self.name: float(np.mean([o["square"] for o in outputs]))}

    def conclude(self, variables: Variables, batch: Batch) -> Any:
        return {"square": jnp.square(self.predict(variables, batch)["error"])}

    def keep(self, source: Source, outputs: Sequence[Any]) -> Mapping[str, np.ndarray]:
        return {"square": np.concatenate([o["square"] for o in outputs])}


@dataclasses.dataclass(frozen=True)
class OtherItems:
    """The toy's data with other items and evaluation batches."""

    whole: ToySource
    train: Arrays
    evaluation: Sequence[Batch]

    @property
    def fingerprint(self) -> str:
        return self.whole.fingerprint

    def score(self, outputs: Sequence[Any]) -> dict[str, float]:
        return self.whole.score(outputs)

    def trivial(self, outputs: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        return {"zero": [{"error": -self.evaluation[0]["y"]}]}


def columns(source: ToySource) -> dict[str, np.ndarray]:
    """All training examples."""
    rows = [source.train[i] for i in range(len(source.train))]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


class StagedTask(ToyTask):
    """Two stages, each on its own half of the data."""

    second: ClassVar[Mapping[str, Any]] = {}  # what is said of the second stage besides

    def stages(self) -> tuple[Stage, ...]:
        first, second = super().stages()
        return first, dataclasses.replace(second, **self.second)

    def data_of_stage(self, source: Source) -> Source:
        assert self.stage is not None and isinstance(source, ToySource)
        number, (batch,) = ("first", "second").index(self.stage.name), source.evaluation

        def half(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {key: np.split(value, 2)[number] for key, value in rows.items()}

        return OtherItems(source, Arrays(half(columns(source))), [half(batch)])


class EasyFirstTask(StagedTask):
    """What the first stage is evaluated on needs no training: it scores best there, whatever is learned."""

    def data_of_stage(self, source: Source) -> Source:
        own = super().data_of_stage(source)
        assert self.stage is not None and isinstance(own, OtherItems)
        if self.stage.name == "second":
            return own
        nothing = [{key: np.zeros_like(x) for key, x in batch.items()} for batch in own.evaluation]
        return dataclasses.replace(own, evaluation=nothing)


class OwnRatesTask(ToyTask):
    """Two stages, of which the first has rates of its own, and the second those of the config."""

    def stages(self) -> tuple[Stage, ...]:
        first, second = super().stages()
        optim = dataclasses.replace(first.optim, learning_rate=0.125, weight_decay=0.25)
        return dataclasses.replace(first, optim=optim), second


class EmptyTask(ToyTask):
    """Nothing to train on."""

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("main", 0, self.config.optim),)


class RowsTask(ClosingTask):
    """Looks at each row by itself, and notes how many come at a time."""

    evaluates = "rows"
    seen: ClassVar[list[int]] = []  # rows of what was traced

    def closing(self, source: Source) -> Closing:
        rows = super().closing(source).batches
        batch = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
        return Closing([batch], self._score)

    def predict(self, variables: Variables, batch: Batch) -> Any:
        self.seen.append(len(batch["x"]))
        return {"error": super().predict(variables, batch)["error"]}


class WholeTask(RowsTask):
    """The same, but a batch is not to be cut: what it gives for a row depends on the others."""

    evaluates = "whole"

    def predict(self, variables: Variables, batch: Batch) -> Any:
        error = super().predict(variables, batch)["error"]
        return {"error": error - jnp.mean(error)}


class UnsplittableTask(ToyTask):
    """Its batches cannot be split, as with batch norm."""

    @classmethod
    def rules(cls, config: Any) -> Iterable[Rule]:
        yield Rule("host.split", config.host.split, config.host.split == 1, "must be 1 here")


class BucketTask(ToyTask):
    """Examples padded to eight numbers; the first half of the data needs four of them."""

    @property
    def tokens_per_example(self) -> int:
        return 8

    def example(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {**super().example(), "x": jax.ShapeDtypeStruct((8,), jnp.float32)}

    def fit(self, batch: Batch) -> Batch:
        return batch if batch["x"][..., 4:].any() else {**batch, "x": batch["x"][..., :4]}

    def open(self, cache: Path) -> Any:
        toy, rows = ToySource(self.config.data, 8), columns(ToySource(self.config.data, 8))
        padded = [{**batch, "x": _padded(batch["x"])} for batch in toy.evaluation]
        return OtherItems(toy, Arrays({**rows, "x": _padded(rows["x"])}), padded)

    def init(self, rng: jax.Array) -> Variables:
        made = super().init(rng)
        return {**made, "params": {**made["params"], "weight": jnp.linspace(0.5, 1.5, 8)}}

    def _shortened(self, variables: Variables, batch: Batch) -> tuple[Variables, Batch]:
        """To four numbers: those of the first half, and what the second half adds to them."""
        params = dict(variables["params"])
        x = batch["x"] * params.pop("weight")[None, : batch["x"].shape[-1]]
        folded = x if x.shape[-1] == 4 else x[..., :4] + x[..., 4:]
        return {**variables, "params": params}, {**batch, "x": folded}

    def encode(self, variables: Variables, batch: Batch, rngs: jax.Array) -> tuple[Any, Any]:
        return super().encode(*self._shortened(variables, batch), rngs)

    def predict(self, variables: Variables, batch: Batch) -> Any:
        return super().predict(*self._shortened(variables, batch))


class UncutTask(BucketTask):
    """The same without cutting."""

    fit = ToyTask.fit


class WrongShapeTask(BucketTask):
    """It says another shape than its data has."""

    def example(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {**super().example(), "x": jax.ShapeDtypeStruct((9,), jnp.float32)}


def _padded(x: np.ndarray) -> np.ndarray:
    further = np.where(np.arange(len(x))[:, None] < len(x) // 2, 0, x[:, ::-1])
    return np.concatenate([x, further], axis=1).astype(np.float32)
