"""What goes wrong through no fault of the program."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line that names the field, the value and the fix.

    `main` and `cli` print it and exit with code 2; nothing else catches it. Values come from anywhere, so line
    breaks and what else a terminal would not print as it is are escaped.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class StorageError(UserError):
    """The disk is full, broken or may not be written. What was saved before is still there."""


STORAGE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
)


def is_storage(error: BaseException) -> bool:
    """Whether an error says that files cannot be written, which is no fault of the program's or the run's."""
    return isinstance(error, OSError) and error.errno in STORAGE


def suggestion(word: str, valid: Iterable[str]) -> str:
    """`"did you mean 'x'?"` for the nearest valid word, else the list of valid ones."""
    names = sorted(valid)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(names)}"
