"""CT-CLIP as a Task: contrastive training, zero-shot detection of findings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxablate.config import RunConfig
from jaxablate.data import Batch
from jaxablate.errors import UserError
from jaxablate.nn.ffn import GATED, ffn_params
from jaxablate.rules import Rule, at_least, divides, there
from jaxablate.studies.ctclip import bert, metrics
from jaxablate.studies.ctclip.config import ClipData, ClipModel
from jaxablate.studies.ctclip.data import Dataset, open_dataset
from jaxablate.studies.ctclip.data.findings import FINDINGS
from jaxablate.studies.ctclip.model import (
    CosineCodebook,
    CtClip,
    Sums,
    ffn_width,
    siglip_loss,
    softmax_loss,
)
from jaxablate.task import Task, Variables, resolve_kernels
from jaxablate_kernels import Resolved

# Where the config chooses a kernel, and of which operation.
SLOTS = {
    "image.attention.impl": "attention",
    "image.norm_impl": "norm",
    "image.ffn_impl": "gated",
    "text.attention_impl": "attention",
    "text.norm_impl": "norm",
}


class CtClipTask(Task[ClipModel, ClipData]):
    """Pairs of volume and report; the response is the macro AUROC over 18 findings."""

    Model = ClipModel
    Data = ClipData
    response = "val/macro_auroc"
    directions = {
        "train/loss": "min",
        "val/loss": "min",
        **{f"val/{mean}_{m}": "max" for mean in ("macro", "weighted") for m in metrics.METRICS},
    }

    def __init__(self, config: RunConfig[ClipModel, ClipData], platform: str):
        super().__init__(config, platform)
        model, data, training = config.model, config.data, config.training
        resolved, self._kernels = resolve_kernels(model, SLOTS, platform)
        self.model = CtClip(
            resolved,
            vocab_size=data.vocab_size,
            text_length=data.text_length,
            dtype=jnp.dtype(training.compute_dtype),
            remat=training.remat,
        )

    @classmethod
    def rules(cls, config: RunConfig[ClipModel, ClipData]) -> Iterator[Rule]:
        model, data = config.model, config.data
        patch, text = model.image.patch, model.text
        yield Rule(
            "data.volume",
            data.volume,
            not any(n % p for n, p in zip(data.volume, patch, strict=True)),
            f"must divide into patches of model.image.patch={patch}",
        )
        yield divides("model.text.heads", text.heads, "text.dim", text.dim)
        yield at_least(1, "model.image.attention.heads", model.image.attention.heads)
        if text.weights:
            yield Rule(
                "data.tokenizer",
                data.tokenizer,
                data.tokenizer == "wordpiece",
                "model.text.weights knows BERT's words by number; set data.tokenizer=wordpiece, or "
                "model.text.weights=''",
            )
        files = {"model.text.weights": text.weights, "data.vocab_file": data.vocab_file}
        yield from there({**files, "data.train": data.train, "data.val": data.val})

    @property
    def kernels(self) -> Mapping[str, Resolved]:
        image, unused = self.config.model.image, set[str]()
        if image.ffn not in GATED:
            unused.add("model.image.ffn_impl")
        if image.norm == "none" and image.norm_scope == "all" and image.attention.variant == "qk_norm":
            unused.add("model.image.norm_impl")
        return {slot: kernel for slot, kernel in self._kernels.items() if slot not in unused}

    @property
    def tokens_per_example(self) -> int:
        """Patches of the volume; the text is small beside them."""
        return math.prod(
            n // p for n, p in zip(self.config.data.volume, self.config.model.image.patch, strict=True)
        )

    @property
    def flops_per_example(self) -> float:
        """Matrix products of both encoders: 2 per weight and token, 4 T^2 per inner width of attention; x 3."""
        data, model = self.config.data, self.config.model
        image, text = model.image, model.text
        frames, height, width = (n // p for n, p in zip(data.volume, image.patch, strict=True))
        cells = height * width
        inner = image.attention.heads * image.attention.head_dim
        layer = 4 * image.dim * inner + ffn_params(image.ffn, image.dim, ffn_width(image))
        forward = 2 * frames * cells * math.prod(image.patch) * image.dim
        for depth, length in ((image.spatial_depth, cells), (image.temporal_depth, frames)):
            forward += depth * frames * cells * (2 * layer + 4 * length * inner)
        if image.codebook != "none":
            forward += 2 * frames * cells * image.codebook_size * image.dim / 3  # has no backward pass
        text_layer = 4 * text.dim**2 + 2 * text.dim * text.ffn_dim
        forward += text.depth * data.text_length * (2 * text_layer + 4 * data.text_length * text.dim)
        forward += 2 * model.latent * (cells * image.dim + text.dim)
        return 3.0 * forward

    def example(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        data = self.config.data
        return {
            "image": jax.ShapeDtypeStruct(data.volume, jnp.float32),
            "text": jax.ShapeDtypeStruct((data.text_length,), jnp.int32),
        }

    def open(self, cache: Path) -> ClipSource:
        text = self.config.model.text
        if text.weights:
            abstract = jax.eval_shape(self.init, jax.random.key(0))
            bert.check_bert(text.weights, abstract["params"]["text"], text)
        data, workers = self.config.data, self.config.host.workers
        dataset = open_dataset(data, cache, prompt_style=data.prompts, workers=workers)
        if len(dataset.train) < self.config.training.batch_size:
            raise UserError(
                f"config.training.batch_size={self.config.training.batch_size}: the training split has only "
                f"{len(dataset.train)} volumes; choose a smaller batch"
            )
        return ClipSource(dataset, self.config.training.eval_batch_size)

    def init(self, rng: jax.Array) -> Variables:
        example = {k: jnp.zeros((1, *s.shape), s.dtype) for k, s in self.example().items()}
        variables, text = self.model.init(rng, example["image"], example["text"]), self.config.model.text
        if not text.weights:
            return variables
        params = variables["params"]
        pretrained = bert.init_from_bert(text.weights, params["text"], text)
        return {**variables, "params": {**params, "text": pretrained}}

    def _apply(self, variables: Variables, *inputs: Any, method: str | None = None) -> Any:
        """`model.apply` without mutable collections, which Flax types as if there might be some."""
        return self.model.apply(variables, *inputs, method=method)

    def encode(self, variables: Variables, batch: Batch, rngs: jax.Array) -> tuple[Any, Sums]:
        del rngs  # nothing here is random
        image, text, sums = self._apply(variables, batch["image"], batch["text"])
        return {"image": image, "text": text}, sums

    def loss(self, variables: Variables, features: Any) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        params, pair = variables["params"], (features["image"], features["text"])
        theta = params["log_temperature"]
        if self.config.model.loss == "siglip":
            loss = siglip_loss(*pair, theta, params["logit_bias"])
        else:
            loss = softmax_loss(*pair, theta)
        return loss, {"temperature": jnp.exp(theta)}

    def advance(self, collections: Variables, sums: Sums) -> Variables:
        if not sums:
            return collections
        codes = collections["codebook"]["image"]["codebook"]["codes"]
        codes = CosineCodebook.update(codes, sums, self.config.model.image.codebook_decay)
        return {**collections, "codebook": {"image": {"codebook": {"codes": codes}}}}

    def predict(self, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        text = self._apply(variables, batch["text"], method="encode_text")
        if "image" not in batch:  # the prompts
            return {"text": text, "temperature": jnp.exp(variables["params"]["log_temperature"])}
        image, _ = self._apply(variables, batch["image"], method="encode_image")
        return {"image": image, "loss": self.loss(variables, {"image": image, "text": text})[0]}


@dataclass(frozen=True)
class ClipSource:
    """Training pairs, and the validation batches: first all prompts, then the volumes in order."""

    dataset: Dataset
    batch_size: int

    @property
    def train(self):
        return self.dataset.train

    @property
    def fingerprint(self) -> str:
        return self.dataset.fingerprint

    @cached_property
    def evaluation(self) -> Sequence[Batch]:
        return _EvaluationBatches(self.dataset, self.batch_size)

    def score(self, outputs: Sequence[Any]) -> dict[str, float]:
        """Zero-shot metrics over all validation volumes, and the loss over the full batches."""
        prompts, *volumes = outputs
        count = len(self.dataset.val)
        image = np.concatenate([o["image"] for o in volumes])[:count]
        pairs = prompts["text"].reshape(2, len(FINDINGS), -1)
        scores = metrics.zero_shot_scores(image, pairs, float(prompts["temperature"]))
        # A padded batch has other negatives, so its loss does not count.
        full = max(count // self.batch_size, 1)
        loss = float(np.mean([o["loss"] for o in volumes[:full]]))
        labels = self.dataset.val.labels
        intervals = metrics.bootstrap_intervals(scores, labels)
        return {"loss": loss, **metrics.evaluate(scores, labels, FINDINGS), **intervals}

    def trivial(self, outputs: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
        """Every volume the same embedding, and embeddings without any content."""
        prompts, *volumes = outputs
        first = volumes[0]["image"][:1]
        constant = [{**o, "image": np.repeat(first, len(o["image"]), 0)} for o in volumes]
        empty = [{**o, "image": np.zeros_like(o["image"])} for o in volumes]
        return {"constant": [prompts, *constant], "empty": [prompts, *empty]}


class _EvaluationBatches(Sequence[Batch]):
    def __init__(self, dataset: Dataset, batch_size: int):
        self._dataset, self._size = dataset, min(batch_size, len(dataset.val))

    def __len__(self) -> int:
        return 1 + -(-len(self._dataset.val) // self._size)

    def __getitem__(self, index: int, /) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index == 0:
            prompts = self._dataset.prompts
            return {"text": prompts.reshape(-1, prompts.shape[-1])}
        start, last = (index - 1) * self._size, len(self._dataset.val) - 1
        items = [self._dataset.val[min(start + i, last)] for i in range(self._size)]  # padded with the last
        return {key: np.stack([item[key] for item in items]) for key in ("image", "text")}
