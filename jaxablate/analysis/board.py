"""The TensorBoard view of a whole study: its arms as means over seeds, with intervals, below `report/tensorboard`.

    .                     how to read it, arms and verdicts as text; the layout of the custom scalars
    <arm>                 the mean of every series over the arm's finished seeds, with Student-t bounds
    responses/<arm>       the declared responses as one number each: the arm's row on the hparams page

`tensorboard --logdir <study>/report/tensorboard` shows this, `tensorboard --logdir <study>` the single runs
as well. For the second not to be spoiled by the first, the sessions here join the row that their arm's runs
have already, carry the same hyperparameters, and hold no metric that the runs have; and there is no
experiment record here, since of two TensorBoard takes either (see `events.experiment_hparams`). Without one
the hparams page makes its columns from the sessions, which is right here: all have the same keys.
"""

from __future__ import annotations

import dataclasses
import io
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxablate import disk, events
from jaxablate.analysis import curves, sentences
from jaxablate.analysis.curves import Rows, Series
from jaxablate.analysis.findings import Analysis, Estimate
from jaxablate.analysis.results import Result, Results
from jaxablate.analysis.stats.bands import Band, held, mean_over_seeds
from jaxablate.analysis.stats.intervals import MIN_SEEDS
from jaxablate.analysis.stats.speed import measured_with
from jaxablate.errors import UserError
from jaxablate.events import EventFile, HParam
from jaxablate.runstore import State
from jaxablate.study import Response, Study

MAX_STEPS = 250  # of a series: what a chart can show, and what a thousand runs can afford

# The metrics that every study has, in the order of the charts; the responses come before them.
_CHARTS = {
    "quality": ("val/loss",),
    "training": ("train/loss", "train/grad_norm", "train/lr"),
    "speed": ("perf/steps_per_sec", "perf/step_ms", "perf/examples_per_sec", "perf/tokens_per_sec",
              "perf/mfu", "perf/peak_bytes"),
}  # fmt: skip


def write_board(results: Results, analysis: Analysis, out: Path) -> Path:
    """Writes the board into the directory `out`, in place of the one that is there; returns `out`.

    A TensorBoard that has it open goes on: each file is replaced as a whole, and arms that are gone vanish. It
    keeps the hyperparameters that it read of a run first, until it is started anew; an arm that has gained
    seeds since is another run.

    Raises:
      UserError: `out` cannot be written.
    """
    files = board(results, analysis, time.time())
    try:
        for run, data in files.items():
            _replace(out / run, data)
        _remove_others(out, {out / run for run in files})
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; free it, or report elsewhere") from None
    return out


def board(results: Results, analysis: Analysis, now: float) -> dict[str, bytes]:
    """The event file of every run of the board, by the run's name; `now` is the time that they bear."""
    files: dict[str, bytes] = {}
    bands: dict[str, Mapping[str, Band]] = {}
    configs, unread = _varied_configs(results)
    if unread:
        analysis = dataclasses.replace(analysis, warnings=(*analysis.warnings, *unread))
    for arm in results.study.arms:
        name = _Name.of(results, arm.name)
        done = [run for run in results.of(arm.name) if run.state == "done" and not run.unread]
        bands[arm.name] = mean_curves(done, 1 - results.study.alpha)
        if bands[arm.name]:
            files[name.text] = _curves_file(bands[arm.name], now)
        files[f"responses/{name.text}"] = _session_file(
            results, analysis, name, configs.get(arm.name, {}), now
        )
    files["."] = _root_file(results, analysis, bands, now)
    return files


@dataclass(frozen=True)
class _Name:
    """What the board calls an arm. A mean of survivors says so wherever its curve is named."""

    arm: str
    done: int
    diverged: int
    planned: int

    @classmethod
    def of(cls, results: Results, arm: str) -> _Name:
        states = ["unreadable" if run.unread else run.state for run in results.of(arm)]
        return cls(arm, states.count("done"), states.count("diverged"), len(results.study.seeds))

    @property
    def text(self) -> str:
        if self.done == self.planned:
            return self.arm
        lost = f", {self.diverged} diverged" if self.diverged else ""
        return f"{self.arm} ({self.done} of {self.planned} seeds{lost})"


# ---------------------------------------------------------------------------------------- means over seeds


def mean_curves(runs: Sequence[Result], level: float) -> dict[str, Band]:
    """The mean of each series over runs of one arm, with Student-t bounds, at the steps where all have it.

    Timings (`perf/…`) are averaged only if all runs were on the same hardware in cohorts of one size.
    """
    read = [_series(run.rows) for run in runs]
    if len({measured_with(run) for run in runs}) == 1:
        read = [series | _series(run.perf_rows) for series, run in zip(read, runs, strict=True)]
    early = [run.stopped_at is not None for run in runs]
    found = {}
    for tag in sorted(set[str]().union(*read)):
        if all(tag in of_run for of_run in read):
            own = [of_run[tag] for of_run in read]
            found[tag] = mean_over_seeds(
                held(own, early) if tag.startswith("val/") else own, level, MAX_STEPS
            )
    return {tag: band for tag, band in found.items() if band is not None}


