"""A Qwen3-VL of a few thousand parameters with all that the published ones have."""

from __future__ import annotations

from jaxablate.studies.vqa.qwen3vl.config import Qwen3VlConfig, TextConfig, VisionConfig

IMAGE = 29  # the token that stands for a part of a picture, and the last of the vocabulary
SMALL = Qwen3VlConfig(
    VisionConfig(
        dim=16, depth=3, heads=2, ffn_dim=24, out_dim=24, deep=(1,), patch=4, positions=25,
        attention_impl="reference",
    ),
    TextConfig(
        dim=24, depth=3, heads=2, kv_heads=1, ffn_dim=32, vocab=30, head_dim=16, rope_sections=(4, 2, 2),
        attention_impl="reference", loss_impl="reference",
    ),
    image_token=IMAGE,
)  # fmt: skip
