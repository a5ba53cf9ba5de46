"""Floating-point operations of one training example: products of matrices alone, two for each weight and token.

Of the frozen parts no gradient of a weight is computed: forward and backward of the decoder are twice its forward
pass, and of the vision tower, to which no gradient goes back, there is the forward pass alone.
"""

from __future__ import annotations

from jaxablate.studies.vqa.qwen3vl.config import Qwen3VlConfig, TextConfig, VisionConfig


def training_example(config: Qwen3VlConfig, *, tokens: int, patches: int, adapter: int) -> float:
    """Forward and backward, as of a picture and a text of these lengths.

    Attention counts all pairs of tokens, also in the causal decoder (Chowdhery et al. 2022, appendix B).

    Args:
      tokens: of the row, the picture's among them.
      patches: of the picture.
      adapter: trained parameters.
    """
    text = config.text
    frozen = 2.0 * tokens * (_decoder_weights(text) + text.dim * text.vocab)
    attention = 4.0 * text.depth * tokens**2 * text.heads * text.head_dim
    trained = 2.0 * tokens * adapter
    return _tower(config.vision, patches) + 2 * frozen + 3 * attention + 3 * trained


def _decoder_weights(text: TextConfig) -> int:
    attention = text.dim * text.head_dim * 2 * (text.heads + text.kv_heads)
    return text.depth * (attention + 3 * text.dim * text.ffn_dim)


def _tower(vision: VisionConfig, patches: int) -> float:
    layer = 4 * vision.dim**2 + 2 * vision.dim * vision.ffn_dim
    weights = vision.depth * layer + vision.patch_size * vision.dim
    attention = 4.0 * vision.depth * patches**2 * vision.dim
    wide = vision.dim * vision.merge**2
    mergers = (1 + len(vision.deep)) * (wide**2 + wide * vision.out_dim)
    return 2.0 * patches * weights + attention + 2.0 * patches / vision.merge**2 * mergers
