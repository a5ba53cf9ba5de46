"""What the Burgers study adds to its report (`Study.extra_report`), in the words of its captions. Imports no jax.

architecture_comparison.{csv,png}    a row per run, under the document's own columns; errors of each arm as bars
ablation_report.md                   summary, results by token count, hypotheses, recommendations
architecture_selection_guide.md      which architecture to take, as far as these runs can say
milestones.md                        what a run has to reach, and how many of each arm did
figures/spacetime_<arm>.png          truth, prediction and error of a few roll-outs
figures/spectra.png                  energy over wave numbers at the end of a roll-out
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxablate.analysis.findings import Analysis
from jaxablate.analysis.plots import encode, plain_text
from jaxablate.analysis.report import plain
from jaxablate.analysis.report.extra import Extra
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.results import Results
from jaxablate.studies.burgers.report import comparison, pictures, texts
from jaxablate.studies.burgers.report.facts import of_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(results: Results, analysis: Analysis, folder: Path) -> list[Extra]:
    """Writes the study's files into `folder`, which has a subfolder `figures`; returns them."""
    scene, facts, written = Scene(results, analysis), of_runs(results), list[Extra]()
    notes: list[str] = []
    kept = pictures.of_arms(results, notes)

    def put(name: str, data: str | bytes, what: str, alt: str = "") -> None:
        path = folder / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        written.append(Extra(path, what, alt))

    def draw(name: str, figure: Callable[[], Figure], caption: str, alt: str) -> None:
        with plain_text():
            put(name, encode(figure(), "png"), caption, alt)

    draw(
        "architecture_comparison.png",
        lambda: comparison.bars(scene, facts),
        "Error of one step: of the operator alone, and with corrector and test-time conditioning. Bars: means over the "
        "finished seeds; dots: the seeds; dashes: the field stays as it is.",
        "Bars of the error of each arm: operator alone, and with corrector and test-time conditioning",
    )
    if kept:
        draw(
            "figures/spectra.png",
            lambda: pictures.spectra(scene, kept),
            f"Energy over wave numbers at the end of the {pictures.drawn(kept)} roll-outs that are drawn below, by "
            f"viscosity, of the first finished run of each arm; of all windows see the frmse bands.",
            "Lines of energy over wave number: the truth and each arm",
        )
    for arm, found in kept.items():
        draw(
            f"figures/spacetime_{arm}.png",
            lambda arm=arm, found=found: pictures.spacetime(arm, found),
            f"{arm}: roll-outs of its first finished run. Truth and prediction share their colours.",
            f"Truth, prediction and error of {arm} over space and time",
        )
    put(
        "ablation_report.md",
        plain.markdown(texts.ablation_report(scene, facts, notes)),
        "the ablation by number of tokens, with its hypotheses and what follows",
    )
    put(
        "architecture_selection_guide.md",
        plain.markdown(texts.selection_guide(scene, facts)),
        "which architecture to take, as far as these runs can say",
    )
    put(
        "architecture_comparison.csv",
        comparison.table(facts),
        "a row for each run: architecture, errors, training time",
    )
    put(
        "milestones.md",
        plain.markdown(texts.milestones_page(scene, facts)),
        "what a run has to reach, and how many of each arm did",
    )
    return written
