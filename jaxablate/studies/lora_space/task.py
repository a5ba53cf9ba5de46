"""The LoRA weight space as a Task: which concept was an adapter trained on? From its weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxablate.config import RunConfig
from jaxablate.data import Batch
from jaxablate.errors import UserError
from jaxablate.rules import Rule, at_least
from jaxablate.studies.lora_space import metrics, speed
from jaxablate.studies.lora_space.config import LoraSpaceData, LoraSpaceModel, epoch_steps, training_samples
from jaxablate.studies.lora_space.data import Adapters, Described, describe, open_adapters
from jaxablate.studies.lora_space.data import rules as data_rules
from jaxablate.studies.lora_space.features import feature_dim
from jaxablate.studies.lora_space.model import Classifier
from jaxablate.task import Closing, Source, Speedup, Task, Variables


class LoraSpaceTask(Task[LoraSpaceModel, LoraSpaceData]):
    """Features of an adapter in, its category out; the response is the accuracy on the validation adapters."""

    Model = LoraSpaceModel
    Data = LoraSpaceData
    response = "val/accuracy"
    init_effort = "little"  # of flat_vec, 51 million weights a member
    beside = {"val/accuracy": "val/chance", "val/test_accuracy": "val/test_chance"}
    directions = {"train/loss": "min", **metrics.DIRECTIONS}

    @classmethod
    def rules(cls, config: RunConfig[LoraSpaceModel, LoraSpaceData]) -> Iterator[Rule]:
        model, data, training = config.model, config.data, config.training
        yield from data_rules(data)
        for name in ("hidden", "layers"):
            yield at_least(1, f"model.{name}", getattr(model, name))
        yield Rule("model.dropout", model.dropout, 0 <= model.dropout < 1, "must be in [0, 1)")
        momentum = model.norm_momentum
        yield Rule("model.norm_momentum", momentum, 0 < momentum <= 1, "must be in (0, 1]")
        yield Rule("model.norm_eps", model.norm_eps, model.norm_eps > 0, "must be more than 0")
        yield at_least(2, "training.batch_size", training.batch_size)  # of one example there is no variance
        parts = {"training.accumulation": training.accumulation, "host.split": config.host.split}
        for name, value in parts.items():
            detail = "must be 1: batch norm is of the whole batch, and of parts of it another function"
            yield Rule(name, value, value == 1, detail)
        epoch = epoch_steps(training_samples(data), training.batch_size)
        yield Rule(
            "training.eval_every",
            training.eval_every,
            training.eval_every == epoch,
            f"an epoch of data.samples={data.samples} is {epoch} steps; patience is counted in evaluations",
            "advice",
        )

    @cached_property
    def _described(self) -> Described:
        return describe(self.config.data)

    @cached_property
    def _dim(self) -> int:
        return feature_dim(self._described.tensors, self.config.data.representation)

    @cached_property
    def model(self) -> Classifier:
        """The classifier of as many categories as the data has."""
        dtype = jnp.dtype(self.config.training.compute_dtype)
        return Classifier(self.config.model, len(self._described.categories), dtype=dtype)

    @property
    def flops_per_example(self) -> float:
        """Matrix products: 2 per weight forward, 4 backward, but 2 in the first layer, whose input has no gradient."""
        model = self.config.model
        first = self._dim * model.hidden
        others = (model.layers - 1) * model.hidden**2 + model.hidden * self.model.classes
        return 4.0 * first + 6.0 * others

    def example(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {
            "x": jax.ShapeDtypeStruct((self._dim,), jnp.float32),
            "label": jax.ShapeDtypeStruct((), jnp.int32),
        }

    def open(self, cache: Path) -> Adapters:
        data, training = self.config.data, self.config.training
        source = open_adapters(data, cache, eval_batch_size=training.eval_batch_size)
        asked, found = training_samples(data), len(source.train)
        if epoch_steps(found, training.batch_size) != epoch_steps(asked, training.batch_size):
            raise UserError(
                f"config.data.samples={data.samples}: makes {asked} training adapters, and {data.path} has {found}; "
                f"set data.samples to what is there: the epochs follow from it"
            )
        return source

    def init(self, rng: jax.Array) -> Variables:
        return self.model.init(rng, jnp.zeros((1, self._dim)), None)

    # -------------------------------------------------------------------------------------- training

    def encode(self, variables: Variables, batch: Batch, rngs: jax.Array) -> tuple[Any, Any]:
        """The loss and whether it is right, of each example; mean and biased variance of the batch in each layer."""
        found: Any = self.model.apply(variables, batch["x"], rngs, mutable=["batch_stats"])
        logits, moments = found
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        hit = (jnp.argmax(logits, axis=1) == batch["label"]).astype(jnp.float32)
        return {"nll": nll, "hit": hit}, moments["batch_stats"]

    def loss(self, variables: Variables, features: Any) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        del variables
        return jnp.mean(features["nll"]), {"accuracy": jnp.mean(features["hit"])}

    def advance(self, collections: Variables, sums: Any) -> Variables:
        """Running mean and variance after a batch, as torch has them: of the unbiased variance."""
        new, size = self.config.model.norm_momentum, self.config.training.batch_size
        share = {"mean": new, "var": new * size / (size - 1)}
        running = {
            layer: {name: (1 - new) * old + share[name] * sums[layer][name] for name, old in moments.items()}
            for layer, moments in collections["batch_stats"].items()
        }
        return {**collections, "batch_stats": running}

    # ------------------------------------------------------------------------------------ evaluation

    def predict(self, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        logits: Any = self.model.apply(variables, batch["x"], None)
        return {"logits": logits, "label": batch["label"], "split": batch["split"]}

    def speedups(self, cache: Path, scratch: Path) -> Iterator[Speedup]:
        return speed.speedups(self, cache, scratch)

    def closing(self, source: Source) -> Closing:
        """Training and test adapters: no choice depends on them, so they are looked at once."""
        assert isinstance(source, Adapters), "what `open` gives"
        return Closing(source.all_parts, metrics.evaluate_others, source.trivial)

    def keep(self, source: Source, outputs: Sequence[Any]) -> Mapping[str, np.ndarray]:
        """What every adapter is and was taken for, with the names of the categories, for the report."""
        assert isinstance(source, Adapters), "what `open` gives"
        rows = metrics.joined(outputs)
        return {
            "prediction": np.argmax(rows["logits"], axis=1).astype(np.int16),
            "label": rows["label"].astype(np.int16),
            "split": rows["split"].astype(np.int8),
            "categories": np.array(self._described.categories),
            "near_constant": np.array(source.near_constant),
            "features": np.array(self._dim),
            "tensors": np.array(len(self._described.tensors)),
            "workers": np.array(self.config.host.workers),
            "remarks": np.array(source.remarks, dtype=str),
        }
