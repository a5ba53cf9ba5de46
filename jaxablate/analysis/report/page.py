"""The report as one HTML file: styles and figures inside, nothing fetched, readable from 320 px wide and on paper."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from importlib import resources
from pathlib import PurePosixPath

from jaxablate.analysis.report.document import (
    FORMS,
    Alert,
    Block,
    Cell,
    Column,
    Document,
    Image,
    Links,
    Paragraph,
    Pictures,
    Points,
    Section,
    Table,
)
from jaxablate.analysis.report.figures import Drawn

SVG_UP_TO = 400_000  # bytes; a heavier figure is shown as PNG


def render(document: Document) -> str:
    """The page. All text is escaped: names of studies, arms and levels are data."""
    css = resources.files("jaxablate.analysis.report").joinpath("report.css").read_text(encoding="utf-8")
    contents = "".join(f'<li><a href="#{s.key}">{_text(s.title)}</a></li>' for s in document.sections)
    body = "\n".join(map(_section, document.sections))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{_text(document.title)}</title>
<style>
{css}
</style>
</head>
<body>
<header>
<h1>{_text(document.title)}</h1>
<p class="subtitle">{_text(document.subtitle)}</p>
</header>
<nav aria-label="Contents"><ol>{contents}</ol></nav>
<main>
{body}
</main>
</body>
</html>
"""


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _section(section: Section) -> str:
    blocks = "\n".join(map(_block, section.blocks))
    return f'<section id="{section.key}">\n<h2>{_text(section.title)}</h2>\n{blocks}\n</section>'


def _block(block: Block) -> str:
    match block:
        case Paragraph():
            look = f' class="{block.look}"' if block.look else ""
            return f"<p{look}>{_text(block.text)}</p>"
        case Points():
            return _points(block)
        case Alert():
            items = "".join(f"<li>{_text(item)}</li>" for item in block.items)
            return f'<aside class="alert"><h3>{_text(block.title)}</h3><ul>{items}</ul></aside>'
        case Table():
            return _table(block)
        case Pictures():
            return f'<div class="figures">{"".join(map(_figure, block.drawn))}</div>'
        case Links():
            items = "".join(
                f'<li><a href="{_text(link.path)}">{_text(link.path)}</a> <span>{_text(link.what)}</span></li>'
                for link in block.links
            )
            return f'<ul class="files">{items}</ul>'


def _points(points: Points) -> str:
    items = []
    for point in points.points:
        tag = f'<b class="tag {point.tone}">{_text(point.tag)}</b> ' if point.tag else ""
        items.append(f"<li>{tag}<span>{_text(point.text)}</span></li>")
    return f'<ul class="points">{"".join(items)}</ul>'


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{_class(_kind(column))}>{_text(column.name)}</th>' for column in table.columns
    )
    rows = "\n".join(f"<tr>{_row(row, table.columns)}</tr>" for row in table.rows)
    title = _text(table.title)
    read = _class("read" if all(column.kind == "words" for column in table.columns) else "")
    grid = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title or "table"}"><table{read}>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
        f'<p class="caption">{_text(table.caption)}</p>'
    )
    if table.shown == "open":
        return f'<div class="table">{f"<h3>{title}</h3>" if title else ""}{grid}</div>'
    return f'<details class="table"><summary>{title or "Table"}, {len(table.rows)} rows</summary>{grid}</details>'


def _kind(column: Column) -> str:
    return "n" if column.kind == "number" else ""


def _row(row: Sequence[Cell], columns: Sequence[Column]) -> str:
    cells = []
    for i, (cell, column) in enumerate(zip(row, columns, strict=True)):
        tag, scope = ("th", ' scope="row"') if i == 0 else ("td", "")
        classes = " ".join(c for c in (_kind(column), cell.tone, _long(cell.text, 48)) if c)
        swatch = f'<i class="swatch" style="background:{_text(cell.swatch)}"></i>' if cell.swatch else ""
        text = f"<span>{_text(cell.text)}</span>" if cell.tone else _text(cell.text)
        note = f"<small{_class(_long(cell.note, 30))}>{_text(cell.note)}</small>" if cell.note else ""
        cells.append(f"<{tag}{scope}{_class(classes)}>{swatch}{text}{note}</{tag}>")
    return "".join(cells)


def _long(text: str, limit: int) -> str:
    """Sentences get room to run over several lines; short texts and numbers are never broken."""
    return "long" if len(text) > limit else ""


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def _figure(drawn: Drawn | Image) -> str:
    if isinstance(drawn, Image):
        return _image(drawn)
    form, data = (".svg", drawn.svg) if len(drawn.svg) <= SVG_UP_TO else (".png", drawn.png)
    return (
        f'<figure id="figure-{_text(drawn.name)}"><img src="{_source(form, data)}" alt="{_text(drawn.alt)}">'
        f"<figcaption>{_text(drawn.caption)}</figcaption></figure>"
    )


def _image(image: Image) -> str:
    """It may be wider than those that are drawn for a column, so that it can be opened by itself."""
    source = _source(PurePosixPath(image.path).suffix.lower(), image.data)
    return (
        f'<figure><a href="{_text(image.path)}"><img src="{source}" alt="{_text(image.alt)}"></a>'
        f"<figcaption>{_text(image.caption)}</figcaption></figure>"
    )


def _source(form: str, data: bytes) -> str:
    return f"data:{FORMS[form]};base64,{base64.b64encode(data).decode()}"
