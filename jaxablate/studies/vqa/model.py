"""The study's model: Qwen3-VL with a frozen base, in storage or not, and adapters beside its decoder.

Its variables are three collections: `params` the adapters, which are trained; `base` the frozen parameters;
`quantized` the frozen kernels that are in storage, if any are.
Axes: B rows, T tokens, P patches of a picture.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, Num

from jaxablate.decoding import Continued, continue_prompts
from jaxablate.nn import lora, quantized
from jaxablate.nn.block import Remat
from jaxablate.nn.linear import fan_in_uniform
from jaxablate.nn.lora import Lora
from jaxablate.nn.projections import Quantization, projections
from jaxablate.studies.vqa.config import VqaModel
from jaxablate.studies.vqa.qwen3vl import images
from jaxablate.studies.vqa.qwen3vl import model as qwen
from jaxablate.studies.vqa.qwen3vl.config import SIZES, Loop, Qwen3VlConfig
from jaxablate.studies.vqa.qwen3vl.model import Qwen3Vl, Variables
from jaxablate.studies.vqa.qwen3vl.names import module_names

Storage = Literal["float", "nf4", "int8"]

BASE = "base"  # the collection of frozen parameters
# All projections but that of the patches, which is a convolution. Embedding and head are none either.
STORED = ("decoder/stage_*", "tower/stage_*", "tower/*merger*")


@dataclass(frozen=True)
class Rules:
    """How an answer is generated.

    Attributes:
      limit: most tokens of it.
      ends: ids that end it; see `data.prompts`.
      size: ids below it may be drawn.
    """

    limit: int
    ends: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Vlm:
    """The model of one configuration; made by `of`.

    Attributes:
      dtype: of the computation, and of the frozen parameters that are not in storage. Adapters are float32.
    """

    config: Qwen3VlConfig
    lora: Lora
    storage: Storage = "float"
    dtype: Any = jnp.float32
    remat: Remat = "none"
    loop: Loop = "scan"

    @classmethod
    def of(cls, model: VqaModel, *, dtype: Any = jnp.float32, remat: Remat = "none") -> Vlm:
        """The model that a config describes, with its kernels."""
        sizes = SIZES[model.size]
        shared = {"attention_impl": model.attention_impl, "norm_impl": model.norm_impl}
        config = replace(
            sizes,
            vision=replace(sizes.vision, **shared),
            text=replace(sizes.text, **shared, ffn_impl=model.ffn_impl, loss_impl=model.loss_impl),
        )
        adapters = Lora(model.lora_targets, model.lora_rank, model.lora_alpha, model.lora_dropout)
        return cls(config, adapters, model.storage, dtype, remat, model.loop)

    # ------------------------------------------------------------------------------------ variables

    def abstract_base(self) -> Variables:
        """Shapes of the frozen collections, with the names of their axes; a collection may be empty."""
        base, _ = lora.split(self._abstract["params"])
        cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, self.dtype), base)
        return {BASE: cast, quantized.COLLECTION: self._abstract.get(quantized.COLLECTION, {})}

    def abstract_adapter(self) -> dict[str, Any]:
        """Shapes of the adapters, with the names of their axes."""
        return lora.split(self._abstract["params"])[1]

    def plain_shapes(self) -> dict[str, Any]:
        """Shapes of the base's parameters as a checkpoint has them, none in storage, with the names of their axes."""
        return qwen.shapes(self._module)

    @cached_property
    def base_parameters(self) -> int:
        """How many parameters the base stands for."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.plain_shapes()))

    def init_adapter(self, rng: Array) -> dict[str, Any]:
        """Fresh adapters: A as torch draws a linear layer, U(-1/sqrt(inputs), 1/sqrt(inputs)), and B zero.

        Each layer's numbers follow from `rng` and from what published checkpoints call the projection, so they are
        the same for either `loop`, and for any depth.
        """
        drawn = {}
        for path, boxed in flatten_dict(self.abstract_adapter()).items():
            shape = nn.unbox(boxed).shape
            value = self._drawn(rng, path[:-2], shape) if path[-2] == lora.A else jnp.zeros(shape)
            drawn[path] = nn.meta.replace_boxed(boxed, value)
        return unflatten_dict(drawn)

    def _drawn(self, rng: Array, module: tuple[str, ...], shape: tuple[int, ...]) -> Array:
        """A of a projection, or of all its layers."""
        names = module_names(module, self.config)
        each = shape if isinstance(names, str) else shape[1:]
        matrix = (math.prod(each[:-1]), each[-1])

        def one(name: str) -> Array:
            return fan_in_uniform(jax.random.fold_in(rng, zlib.crc32(name.encode())), matrix).reshape(each)

        return one(names) if isinstance(names, str) else jnp.stack([one(name) for name in names])

    @cached_property
    def _abstract(self) -> Variables:
        with self._changed(None):
            return qwen.abstract(self._module)

    @property
    def adapter_names(self) -> Mapping[str, str | tuple[str, ...]]:
        """What published checkpoints call the projections that have adapters, for `peft`."""
        modules = lora.adapted(self.abstract_adapter())
        return {"/".join(module): module_names(module, self.config) for module in modules}

    # ---------------------------------------------------------------------------------- computation

    def losses(
        self, variables: Variables, batch: Mapping[str, Array], keys: Array | None
    ) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
        """Cross-entropy of each row's answer, summed over its tokens in nats, and how many those are.

        Args:
          batch: tokens (B, T), targets (B, T) with -100 where nothing is asked, patches (B, 1, P, values) as bytes or
            as the tower takes them, grids (B, 1, 2).
          keys: of each row, for the adapters' dropout; None in evaluation.
        """
        targets = batch["targets"]
        with self._changed(keys):
            nll: Any = self._module.apply(
                self._whole(variables),
                batch["tokens"],
                targets,
                self._seen(batch["patches"]),
                batch["grids"],
                method="losses",
                rngs={"dropout": jax.random.key(0)},  # the examples' own keys say what is dropped
            )
        return nll.sum(axis=1), (targets >= 0).sum(axis=1)

    def generate(
        self,
        variables: Variables,
        prompts: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        patches: Num[Array, "B 1 P values"],
        grids: Int[Array, "B 1 2"],
        rules: Rules,
    ) -> Continued:
        """The likeliest token after each prompt, and so on: greedily, until one of `rules.ends`.

        Args:
          prompts: padded on the right.
          lengths: tokens of each prompt.
        """
        whole, seen = self._whole(variables), self._seen(patches)
        context = prompts.shape[1] + rules.limit
        reader = self._module.clone(context=context, remat="none")
        # Not every attention kernel takes a single query.
        text = replace(self.config.text, attention_impl="reference")
        writer = reader.clone(config=replace(self.config, text=text))
        with self._changed(None):
            return continue_prompts(
                lambda tokens, last: qwen.fill(reader, whole, tokens, last, seen, grids),
                lambda cache, tokens, at: qwen.extend(writer, whole, cache, tokens, at),
                prompts,
                lengths,
                jax.vmap(jax.random.key)(jnp.zeros_like(lengths)),  # nothing is drawn at temperature 0
                limit=rules.limit,
                context=context,
                size=rules.size,
                ends=rules.ends,
                temperature=0.0,
                top_p=1.0,
            )

    @property
    def _module(self) -> Qwen3Vl:
        return Qwen3Vl(self.config, dtype=self.dtype, remat=self.remat, loop=self.loop)

    def _changed(self, keys: Array | None) -> contextlib.AbstractContextManager[None]:
        stored = None if self.storage == "float" else Quantization(self.storage, STORED)
        return projections(adapters=self.lora, base=stored, keys=keys)

    @staticmethod
    def _whole(variables: Variables) -> Variables:
        """The collections as the modules know them."""
        params = lora.join(variables[BASE], variables["params"])
        return {"params": params, quantized.COLLECTION: variables.get(quantized.COLLECTION, {})}

    def _seen(self, patches: Num[Array, "B 1 P values"]) -> Float[Array, "B 1 P values"]:
        """Patches as the tower takes them, from bytes or already so."""
        return images.normalised(patches) if patches.dtype == jnp.uint8 else patches
