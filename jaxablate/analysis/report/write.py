"""`jaxablate report`: everything that a researcher reads, written beside the study's runs.

report.html  report.md  ablation_analysis.txt       the same document for a browser, GitHub, a terminal
ablation_comparison.{csv,png}                        a row per run; curves, means and effects on one page
effects.csv  verdicts.csv  analysis.json             the findings for other programs
figures/*.{png,svg,pdf}                              each figure by itself
…                                                    what the study's own `extra_report` adds
tables.tex  numbers.tex  methods.md                  for a paper
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxablate import disk
from jaxablate.analysis import origin, sentences
from jaxablate.analysis.findings import Analysis, Estimate
from jaxablate.analysis.report import (
    comparisons,
    content,
    extra,
    figures,
    overview,
    page,
    paper,
    plain,
    timings,
)
from jaxablate.analysis.report.document import Document, Link
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.results import Result, Results
from jaxablate.errors import UserError

FILES = (
    Link("report.md", "this report in Markdown"),
    Link("ablation_analysis.txt", "this report as plain text"),
    Link("ablation_comparison.csv", "a row for each run"),
    Link("ablation_comparison.png", "curves, means, ranking, effects and speed on one page"),
    Link("effects.csv", "all effects and comparisons with the baseline"),
    Link("verdicts.csv", "the declared hypotheses and their verdicts"),
    Link("analysis.json", "all findings, for other programs"),
    Link("figures/", "each figure by itself, as .pdf, .svg and .png"),
    Link("tables.tex", "tables for a paper (booktabs)"),
    Link("numbers.tex", "a LaTeX macro for each number"),
    Link("methods.md", "the paragraph that reviewers ask for"),
)


NARROWEST = 80  # characters, below which tables have no form
_STALE_AFTER_S = 600.0


@dataclass(frozen=True)
class Report:
    """What was written: the files, `report.html` first, and what they say."""

    files: tuple[Path, ...]
    document: Document

    def text(self) -> str:
        """`ablation_analysis.txt`, but in lines that a narrow terminal has room for."""
        columns = shutil.get_terminal_size((plain.TEXT_WIDTH, 24)).columns
        return plain.text(self.document, min(max(columns, NARROWEST), plain.TEXT_WIDTH))


def write_report(results: Results, analysis: Analysis, out: Path) -> Report:
    """Writes the report into the directory `out`.

    Everything is made, and lies on the same disk, before the first old file is replaced: a report that fails
    until then, or that the disk has no room for, leaves the one before it. Then the files are replaced one by
    one, each as a whole: a kill between two of them leaves some of either report, and the next report mends
    it. It also removes what a killed one has staged, once that is old. Figures that the results no longer fill
    are removed.

    Raises:
      UserError: `out` cannot be written.
    """
    files, document = _make(results, analysis)
    _publish(files, Path(out))
    return Report(tuple(Path(out) / name for name in files), document)


def _make(results: Results, analysis: Analysis) -> tuple[dict[str, bytes], Document]:
    scene = Scene(results, analysis)
    drawn = [*figures.draw_all(scene), *comparisons.draw_all(scene), *timings.draw_all(scene)]
    source = origin.read(results)
    own = extra.read(results, analysis)
    document = content.compose(scene, drawn, source, FILES, own.blocks)
    texts = {
        "report.html": page.render(document),
        "report.md": plain.markdown(document),
        "ablation_analysis.txt": plain.text(document),
        "ablation_comparison.csv": comparison_csv(scene),
        "effects.csv": effects_csv(analysis),
        "verdicts.csv": verdicts_csv(analysis),
        "analysis.json": json.dumps(as_json(analysis), indent=2, allow_nan=False) + "\n",
        "tables.tex": paper.tables_tex(scene),
        "numbers.tex": paper.numbers_tex(scene),
        "methods.md": paper.methods_md(scene, source),
    }
    files = {name: text.encode() for name, text in texts.items()}
    files["ablation_comparison.png"] = overview.overview(scene)
    for figure in drawn:
        for form in ("png", "svg", "pdf"):
            files[f"figures/{figure.name}.{form}"] = getattr(figure, form)
    if taken := sorted(files.keys() & own.files.keys()):
        name = results.study.extra_report
        raise UserError(f"study: extra_report='{name}': {taken[0]} is the report's own file; rename it")
    return files | own.files, document


def _publish(files: Mapping[str, bytes], out: Path) -> None:
    disk.make_private(out)
    try:
        (out / "figures").mkdir(mode=0o700, exist_ok=True)
        _sweep(out)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out))
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written: {error.strerror}; choose another place with --out"
        ) from None
    try:
        (staging / "figures").mkdir()
        for name, data in files.items():
            (staging / name).write_bytes(data)
        for name in files:
            os.replace(staging / name, out / name)
        for stale in (out / "figures").iterdir():
            if f"figures/{stale.name}" not in files and stale.suffix in (".png", ".svg", ".pdf"):
                stale.unlink()
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written: {error.strerror}; choose another place with --out"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(staging)


def _sweep(out: Path) -> None:
    """Removes what killed reports have staged; a young folder may be that of one at work."""
    for left in out.glob(f".{out.name}-*"):
        if left.is_dir() and time.time() - left.stat().st_mtime > _STALE_AFTER_S:
            shutil.rmtree(left)


# --------------------------------------------------------------------------------- for other programs


def as_json(analysis: Analysis) -> dict[str, Any]:
    """The findings in JSON's types: field names as in `findings`, seeds as strings where they are keys."""

    def with_text_keys(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): with_text_keys(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [with_text_keys(item) for item in value]
        return value

    return disk.plain(with_text_keys(dataclasses.asdict(analysis)))


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    return buffer.getvalue()


def comparison_csv(scene: Scene) -> str:
    """A row for each run that reports a result, planned ones included; an empty cell is a number that is not there.

    Columns: arm, the level of each factor, seed, status, steps, steps_per_s, peak_mem_gb (10^9 bytes),
    learning_rate, train_loss (the last one), the responses, of a time to target its seconds:
    `time_to_target_s`, or `<response>_s` if there are several, and the last value of every other metric
    that the task gives a direction.
    """
    study = scene.results.study
    timed = [r for r in study.responses if r.reduce == "time_to"]
    seconds = ["time_to_target_s"] if len(timed) == 1 else [f"{r.name}_s" for r in timed]
    covered = {r.metric.replace("/", "_") for r in study.responses} | {"train_loss"}
    further = sorted({name for run in scene.results.confirm for name in run.finals} - covered)
    header = [
        "arm", *(f.name for f in study.factors), "seed", "status", "steps", "steps_per_s", "peak_mem_gb",
        "learning_rate", "train_loss", *(r.name for r in study.responses), *seconds,
        *(name.removeprefix("val_") for name in further),
    ]  # fmt: skip
    rows = []
    for arm in scene.arms:
        for run in scene.results.of(arm):
            peak = run.perf.get("peak_bytes")
            rows.append(
                [
                    arm, *study.levels(arm).values(), run.seed, run.state, run.steps,
                    run.perf.get("steps_per_sec"), None if peak is None else peak / 1e9, run.learning_rate,
                    _last_loss(scene, run), *(run.values.get(r.name) for r in study.responses),
                    *(run.seconds.get(r.name) for r in timed), *(run.finals.get(name) for name in further),
                ]
            )  # fmt: skip
    return _csv(header, rows)


def _last_loss(scene: Scene, run: Result) -> float | None:
    rows = scene.rows.get((run.arm, run.seed), ())
    return next((row["train/loss"] for row in reversed(rows) if "train/loss" in row), None)


_ESTIMATE = ("value", "low", "high", "level", "p", "n", "how", "note")


def _fields(estimate: Estimate | None) -> list[Any]:
    return [getattr(estimate, name) if estimate is not None else None for name in _ESTIMATE]


def effects_csv(analysis: Analysis) -> str:
    """Effects (kind `effect`) and arms against the baseline (kind `difference`, `ratio`), on all scales."""
    rows: list[list[Any]] = []
    for table in analysis.effects:
        for e in table.effects:
            name = sentences.effect_name(e)
            rows.append(
                ["effect", name, "", e.response, e.scale, e.better, *_fields(e.estimate), table.method]
            )
    for c in analysis.contrasts:
        rows.append(["difference", c.arm, c.control, c.response, "raw", c.better, *_fields(c.difference), ""])
        if c.ratio is not None:
            rows.append(["ratio", c.arm, c.control, c.response, "log", c.better, *_fields(c.ratio), ""])
    return _csv(["kind", "name", "control", "response", "scale", "judgement", *_ESTIMATE, "method"], rows)


def verdicts_csv(analysis: Analysis) -> str:
    """A row for each declared hypothesis."""
    own = ("hypothesis", "outcome", "declared", "locked", "primary", "claim", "response", "treatment", "control",
           "scale", "margin")  # fmt: skip
    last = ("p_holm", "reason", "advice", "text")
    rows = []
    for v in analysis.verdicts:
        estimate = dict(zip(_ESTIMATE, _fields(v.estimate), strict=True)) | {"p": v.p}
        rows.append(
            [*(getattr(v, f) for f in own), *estimate.values(), *(getattr(v, f) for f in last)]
        )  # fmt: skip
    return _csv([*own, *_ESTIMATE, *last], rows)
