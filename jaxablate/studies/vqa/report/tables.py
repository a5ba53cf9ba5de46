"""What the page says of this study: tables and sentences, all of exact accuracy unless they say another."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from jaxablate.analysis import sentences
from jaxablate.analysis.findings import Estimate
from jaxablate.analysis.report.document import (
    Alert,
    Block,
    Cell,
    Paragraph,
    Point,
    Points,
    Table,
    Tone,
)
from jaxablate.analysis.report.tables import numbers, table_of, words
from jaxablate.analysis.sentences import MISSING
from jaxablate.studies.vqa.metrics import constant_answers, entropy, marks, right, spreads
from jaxablate.studies.vqa.report import published
from jaxablate.studies.vqa.report.compare import Comparison, Resampled, accuracy, discordant, support
from jaxablate.studies.vqa.report.runs import Evaluation, Experiment, Finished

INTERVALS = tuple(f"{end}_by_{unit}" for unit in ("image", "sequence", "seed") for end in ("low", "high"))
COLUMNS = ("first", "second", "difference", *INTERVALS, "sequences_above", "sequences_level", "sequences_below", "p",
           "p_holm", "seed", "only_first_right", "only_second_right", "p_mcnemar", "verdict")  # fmt: skip
METRICS = {
    "smart match": "smart_match",
    "as the document's": "smart_match_faithful",
    "set P": "set_precision",
    "set R": "set_recall",
    "set F1": "set_f1",
    "micro F1": "micro_f1",
}
TONES: dict[str, Tone] = {"above": "good", "below": "bad", "not told apart": "none"}


def percent(share: float | None, decimals: int = 1) -> str:
    """`71.3`, without a sign of percent."""
    return sentences.number(None if share is None else 100 * share, decimals)


def points(share: float | None) -> str:
    """A difference of shares in percentage points: `+1.25`."""
    return sentences.signed(None if share is None else 100 * share, 2)


def before(evaluation: Evaluation) -> Iterator[Block]:
    """What a reader must know first: what is missing and what could not be read."""
    if notes := [*evaluation.notes, *_unfinished(evaluation)]:
        yield Alert("Before you read these numbers", tuple(notes))
    if not evaluation.answered:
        yield Paragraph("No experiment has a finished run yet.")


def blocks(evaluation: Evaluation, comparisons: Sequence[Comparison], images: Resampled) -> Iterator[Block]:
    """The tables in the order of the page; `images` is what the comparisons were drawn from."""
    yield _experiments(evaluation, images)
    yield Paragraph("What the differences support", "lead")
    sequences = int(evaluation.clusters("sequence").max()) + 1
    seeds = min(len(one.runs) for one in evaluation.answered)
    yield Points(tuple(Point(text) for text in support(comparisons, sequences, seeds)))
    if comparisons:
        yield _pairs(comparisons)
        yield _matrix(evaluation, comparisons)
    yield _by_type(evaluation)
    yield _groups(evaluation)
    if refined := [one for one in evaluation.answered if any(run.refinement for run in one.runs)]:
        yield _passes(refined)
    if _document_data(evaluation):
        yield from _published()


def _unfinished(evaluation: Evaluation) -> list[str]:
    return [
        f"{one.name}: {sentences.count(one.missing, 'seed')} without a result"
        for one in evaluation.experiments
        if one.missing
    ]


def _document_data(evaluation: Evaluation) -> bool:
    configs = [run.config for one in evaluation.answered for run in one.runs]
    return any(config.get("data", {}).get("source") == "folder" for config in configs)


# --------------------------------------------------------------------------------------- experiments


def _experiments(evaluation: Evaluation, images: Resampled) -> Table:
    rows = []
    for one in evaluation.answered:
        estimate = accuracy(one, images)
        missing = sum(bool(why) for run in one.runs for why in run.answers.errors)
        distance, unread = one.mean("count_mae"), one.mean("count_unread")
        rows.append(
            (
                Cell(one.name, " + ".join(one.arms) if one.arms != (one.name,) else ""),
                Cell(", ".join(map(str, one.seeds))),
                Cell(percent(estimate.value), _bounds(estimate)),
                *(Cell(percent(one.mean(metric))) for metric in METRICS.values()),
                Cell(sentences.number(distance, 2), f"{percent(unread)} % no number" if unread else ""),
                Cell(str(missing), tone="warn" if missing else ""),
            )
        )
    nothing = marks(constant_answers(evaluation.questions), evaluation.questions).summary()
    rows.append(
        (
            Cell("constant answer"),
            Cell(MISSING),
            Cell(percent(nothing["exact"])),
            *(Cell(percent(nothing[metric])) for metric in METRICS.values()),
            Cell(sentences.number(nothing.get("count_mae"), 2)),
            Cell(MISSING),
        )
    )
    columns = words("experiment", "seeds") + numbers("exact", *METRICS, "count MAE", "unanswered")
    what = sentences.count(len(evaluation.questions), "test question")
    caption = (
        f"Percent of {what}, mean over the seeds; in brackets the 95 % interval over other pictures like these and "
        "other seeds (bootstrap). Exact: the same words, number or set of labels. Smart match: equal, one within the "
        "other, or alike to 0.7; as the document's, where an empty answer is right too. Set scores are means over "
        "questions, micro F1 over all labels. A count that is no number is as far off as it could be. Constant answer: "
        "to each type of question its most frequent truth, whatever the picture."
    )
    return table_of("Experiments", columns, rows, caption, "never")


def _bounds(estimate: Estimate, show: str = "accuracy") -> str:
    if estimate.low is None or estimate.high is None:
        return f"no interval: {estimate.note}"
    text = points if show == "difference" else percent
    return f"({text(estimate.low)} to {text(estimate.high)})"


# --------------------------------------------------------------------------------------------- pairs


def _pairs(comparisons: Sequence[Comparison]) -> Table:
    rows = [
        (
            Cell(f"{one.first} − {one.second}"),
            Cell(one.verdict, tone=TONES[one.verdict]),
            Cell(points(one.by_image.value), _bounds(one.by_image, "difference")),
            Cell(_bounds(one.by_sequence, "difference")),
            Cell(_bounds(one.by_seed, "difference")),
            Cell(f"{one.sequences[0]} of {sum(one.sequences)}"),
            Cell(sentences.p_value(one.by_image.p)),
            Cell(sentences.p_value(one.adjusted)),
        )
        for one in comparisons
    ]
    columns = words("pair", "verdict") + numbers(
        "difference", "by sequence", "by seed", "sequences above", "p", "p (Holm)"
    )
    first = comparisons[0]
    caption = (
        f"Percentage points of exact accuracy on the same questions. Below the difference and p: {first.by_image.how}. "
        f"By sequence: {first.by_sequence.how or first.by_sequence.note}"
        + (f" ({first.by_sequence.note})" if first.by_sequence.how and first.by_sequence.note else "")
        + f". Holm's correction is over {sentences.count(len(comparisons), 'pair')}. By seed: "
        "Student's t on the seeds alone. Told apart: the corrected p is below 0.05, and no interval holds zero."
    )
    return table_of("Every pair", columns, rows, caption)


def _matrix(evaluation: Evaluation, comparisons: Sequence[Comparison]) -> Table:
    known = {(one.first, one.second): one for one in comparisons}
    names = [one.name for one in evaluation.answered]
    rows = [
        (Cell(row), *(_mcnemar(known.get((row, column))) for column in names[1:]))
        for row in names[:-1]
    ]  # fmt: skip
    caption = (
        "McNemar's exact test for each seed, in the order of the seeds: its p, and the questions that the row alone : "
        "the column alone is right about. It takes all questions for independent, which those about one picture are "
        "not, so that its p is too small rather than too large; p is not corrected."
    )
    return table_of("McNemar", words("", *names[1:]), rows, caption, "always")


def _mcnemar(one: Comparison | None) -> Cell:
    if one is None:
        return Cell("")
    counted = ", ".join(f"{d.first}:{d.second}" for d in one.mcnemar.values())
    return Cell(", ".join(sentences.p_value(d.p) for d in one.mcnemar.values()), f"({counted})")


# -------------------------------------------------------------------------------------------- groups


def standing(accuracy: float | None, constant: float, different: int) -> str:
    """What an accuracy beside that of the constant answer means; empty if it is above it."""
    if different < 2:
        return "one answer alone: nothing can be measured"
    if accuracy is None or accuracy > constant:
        return ""
    return (
        "equal to the constant answer: nothing was measured"
        if accuracy == constant
        else "below the constant answer"
    )


def _by_type(evaluation: Evaluation) -> Table:
    found, rows = spreads(evaluation.questions), []
    for name, own in evaluation.types.items():
        (answer, times), *_ = found[name]
        constant = times / int(own.sum())
        cells = [
            _beside(one.hits[:, own].mean().item(), constant, len(found[name])) for one in evaluation.answered
        ]
        rows.append(
            (
                Cell(name),
                Cell(sentences.number(int(own.sum()), 0)),
                Cell(str(len(found[name]))),
                Cell(sentences.number(entropy(n for _, n in found[name]), 2)),
                Cell(percent(constant), f"“{answer}”"),
                *cells,
            )
        )
    columns = words("type") + numbers("questions", "answers", "entropy", "constant",
                                      *(one.name for one in evaluation.answered))  # fmt: skip
    caption = (
        "Exact accuracy in percent, mean over the seeds. Answers: different ones, and their entropy in bits. Constant: "
        "what always giving the most frequent of them scores; an accuracy equal to that has measured nothing."
    )
    return table_of("By type of question, beside the constant answer", columns, rows, caption)


def _beside(accuracy: float, constant: float, different: int) -> Cell:
    said = standing(accuracy, constant, different)
    return Cell(percent(accuracy), said, "warn" if said else "")


def _groups(evaluation: Evaluation) -> Table:
    nothing = right(constant_answers(evaluation.questions), evaluation.questions)
    rows = []
    for name, own in evaluation.stages.items():
        constant = float(nothing[own].mean())
        different = len({evaluation.questions[i].answer for i in np.flatnonzero(own)})
        cells = [_beside(one.hits[:, own].mean().item(), constant, different) for one in evaluation.answered]
        rows.append((Cell(name), Cell(sentences.number(int(own.sum()), 0)), Cell(percent(constant)), *cells))
    columns = words("stage") + numbers("questions", "constant", *(one.name for one in evaluation.answered))
    return table_of("By stage", columns, rows, "Exact accuracy in percent, mean over the seeds.")


# -------------------------------------------------------------------------------------------- passes


def _passes(refined: Sequence[Experiment]) -> Table:
    rows = []
    for one in refined:
        shares = {
            name: float(np.mean([run.refinement[name] for run in one.runs]))
            for name in one.runs[0].refinement
        }
        tests = [_first_against_last(run) for run in one.runs]
        exact = [name for name in shares if name.startswith("exact_p")]
        rows.append(
            (
                Cell(one.name),
                *(Cell(percent(shares[name])) for name in exact),
                Cell(percent(shares["exact_majority"])),
                Cell(percent(shares["changed"])),
                Cell(f"{percent(shares['gained'])} / {percent(shares['lost'])}"),
                Cell(points(shares["net_gain"]), f"p {', '.join(sentences.p_value(p) for p in tests)}"),
            )
        )
    columns = words("experiment") + numbers(
        "pass 1", "pass 2", "pass 3", "majority", "changed", "gained / lost", "net gain"
    )
    caption = (
        "Exact accuracy in percent of each pass; the first is that of the same adapter asked once, the third is "
        "scored. Majority: what most of the passes say, the first where no two agree. Changed: the last answer is "
        "not the first. Gained and lost: wrong before and right after, and the reverse; p: McNemar's of the two, "
        "exact, for each seed."
    )
    return table_of("Three passes", columns, rows, caption, "never")


def _first_against_last(run: Finished) -> float:
    first, *_, last = (run.hits_of(name) for name in run.answers.passes)
    return discordant(first, last).p


# ----------------------------------------------------------------------------------------- published


def _published() -> Iterator[Block]:
    total = published.KVASIR_QUESTIONS
    rows = [
        (Cell(name), Cell(sentences.number(correct, 0)), Cell(percent(correct / total, 2)))
        for name, correct in {"zero-shot": published.KVASIR_ZERO_SHOT, **published.KVASIR}.items()
    ]
    endovis = ", ".join(f"{name} {sentences.number(value, 2)}" for name, value in published.ENDOVIS.items())
    said = published.spread(published.KVASIR, total).sentence()
    caption = (
        f"Kvasir-VQA, {total:,} questions, as published: percent by the lenient match that takes an empty answer for "
        f"right; to be held beside the column “as the document's”. {said} "
        f"EndoVis as published: {endovis}; its questions had one answer each, so that these measure nothing."
    )
    yield table_of("Published", words("experiment") + numbers("right", "%"), rows, caption, "always")


# ----------------------------------------------------------------------------------------------- CSV


def comparisons_csv(comparisons: Sequence[Comparison]) -> str:
    """Every pair and seed, a row each; differences are shares. An empty cell is a number that is not there."""
    rows = []
    for one in comparisons:
        estimates = (one.by_image, one.by_sequence, one.by_seed)
        bounds = [bound for estimate in estimates for bound in (estimate.low, estimate.high)]
        about = [
            one.first,
            one.second,
            one.by_image.value,
            *bounds,
            *one.sequences,
            one.by_image.p,
            one.adjusted,
        ]
        for seed, found in one.mcnemar.items():
            rows.append([*about, seed, found.first, found.second, found.p, one.verdict])
    return _csv(COLUMNS, rows)


def groups_csv(evaluation: Evaluation) -> str:
    """Every experiment, seed and group of questions, a row each; accuracies are shares."""
    nothing = right(constant_answers(evaluation.questions), evaluation.questions)
    everything = {"all": np.full(len(evaluation.questions), True)}
    groups: list[tuple[str, str, NDArray[np.bool_]]] = [
        (what, name, own)
        for what, found in (("all", everything), ("stage", evaluation.stages), ("type", evaluation.types))
        for name, own in found.items()
    ]
    metrics = ("exact", "smart_match", "smart_match_faithful", "set_precision", "set_recall", "set_f1", "micro_f1",
               "count_mae")  # fmt: skip
    rows = []
    for one in evaluation.answered:
        for run in one.runs:
            for what, name, own in groups:
                summary = run.marks.summary(own)
                scores = [summary.get(metric) for metric in metrics]
                rows.append([one.name, run.seed, what, name, int(own.sum()), *scores, nothing[own].mean()])
    return _csv(("experiment", "seed", "of", "group", "questions", *metrics, "constant_exact"), rows)


def _csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([columns, *rows])
    return buffer.getvalue()
