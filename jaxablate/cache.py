"""Files that appear whole or not at all, and are known by what is in them.

A builder works under a name of its own and one rename makes the result visible. Of several processes that need
the same folder one builds it while the others wait. Where the file system has no locks they all build, and one of
the results stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jaxablate.disk import locked, write_bytes

log = logging.getLogger(__name__)

DIGESTS = "digests.json"


def fingerprint(*parts: object) -> str:
    """32 hex digits of JSON-serialisable parts; equal parts give equal digits on every machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _scratch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")


def npy_bytes(array: npt.NDArray[np.generic]) -> bytes:
    """An array in .npy format."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def keep(folder: Path, suffix: str, content: bytes) -> Path:
    """Store `content` under its own digest and return the path; a damaged copy is replaced."""
    path = folder / f"{hashlib.sha256(content).hexdigest()[:32]}{suffix}"
    if path.is_file() and path.read_bytes() == content:
        return path
    if path.exists():
        log.warning("%s is damaged; writing it again", path)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)
    return path


def built_folder(folder: Path, build: Callable[[Path], None]) -> dict[str, str]:
    """Make sure `folder` holds what `build` writes, undamaged; return {file name: digest}.

    `build(scratch)` fills an empty folder. It runs when `folder` is not there or when a file no longer
    has the digest recorded at its making (which is logged), and in one process at a time.
    """
    if (digests := _read_digests(folder)) is not None:
        return digests
    with _alone(folder):
        if (digests := _read_digests(folder)) is not None:  # another process has built it meanwhile
            return digests
        if folder.exists():
            log.warning("%s is damaged; building it again", folder)
        return _build(folder, build)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process at a time be here for `folder`. The kernel frees the lock of one that is killed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    with contextlib.ExitStack() as held:
        while True:
            fd = held.enter_context(path.open("ab")).fileno()
            try:
                held.enter_context(locked(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
            except BlockingIOError:
                log.info("waiting for the process that builds %s", folder)
                held.enter_context(locked(fd))
            if _is_at(path, fd):
                break
            held.close()  # whoever had it has removed it
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _is_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _build(folder: Path, build: Callable[[Path], None]) -> dict[str, str]:
    scratch = _scratch(folder)
    scratch.mkdir()
    try:
        build(scratch)
        digests = {path.name: file_digest(path) for path in sorted(scratch.iterdir())}
        write_bytes(scratch / DIGESTS, json.dumps(digests, indent=1).encode())
        _put(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    final = _read_digests(folder)
    if final is None:
        raise OSError(f"{folder}: damaged as soon as written; check the disk")
    return final


def _put(scratch: Path, folder: Path) -> None:
    while True:
        try:
            os.rename(scratch, folder)
            return
        except OSError:
            if not folder.exists():
                raise
        if _read_digests(folder) is not None:  # another process was first, and did well
            return
        aside = _scratch(folder)
        try:
            os.rename(folder, aside)
        except FileNotFoundError:  # another process moved it first
            continue
        shutil.rmtree(aside, ignore_errors=True)


def _read_digests(folder: Path) -> dict[str, str] | None:
    """The recorded digests if every file still has its own, else None."""
    try:
        digests = json.loads((folder / DIGESTS).read_text())
        if all(file_digest(folder / name) == digest for name, digest in digests.items()):
            return digests
    except (OSError, ValueError, AttributeError):
        pass
    return None
