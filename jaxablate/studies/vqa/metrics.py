"""Scores of answers in words: the primary one, the document's lenient one, and what knowing nothing scores.

An answer is a string; `None` is one that was never given (its generation failed, its question did not fit), which is
wrong under every metric. Imports no jax.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from jaxablate.config import Direction

SIMILAR = 0.7  # difflib's ratio from which `smart_match` takes an answer for right
STAGES = (1, 2, 3)
CONSTANT = "constant_"  # before the name of a metric: what the constant answer scores there
_SCORES = (*(f"exact{stage}" for stage in ("", *(f"_stage{k}" for k in STAGES))), "smart_match", "smart_match_faithful",
           "set_precision", "set_recall", "set_f1", "micro_f1", "count_mae")  # fmt: skip
_PASSES = ("exact_p1", "exact_p2", "exact_p3", "exact_majority", "net_gain")
DIRECTIONS: dict[str, Direction] = {
    f"val/{name}": "min" if name == "count_mae" else "max" for name in (*_SCORES, *_PASSES)
}
BESIDE = {f"val/{name}": f"val/{CONSTANT}{name}" for name in _SCORES}

Kind = Literal["labels", "count", "choice"]
Answer = str | None


@runtime_checkable  # so that tests can check what functions are given
class Asked(Protocol):
    """What a score needs to know of a question."""

    @property
    def answer(self) -> str:
        """The truth; labels of a multi-label question are separated by `;`."""
        ...

    @property
    def question_type(self) -> str:
        """Such as `instrument_count`."""
        ...

    @property
    def is_multi_label(self) -> bool:
        """Whether the answer is a set."""
        ...

    @property
    def stage(self) -> int | None:
        """1, 2 or 3; None where nobody said."""
        ...


# ------------------------------------------------------------------------------------------ one answer


def normalise(text: str) -> str:
    """In lower case, without spaces around it and without any of `. , ;`."""
    return re.sub(r"[.,;]", "", text.lower().strip())


def labels(text: str) -> frozenset[str]:
    """The normalised labels of an answer, which are separated by `;`; empty ones do not count."""
    return frozenset(name for part in text.split(";") if (name := normalise(part).strip()))


def integer(text: str) -> int | None:
    """The number that an answer consists of, at most with a full stop; None of anything else.

    `1.5` and `1,5` are no integers, though `normalise` would make 15 of them.
    """
    found = re.fullmatch(r"\s*([0-9]{1,18})\s*\.?\s*", text, re.ASCII)
    return int(found[1]) if found else None


def kind(question: Asked) -> Kind:
    """How an answer to it is read: as a set of labels, as a number, or as words."""
    if question.is_multi_label:
        return "labels"
    counts = "count" in re.split(r"[\W_]+", question.question_type.lower())
    return "count" if counts and integer(question.answer) is not None else "choice"


def canonical(text: Answer, how: Kind) -> Hashable:
    """What two answers have in common that say the same: a set, a number or normalised words; None of no answer."""
    if text is None:
        return None
    if how == "labels":
        return labels(text) or None
    return integer(text) if how == "count" else normalise(text).strip() or None


def exact(answer: Answer, truth: str, how: Kind = "choice") -> bool:
    """Whether an answer says the same as the truth; an empty one never does, even of an empty truth."""
    given = canonical(answer, how)
    return given is not None and given == canonical(truth, how)


def ratio(answer: str, truth: str) -> float:
    """difflib's similarity of the normalised texts, 0 to 1."""
    return difflib.SequenceMatcher(None, normalise(answer), normalise(truth)).ratio()


def smart_match_faithful(answer: Answer, truth: str) -> bool:
    """The document's accuracy: equal, one within the other, or similar. An empty answer is within every truth."""
    given, true = "" if answer is None else normalise(answer), normalise(truth)
    if answer is None or not true.strip():
        return False
    return given in true or true in given or ratio(answer, truth) >= SIMILAR


def smart_match(answer: Answer, truth: str) -> bool:
    """The same, but an empty answer is wrong."""
    return bool(answer and normalise(answer).strip()) and smart_match_faithful(answer, truth)


