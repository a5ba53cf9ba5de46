"""The TinyStories sections of a run's config. Defaults are the document's full size, clean definition.

Imports no jax, so that a study can be declared, listed and reported without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LmModel:
    """A decoder-only language model. `*_impl` choose kernels: every name computes the same function.

    Attributes:
      placement: where a block normalises, see `nn.block`.
      final_norm: `off` leaves out the norm before the head; with post-norm blocks `on` normalises twice there.
      position: `rope` turns queries and keys; `learned` and `sinusoidal` are added to the embedded tokens.
        `faithful_none` is what upstream's "no position" really built: rotary positions, by default.
      qk_norm: RMSNorm of queries and keys with a learned scale per feature, before the positions.
      ffn_width: hidden width; 0 for `feed_forward_width`.
    """

    dim: int = 512
    layers: int = 4
    heads: int = 16
    attention_impl: str = "reference"
    qk_norm: Literal["none", "rms"] = "none"
    norm: Literal["rmsnorm", "layernorm", "none"] = "rmsnorm"
    norm_impl: str = "reference"
    placement: Literal["pre", "post"] = "pre"
    final_norm: Literal["on", "off"] = "on"
    position: Literal["rope", "none", "learned", "sinusoidal", "faithful_none"] = "rope"
    ffn: Literal["swiglu", "geglu", "silu", "gelu"] = "swiglu"
    ffn_width: int = 0
    ffn_impl: str = "reference"
    loss_impl: str = "reference"


@dataclass(frozen=True)
class LmData:
    """Where the tokens come from and how they are cut.

    Attributes:
      source: `stories` are generated, `text` is read and tokenised, `tokens` are memory-mapped.
      train: of `text` a UTF-8 file, of `tokens` an .npy or a raw uint16 file.
      val: the same for validation; of `text` it may be empty: the last 5 % of `train` are held out.
      level: what a token of generated stories or text is.
      tokenizer: a tokenizer's JSON file; empty: it is trained on the training text.
      vocab_size: of the model; no id may be beyond it.
      context: tokens that the model sees at a time.
      tokens: to train on, from which the steps follow; 0: training.steps counts.
      eval_batches: how many fixed batches of validation windows an evaluation takes.
      stories_characters: how much is generated.
      stories_seed: of the generator.
    """

    source: Literal["stories", "text", "tokens"] = "stories"
    train: str = ""
    val: str = ""
    level: Literal["bpe", "char"] = "bpe"
    tokenizer: str = ""
    vocab_size: int = 10_000
    context: int = 256
    tokens: int = 327_680_000
    eval_batches: int = 20
    stories_characters: int = 3_000_000
    stories_seed: int = 2025


def feed_forward_width(dim: int, multiplier: float) -> int:
    """`multiplier * dim` to the nearest multiple of 64, ties down: floor((int(m d) + 31) / 64) * 64.

    Raises:
      ValueError: the width would be 0.
    """
    width = (int(multiplier * dim) + 31) // 64 * 64
    if not width:
        raise ValueError(f"a feed-forward layer of {multiplier:.3g} x {dim} rounds to no width at all")
    return width


def training_steps(tokens: int, batch_size: int, context: int) -> int:
    """Updates that a budget of tokens allows, one at least."""
    return max(1, tokens // (batch_size * context))
