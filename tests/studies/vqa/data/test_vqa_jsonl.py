"""Files of questions: what is read, and that each fault is one line with its place, its value and a way out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from PIL import Image

from jaxablate.errors import UserError
from jaxablate.studies.vqa import metrics
from jaxablate.studies.vqa.data.jsonl import read_questions, write_questions
from jaxablate.studies.vqa.data.prompts import candidates_in, instruction
from jaxablate.studies.vqa.data.questions import Question

ENDOVIS = {
    "image_id": "seq_1_frame000",
    "image_filename": "a.png",
    "question": "Which instruments are visible?",
    "answer": "forceps; scissors",
    "instruction": "You look at an operation.\nCandidates: ['forceps', 'scissors', 'none']\nAnswer:",
    "question_type": "instrument_detection",
    "category": "INSTRUMENT_DETECTION",
    "is_multi_label": True,
    "sequence": 1,
    "frame": 0,
    "dataset": "endovis2018",
}
KVASIR = {
    "image_filename": "a.png",
    "question": "What color is the abnormality?",
    "answer": "pink",
    "category": "COLOR",
    "stage": 2,
    "candidates": ["pink", "red"],
    "system_instruction": "You read endoscopies.",
    "category_instruction": "Colours are plain words.",
    "is_multi_label": False,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


def read(folder: Path, *lines: Any, **options: Any) -> tuple[Question, ...]:
    content = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "train.jsonl").write_bytes(b"\n".join(content))
    return read_questions(folder / "train.jsonl", folder, **options)


def one_line(folder: Path, *lines: Any) -> str:
    with pytest.raises(UserError) as raised:
        read(folder, *lines)
    message = str(raised.value)
    assert "\n" not in message and "train.jsonl" in message
    return message


def test_both_kinds_of_files_are_read(folder):
    endovis, kvasir = read(folder, ENDOVIS, KVASIR)
    assert endovis.candidates == ("forceps", "scissors", "none")
    assert endovis.labels == ("forceps", "scissors") and endovis.sequence == "1" and endovis.frame == "0"
    assert endovis.instruction == ENDOVIS["instruction"] and endovis.stage == 2
    assert kvasir.image_id == "a.png" and kvasir.labels == ("pink",)
    assert kvasir.instruction.startswith(KVASIR["system_instruction"])
    assert KVASIR["category_instruction"] in kvasir.instruction
    assert candidates_in(kvasir.instruction) == kvasir.candidates


def test_what_is_written_is_read_again(folder):
    found = read(folder, ENDOVIS, KVASIR)
    write_questions(folder / "again.jsonl", found)
    assert read_questions(folder / "again.jsonl", folder) == found


def test_a_files_stage_counts_and_else_the_rule(folder):
    said = {**KVASIR, "question": "What type of polyp is it?", "stage": 3}
    silent = {key: value for key, value in said.items() if key != "stage"}
    assert [q.stage for q in read(folder, said, silent)] == [3, 2]
    assert [q.stage for q in read(folder, said, silent, stage_rule="faithful")] == [3, 1]


FAULTS = {
    "torn": (b'{"image_filename": "a.png", "que', "is not a JSON object"),
    "no object": (b"[1, 2]", "is not a JSON object"),
    "binary": (b"\xff\xfe\x00", "is not a JSON object"),
    "no answer": ({**KVASIR, "answer": ""}, "answer is missing or empty"),
    "null answer": ({**KVASIR, "answer": None}, "answer is missing or empty"),
    "answer of a kind": ({**KVASIR, "answer": ["pink"]}, r"answer=['pink'] is no text"),
    "no label": ({**ENDOVIS, "answer": " ; "}, "has no label"),
    "another answer": ({**KVASIR, "answer": "blue"}, "'blue' is not among the candidates 'pink', 'red'"),
    "another label": ({**ENDOVIS, "answer": "forceps; wrist"}, "'wrist' is not among"),
    "stage 0": ({**KVASIR, "stage": 0}, "stage=0 is none of 1, 2, 3"),
    "stage 4": ({**KVASIR, "stage": 4}, "stage=4 is none"),
    "stage true": ({**KVASIR, "stage": True}, "stage=True is none"),
    "stage text": ({**KVASIR, "stage": "1"}, "stage='1' is none"),
    "no image name": ({**KVASIR, "image_filename": " "}, "image_filename is missing"),
    "no image": ({**KVASIR, "image_filename": "b.png"}, "image_filename='b.png' is not in"),
    "candidates": ({**KVASIR, "candidates": "pink"}, "candidates='pink' is no list"),
    "multi": ({**KVASIR, "is_multi_label": "yes"}, "is_multi_label='yes' is neither"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_with_its_place(folder, fault):
    broken, said = FAULTS[fault]
    message = one_line(folder, KVASIR, broken, KVASIR)
    assert ":2: " in message and said in message and "; " in message


def test_no_question_and_no_file(folder):
    assert "holds no question" in one_line(folder, b"")
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(folder / "missing.jsonl", folder)


def test_other_answers_pass_when_asked(folder):
    [found] = read(folder, {**KVASIR, "answer": "blue"}, answers="any")
    assert found.answer == "blue"


@hypothesis.settings(max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(cut=st.integers(1, len(json.dumps(ENDOVIS)) - 1))
def test_wherever_a_line_is_torn_it_is_reported(folder, cut):
    assert ":2: " in one_line(folder, KVASIR, json.dumps(ENDOVIS).encode()[:cut])


@pytest.mark.parametrize(
    "listed, found",
    [
        ('["a b", "c"]', ("a b", "c")),
        ("['a', 'b']", ("a", "b")),
        ("a; b, c", ("a", "b, c")),
        ("a, b", ("a", "b")),
        ("[broken", ()),
        ("[1, 2]", ()),
        ("['a'] + ['b']", ()),
    ],
)
def test_candidates_of_an_instruction(listed, found):
    assert candidates_in(f"Role.\nCandidates: {listed}\nAnswer:") == found
    assert candidates_in(f"Role.\nNo list: {listed}") == ()


def test_an_instruction_has_all_its_parts():
    text = instruction("What?", ["a", "b"], is_multi_label=True)
    assert "multi_label" in text and '["a", "b"]' in text and text.endswith("Answer:")
    assert "single_choice" in instruction("What?", ["a", "b"], is_multi_label=False)
    assert "Candidates" not in instruction("What?", [], is_multi_label=False)
    short = instruction("What?", ["a", "b"], is_multi_label=True, wording="short")
    assert len(short) < len(text) / 3 and "C: a; b" in short


def test_constants_and_entropy(folder):
    [one] = read(folder, ENDOVIS)
    asked = [
        replace(one, answer=answer)
        for answer in ("forceps; scissors", "scissors; forceps", "none", "forceps")
    ]
    truths = metrics.spreads(asked)["instrument_detection"]
    assert truths[0] == ("forceps; scissors", 2) and [count for _, count in truths] == [2, 1, 1]
    same = metrics.spreads([replace(one, answer="none")] * 3)
    assert same["instrument_detection"] == [("none", 3)]
