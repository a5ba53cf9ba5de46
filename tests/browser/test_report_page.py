"""The report in a real browser: nothing is fetched, nothing fails, and it fits a desk and a telephone.

Chromium's own window is never narrower than about 500 px, so the page is shown in a frame of the wanted width,
and a script beside the frame writes what it measured into the document, which `--dump-dom` prints.
"""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxablate.analysis import results
from jaxablate.analysis.report.write import write_report
from jaxablate.analysis.stats.analyse import analyse
from tests.analysis.made import made_study
from tests.analysis.made_dirs import made_study_dir

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps",
    "--virtual-time-budget=8000", "--window-size=1400,1000",
)  # fmt: skip
PROBE = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><body>
<iframe id="frame" style="border:0;width:{width}px;height:900px"></iframe><pre id="measured"></pre><script>
const frame = document.getElementById("frame"), errors = [];
frame.onload = () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  const wide = [...page.querySelectorAll("body *")].filter(e =>
    !e.closest(".scroll") && e.getBoundingClientRect().right > view.innerWidth + 0.5);
  document.getElementById("measured").textContent = JSON.stringify({{
    inner: view.innerWidth,
    scroll: page.documentElement.scrollWidth,
    wide: wide.slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
    images: [...page.images].map(i => i.complete && i.naturalWidth > 0),
    smallest_image: Math.min(...[...page.images].map(i => i.getBoundingClientRect().width)),
    own: [...page.querySelectorAll("#own figure img")].map(i => i.getBoundingClientRect().width),
    tables: page.querySelectorAll("table").length,
    verdicts: [...page.querySelectorAll("#verdicts tbody td:nth-child(2) span")].map(e => e.textContent),
    tinted: [...new Set([...page.querySelectorAll("#verdicts td span")].map(
      e => view.getComputedStyle(e).backgroundColor))],
    resources: view.performance.getEntriesByType("resource")
      .map(e => e.name).filter(name => !name.startsWith("data:")),
  }});
}};
frame.src = "report.html";
</script></body>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with an arm of which one run diverged, a name as long as names get, and a picture of the study's own."""
    where = tmp_path_factory.mktemp("study")
    study = made_study(
        3,
        title="An_unreasonably_long_title_without_a_single_space_in_it_for_a_narrow_screen " * 2,
        extra_report="tests.analysis.made:wide_picture",
    )
    found = results.load(
        made_study_dir(where, study, rows=24, diverged={"rms_only": (2,)}, effects={"rms": -0.08})
    )
    write_report(found, analyse(found), where / "report")
    return where / "report"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves the folder and keeps what was asked for."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(report: Path) -> Iterator[tuple[str, list[str]]]:
    """(address of the report's folder, the paths that were asked of it)."""
    asked: list[str] = []
    handler = type("Handler", (_Quiet,), {"asked": asked})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(report))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def browse(chromium: str, address: str, profile: Path, *flags: str) -> tuple[str, str]:
    """(the document as it is in the end, what the console said)."""
    done = subprocess.run(
        [chromium, *FLAGS, f"--user-data-dir={profile}", "--enable-logging=stderr", *flags, "--dump-dom", address],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def measure(chromium: str, site: tuple[str, list[str]], folder: Path, profile: Path, width: int) -> dict:
    (folder / f"probe{width}.html").write_text(PROBE.format(width=width))
    dom, _ = browse(chromium, f"{site[0]}/probe{width}.html", profile)
    found = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.S)
    assert found and found[1], dom[-500:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", [1280, 400, 320])
def test_the_page_fits(chromium, site, report: Path, tmp_path: Path, width: int) -> None:
    seen = measure(chromium, site, report, tmp_path, width)
    assert seen["inner"] == width
    assert seen["scroll"] <= width, seen["wide"]
    assert seen["wide"] == []
    assert all(seen["images"]) and len(seen["images"]) >= 8
    assert seen["smallest_image"] > 0.7 * min(width, 500)
    assert len(seen["own"]) == 1 and seen["own"][0] < width
    assert seen["tables"] >= 6
    assert len(seen["verdicts"]) == 5 and set(seen["verdicts"]) <= {
        "supported",
        "refuted",
        "inconclusive",
        "not run",
    }
    assert "rgba(0, 0, 0, 0)" not in seen["tinted"]  # a colour besides the word
    assert seen["resources"] == []
    # The browser asked for the page and nothing else.
    assert [path for path in site[1] if not path.startswith("/probe")] == ["/report.html"]


def test_a_page_that_does_not_fit_would_be_seen(chromium, site, report: Path, tmp_path: Path) -> None:
    page = report / "report.html"
    whole = page.read_text()
    try:
        page.write_text(
            whole.replace("<main>", '<main><div style="width:700px">wide</div><img src="/missing.png">')
        )
        seen = measure(chromium, site, report, tmp_path, 400)
    finally:
        page.write_text(whole)
    assert seen["scroll"] > 400 and seen["wide"]
    assert not all(seen["images"])


def test_it_opens_from_a_file_without_a_word_on_the_console(chromium, report: Path, tmp_path: Path) -> None:
    dom, console = browse(chromium, (report / "report.html").as_uri(), tmp_path / "profile")
    assert console == ""
    assert "Verdicts on the declared hypotheses" in dom and "2 of 3, 1 diverged" in dom
    noisy = tmp_path / "noisy.html"
    noisy.write_text("<script>throw new Error('heard')</script>")
    assert "heard" in browse(chromium, noisy.as_uri(), tmp_path / "other")[1]


@pytest.mark.parametrize("width", [1280, 500])
def test_it_can_be_pictured(chromium, report: Path, tmp_path: Path, width: int) -> None:
    """A screenshot is there and is no blank sheet."""
    from matplotlib.image import imread

    picture = tmp_path / "page.png"
    browse(
        chromium, (report / "report.html").as_uri(), tmp_path / "profile", f"--screenshot={picture}",
        f"--window-size={width},1200",
    )  # fmt: skip
    assert imread(picture).std() > 0.02
