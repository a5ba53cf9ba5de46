"""Vocabularies: the merges are those of the textbook, every text comes back, nothing is dropped in silence."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxablate.errors import UserError
from jaxablate.text.tokenizer import END_OF_TEXT, Vocabulary

CORPUS = [
    "The cat sat on the mat; the cat's hat was flat.",
    "She'll sell 120 sea-shells by the sea shore,\n\n  she sells 1200   shells, that's sure.\t",
    "déjà vu déjà vécu: été, thé, thé été 🎉🎉 naïve",
    "banana bandana banana, aaaa aaaaa aaaaaa",
] * 2
WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")  # GPT-2's


def byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def textbook_merges(
    documents: list[str], size: int, tie: Callable[[tuple[int, int]], object] = lambda pair: pair
) -> list[tuple[bytes, ...]]:
    """Byte-pair merges, counted anew for each: the most frequent pair, of equals the least by `tie`."""
    shown = byte_characters()
    spelled = [END_OF_TEXT.encode(), *(bytes([b]) for b in sorted(shown, key=lambda b: shown[b]))]
    ids = {token: i for i, token in enumerate(spelled)}
    counted = Counter(word for document in documents for word in WORDS.findall(document))
    words = [([ids[bytes([b])] for b in word.encode()], n) for word, n in counted.items()]
    merges = []
    while len(spelled) < size:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, n in words:
            for pair in itertools.pairwise(word):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], tie(pair)))
        if pairs[best] < 2:
            break
        merges.append((spelled[best[0]], spelled[best[1]]))
        spelled.append(b"".join(merges[-1]))
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [len(spelled) - 1]
                i += 1
    return merges


def merges_of(path: Path) -> list[tuple[bytes, ...]]:
    """The merges in a tokenizer's file."""
    byte = {shown: b for b, shown in byte_characters().items()}
    pairs = json.loads(path.read_text())["model"]["merges"]
    return [tuple(bytes(byte[c] for c in token) for token in pair) for pair in pairs]


@pytest.fixture(scope="module")
def bpe() -> Vocabulary:
    return Vocabulary.train(CORPUS, 320, "bpe")


def test_merges_are_the_textbook_s(tmp_path, bpe):
    bpe.save(tmp_path / "t.json")
    expected = textbook_merges(CORPUS, 320)
    assert len(expected) == 320 - 257
    assert merges_of(tmp_path / "t.json") == expected
    assert expected != textbook_merges(CORPUS, 320, lambda pair: (-pair[0], -pair[1])), "the ties matter"
    assert expected != textbook_merges(CORPUS[1:], 320), "the text matters"


def test_training_ends_where_no_pair_occurs_twice():
    small = Vocabulary.train(["ab ab"], 10_000, "bpe")
    assert small.size == 257 + len(textbook_merges(["ab ab"], 10_000)) < 260


def test_training_twice_gives_the_same(bpe):
    assert Vocabulary.train(iter(CORPUS), 320, "bpe").fingerprint == bpe.fingerprint
    assert Vocabulary.train(CORPUS, 319, "bpe").fingerprint != bpe.fingerprint


@given(st.text())
@example(" \n\n ")
@example(f"{END_OF_TEXT}a{END_OF_TEXT}")
@example("👩‍👩‍👧 \u00a0\r\n\u3000\x00")
def test_every_text_comes_back_from_bytes(text):
    vocabulary = Vocabulary.train(CORPUS, 300, "bpe")
    (ids,) = vocabulary.encode([text])
    assert ids.dtype == np.uint16 and (ids < vocabulary.size).all()
    assert vocabulary.decode(ids) == text


@given(st.text(alphabet="".join(CORPUS)))
def test_every_text_of_its_characters_comes_back(text):
    vocabulary = Vocabulary.train(CORPUS, 1000, "char")
    (ids,) = vocabulary.encode([text])
    assert len(ids) == len(text)
    assert vocabulary.decode(ids) == text


