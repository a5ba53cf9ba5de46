"""The sizes of Qwen3-VL: the published ones, and those of any checkpoint's config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxablate.disk import read_json
from jaxablate.errors import UserError

Loop = Literal["unrolled", "scan"]


@dataclass(frozen=True)
class VisionConfig:
    """The tower that turns patches into visual tokens.

    Attributes:
      out_dim: width of a visual token, which is the text decoder's.
      patch, frames: a patch is `frames` pictures of patch x patch pixels; of a still image, twice the same.
      merge: merge x merge patches become one visual token.
      positions: entries of the learned table, a square.
      deep: the blocks (from 0) behind which visual tokens are taken for the decoder's first layers as well.
    """

    dim: int
    depth: int
    heads: int
    ffn_dim: int
    out_dim: int
    deep: tuple[int, ...]
    patch: int = 16
    frames: int = 2
    channels: int = 3
    merge: int = 2
    positions: int = 2304
    attention_impl: str = "auto"
    norm_impl: str = "reference"

    @property
    def patch_size(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.frames * self.patch**2

    @property
    def side(self) -> int:
        """Rows, and columns, of the learned table of positions."""
        return math.isqrt(self.positions)


@dataclass(frozen=True)
class TextConfig:
    """The decoder.

    Attributes:
      rope_sections: pairs of features that turn with time, row and column; together half of `head_dim`.
      head: `tied` uses the embedding's table for the logits.
    """

    dim: int
    depth: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocab: int = 151_936
    head_dim: int = 128
    rope_base: float = 5_000_000.0
    rope_sections: tuple[int, int, int] = (24, 20, 20)
    head: Literal["tied", "own"] = "own"
    attention_impl: str = "auto"
    norm_impl: str = "reference"
    ffn_impl: str = "reference"
    loss_impl: str = "auto"


@dataclass(frozen=True)
class Qwen3VlConfig:
    """Both parts, and the token in whose places the visual tokens stand."""

    vision: VisionConfig
    text: TextConfig
    image_token: int = 151_655


# As their config.json say. Trainable numbers: 2,127,532,032 and 8,767,123,696.
QWEN3_VL_2B = Qwen3VlConfig(
    VisionConfig(dim=1024, depth=24, heads=16, ffn_dim=4096, out_dim=2048, deep=(5, 11, 17)),
    TextConfig(dim=2048, depth=28, heads=16, kv_heads=8, ffn_dim=6144, head="tied"),
)
QWEN3_VL_8B = Qwen3VlConfig(
    VisionConfig(dim=1152, depth=27, heads=16, ffn_dim=4304, out_dim=4096, deep=(8, 16, 24)),
    TextConfig(dim=4096, depth=36, heads=32, kv_heads=8, ffn_dim=12_288),
)
PUBLISHED: Mapping[str, Qwen3VlConfig] = {"2b": QWEN3_VL_2B, "8b": QWEN3_VL_8B}

# The same modules for pictures of 48 x 48, which are 36 visual tokens, and for text of single characters.
TINY = Qwen3VlConfig(
    VisionConfig(
        dim=64, depth=2, heads=4, ffn_dim=256, out_dim=64, deep=(), patch=8, frames=1, merge=1, positions=36
    ),
    TextConfig(
        dim=64,
        depth=2,
        heads=4,
        kv_heads=4,
        ffn_dim=192,
        vocab=128,
        head_dim=16,
        rope_base=10_000.0,
        rope_sections=(4, 2, 2),
    ),
    image_token=127,
)
SIZES: Mapping[str, Qwen3VlConfig] = {"tiny": TINY, **PUBLISHED}

# What config.json may say and the modules here take for granted: path -> the only value they can do.
_FIXED: Mapping[str, Any] = {
    "model_type": "qwen3_vl",
    "vision_config.hidden_act": "gelu_pytorch_tanh",
    "text_config.hidden_act": "silu",
    "text_config.attention_bias": False,
    "text_config.rms_norm_eps": 1e-6,
}
_VISION = {
    "dim": "hidden_size",
    "depth": "depth",
    "heads": "num_heads",
    "ffn_dim": "intermediate_size",
    "out_dim": "out_hidden_size",
    "patch": "patch_size",
    "frames": "temporal_patch_size",
    "channels": "in_channels",
    "merge": "spatial_merge_size",
    "positions": "num_position_embeddings",
}
_TEXT = {
    "dim": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn_dim": "intermediate_size",
    "vocab": "vocab_size",
    "head_dim": "head_dim",
}


def read_config(folder: str | Path) -> Qwen3VlConfig:
    """The sizes in a checkpoint's config.json; kernels are the defaults.

    Raises:
      UserError: the file is missing, no Qwen3-VL, incomplete, or asks for what the modules here cannot do.
    """
    path = Path(folder).expanduser() / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give the folder of a Qwen3-VL checkpoint")
    found = read_json(path)

    def value(name: str) -> Any:
        node: Any = found
        for part in name.split("."):
            if not isinstance(node, Mapping) or part not in node:
                raise UserError(f"{path}: lacks {name}; give the folder of a Qwen3-VL checkpoint")
            node = node[part]
        return node

    def number(name: str) -> int:
        said = value(name)
        if type(said) is not int or said < 1:
            raise UserError(f"{path}: {name}={said!r} must be a whole number from 1; use another checkpoint")
        return said

    for name, ours in _FIXED.items():
        if (said := value(name)) != ours:
            raise UserError(
                f"{path}: {name}={said!r}, but only {ours!r} is supported; use another checkpoint"
            )
    vision: dict[str, Any] = {ours: number(f"vision_config.{theirs}") for ours, theirs in _VISION.items()}
    text: dict[str, Any] = {ours: number(f"text_config.{theirs}") for ours, theirs in _TEXT.items()}
    deep = tuple(value("vision_config.deepstack_visual_indexes"))
    decoder = found["text_config"]
    # Since version 5 of the transformers library rope_parameters holds what two fields held before.
    rope = decoder.get("rope_parameters") or {"rope_theta": decoder.get("rope_theta")} | (
        decoder.get("rope_scaling") or {}
    )
    sections = tuple(rope.get("mrope_section") or ())
    if rope.get("rope_type", "default") != "default" or len(sections) != 3 or not rope.get("rope_theta"):
        raise UserError(
            f"{path}: rotary positions {rope!r} are not supported; "
            f"they need a rope_theta, a mrope_section of three numbers and no scaling"
        )
    tied = found.get("tie_word_embeddings", decoder.get("tie_word_embeddings", False))
    config = Qwen3VlConfig(
        VisionConfig(**vision, deep=deep),
        TextConfig(
            **text,
            rope_base=float(rope["rope_theta"]),
            rope_sections=sections,
            head="tied" if tied else "own",
        ),
        image_token=number("image_token_id"),
    )
    _check(path, config)
    return config


def settings(config: Qwen3VlConfig) -> dict[str, Any]:
    """What config.json says of these sizes, for `read_config` and for the transformers library."""
    vision, text = config.vision, config.text
    found: dict[str, Any] = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": config.image_token,
        "tie_word_embeddings": text.head == "tied",
        "vision_config": {theirs: getattr(vision, ours) for ours, theirs in _VISION.items()},
        "text_config": {theirs: getattr(text, ours) for ours, theirs in _TEXT.items()},
    }
    found["vision_config"]["deepstack_visual_indexes"] = list(vision.deep)
    found["text_config"]["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": text.rope_base,
        "mrope_section": list(text.rope_sections),
        "mrope_interleaved": True,
    }
    for name, value in _FIXED.items():
        section, _, leaf = name.rpartition(".")
        (found[section] if section else found)[leaf] = value
    return found


def _check(path: Path, config: Qwen3VlConfig) -> None:
    """What must hold between the sizes."""
    vision, text = config.vision, config.text
    rules = {
        f"vision_config.out_hidden_size={vision.out_dim} must be text_config.hidden_size={text.dim}": (
            vision.out_dim == text.dim
        ),
        f"vision_config.num_position_embeddings={vision.positions} must be a square": (
            vision.side**2 == vision.positions
        ),
        f"vision_config.num_heads={vision.heads} must divide hidden_size={vision.dim} into multiples of 4": (
            vision.dim % (4 * vision.heads) == 0
        ),
        f"vision_config.deepstack_visual_indexes={list(vision.deep)} must rise below depth={vision.depth}, "
        f"and be no more than the {text.depth} text layers": (
            list(vision.deep) == sorted(set(vision.deep) & set(range(vision.depth)))
            and len(vision.deep) <= text.depth
        ),
        f"mrope_section={list(text.rope_sections)} must sum to half of head_dim={text.head_dim}": (
            2 * sum(text.rope_sections) == text.head_dim
        ),
        f"num_attention_heads={text.heads} must be a multiple of num_key_value_heads={text.kv_heads}": (
            text.heads % text.kv_heads == 0
        ),
    }
    for rule, holds in rules.items():
        if not holds:
            raise UserError(f"{path}: {rule}; use another checkpoint")
