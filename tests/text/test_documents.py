"""Text files: in pieces or whole, the documents and their ids are the same; what is no text is named by its byte."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxablate.errors import UserError
from jaxablate.text.documents import pieces
from jaxablate.text.tokenizer import END_OF_TEXT, Vocabulary

# What a cut could go wrong in: characters of several bytes, separators and their beginnings, blanks of all
# kinds, what GPT-2's word splitter looks at.
SCRAPS = [
    "a",
    "bc",
    "é",
    "🎉",
    "7",
    "42",
    ".",
    "'s",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u3000",
    "\x1c",
]
SCRAPS += [END_OF_TEXT, "<|endof", "text|>", "<|", "|>"]
TEXTS = st.lists(st.sampled_from(SCRAPS), max_size=60).map("".join)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents") / "text.txt"


@pytest.fixture(scope="module")
def bpe() -> Vocabulary:
    return Vocabulary.train(["".join(p) for p in itertools.permutations(SCRAPS, 2)], 400, "bpe")


def documents(path: Path, separator: str = END_OF_TEXT, chunk: int = 1 << 16) -> list[str]:
    """Whole ones, from their pieces; blank ones are left out."""
    found = [""]
    for piece in pieces(path, separator, chunk):
        found[-1] += piece.text
        found += [""] if piece.followed_by == "separator" else []
    return [document for document in found if document.strip()]


def split(text: str) -> list[str]:
    return [document for document in text.split(END_OF_TEXT) if document.strip()]


@given(TEXTS, st.integers(1, 40))
def test_documents_are_the_same_in_whatever_chunks_they_are_read(file, text, chunk):
    file.write_bytes(text.encode())
    if not text.strip():
        with pytest.raises(UserError, match="is empty"):
            documents(file, chunk=chunk)
    else:
        assert documents(file, chunk=chunk) == split(text)


@given(TEXTS.filter(str.strip), st.integers(1, 40))
def test_pieces_have_the_ids_of_the_whole(file, bpe, text, chunk):
    file.write_bytes(text.encode())
    ids: list[int] = []
    for piece in pieces(file, chunk=chunk):
        ids += bpe.encode([piece.text])[0].tolist()
        ids += [bpe.end_of_text] if piece.followed_by == "separator" else []
    assert ids == bpe.encode([text])[0].tolist()


def test_pieces_cut_anywhere_would_have_other_ids(bpe):
    ids = bpe.encode(["bcbc42bc", "bcbc4", "2bc", "bc ", "  bc", "bc   bc"])
    whole, first, second, third, fourth, apart = (i.tolist() for i in ids)
    assert whole != first + second, "within a word"
    assert apart != third + fourth, "within blanks"


@given(TEXTS.filter(str.strip), st.integers(1, 40), st.data())
def test_reading_goes_on_behind_any_piece(file, text, chunk, data):
    file.write_bytes(text.encode())
    whole = list(pieces(file, chunk=chunk))
    done = data.draw(st.integers(0, len(whole)))
    start = whole[done - 1].end if done else 0
    rest = list(pieces(file, chunk=chunk, start=start))
    assert "".join(p.text + END_OF_TEXT * (p.followed_by == "separator") for p in whole[:done] + rest) == text
    assert whole[-1].end == len(text.encode())


def test_pieces_are_short_however_long_the_document(file):
    file.write_text("word " * 100_000)
    assert max(len(piece.text) for piece in pieces(file, chunk=1000)) <= 2000
    assert len(documents(file, chunk=1000)) == 1


def test_any_separator_will_do(file):
    file.write_text("One.\n\nTwo\nlines.\n\n\n\nThree.\n")
    for chunk in range(1, 30):
        assert documents(file, "\n\n", chunk) == ["One.", "Two\nlines.", "Three.\n"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n\t", "is empty"),
        (b"some text\0\0\1", "byte 9 is no UTF-8"),
        (b"caf\xe9 au lait", "byte 3 is no UTF-8"),
        ("🎉".encode()[:3], "byte 0 is no UTF-8"),
        (b"ok \xc3\xa9 " * 20 + b"\xf0\x9f\x8e", "byte 120 is no UTF-8"),
        (b"a" * 20 + b"\xc3" + b"b", "byte 20 is no UTF-8"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 5, 7, 1 << 16])
def test_what_is_no_text_is_said_with_its_byte(file, content, message, chunk):
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"text\.txt: {message}"):
        documents(file, chunk=chunk)


def test_no_file_and_no_blanks_are_said(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        documents(tmp_path / "missing.txt")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        documents(tmp_path)
    (tmp_path / "base64.txt").write_bytes(b"x" * (5 << 20))
    with pytest.raises(UserError, match=r"no blank in the \d+ characters from byte 0 on"):
        documents(tmp_path / "base64.txt")


def test_a_real_text_in_pieces(shared, file):
    path = shared / "data" / "text" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip(f"no {path} (optional sample data)")
    text = path.read_text()
    assert Vocabulary.train(documents(path), 1000, "char").size == 65 + 1
    file.write_text(text[:200_000])
    vocabulary = Vocabulary.train((piece.text for piece in pieces(file)), 1000, "bpe")
    assert vocabulary.fingerprint == Vocabulary.train([text[:200_000]], 1000, "bpe").fingerprint
    ids = [i for piece in pieces(file) for i in vocabulary.encode([piece.text])[0].tolist()]
    assert ids == vocabulary.encode([text[:200_000]])[0].tolist()