def overlap(answer: Answer, truth: str) -> tuple[int, int, int]:
    """Labels that answer and truth share, that the answer has, and that the truth has."""
    given, true = labels(answer or ""), labels(truth)
    return len(given & true), len(given), len(true)


# -------------------------------------------------------------------------------------------- many answers


@dataclass(frozen=True)
class Marks:
    """How each answer did, all arrays (questions,).

    Attributes:
      exact, smart_match, smart_match_faithful: whether it is right under the metric.
      shared, given, true: labels in both, in the answer, in the truth.
      distance: of counts, how far off; NaN elsewhere.
      unread: of counts, whether the answer is no integer.
    """

    exact: NDArray[np.bool_]
    smart_match: NDArray[np.bool_]
    smart_match_faithful: NDArray[np.bool_]
    shared: NDArray[np.int64]
    given: NDArray[np.int64]
    true: NDArray[np.int64]
    distance: NDArray[np.float64]
    unread: NDArray[np.bool_]

    @property
    def precision(self) -> NDArray[np.float64]:
        """Share of the given labels that are true; 0 of none."""
        return self.shared / np.maximum(self.given, 1)

    @property
    def recall(self) -> NDArray[np.float64]:
        """Share of the true labels that are given; 0 of none."""
        return self.shared / np.maximum(self.true, 1)

    @property
    def f1(self) -> NDArray[np.float64]:
        """Their harmonic mean: 2 shared / (given + true)."""
        return 2 * self.shared / np.maximum(self.given + self.true, 1)

    def summary(self, own: NDArray[np.bool_] | None = None) -> dict[str, float]:
        """Means over the questions that `own` selects, all without it; of none, and of no counts, there is none."""
        own = np.full(len(self.exact), True) if own is None else own
        if not own.any():
            return {}
        shared, given, true = (int(part[own].sum()) for part in (self.shared, self.given, self.true))
        found = {
            "exact": float(self.exact[own].mean()),
            "smart_match": float(self.smart_match[own].mean()),
            "smart_match_faithful": float(self.smart_match_faithful[own].mean()),
            "set_precision": float(self.precision[own].mean()),
            "set_recall": float(self.recall[own].mean()),
            "set_f1": float(self.f1[own].mean()),
            "micro_f1": 2 * shared / max(given + true, 1),
        }
        counted = own & ~np.isnan(self.distance)
        if counted.any():
            found["count_mae"] = float(self.distance[counted].mean())
            found["count_unread"] = float(self.unread[counted].mean())
        return found


def marks(answers: Sequence[Answer], questions: Sequence[Asked]) -> Marks:
    """Marks every answer.

    A count that is no integer is as far off as a count between 0 and the largest true one can be: an answer that
    cannot be read must not look better than one that is wrong.
    """
    kinds: list[Kind] = [kind(question) for question in questions]
    truths = [question.answer for question in questions]
    rows = list(zip(answers, truths, kinds, strict=True))
    counts = [integer(truth) if how == "count" else None for truth, how in zip(truths, kinds, strict=True)]
    largest = max((count for count in counts if count is not None), default=0)

    def distance(answer: Answer, count: int | None) -> float:
        if count is None:
            return math.nan
        given = integer(answer or "")
        return float(max(count, largest - count, 1) if given is None else abs(given - count))

    faithful = np.array([smart_match_faithful(answer, truth) for answer, truth, _ in rows], bool)
    said = np.array([bool(answer and normalise(answer).strip()) for answer in answers], bool)
    overlaps = np.array([overlap(answer, truth) for answer, truth, _ in rows], np.int64).reshape(-1, 3)
    return Marks(
        exact=right(answers, questions),
        smart_match=faithful & said,
        smart_match_faithful=faithful,
        shared=overlaps[:, 0],
        given=overlaps[:, 1],
        true=overlaps[:, 2],
        distance=np.array([distance(answer, n) for answer, n in zip(answers, counts, strict=True)], float),
        unread=np.array([how == "count" and integer(answer or "") is None for answer, _, how in rows], bool),
    )


def right(answers: Sequence[Answer], questions: Sequence[Asked]) -> NDArray[np.bool_]:
    """Which answers are exactly right, (questions,)."""
    pairs = zip(answers, questions, strict=True)
    return np.array([exact(answer, question.answer, kind(question)) for answer, question in pairs], bool)


