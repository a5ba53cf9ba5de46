"""The CT-CLIP sections of a run's config. Defaults are the document's full size, clean definition.

Imports no jax, so that a study can be declared, listed and reported without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class AttentionConfig:
    """Attention of the image encoder.

    `impl` is an implementation factor: every name computes the same function. `variant` changes the
    function: `faithful_flash` is what upstream's flash switch really did (no QK-norm, no learned
    scales, logits over sqrt(head_dim), LayerNorm with bias, half precision, no position bias).
    """

    impl: str = "reference"
    variant: Literal["qk_norm", "faithful_flash"] = "qk_norm"
    heads: int = 8
    head_dim: int = 32


@dataclass(frozen=True)
class ImageConfig:
    """CTViT: patches, a spatial and then a temporal stack, a codebook.

    `norm_impl` and `ffn_impl` choose kernels, as `attention.impl` does: every name computes the same function.
    """

    patch: tuple[int, int, int] = (10, 20, 20)
    dim: int = 512
    spatial_depth: int = 4
    temporal_depth: int = 4
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    norm: Literal["layernorm", "rmsnorm", "none"] = "layernorm"
    norm_scope: Literal["all", "faithful"] = "all"
    norm_impl: str = "reference"
    ffn: Literal["geglu", "swiglu", "gelu", "silu"] = "geglu"
    ffn_mult: float = 4.0
    ffn_impl: str = "reference"
    position_bias: Literal["on", "off"] = "on"
    peg: Literal["peg", "faithful", "none"] = "peg"
    codebook: Literal["cosine", "none"] = "cosine"
    codebook_size: int = 8192
    codebook_decay: float = 0.8


@dataclass(frozen=True)
class TextConfig:
    """A BERT-shaped encoder whose token 0 is the report's embedding; `*_impl` choose kernels."""

    dim: int = 768
    depth: int = 12
    heads: int = 12
    ffn_dim: int = 3072
    attention_impl: str = "reference"
    norm_impl: str = "reference"
    weights: str = ""  # a BERT checkpoint in safetensors; empty: trained from scratch


@dataclass(frozen=True)
class ClipModel:
    """Both encoders, the size of the space they share, and the contrastive loss."""

    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    latent: int = 512
    loss: Literal["softmax", "siglip"] = "softmax"


@dataclass(frozen=True)
class ClipData:
    """Where volumes, reports and labels come from, and what they are brought to.

    `volume` is (T, H, W) in voxels and `spacing` (z, x, y) in mm, both after preprocessing.
    """

    source: Literal["phantoms", "nifti", "shards"] = "phantoms"
    train: str = ""  # nifti, shards: the folder of the training split
    val: str = ""  # nifti, shards: the folder of the validation split
    volume: tuple[int, int, int] = (240, 480, 480)
    spacing: tuple[float, float, float] = (1.5, 0.75, 0.75)
    clip: Literal["before_resampling", "faithful"] = "before_resampling"
    tokenizer: Literal["words", "wordpiece"] = "wordpiece"
    vocab_file: str = ""  # wordpiece: BERT's vocab.txt
    vocab_size: int = 30522
    text_length: int = 512
    prompts: Literal["there_is", "original"] = "there_is"
    phantoms_train: int = 512
    phantoms_val: int = 128
    phantoms_seed: int = 2025
