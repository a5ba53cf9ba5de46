"""The report as Markdown, for GitHub, and as plain text, for a terminal or a log."""

from __future__ import annotations

import io
import re
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
           "instability", "rates", "expectations")  # fmt: skip

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


def text(document: Document) -> str:
    """Summary, verdicts, arms, effects and the rest of the tables, at most 120 characters wide."""
    from rich.console import Console

    buffer = io.StringIO()
    console = Console(
        file=buffer, width=TEXT_WIDTH, color_system=None, highlight=False, markup=False, emoji=False
    )
    console.print(document.title)
    console.print("=" * min(len(document.title), TEXT_WIDTH))
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

    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for i, column in enumerate(table.columns):
        justify = "left" if column.kind == "words" else "right"
        grid.add_column(column.name, justify=justify, overflow="fold", no_wrap=i == 0)
    for row in table.rows:
        # A note in the first column, which is never broken, would push the others out.
        grid.add_row(*(c.text + (f"\n{c.note}" if c.note and i else "") for i, c in enumerate(row)))
    console.print(f"\n{table.title}" if table.title else "")
    console.print(grid)
    console.print(table.caption)
