"""What a study adds to its report, by a function of its own that it names in `Study.extra_report`."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from jaxablate.analysis.findings import Analysis
from jaxablate.analysis.report.document import FORMS, Block, Image, Link, Links, Pictures
from jaxablate.analysis.results import Results
from jaxablate.errors import UserError


@dataclass(frozen=True)
class Extra:
    """A file of the study's own.

    Attributes:
      path: in the folder that the function was given, or in its subfolder `figures`.
      what: the caption of a picture, and of another file the words beside its link.
      alt: of a picture, for who cannot see it.
    """

    path: Path
    what: str = ""
    alt: str = ""


# Writes files into a folder, which has a subfolder `figures`, and says which: by their paths alone, or in words.
# Tables and texts that stand on the page itself, before the pictures, are among them in their order; an `Alert` goes
# to the top of the page.
ExtraReport = Callable[[Results, Analysis, Path], Sequence[Path | Extra | Block]]


@dataclass(frozen=True)
class Own:
    """The study's own part of a report: files by name below it, and the blocks that show and link them."""

    files: dict[str, bytes]
    blocks: tuple[Block, ...]


def read(results: Results, analysis: Analysis) -> Own:
    """The study's own part; its files are published together with the report's.

    Pictures are shown, of one in several forms the first; everything else is linked.

    Raises:
      UserError: the function cannot be found, or names a file outside of the folder that it was given.
    """
    name = results.study.extra_report
    if not name:
        return Own({}, ())
    write = _function(name)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "figures").mkdir()
        given = [Extra(one) if isinstance(one, Path) else one for one in write(results, analysis, folder)]
        texts = [one for one in given if not isinstance(one, Extra)]
        written = [one for one in given if isinstance(one, Extra)]
        if odd := [one.path for one in written if one.path.parent not in (folder, folder / "figures")]:
            raise UserError(
                f"study: extra_report='{name}': wrote {odd[0]}; it may write into its folder alone"
            )
        by_name = {one.path.relative_to(folder).as_posix(): one for one in written}
        files = {name: one.path.read_bytes() for name, one in by_name.items()}
    shown = dict(_shown(by_name))
    images = tuple(
        Image(name, one.alt or one.what or PurePosixPath(name).stem, one.what, files[name])
        for name, one in shown.items()
    )
    links = tuple(
        Link(name, one.what or "of this study alone") for name, one in by_name.items() if name not in shown
    )
    blocks = (*texts, Pictures(images) if images else None, Links(links) if links else None)
    return Own(files, tuple(block for block in blocks if block is not None))


def _shown(files: dict[str, Extra]) -> Iterator[tuple[str, Extra]]:
    """The pictures, each in one form."""
    seen: set[PurePosixPath] = set()
    for name, one in files.items():
        path = PurePosixPath(name)
        if path.suffix.lower() in FORMS and path.with_suffix("") not in seen:
            seen.add(path.with_suffix(""))
            yield name, one


def _function(name: str) -> ExtraReport:
    module_name, _, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # the study's own module lacks a dependency: that traceback is worth seeing
        raise UserError(
            f"study: extra_report='{name}': no module '{error.name}'; is it on PYTHONPATH?"
        ) from None
    found: Any = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"study: extra_report='{name}': {module_name} has no function '{function}'")
    return cast(ExtraReport, found)
