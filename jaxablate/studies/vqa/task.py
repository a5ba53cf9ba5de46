"""Surgical VQA as a Task: adapters beside a frozen vision-language model; the test questions are asked at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxablate.config import RunConfig
from jaxablate.data import Batch
from jaxablate.errors import UserError
from jaxablate.rules import Rule
from jaxablate.studies.vqa import flops, inference, metrics
from jaxablate.studies.vqa.base import load_base
from jaxablate.studies.vqa.config import STAGES, VqaData, VqaModel, epoch_steps, trained_stages, warmup_steps
from jaxablate.studies.vqa.data import Language, PictureSpec, VqaSource, open_files, open_vqa
from jaxablate.studies.vqa.data.prompts import PASSES
from jaxablate.studies.vqa.data.stages import Split
from jaxablate.studies.vqa.examination import Examination
from jaxablate.studies.vqa.inference import TokenPasses
from jaxablate.studies.vqa.model import Rules, Vlm
from jaxablate.studies.vqa.qwen3vl.tokens import Chat
from jaxablate.studies.vqa.rules import rules
from jaxablate.task import Closing, Source, Stage, Task, Variables, resolve_kernels
from jaxablate_kernels import Resolved

logger = logging.getLogger(__name__)

SLOTS = {
    "attention_impl": "attention",
    "norm_impl": "norm",
    "ffn_impl": "gated",
    "loss_impl": "cross_entropy",
}


class VqaTask(Task[VqaModel, VqaData]):
    """Questions about pictures. Training goes by the validation loss; what is reported are the answers at the end."""

    Model = VqaModel
    Data = VqaData
    response = "val/loss"
    evaluates = "rows"
    beside = metrics.BESIDE
    directions = {"train/loss": "min", "val/loss": "min", **metrics.DIRECTIONS}

    def __init__(self, config: RunConfig[VqaModel, VqaData], platform: str):
        super().__init__(config, platform)
        resolved, self._kernels = resolve_kernels(config.model, SLOTS, platform)
        dtype = jnp.dtype(config.training.compute_dtype)
        self.model = Vlm.of(resolved, dtype=dtype, remat=config.training.remat)

    @classmethod
    def rules(cls, config: RunConfig[VqaModel, VqaData]) -> Iterator[Rule]:
        return rules(config)

    @property
    def kernels(self) -> Mapping[str, Resolved]:
        return self._kernels

    @property
    def tokens_per_example(self) -> int:
        """Of the longest ones: shorter batches are cut to their bucket."""
        return self.config.data.image_tokens + self.config.data.max_text

    @property
    def flops_per_example(self) -> float:
        vision = self.model.config.vision
        adapter = sum(x.size for x in jax.tree.leaves(self.model.abstract_adapter()))
        return flops.training_example(
            self.model.config,
            tokens=self.tokens_per_example,
            patches=self.config.data.image_tokens * vision.merge**2,
            adapter=adapter,
        )

    # ---------------------------------------------------------------------------------------- stages

    @property
    def _experts(self) -> bool:
        return self.config.data.regimen == "experts"

    def stages(self) -> tuple[Stage, ...]:
        """One on all questions, or one for each stage of care. A stage without questions is skipped."""
        data, training, optim = self.config.data, self.config.training, self.config.optim
        if data.regimen == "single":
            return (Stage("main", training.steps, optim),)
        found: list[Stage] = []
        for stage in self._trained:
            epoch = epoch_steps(data.questions.of(stage), training.batch_size)
            steps = data.epochs * epoch
            found.append(
                Stage(
                    f"stage_{stage}",
                    steps,
                    replace(optim, warmup_steps=warmup_steps(steps, data.warmup_ratio)),
                    (f"expert_{stage}/*",) if self._experts else ("*",),
                    optimizer=data.optimizer_state if found else "fresh",
                    eval_every=-(-epoch // data.evaluations),
                )
            )
        return tuple(found)

    @property
    def _trained(self) -> tuple[int, ...]:
        """The stages that have questions; the first of those asked for if none has, to be there in name."""
        return trained_stages(self.config.data) or self.config.data.stages[:1]

    def data_of_stage(self, source: Source) -> VqaSource:
        whole, at = _opened(source), self._at
        return whole if at is None else whole.of_stage(at)

    @property
    def _at(self) -> int | None:
        """The stage of care that is trained; None of all together."""
        assert self.stage is not None, "a task with stages is asked inside of one"
        return None if self.stage.name == "main" else int(self.stage.name.removeprefix("stage_"))

    # ------------------------------------------------------------------------------------------ data

    def example(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        row = jax.ShapeDtypeStruct((self.tokens_per_example,), jnp.int32)
        return {
            "tokens": row,
            "targets": row,
            "patches": jax.ShapeDtypeStruct((1, self._pictures.patches, self._pictures.values), jnp.uint8),
            "grids": jax.ShapeDtypeStruct((1, 2), jnp.int32),
        }

    @cached_property
    def _pictures(self) -> PictureSpec:
        return PictureSpec(self.model.config.vision, self.config.data.image_tokens)

    @cached_property
    def _language(self) -> Language:
        """That of the checkpoint; single characters for a base that is trained here, or not at all.

        Raises:
          UserError: there is no checkpoint, or it has no tokenizer for this model.
        """
        model, sizes = self.config.model, self.model.config
        if model.base == "folder":
            if not (model.base_path and Path(model.base_path).expanduser().is_dir()):
                raise UserError(
                    f"config.model.base_path='{model.base_path}': is no folder; give the one of the checkpoint's files"
                )
            return Language.of_chat(Chat.load(model.base_path, sizes))
        return Language.characters(sizes.image_token)

    def open(self, cache: Path) -> VqaSource:
        data = self.config.data
        source = open_vqa(data, self._language, self._pictures, cache, **self._asking)
        skipped = [f"stage {stage}" for stage in data.stages if not data.questions.of(stage)]
        if skipped and data.regimen != "single":
            logger.warning("%s: skipped, since there are no training questions", ", ".join(skipped))
        return source

    def open_test(self, questions: Path, image_root: Path, cache: Path) -> VqaSource:
        """Other test questions than those of the data, without any to train on."""
        files: dict[Split, Path] = {"test": questions}
        return open_files(
            files, image_root, self.config.data, self._language, self._pictures, cache, **self._asking
        )

    @property
    def _asking(self) -> dict[str, Any]:
        """How test questions are asked."""
        model = self.config.model
        return {
            "eval_batch_size": self.config.training.eval_batch_size,
            "answer_tokens": model.answer_tokens,
            "passes": 3 if model.inference == "three_pass" else 1,
        }

    def fit(self, batch: Batch) -> Batch:
        """Cut to the shortest of `data.buckets` that holds the answers of all rows."""
        targets, picture = batch["targets"], self.config.data.image_tokens
        asked = np.flatnonzero((targets >= 0).any(axis=tuple(range(targets.ndim - 1))))
        needed = int(asked[-1]) + 1 - picture if len(asked) else 0
        length = picture + next(size for size in self.config.data.buckets if size >= needed)
        return {**batch, **{name: batch[name][..., :length] for name in ("tokens", "targets")}}

    # ----------------------------------------------------------------------------------- parameters

    @cached_property
    def abstract_base(self) -> Variables:
        return self.model.abstract_base()

    @property
    def base_parameters(self) -> int:
        return self.model.base_parameters  # of the model as published: storage packs two into a byte

    def base(self, cache: Path) -> Variables:
        return load_base(self.config.model, self.config.data, self.model, cache)

    def init(self, rng: jax.Array) -> Variables:
        """Experts start from the same numbers, those of a single adapter."""
        if not self._experts:
            return {"params": self.model.init_adapter(rng)}
        return {"params": {f"expert_{stage}": self.model.init_adapter(rng) for stage in self._trained}}

    # -------------------------------------------------------------------------------------- training

    def _losses(self, variables: Variables, batch: Batch, keys: jax.Array | None) -> dict[str, jax.Array]:
        """Of each question the summed loss of its answer's tokens, and how many they are."""
        if self._experts:
            variables = {**variables, "params": variables["params"][f"expert_{self._at}"]}
        nll, count = self.model.losses(variables, batch, keys)
        return {"nll": nll, "count": count}

    def encode(self, variables: Variables, batch: Batch, rngs: jax.Array) -> tuple[Any, Any]:
        return self._losses(variables, batch, rngs), {}

    def loss(self, variables: Variables, features: Any) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """The mean over all tokens of all answers of the effective batch, however it is split."""
        del variables
        return jnp.sum(features["nll"]) / jnp.sum(features["count"]), {}

    def predict(self, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        return self._losses(variables, batch, None)

    # ------------------------------------------------------------------------------------ test questions

    def conclude(self, variables: Variables, batch: Batch) -> dict[str, Any]:
        """The answers of each pass to questions of one stage, as `Continued` by pass."""
        if self._experts:
            variables = {**variables, "params": _routed(variables["params"], batch["stage"][0])}
        asked = (batch["tokens"], batch["length"], batch["patches"], batch["grids"])
        wording = PASSES[self.config.data.wording]
        single = self.config.model.inference == "single"
        passes = None if single else TokenPasses.of(wording, self._language)
        return inference.answered(self.model, variables, *asked, self._answering, passes)

    @cached_property
    def _answering(self) -> Rules:
        return inference.rules_of(self._language, self.config.model.answer_tokens)

    def closing(self, source: Source) -> Closing | None:
        """An expert is asked the questions of its stage alone; an adapter of all stages those of all."""
        asked = self._examination(source)
        return Closing(asked.batches, asked.score, asked.trivial)

    def keep(self, source: Source, outputs: Sequence[Any]) -> Mapping[str, np.ndarray]:
        return self._examination(source).keep(outputs)

    def _examination(self, source: Source) -> Examination:
        data, limit = self.config.data, self.config.model.answer_tokens
        if not self._experts:
            return Examination(_opened(source), STAGES, limit)
        return Examination(_opened(source), data.stages, limit, set(data.stages) - set(self._trained))


def _routed(experts: Mapping[str, Any], stage: jax.Array) -> Any:
    """The expert of a stage that is known when the program runs."""
    own = jnp.array([int(name.removeprefix("expert_")) for name in experts])
    at = jnp.argmax(own == stage)
    return jax.tree.map(lambda *each: jnp.stack(each)[at], *experts.values())


def _opened(source: Source) -> VqaSource:
    assert isinstance(source, VqaSource), "what `open` gives"
    return source
