"""Files of questions, one JSON object per line: read with every check that needs no picture, and written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from jaxablate.disk import parse_row, write_bytes
from jaxablate.errors import UserError
from jaxablate.studies.vqa.data.prompts import Wording, candidates_in, instruction
from jaxablate.studies.vqa.data.questions import Question
from jaxablate.studies.vqa.data.stages import StageRule, stage_of

# Whether an answer must be made of its candidates.
Answering = Literal["candidates", "any"]
STAGES = (1, 2, 3)
_SHOWN = 60  # characters of a broken line
_FIX_LINE = "mend or delete the line"


def read_questions(
    path: str | Path,
    image_root: str | Path,
    *,
    stage_rule: StageRule = "category_first",
    answers: Answering = "candidates",
    wording: Wording = "full",
) -> tuple[Question, ...]:
    """The questions of a file, in its order.

    A line needs `image_filename`, `question` and `answer`. Where there is no `stage`, the rule decides; no
    `instruction`, it is made in the given wording; no `candidates`, those in the instruction count; no `category` or
    `question_type`, each is the other's. Keys that are not of `Question` are let be.

    Raises:
      UserError: the file cannot be read; or a line, with its number, is torn, lacks what it needs, has it in another
        type, names a picture that is not there, a stage outside 1-3, or an answer that is not among its candidates.
    """
    path, image_root = Path(path), Path(image_root)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give a file of questions") from None
    there: dict[str, bool] = {}
    found: list[Question] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        at = _Line(path, number, line)
        question = _question(at, stage_rule, wording)
        if question.image_filename not in there:
            there[question.image_filename] = (image_root / question.image_filename).is_file()
        if not there[question.image_filename]:
            raise at.wrong(
                f"image_filename={question.image_filename!r}", f"is not in {image_root}",
                "restore the image, or leave its questions out",
            )  # fmt: skip
        if answers == "candidates":
            _check_labels(at, question)
        found.append(question)
    if not found:
        raise UserError(f"{path}: holds no question; give one on each line")
    return tuple(found)


def write_questions(path: str | Path, questions: Iterable[Question]) -> None:
    """Writes the file, atomically; `read_questions` gives the same questions again."""
    lines = [json.dumps(asdict(question), ensure_ascii=False) for question in questions]
    write_bytes(path, ("\n".join(lines) + "\n").encode())


class _Line:
    """A line's values by key, with errors that say where they stand."""

    def __init__(self, path: Path, number: int, line: bytes):
        self._where = f"{path}:{number}"
        values = parse_row(line)
        if values is None:
            shown = line[:_SHOWN].decode(errors="replace")
            raise self.wrong(repr(shown), "is not a JSON object: torn or damaged", _FIX_LINE)
        self._values: Mapping[str, Any] = values

    def wrong(self, value: str, reason: str, fix: str) -> UserError:
        """What to raise about a value of the line."""
        return UserError(f"{self._where}: {value} {reason}; {fix}")

    def text(self, key: str, *, needed: bool = False) -> str:
        """A string, without spaces around it; empty if the key is missing or null."""
        value = self._values.get(key)
        if value is None:
            value = ""
        if isinstance(value, int) and not isinstance(value, bool) and not needed:
            value = str(value)  # a frame, a sequence
        if not isinstance(value, str):
            raise self.wrong(f"{key}={value!r}", "is no text", _FIX_LINE)
        if needed and not value.strip():
            raise self.wrong(f"{key}", "is missing or empty", f"give it, or {_FIX_LINE}")
        return value.strip()

    def answer(self) -> str:
        """The answer, which may be a number."""
        value = self._values.get("answer")
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.text("answer", needed=True)

    def yes_or_no(self, key: str) -> bool:
        """A truth value; no if the key is missing."""
        value = self._values.get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(f"{key}={value!r}", "is neither true nor false", _FIX_LINE)
        return value

    def stage(self) -> int | None:
        """1, 2 or 3; None if the line does not say."""
        value = self._values.get("stage")
        if value is not None and (type(value) is not int or value not in STAGES):
            raise self.wrong(f"stage={value!r}", "is none of 1, 2, 3", "mend it, or leave the key out")
        return value

    def candidates(self) -> tuple[str, ...]:
        """Those listed; () if the key is missing."""
        value = self._values.get("candidates")
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(one, str) and one.strip() for one in value):
            raise self.wrong(f"candidates={value!r}"[:_SHOWN], "is no list of texts", _FIX_LINE)
        return tuple(one.strip() for one in value)


def _question(line: _Line, rule: StageRule, wording: Wording) -> Question:
    filename = line.text("image_filename", needed=True)
    question, answer = line.text("question", needed=True), line.answer()
    category, kind = line.text("category"), line.text("question_type")
    multi, told = line.yes_or_no("is_multi_label"), line.text("instruction")
    candidates = line.candidates() or candidates_in(told)
    system, further = line.text("system_instruction"), line.text("category_instruction")
    return Question(
        image_id=line.text("image_id") or filename,
        image_filename=filename,
        question=question,
        answer=answer,
        instruction=told or instruction(
            question, candidates, is_multi_label=multi, wording=wording, system_instruction=system,
            category_instruction=further,
        ),
        question_type=kind or category.lower() or "unknown",
        category=category or kind.upper(),
        is_multi_label=multi,
        stage=line.stage() or stage_of(category, question, rule),
        sequence=line.text("sequence"),
        frame=line.text("frame"),
        dataset=line.text("dataset"),
        candidates=candidates,
        system_instruction=system,
        category_instruction=further,
    )  # fmt: skip


def _check_labels(line: _Line, question: Question) -> None:
    """Raises UserError for a label that is not a candidate, where the candidates are known."""
    if not question.labels:
        raise line.wrong(f"answer={question.answer!r}", "has no label", _FIX_LINE)
    if not question.candidates:
        return
    for label in question.labels:
        if label not in question.candidates:
            raise line.wrong(
                f"answer={question.answer!r}: {label!r}", f"is not among the candidates {_few(question.candidates)}",
                "mend either, or set data.answers=any",
            )  # fmt: skip


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:4])
    return f"{shown}, … ({len(names)})" if len(names) > 4 else shown
