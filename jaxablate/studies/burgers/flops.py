"""Floating-point operations of the surrogate's parts, for one example, forward: 2 for each product that is added up.

Matrix products and convolutions alone, as everywhere; of the encoder's kernel the row that acts on a grid of one row.
"""

from __future__ import annotations

from jaxablate.studies.burgers.config import BurgersModel, CoreConfig, DecoderConfig, EncoderConfig
from jaxablate.studies.burgers.model import COORDINATE_FREQUENCIES, FFN_RATIO

KERNEL = 3  # cells that a kernel of the encoder's stem covers along the grid


def encoder(config: EncoderConfig, cells: int) -> int:
    """Of a field."""
    stem = cells * config.stem * (KERNEL + 1)
    coordinates = 4 * len(COORDINATE_FREQUENCIES)
    if config.cells == "pooled":
        return 2 * (stem + cells * (1 + coordinates) * config.dim)
    return 2 * (stem + (cells + config.tokens * coordinates) * config.dim)


def decoder(config: DecoderConfig, cells: int, tokens: int, dim: int) -> int:
    """Of a field. What the cells ask is the same for all examples, and computed once."""
    hidden = config.hidden
    around = cells * dim * (hidden + 1)
    asked = 2 * cells * hidden**2 + 2 * tokens * dim * hidden + 2 * cells * tokens * hidden
    layer = asked + 2 * cells * hidden * config.ffn
    return 2 * (around + config.layers * layer + cells * hidden)


def core(config: CoreConfig, tokens: int, dim: int) -> int:
    """Of a step's transformer."""
    hidden = config.hidden
    width = config.group if config.attention == "channel_separated" else hidden

    def layers(count: int, length: int) -> int:
        weights = 4 * width * hidden + 2 * FFN_RATIO[config.kind] * hidden**2
        return count * (length * weights + 2 * length**2 * hidden)

    around = 0 if dim == hidden else 2 * tokens * dim * hidden
    if config.kind == "pdet_stack":
        return 2 * (around + layers(config.depth, tokens))
    *levels, bottom = config.depths
    total, length = 0, tokens
    for depth in levels:
        total += layers(2 * depth, length) + length * hidden**2  # down and up again, and along the skip
        length = -(-length // 2)
        total += length * hidden**2
    return 2 * (around + total + layers(bottom, length))


def operator(config: BurgersModel) -> int:
    """Of a step in time."""
    dim, told = config.encoder.dim, 1 if config.conditioned_on == "dt" else 2
    return 2 * (told * dim + 2 * dim**2) + core(config.core, config.encoder.tokens, dim)


def corrector(config: BurgersModel) -> int:
    """Of one look at one tau."""
    dim, hidden = config.encoder.dim, config.core.hidden
    return 2 * config.encoder.tokens * hidden * (dim + 1 + hidden + dim)


def of_stage(config: BurgersModel, cells: int, stage: str, distilled_at: int) -> int:
    """Of an update of a stage: forward, and twice that backward for what it trains.

    Frozen parts that the gradient goes through cost as much backward as forward, the others nothing.
    """
    encode = encoder(config.encoder, cells)
    decode = decoder(config.decoder, cells, config.encoder.tokens, config.encoder.dim)
    step, correct = operator(config), corrector(config)
    match stage:
        case "autoencoder":
            return 3 * (encode + decode)
        case "operator":
            ahead = config.loss.rollout_steps if config.loss.rollout else 1
            frames = 3 if ahead > 1 else 2  # where it starts, one step on, and the last one
            return frames * encode + 3 * ahead * step + (2 * decode if config.loss.inverse else 0)
        case "corrector":
            return 2 * encode + step + 3 * correct
        case "distill":
            return encode + step + 3 * distilled_at * correct
        case _:
            raise ValueError(f"burgers has no stage '{stage}'")
