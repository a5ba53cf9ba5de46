"""Reports become the same ids everywhere, and a prompt is never lost."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest

from jaxablate.errors import UserError
from jaxablate.studies.ctclip.data.findings import FINDINGS, PROMPT_STYLES, prompts
from jaxablate.studies.ctclip.data.text import build_words, clean_report, open_wordpiece, split_words

EVERY_PROMPT = [text for style in PROMPT_STYLES for side in prompts(style) for text in side]
PROMPT_WORDS = {word for text in EVERY_PROMPT for word in split_words(text)}


def test_there_are_18_findings_and_two_wordings():
    assert len(set(FINDINGS)) == 18
    assert (FINDINGS[0], FINDINGS[9], FINDINGS[17]) == (
        "Medical material",
        "Lung nodule",
        "Interlobular septal thickening",
    )
    assert prompts()[0][9] == "There is lung nodule."
    assert prompts()[1][9] == "There is no lung nodule."
    assert prompts("original")[0][9] == "Lung nodule is present."
    assert prompts("original")[1][9] == "Lung nodule is not present."


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("Not given.", ""),
        ("A \"thin\" (5 mm) 'line'. Not given.", "A thin 5 mm line."),
        ("Given: nothing.", "Given: nothing."),  # only the exact phrase goes
    ],
)
def test_clean_report(raw, clean):
    assert clean_report(raw) == clean


def test_ids_are_framed_padded_and_cut():
    words = build_words(["alpha beta alpha"], ["beta gamma"], vocab_size=10, text_length=5)
    assert words.vocabulary == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "alpha", "beta", "gamma")
    ids = words.encode(["Alpha!", "zeta, beta", "", "alpha beta gamma alpha beta"])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [[2, 4, 3, 0, 0], [2, 1, 5, 3, 0], [2, 3, 0, 0, 0], [2, 4, 5, 6, 3]])


def test_the_vocabulary_depends_on_the_texts_and_not_on_their_order():
    reports = ["b a c", "c a", "d d d"]
    first = build_words(reports, ["a"], 20, 8)
    assert first.vocabulary[4:] == ("a", "d", "c", "b")  # a and d three times: by alphabet
    assert build_words(reports[::-1], ["a"], 20, 8) == first
    assert build_words([*reports, "b b b"], ["a"], 20, 8) != first
    assert pickle.loads(pickle.dumps(first)).encode(["b d"]).tolist() == first.encode(["b d"]).tolist()


def test_a_bounded_vocabulary_keeps_every_prompt_word():
    reports = ["common " * 50 + "frequent " * 40 + "rare"]
    room = len(PROMPT_WORDS) + 4 + 1
    words = build_words(reports, EVERY_PROMPT, room, 32)
    assert words.vocab_size == room
    assert set(words.vocabulary) >= PROMPT_WORDS
    assert "common" in words.vocabulary
    assert "frequent" not in words.vocabulary
    assert not (words.encode(EVERY_PROMPT) == 1).any()
    assert (words.encode(["rare"]) == 1).any()


def test_prompts_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"data\.vocab_size=20: the prompts alone need \d+ entries"):
        build_words([], EVERY_PROMPT, 20, 32)
    with pytest.raises(UserError, match=r"data\.text_length=6: the longest prompt has \d+ tokens"):
        build_words([], EVERY_PROMPT, 128, 6)


@pytest.fixture
def vocab(tmp_path):
    pieces = [
        "[PAD]",
        "[unused0]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "lung",
        "no",
        "##dule",
        "there",
        "is",
    ]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n")
    return path


def test_wordpiece_splits_words_and_frames_them(vocab):
    pytest.importorskip("tokenizers", reason="the tokenizers package is not installed")
    tokenizer = open_wordpiece(str(vocab), 11, 6)
    np.testing.assert_array_equal(
        tokenizer.encode(["Lung nodule", "xyz", "there is no lung lung lung"]),
        [[3, 6, 7, 8, 4, 0], [3, 2, 4, 0, 0, 0], [3, 9, 10, 7, 6, 4]],
    )
    assert tokenizer.vocab_size == 11
    again = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(again.encode(["lung"]), tokenizer.encode(["lung"]))


def test_a_missing_tokenizers_package_is_named(vocab, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        open_wordpiece(str(vocab), 11, 6)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: "", r"data\.vocab_file is empty"),
        (lambda p: str(p) + ".gone", r"data\.vocab_file=.*vocab\.txt\.gone: no such file"),
        (lambda p: p.write_text(p.read_text().replace("[CLS]\n", "")) and str(p), r"has no line \[CLS\]"),
        (lambda p: p.write_text("lung2\n" + p.read_text()) and str(p), r"line 1 is 'lung2'"),
        (
            lambda p: p.write_text(p.read_text() + "more\n") and str(p),
            r"data\.vocab_size=11: .* has 12 pieces",
        ),
    ],
)
def test_a_bad_vocab_file_is_refused(vocab, change, message):
    with pytest.raises(UserError, match=message) as caught:
        open_wordpiece(change(vocab), 11, 6)
    assert "\n" not in str(caught.value)
