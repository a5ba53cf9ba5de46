"""Files of token ids: `.npy` arrays of one dimension, or raw uint16 in `.bin`, read through memory maps."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
from pathlib import Path
from tokenize import TokenError
from types import TracebackType

import numpy as np

from jaxablate.disk import locked
from jaxablate.errors import UserError

_RAW = np.dtype("<u2")
_CHECKED_AT_ONCE = 1 << 22


def open_tokens(path: str | Path, *, field: str, vocab_size: int, at_least: int) -> np.memmap:
    """The ids of a file as a read-only memory map (tokens,), every one of them checked.

    Args:
      path: an integer `.npy` array of one dimension, or raw little-endian uint16 in a `.bin`.
      field: whose value `path` is, for messages.
      vocab_size: ids must be below it.
      at_least: how many tokens there must be.

    Raises:
      UserError: the file is missing, torn, of another shape or type, too short, or has an id that is not in
        the vocabulary; says which, and where.
    """
    path = Path(path)
    named = f"{field}={path}"
    ids = _mapped(path, named)
    if ids.ndim != 1 or ids.dtype.kind not in "ui":
        raise UserError(
            f"{named}: holds {ids.dtype} of shape {ids.shape}; token ids are integers in one dimension"
        )
    if len(ids) < at_least:
        raise UserError(
            f"{named}: {len(ids)} tokens, and {at_least} are needed; give a longer file or a shorter context"
        )
    for start in range(0, len(ids), _CHECKED_AT_ONCE):
        part = ids[start : start + _CHECKED_AT_ONCE]
        if part.min() < 0 or part.max() >= vocab_size:
            at = int(np.argmax((part < 0) | (part >= vocab_size)))
            raise UserError(
                f"{named}: id {part[at]} at position {start + at} is not in the vocabulary of {vocab_size}; "
                f"tokenize the text with the study's tokenizer, or set the vocabulary's size to the file's"
            )
    return ids


def _mapped(path: Path, named: str) -> np.memmap:
    if path.suffix not in (".npy", ".bin"):
        raise UserError(f"{named}: is neither .npy nor .bin; `jaxablate data tokenize` makes one of a text")
    try:
        size = path.stat().st_size
        if path.suffix == ".npy":
            return np.lib.format.open_memmap(path, mode="r")
        if size % _RAW.itemsize or not size:
            raise UserError(f"{named}: {size} bytes are no whole number of uint16 ids; write it again")
        return np.memmap(path, dtype=_RAW, mode="r")
    except OSError as error:
        raise UserError(f"{named}: cannot be read: {error.strerror}; give a file of tokens") from None
    except (ValueError, EOFError, TokenError) as error:  # numpy parses a header as Python
        reason = " ".join(str(error).split())
        raise UserError(f"{named}: is torn, or no .npy file ({reason}); write it again") from None


class TokenWriter:
    """Writes a `.npy` of ids bit by bit: to `<path>.part`, which becomes `path` when it is finished.

    From the moment that it is made, no other process can write the file, nor what belongs to it. What `commit`
    has seen survives a kill: another writer that begins with `done` tokens goes on behind them.

    Raises:
      UserError: another process writes the file.
    """

    def __init__(self, path: Path):
        self.path, self.tokens = path, 0
        self._part = part_of(path)
        self._open = contextlib.ExitStack()
        fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._file = self._open.enter_context(os.fdopen(fd, "r+b"))
        try:
            self._lock(fd)
        except BaseException:
            self._open.close()
            raise

    def begin(self, dtype: np.dtype, done: int = 0) -> None:
        """Makes ready for ids of `dtype` behind the `done` tokens that the part is to keep.

        Raises:
          UserError: the part has fewer.
        """
        if written(self.path, dtype) < done:
            raise UserError(f"{self._part}: has fewer than {done} tokens; delete it to start over")
        self.tokens, self._dtype = done, dtype
        header = _header(dtype, 0)
        self._file.write(header)
        self._file.truncate(len(header) + done * dtype.itemsize)
        self._file.seek(0, os.SEEK_END)

    def append(self, ids: np.ndarray) -> None:
        """Adds ids (tokens,) of the file's type."""
        if ids.dtype != self._dtype or ids.ndim != 1:
            raise ValueError(f"{ids.dtype} {ids.shape} into a file of {self._dtype}")
        self._file.write(ids.tobytes())
        self.tokens += len(ids)

    def commit(self) -> int:
        """Brings all tokens to the disk; returns how many there are."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.tokens

    def finish(self) -> None:
        """Makes the part the file."""
        self._file.seek(0)
        self._file.write(_header(self._dtype, self.tokens))
        self.commit()
        os.replace(self._part, self.path)

    def _lock(self, fd: int) -> None:
        try:
            self._open.enter_context(locked(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
            mine = os.path.samestat(os.fstat(fd), os.stat(self._part))
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:  # or it was, until another process finished it a moment ago
            raise UserError(
                f"{self.path}: another process writes it; wait for that one, or choose another --out"
            )

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            if not os.fstat(self._file.fileno()).st_size:  # nothing was begun
                self._part.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(path.name + ".part")


def written(path: Path, dtype: np.dtype) -> int:
    """How many whole tokens `<path>.part` has; 0 if there is none."""
    try:
        size = part_of(path).stat().st_size
    except FileNotFoundError:
        return 0
    return max(size - len(_header(dtype, 0)), 0) // dtype.itemsize


def size_of(dtype: np.dtype, tokens: int) -> int:
    """Bytes of a `.npy` of so many ids."""
    return len(_header(dtype, tokens)) + tokens * dtype.itemsize


def _header(dtype: np.dtype, tokens: int) -> bytes:
    """Of a `.npy` of `tokens` ids. numpy leaves it room to grow: its length does not depend on `tokens`."""
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()
