"""The figures of a study: which there are, with their captions and their text for who cannot see them.

A figure is drawn at the width of a column (4.7 in), so that its letters can be read on a telephone and in a
paper; the overview alone is wide. A caption says what the bars are and how many seeds stand behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jaxablate.analysis import plots, sentences
from jaxablate.analysis.findings import ArmValue, Estimate
from jaxablate.analysis.plots import encode, metric_name, new_figure
from jaxablate.analysis.report import lineplots, rowplots
from jaxablate.analysis.report.scene import Scene, drawn_responses
from jaxablate.study import Response

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.7  # inches
ROWS = 24  # effects in one forest plot; the tables hold them all
RESPONSES = 4  # that get dots, forests and curves of their own


@dataclass(frozen=True)
class Drawn:
    """A figure, ready to be shown: `name` is its file's stem, `part` the section that it belongs to."""

    name: str
    part: str
    alt: str
    caption: str
    png: bytes
    svg: bytes
    pdf: bytes


@dataclass(frozen=True)
class Plan:
    """A figure that is yet to be drawn; `size` in inches."""

    name: str
    part: str
    alt: str
    caption: str
    size: tuple[float, float]
    draw: Callable[[Figure], None]


def draw_all(scene: Scene) -> list[Drawn]:
    """Every figure that the results can fill, in the order of the report."""
    return [render(plan) for plan in plans(scene)]


def render(plan: Plan) -> Drawn:
    """The figure in all three forms."""
    figure = new_figure(*plan.size)
    with plots.plain_text():
        plan.draw(figure)
    # One layout serves all three files; without this each of them would compute it again.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    png, svg, pdf = encode(figure, "png"), encode(figure, "svg"), encode(figure, "pdf")
    return Drawn(plan.name, plan.part, plan.alt, plan.caption, png, svg, pdf)


def _single(draw: Callable[[Axes], None]) -> Callable[[Figure], None]:
    return lambda figure: draw(figure.subplots())


def plans(scene: Scene) -> Iterator[Plan]:
    """The figures that the results can fill. Nothing is drawn yet."""
    responses = drawn_responses(scene.results.study.responses)[:RESPONSES]
    for response in responses:
        if any(v.values for v in scene.values(response.name)):
            yield _dots(scene, response)
    for response in responses:
        yield from _forest(scene, response)
    yield from _interactions(scene)
    for metric in scene.metrics[: RESPONSES + 1]:
        yield _curves(scene, metric)
    yield from _pareto(scene)
    yield from _reached(scene)
    yield from _divergence(scene)
    yield from _rates(scene)


# ------------------------------------------------------------------------------- what captions say


def bars(values: Sequence[ArmValue]) -> str:
    """What the bars of these values are, and of those without one why there is none."""
    means = [value.mean for value in values]
    lacking = {value.arm: value.mean.note for value in values if value.mean.low is None}
    return _bars(means, lacking, " of the mean (Student t over seeds)")


def _bars(estimates: Sequence[Estimate], lacking: Mapping[str, str], what: str) -> str:
    with_bars = [e for e in estimates if e.low is not None]
    whys = [f"{name} ({note})" if note else name for name, note in lacking.items()]
    if len(whys) > 4:
        whys = [*whys[:3], f"{len(whys) - 3} more"]
    if not with_bars:
        notes = list(dict.fromkeys(filter(None, lacking.values())))
        return (
            f"There are no intervals: {notes[0]}." if len(notes) == 1 else f"No intervals: {'; '.join(whys)}."
        )
    n = sorted({e.n for e in with_bars})
    runs = f"n = {n[0]}" if len(n) == 1 else f"n = {n[0]} to {n[-1]}"
    text = f"Bars: {sentences.level(with_bars[0])} intervals{what}, {runs} seeds."
    return f"{text} Without a bar: {'; '.join(whys)}." if whys else text


