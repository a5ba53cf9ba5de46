"""What was run, both tables, what is lost without the text's tensors, and which differences are real: as the text of
`results.txt`, and what of it stands on the report's page.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxablate.analysis import sentences
from jaxablate.analysis.report import plain
from jaxablate.analysis.report.document import Alert, Block, Cell, Document, Paragraph, Section, Table
from jaxablate.analysis.report.tables import numbers, table_of, words
from jaxablate.analysis.sentences import MISSING
from jaxablate.studies.lora_space.config import TENSORS
from jaxablate.studies.lora_space.report.paired import Compared, Comparison
from jaxablate.studies.lora_space.report.runs import Finished, Setting, Settings, finished, representations

COLUMNS = ("first", "second", "difference", "low", "high", "p", "p_holm", "n", "method")
WITHOUT_TEXT = "All layers against self-attention alone"
TITLES = {
    "all_layers": "All layers",
    "visual_only": "Self-attention alone (visual_only)",
    "text_only": "Cross-attention alone (text_only)",
}


def results_txt(title: str, found: Settings, compared: Compared, notes: Sequence[str]) -> str:
    """The document's text file, at most 120 characters wide."""
    tables: list[Block] = [_table(found, kind) for kind in TENSORS if any(kind == own for _, own in found)]
    sections = (
        Section("summary", "Configuration", tuple(_configuration(found, notes))),
        Section("arms", "Results", tuple(tables)),
        Section("effects", WITHOUT_TEXT, (_comparison(found, compared.without_text),)),
        Section("contrasts", "Representations", tuple(_representations(found, compared.representations))),
    )
    return plain.text(
        Document(title, "Accuracies in percent: mean and population deviation over the runs.", sections)
    )


def page(found: Settings, compared: Compared, notes: Sequence[str]) -> Iterator[Block]:
    """What stands on the page: warnings, what intervals are over, and the differences that those are of."""
    yield from before(found, notes)
    if not compared.all:
        return
    seeds = (
        "Those of arms, effects and contrasts are over the seeds: over other starts of the training on the same "
        "adapters, cut into the same parts. They say nothing of other adapters."
    )
    adapters = f"Those of this study alone are over other adapters: {compared.all[0].difference.how}."
    yield Alert("What the intervals are over", (seeds, adapters))
    if compared.without_text:
        yield Paragraph(WITHOUT_TEXT, "lead")
        yield _comparison(found, compared.without_text)
    if any(compared.representations.values()):
        yield Paragraph("Representations", "lead")
        yield from _representations(found, compared.representations)


def before(found: Settings, notes: Sequence[str]) -> Iterator[Alert]:
    """What a reader must know first: why numbers are no measurement, what is missing, what could not be read."""
    warnings = [*(remark for run in finished(found) for remark in run.kept.remarks), *notes]
    if idle := [one.name for one in found.values() if not one.runs]:
        warnings.append(f"no run of these has a result: {', '.join(idle)}")
    for one in found.values():
        if one.runs and one.missing:
            warnings.append(f"{one.name}: {sentences.count(one.missing, 'run')} without a result")
    if warnings:
        yield Alert("Before you read the numbers", tuple(dict.fromkeys(warnings)))


def _configuration(found: Settings, notes: Sequence[str]) -> list[Block]:
    done = finished(found)
    missing = sum(one.missing for one in found.values())
    blocks: list[Block] = [
        Paragraph(f"{len(done)} of {sentences.count(len(done) + missing, 'run')} finished."),
        *before(found, notes),
    ]
    if done:
        blocks.append(_settings_table(done[0]))
        columns = sorted(
            {(one.name, one.runs[0].kept.facts["near_constant"]) for one in found.values() if one.runs}
        )
        told = [f"{name} {count}" for name, count in columns if count]
        if told:
            blocks.append(Paragraph(f"Near-constant features, which are set to zero: {', '.join(told)}."))
    return blocks


def _settings_table(run: Finished) -> Table:
    data, model, training, optim = (run.config[section] for section in ("data", "model", "training", "optim"))
    sizes = " / ".join(str(len(run.kept.of(part)[0])) for part in ("train", "val", "test"))
    rows: dict[str, Any] = {
        "data": data["path"]
        or f"{data['samples']} synthetic adapters, {data['architecture']}, rank {data['rank']}",
        "training / validation / test": f"{sizes}, {data['split']}",
        "classes": ", ".join(run.kept.categories),
        "chance (largest class of the test)": _percent([run.final("test_chance")]),
        "network": f"{model['layers']} x {model['hidden']}, dropout {model['dropout']:g}",
        "optimiser": f"Adam {optim['learning_rate']:g}, L2 {optim['weight_decay']:g}, batch {training['batch_size']}",
        "epochs, at most": training["steps"] // training["eval_every"],
        "epochs without a better accuracy, at most": training.get("early_stop") or "any number",
        "spectral variant": data["spectral_variant"],
        "normalisation": data["normalise"],
        "share of the layers": f"{data['sample_layers']:g}",
        "runs trained together": run.run.cohort_size,
        "trained on": f"{run.run.hardware}, {training['compute_dtype']}",
    }
    cells = [(Cell(name), Cell(str(value))) for name, value in rows.items()]
    return table_of("", words("setting", "value"), cells, "")


