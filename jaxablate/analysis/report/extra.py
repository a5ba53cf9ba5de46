"""The files that a study adds to its report, by a function of its own that it names in `Study.extra_report`."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from jaxablate.analysis.findings import Analysis
from jaxablate.analysis.results import Results
from jaxablate.errors import UserError

# Writes files into a folder, which has a subfolder `figures`, and says which.
ExtraReport = Callable[[Results, Analysis, Path], list[Path]]


def files(results: Results, analysis: Analysis) -> dict[str, bytes]:
    """The study's own files, by name below the report; they are published together with the report's.

    Raises:
      UserError: the function cannot be found, or names a file outside of the folder that it was given.
    """
    name = results.study.extra_report
    if not name:
        return {}
    write = _function(name)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "figures").mkdir()
        written = write(results, analysis, folder)
        if odd := [path for path in written if path.parent not in (folder, folder / "figures")]:
            raise UserError(
                f"study: extra_report='{name}': wrote {odd[0]}; it may write into its folder alone"
            )
        return {str(path.relative_to(folder)): path.read_bytes() for path in written}


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