def _effect_bars(rows: Sequence[rowplots.Row]) -> str:
    hows = list(dict.fromkeys(row.estimate.how for row in rows if row.estimate.low is not None))
    lacking = {row.label: row.estimate.note for row in rows if row.estimate.low is None}
    return _bars([row.estimate for row in rows], lacking, f" ({hows[0]})" if len(hows) == 1 else "")


def _incomplete(values: Sequence[ArmValue]) -> str:
    lacking = [f"{v.arm} {sentences.seeds(v)}" for v in values if not v.complete]
    if not lacking:
        return ""
    shown = lacking[:6] + ([f"{len(lacking) - 6} more arms"] if len(lacking) > 6 else [])
    return f" Incomplete: {'; '.join(shown)}; means are of the runs that finished."


def _sentence(*parts: str) -> str:
    return " ".join(part.strip() for part in parts if part.strip())


# -------------------------------------------------------------------------------------- the figures


def _dots(scene: Scene, response: Response) -> Plan:
    values = scene.values(response.name)
    read = [f"{v.arm} {sentences.plus_minus(v.mean)} ({sentences.seeds(v)})" for v in values]
    return Plan(
        f"arms_{response.name}",
        "arms",
        f"{metric_name(response.metric)} of each arm: {'; '.join(read)}.",
        _sentence(
            f"{response.name} ({sentences.rule(response)}; {sentences.goal(response)} is better) of each arm. "
            "Points: seeds. Diamonds: means. Dotted line: mean of the baseline.",
            bars(values),
            _incomplete(values),
        ),
        (WIDTH, 1.0 + 0.34 * len(values)),
        _single(lambda axes: rowplots.dots(axes, scene, response, values, f"{response.name} by arm")),
    )


@dataclass(frozen=True)
class Forest:
    """What a forest plot of one response shows."""

    kind: Literal["effects", "contrasts"]
    title: str
    axis: str
    rows: list[rowplots.Row]


def forest_of(scene: Scene, response: Response) -> Forest:
    """The effects of a factorial on a response; without one, the arms against the baseline."""
    table, name = scene.effect_table(response.name), metric_name(response.metric)
    if table is not None and table.effects:
        log = table.scale == "log"
        show = sentences.log_in_percent if log else _as_it_is
        rows = [
            rowplots.Row(sentences.effect_name(e), show(e.estimate), e.better, scene.standing(e))
            for e in table.effects
        ]
        return Forest(
            "effects", f"Effects on {response.name}", f"change of {name}{' (%)' if log else ''}", rows
        )
    found = scene.contrasts(response.name)
    ratios = response.scale == "log" and any(c.ratio is not None for c in found)
    rows = []
    for c in found:
        missing = Estimate(None, note="no ratio: not all values are positive")
        estimate = sentences.ratio_in_percent(c.ratio or missing) if ratios else c.difference
        rows.append(rowplots.Row(c.arm, estimate, c.better, scene.standing(c)))
    title = f"{response.name} against {scene.results.study.baseline}"
    return Forest("contrasts", title, f"difference in {name}{' (%)' if ratios else ''}", rows)


def _as_it_is(estimate: Estimate) -> Estimate:
    return estimate


def _forest(scene: Scene, response: Response) -> Iterator[Plan]:
    forest = forest_of(scene, response)
    if not any(row.estimate.value is not None for row in forest.rows):
        return
    shown = forest.rows[:ROWS]
    read = [
        f"{r.label} {sentences.interval(r.estimate, sign='+')}, {sentences.judged(r.better)}, {r.standing}"
        for r in shown
    ]
    lead = {
        "effects": "from each factor's reference level to its other one",
        "contrasts": "the mean over paired seeds of each arm's difference from the baseline",
    }[forest.kind]
    percent = ", in percent from the mean of logarithms" if forest.axis.endswith("(%)") else ""
    more = (
        f"The first {ROWS} of {len(forest.rows)}; all are in effects.csv." if len(forest.rows) > ROWS else ""
    )
    yield Plan(
        f"{forest.kind}_{response.name}",
        forest.kind,
        f"{forest.title}: {'; '.join(read)}.",
        _sentence(
            f"{forest.title}: {lead}{percent}.",
            _effect_bars(shown),
            "Blue: better, red: worse, grey: the interval holds zero or there is none. Open: exploratory; filled: "
            "declared by a hypothesis.",
            more,
        ),
        (WIDTH, 1.1 + 0.36 * len(shown)),
        _single(lambda axes: rowplots.forest(axes, shown, forest.title, forest.axis, response.better)),
    )


