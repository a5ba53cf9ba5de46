"""Which tensors of an adapter are looked at: their names, how they pair up, and those of a U-Net's adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from jaxablate.errors import UserError
from jaxablate.studies.lora_space.config import LoraSpaceData, Tensors

Shape = tuple[int, ...]
Direction = Literal["down", "up"]

# `to_q.lora.down.weight` and `to_q_lora.up.weight` of diffusers, `to_q.lora_A.weight` of peft, which may also
# write the adapter's own name into it: `to_q.lora_A.default.weight`.
_FACTOR = re.compile(r"[._]?lora(?:\.(down|up)|_([AB])(?:\.\w+)?)\.weight")
_SPELLED: Mapping[str, Direction] = {"down": "down", "up": "up", "A": "down", "B": "up"}


def direction(name: str) -> Direction | None:
    """Which factor of an update a tensor is; None if it is none."""
    found = _FACTOR.search(name)
    return _SPELLED[found[1] or found[2]] if found else None


def pair(name: str) -> str:
    """What both factors of one update have in common: block, attention and module."""
    return _FACTOR.sub("", name, count=1)


def kind(name: str) -> Literal["visual", "text", "other"]:
    """Self-attention sees the image alone, cross-attention the text; an adapter may have other layers besides."""
    if ".attn1." in name:
        return "visual"
    return "text" if ".attn2." in name else "other"


def pairs(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{pair: (name of down, name of up)}, sorted.

    Raises:
      UserError: a factor stands alone.
    """
    factors: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        factors.setdefault(pair(name), {})[direction(name) or ""] = name
    for one in factors.values():
        if set(one) != {"down", "up"}:
            alone = next(iter(one.values()))
            raise UserError(
                f"data.representation=product: '{alone}' has no other factor to be multiplied with; use another "
                f"representation or mend the adapters"
            )
    return {common: (one["down"], one["up"]) for common, one in sorted(factors.items())}


def of_adapter(shapes: Mapping[str, Shape], where: str) -> dict[str, Shape]:
    """The factors among an adapter's tensors, sorted by name.

    Raises:
      UserError: there are none, or one has too few values for a standard deviation.
    """
    found = {name: shapes[name] for name in sorted(shapes) if direction(name)}
    if not found:
        raise UserError(
            f"{where}: has no tensor whose name contains lora.down.weight, lora.up.weight, lora_A.weight or "
            f"lora_B.weight; give LoRA adapters"
        )
    if small := [name for name, shape in found.items() if math.prod(shape) < 2]:
        raise UserError(
            f"{where}: tensor '{small[0]}' has the shape {found[small[0]]}, of fewer than two values; leave it out"
        )
    return found


def selected(shapes: Mapping[str, Shape], data: LoraSpaceData, where: str) -> dict[str, Shape]:
    """Of all factors those that `data.tensors` and `data.sample_layers` ask for, sorted by name.

    Of each kind of pair a share is drawn, the same whether the other kinds are looked at or not, so that what
    `visual_only` sees is within what `all_layers` sees; and a smaller share is within a larger one.

    Raises:
      UserError: none are left.
    """
    wanted: Mapping[Tensors, tuple[str, ...]] = {
        "all_layers": ("visual", "text", "other"),
        "visual_only": ("visual",),
        "text_only": ("text",),
    }
    kept: set[str] = set()
    for one in wanted[data.tensors]:
        there = sorted({pair(name) for name in shapes if kind(name) == one})
        order = np.random.Generator(np.random.Philox(key=[data.sample_seed, 0])).permutation(len(there))
        kept |= {there[i] for i in order[: math.ceil(data.sample_layers * len(there))]}
    found = {name: shapes[name] for name in sorted(shapes) if pair(name) in kept}
    if not found:
        sign = {"visual_only": ".attn1.", "text_only": ".attn2."}[data.tensors]
        raise UserError(
            f"data.tensors={data.tensors}: {where} has no tensor with '{sign}' in its name; use all_layers"
        )
    return found


# -------------------------------------------------------------------------------- adapters of a U-Net

_SD15 = {
    **{f"down_blocks.{i}.attentions.{j}": (320, 640, 1280)[i] for i in range(3) for j in range(2)},
    "mid_block.attentions.0": 1280,
    **{f"up_blocks.{i}.attentions.{j}": (0, 1280, 640, 320)[i] for i in (1, 2, 3) for j in range(3)},
}
_TINY = {
    "down_blocks.0.attentions.0": 32,
    "down_blocks.1.attentions.0": 48,
    "mid_block.attentions.0": 48,
    "up_blocks.1.attentions.0": 32,
}


def unet_shapes(architecture: Literal["sd15", "tiny"], rank: int) -> dict[str, Shape]:
    """Names and shapes of the factors on `to_q` and `to_v` of all attentions, sorted.

    `sd15` is Stable Diffusion 1.5: 16 blocks, 128 tensors, 99,648 values at rank 1. `tiny` has four blocks.
    """
    widths, text = (_SD15, 768) if architecture == "sd15" else (_TINY, 24)
    shapes: dict[str, Shape] = {}
    for block, width in widths.items():
        for attention in ("attn1", "attn2"):
            for module in ("to_q", "to_v"):
                stem = f"unet.{block}.transformer_blocks.0.{attention}.{module}.lora"
                inputs = text if (attention, module) == ("attn2", "to_v") else width
                shapes[f"{stem}.down.weight"] = (rank, inputs)
                shapes[f"{stem}.up.weight"] = (width, rank)
    return dict(sorted(shapes.items()))