def _series(rows: Rows) -> dict[str, Series]:
    tags = sorted({tag for row in rows for tag in row} - {"step", "time"})
    return {tag: curves.series(rows, tag) for tag in tags}


def bounds(tag: str) -> tuple[str, str]:
    """The tags of a series' bounds: `val/loss` has `val_bounds/loss/low` and `…/high`, a group of their own."""
    group, slash, name = tag.partition("/")
    stem = f"{group}_bounds/{name}" if slash else f"bounds/{group}"
    return f"{stem}/low", f"{stem}/high"


# ---------------------------------------------------------------------------------------------- the files


def _curves_file(bands: Mapping[str, Band], now: float) -> bytes:
    rows: dict[int, dict[str, float | None]] = {}
    for tag, band in bands.items():
        low, high = bounds(tag)
        for name, values in ((tag, band.mean), (low, band.low), (high, band.high)):
            if values is not None:
                for step, value in zip(band.steps.tolist(), values.tolist(), strict=True):
                    rows.setdefault(step, {})[name] = value
    stream = io.BytesIO()
    file = EventFile(stream, now)
    for step in sorted(rows):
        file.scalars(step, rows[step], now)
    return stream.getvalue()


def _session_file(
    results: Results, analysis: Analysis, name: _Name, config: Mapping[str, HParam], now: float
) -> bytes:
    runs = results.of(name.arm)
    rates = {run.learning_rate for run in runs if run.learning_rate is not None}
    rate = rates.pop() if len(rates) == 1 else None
    # The page opens with the five columns that come first by name, capitals before the paths of the config.
    hparams: dict[str, HParam] = {f"Factor {k}": v for k, v in results.study.levels(name.arm).items()}
    hparams |= {"Seeds done": name.done, "Seeds diverged": name.diverged, "arm": name.arm, **config}
    if rate is not None:
        hparams["optim.learning_rate"] = rate
    stream = io.BytesIO()
    file = EventFile(stream, now)
    file.summary(events.session_start(hparams, events.session_group(name.arm, rate), now), now)
    if values := _numbers(results.study, analysis, name.arm):
        file.scalars(max(run.steps or 0 for run in runs), values, now)
    if state := _ended(runs, name):
        file.summary(events.session_end(state, now), now)
    return stream.getvalue()


def _ended(runs: Sequence[Result], name: _Name) -> State | None:
    """How an arm ended: `done` if all of its seeds did; None while some have still to run."""
    if name.done == name.planned:
        return "done"
    return next(
        (run.state for run in runs if run.state not in ("done", "pending", "running", "unreadable")), None
    )


def _numbers(study: Study, analysis: Analysis, arm: str) -> dict[str, float]:
    """The numbers of an arm's row: its mean responses, and speed where that of all arms is comparable."""
    means = {f"response/{r.name}": _mean(analysis, arm, r) for r in study.responses}
    values = {tag: mean.value for tag, mean in means.items() if mean is not None}
    speeds = {speed.arm: speed for speed in analysis.speed}
    where = {(speed.hardware, speed.cohort_size) for speed in analysis.speed}
    if arm in speeds and len(where) == 1 and len(speeds) == len(analysis.speed):
        values["speed/steps_per_sec"] = speeds[arm].steps_per_sec
        values["speed/peak_bytes"] = speeds[arm].peak_bytes
    return {tag: value for tag, value in values.items() if value is not None}


def _mean(analysis: Analysis, arm: str, response: Response) -> Estimate | None:
    """An arm's mean of a response; of a time to a target the restricted mean, since not all may reach it."""
    if response.reduce == "time_to":
        times = (t for t in analysis.time_to if (t.arm, t.response) == (arm, response.name))
        return next((time.mean_steps for time in times), None)
    values = (v for v in analysis.arms if (v.arm, v.response) == (arm, response.name))
    return next((value.mean for value in values), None)


def _varied_configs(results: Results) -> tuple[dict[str, dict[str, HParam]], list[str]]:
    """(arm -> what its config has that not all arms have alike, as the sessions of its runs show it; what of
    this could not be read, in words)."""
    configs, notes = {}, []
    for arm in results.study.arms:
        for run in results.of(arm.name):
            if run.dir is None or not run.dir.config.exists():
                continue
            try:
                configs[arm.name] = events.run_hparams(disk.read_json(run.dir.config))
                break
            except UserError as error:  # another run of the arm has the same
                notes.append(str(error))
    values: dict[str, set[HParam]] = {}
    for config in configs.values():
        for key, value in config.items():
            values.setdefault(key, set()).add(value)
    varied = {
        arm: {
            key: value
            for key, value in config.items()
            if len(values[key]) > 1 and key != "optim.learning_rate"
        }
        for arm, config in configs.items()
    }
    return varied, notes


