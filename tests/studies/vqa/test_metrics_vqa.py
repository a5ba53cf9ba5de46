"""Scores of answers in words: the document's golden table, and that saying nothing, or always the same, is no skill."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxablate.studies.vqa import metrics
from jaxablate.studies.vqa.metrics import exact, ratio, score, smart_match, smart_match_faithful


@dataclass(frozen=True)
class Q:
    """A question, as far as scores look at it."""

    answer: str
    question_type: str = "tools"
    is_multi_label: bool = False
    stage: int | None = 2


# prediction, truth, read as labels, upstream, with the empty rule fixed, exact, difflib's ratio
GOLDEN = [
    ("", "none", False, 1, 0, 0, 0.0),
    ("1", "11-20mm", False, 1, 1, 0, 0.25),
    ("no", "none", False, 1, 1, 0, 0.666667),
    ("10", "0", False, 1, 1, 0, 0.666667),
    ("colonoscopy", "gastroscopy", False, 0, 0, 0, 0.545455),
    ("pink; red", "red; pink", True, 0, 0, 1, 0.5),
    ("shaft; wrist", "shaft; wrist; clasper", True, 1, 1, 0, 0.733333),
    ("Open surgery", "Robotic surgery", False, 0, 0, 0, 0.666667),
]


@pytest.mark.parametrize(("answer", "truth", "labelled", "upstream", "fixed", "right", "alike"), GOLDEN)
def test_the_documents_table(answer, truth, labelled, upstream, fixed, right, alike):
    assert smart_match_faithful(answer, truth) == bool(upstream)
    assert smart_match(answer, truth) == bool(fixed)
    assert exact(answer, truth, "labels" if labelled else "choice") == bool(right)
    assert ratio(answer, truth) == pytest.approx(alike, abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "scores"), [("shaft; wrist", (1, 2 / 3, 0.8)), ("shaft; thread", (0.5, 1 / 3, 0.4))]
)
def test_precision_recall_and_f1_of_sets(answer, scores):
    found = metrics.marks([answer], [Q("shaft; wrist; clasper", is_multi_label=True)])
    assert (*found.precision, *found.recall, *found.f1) == pytest.approx(scores)


def test_micro_f1_counts_labels_and_set_f1_questions():
    questions = [Q("a; b; c", is_multi_label=True), Q("d", is_multi_label=True)]
    found = metrics.marks(["a; b; c", "x"], questions).summary()
    assert found["set_f1"] == 0.5
    assert found["micro_f1"] == pytest.approx(2 * 3 / (4 + 4))


words = st.text("abc ;,.", max_size=12)
questions = st.lists(
    st.builds(Q, words, st.sampled_from(["tools", "organ"]), st.booleans()), min_size=1, max_size=4
)


@settings(max_examples=25, deadline=None)
@given(questions)
def test_saying_nothing_is_never_right(asked):
    for nothing in ("", " ", ".", "; ;", None):
        found = score([nothing] * len(asked), asked)
        for name in ("exact", "smart_match", "set_precision", "set_recall", "set_f1", "micro_f1"):
            assert found[name] == 0, name


def test_saying_nothing_is_right_under_the_documents_match_alone():
    found = score([""] * 2, [Q("none"), Q("grasper")])
    assert (found["smart_match_faithful"], found["smart_match"], found["exact"]) == (1, 0, 0)
    # An answer that was never generated is wrong even there.
    assert score([None] * 2, [Q("none"), Q("grasper")])["smart_match_faithful"] == 0


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(["shaft", "wrist", "big clasper", "none"]), min_size=1, unique=True),
    st.randoms(),
)
def test_labels_have_no_order(names, random):
    shuffled = random.sample(names, len(names))
    truth, answer = "; ".join(names), " ;".join(name.upper() for name in shuffled) + "."
    assert exact(answer, truth, "labels")
    assert not exact("; ".join([*names, "thread"]), truth, "labels")
    assert metrics.marks([answer], [Q(truth, is_multi_label=True)]).f1 == 1


@settings(max_examples=25, deadline=None)
@given(questions)
def test_the_truth_is_right_and_nothing_beats_it(asked):
    found = score([q.answer for q in asked], asked)
    said = [q for q in asked if metrics.canonical(q.answer, metrics.kind(q)) is not None]
    assert found["exact"] == pytest.approx(len(said) / len(asked))
    assert found["constant_exact"] <= found["exact"]


# ------------------------------------------------------------------------------------------------ counts


def test_counts_are_read_as_integers():
    counts = [Q(n, "instrument_count") for n in ("3", "10", "0", "2")]
    found = score(["03.", "1.0", "zero", "4"], counts)
    assert found["exact"] == 0.25  # "1.0" is not 10, though without its point it would be
    # 0; unread: 10 from 0; unread: 10 from 0; 2
    assert found["count_mae"] == pytest.approx((0 + 10 + 10 + 2) / 4)
    assert found["count_unread"] == 0.5


def test_an_unread_count_is_never_better_than_a_wrong_one():
    counts = [Q(n, "count") for n in ("3", "1", "0")]
    for wrong in range(4):
        assert score([str(wrong)] * 3, counts)["count_mae"] <= score(["?"] * 3, counts)["count_mae"]
    assert score([""], [Q("0", "count")])["count_mae"] == 1  # where all truths are zero


def test_what_is_no_count_has_no_distance():
    assert "count_mae" not in score(["3"], [Q("3", "size")])
    assert "count_mae" not in score(["3"], [Q("11-20mm", "polyp_count")])
    assert metrics.kind(Q("3", "encounter")) == "choice"


# --------------------------------------------------------------------------------------- knowing nothing


def test_the_constant_answer_stands_beside_every_metric():
    asked = [
        Q("a; b", "tools", True, 1),
        Q("b; a", "tools", True, 1),
        Q("c", "tools", True, 2),
        Q("2", "count"),
    ]
    found = score(["c", "a", "c", "5"], asked)
    assert metrics.constant_answers(asked) == ["a; b"] * 3 + ["2"]
    assert found["constant_exact"] == 0.75
    assert (found["exact_stage1"], found["constant_exact_stage1"]) == (0, 1)
    assert (found["count_mae"], found["constant_count_mae"]) == (3, 0)
    assert "exact_stage3" not in found  # nobody asked
    beside = {name.removeprefix("val/"): other.removeprefix("val/") for name, other in metrics.BESIDE.items()}
    assert {beside[name] for name in found if name in beside} <= set(found)


@pytest.mark.parametrize(("counts", "bits"), [([5], 0), ([1, 1], 1), ([2, 1, 1], 1.5), ([], 0), ([3, 0], 0)])
def test_entropy(counts, bits):
    found = metrics.entropy(counts)
    assert found == pytest.approx(bits)
    assert math.copysign(1, found) == 1


# ------------------------------------------------------------------------------------------ three passes


def test_what_the_passes_bring():
    asked = [Q("a"), Q("b"), Q("c"), Q("d")]
    passes = {
        "p1": ["a", "x", "c", "1"],
        "p2": ["x", "b", "c", "2"],
        "p3": ["a.", "b", "x", "d"],
    }
    found = metrics.refinement(passes, asked)
    assert [found[f"exact_p{k}"] for k in (1, 2, 3)] == [0.5, 0.5, 0.75]
    assert found["exact_majority"] == 0.75  # of the last question no two agree, and the first is wrong
    assert (found["changed"], found["gained"], found["lost"], found["net_gain"]) == (0.75, 0.5, 0.25, 0.25)
    assert metrics.majority(list(passes.values()), asked) == ["a", "b", "c", "1"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from(["a", "b", "", None])] * 3), min_size=1, max_size=6))
def test_net_gain_is_the_difference_of_the_accuracies(answers):
    p1, p2, p3 = map(list, zip(*answers, strict=True))
    found = metrics.refinement({"p1": p1, "p2": p2, "p3": p3}, [Q("a")] * len(answers))
    assert found["net_gain"] == pytest.approx(found["exact_p3"] - found["exact_p1"])
    assert found["changed"] >= found["gained"] + found["lost"] - 1e-12
    same = metrics.refinement({"p1": p1, "p2": p1, "p3": p1}, [Q("a")] * len(answers))
    assert (same["changed"], same["net_gain"]) == (0, 0)
    assert same["exact_majority"] == same["exact_p1"]


def test_means_of_no_questions_are_none():
    assert metrics.marks(["a"], [Q("a")]).summary(np.array([False])) == {}
