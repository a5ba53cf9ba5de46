"""The report: what a researcher reads is complete, safe, true to the findings, and never half-written."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jaxablate.analysis import results
from jaxablate.analysis.report import comparisons, figures, overview
from jaxablate.analysis.report import write as report
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.report.write import write_report
from jaxablate.analysis.results import Results
from jaxablate.analysis.stats.analyse import analyse
from jaxablate.errors import UserError
from jaxablate.study import Arm, Expectation, Hypothesis, LearningRate, Response, Study, factorial, switch
from tests.analysis.made import made_results, made_study
from tests.analysis.made_dirs import made_study_dir

FACTORS = (
    switch("rms", "model", {"model.norm": "rmsnorm"}),
    switch("swiglu", "model", {"model.ffn": "swiglu"}),
)
RESPONSES = (
    Response("val/macro_auroc", "max", chance=0.5),
    Response("val/loss", "min", scale="log"),
    Response("val/macro_auroc", "max", reduce="time_to", fraction=0.95, chance=0.5),
)
HYPOTHESES = (
    Hypothesis("swiglu_better", "superiority", factor="swiglu", text="SwiGLU raises the AUROC"),
    Hypothesis("rms_no_worse", "non_inferiority", "rms", margin=0.02, text="RMSNorm costs no AUROC"),
)
TEXTS = ("report.html", "report.md", "ablation_analysis.txt")


def small_study(seeds: int, **changes) -> Study:
    fields = {
        "factors": FACTORS,
        "arms": factorial(FACTORS),
        "responses": RESPONSES,
        "hypotheses": HYPOTHESES,
    }
    return made_study(seeds, **(fields | changes))


def report_on(study: Study, where: Path, **about) -> Path:
    found = results.load(made_study_dir(where, study, rows=24, **about))
    write_report(found, analyse(found), where / "report")
    return where / "report"


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds; one run of `rms` diverged; `swiglu` ran on another commit; rms is worse, swiglu better."""
    return report_on(
        small_study(3),
        tmp_path_factory.mktemp("lost"),
        effects={"rms": -0.06, "swiglu": 0.06},
        diverged={"rms": (2,)},
        commits={"swiglu": "f" * 40},
        noise=0.002,
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds."""
    return report_on(small_study(2), tmp_path_factory.mktemp("two"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures, which take most of the time, where a test is about something else."""
    for module in (figures, comparisons):
        monkeypatch.setattr(module, "draw_all", lambda scene: [])
    monkeypatch.setattr(overview, "overview", lambda scene: b"png")


class Page(HTMLParser):
    """The parts of a page that the tests look at."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self._skip = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        self._skip = tag == "style"
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._skip = False

    def handle_data(self, data):
        if self._skip:
            return
        self.words.append(data)
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += f"{data} "

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def row(self, *starts: str) -> str:
        """The first row whose first cells start so."""
        return " | ".join(
            next(
                r
                for r in self.rows
                if len(r) > 1 and all(c.startswith(s) for c, s in zip(r, starts, strict=False))
            )
        )


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


# ------------------------------------------------------------------------------------------ complete


def test_every_file_is_there_and_every_link_leads_to_one(lost: Path) -> None:
    expected = {*TEXTS, *(link.path.rstrip("/") for link in report.FILES)}
    assert expected <= {path.name for path in lost.iterdir()}
    page = Page(lost / "report.html")
    links = [a["href"] for a in page.all("a")]
    assert all((lost / link).exists() for link in links if not link.startswith("#"))
    anchors = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors
    shown = re.findall(r"\]\((figures/[^)]+)\)", (lost / "report.md").read_text())
    assert shown
    assert all((lost / path).exists() for path in shown)
    for figure in (lost / "figures").glob("*.png"):
        assert figure.with_suffix(".svg").exists() and figure.with_suffix(".pdf").exists()


def test_the_page_needs_nothing_but_itself(lost: Path) -> None:
    page = Page(lost / "report.html")
    images = page.all("img")
    assert len(images) >= 8
    assert all(image["src"].startswith("data:image/") and len(image["alt"]) > 30 for image in images)
    assert not page.all("script")
    assert not [link for link in page.all("link") if not link["href"].startswith("data:")]
    assert not re.search(r"url\(|@import", (lost / "report.html").read_text())


def test_the_summary_says_what_was_asked_found_and_locked(lost: Path) -> None:
    for name in TEXTS:
        text = " ".join(html.unescape((lost / name).read_text()).split())
        assert "The primary response is macro_auroc" in text
        assert "11 of 12 runs finished, 1 diverged" in text
        assert "The analysis plan was locked on 2026-01-01 00:00 UTC; its hash is" in text
        assert "It has not been changed since" in text


def test_a_run_of_other_code_is_reported(lost: Path, two: Path) -> None:
    said = "runs differ in code: commit 1a2b3c4d5e6f (9 runs) and commit ffffffffffff (3 runs)"
    for name in TEXTS:
        assert said in " ".join((lost / name).read_text().split())
    assert "runs differ" not in (two / "report.html").read_text()


# ------------------------------------------------------------------------------------------ truthful


def test_a_diverged_run_is_reported_everywhere(lost: Path) -> None:
    page = Page(lost / "report.html")
    assert "2 of 3, 1 diverged" in page.row("rms ", "0.")
    assert "3 of 3" in page.row("swiglu ", "0.") and "diverged" not in page.row("swiglu ", "0.")
    markdown = (lost / "report.md").read_text()
    assert re.search(r"^\| rms \| [^|]*\(2 of 3, 1 diverged\)", markdown, re.M)
    assert not re.search(r"^\| swiglu \|[^\n]*diverged\)", markdown, re.M)
    assert re.search(r"2 of 3, 1 diverged", (lost / "ablation_analysis.txt").read_text())
    rows = {(row["arm"], row["seed"]): row for row in table(lost / "ablation_comparison.csv")}
    assert rows["rms", "2"]["status"] == "diverged" and rows["rms", "2"]["macro_auroc"] == ""
    assert rows["rms", "1"]["status"] == "done" and rows["rms", "1"]["macro_auroc"]
    assert "rms & " in (lost / "tables.tex").read_text()
    assert re.search(r"^    rms & .*2 of 3, 1 diverged", (lost / "tables.tex").read_text(), re.M)
    numbers = (lost / "numbers.tex").read_text()
    assert r"\newcommand{\madeRmsMacroAurocDiverged}{1}" in numbers
    assert r"\newcommand{\madeSwigluMacroAurocDiverged}{0}" in numbers
    assert "rms (2 of 3, 1 diverged)" in (lost / "methods.md").read_text()
    assert (lost / "figures" / "divergence.png").exists()


def test_nothing_diverged_is_said_too_with_its_bound(two: Path) -> None:
    assert (
        "No confirmatory run diverged. The fewest ended in baseline, 2: there a share of up to 78 % cannot be excluded."
        in Page(two / "report.html").text
    )
    assert not (two / "figures" / "divergence.png").exists()


def test_with_two_seeds_there_are_no_intervals_and_the_reason_is_given(two: Path, lost: Path) -> None:
    for name in TEXTS:
        assert "2 seeds: no interval below 3" in (two / name).read_text()
    arms = Page(two / "report.html").row("baseline ", "0.")
    assert "±" not in arms and "2 of 2" in arms
    assert "±" in Page(lost / "report.html").row("baseline ", "0.")
    assert all(row["low"] == "" for row in table(two / "effects.csv"))
    assert any(row["low"] != "" for row in table(lost / "effects.csv"))
    assert "No intervals are given: 2 seeds: no interval below 3" in (two / "methods.md").read_text()
    assert all(verdict["outcome"] == "inconclusive" for verdict in table(two / "verdicts.csv"))


@pytest.mark.usefixtures("quick")
def test_a_lower_is_better_response_that_got_worse_is_never_called_better(tmp_path: Path) -> None:
    study = small_study(5)
    found = made_results(study, effects={"rms": -0.06, "swiglu": 0.06}, noise=0.002)
    write_report(found, analyse(found), tmp_path)
    judged = {
        (row["kind"], row["name"], row["response"], row["scale"]): row["judgement"]
        for row in table(tmp_path / "effects.csv")
    }
    values = {(row["name"], row["kind"]): float(row["value"]) for row in table(tmp_path / "effects.csv")
              if row["response"] == "loss" and row["scale"] == "raw"}  # fmt: skip
    assert values["rms", "effect"] > 0 > values["swiglu", "effect"]  # losses: up and down
    for scale in ("raw", "log"):
        assert judged["effect", "rms", "loss", scale] == "worse"
        assert judged["effect", "swiglu", "loss", scale] == "better"
        assert judged["effect", "rms", "macro_auroc", scale] == "worse"
    page = Page(tmp_path / "report.html")
    assert "worse" in page.row("rms ", "worse", "+")  # the loss of rms went up
    assert not [row for row in page.rows if row[:1] == ["rms "] and row[1].startswith("better")]
    assert [row for row in page.rows if row[:1] == ["swiglu "] and row[1].startswith("better")]
    text = (tmp_path / "ablation_analysis.txt").read_text()
    assert re.search(r"worse, exploratory: rms: −", text) and not re.search(r"better, \w+: rms:", text)
    assert re.search(r"better, declared: swiglu: \+", text)  # a hypothesis on the factor declares it


@pytest.mark.usefixtures("quick")
def test_what_was_not_measured_is_a_dash_and_never_a_number(tmp_path: Path) -> None:
    study = small_study(3)
    everything = {arm.name: study.seeds for arm in study.arms}
    found = made_results(study, missing=everything)
    write_report(found, analyse(found), tmp_path)
    page = Page(tmp_path / "report.html")
    row = page.row("baseline ", "–")
    assert "0 of 3, 3 unfinished" in row and not re.search(r"\d\.\d", row)
    assert "not run" in page.text
    assert all(row["macro_auroc"] == "" for row in table(tmp_path / "ablation_comparison.csv"))
    assert r"\newcommand{\madeBaselineMacroAurocMean}{--}" in (tmp_path / "numbers.tex").read_text()


@pytest.mark.usefixtures("quick")
def test_a_table_from_elsewhere_has_no_plan_and_no_curves(tmp_path: Path) -> None:
    found = made_results(small_study(3), locked=None, plan_hash="", source="numbers.csv")
    write_report(found, analyse(found), tmp_path)
    text = Page(tmp_path / "report.html").text
    assert "Read from numbers.csv. A table has no locked plan: everything here is exploratory." in text
    assert "A table holds no curves." in text
    assert "locked on" not in text


@pytest.mark.usefixtures("quick")
def test_amendments_and_a_plan_that_was_never_locked_are_said(tmp_path: Path) -> None:
    change = {
        "time": "2026-02-03T04:05:00+00:00",
        "hash": "abcd",
        "changes": ["hypotheses[0].margin: 0.0 -> 0.1"],
    }
    found = made_results(small_study(3), amendments=(change,))
    (tmp_path / "amended").mkdir()
    write_report(found, analyse(found), tmp_path / "amended")
    text = Page(tmp_path / "amended" / "report.html").text
    assert (
        "It was amended 1 time after that: 2026-02-03 04:05 UTC, hash abcd: hypotheses[0].margin: 0.0 -> 0.1"
        in text
    )
    assert "exploratory" in Page(tmp_path / "amended" / "report.html").row("swiglu_better")
    never = made_results(small_study(3), locked=None)
    write_report(never, analyse(never), tmp_path / "never")
    assert (
        "was not locked before the runs: everything here is exploratory"
        in Page(tmp_path / "never" / "report.html").text
    )


@pytest.mark.usefixtures("quick")
def test_what_no_hypothesis_declares_is_called_exploratory(tmp_path: Path) -> None:
    """The arm `swiglu` bears the name of a factor: a hypothesis on the factor does not declare the arm."""
    rms_rms = Hypothesis("rms_of_both", "non_inferiority", "rms", control="swiglu", margin=0.02)
    study = small_study(5, hypotheses=(HYPOTHESES[0], rms_rms))
    found = made_results(study, effects={"swiglu": 0.06})
    write_report(found, analyse(found), tmp_path / "a")
    page = Page(tmp_path / "a" / "report.html")
    rows = [row for row in page.rows if row[:1] in (["rms "], ["swiglu "]) and "declared" in str(row)]
    assert [(row[0], row[1].split()[-1]) for row in rows] == [
        ("swiglu ", "declared")
    ]  # the main effect alone
    arm = dataclasses.replace(HYPOTHESES[0], factor="", treatment="swiglu")
    asked = made_results(small_study(5, hypotheses=(arm,)), effects={"swiglu": 0.06})
    write_report(asked, analyse(asked), tmp_path / "b")
    page = Page(tmp_path / "b" / "report.html")
    rows = [row for row in page.rows if row[:1] == ["swiglu "] and "declared" in str(row)]
    assert len(rows) == 1 and "×" in str(rows)  # the comparison with the baseline, which has a ratio
    never = dataclasses.replace(asked, locked=None)
    write_report(never, analyse(never), tmp_path / "c")
    assert not [row for row in Page(tmp_path / "c" / "report.html").rows if "better declared" in str(row)]


@pytest.mark.usefixtures("quick")
def test_runs_before_the_lock_are_said_and_the_plan_is_not_called_fixed_before(tmp_path: Path) -> None:
    found = made_results(small_study(3))
    early = dataclasses.replace(found.runs[0], started="2025-12-01T00:00:00.000+00:00")
    late = dataclasses.replace(found, runs=(early, *found.runs[1:]))
    for name, results_, said in (("sound", found, True), ("early", late, False)):
        write_report(results_, analyse(results_), tmp_path / name)
        methods = (tmp_path / name / "methods.md").read_text()
        assert ("before the first confirmatory run" in methods) == said
        assert ("after 1 confirmatory run had begun: all verdicts are exploratory" in methods) != said
        assert ("1 confirmatory run had begun before" in Page(tmp_path / name / "report.html").text) != said


@pytest.mark.usefixtures("quick")
def test_updates_that_were_split_are_said_beside_speed(tmp_path: Path) -> None:
    found = made_results(small_study(3))
    split = tuple(
        dataclasses.replace(run, accumulation=2 if run.arm == "rms" and run.seed else 1) for run in found.runs
    )
    said = "rms in 1 or 2; the baseline in 1."
    for name, runs, there in (("split", split, True), ("whole", found.runs, False)):
        results_ = dataclasses.replace(found, runs=runs)
        write_report(results_, analyse(results_), tmp_path / name)
        for file in ("report.html", "methods.md"):
            assert (said in html.unescape((tmp_path / name / file).read_text())) == there


@pytest.mark.usefixtures("quick")
def test_intervals_are_named_by_the_studys_level(tmp_path: Path) -> None:
    found = made_results(small_study(3, alpha=0.1), diverged={"rms": (1,)})
    write_report(found, analyse(found), tmp_path)
    text = Page(tmp_path / "report.html").text
    assert "exact 90 % interval" in text and "exact 95 %" not in text


@pytest.mark.usefixtures("quick")
def test_expectations_stand_beside_what_was_measured(tmp_path: Path) -> None:
    study = small_study(
        3, expectations=(Expectation("SwiGLU: better at equal compute"), Expectation("the weather: fine"))
    )
    found = made_results(study, effects={"swiglu": 0.06})
    write_report(found, analyse(found), tmp_path)
    page = Page(tmp_path / "report.html")
    assert re.search(r"swiglu: speed ×[\d.]+; memory ×1.00; macro_auroc \+0.0\d+", page.row("SwiGLU: better"))
    assert "names no factor or arm of the study" in page.row("the weather")


# ----------------------------------------------------------------------------------------------- safe


@pytest.mark.usefixtures("quick")
def test_names_are_data(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script> & "quotes" | $x_1$ `tick` *star* \\end{table} 50 %'
    study = small_study(3, title=evil, expectations=(Expectation(evil),), hypotheses=(
        dataclasses.replace(HYPOTHESES[0], text=evil),
    ))  # fmt: skip
    found = made_results(study, notes=(evil,))
    write_report(found, analyse(found), tmp_path)
    page = Page(tmp_path / "report.html")
    assert not page.all("script")
    assert evil in page.text
    markdown = (tmp_path / "report.md").read_text()
    assert "<script" not in markdown and "`tick`" not in markdown.replace("\\`", "")
    assert ragged(markdown) == []
    assert ragged("| a | b |\n| --- | --- |\n| x | y | z |") == ["| x | y | z |"]  # the check can say no
    assert r"\end{table} 50" not in (tmp_path / "tables.tex").read_text()


def ragged(markdown: str) -> list[str]:
    """Lines of tables with more or fewer cells than the head of their table."""
    found, head = [], 0
    for line in markdown.splitlines():
        bars = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        if bars and head and bars != head:
            found.append(line)
        head = (head or bars) if bars else 0
    return found


# ------------------------------------------------------------------------------------- never half-written


@pytest.fixture
def small_results() -> Results:
    return made_results(small_study(3))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("quick")
def test_a_full_disk_leaves_the_report_before_it(
    small_results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = analyse(small_results)
    write_report(small_results, findings, tmp_path / "report")
    before = contents(tmp_path)
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "numbers.tex":
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    changed = made_results(small_study(3), rng=1)
    with pytest.raises(UserError, match=r"report: cannot be written: No space left on device; choose"):
        write_report(changed, analyse(changed), tmp_path / "report")
    assert contents(tmp_path) == before
    monkeypatch.setattr(Path, "write_bytes", write)
    write_report(changed, analyse(changed), tmp_path / "report")
    assert contents(tmp_path) != before


@pytest.mark.usefixtures("quick")
def test_what_a_killed_report_staged_goes_once_it_is_old(small_results: Results, tmp_path: Path) -> None:
    out = tmp_path / "report"
    for name, age in ((".report-old", 3600), (".report-new", 0)):
        (out / name).mkdir(parents=True)
        os.utime(out / name, (time.time() - age,) * 2)
    write_report(small_results, analyse(small_results), out)
    assert [path.name for path in out.glob(".report-*")] == [".report-new"]  # it may be at work


@pytest.mark.usefixtures("quick")
def test_a_place_that_cannot_be_written_is_one_clear_line(
    small_results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        write_report(small_results, analyse(small_results), tmp_path / "file" / "report")
    assert "\n" not in str(error.value) and "file/report" in str(error.value)

    def refused(*args: object, **kwargs: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(report.tempfile, "mkdtemp", refused)
    with pytest.raises(
        UserError, match=r"cannot be written: Permission denied; choose another place with --out"
    ):
        write_report(small_results, analyse(small_results), tmp_path / "report")


@pytest.mark.usefixtures("quick")
def test_old_figures_go_and_other_peoples_files_stay(small_results: Results, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "divergence.png").write_bytes(b"of an earlier report")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tensorboard").mkdir()
    written = write_report(small_results, analyse(small_results), tmp_path).files
    assert written[0] == tmp_path / "report.html" and all(path.is_file() for path in written)
    assert sorted(os.listdir(tmp_path / "figures")) == []
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "tensorboard").is_dir()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.usefixtures("quick")
def test_a_damaged_provenance_is_reported_and_the_rest_written(tmp_path: Path) -> None:
    manifest = made_study_dir(tmp_path, small_study(3), rows=6)
    run = manifest.runs[0]
    manifest.run_dir(run).provenance.write_text("{")
    manifest.run_dir(manifest.runs[1]).provenance.write_text("[]")
    found = results.load(manifest)
    write_report(found, analyse(found), tmp_path / "report")
    text = Page(tmp_path / "report" / "report.html").text
    assert f"{run.id}/provenance.json: not valid JSON" in text
    assert f"{manifest.runs[1].id}/provenance.json: not a record of provenance" in text
    assert "From the records of 10 runs." in text


# --------------------------------------------------------------------------------- for other programs


def test_findings_as_json_are_strict_and_whole(lost: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads((lost / "analysis.json").read_text(), parse_constant=refuse)
    arm = next(v for v in found["arms"] if v["arm"] == "rms" and v["response"] == "macro_auroc")
    assert arm["diverged"] == 1 and set(arm["values"]) == {"0", "1"}
    assert {v["hypothesis"] for v in found["verdicts"]} == {h.name for h in HYPOTHESES}


def test_the_comparison_has_a_row_for_each_run_and_the_columns_of_the_study(lost: Path) -> None:
    rows = table(lost / "ablation_comparison.csv")
    assert list(rows[0]) == [
        "arm", "rms", "swiglu", "seed", "status", "steps", "steps_per_s", "peak_mem_gb", "learning_rate",
        "train_loss", "macro_auroc", "loss", "macro_auroc_time", "time_to_target_s",
    ]  # fmt: skip
    assert len(rows) == 12
    own = next(row for row in rows if row["arm"] == "rms_swiglu" and row["seed"] == "1")
    assert (own["rms"], own["swiglu"]) == ("on", "on")
    assert float(own["peak_mem_gb"]) == pytest.approx(2 * 2**30 / 1e9)
    assert float(own["train_loss"]) > 0
    missed = [row for row in rows if row["macro_auroc_time"] == ""]
    assert missed and all(row["time_to_target_s"] == "" for row in missed)


@pytest.mark.usefixtures("quick")
def test_equal_results_give_equal_files(small_results: Results, tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_report(small_results, analyse(small_results), tmp_path / name)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    other = made_results(small_study(3), rng=1)
    write_report(other, analyse(other), tmp_path / "other")
    assert contents(tmp_path / "first") != contents(tmp_path / "other")


def test_the_comparison_has_every_metric_with_a_direction(tmp_path: Path) -> None:
    made = made_results(seeds=3)
    runs = [dataclasses.replace(run, finals={"val_macro_recall": 0.25, "val_loss": 9.0}) for run in made.runs]
    with_recall = dataclasses.replace(made, runs=tuple(runs))
    text = report.comparison_csv(Scene(with_recall, analyse(with_recall)))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {row["macro_recall"] for row in rows} == {"0.25"}
    assert "9.0" not in {
        row["loss"] for row in rows
    }  # a response has its own column, and no other of its name
    assert "macro_recall" not in report.comparison_csv(Scene(made, analyse(made)))


# ------------------------------------------------------------------- ranking, expectations, instability


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of which `rms` is worse, with expectations, and with spikes of `swiglu`; tuned."""
    study = small_study(
        3,
        learning_rate=LearningRate((3e-4, 1e-3), (100,)),
        expectations=(
            Expectation("rms: worse", arm="rms", response="loss", low=1.1),
            Expectation("rms: better", arm="rms", response="loss", high=0.9),
            Expectation("base: fine", arm="baseline", response="loss", high=9.0, against="nothing"),
        ),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw_all", lambda scene: [])
        patch.setattr(overview, "overview", lambda scene: b"png")
        return report_on(
            study,
            tmp_path_factory.mktemp("judged"),
            effects={"rms": -0.06},
            noise=0.002,
            spikes={"swiglu": 2},
            default_rate=1e-3,
        )


@pytest.mark.parametrize("name", TEXTS)
def test_ranking_expectations_and_instability_are_in_every_text(judged: Path, two: Path, name: str) -> None:
    def said(where: Path) -> str:
        text = Page(where / name).text if name.endswith("html") else (where / name).read_text()
        return " ".join(text.replace("\\", "").replace("−", "-").split())

    text = said(judged)
    for words in (
        "Ranking", "CRITICAL", "Really worse than the baseline, by the interval: ",
        "What was expected", "rms: loss is ×1.", "worse than it. Expected ×1.1 or more: met",
        "Expected ×0.9 at most: not met, it is more", "Instability", "tuning seeds", "largest gradient norm",
    ):  # fmt: skip
        assert words in text, words
    assert "rms (-" in text.partition("Really worse")[2].partition("Not told apart")[0]
    plain_study = said(two)
    assert "Ranking" in plain_study and "largest gradient norm" not in plain_study


def test_the_console_has_the_promised_columns(judged: Path) -> None:
    text = (judged / "ablation_analysis.txt").read_text()
    head = next(line for line in text.splitlines() if line.startswith("Ablation"))
    names = ["Ablation", "Steps", "Time", "Train Loss", "Val Loss", "Best Val", "macro_auroc", "Δ", "label"]
    assert re.split(r"\s{2,}", head.strip()) == names
    assert "IMPROVEMENT" not in text.partition("Ranking")[2].partition("rms ")[2].splitlines()[0]
    assert max(map(len, text.splitlines())) <= 120


def test_the_unstable_arm_is_drawn_at_the_default_rate(judged: Path) -> None:
    assert (judged / "figures" / "default_rate.png").read_bytes().startswith(b"\x89PNG")
    caption = next(
        line
        for line in (judged / "report.md").read_text().splitlines()
        if "default learning rate, be" in line
    )
    assert "swiglu: at the default rate 0.001 0 of 1 diverged, 2 spikes" in caption
    assert "it is the tuned rate too" in caption and "rms: at" not in caption


def test_every_arm_beside_the_baseline_has_a_panel_and_a_sentence(judged: Path) -> None:
    assert (judged / "figures" / "against_baseline.png").read_bytes().startswith(b"\x89PNG")
    text = " ".join((judged / "ablation_analysis.txt").read_text().split())
    said = text.partition("Each arm against the baseline")[2]
    assert re.search(
        r"worse: rms: macro_auroc changes by −[\d.]+ % \(.* over 3 paired seeds, MODERATE, real", said
    )
    assert (
        "(learning rate 0.001, baseline 0.001). Expected: “rms: worse” (met); “rms: better” (not met)."
        in said
    )
    assert re.search(r"swiglu: macro_auroc changes by .* Nothing was expected of it\.", said)
    assert "baseline: macro_auroc changes" not in said


def test_why_there_are_no_effects_is_said_once_for_all_responses(tmp_path: Path, quick: None):
    third = switch("wide", "model", {"model.dim": 256})
    chain = (
        Arm("baseline"),
        Arm("rms", {"rms": "on"}),
        Arm("both", {"rms": "on", "swiglu": "on", "wide": "on"}),
    )
    about = {"factors": (*FACTORS, third), "arms": chain, "hypotheses": ()}
    told = (report_on(small_study(2, **about), tmp_path / "chain") / "report.md").read_text()
    assert told.count("incomplete factorial") == 1
    assert "macro_auroc, loss, " in told
    crossed = (report_on(small_study(2), tmp_path / "crossed") / "report.md").read_text()
    assert "incomplete factorial" not in crossed
