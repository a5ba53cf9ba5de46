"""What the LoRA weight-space study adds to its report (`Study.extra_report`). Imports no jax.

On the page: why numbers are no measurement, what its intervals are over, what is lost without the tensors that see the
text, and the best representations against the others. Files:

results.json                     all scores, curves and confusion matrices under the names of the document's guide
results.txt                      configuration, both tables, drop without the text's tensors, paired comparisons
paired_comparisons.csv           every pair of representations, and every representation without the text's tensors
figures/test_accuracy.png        all settings side by side
figures/curves_<tensors>.png     validation accuracy and training loss over epochs
figures/confusion_<setting>.png  test adapters of all runs, all labels
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxablate import disk
from jaxablate.analysis.findings import Analysis
from jaxablate.analysis.plots import encode, plain_text
from jaxablate.analysis.report.document import Block
from jaxablate.analysis.report.extra import Extra
from jaxablate.analysis.results import Results
from jaxablate.analysis.sentences import count
from jaxablate.studies.lora_space.config import TENSORS
from jaxablate.studies.lora_space.report import pictures, texts
from jaxablate.studies.lora_space.report.paired import Compared
from jaxablate.studies.lora_space.report.runs import Settings, finished, settings
from jaxablate.studies.lora_space.report.schema import results_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(results: Results, analysis: Analysis, folder: Path) -> list[Extra | Block]:
    """What the page says, and the files that are written into `folder` and its subfolder `figures`."""
    del analysis  # which is of the runs' one number each, over their seeds
    notes = list[str]()
    found = settings(results, notes)
    compared = Compared.of(found)
    written: list[Extra | Block] = [*texts.page(found, compared, notes)]

    def put(name: str, data: str | bytes, what: str, alt: str = "") -> None:
        path = folder / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        written.append(Extra(path, what, alt))

    def draw(name: str, figure: Callable[[], Figure], caption: str, alt: str) -> None:
        with plain_text():
            put(f"figures/{name}.png", encode(figure(), "png"), caption, alt)

    draw(
        "test_accuracy",
        lambda: pictures.bars(found),
        "Accuracy on the test adapters. Bars: means over the finished runs; dots: the runs; dashes: always naming the "
        "largest class.",
        "Bars of the test accuracy of each representation and set of tensors",
    )
    for kind in TENSORS:
        if own := [one for one in found.values() if one.tensors == kind and one.runs]:
            draw(
                f"curves_{kind}",
                lambda own=own, kind=kind: pictures.curves(own, kind),
                f"{kind}: a line for each run, a colour for each representation; a line ends where its run stopped.",
                f"Lines of validation accuracy and training loss over epochs, {kind}",
            )
    for one in found.values():
        if one.runs:
            draw(
                f"confusion_{one.name}",
                lambda one=one: pictures.confusion(one),
                f"{one.name}: test adapters of {count(len(one.runs), 'run')} in all; colours are shares of a row.",
                f"Confusion matrix of {one.name}",
            )
    for name, (text, what) in documents(results, found, compared, notes).items():
        put(name, text, what)
    return written


def documents(
    results: Results, found: Settings, compared: Compared, notes: Sequence[str]
) -> dict[str, tuple[str, str]]:
    """The files that are text, by name, each with what it is."""
    study = results.study
    data = disk.plain(results_json(found, _dataset(found), len(study.seeds)))
    return {
        "results.json": (
            json.dumps(data, indent=2, allow_nan=False) + "\n",
            "all numbers, as the guide names them",
        ),
        "results.txt": (
            texts.results_txt(study.title or study.name, found, compared, notes),
            "configuration, results, and what is lost without the tensors that see the text",
        ),
        "paired_comparisons.csv": (
            texts.comparisons_csv(compared.all),
            "every pair of representations on the same adapters",
        ),
    }


def _dataset(found: Settings) -> str:
    """What the guide calls the data set: the path of what was read, or the scale."""
    config = next((run.config for run in finished(found)), None)
    return (config["data"]["path"] or config["scale"]) if config else ""
