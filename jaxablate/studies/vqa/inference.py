"""Answers in three passes: each prompt is the question's with the answers before it, put together on the device.

Axes: B rows, T tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Num

from jaxablate.decoding import Continued
from jaxablate.studies.vqa.data.language import Language
from jaxablate.studies.vqa.data.prompts import SLOTS, Passes
from jaxablate.studies.vqa.model import Rules, Vlm
from jaxablate.studies.vqa.qwen3vl.model import Variables
from jaxablate.text.tokenizer import Vocabulary

Piece = str | tuple[int, ...]  # a slot, or the tokens of a text


@dataclass(frozen=True)
class TokenPasses:
    """`Passes` in the ids of a language.

    Attributes:
      tail: how many tokens end every prompt behind its instruction; they stand behind what a pass adds.
    """

    second: tuple[Piece, ...]
    third: tuple[Piece, ...]
    tail: int

    @classmethod
    def of(cls, passes: Passes, language: Language) -> TokenPasses:
        """Each text is encoded by itself."""

        def encoded(pieces: Sequence[str]) -> tuple[Piece, ...]:
            return tuple(piece if piece in SLOTS else tuple(language.text(piece)) for piece in pieces)

        return cls(encoded(passes.second), encoded(passes.third), language.tail)


def rules_of(language: Language, limit: int) -> Rules:
    """Answers of at most `limit` tokens, of which the first line is kept: they end where a line does."""
    vocabulary = language.vocabulary
    broken = (i for i in range(vocabulary.size) if "\n" in vocabulary.decode([i]))
    return Rules(limit, tuple(sorted({language.end, *broken})), vocabulary.size)


def answered(
    vlm: Vlm,
    variables: Variables,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    patches: Num[Array, "B 1 P values"],
    grids: Int[Array, "B 1 2"],
    rules: Rules,
    passes: TokenPasses | None,
) -> dict[str, Continued]:
    """The answers to prompts that are padded on the right, by pass; the last one is the answer.

    Without `passes` that is {"p1"}, with them {"p1", "p2", "p3"}; see `data.prompts` for their prompts.
    """
    answers = {"p1": vlm.generate(variables, prompts, lengths, patches, grids, rules)}
    if passes is None:
        return answers
    instruction = Ragged(prompts, lengths - passes.tail)
    tail = Ragged(_last(prompts, lengths, passes.tail), jnp.full_like(lengths, passes.tail))

    def answer(pieces: Sequence[Piece]) -> Continued:
        rows = len(lengths)
        parts = [
            Ragged(answers[piece].tokens, answers[piece].lengths)
            if isinstance(piece, str)
            else Ragged.same(piece, rows)
            for piece in pieces
        ]
        prompt = joined([instruction, *parts, tail])
        return vlm.generate(variables, prompt.tokens, prompt.lengths, patches, grids, rules)

    answers["p2"] = answer(passes.second)
    answers["p3"] = answer(passes.third)
    return answers


class Ragged(NamedTuple):
    """Rows of tokens of different lengths, padded on the right."""

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]

    @classmethod
    def same(cls, ids: Sequence[int], rows: int) -> Ragged:
        """The same tokens in every row."""
        tokens = jnp.broadcast_to(jnp.asarray(np.array(ids, np.int32)), (rows, len(ids)))
        return cls(tokens, jnp.full((rows,), len(ids), jnp.int32))


def joined(parts: Sequence[Ragged]) -> Ragged:
    """The parts of each row one after another, with nothing between them; behind them stand zeros."""
    rows, width = len(parts[0].lengths), sum(part.tokens.shape[1] for part in parts)
    whole, at = jnp.zeros((rows, width), jnp.int32), jnp.zeros((rows,), jnp.int32)
    for tokens, lengths in parts:
        inside = jnp.arange(tokens.shape[1])[None]
        # What lies behind a part's own length goes out of bounds, where it is dropped.
        places = jnp.where(inside < lengths[:, None], at[:, None] + inside, width)
        whole = whole.at[jnp.arange(rows)[:, None], places].set(tokens, mode="drop")
        at = at + lengths
    return Ragged(whole, at)


def _last(tokens: Int[Array, "B T"], lengths: Int[Array, " B"], count: int) -> Int[Array, "B count"]:
    """The last `count` tokens of each row."""
    return jnp.take_along_axis(tokens, lengths[:, None] - count + jnp.arange(count)[None], axis=1)


def texts(answers: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, list[str]]:
    """What was answered in each pass, a text for each row; of `Continued` on the host."""
    return {
        name: [
            vocabulary.decode(row[:length]) for row, length in zip(found.tokens, found.lengths, strict=True)
        ]
        for name, found in answers.items()
    }