def _percent(values: Sequence[float] | Any, spread: str = "without") -> str:
    known = np.asarray(values, float) * 100
    if not len(known) or not np.isfinite(known).all():
        return MISSING
    mean = sentences.number(float(known.mean()), 2)
    return mean if spread == "without" else f"{mean} ± {sentences.number(float(known.std()), 2)}"


def _table(found: Settings, tensors: str) -> Table:
    rows = []
    for (name, kind), one in found.items():
        if kind == tensors:
            scores = (("val", "accuracy"), ("test", "accuracy"), ("test", "f1"), ("train", "accuracy"))
            cells = [Cell(_percent(one.scores(*score), "with")) for score in scores]
            width = str(one.runs[0].kept.facts["features"]) if one.runs else MISSING
            seconds = (
                sentences.number(float(np.mean([run.seconds for run in one.runs])), 1)
                if one.runs
                else MISSING
            )
            rows.append((Cell(name), Cell(str(len(one.runs))), *cells, Cell(width), Cell(seconds)))
    columns = words("representation") + numbers(
        "runs", "Val Acc", "Test Acc", "Test F1", "Train Acc", "features", "s/run"
    )
    caption = (
        "Of the parameters with the best validation accuracy. s/run is a run's share of its cohort's time."
    )
    return table_of(TITLES[tensors], columns, rows, caption)


def _comparison(found: Settings, lost: Sequence[Comparison]) -> Table:
    """By name: a representation that failed in one of the two has no drop, and moves no other row."""
    by_name = {one.first: one for one in lost}
    rows = []
    for name in representations(found):
        both = [found.get((name, kind)) for kind in ("all_layers", "visual_only")]
        means = [float(one.scores("test").mean()) if one and one.runs else None for one in both]
        if all(one is None for one in both):
            continue
        known = by_name.get(f"{name}_all_layers")
        rows.append(
            (
                Cell(name),
                *(Cell(_percent([mean]) if mean is not None else MISSING) for mean in means),
                *map(Cell, _drop(*means)),
                Cell(_bounds(known)),
                Cell(sentences.p_value(known.adjusted) if known else MISSING),
            )
        )
    columns = words("representation") + numbers(
        "all", "visual", "drop", "relative %", "95 % interval", "p (Holm)"
    )
    how = next((one.difference.how for one in lost), "no representation has both")
    return table_of("", columns, rows, f"Drop in percentage points. Interval and p: {how}.")


def drop(everything: float, visual: float) -> tuple[float, float]:
    """How much is lost, absolutely and in percent of what there was; 0 % of nothing."""
    lost = everything - visual
    return lost, lost / everything * 100 if everything else 0.0


def _drop(everything: float | None, visual: float | None) -> tuple[str, str]:
    if everything is None or visual is None:
        return MISSING, MISSING
    lost, relative = drop(everything, visual)
    return sentences.signed(100 * lost, 2), sentences.signed(relative, 1)


def _bounds(one: Comparison | None) -> str:
    if one is None or one.difference.low is None or one.difference.high is None:
        return MISSING
    return " to ".join(
        sentences.number(100 * bound, 2) for bound in (one.difference.low, one.difference.high)
    )


def _representations(found: Settings, compared: Mapping[str, Sequence[Comparison]]) -> list[Block]:
    """The best of each set of tensors against the others."""
    blocks: list[Block] = []
    for tensors, comparisons in compared.items():
        own: list[Setting] = [one for (_, kind), one in found.items() if kind == tensors and one.runs]
        if not comparisons:
            continue
        best = max(own, key=lambda one: one.scores("test").mean())
        rows = []
        for one in comparisons:
            if best.name in (one.first, one.second):
                other, sign = (one.second, 1) if one.first == best.name else (one.first, -1)
                bounds = [sign * 100 * x for x in (one.difference.low, one.difference.high) if x is not None]
                interval = " to ".join(sentences.number(x, 2) for x in sorted(bounds)) or MISSING
                value = sentences.signed(sign * 100 * (one.difference.value or 0.0), 2)
                rows.append((Cell(other), Cell(value), Cell(interval), Cell(sentences.p_value(one.adjusted))))
        caption = (
            f"Test accuracy in percentage points; p of {sentences.count(len(comparisons), 'pair')}, corrected "
            f"together (Holm); {comparisons[0].difference.how}. All pairs are in paired_comparisons.csv."
        )
        columns = words("against") + numbers("difference", "95 % interval", "p (Holm)")
        blocks.append(table_of(f"{best.name}, which has the best mean", columns, rows, caption))
    return blocks or [Paragraph("No two representations have finished runs.")]


def comparisons_csv(comparisons: Sequence[Comparison]) -> str:
    """All paired comparisons, a row each; an empty cell is a number that is not there."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in comparisons:
        d = one.difference
        writer.writerow([one.first, one.second, d.value, d.low, d.high, d.p, one.adjusted, d.n, d.how])
    return buffer.getvalue()
