"""Text files, read piece by piece, so that memory stays flat however long they are."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from jaxablate.errors import UserError
from jaxablate.text.tokenizer import END_OF_TEXT

CHUNK = 1 << 16  # bytes read at a time
_LONGEST = 64 * CHUNK  # characters without a blank in them
_BLANKS = " \t\n\r"


class Piece(NamedTuple):
    """A document, or a part of one that is too long to be held whole.

    Args:
      text: without the separator.
      end: the file's bytes up to the end of this piece and of the separator behind it.
      followed_by: what comes next in the file.
    """

    text: str
    end: int
    followed_by: Literal["separator", "more", "end of file"]


def pieces(
    path: str | Path, separator: str = END_OF_TEXT, chunk: int = CHUNK, start: int = 0
) -> Iterator[Piece]:
    """The documents of a UTF-8 file from byte `start` on, which is 0 or the end of a piece.

    A document that is longer than `chunk` comes in pieces, each but the last ending before a blank that
    follows another character. GPT-2's word splitter splits there too, so the ids of the pieces are the ids of
    the document.

    Raises:
      UserError: the file is missing, empty or binary; names the offset of the first byte that is no text.
    """
    held, end = "", start
    for text in _read(path, start, chunk):
        held += text
        *whole, held = held.split(separator)
        for document in whole:
            end += len((document + separator).encode())
            yield Piece(document, end, "separator")
        if len(held) > chunk:
            cut = _last_cut(held, len(held) - len(separator), chunk)
            if cut:
                end += len(held[:cut].encode())
                yield Piece(held[:cut], end, "more")
                held = held[cut:]
            elif len(held) > _LONGEST:
                raise UserError(
                    f"{path}: no blank in the {len(held)} characters from byte {end} on; give a file of text"
                )
    if held:
        yield Piece(held, end + len(held.encode()), "end of file")


def _last_cut(text: str, limit: int, width: int) -> int:
    """The last place up to `limit`, and at most `width` before it, where a blank follows a non-blank; 0 if none."""
    places = range(limit, max(limit - width, 0), -1)
    return next((i for i in places if text[i] in _BLANKS and not text[i - 1].isspace()), 0)


def _read(path: str | Path, start: int, chunk: int) -> Iterator[str]:
    """The file's text from byte `start` on, `chunk` bytes at a time."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            yield from _decoded(path, file, chunk)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give a UTF-8 text file") from None


def _decoded(path: str | Path, file: BinaryIO, chunk: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = file.tell()
    blank = start == 0
    while block := file.read(chunk):
        if (zero := block.find(b"\0")) >= 0:
            raise _binary(path, start + zero)
        pending = len(decoder.getstate()[0])  # bytes of a character that the last block broke off in
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            raise _binary(path, start - pending + error.start) from None
        start += len(block)
        blank = blank and (text.isspace() or not text)
        yield text
    if pending := len(decoder.getstate()[0]):
        raise _binary(path, start - pending)
    if blank:
        raise UserError(f"{path}: is empty; give a UTF-8 text file")


def _binary(path: str | Path, offset: int) -> UserError:
    return UserError(f"{path}: byte {offset} is no UTF-8 text; give a text file, or convert it")
