"""The base of `tiny`: the whole model trained once on captions of pictures, and kept as a checkpoint in the cache.

It is the same for every arm, whatever kernels, loop and storage that has: those of the arm come in when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxablate import distributed, trained
from jaxablate.cache import built_folder
from jaxablate.config import Cohort, HostConfig, MeshConfig, OptimConfig, RunConfig, TrainingConfig
from jaxablate.data import Batch
from jaxablate.errors import UserError
from jaxablate.runstore import RunDir
from jaxablate.studies.vqa.config import VqaData, VqaModel, warmup_steps
from jaxablate.studies.vqa.data import CaptionSource, Language, PictureSpec, open_captions
from jaxablate.studies.vqa.qwen3vl import images
from jaxablate.studies.vqa.qwen3vl.config import SIZES
from jaxablate.studies.vqa.qwen3vl.model import Qwen3Vl
from jaxablate.studies.vqa.qwen3vl.save import save
from jaxablate.task import Task, Variables
from jaxablate.train import train

WIDTHS = 32  # batches are padded to multiples of so many tokens
WARMUP = 0.05  # of the updates
DEVIATION = 0.02  # with which the model draws its matrices


class CaptionTask(Task[VqaModel, VqaData]):
    """Every token of a caption, behind its picture; the response is the loss of captions of other scenes."""

    Model = VqaModel
    Data = VqaData
    response = "val/loss"
    directions = {"train/loss": "min", "val/loss": "min"}

    def __init__(self, config: RunConfig[VqaModel, VqaData], platform: str):
        super().__init__(config, platform)
        self.sizes = SIZES[config.model.size]
        self.model = Qwen3Vl(self.sizes, loop="scan")

    def example(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        data, vision = self.config.data, self.sizes.vision
        row = jax.ShapeDtypeStruct((data.max_text + data.image_tokens,), jnp.int32)
        patches = (1, data.image_tokens * vision.merge**2, vision.patch_size)
        return {
            "tokens": row,
            "targets": row,
            "patches": jax.ShapeDtypeStruct(patches, jnp.uint8),
            "grids": jax.ShapeDtypeStruct((1, 2), jnp.int32),
        }

    def fit(self, batch: Batch) -> Batch:
        asked = np.flatnonzero((batch["targets"] >= 0).any(axis=(0, 1)))
        width = -(-(int(asked[-1]) + 1) // WIDTHS) * WIDTHS
        return {**batch, **{key: batch[key][..., :width] for key in ("tokens", "targets")}}

    def open(self, cache: Path) -> CaptionSource:
        data, training = self.config.data, self.config.training
        spec = PictureSpec(self.sizes.vision, data.image_tokens)
        language = Language.characters(self.sizes.image_token)
        return open_captions(data, language, spec, cache, eval_batch_size=training.eval_batch_size)

    def init(self, rng: jax.Array) -> Variables:
        """Matrices of deviation 1 / sqrt(width): published models are so wide that theirs of 0.02 is about that."""
        shapes = {key: jnp.zeros((1, *x.shape), x.dtype) for key, x in self.example().items()}
        variables = self.model.init(
            rng, shapes["tokens"][:, :1], images.normalised(shapes["patches"]), shapes["grids"]
        )
        wider = self.sizes.text.dim**-0.5 / DEVIATION

        def scaled(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            names = {getattr(key, "key", "") for key in path}
            return leaf * wider if names & {"kernel", "embedding", "positions"} else leaf

        return jax.tree_util.tree_map_with_path(scaled, variables)

    def encode(self, variables: Variables, batch: Batch, rngs: jax.Array) -> tuple[Any, Any]:
        del rngs  # nothing here is random
        return self.predict(variables, batch), {}

    def loss(self, variables: Variables, features: Any) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        del variables
        return features["nll"].sum() / features["count"].sum(), {}

    def predict(self, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        """Sums over each row's tokens: {"nll": (B,) in nats, "count": (B,)}."""
        patches = images.normalised(batch["patches"])
        nll: Any = self.model.apply(
            variables, batch["tokens"], batch["targets"], patches, batch["grids"], method="losses"
        )
        return {"nll": nll.sum(axis=1), "count": (batch["targets"] >= 0).sum(axis=1)}


def pretrained(model: VqaModel, data: VqaData, cache: Path) -> Path:
    """The folder of the checkpoint that training on captions ends with; trains it if there is none, a minute or two.

    Raises:
      UserError: the training diverged; or this process is one of several, which cannot train it.
    """
    run = caption_run(model, data, cache)
    task = CaptionTask(run, jax.default_backend())
    told = task.open(cache).fingerprint[:8]  # other captions, another base
    run = replace(run, host=replace(run.host, workdir=str(cache / "vqa" / f"base-runs-{told}")))
    folder = cache / "vqa" / f"base-{run.fingerprint}-{told}"
    if distributed.several() and not folder.exists():
        raise UserError(
            f"{folder}: the base is not trained yet, which takes one process; run `check` of this study first"
        )

    def build(scratch: Path) -> None:
        (summary,) = train(Cohort((run,)))
        where = RunDir(Path(run.host.workdir) / run.study / run.arm / summary["run_id"])
        if summary["state"] != "done":
            raise UserError(
                f"{where.path}: the base's training on captions ended as '{summary['state']}'; lower "
                f"config.model.base_learning_rate={model.base_learning_rate}"
            )
        found = trained.restore(task, run, where, "final").variables["params"]
        save(scratch, task.sizes, jax.device_get(found))

    built_folder(folder, build)
    return folder


def caption_run(model: VqaModel, data: VqaData, cache: Path) -> RunConfig[VqaModel, VqaData]:
    """The run that trains the base. Of model and data it has what bears on that; all else is at its default."""
    own_model = VqaModel(
        size=model.size,
        base=model.base,
        base_steps=model.base_steps,
        base_batch_size=model.base_batch_size,
        base_learning_rate=model.base_learning_rate,
        base_seed=model.base_seed,
    )
    own_data = replace(
        VqaData(),
        source=data.source,
        scenes=data.scenes,
        sequences=data.sequences,
        seed=data.seed,
        wording=data.wording,
        max_text=data.max_text,
        image_tokens=data.image_tokens,
    )
    steps = model.base_steps
    return RunConfig(
        study="vqa_base",
        arm="captions",
        scale=model.size,
        task=f"{CaptionTask.__module__}:{CaptionTask.__qualname__}",
        seed=model.base_seed,
        model=own_model,
        data=own_data,
        optim=OptimConfig(
            learning_rate=model.base_learning_rate,
            warmup_steps=warmup_steps(steps, WARMUP),
            clip_norm=1.0,
        ),
        training=TrainingConfig(
            steps=steps, batch_size=model.base_batch_size, eval_every=steps, eval_batch_size=32
        ),
        host=HostConfig(
            cache=str(cache),
            checkpoint_every=steps,
            mesh=MeshConfig(member=1, data=1),
        ),
    )
