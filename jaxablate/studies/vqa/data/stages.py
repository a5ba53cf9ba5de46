"""Which stage of care a question belongs to, in what order questions lie, and which sequences are for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import numpy as np

StageRule = Literal["category_first", "faithful"]
Split = Literal["train", "validation", "test"]

# Sequences of the challenge that the document's questions are about; there is no sequence 8.
SEQUENCES: Mapping[Split, tuple[int, ...]] = {
    "train": (5, 6, 7, 10, 11, 12, 14, 15, 16),
    "validation": (9, 13),
    "test": (1, 2, 3, 4),
}

_PROCEDURE = "procedure_type"
_CLINICAL = ("diagnosis", "treatment", "recommend", "clinical significance", "what should be done")

T = TypeVar("T")


def stage_of(category: str, question: str, rule: StageRule = "category_first") -> int:
    """1 for a question about the procedure, 3 about what to make of the findings, 2 about the findings.

    `category_first` asks the category, and the question's words only where there is none. `faithful` is the
    document's rule, which also takes every question that says "procedure" or "type of" for one about the procedure,
    such as "What type of polyp is this?".
    """
    category, words = category.lower(), question.lower()
    if rule == "faithful":
        if _PROCEDURE in category or "procedure" in words or "type of" in words:
            return 1
        return 3 if any(term in words for term in _CLINICAL) else 2
    if category.strip():
        asked = category.replace("_", " ")
        first = _PROCEDURE in category
    else:
        asked = words
        first = "procedure" in words
    if first:
        return 1
    return 3 if any(term in asked for term in _CLINICAL) else 2


def arranged(stages: Sequence[int]) -> np.ndarray:
    """The order in which questions of these stages lie, stage by stage, as indices: int64 (questions,)."""
    return np.argsort(np.asarray(stages, np.int64), kind="stable")


def split_of(sequence: int) -> Split:
    """What a sequence is for. Raises ValueError for one that there is not."""
    for split, members in SEQUENCES.items():
        if sequence in members:
            return split
    raise ValueError(f"sequence {sequence}: there are {sorted(sum(SEQUENCES.values(), ()))}")


def first_sequences(count: int) -> dict[Split, tuple[int, ...]]:
    """Some of the sequences of each split, about as many as its share of all; each split has one, from three on.

    Raises ValueError for fewer than three, or more than there are.
    """
    most = sum(len(members) for members in SEQUENCES.values())
    if not 3 <= count <= most:
        raise ValueError(f"{count} sequences: there are from 3 to {most}")
    # In turn to the split that has the smallest part of its own, so that a larger set holds every smaller one.
    chosen = dict.fromkeys(SEQUENCES, 0)
    for _ in range(count):
        split = min(SEQUENCES, key=lambda name: chosen[name] / len(SEQUENCES[name]))
        chosen[split] += 1
    return {split: SEQUENCES[split][:number] for split, number in chosen.items()}
