"""The document's result file of one evaluation, field for field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxablate import disk
from jaxablate.studies.vqa.metrics import entropy, spreads
from jaxablate.studies.vqa.report.runs import Evaluation, Finished

# The document calls the passes stages here.
PASS_FIELDS = {"p1": "stage1_pred", "p2": "stage2_pred", "p3": "stage3_pred"}


def result_json(run: Finished, evaluation: Evaluation) -> dict[str, Any]:
    """What the document's evaluation writes, of one run.

    `correct` and `accuracy` are exact; the document's own, which is lenient, stands with each prediction as
    `smart_match`. Rates are in percent. A question without an answer is wrong, in `predictions` with null, and listed
    in `errors`.
    """
    everything = np.full(len(evaluation.questions), True)
    return {
        **_counts(run, everything),
        **{name: _percent(run.marks.summary().get(f"set_{name}", 0.0)) for name in ("precision", "recall", "f1")},
        "by_stage": {name: _counts(run, own) for name, own in evaluation.stages.items()},
        "by_question_type": _by_type(run, evaluation),
        "predictions": [_prediction(run, place) for place in range(len(evaluation.questions))],
        "errors": [
            {"index": question.row, "image_id": question.image_id, "question": question.question, "error": why}
            for question, why in zip(evaluation.questions, run.answers.errors, strict=True)
            if why
        ],
    }  # fmt: skip


def encoded(run: Finished, evaluation: Evaluation) -> str:
    """`result_json` as the file's text."""
    fields = disk.plain(result_json(run, evaluation))
    return json.dumps(fields, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _counts(run: Finished, own: NDArray[np.bool_]) -> dict[str, Any]:
    total, correct = int(own.sum()), int(run.marks.exact[own].sum())
    return {"total": total, "correct": correct, "accuracy": _percent(correct / max(total, 1))}


def _by_type(run: Finished, evaluation: Evaluation) -> dict[str, Any]:
    """With what always saying the most frequent answer would score: an accuracy that equals it measures nothing."""
    found = spreads(evaluation.questions)
    fields: dict[str, Any] = {}
    for name, own in evaluation.types.items():
        (constant, times), *_ = found[name]
        fields[name] = _counts(run, own) | {
            "constant_answer": constant,
            "constant_accuracy": _percent(times / int(own.sum())),
            "answer_entropy_bits": entropy(n for _, n in found[name]),
        }
    return fields


def _prediction(run: Finished, place: int) -> Mapping[str, Any]:
    question, final = run.answers.questions[place], run.answers.final[place]
    fields = {
        "image_id": question.image_id,
        "image_filename": question.image_filename,
        "question": question.question,
        "question_type": question.question_type,
        "category": question.category,
        "stage": question.stage,
        "ground_truth": question.answer,
        "prediction": final,
        "correct": bool(run.marks.exact[place]),
        "smart_match": bool(run.marks.smart_match_faithful[place]),
    }
    if len(run.answers.passes) > 1:
        fields |= {field: run.answers.passes[name][place] for name, field in PASS_FIELDS.items()}
        fields["final_prediction"] = final
    return fields


def _percent(share: float) -> float:
    return 100 * share
