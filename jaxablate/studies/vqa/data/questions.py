"""A question about a picture, and what can be said of many of them without looking at a picture."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

SEPARATOR = ";"  # between the labels of an answer


@dataclass(frozen=True)
class Question:
    """One line of a file of questions; the names are the file's keys.

    Attributes:
      image_filename: below the folder of the pictures.
      answer: of several labels, joined by "; ".
      instruction: all that the model is told, the question included.
      question_type: such as `instrument_detection`; what results are grouped by.
      is_multi_label: whether several candidates may apply.
      stage: 1 initial assessment, 2 findings, 3 clinical context.
      sequence, frame: of a video, the picture's place; empty elsewhere.
      candidates: the possible labels; empty where the file does not list them.
      system_instruction, category_instruction: of files that have the instruction in parts; else empty.
    """

    image_id: str
    image_filename: str
    question: str
    answer: str
    instruction: str
    question_type: str
    category: str
    is_multi_label: bool
    stage: int
    sequence: str = ""
    frame: str = ""
    dataset: str = ""
    candidates: tuple[str, ...] = ()
    system_instruction: str = ""
    category_instruction: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """The answer's labels."""
        return labels(self.answer) if self.is_multi_label else (self.answer.strip(),)


def labels(answer: str) -> tuple[str, ...]:
    """The labels of an answer to a question of several."""
    return tuple(label for part in answer.split(SEPARATOR) if (label := part.strip()))


def joined(names: Sequence[str]) -> str:
    """Labels as one answer; "none" for no label."""
    return f"{SEPARATOR} ".join(names) or "none"


@dataclass(frozen=True)
class Answers:
    """The answers of one question type.

    Attributes:
      count: questions.
      constant: the most frequent answer, of equally frequent ones the first in the alphabet; what a model that never
        looks would say.
      constant_share: of the questions, how many it answers.
      entropy: of the answers, in bits; 0 where there is but one, and nothing to be measured.
    """

    count: int
    constant: str
    constant_share: float
    entropy: float


def answers_by_type(questions: Iterable[Question]) -> Mapping[str, Answers]:
    """What the answers of each question type are like, in the order of the types' names. Labels have no order."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        found[question.question_type][joined(sorted(question.labels))] += 1
    return {name: _answers(found[name]) for name in sorted(found)}


def constant_accuracy(by_type: Mapping[str, Answers]) -> float:
    """The share of all questions that the constant answer of each type answers."""
    total = sum(answers.count for answers in by_type.values())
    return sum(answers.count * answers.constant_share for answers in by_type.values()) / total


def _answers(counts: Counter[str]) -> Answers:
    total = counts.total()
    constant = min(counts, key=lambda answer: (-counts[answer], answer))
    entropy = -math.fsum(n / total * math.log2(n / total) for n in counts.values())
    return Answers(total, constant, counts[constant] / total, max(0.0, entropy))
