"""The answers of a run as it keeps them on disk: with all that its report needs of the questions. Imports no jax."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from jaxablate.errors import UserError
from jaxablate.studies.vqa.metrics import Answer, Asked

EXAMPLES = 6
LONGEST_SIDE = 160  # pixels of a picture that is kept for the report
PASS = re.compile(r"p[0-9]+")
PICTURE = "picture_"
NO_EXPERT = "no expert of stage"  # and its number: why a question has no answer

Picture = NDArray[np.uint8]


@runtime_checkable
class AskedOf(Asked, Protocol):
    """A question with what it is about."""

    @property
    def question(self) -> str: ...
    @property
    def image_id(self) -> str: ...
    @property
    def image_filename(self) -> str: ...
    @property
    def category(self) -> str: ...
    @property
    def sequence(self) -> Any:
        """Whatever names it: text, a number, or None."""
        ...


@dataclass(frozen=True)
class Kept:
    """One test question as a run kept it; `row` is its place among all test questions."""

    row: int
    question: str
    answer: str
    question_type: str
    category: str
    is_multi_label: bool
    stage: int | None
    sequence: str  # empty where there are none
    image_id: str
    image_filename: str


@dataclass(frozen=True)
class Answers:
    """What a run answered, in the order of `questions`.

    Attributes:
      passes: by pass (`p1`, `p2`, `p3`) the answers, None where there is none.
      errors: why there is no answer; empty where there is one.
      pictures: of a few questions, by row: (height, width, 3), small.
      remarks: why results may mean little; one sentence each.
    """

    questions: tuple[Kept, ...]
    passes: Mapping[str, tuple[Answer, ...]]
    errors: tuple[str, ...]
    pictures: Mapping[int, Picture]
    remarks: tuple[str, ...] = ()

    @property
    def final(self) -> tuple[Answer, ...]:
        """Those of the last pass, which are scored."""
        return self.passes[max(self.passes)]

    @classmethod
    def read(cls, path: Path) -> Answers:
        """From the predictions.npz of a run.

        Raises:
          UserError: it is not there, damaged, or of something else.
        """
        if not path.is_file():
            raise UserError(f"{path}: the run kept no answers; train it again to have them")
        try:
            # In memory: of a torn file numpy would leave the one that it opened open.
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                return cls.of({name: np.asarray(file[name]) for name in file.files})
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            what = " ".join(str(error).split())
            raise UserError(f"{path}: cannot be read: {what}; train the run again") from None

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Answers:
        """From what `keep` gave."""
        columns = {name: arrays[name].tolist() for name in Kept.__dataclass_fields__}
        columns["stage"] = [stage or None for stage in columns["stage"]]
        questions = tuple(
            Kept(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)
        )
        errors = tuple(arrays["error"].tolist())
        passes = {
            name: tuple(
                None if why else text for text, why in zip(arrays[name].tolist(), errors, strict=True)
            )
            for name in sorted(arrays)
            if PASS.fullmatch(name)
        }
        if not passes or len(errors) != len(questions):
            raise ValueError("its arrays do not belong together")
        pictures = {
            int(name.removeprefix(PICTURE)): array
            for name, array in arrays.items()
            if name.startswith(PICTURE)
        }
        return cls(questions, passes, errors, pictures, tuple(arrays["remarks"].tolist()))


def keep(
    questions: Sequence[AskedOf],
    passes: Mapping[str, Sequence[Answer]],
    *,
    rows: Sequence[int] | None = None,
    errors: Mapping[int, str] | None = None,
    pictures: Mapping[int, Picture] | None = None,
    remarks: Sequence[str] = (),
) -> dict[str, NDArray[Any]]:
    """The arrays that `Answers.read` reads: for `Task.keep`.

    Args:
      questions: those that were asked, and those that should have been.
      passes: the answers to them: `p1` alone, or `p1`, `p2`, `p3`. Where one is None, all are.
      rows: their places among all test questions; as they stand here if not given.
      errors: by place in `questions`, why one has no answer.
      pictures: by row, of those that `examples` chose: (height, width, 3).
      remarks: why results may mean little.
    """
    own = range(len(questions)) if rows is None else rows
    reasons = [""] * len(questions)
    for place, answers in enumerate(zip(*passes.values(), strict=True)):
        if None in answers:
            reasons[place] = (errors or {}).get(place) or "no answer was generated"
    columns: dict[str, list[Any]] = {
        "row": list(own),
        "question": [one.question for one in questions],
        "answer": [one.answer for one in questions],
        "question_type": [one.question_type for one in questions],
        "category": [one.category for one in questions],
        "is_multi_label": [one.is_multi_label for one in questions],
        "stage": [one.stage or 0 for one in questions],
        "sequence": ["" if one.sequence is None else str(one.sequence) for one in questions],
        "image_id": [str(one.image_id) for one in questions],
        "image_filename": [one.image_filename for one in questions],
        "error": reasons,
        **{name: [answer or "" for answer in answers] for name, answers in passes.items()},
    }
    types = {"row": np.int32, "stage": np.int8, "is_multi_label": np.bool_}
    arrays = {name: np.array(column, types.get(name, np.str_)) for name, column in columns.items()}
    arrays["remarks"] = np.array(remarks, np.str_)
    return arrays | {f"{PICTURE}{row}": _small(picture) for row, picture in (pictures or {}).items()}


def _small(picture: Picture) -> Picture:
    """No side longer than `LONGEST_SIDE`."""
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return np.asarray(image)


def examples(questions: Sequence[AskedOf], most: int = EXAMPLES) -> list[int]:
    """Places of a few questions to be shown with their pictures: drawn whatever was answered, one of each type in turn.

    The same for all runs of the same questions.
    """
    by_type: dict[str, list[int]] = {}
    for place in np.random.default_rng(0).permutation(len(questions)).tolist():
        by_type.setdefault(questions[place].question_type, []).append(place)
    turns = [sorted(by_type.items())[i % len(by_type)][1] for i in range(most)] if by_type else []
    chosen: list[int] = []
    for places in turns:
        if places:
            chosen.append(places.pop())
    return sorted(chosen)