def _interactions(scene: Scene) -> Iterator[Plan]:
    response = scene.results.study.response()
    table = next(
        (t for t in scene.analysis.effects if t.response == response.name and t.scale == "raw"), None
    )
    pairs = [e for e in table.effects if len(e.factors) == 2 and e.level_means] if table else []
    pairs = pairs[:6]
    if not pairs:
        return
    columns = min(len(pairs), 3)
    lines = -(-len(pairs) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axes, effect in zip(grid.flat, pairs, strict=False):
            lineplots.interaction(axes, scene, effect, response)
        for axes in grid.flat[len(pairs) :]:
            axes.set_visible(False)
        for axes in grid[:, 1:].flat:
            axes.set_ylabel("")

    read = [
        f"{sentences.effect_name(e)} {sentences.interval(e.estimate, sign='+')}, {sentences.judged(e.better)}"
        for e in pairs
    ]
    yield Plan(
        f"interactions_{response.name}",
        "effects",
        f"Cell means of {response.name} by pairs of factors; interactions: {'; '.join(read)}.",
        _sentence(
            f"Means of {response.name} over the cells of two factors. Parallel lines: no interaction. All "
            "interactions are exploratory.",
            f"Interactions with {sentences.level(pairs[0].estimate)} intervals: {'; '.join(read)}."
            if pairs[0].estimate.low is not None
            else f"No intervals: {pairs[0].estimate.note or 'too few seeds'}.",
        ),
        (WIDTH if columns > 1 else WIDTH * 0.6, 2.3 * lines),
        draw,
    )


def _curves(scene: Scene, metric: str) -> Plan:
    means = {arm: scene.mean_curve(metric, arm) for arm in scene.arms}
    ends = [f"{arm} {sentences.number(float(m.mean[-1]))}" for arm, m in means.items() if m is not None]
    n = sorted({m.runs for m in means.values() if m is not None})
    banded = any(m is not None and m.low is not None for m in means.values())
    runs = f"n = {n[0]}" if len(n) == 1 else f"n = {n[0]} to {n[-1]}" if n else "n = 0"
    lost = [run for arm in scene.arms for run, _ in scene.series(metric, arm) if run.state == "diverged"]
    many = max(n, default=0) > lineplots.SEEDS_DRAWN
    thin = f"the first {lineplots.SEEDS_DRAWN} seeds of each arm" if many else "seeds"
    return Plan(
        f"curve_{metric.replace('/', '_')}",
        "curves",
        f"{metric_name(metric)} over training for each arm; last means: {'; '.join(ends)}.",
        _sentence(
            f"{sentences.capital(metric_name(metric))} over training"
            + (", each run smoothed" if metric.startswith("train/") else "")
            + f". Thick: mean of the runs that finished ({runs} for each arm); thin: {thin}.",
            f"Bands: {sentences.confidence(scene.level)} Student t intervals over seeds, step by step."
            if banded
            else "No bands: an interval needs three runs.",
            f"{sentences.count(len(lost), 'run')} diverged: dotted up to a cross, and in no mean."
            if lost
            else "",
            scene.rest,
        ),
        (WIDTH, 3.6),
        _single(
            lambda axes: lineplots.curve_bands(axes, scene, metric, sentences.capital(metric_name(metric)))
        ),
    )


def _pareto(scene: Scene) -> Iterator[Plan]:
    response = drawn_responses(scene.results.study.responses)
    if not response or len(scene.comparable) < 2:
        return
    primary, speeds = response[0], scene.comparable
    values = {v.arm: v for v in scene.values(primary.name)}
    if not any(v.mean.value is not None for v in values.values()):
        return
    left = [arm for arm in scene.arms if arm not in {s.arm for s in speeds}]
    read = [
        f"{s.arm} {sentences.number(s.steps_per_sec)} steps/s, {sentences.number(values[s.arm].mean.value)}, "
        f"{sentences.gigabytes(s.peak_bytes)}"
        for s in speeds
        if s.arm in values
    ]
    cohort = f", {speeds[0].cohort_size} runs at once" if speeds[0].cohort_size > 1 else ""
    yield Plan(
        "pareto",
        "speed",
        f"{primary.name} against training speed and memory: {'; '.join(read)}.",
        _sentence(
            f"{primary.name} against training speed on {speeds[0].hardware or 'unknown hardware'}{cohort}; "
            "area: peak memory. The line joins the arms that no other beats in both means.",
            bars(list(values.values())),
            f"Not comparable, so left out: {sentences.listed(left[:8])}." if left else "",
            scene.rest,
        ),
        (WIDTH, 3.4),
        _single(lambda axes: lineplots.pareto(axes, scene, primary, f"{primary.name}, speed and memory")),
    )


def _reached(scene: Scene) -> Iterator[Plan]:
    for response in scene.results.study.responses:
        rows = [t for t in scene.analysis.time_to if t.response == response.name]
        if response.reduce != "time_to" or not any(row.runs for row in rows):
            continue
        target = sentences.number(rows[0].target)
        read = [f"{t.arm} {t.reached} of {t.runs}" for t in rows]
        yield Plan(
            f"reached_{response.name}",
            "time",
            f"Share of runs at the target over training: {'; '.join(read)}.",
            _sentence(
                f"Share of an arm's runs whose {response.metric} has reached {target}, by step (Kaplan–Meier). "
                "A run that never does counts as not reached, also if it diverged; one that stopped early is "
                "censored. Lines are a little apart so as not to hide each other. No intervals are drawn; the table "
                "has those of the mean.",
                scene.rest,
            ),
            (WIDTH, 3.2),
            _single(
                lambda axes, response=response, target=target: lineplots.reached(
                    axes, scene, response, f"Reaching {target}"
                )
            ),
        )


def _divergence(scene: Scene) -> Iterator[Plan]:
    counts = [d for d in scene.analysis.divergence if d.ended]
    lost = [d for d in counts if d.diverged]
    if not lost:
        return
    shown = counts if len(counts) <= ROWS else lost[:ROWS]
    read = [f"{d.arm} {d.diverged} of {d.ended}" for d in lost]
    yield Plan(
        "divergence",
        "divergence",
        f"Confirmatory runs that diverged: {'; '.join(read)}.",
        "Share of the confirmatory runs that ended in divergence. "
        f"Lines: exact {sentences.confidence(scene.level)} intervals (Clopper–Pearson).",
        (WIDTH, 1.0 + 0.3 * len(shown)),
        _single(lambda axes: rowplots.divergence(axes, scene, shown, "Runs that diverged")),
    )


def _rates(scene: Scene) -> Iterator[Plan]:
    curves = scene.analysis.rates
    if not any(len(curve.points) > 1 for curve in curves):
        return
    response = scene.results.study.response(curves[0].response)
    read = [f"{c.arm} {sentences.number(c.chosen)}" for c in curves]
    seeds = sorted({p.runs for c in curves for p in c.points})
    yield Plan(
        "learning_rates",
        "rates",
        f"{response.name} over the learning rate on tuning seeds; chosen: {'; '.join(read)}.",
        _sentence(
            f"{response.name} over the learning rate: means over {sentences.listed([str(n) for n in seeds])} "
            "tuning seeds, which enter no other figure. No intervals are drawn. Ring: the rate that was chosen. "
            "Cross: at least one run diverged at this rate.",
            scene.rest,
        ),
        (WIDTH, 3.4),
        _single(
            lambda axes: lineplots.rate_curves(
                axes, scene, curves, response, f"{response.name} by learning rate"
            )
        ),
    )
