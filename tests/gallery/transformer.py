"""A language model of one block, built of the library's parts: four switches, and how each can fail to switch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxablate.config import new_config, parse_arg
from jaxablate.data import ArraySource, Batch
from jaxablate.nn.attention import Attention
from jaxablate.nn.block import Block
from jaxablate.nn.ffn import Ffn, gated_width, matching_width
from jaxablate.nn.linear import linear
from jaxablate.nn.norm import Norm
from jaxablate.study import Arm, Response, Study, factorial, switch
from jaxablate.task import Task, Variables
from jaxablate_kernels import dispatch
from tests.gallery.small import Exhibit, NoData, cross_entropy, short

WORDS, LENGTH, DIM = 7, 8, 24
EXHIBITS = {
    "flash_drops_qk_norm": Exhibit("flash", "function", ("'flash' (model.impl=flash) removes 2 parameter arrays",)),
    "flash_has_another_scale": Exhibit("flash", "function", ("'flash'", "changes the function", "outputs differ")),
    "flash_drops_the_bias": Exhibit("flash_offsets", "function", ("'flash'", "changes the function", "outputs differ")),
    "flash_is_the_reference": Exhibit("flash", "kernel", ("declares 'flash'", "runs attention_reference")),
    "flash_is_not_read": Exhibit("flash", "function", ("is not used", "to the letter")),
    "flash_everywhere": Exhibit("baseline", "kernel", ("runs attention_blockwise", "no slot", "declares")),
    "nope_still_rotates": Exhibit("nope", "function", ("model factor 'nope'", "changes nothing")),
    "norm_is_not_read": Exhibit("rms", "function", ("model factor 'rms'", "changes nothing")),
    "flash_ignores_the_norm": Exhibit("flash_rms", "function", ("model factor 'rms'", "changes nothing", "'flash'")),
    "swiglu_is_wider": Exhibit("swiglu", "size", ("+1.97% parameters", "same_parameters=0")),
    "nope_sees_less": Exhibit("nope", "schedule", ("tokens an example is 4", "in the baseline it is 8"), "note"),
    "does_not_build": Exhibit("rms", "build", ("does not build", "ValueError", "rmsnorm")),
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    impl: str = "reference"
    position: Literal["rope", "none"] = "rope"
    norm: Literal["layernorm_nobias", "rmsnorm"] = "layernorm_nobias"
    ffn: Literal["gelu", "swiglu"] = "gelu"
    bias: Literal["none", "offsets"] = "none"  # of the logits, learned for each distance of two words
    defect: str = "none"


class _Net(nn.Module):
    config: Model
    impl: str

    @nn.compact
    def __call__(self, words: jax.Array) -> jax.Array:
        config, defect = self.config, self.config.defect
        flash = config.impl == "flash"
        x = nn.Embed(WORDS, DIM, name="words")(words)
        norm, rotates = config.norm, config.position == "rope" or defect == "nope_still_rotates"
        if defect == "norm_is_not_read" or (defect == "flash_ignores_the_norm" and flash):
            norm = "layernorm_nobias"
        if defect == "does_not_build" and norm == "rmsnorm":
            norm = "rmsnorm2"
        other_scale = flash and defect == "flash_has_another_scale"
        attention = functools.partial(
            Attention,
            heads=2,
            head_dim=12,
            impl=self.impl,
            causal="causal",
            qk_norm="none" if flash and defect == "flash_drops_qk_norm" else "l2",
            scale=0.0 if other_scale else 8.0,
            position="rope" if rotates else "none",
        )
        x = Block(
            attention=attention,
            ffn=functools.partial(Ffn, kind=config.ffn, width=_width(config)),
            norm=functools.partial(Norm, kind=norm),
            name="block",
        )(x, logit_bias=self._bias())
        return linear(WORDS, ("embed", "vocab"), name="out", dtype=jnp.float32)(x)

    def _bias(self) -> jax.Array | None:
        if self.config.bias == "none":
            return None
        table = self.param("offsets", nn.initializers.normal(1.0), (2, 2 * LENGTH - 1))
        if self.config.impl == "flash" and self.config.defect == "flash_drops_the_bias":
            return None
        place = jnp.arange(LENGTH)
        return table[:, place[:, None] - place[None, :] + LENGTH - 1][None]


def _width(config: Model) -> int:
    if config.ffn == "gelu":
        return 4 * DIM
    if config.defect == "swiglu_is_wider":  # the 2/3 rule, "rounded up to a nice number"
        return gated_width(DIM, 4.0) + 2
    return matching_width("swiglu", "gelu", 4 * DIM, DIM, "params")


class TransformerTask(Task[Model, NoData]):
    Model, Data = Model, NoData
    response = "val/accuracy"
    directions = {"train/loss": "min", "val/accuracy": "max"}

    def __init__(self, config: Any, platform: str):
        super().__init__(config, platform)
        model = config.model
        asked = "flash" if model.defect == "flash_everywhere" else model.impl
        runs_reference = model.defect in ("flash_is_the_reference", "flash_is_not_read")
        self.kernel = dispatch.resolve("attention", model.impl, platform)
        self.net = _Net(
            model, "reference" if runs_reference else dispatch.resolve("attention", asked, platform).name
        )

    @property
    def kernels(self) -> Mapping[str, dispatch.Resolved]:
        if self.config.model.defect == "flash_is_not_read":
            return {}
        return {"attention": self.kernel}

    @property
    def tokens_per_example(self) -> int:
        short = self.config.model.defect == "nope_sees_less" and self.config.model.position == "none"
        return LENGTH // 2 if short else LENGTH

    @property
    def flops_per_example(self) -> float:
        model = self.config.model
        gates = 2 if model.ffn == "swiglu" else 1
        weights = 4 * DIM * 24 + (gates + 1) * DIM * _width(model) + DIM * WORDS
        return 3.0 * LENGTH * (2 * weights + 4 * LENGTH * 24)

    def example(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {"words": jax.ShapeDtypeStruct((LENGTH + 1,), jnp.int32)}

    def open(self, cache: Path) -> ArraySource:
        # Every third word repeats the one two before: to be predicted, positions have to be told apart.
        rng = np.random.default_rng(0)
        words = rng.integers(0, WORDS, (60, LENGTH + 1)).astype(np.int32)
        words[:, 2::3] = words[:, ::3]
        held_out = words[40:]

        def score(outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
            return {"accuracy": float(np.mean(outputs["logits"].argmax(-1) == held_out[:, 1:]))}

        constant = np.zeros((20, LENGTH, WORDS), np.float32)
        return ArraySource(
            {"words": words[:40]}, {"words": held_out}, 20, score, {"always 0": {"logits": constant}}
        )

    def init(self, rng: jax.Array) -> Variables:
        return self.net.init(rng, jnp.zeros((1, LENGTH), jnp.int32))

    def encode(self, variables: Variables, batch: Batch, rngs: jax.Array) -> tuple[Any, Any]:
        return {
            "logits": self.net.apply(variables, batch["words"][:, :-1]),
            "next": batch["words"][:, 1:],
        }, {}

    def loss(self, variables: Variables, features: Any) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        return cross_entropy(features["logits"], features["next"]), {}

    def predict(self, variables: Variables, batch: Batch) -> Any:
        return {"logits": self.net.apply(variables, batch["words"][:, :-1])}


def get_study(arg: str = "") -> Study:
    defect = parse_arg(arg, defect=("none", *EXHIBITS))["defect"]
    config = new_config(
        study="transformer",
        task="tests.gallery.transformer:TransformerTask",
        model=Model(defect=defect),
        data=NoData(),
    )
    short(config)
    factors = (
        switch("flash", "implementation", {"model.impl": "flash"}),
        switch("rms", "model", {"model.norm": "rmsnorm"}),
        switch("nope", "model", {"model.position": "none"}),
        switch("swiglu", "model", {"model.ffn": "swiglu"}, same_parameters=0.0),
        switch("offsets", "model", {"model.bias": "offsets"}),
    )
    offsets = {"offsets": "on"}
    return Study(
        name="transformer",
        base=config,
        factors=factors,
        arms=(
            *factorial(factors[:4]),
            Arm("offsets", offsets),
            Arm("flash_offsets", {"flash": "on", **offsets}),
        ),
        seeds=(0, 1, 2),
        responses=(Response("val/accuracy", "max", chance=0.2),),
    )
