"""What goes wrong through no fault of the program."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line that names the field, the value and the fix.

    `main` and `cli` print it and exit with code 2; nothing else catches it.
    """


def suggestion(word: str, valid: Iterable[str]) -> str:
    """`"did you mean 'x'?"` for the nearest valid word, else the list of valid ones."""
    names = sorted(valid)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(names)}"
