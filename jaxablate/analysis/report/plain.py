"""The report as Markdown, for GitHub, and as plain text, for a terminal or a log."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from jaxablate.analysis.report.document import (
    Alert,
    Block,
    Cell,
    Document,
    Image,
    Links,
    Paragraph,
    Pictures,
    Points,
    Section,
    Table,
)

if TYPE_CHECKING:
    from rich.console import Console

TEXT_WIDTH = 120
IN_TEXT = ("summary", "verdicts", "arms", "ranking", "effects", "contrasts", "speed", "time", "divergence",
           "instability", "rates", "expectations", "own")  # fmt: skip

# ---------------------------------------------------------------------------------------- Markdown


def markdown(document: Document) -> str:
    """GitHub's Markdown; figures are links to the files beside it."""
    parts = [f"# {_md(document.title)}", _md(document.subtitle)]
    for section in document.sections:
        parts.append(f"## {_md(section.title)}")
        parts += [text for block in section.blocks if (text := _md_block(block))]
    return "\n\n".join(parts) + "\n"


def _md(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*|\[\]~$])", r"\\\1", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # within a word it is plain
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", re.sub(r"^([#+=-])(?=\s|$|[#=-])", r"\\\1", text))


def _md_block(block: Block) -> str:
    match block:
        case Paragraph():
            return f"**{_md(block.text)}**" if block.look == "lead" else _md(block.text)
        case Points():
            return "\n".join(
                f"- **{_md(p.tag)}**: {_md(p.text)}" if p.tag else f"- {_md(p.text)}" for p in block.points
            )
        case Alert():
            return "\n".join(
                [f"> **{_md(block.title)}**", ">", *(f"> - {_md(item)}" for item in block.items)]
            )
        case Table():
            return _md_table(block)
        case Pictures():
            return "\n\n".join(
                f"![{_md(d.alt)}]({d.path if isinstance(d, Image) else f'figures/{d.name}.png'})\n\n*{_md(d.caption)}*"
                for d in block.drawn
            )
        case Links():
            return "\n".join(f"- [{_md(link.path)}]({link.path}): {_md(link.what)}" for link in block.links)


def _md_table(table: Table) -> str:
    rule = ["---" if column.kind == "words" else "---:" for column in table.columns]
    rows = [" | ".join(_md(column.name) for column in table.columns), " | ".join(rule)]
    rows += [" | ".join(_md(_joined(cell)) for cell in row) for row in table.rows]
    grid = "\n".join(f"| {row} |" for row in rows) + f"\n\n{_md(table.caption)}"
    return f"### {_md(table.title)}\n\n{grid}" if table.title else grid


def _joined(cell: Cell) -> str:
    if not cell.note:
        return cell.text
    note = cell.note if cell.note.startswith("(") else f"({cell.note})"
    return f"{cell.text} {note}"


# -------------------------------------------------------------------------------------- plain text


def text(document: Document, width: int = TEXT_WIDTH) -> str:
    """Summary, verdicts, arms, effects and the rest of the tables, in lines of at most `width` characters."""
    from rich.console import Console

    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, highlight=False, markup=False, emoji=False)
    console.print(document.title)
    console.print("=" * min(len(document.title), width))
    console.print(document.subtitle)
    for section in document.sections:
        if section.key in IN_TEXT:
            _text_section(console, section)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _text_section(console: Console, section: Section) -> None:
    blocks = [block for block in section.blocks if not isinstance(block, Pictures | Links)]
    if not blocks:
        return
    console.print(f"\n{section.title}")
    console.print("-" * len(section.title))
    for block in blocks:
        match block:
            case Paragraph():
                console.print(block.text)
            case Points():
                for point in block.points:
                    console.print(f"  {point.tag + ': ' if point.tag else ''}{point.text}")
            case Alert():
                console.print(f"\n{block.title.upper()}")
                for item in block.items:
                    console.print(f"  ! {item}")
            case Table():
                _text_table(console, block.without("page"))


def _text_table(console: Console, table: Table) -> None:
    from rich import box
    from rich.table import Table as Grid

    console.print(f"\n{table.title}" if table.title else "")
    for part, widths, breaks in _fitted(table, console.width):
        grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
        for column, wide in zip(part.columns, widths, strict=True):
            justify = "left" if column.kind == "words" else "right"
            grid.add_column(_wrapped(column.name, wide, breaks), justify=justify, width=wide, overflow="fold")
        for row in part.rows:
            cells = zip(_printed(row), widths, strict=True)
            grid.add_row(*(_wrapped(cell, wide, breaks) for cell, wide in cells))
        console.print(grid)
        if part is not table:
            console.print()
    console.print(table.caption)


# Where a line of a cell may end: after a blank, and where that is not enough also within a name.
_BLANKS, _NAMES = re.compile(r"(?<=\s)"), re.compile(r"(?<=[\s_/])")
_GAP = 3  # characters between columns


def _printed(row: Sequence[Cell]) -> list[str]:
    """A note in the first column, which is never broken, would push the others out."""
    return [cell.text + (f"\n{cell.note}" if cell.note and i else "") for i, cell in enumerate(row)]


def _fitted(table: Table, width: int) -> Iterator[tuple[Table, list[int], re.Pattern[str]]]:
    """The table, or parts of its columns behind the first one, with widths that fit, and where lines may end."""
    columns = list(zip(*([c.name for c in table.columns], *map(_printed, table.rows)), strict=True))
    whole = [max(len(line) for cell in column for line in cell.split("\n")) for column in columns]
    for breaks in (_BLANKS, _NAMES):
        least = [whole[0], *(max(map(len, _pieces(column, breaks))) for column in columns[1:])]
        if (widths := _widths(least, whole, width)) is not None:
            yield table, widths, breaks
            return
    taken = [0]
    for i in range(1, len(columns)):
        if (
            len(taken) > 1
            and _widths([least[k] for k in (*taken, i)], [whole[k] for k in (*taken, i)], width) is None
        ):
            yield _part(table, taken, least, whole, width)
            taken = [0]
        taken.append(i)
    yield _part(table, taken, least, whole, width)


def _part(
    table: Table, taken: Sequence[int], least: Sequence[int], whole: Sequence[int], width: int
) -> tuple[Table, list[int], re.Pattern[str]]:
    """Some of the columns."""
    low, high = [least[k] for k in taken], [whole[k] for k in taken]
    rows = tuple(tuple(row[k] for k in taken) for row in table.rows)
    part = replace(table, columns=tuple(table.columns[k] for k in taken), rows=rows)
    return part, _widths(low, high, width) or low, _NAMES


def _widths(least: Sequence[int], whole: Sequence[int], width: int) -> list[int] | None:
    """Of columns beside each other: the wider ones are cut, to one width if they can be. None: they do not fit."""
    room = width - _GAP * (len(whole) - 1)
    for most in range(max(whole), 0, -1):
        found = [min(max(most, low), high) for low, high in zip(least, whole, strict=True)]
        if sum(found) <= room:
            return found
    return None


def _pieces(texts: Iterable[str], breaks: re.Pattern[str]) -> list[str]:
    return [piece.rstrip() for text in texts for piece in breaks.split(text)]


def _wrapped(text: str, width: int, breaks: re.Pattern[str]) -> str:
    """Its lines, each broken as late as it can be."""
    lines: list[str] = []
    for line in text.split("\n"):
        lines.append("")
        for piece in breaks.split(line):
            if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
                lines.append("")
            lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)