def score(answers: Sequence[Answer], questions: Sequence[Asked]) -> dict[str, float]:
    """All metrics of some answers, as shares, and beside each what the constant answer scores.

    Returns:
      `exact`, `exact_stage1`, …, `smart_match`, `smart_match_faithful`, `set_precision`, `set_recall`, `set_f1`,
      `micro_f1`, `count_mae`, `count_unread`, and each again as `constant_exact`, …. A stage without questions has
      none, nor has `count_mae` without counts.
    """
    own = marks(answers, questions)
    nothing = marks(constant_answers(questions), questions)
    stages = np.array([question.stage or 0 for question in questions])

    def all_of(found: Marks) -> dict[str, float]:
        by_stage = {k: found.exact[stages == k] for k in STAGES}
        return found.summary() | {
            f"exact_stage{k}": float(part.mean()) for k, part in by_stage.items() if len(part)
        }

    return all_of(own) | {CONSTANT + name: value for name, value in all_of(nothing).items()}


# --------------------------------------------------------------------------------------- knowing nothing


def constant_answers(questions: Sequence[Asked]) -> list[str]:
    """To every question the most frequent truth of its type: all that can be said without a look at the picture.

    Of these very questions, which makes it the best that a constant can do.
    """
    frequent = {name: spread[0][0] for name, spread in spreads(questions).items()}
    return [frequent[question.question_type] for question in questions]


def spreads(questions: Iterable[Asked]) -> dict[str, list[tuple[str, int]]]:
    """By question type its truths, each in its first spelling, with how often it is true.

    The most frequent first, and equally frequent ones by the alphabet.
    """
    counts: dict[str, Counter[Hashable]] = {}
    spelled: dict[tuple[str, Hashable], str] = {}
    for question in questions:
        truth = canonical(question.answer, kind(question))
        counts.setdefault(question.question_type, Counter())[truth] += 1
        spelled.setdefault((question.question_type, truth), question.answer)
    return {
        name: sorted(
            ((spelled[name, truth], n) for truth, n in count.items()), key=lambda row: (-row[1], row[0])
        )
        for name, count in counts.items()
    }


def entropy(counts: Iterable[int]) -> float:
    """Of answers that are true so often, in bits; 0 if there is one alone."""
    shares = np.array([count for count in counts if count], float)
    shares /= shares.sum() or 1
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # no minus before a zero


# ------------------------------------------------------------------------------------------- three passes


def majority(passes: Sequence[Sequence[Answer]], questions: Sequence[Asked]) -> list[Answer]:
    """What most of several answers to each question say; the first one where no two agree."""
    found: list[Answer] = []
    for question, answers in zip(questions, zip(*passes, strict=True), strict=True):
        said = [canonical(answer, kind(question)) for answer in answers]
        most, votes = Counter(said).most_common(1)[0]
        found.append(answers[said.index(most)] if votes > 1 else answers[0])
    return found


def refinement(passes: Mapping[str, Sequence[Answer]], questions: Sequence[Asked]) -> dict[str, float]:
    """What the passes after the first one brought, as shares of the questions.

    Args:
      passes: the answers of each pass, in order: `p1`, `p2`, `p3`.

    Returns:
      `exact_p1`, …; `exact_majority` of all passes; `changed`: the last answer is another than the first; `gained`:
      it became right, `lost`: it was right and is not any more; `net_gain`: gained less lost.
    """
    hits = {name: right(answers, questions) for name, answers in passes.items()}
    first, *_, last = passes
    changed = [
        canonical(a, kind(question)) != canonical(b, kind(question))
        for a, b, question in zip(passes[first], passes[last], questions, strict=True)
    ]
    shares = {f"exact_{name}": one for name, one in hits.items()} | {
        "exact_majority": right(majority(list(passes.values()), questions), questions),
        "changed": np.array(changed, bool),
        "gained": hits[last] & ~hits[first],
        "lost": hits[first] & ~hits[last],
    }
    found = {name: float(np.mean(one)) for name, one in shares.items()}
    return found | {"net_gain": found["gained"] - found["lost"]}
