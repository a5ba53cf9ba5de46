"""What a report consists of, before it is HTML, Markdown or plain text: sections of paragraphs, tables, figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxablate.analysis.report.figures import Drawn

# Pictures that a browser shows: the end of the file's name, and the media type.
FORMS = {".svg": "image/svg+xml", ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}

Tone = Literal["", "good", "bad", "open", "none", "warn"]


@dataclass(frozen=True)
class Cell:
    """One cell of a table. `note` is small print below it; `tone` colours words that say the same without it."""

    text: str
    note: str = ""
    tone: Tone = ""
    swatch: str = ""  # colour of the arm that the cell names


@dataclass(frozen=True)
class Column:
    """The head of a column. Words are read and numbers compared; what is only on the `page` is detail."""

    name: str
    kind: Literal["words", "number"] = "number"
    where: Literal["everywhere", "page"] = "everywhere"


@dataclass(frozen=True)
class Table:
    """A table with a title above and its explanation below."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str
    shown: Literal["open", "folded"] = "open"

    def without(self, where: Literal["page"]) -> Table:
        """The table less the columns that are only there."""
        kept = [i for i, column in enumerate(self.columns) if column.where != where]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return Table(self.title, tuple(self.columns[i] for i in kept), rows, self.caption, self.shown)


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str
    look: Literal["", "lead", "small"] = ""


@dataclass(frozen=True)
class Point:
    """An item of a list; `tag` is a word before it, coloured by `tone`."""

    text: str
    tag: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Points:
    """A list."""

    points: tuple[Point, ...]


@dataclass(frozen=True)
class Alert:
    """What a reader must know before the numbers."""

    title: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class Image:
    """A picture that lies beside the report as a file of this path, with its bytes; one of `FORMS`."""

    path: str
    alt: str
    caption: str
    data: bytes


@dataclass(frozen=True)
class Pictures:
    """Figures, side by side where there is room."""

    drawn: tuple[Drawn | Image, ...]


@dataclass(frozen=True)
class Link:
    """A file beside the report."""

    path: str
    what: str


@dataclass(frozen=True)
class Links:
    """Files beside the report."""

    links: tuple[Link, ...]


Block = Table | Paragraph | Points | Alert | Pictures | Links


@dataclass(frozen=True)
class Section:
    """A part of the report with a heading; `key` is its anchor."""

    key: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """The whole report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
