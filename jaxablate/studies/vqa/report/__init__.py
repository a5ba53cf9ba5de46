"""What the VQA study adds to its report (`Study.extra_report`), from the run directories alone. Imports no jax.

On the page: every experiment under all metrics, what their differences support, each pair, McNemar's tests, accuracy by
type and stage beside the constant answer, and what three passes bring. Files:

results_<experiment>_seed<seed>.json   one evaluation each, as the document's guide names its fields
comparisons.csv                        every pair of experiments and seed
groups.csv                             every experiment, seed, stage and type of question
figures/by_stage.png                   accuracy by stage and experiment, with intervals
figures/passes.png                     accuracy of each pass
figures/examples.png                   a few questions with their pictures and answers
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jaxablate.analysis.findings import Analysis
from jaxablate.analysis.plots import encode, plain_text
from jaxablate.analysis.report.document import Block
from jaxablate.analysis.report.extra import Extra
from jaxablate.analysis.results import Results
from jaxablate.analysis.sentences import count
from jaxablate.studies.vqa.report import compare, pictures, runs, tables
from jaxablate.studies.vqa.report.schema import encoded

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(results: Results, analysis: Analysis, folder: Path) -> list[Extra | Block]:
    """What the page says, and the files that are written into `folder` and its subfolder `figures`."""
    del analysis  # of the runs' one number each; all here is of the questions
    evaluation = runs.read(results)
    written: list[Extra | Block] = [*tables.before(evaluation)]
    if not evaluation.answered:
        return written
    images = compare.resample(evaluation, "image")
    comparisons = compare.compare(evaluation, images)
    written += tables.blocks(evaluation, comparisons, images)

    def put(name: str, data: str | bytes, what: str, alt: str = "") -> None:
        path = folder / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        written.append(Extra(path, what, alt))

    def draw(name: str, figure: Figure, caption: str, alt: str) -> None:
        put(f"figures/{name}.png", encode(figure, "png"), caption, alt)

    with plain_text():
        draw(
            "by_stage",
            pictures.by_stage(evaluation),
            "Exact accuracy. Bars: means over the seeds; whiskers: 95 % over other pictures like these and other "
            "seeds; dots: the seeds; dashes: always the most frequent answer.",
            "Bars of the exact accuracy of each experiment, of all questions and by stage",
        )
        if refined := [one for one in evaluation.answered if any(run.refinement for run in one.runs)]:
            draw(
                "passes",
                pictures.passes(refined),
                "Exact accuracy of each pass; the last one is scored. Thin: the seeds; diamond: what most of the "
                "passes say, the first where no two agree.",
                "Lines of exact accuracy over the passes, and of their majority",
            )
        if (shown := pictures.examples(evaluation)) is not None:
            draw(
                "examples",
                shown,
                "Questions that were drawn before anybody answered, with what the first seed of each experiment said.",
                "Pictures with their question, its truth and the answer of each experiment",
            )
    put("comparisons.csv", tables.comparisons_csv(comparisons), "every pair of experiments and seed")
    put("groups.csv", tables.groups_csv(evaluation), "every experiment, seed, stage and type of question")
    for one in evaluation.answered:
        for run in one.runs:
            put(
                f"results_{one.name}_seed{run.seed}.json",
                encoded(run, evaluation),
                f"every answer of {one.name}, seed {run.seed}: {count(len(evaluation.questions), 'question')}",
            )
    return written
