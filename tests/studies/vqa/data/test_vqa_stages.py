"""Stages, orders and splits."""

from __future__ import annotations

import pytest

from jaxablate.studies.vqa.data.stages import (
    SEQUENCES,
    arranged,
    first_sequences,
    split_of,
    stage_of,
)


@pytest.mark.parametrize("rule", ["category_first", "faithful"])
def test_the_documents_examples(rule):
    assert stage_of("", "What type of surgical procedure is shown?", rule) == 1
    assert stage_of("", "How many surgical instruments are there?", rule) == 2
    assert stage_of("", "What treatment do you recommend?", rule) == 3
    assert stage_of("PROCEDURE_TYPE", "What is it?", rule) == 1


def test_the_category_comes_before_the_words():
    """A finding whose question says "type of", or "procedure", is a finding; the document's rule misfiles it."""
    misfiled = [("POLYP_TYPE", "What type of polyp is this?"), ("COUNT", "How many tools has the procedure?")]
    for category, question in misfiled:
        assert stage_of(category, question) == 2
        assert stage_of(category, question, "faithful") == 1
    assert stage_of("CLINICAL_SIGNIFICANCE", "What now?") == 3
    assert stage_of("CLINICAL_SIGNIFICANCE", "What now?", "faithful") == 2


def test_stages_follow_one_another_and_keep_their_order():
    stages = [2, 1, 3, 2, 1, 2]
    assert arranged(stages).tolist() == [1, 4, 0, 3, 5, 2]


def test_the_documents_sequences():
    assert [split_of(number) for number in (1, 4, 5, 9, 13, 16)] == [
        "test", "test", "train", "validation", "validation", "train",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="sequence 8"):
        split_of(8)
    numbers = [number for members in SEQUENCES.values() for number in members]
    assert len(numbers) == len(set(numbers)) == 15


def test_a_larger_set_holds_every_smaller_one():
    assert first_sequences(15) == dict(SEQUENCES)
    for count in range(3, 16):
        chosen = first_sequences(count)
        assert all(chosen.values()) and sum(map(len, chosen.values())) == count
        smaller = first_sequences(max(3, count - 1))
        assert all(set(smaller[split]) <= set(chosen[split]) for split in SEQUENCES)
    for count in (2, 16):
        with pytest.raises(ValueError, match=f"{count} sequences"):
            first_sequences(count)
