"""Which tensors of a published checkpoint each parameter is made of.

A published matrix is (outputs, inputs); here it is (inputs, outputs), with the heads apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxablate.studies.vqa.qwen3vl.config import Qwen3VlConfig
from jaxablate.studies.vqa.qwen3vl.layers import cut, layer_at

Key = tuple[str, ...]  # path of a parameter, such as decoder stage_1 layer_0 block attention q kernel

_TEXT, _VISION = "model.language_model", "model.visual"
_TEXT_LAYER = {
    "attention/q": ("self_attn.q_proj",),
    "attention/k": ("self_attn.k_proj",),
    "attention/v": ("self_attn.v_proj",),
    "attention/out": ("self_attn.o_proj",),
    "attention/q_scale": ("self_attn.q_norm",),
    "attention/k_scale": ("self_attn.k_norm",),
    "attention_norm": ("input_layernorm",),
    "ffn_norm": ("post_attention_layernorm",),
    "ffn/wi": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn/wo": ("mlp.down_proj",),
}
_VISION_LAYER = {
    "attention/q": ("attn.qkv",),
    "attention/k": ("attn.qkv",),
    "attention/v": ("attn.qkv",),
    "attention/out": ("attn.proj",),
    "attention_norm": ("norm1",),
    "ffn_norm": ("norm2",),
    "ffn/wi": ("mlp.linear_fc1",),
    "ffn/wo": ("mlp.linear_fc2",),
}
_MERGER = {"norm": "norm", "wi": "linear_fc1", "wo": "linear_fc2"}
_FUSED = {"q": 0, "k": 1, "v": 2}  # thirds of attn.qkv
_OWN_LEAF = ("scale", "kernel", "bias", "embedding")


@dataclass(frozen=True)
class Origin:
    """The tensors that one parameter, or one layer of a stacked one, is made of.

    Attributes:
      names: of the tensors; of two, each is a half of a gated layer.
      third: which third of the first axis; None for all of it.
      shape: of each tensor.
    """

    names: tuple[str, ...]
    third: int | None
    shape: tuple[int, ...]


def origins(key: Key, shape: Sequence[int], config: Qwen3VlConfig) -> tuple[Origin, ...]:
    """Where a parameter of this shape comes from: one origin, or one for each layer that is stacked in it."""
    layers = _layers(key, config)
    if layers is None:
        return (_origin(key, _outside(key), shape, config),)
    each = shape[1:] if key[2] == "layers" else shape
    return tuple(_origin(key, _inside(key, layer), each, config) for layer in layers)


def module_names(path: Key, config: Qwen3VlConfig) -> str | tuple[str, ...]:
    """The published name of a projection of the decoder, as adapters name it; of stacked layers, one for each.

    Args:
      path: of the module, such as decoder stage_1 layer_0 block attention q, or decoder stage_1 layers block ….

    Raises:
      ValueError: the module is no single projection there.
    """
    layers = _layers(path, config)
    found = [_outside(path)] if layers is None else [_inside(path, layer) for layer in layers]
    if any(len(names) != 1 for names in found):
        raise ValueError(f"{'/'.join(path)}: has no name of its own in a published checkpoint")
    names = tuple(name for (name,) in found)
    return names if layers is not None and path[2] == "layers" else names[0]


def _layers(key: Key, config: Qwen3VlConfig) -> Sequence[int] | None:
    """The numbers of the layers that a parameter belongs to; None outside of the stacks."""
    if len(key) < 3 or not key[1].startswith("stage_"):
        return None
    vision, text = config.vision, config.text
    depth, behind = (
        (text.depth, range(len(vision.deep))) if key[0] == "decoder" else (vision.depth, vision.deep)
    )
    stage = int(key[1].removeprefix("stage_"))
    inside = range(cut(depth, behind)[stage]) if key[2] == "layers" else [int(key[2].removeprefix("layer_"))]
    return [layer_at(stage, i, depth, behind) for i in inside]


def _module(key: Key) -> str:
    """The module of a parameter, within its layer."""
    return "/".join(part for part in key[4:] if part not in _OWN_LEAF)


def _inside(key: Key, layer: int) -> tuple[str, ...]:
    table, at = (
        (_TEXT_LAYER, f"{_TEXT}.layers") if key[0] == "decoder" else (_VISION_LAYER, f"{_VISION}.blocks")
    )
    return tuple(f"{at}.{layer}.{name}" for name in table[_module(key)])


def _outside(key: Key) -> tuple[str, ...]:
    match key:
        case ("embedding", *_):
            return (f"{_TEXT}.embed_tokens",)
        case ("head", *_):
            return ("lm_head",)
        case ("decoder", "final_norm", *_):
            return (f"{_TEXT}.norm",)
        case ("tower", "patches", *_):
            return (f"{_VISION}.patch_embed.proj",)
        case ("tower", "positions"):
            return (f"{_VISION}.pos_embed",)
        case ("tower", "merger", part, *_):
            return (f"{_VISION}.merger.{_MERGER[part]}",)
        case ("tower", deep, part, *_) if deep.startswith("deep_merger_"):
            at = f"{_VISION}.deepstack_merger_list.{deep.removeprefix('deep_merger_')}"
            return (f"{at}.{_MERGER[part]}",)
    raise ValueError(f"no parameter of Qwen3-VL: {'/'.join(key)}")


def _origin(key: Key, modules: tuple[str, ...], shape: Sequence[int], config: Qwen3VlConfig) -> Origin:
    leaf = "bias" if key[-1] == "bias" else "weight"
    fused = key[0] == "tower" and key[-2] in _FUSED
    pieces = 3 if fused else 1
    if key[-1] == "kernel":
        inputs = 2 if key[-2] == "out" else 1
        outputs = math.prod(shape[inputs:]) * pieces // len(modules)
        published = (outputs, math.prod(shape[:inputs]))
        if key[:2] == ("tower", "patches"):  # a convolution
            vision = config.vision
            published = (outputs, vision.channels, vision.frames, vision.patch, vision.patch)
    elif leaf == "bias":
        published = (math.prod(shape) * pieces,)
    else:
        published = tuple(shape)
    return Origin(
        tuple(f"{module}.{leaf}" for module in modules), _FUSED[key[-2]] if fused else None, published
    )
