"""Series, smoothing, curves for the terminal, and PNG figures: also of short, torn and diverged runs."""

from __future__ import annotations

import math
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxablate import disk, runstore
from jaxablate.analysis import curves, plots
from jaxablate.analysis.curves import Series
from jaxablate.runstore import RunDir

ROOT = Path(runstore.__file__).parents[1]
Row = dict[str, Any]


def example(steps: int = 120, *, seed: int = 0, val: bool = True, bad: range = range(0)) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for step in range(1, steps + 1):
        loss = 3 * math.exp(-step / 40) + 0.5 + 0.1 * rng.standard_normal()
        rows.append({"step": step, "train/loss": None if step in bad else loss})
        if val and step % 20 == 0:
            rows.append(
                {"step": step, "val/loss": loss + 0.1, "val/macro_auroc": 0.9 - 0.4 * math.exp(-step / 40)}
            )
    return rows


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def has_color(image: np.ndarray, color: str) -> int:
    """How many pixels have a colour of the palette."""
    wanted = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return int((np.abs(image - wanted).max(axis=-1) < 0.02).sum())


# ---------------------------------------------------------------------------------------------- series


def test_series_and_loading(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    rows = [{"step": 1, "a": 1.0}, {"step": 1, "b": 5}, {"step": 2, "a": None}, {"step": 3, "a": 2.0}]
    for row in rows:
        disk.append_jsonl(run.metrics, row)
    with run.metrics.open("ab") as file:
        file.write(b'{"step": 4, "a"')
    for source in (run, tmp_path, str(tmp_path), run.metrics, rows):
        curve = curves.series(curves.load(source), "a")
        assert curve.steps.tolist() == [1, 2, 3]
        assert curve.values.tolist()[::2] == [1.0, 2.0]
        assert math.isnan(curve.values[1])
        assert curve.finite.steps.tolist() == [1, 3]
    assert len(curves.series(rows, "none")) == 0
    assert len(curves.load(tmp_path / "none")) == 0


def test_smoothing_keeps_constants_and_gaps_and_does_not_lag() -> None:
    steps = np.arange(200)
    flat = curves.smooth(Series(steps, np.full(200, 2.5)), 40)
    assert flat.values == pytest.approx(2.5)
    line = curves.smooth(Series(steps, steps.astype(float)), 40)
    assert line.values[40:160] == pytest.approx(steps[40:160])  # a trailing average would lie 20 below
    values = np.where((steps > 90) & (steps < 110), np.nan, 1.0)
    gap = curves.smooth(Series(steps, values), 40)
    assert np.array_equal(np.isnan(gap.values), np.isnan(values))
    assert np.nanmax(gap.values) == pytest.approx(1.0)
    noise = Series(steps, np.random.default_rng(0).standard_normal(200))
    assert curves.smooth(noise, 40).values.std() < 0.4 * noise.values.std()
    for short in (0, 1, 2):
        assert len(curves.smooth(Series(steps[:short], np.ones(short)), 40)) == short


def test_the_step_of_divergence() -> None:
    assert curves.diverged_at(example()) is None
    assert curves.diverged_at(example(bad=range(50, 999))) == 50
    assert curves.diverged_at(example(bad=range(50, 60))) is None  # it came back
    assert curves.diverged_at(example(bad=range(1, 999))) == 1
    assert curves.diverged_at([]) is None


# -------------------------------------------------------------------------------------------- terminal


def test_a_terminal_curve_goes_from_the_upper_left_to_the_lower_right() -> None:
    text = curves.terminal_curve(
        [{"step": i, "x": 10.0 - i / 10} for i in range(101)], "x", width=70, height=5
    )
    lines = text.split("\n")
    assert lines[0] == "x: 10 → 0"
    assert lines[-1].split() == ["step", "0", "100"]
    assert len(lines) == 7
    assert lines[1].startswith("10")
    assert lines[5].split()[0].startswith("0")
    bodies = [line.split("┤")[1] for line in lines[1:-1]]
    inked = [[i for i, char in enumerate(body) if char != "\u2800"] for body in bodies]
    assert [positions[0] for positions in inked] == sorted(positions[0] for positions in inked)
    assert inked[0][0] == 0
    assert inked[-1][-1] == max(map(len, bodies)) - 1
    # Joined: no column is empty.
    assert {i for positions in inked for i in positions} == set(range(max(map(len, bodies))))


def test_few_points_are_joined_and_gaps_are_not() -> None:
    def columns(values: list[float | None]) -> set[int]:
        rows = [{"step": 10 * i, "x": value} for i, value in enumerate(values)]
        lines = curves.terminal_curve(rows, "x", width=60, height=4).split("\n")[1:-1]
        bodies = [line.split("┤")[1] for line in lines]
        return {i for body in bodies for i, char in enumerate(body) if char != "\u2800"}

    whole, broken = columns([0, 1, 2, 3, 4, 5]), columns([0, 1, None, 3, 4, 5])
    assert whole == set(range(max(whole) + 1))
    assert broken < whole
    assert max(broken) == max(whole)


@pytest.mark.parametrize(
    "rows, said",
    [
        ([], "x: no values"),
        ([{"step": 1, "x": None}] * 3, "x: no finite values in 3"),
        ([{"step": 7, "x": 2.0}], "x: 2 → 2"),
        ([{"step": 1, "x": 2.0}, {"step": 2, "x": None}], "x: 2 → 2, 1 not finite"),
    ],
)
def test_hardly_any_values(rows: list[Row], said: str) -> None:
    assert curves.terminal_curve(rows, "x", 40).split("\n")[0] == said


@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.none() | st.floats(-1e6, 1e6)), max_size=50),
    st.integers(30, 120),
    st.integers(2, 12),
)
def test_a_terminal_curve_fits_its_width(
    points: list[tuple[int, float | None]], width: int, height: int
) -> None:
    text = curves.terminal_curve([{"step": step, "x": value} for step, value in points], "x", width, height)
    lines = text.split("\n")
    assert len(lines) in (1, height + 2)
    assert all(len(line) <= width for line in lines[1:])
    assert all(unicodedata.east_asian_width(char) in "NaAH" or char.isascii() for char in text)


