"""Small adapters in each layout that the study reads, as other programs write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

Weights = dict[str, np.ndarray]


def peft_shapes(rank: int = 4, width: int = 8) -> dict[str, tuple[int, ...]]:
    """Names as peft writes them for a U-Net: to_q, to_k and to_v of both attentions, no `unet.` before them."""
    shapes = {}
    for attention in ("attn1", "attn2"):
        for module in ("to_q", "to_k", "to_v"):
            inputs = 6 if attention == "attn2" and module != "to_q" else width
            stem = f"base_model.model.mid_block.attentions.0.transformer_blocks.0.{attention}.{module}"
            shapes[f"{stem}.lora_A.weight"] = (rank, inputs)
            shapes[f"{stem}.lora_B.weight"] = (width, rank)
    return dict(sorted(shapes.items()))


def diffusers_shapes(rank: int = 1, width: int = 8) -> dict[str, tuple[int, ...]]:
    """Names as diffusers' DreamBooth script wrote them."""
    shapes = {}
    for attention in ("attn1", "attn2"):
        stem = f"unet.mid_block.attentions.0.transformer_blocks.0.{attention}.to_q.lora"
        shapes |= {f"{stem}.down.weight": (rank, width), f"{stem}.up.weight": (width, rank)}
    return dict(sorted(shapes.items()))


def drawn(shapes: Mapping[str, tuple[int, ...]], number: int) -> Weights:
    """The weights of an adapter."""
    rng = np.random.default_rng(number)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_tree(
    root: Path, adapters: Mapping[str, Sequence[Weights]], file="pytorch_lora_weights.safetensors"
) -> Path:
    """`<category>/folder_<i>/` with weights and a metadata.json."""
    for category, several in adapters.items():
        for i, weights in enumerate(several):
            place = root / category / f"folder_{i}"
            place.mkdir(parents=True)
            save_file(dict(weights), place / file)
            (place / "metadata.json").write_text(json.dumps({"category": category, "rank": 4}))
    return root


def tree(
    root: Path, shapes: Mapping[str, tuple[int, ...]], each: int = 6, categories=("cat", "bird")
) -> Path:
    """A tree of random adapters."""
    made = {c: [drawn(shapes, 100 * n + i) for i in range(each)] for n, c in enumerate(categories)}
    return write_tree(root, made)
