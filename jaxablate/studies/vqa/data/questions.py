"""A question about a picture, and what can be said of many of them without looking at a picture."""

from __future__ import annotations

from collections.abc import Sequence
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
