"""Roll-outs as pictures, from what each run keeps of its last evaluation (`predictions.npz`)."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jaxablate.analysis.plots import INK, STYLES, dress, new_figure
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.results import Result, Results
from jaxablate.studies.burgers.report.spectra import energy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kept = Mapping[str, NDArray[Any]]
NAMES = ("truth", "prediction", "x", "t", "viscosity")


def of_arms(results: Results, notes: list[str]) -> dict[str, Kept]:
    """What the first finished run of each arm kept; damaged files are noted, and the next run's is taken."""
    found = {}
    for arm in results.study.arms:
        for run in results.of(arm.name):
            if run.state == "done" and (kept := _read(run, notes)) is not None:
                found[arm.name] = kept
                break
    return found


def drawn(kept: Mapping[str, Kept]) -> int:
    """How many roll-outs each arm kept."""
    return max(len(own["truth"]) for own in kept.values())


def _read(run: Result, notes: list[str]) -> Kept | None:
    if run.dir is None or not run.dir.predictions.is_file():
        return None
    try:
        # In memory: of a torn file numpy would leave the one that it opened open.
        with np.load(io.BytesIO(run.dir.predictions.read_bytes()), allow_pickle=False) as file:
            if not {"truth", "prediction"} & set(file):
                return None  # of tokens that nothing decodes there is no picture
            kept = {name: np.asarray(file[name]) for name in NAMES}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        what = " ".join(str(error).split())
        notes.append(
            f"{run.dir.predictions}: cannot be drawn: {what}; train the run again to have its pictures"
        )
        return None
    (rows, times, cells), shape = kept["prediction"].shape, kept["truth"].shape
    if shape != (rows, times, cells) or kept["t"].shape != (rows, times) or kept["x"].shape != (cells,):
        notes.append(f"{run.dir.predictions}: cannot be drawn: its arrays do not belong together")
        return None
    return kept


def spacetime(arm: str, kept: Kept) -> Figure:
    """Truth, prediction and error of each example over space and time; truth and prediction share their colours."""
    examples = len(kept["truth"])
    figure = new_figure(7.6, 0.5 + 1.55 * examples)
    grid = figure.subplots(examples, 3, squeeze=False, sharex=True)
    for axes, truth, prediction, t, nu in zip(
        grid, kept["truth"], kept["prediction"], kept["t"], kept["viscosity"], strict=True
    ):
        low, high = float(np.min(truth)), float(np.max(truth))
        error = prediction - truth
        most = float(np.max(np.abs(error))) or 1.0
        panels = (
            ("truth", truth, {"cmap": "viridis", "vmin": low, "vmax": high}),
            ("prediction", prediction, {"cmap": "viridis", "vmin": low, "vmax": high}),
            ("error", error, {"cmap": "RdBu_r", "vmin": -most, "vmax": most}),
        )
        for i, (place, (name, field, style)) in enumerate(zip(axes, panels, strict=True)):
            drawn = place.pcolormesh(kept["x"], t, field, shading="nearest", rasterized=True, **style)
            title = f"{name}, viscosity {nu:g}" if i == 0 else name
            dress(place, title, "", "t" if i == 0 else "")
            place.grid(visible=False)
            if i:
                figure.colorbar(drawn, ax=place, pad=0.02).ax.tick_params(labelsize=7)
    for place in grid[-1]:
        place.set_xlabel("x", fontsize=9, color=INK)
    figure.suptitle(arm, fontsize=11, fontweight="bold", color=INK, x=0.012, ha="left")
    return figure


def spectra(scene: Scene, kept: Mapping[str, Kept]) -> Figure:
    """Energy over wave numbers at the end of the kept roll-outs, for each viscosity: truth in black, and each arm."""
    first = next(iter(kept.values()))
    viscosities = np.unique(first["viscosity"])
    figure = new_figure(0.6 + 3.6 * len(viscosities), 3.4)
    grid = figure.subplots(1, len(viscosities), squeeze=False, sharey=True)[0]
    for axes, nu in zip(grid, viscosities, strict=True):
        truth = _at_the_end(first, "truth", nu)
        axes.loglog(truth, color=INK, linewidth=2.2, label="truth")
        for number, (arm, own) in enumerate(kept.items()):
            if (own["viscosity"] == nu).any():
                style = STYLES[number // 4 % len(STYLES)]
                curve = _at_the_end(own, "prediction", nu)
                axes.loglog(curve, color=scene.colors[arm], linestyle=style, linewidth=1.2, label=arm)
        dress(axes, f"viscosity {nu:g}", "wave number", "energy" if axes is grid[0] else "")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")  # powers of ten would need formulas, see `plain_text`
            axis.set_minor_formatter("")
        axes.set_xlim(left=1)
        axes.set_ylim(bottom=max(float(truth.max()) * 1e-10, 1e-14))
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=8
    )
    return figure


def _at_the_end(kept: Kept, name: str, viscosity: float) -> NDArray[np.floating[Any]]:
    return energy(kept[name][kept["viscosity"] == viscosity, -1]).mean(axis=0)