def _root_file(
    results: Results, analysis: Analysis, bands: Mapping[str, Mapping[str, Band]], now: float
) -> bytes:
    stream = io.BytesIO()
    file = EventFile(stream, now)
    file.summary(events.custom_scalars(layout(results.study, bands)), now)
    for title, markdown in texts(results, analysis).items():
        file.summary(events.text(f"study/{title}", markdown), now)
    return stream.getvalue()


def layout(study: Study, bands: Mapping[str, Mapping[str, Band]]) -> Any:
    """The page of custom scalars: a chart with bounds for every response and core metric that was measured.

    Such a chart leaves out the arms that have no bounds; where there are some, the means of all follow in a
    chart of their own. `bands` is arm -> tag -> band.
    """
    pb2 = events.proto("plugins.custom_scalar.layout_pb2")
    page = pb2.Layout()
    for title, metrics in _charts(study).items():
        category = pb2.Category(title=title)
        for tag in metrics:
            measured = [of_arm[tag] for of_arm in bands.values() if tag in of_arm]
            if any(band.low is not None for band in measured):
                low, high = bounds(tag)
                series = pb2.MarginChartContent.Series(value=tag, lower=low, upper=high)
                category.chart.add(title=tag, margin=pb2.MarginChartContent(series=[series]))
            if any(band.low is None for band in measured):
                only = pb2.MultilineChartContent(tag=[f"^{re.escape(tag)}$"])
                category.chart.add(title=f"{tag}, means of all arms", multiline=only)
        if category.chart:
            page.category.append(category)
    return page


def _charts(study: Study) -> dict[str, list[str]]:
    """Category -> its metrics, the responses first."""
    charts: dict[str, list[str]] = {title: [] for title in _CHARTS}
    for response in study.responses:
        charts["speed" if response.metric.startswith("perf/") else "quality"].append(response.metric)
    return {title: list(dict.fromkeys([*own, *_CHARTS[title]])) for title, own in charts.items()}


# ----------------------------------------------------------------------------------------------- the text


def texts(results: Results, analysis: Analysis) -> dict[str, str]:
    """The cards of the text dashboard, as Markdown by title."""
    study = results.study
    names = [_Name.of(results, arm.name) for arm in study.arms]
    arms = [
        [
            name.arm,
            f"{name.done} of {name.planned}" + (f", {name.diverged} diverged" if name.diverged else ""),
            *(
                sentences.plus_minus(mean) if (mean := _mean(analysis, name.arm, r)) else sentences.MISSING
                for r in study.responses
            ),
        ]
        for name in names
    ]
    verdicts = [
        [
            v.text or v.hypothesis,
            sentences.claim(v),
            v.outcome,
            sentences.p_value(v.p),
            sentences.p_value(v.p_holm),
            v.reason,
        ]
        for v in analysis.verdicts
    ]
    texts = {
        "how to read this": _how_to_read(study, analysis.warnings),
        "arms": _table(["arm", "seeds", *(r.name for r in study.responses)], arms),
    }
    if verdicts:
        heads = ["hypothesis", "claim", "verdict", "p", "p (Holm)", "why"]
        texts["verdicts"] = _table(heads, verdicts)
    return texts


def _how_to_read(study: Study, warnings: Sequence[str]) -> str:
    level = sentences.confidence(1 - study.alpha)
    text = f"""
# {study.title or study.name}

Each run is an arm: the mean over its finished seeds, at the steps where all of them have a value. A run named
`arm (2 of 3 seeds, 1 diverged)` is a **mean of survivors**: the seeds that diverged are in none of its curves.
Bounds (`…_bounds/…`, and the bands under *Custom Scalars*) are {level} Student-t intervals of
that mean, at each step by itself, for {MIN_SEEDS} seeds or more; so is what follows ± in the table of arms.
*HParams* has a row for each arm; the step and time of its numbers say nothing.
"""
    if warnings:
        text += "\nBefore the numbers:\n\n" + "\n".join(f"* {warning}" for warning in warnings)
    return text


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# ------------------------------------------------------------------------------------------- onto the disk


def _replace(directory: Path, data: bytes) -> None:
    """One event file instead of those that are there. Under its name it is whole from the first moment."""
    disk.make_private(directory)
    temp = directory / ".new"  # a name that TensorBoard does not read
    temp.write_bytes(data)
    temp.replace(directory / events.next_file_name(directory))


def _remove_others(out: Path, kept: set[Path]) -> None:
    """Removes the event files of runs that are no longer there, and the directories that this leaves empty."""
    stale = {path.parent for path in out.rglob("events.out.tfevents.*")} - kept
    for directory in stale:
        for path in directory.glob("events.out.tfevents.*"):
            path.unlink()
        if not any(directory.iterdir()):
            directory.rmdir()
