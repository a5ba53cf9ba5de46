"""What the Burgers study adds to its report (`Study.extra_report`). Imports no jax.

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

from jaxablate.analysis.findings import Analysis
from jaxablate.analysis.plots import encode, plain_text
from jaxablate.analysis.report import plain
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.results import Results
from jaxablate.studies.burgers.report import comparison, pictures, texts
from jaxablate.studies.burgers.report.facts import of_runs


def write(results: Results, analysis: Analysis, folder: Path) -> list[Path]:
    """Writes the study's files into `folder`, which has a subfolder `figures`; returns them."""
    scene, facts, written = Scene(results, analysis), of_runs(results), list[Path]()
    notes: list[str] = []
    kept = pictures.of_arms(results, notes)

    def put(name: str, data: str | bytes) -> None:
        path = folder / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        written.append(path)

    def draw(name: str, figure: Callable[[], object]) -> None:
        with plain_text():
            put(name, encode(figure(), "png"))  # pyright: ignore[reportArgumentType]

    put("architecture_comparison.csv", comparison.table(facts))
    put("ablation_report.md", plain.markdown(texts.ablation_report(scene, facts, notes)))
    put("architecture_selection_guide.md", plain.markdown(texts.selection_guide(scene, facts)))
    put("milestones.md", plain.markdown(texts.milestones_page(scene, facts)))
    draw("architecture_comparison.png", lambda: comparison.bars(scene, facts))
    for arm, found in kept.items():
        draw(f"figures/spacetime_{arm}.png", lambda arm=arm, found=found: pictures.spacetime(arm, found))
    if kept:
        draw("figures/spectra.png", lambda: pictures.spectra(scene, kept))
    return written
