"""A table of rich's as plain text. Imports rich when it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

WIDE = 10_000  # characters, in which any table has room


def as_text(table: Table, width: int = WIDE) -> str:
    """A table without colours and empty lines: what reads it may be a pipe.

    Args:
        table: to be shown.
        width: characters; default: as wide as the table is.
    """
    from rich.console import Console

    console = Console(width=width, color_system=None, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip())
