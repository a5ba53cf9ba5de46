"""Files that outlive a kill: JSON and rows of JSON, whole or not there at all; directories that others cannot read.

Standard library only, so that `status` and `report` start at once on a login node. Two promises:

* a file written with `write_json` is the old one or the new one, never half of each;
* a row written with `append_jsonl` is there or not; the torn line that a kill can leave at the very end of
  a file is reported by `read_jsonl` and removed by the next append.

JSON has no NaN and no infinity (RFC 8259), so both are written as `null`, in every file of this module.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxablate.errors import UserError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_STRAY_AFTER_S = 600.0


# ---------------------------------------------------------------------------------------------- JSON


def plain(value: object) -> Any:
    """`value` as JSON can hold it: non-finite floats become None, tuples lists, array scalars numbers.

    A scalar of another library (numpy, jax) is recognised by its `.item()`, so that none is imported here.
    Raises TypeError for what has no JSON form, and for keys that are not strings.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"a JSON key must be a string, not {odd[0]!r}")
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", 0) == 0:
        return plain(item())
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def _fsync_directory(path: Path) -> None:
    """Make a rename in `path` survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as err:  # some network file systems refuse to sync a directory; the rename itself held
        if err.errno not in (errno.EINVAL, *_NO_LOCKS):
            raise
    finally:
        os.close(fd)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace `path` by `data` atomically: temp file beside it, fsync, rename, fsync of the directory.

    A process killed at any instant leaves the old file, or the new one. What it may also leave is a
    `.<name>.<random>.tmp`, which `sweep` removes once it is old.
    """
    path = Path(path)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp)
        raise
    _fsync_directory(path.parent)


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed writers left, if they are too old for anybody to be writing them."""
    for stray in folder.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - stray.stat().st_mtime > _STRAY_AFTER_S:
                stray.unlink()


def write_json(path: str | os.PathLike[str], obj: object) -> None:
    """Write `obj` as indented JSON, atomically (see `write_bytes`); NaN and infinities become null."""
    text = json.dumps(plain(obj), indent=2, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_STRICT = json.JSONDecoder(parse_constant=_no_constant)  # once: json.loads would make one for every row


def _loads(data: bytes) -> Any:
    """Parse strict JSON. Raises ValueError, whatever is wrong with `data`."""
    try:
        return _STRICT.decode(data.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file. Raises UserError when it is missing, unreadable or not JSON."""
    try:
        return _loads(Path(path).read_bytes())
    except OSError as err:
        raise UserError(f"{path}: cannot be read: {err.strerror}") from None
    except ValueError as err:
        raise UserError(f"{path}: not valid JSON ({err}); restore the file or delete it") from None


# ------------------------------------------------------------------------------------------ JSON lines


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One row as one line of JSON, with its newline. Keys keep their order; floats are Python's repr."""
    return (json.dumps(plain(row), allow_nan=False) + "\n").encode()


def open_append(path: str | os.PathLike[str]) -> int:
    """A file descriptor for `write_row`; the caller closes it. Creates the file if need be."""
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)


def write_row(fd: int, line: bytes) -> None:
    """Append one whole line with a single `os.write`; raise OSError, and leave nothing, if it does not fit.

    With O_APPEND and one write the lines of several writers never interleave. A full disk can accept a part
    of the line: that part is taken back, so the file stays readable and the run resumable.
    """
    written = os.write(fd, line)
    if written != len(line):
        with contextlib.suppress(OSError):
            os.ftruncate(fd, os.fstat(fd).st_size - written)
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({written} of {len(line)} bytes written)")


def _committed(data: bytes) -> tuple[int, bool]:
    """(bytes up to the end of the last whole row, whether that row only lacks its newline)."""
    end = data.rfind(b"\n") + 1
    if end < len(data) and parse_row(data[end:]) is not None:
        # A row ends with the brace that closes it, so it is whole even when its newline is missing.
        return len(data), True
    return end, False


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line holds; None if it holds anything else."""
    try:
        row = _loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


@contextlib.contextmanager
def locked(fd: int, how: int = fcntl.LOCK_EX) -> Iterator[bool]:
    """Hold a flock on `fd`, exclusive by default; yields False where the file system has no locks.

    Raises BlockingIOError if `how` has LOCK_NB and another has the lock.
    """
    try:
        fcntl.flock(fd, how)
    except OSError as err:
        if err.errno not in _NO_LOCKS:
            raise
        yield False
        return
    try:
        yield True
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def append_jsonl(path: str | os.PathLike[str], row: Mapping[str, Any], *, sync: bool = False) -> None:
    """Append one row as one line. `sync` makes it survive a power cut as well as a kill.

    A torn line that a killed writer left at the end is cut off first; otherwise the new row would be glued
    to it and both would be lost.
    """
    fd = open_append(path)
    try:
        with locked(fd):
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                end, lacks_newline = _committed(os.pread(fd, size, 0))
                if lacks_newline:
                    write_row(fd, b"\n")
                else:
                    os.ftruncate(fd, end)
            write_row(fd, encode_row(row))
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def read_jsonl(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], bool]:
    """(rows, torn): the rows of a file, and whether a torn last line was left out. No file is no rows.

    Torn means: the end of the file, without a newline, and not a whole row. A line that is broken in any
    other way was not made by a kill, and raises UserError naming the file and the line.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return [], False
    except OSError as err:
        raise UserError(f"{path}: cannot be read: {err.strerror}") from None
    end, _ = _committed(data)
    rows = []
    for number, line in enumerate(data[:end].split(b"\n"), start=1):
        if not line.strip():
            continue
        row = parse_row(line)
        if row is None:
            raise UserError(
                f"{path}:{number}: not a JSON object: {line[:60].decode(errors='replace')!r}; "
                f"the file is damaged, delete that line or restore the file"
            )
        rows.append(row)
    return rows, end < len(data)


# ----------------------------------------------------------------------------------------- directories


def make_private(path: str | os.PathLike[str]) -> None:
    """Create a directory and its missing parents for the owner alone (0700); existing ones stay as they are.

    The default of `os.makedirs` gives parents the umask's mode, which on most sites lets everyone read.
    Raises UserError when that is not possible.
    """
    path = Path(path)
    missing = [p for p in (path, *path.parents) if not p.exists()]
    try:
        for parent in reversed(missing):
            parent.mkdir(mode=0o700, exist_ok=True)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as err:
        raise UserError(
            f"{path}: cannot create the directory: {err.strerror}; choose another workdir"
        ) from None