# --------------------------------------------------------------------------------------------- figures


def test_one_run(tmp_path: Path) -> None:
    out = tmp_path / "loss_curves.png"
    plots.loss_curves(example(), out, title="flash_rms", chance=0.5)
    image = pixels(out)
    assert image.shape[1] > 1200
    assert image.shape[0] > 400
    half = image.shape[1] // 2
    left, right = image[:, :half], image[:, half:]
    assert has_color(left, plots.PALETTE[0]) > 500
    assert has_color(left, plots.PALETTE[1]) > 100
    assert has_color(right, plots.PALETTE[2]) > 300
    assert has_color(right, plots.PALETTE[0]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["loss_curves.png"]


def test_without_a_response_there_is_one_panel(tmp_path: Path) -> None:
    plots.loss_curves(example(val=False), tmp_path / "a.png")
    plots.loss_curves(example(), tmp_path / "b.png", response=None)
    plots.loss_curves(example(), tmp_path / "c.png")
    widths = [pixels(tmp_path / f"{name}.png").shape[1] for name in "abc"]
    assert widths[0] == widths[1] < widths[2]
    assert has_color(pixels(tmp_path / "a.png"), plots.PALETTE[1]) == 0


def test_eight_arms_have_eight_colors(tmp_path: Path) -> None:
    assert len(set(plots.PALETTE)) == 8
    runs = {f"arm{i}": example(seed=i) for i in range(8)}
    plots.loss_curves(runs, tmp_path / "arms.png", title="CT-CLIP", chance=0.5, loss_label="loss (nats)")
    image = pixels(tmp_path / "arms.png")
    assert all(has_color(image, color) > 100 for color in plots.PALETTE)


def test_divergence_is_marked(tmp_path: Path) -> None:
    color = plots.INK
    plots.loss_curves(example(), tmp_path / "fine.png", response=None)
    plots.loss_curves(example(bad=range(60, 999)), tmp_path / "bad.png", response=None)
    fine, bad = (pixels(tmp_path / f"{name}.png") for name in ("fine", "bad"))

    def tallest(image: np.ndarray) -> int:
        wanted = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return int((np.abs(image - wanted).max(axis=-1) < 0.1).sum(axis=0).max())

    assert tallest(bad) > 150 > 2 * tallest(fine)  # a line from the bottom to the top


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 5, "train/loss": 1.0}],
        [{"step": 0, "val/loss": 1.0, "val/macro_auroc": 0.5}],
        [{"step": step, "train/loss": None, "val/loss": None, "val/macro_auroc": None} for step in range(30)],
        [{"step": step, "train/loss": 1.0} for step in range(30)],
        example(bad=range(40, 60)),
        example(bad=range(1, 999)),
        [{"step": step, "train/loss": 10.0 ** (step % 37)} for step in range(300)],
        [{"step": step * 10**6, "train/loss": 1.0 / (step + 1)} for step in range(300)],
        [{"step": step, "train/loss": 1.0 if step % 2 else None} for step in range(40)],
    ],
    ids=["nothing", "one", "one-val", "all-nan", "constant", "gap", "never", "huge", "long", "every-other"],
)
def test_odd_runs_are_drawn(tmp_path: Path, rows: list[Row], recwarn: pytest.WarningsRecorder) -> None:
    plots.loss_curves(rows, tmp_path / "odd.png", title="odd", chance=0.5)
    plots.loss_curves({"odd": rows, "even": example()}, tmp_path / "two.png", title="odd")
    assert pixels(tmp_path / "odd.png").std() > 0
    assert not recwarn.list


def test_equal_runs_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plots.loss_curves(example(), tmp_path / f"{name}.png", title="same")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_names_of_metrics() -> None:
    assert plots.metric_name("val/macro_auroc") == "validation macro AUROC"
    assert plots.metric_name("val/loss") == "validation loss"


def test_no_jax_no_pyplot_and_no_matplotlib_before_it_is_needed(tmp_path: Path) -> None:
    code = """
import sys
from jaxablate.analysis import curves, plots
assert not {"jax", "matplotlib", "tensorboard"} & set(sys.modules)
plots.loss_curves([{"step": 1, "train/loss": 1.0}], sys.argv[1])
assert not {"jax", "matplotlib.pyplot", "tensorboard"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True, cwd=ROOT)
