"""What the model is told: the instruction of a question, and what the second and third pass add to it.

Two wordings: `full`, for models that read, and `short`, for one of single characters with room for 192 of them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Wording = Literal["short", "full"]
Slot = Literal["p1", "p2"]  # where the answer of an earlier pass stands
SLOTS: tuple[Slot, ...] = ("p1", "p2")

_FULL_ROLE = "You assist a surgeon and answer questions about a picture of the operation."
_FULL_RULES = {
    True: "Answer with candidates only, spelled as in the list. Give all that apply, separated by '; '.",
    False: "Answer with exactly one candidate, spelled as in the list.",
}
_FULL_OPEN = "Answer in as few words as possible."  # where the candidates are not known
_FULL_TYPE = {True: "multi_label", False: "single_choice"}
_SHORT_ROLE = "Surgery. Pick from C."
_SHORT_TYPE = {True: "all", False: "one"}

_CANDIDATES = re.compile(r"^\s*Candidates:\s*(\S.*?)\s*$", re.MULTILINE)


def instruction(
    question: str,
    candidates: Sequence[str],
    *,
    is_multi_label: bool,
    wording: Wording = "full",
    system_instruction: str = "",
    category_instruction: str = "",
) -> str:
    """Role, rules, the question, how many labels it has, and its candidates; ends where the answer begins.

    `system_instruction` and `category_instruction` are the role, and a further rule, of a file that has its own.
    """
    if wording == "short":
        lines = [_SHORT_ROLE, f"Q: {question}", f"T: {_SHORT_TYPE[is_multi_label]}"]
        return "\n".join([*lines, f"C: {'; '.join(candidates)}", "A:"])
    lines = [
        system_instruction or _FULL_ROLE,
        _FULL_RULES[is_multi_label] if candidates else _FULL_OPEN,
        *([category_instruction] if category_instruction else []),
        "",
        f"Question: {question}",
        f"Question Type: {_FULL_TYPE[is_multi_label]}",
        *([f"Candidates: {json.dumps(list(candidates), ensure_ascii=False)}"] if candidates else []),
        "Answer:",
    ]
    return "\n".join(lines)


def candidates_in(text: str) -> tuple[str, ...]:
    """The candidates that an instruction lists after "Candidates:", on that line; () if it lists none.

    As a list of JSON or of Python, or separated by semicolons or, without one, by commas.
    """
    match = _CANDIDATES.search(text)
    if match is None:
        return ()
    listed = match[1]
    if listed.startswith("["):
        try:
            found = ast.literal_eval(listed)
        except (ValueError, SyntaxError):
            return ()
        return tuple(found) if isinstance(found, list) and all(isinstance(one, str) for one in found) else ()
    parts = listed.split(";" if ";" in listed else ",")
    return tuple(part.strip() for part in parts if part.strip())


@dataclass(frozen=True)
class Passes:
    """What stands behind the instruction in the second and in the third pass: texts, and slots between them.

    Each begins and ends with a text.
    """

    second: tuple[str, ...]
    third: tuple[str, ...]


# A text ends with a line where an answer follows: in tokens of words, the answer is then the same tokens as when it
# was given, with none that reaches over its beginning.
PASSES: Mapping[Wording, Passes] = {
    "short": Passes(second=("\n\nSeen: ", "p1", "\n\nAgain:"), third=("\n\n1: ", "p1", "\n2: ", "p2", "\n\nFinal:")),
    "full": Passes(
        second=(
            "\n\nA first look at the picture gave this answer:\n",
            "p1",
            "\n\nLook at the picture again with this in mind, and give a refined answer.",
        ),
        third=(
            "\n\nFirst answer:\n",
            "p1",
            "\nRefined answer:\n",
            "p2",
            "\n\nGive the final answer, and nothing but it, as short as it can be.",
        ),
    ),
}  # fmt: skip


def filled(pieces: Sequence[str], given: Mapping[Slot, str]) -> str:
    """The text of a further pass, with the answers of those before in the slots."""
    return "".join(given[piece] if piece in SLOTS else piece for piece in pieces)
