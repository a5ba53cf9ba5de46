"""The LoRA weight-space sections of a run's config. Defaults are the document's, clean definition.

Imports no jax, so that a study can be declared, listed and reported without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Representation = Literal[
    "simple_stats",
    "rank_based",
    "stats",
    "spectral",
    "matrix_norms",
    "distribution",
    "frequency",
    "info_theoretic",
    "ensemble",
    "flat_vec",
    "product",
]
Tensors = Literal["all_layers", "visual_only", "text_only"]

REPRESENTATIONS: tuple[Representation, ...] = get_args(Representation)
TENSORS: tuple[Tensors, ...] = get_args(Tensors)


@dataclass(frozen=True)
class LoraSpaceData:
    """Which adapters, which of their tensors, how they are cut into parts, and what is made of the tensors.

    Attributes:
      source: `synthetic` adapters are generated; a `folder` holds `<category>/<adapter>/*.safetensors`; `columnar`
        is a parquet table with a column per tensor; `preprocessed` is a safetensors file of three parts.
      path: of what is read; empty if it is generated.
      samples: adapters in all, from which the epochs follow; of preprocessed data those of the training part.
      classes: concepts that are generated.
      rank: of generated adapters.
      architecture: tensor names and widths of generated adapters: Stable Diffusion 1.5's U-Net, or four blocks.
      seed: of the generator.
      tensors: `visual_only` are those of self-attention, `text_only` those of cross-attention.
      sample_layers: share of the (block, attention, module) pairs that is used; smaller shares are within larger ones.
      sample_seed: of that choice, the same for all three kinds of tensors.
      split: `unstratified` is the document's; `stratified` cuts each category in the same shares.
      split_seed: another one cuts the same adapters otherwise.
      representation: what an adapter is described by; `product` is features of the update up @ down.
      spectral_variant: the condition number of a vector, S1 / 1e-8 (`original`) or 1 (`optimized`).
      normalise: by the unbiased deviation + 1e-8, or the biased one with 0 taken as 1; of training adapters alone.
    """

    source: Literal["synthetic", "folder", "columnar", "preprocessed"] = "synthetic"
    path: str = ""
    samples: int = 1000
    classes: int = 10
    rank: int = 1
    architecture: Literal["sd15", "tiny"] = "sd15"
    seed: int = 2025
    tensors: Tensors = "all_layers"
    sample_layers: float = 1.0
    sample_seed: int = 42
    split: Literal["unstratified", "stratified"] = "unstratified"
    split_seed: int = 42
    representation: Representation = "simple_stats"
    spectral_variant: Literal["original", "optimized"] = "optimized"
    normalise: Literal["unbiased", "biased"] = "unbiased"


@dataclass(frozen=True)
class LoraSpaceModel:
    """`layers` x [Linear, BatchNorm, ReLU, Dropout], and a Linear layer to the classes.

    Attributes:
      hidden: width of each of the layers.
      dropout: share of hidden values that are dropped.
      norm_momentum: weight of a new batch in the running statistics.
      norm_eps: added to a variance.
    """

    hidden: int = 512
    layers: int = 3
    dropout: float = 0.5
    norm_momentum: float = 0.1
    norm_eps: float = 1e-5


def split_sizes(samples: int) -> tuple[int, int, int]:
    """Adapters for training, validation and test in the document's split: ceil(.3 N) are held out, of which
    ceil(.67 of them) are for the test; up to ten adapters are all three parts.
    """
    if samples <= 10:
        return samples, samples, samples
    held_out = math.ceil(0.3 * samples)
    test = math.ceil(0.67 * held_out)
    return samples - held_out, held_out - test, test


def training_samples(data: LoraSpaceData) -> int:
    """Adapters of the training part if there are `data.samples`, however they are split; what is read may be others."""
    return data.samples if data.source == "preprocessed" else split_sizes(data.samples)[0]


def epoch_steps(training_samples: int, batch_size: int) -> int:
    """Updates that it takes to see every training adapter: the batch that begins the next epoch ends this one."""
    return max(1, math.ceil(training_samples / batch_size))
