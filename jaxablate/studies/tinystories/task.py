"""Language modelling as a Task: the mean cross-entropy of the next token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxablate.config import RunConfig
from jaxablate.data import Batch
from jaxablate.nn.ffn import GATED, ffn_params
from jaxablate.rules import Rule, at_least, there
from jaxablate.studies.tinystories import metrics
from jaxablate.studies.tinystories.config import LmData, LmModel, training_steps
from jaxablate.studies.tinystories.data import Corpus, open_corpus
from jaxablate.studies.tinystories.data import rules as data_rules
from jaxablate.studies.tinystories.model import DecoderLm, ffn_width
from jaxablate.task import Source, TextTask, Variables, resolve_kernels
from jaxablate.text.tokenizer import Vocabulary
from jaxablate_kernels import Resolved

# Where the config chooses a kernel, and of which operation.
SLOTS = {
    "attention_impl": "attention",
    "norm_impl": "norm",
    "ffn_impl": "gated",
    "loss_impl": "cross_entropy",
}


class LmTask(TextTask[LmModel, LmData]):
    """Windows of a text; the response is the validation loss in nats a token."""

    Model = LmModel
    Data = LmData
    response = "val/loss"
    evaluates = "rows"
    beside = {"val/loss": "val/unigram_loss"}
    directions = {"train/loss": "min", **{f"val/{name}": "min" for name in metrics.LOWER_IS_BETTER}}

    def __init__(self, config: RunConfig[LmModel, LmData], platform: str):
        super().__init__(config, platform)
        model, data, training = config.model, config.data, config.training
        resolved, self._kernels = resolve_kernels(model, SLOTS, platform)
        self._width = ffn_width(model)
        self.model = DecoderLm(
            resolved,
            vocab=data.vocab_size,
            context=data.context,
            dtype=jnp.dtype(training.compute_dtype),
            remat=training.remat,
        )

    @classmethod
    def rules(cls, config: RunConfig[LmModel, LmData]) -> Iterator[Rule]:
        model, data, training = config.model, config.data, config.training
        cuts = model.heads > 0 and model.dim % model.heads == 0 and model.dim // model.heads % 2 == 0
        yield Rule(
            "model.heads", model.heads, cuts, f"must cut model.dim={model.dim} into heads of an even size"
        )
        yield at_least(1, "model.layers", model.layers)
        yield at_least(2, "data.context", data.context)
        yield at_least(1, "data.eval_batches", data.eval_batches)
        yield at_least(0, "data.tokens", data.tokens)
        yield from data_rules(data)
        if data.tokens > 0 and data.context > 0:
            steps = training_steps(data.tokens, training.batch_size, data.context)
            yield Rule(
                "training.steps",
                training.steps,
                training.steps == steps,
                f"data.tokens={data.tokens} makes {steps} steps of {training.batch_size} x {data.context}; "
                f"set data.tokens alone, or data.tokens=0 to count steps",
            )
        try:
            ffn_width(model)
        except ValueError as error:
            yield Rule("model.dim", model.dim, False, f"{error}; choose a wider model")
        else:
            yield Rule("model.dim", model.dim, True, "must be wide enough for a feed-forward layer")
        yield from there({f"data.{name}": getattr(data, name) for name in ("train", "val", "tokenizer")})

    @property
    def kernels(self) -> Mapping[str, Resolved]:
        model, unused = self.config.model, set[str]()
        if model.ffn not in GATED:
            unused.add("model.ffn_impl")
        if model.norm == "none":
            unused.add("model.norm_impl")
        return {slot: kernel for slot, kernel in self._kernels.items() if slot not in unused}

    @property
    def tokens_per_example(self) -> int:
        return self.config.data.context

    @property
    def flops_per_example(self) -> float:
        """Matrix products: 2 per weight and token, 4 T^2 C of attention (as if it were not causal, which is the
        convention of Chowdhery et al. 2022, appendix B); x 3 for forward and backward. Embedding is a lookup."""
        model, data = self.config.model, self.config.data
        layer = 4 * model.dim**2 + ffn_params(model.ffn, model.dim, self._width)
        weights = model.layers * layer + model.dim * data.vocab_size
        attention = model.layers * 4 * data.context * model.dim
        return 3.0 * data.context * (2 * weights + attention)

    def example(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {"tokens": jax.ShapeDtypeStruct((self.config.data.context + 1,), jnp.int32)}

    def open(self, cache: Path) -> Corpus:
        return open_corpus(self.config.data, cache, eval_batch_size=self.config.training.eval_batch_size)

    def init(self, rng: jax.Array) -> Variables:
        return self.model.init(rng, jnp.zeros((1, self.config.data.context), jnp.int32))

    def _losses(self, variables: Variables, batch: Batch) -> jax.Array:
        tokens = batch["tokens"]
        found: Any = self.model.apply(variables, tokens[:, :-1], tokens[:, 1:], method="losses")
        return found

    def encode(self, variables: Variables, batch: Batch, rngs: jax.Array) -> tuple[Any, Any]:
        del rngs  # nothing here is random
        return {"nll": self._losses(variables, batch)}, {}

    def loss(self, variables: Variables, features: Any) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        del variables
        return jnp.mean(features["nll"]), {}

    def predict(self, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        return {"nll": self._losses(variables, batch)}

    # ------------------------------------------------------------------------------------- writing

    @cached_property
    def _writer(self) -> DecoderLm:
        """The model with a cache. On the reference kernels: others may not take a single query, or this machine."""
        plain = replace(self.config.model, **dict.fromkeys(SLOTS, "reference"))
        return self.model.clone(config=plain, remat="none", cache="kept")

    @property
    def context(self) -> int:
        return self.config.data.context

    def vocabulary(self, source: Source) -> Vocabulary | None:
        return _corpus(source).vocabulary

    def opening(self, source: Source, vocabulary: Vocabulary) -> Sequence[int]:
        """END_OF_TEXT, or a line break if the training text has none: its embedding was never trained then."""
        end = vocabulary.end_of_text
        if end is not None and _corpus(source).counts[end]:
            return [end]
        return [int(i) for i in vocabulary.encode(["\n"])[0]]

    def fill(self, variables: Variables, tokens: jax.Array, last: jax.Array) -> tuple[jax.Array, Any]:
        states, kept = self._writer.apply(variables, tokens, method="states", mutable=["cache"])
        ends = jnp.take_along_axis(states, last[:, None, None], axis=1)
        logits: Any = self._writer.apply(variables, ends, method=lambda model, x: model.head(x))
        return logits[:, 0], kept["cache"]

    def extend(
        self, variables: Variables, cache: Any, tokens: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, Any]:
        now = {**variables, "cache": cache}
        logits, kept = self._writer.apply(now, tokens[:, None], positions[:, None], mutable=["cache"])
        return logits[:, 0], kept["cache"]


def _corpus(source: Source) -> Corpus:
    assert isinstance(source, Corpus), "what `open` gives"
    return source