def test_characters_are_the_text_s():
    vocabulary = Vocabulary.train(["cab", "bad"], 100, "char")
    assert vocabulary.size == 1 + len("abcd")
    assert vocabulary.end_of_text == 0
    assert [ids.tolist() for ids in vocabulary.encode(["abcd", f"a{END_OF_TEXT}", ""])] == [
        [1, 2, 3, 4],
        [1, 0],
        [],
    ]


def test_an_unknown_character_is_named():
    vocabulary = Vocabulary.train(["cab"], 100, "char")
    with pytest.raises(UserError, match=r"character 'é' \(U\+00E9\): not among the 3 "):
        vocabulary.encode(["bac", "caé!"])


@pytest.mark.parametrize("level", ["bpe", "char"])
def test_a_file_holds_all_of_a_vocabulary(tmp_path, level):
    vocabulary = Vocabulary.train(CORPUS, 400, level)
    vocabulary.save(tmp_path / "t.json")
    again = Vocabulary.load(tmp_path / "t.json")
    assert (again.fingerprint, again.size, again.end_of_text) == (vocabulary.fingerprint, vocabulary.size, 0)
    for first, second in zip(vocabulary.encode(CORPUS), again.encode(CORPUS), strict=True):
        np.testing.assert_array_equal(first, second)
    assert again.decode(again.encode(CORPUS[2:3])[0]) == CORPUS[2]
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


@pytest.mark.parametrize("level", ["bpe", "char"])
def test_ends_are_where_tokens_end(level):
    vocabulary = Vocabulary.train(CORPUS, 400, level)
    ids, ends = vocabulary.encode(CORPUS), vocabulary.ends(CORPUS)
    for document, own, until in zip(CORPUS, ids, ends, strict=True):
        assert len(own) == len(until) and until[-1] == len(document)
        for i, end in enumerate(until):
            text = vocabulary.decode(own[: i + 1])
            assert text == document[:end] or "\ufffd" in text  # half a character


def test_another_s_tokenizer_adds_nothing(tmp_path):
    """Truncation, padding and special tokens at the ends are for other uses than a stream of documents."""
    other = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[PAD]": 2, "[UNK]": 70_000}, unk_token="[UNK]"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    other.enable_truncation(2)
    other.enable_padding(length=5, pad_id=2)
    other.save(str(tmp_path / "t.json"))
    vocabulary = Vocabulary.load(tmp_path / "t.json")
    (ids,) = vocabulary.encode(["a b b z"])
    assert ids.tolist() == [0, 1, 1, 70_000] and ids.dtype == np.uint32
    assert vocabulary.size == 70_001
    assert vocabulary.end_of_text is None


@pytest.mark.parametrize(
    ("documents", "size", "level", "message"),
    [
        (CORPUS, 256, "bpe", "vocab_size=256: must be 257 or more at level bpe"),
        (["abcd"], 4, "char", "vocab_size=4: the text has 4 characters.* need 5;"),
        ([], 300, "bpe", "no text to train"),
        ([""], 300, "char", "no text to train"),
    ],
)
def test_what_cannot_be_trained_is_said(documents, size, level, message):
    with pytest.raises(UserError, match=message):
        Vocabulary.train(documents, size, level)


def test_the_least_vocabularies_can_be_trained():
    assert Vocabulary.train(CORPUS, 257, "bpe").size == 257
    assert Vocabulary.train(["abcd"], 5, "char").size == 5


def test_errors_of_the_text_come_through():
    def broken():
        yield "some text"
        raise UserError("byte 9 is no text")

    with pytest.raises(UserError, match="byte 9"):
        Vocabulary.train(broken(), 300, "bpe")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"not JSON\n", b"\xff\x00", b'{"version": "1.0", "model": 3}']
)
def test_what_is_no_tokenizer_is_said(tmp_path, content):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="tokenizer's JSON"):
        Vocabulary.load(path)


def test_a_missing_tokenizer_is_said(tmp_path):
    with pytest.raises(UserError, match=r"t\.json: cannot be read"):
        Vocabulary.load(tmp_path / "t.json")
    with pytest.raises(UserError, match="cannot be written"):
        Vocabulary.train(["aa"], 300, "bpe").save(tmp_path / "nowhere" / "t.json")
