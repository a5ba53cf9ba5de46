"""A step benchmark on disk and in a terminal. What it says is made in `analysis.report.timings`.

step_<hardware>.json        all samples, and what they come to
step_<hardware>.md          the tables
step_<hardware>.{png,svg}   the ratio of each arm to the baseline, with its interval
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxablate import disk
from jaxablate.analysis.benchmarks import StepBenchmark, slug
from jaxablate.analysis.report import plain, timings
from jaxablate.analysis.report.figures import render
from jaxablate.errors import UserError


def text(found: StepBenchmark) -> str:
    """The tables as plain text."""
    return plain.text(timings.document(found)).rstrip()


def write(found: StepBenchmark, where: Path) -> tuple[Path, ...]:
    """Writes the files into the directory `where`, each as a whole, and returns them; the JSON is the first.

    A benchmark of the same study on the same hardware is replaced.

    Raises:
      UserError: it cannot be written.
    """
    stem = f"step_{slug(found.hardware)}"
    disk.make_private(where)
    contents = {"md": plain.markdown(timings.document(found)).encode()}
    if plan := timings.figure(found, timings.default_colors(found)):
        drawn = render(plan)
        contents |= {"png": drawn.png, "svg": drawn.svg}
        contents["md"] += f"\n![{drawn.alt}]({stem}.png)\n".encode()
    try:
        disk.write_json(where / f"{stem}.json", dataclasses.asdict(found))
        for form, content in contents.items():
            disk.write_bytes(where / f"{stem}.{form}", content)
    except OSError as error:
        raise UserError(f"{where}: cannot be written: {error.strerror}; choose another --out") from None
    return tuple(where / f"{stem}.{form}" for form in ("json", *contents))
