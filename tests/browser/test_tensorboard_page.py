"""TensorBoard's own page, as a browser renders it, lists every arm with its metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxablate.analysis.board import write_board
from jaxablate.analysis.stats.analyse import analyse
from tests.analysis.made import made_results
from tests.analysis.recorded import record
from tests.browser.devtools import Page, browse
from tests.running_tensorboard import tensorboard

TIMEOUT_S = 30.0
ARMS = (
    "baseline", "flash_only", "rms_only", "swiglu_only", "flash_rms", "flash_swiglu", "rms_swiglu",
    "optimized_full",
)  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2^3 study of three seeds, of which one arm lost a seed, with its board."""
    path = tmp_path_factory.mktemp("browser") / "study"
    results = record(made_results(seeds=3, effects={"swiglu": 0.02}, diverged={"rms_only": [2]}), path)
    write_board(results, analyse(results), path / "report" / "tensorboard")
    return path


@contextlib.contextmanager
def page_of(chromium: str, logdir: Path, arms: int) -> Iterator[tuple[Page, str]]:
    """A browser, and the address of a TensorBoard that has read the arms."""
    with tensorboard(logdir) as served, browse(chromium) as page:
        served.wait(lambda: len(served.groups()) == arms)
        served.wait(lambda: all(group.get("metricValues") for group in served.groups()))
        yield page, f"http://127.0.0.1:{served.port}"


@pytest.fixture(scope="module")
def board(chromium: str, study: Path) -> Iterator[tuple[Page, str]]:
    """The page of the board alone."""
    with page_of(chromium, study / "report" / "tensorboard", len(ARMS)) as found:
        yield found


def eventually(ask: Callable[[], Any]) -> Any:
    """The first answer that is true; the last one after a while."""
    end = time.monotonic() + TIMEOUT_S
    while not (answer := ask()) and time.monotonic() < end:
        time.sleep(0.2)
    return answer


def table(page: Page) -> dict[str, dict[str, str]]:
    """What the table of the hparams page shows: row -> column -> text; empty until it is there."""
    cells = page.visible("vaadin-grid-cell-content")
    width = next((i for i, cell in enumerate(cells) if " lr=" in cell), 0)
    if not width:
        return {}
    heads, *rows = (cells[i : i + width] for i in range(0, len(cells), width))
    return {row[0]: dict(zip(heads, row, strict=True)) for row in rows if row[0]}


def test_hparams_page_lists_every_arm_with_its_responses(board: tuple[Page, str]) -> None:
    page, address = board
    page.open(f"{address}/#hparams")
    assert eventually(lambda: len(table(page)) == len(ARMS)), page.visible("vaadin-grid-cell-content")
    rows = table(page)
    assert set(rows) == {f"{arm} lr=0.001" for arm in ARMS}
    for row in rows.values():
        for response in ("macro_auroc", "loss", "macro_auroc_time"):
            assert float(row[f"response/{response}"]) > 0
        assert {row["Factor flash"], row["Factor rms"], row["Factor swiglu"]} <= {"on", "off"}
    lost = rows.pop("rms_only lr=0.001")
    assert (float(lost["Seeds done"]), float(lost["Seeds diverged"])) == (2, 1)
    assert {float(row["Seeds diverged"]) for row in rows.values()} == {0}


def test_hparams_page_of_the_study_lists_every_arm_once(chromium: str, study: Path) -> None:
    with page_of(chromium, study, len(ARMS)) as (page, address):
        page.open(f"{address}/#hparams")
        assert eventually(lambda: len(table(page)) == len(ARMS)), page.visible("vaadin-grid-cell-content")
        rows = table(page)
        assert set(rows) == {f"{arm} lr=0.001" for arm in ARMS}
        for row in rows.values():
            rms = "rms" in row["arm"] or row["arm"] == "optimized_full"
            assert row["model.image.norm"] == ("rmsnorm" if rms else "layernorm")
            assert 0.5 < float(row["best/val_macro_auroc"]) < 1


def test_custom_scalars_draw_a_band_for_each_arm_with_three_seeds(board: tuple[Page, str]) -> None:
    page, address = board
    page.open(f"{address}/#custom_scalars")
    charts = ("val/macro_auroc", "val/loss", "train/loss", "train/lr", "perf/steps_per_sec")
    bands = (len(ARMS) - 1) * len(charts)
    eventually(lambda: len(page.visible("path.area")) == bands)
    assert len(page.visible("path.area")) == bands
    titles = page.visible(".heading-label.name")
    assert set(titles) == {name for chart in charts for name in (chart, f"{chart}, means of all arms")}


def test_a_page_without_the_table_has_no_rows(chromium: str) -> None:
    """What the tests above would see if the names stood somewhere else."""
    with browse(chromium) as page:
        page.open("data:text/html,<p>baseline lr=0.001</p><p hidden>rms_only lr=0.001</p>")
        assert eventually(lambda: page.visible("p")) == ["baseline lr=0.001"]
        assert table(page) == {}
