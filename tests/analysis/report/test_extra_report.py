"""A study's own files beside the report: published with it or not at all, and never outside of it."""

from __future__ import annotations

import base64
import dataclasses
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxablate.analysis.report import write as report
from jaxablate.analysis.report.document import Alert, Cell, Column, Paragraph, Table
from jaxablate.analysis.report.extra import Extra
from jaxablate.analysis.report.write import write_report
from jaxablate.analysis.stats.analyse import analyse
from jaxablate.errors import UserError
from jaxablate.study import Response, Study
from tests.analysis.made import made_results, made_study

Write = Callable[..., list[Path] | list[Extra] | list[Extra | Paragraph | Table] | list[Alert | Paragraph]]


@pytest.fixture(autouse=True)
def _without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report's own figures take seconds, and are not what this is about."""
    for module in (report.figures, report.timings):
        monkeypatch.setattr(module, "draw_all", lambda scene: [])
    monkeypatch.setattr(report.overview, "overview", lambda scene: b"a picture")


def declared(monkeypatch: pytest.MonkeyPatch, write: Write | None) -> Study:
    """A study whose own report is `write`, by the name of a module that holds it."""
    module = types.ModuleType("a_study_of_ones_own")
    if write is not None:
        module.pages = write
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return made_study(2, extra_report="a_study_of_ones_own:pages")


def reported(study: Study, where: Path) -> list[str]:
    found = made_results(study)
    return [str(path.relative_to(where)) for path in write_report(found, analyse(found), where).files]


def two_files(results, analysis, folder: Path) -> list[Path]:
    texts = {
        "guide.md": f"{len(results.runs)} runs, {len(analysis.verdicts)} verdicts",
        "figures/own.png": "a picture",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts]


def test_its_files_are_published_and_linked(tmp_path, monkeypatch):
    study = declared(monkeypatch, two_files)
    written = reported(study, tmp_path)
    assert {"guide.md", "figures/own.png", "report.html"} <= set(written)
    assert (tmp_path / "guide.md").read_text() == "16 runs, 5 verdicts"
    assert (tmp_path / "figures" / "own.png").is_file()
    assert "guide.md" in (tmp_path / "report.md").read_text()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    plain = reported(dataclasses.replace(study, extra_report=""), tmp_path / "plain")
    assert set(written) - set(plain) == {"guide.md", "figures/own.png"}
    assert "guide.md" not in (tmp_path / "plain" / "report.md").read_text()


def in_words(results, analysis, folder: Path) -> list[Extra]:
    """Two pictures, one of them in two forms, and a text; the page must take their words as data."""
    files = {
        "wide.png": Extra(folder / "wide.png", "A <wide> one.", "a line"),
        "figures/own.svg": Extra(folder / "figures/own.svg", "Its own."),
        "figures/own.png": Extra(folder / "figures/own.png", "the same, for a talk"),
        "guide.md": Extra(folder / "guide.md", "what to take"),
    }
    for name, one in files.items():
        one.path.write_bytes(name.encode())
    return [*files.values()]


def test_its_pictures_are_shown_and_its_texts_linked(tmp_path, monkeypatch):
    reported(declared(monkeypatch, in_words), tmp_path)
    page = (tmp_path / "report.html").read_text()
    (own,) = re.findall(r'<section id="own">.*?</section>', page, re.DOTALL)
    assert '<a href="#own">' in page
    shown = re.findall(r'<figure><a href="(.*?)"><img src="data:(.*?);base64,(.*?)" alt="(.*?)">', own)
    assert [(path, kind, base64.b64decode(data).decode(), alt) for path, kind, data, alt in shown] == [
        ("wide.png", "image/png", "wide.png", "a line"),
        ("figures/own.svg", "image/svg+xml", "figures/own.svg", "Its own."),
    ]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", own) == ["A &lt;wide&gt; one.", "Its own."]
    linked = re.findall(r'<li><a href="(.*?)">.*?</a> <span>(.*?)</span>', own)
    assert linked == [("figures/own.png", "the same, for a talk"), ("guide.md", "what to take")]
    text = (tmp_path / "report.md").read_text()
    assert "![a line](wide.png)\n\n*A &lt;wide&gt; one.*" in text
    assert "- [guide.md](guide.md): what to take" in text


def with_a_table(results, analysis, folder: Path) -> list[Extra | Paragraph | Table]:
    (folder / "own.png").write_text("a picture")
    table = Table("Ours", (Column("arm", "words"),), ((Cell("<rms>"),),), "as it is")
    return [table, Extra(folder / "own.png"), Paragraph("That is all.")]


def test_its_tables_and_sentences_stand_before_its_pictures(tmp_path, monkeypatch):
    reported(declared(monkeypatch, with_a_table), tmp_path)
    page = (tmp_path / "report.html").read_text()
    (own,) = re.findall(r'<section id="own">.*?</section>', page, re.DOTALL)
    places = [own.index(part) for part in ("Ours", "&lt;rms&gt;", "That is all.", "<figure>")]
    assert places == sorted(places)
    for name in ("report.md", "ablation_analysis.txt"):
        assert "That is all." in (tmp_path / name).read_text()


def test_what_it_warns_of_stands_at_the_top_and_once(tmp_path, monkeypatch):
    def warns(results, analysis, folder: Path) -> list[Alert | Paragraph]:
        return [Paragraph("That is all."), Alert("Beware", ("no measurement",))]

    reported(declared(monkeypatch, warns), tmp_path)
    page = (tmp_path / "report.html").read_text()
    (top,) = re.findall(r'<section id="summary">.*?</section>', page, re.DOTALL)
    assert "no measurement" in top and "That is all." not in top
    assert page.count("no measurement") == page.count("That is all.") == 1


def test_what_a_terminal_shows_fits_it_and_the_file_does_not_depend_on_it(tmp_path, monkeypatch):
    """A line that a terminal has to break itself ends anywhere, within names and numbers."""
    names = (
        "nrmse",
        "nrmse_operator",
        "rollout_nrmse",
        "crmse",
        "brmse",
        "frmse_low",
        "frmse_middle",
        "frmse_high",
    )
    responses = tuple(Response(f"val/{name}", "min") for name in names)
    study = made_study(3, responses=responses, hypotheses=(), expectations=())
    found = made_results(study)
    monkeypatch.setenv("COLUMNS", "80")
    report = write_report(found, analyse(found), tmp_path)
    file = (tmp_path / "ablation_analysis.txt").read_text()
    assert 100 < max(map(len, file.splitlines())) <= 120
    for columns, widest in ((80, 80), (40, 80), (100, 100), (500, 120)):
        monkeypatch.setenv("COLUMNS", str(columns))
        text = report.text()
        assert widest - 10 < max(map(len, text.splitlines())) <= widest
        assert (text == file) == (widest == 120)


def test_paths_alone_are_shown_and_linked_too(tmp_path, monkeypatch):
    study = declared(monkeypatch, two_files)
    reported(study, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert 'alt="own"><' in page
    assert '<a href="guide.md">guide.md</a> <span>of this study alone</span>' in page
    reported(dataclasses.replace(study, extra_report=""), tmp_path)
    assert 'id="own"' not in (tmp_path / "report.html").read_text()


def test_a_figure_that_is_no_longer_drawn_goes(tmp_path, monkeypatch):
    study = declared(monkeypatch, two_files)
    reported(study, tmp_path)
    reported(dataclasses.replace(study, extra_report=""), tmp_path)
    assert not (tmp_path / "figures" / "own.png").exists()


def test_if_it_fails_the_report_before_it_stays_whole(tmp_path, monkeypatch):
    study = declared(monkeypatch, two_files)
    reported(study, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def half(results, analysis, folder: Path) -> list[Path]:
        (folder / "guide.md").write_text("half")
        raise ValueError("torn")

    with pytest.raises(ValueError, match="torn"):
        reported(declared(monkeypatch, half), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def outside(results, analysis, folder: Path) -> list[Path]:
    return [folder.parent / "elsewhere.md"]


def takes_a_name(results, analysis, folder: Path) -> list[Path]:
    (folder / "report.md").write_text("mine")
    return [folder / "report.md"]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            outside,
            r"extra_report='a_study_of_ones_own:pages': wrote .*elsewhere.md; it may write into its folder",
        ),
        (
            takes_a_name,
            r"extra_report='a_study_of_ones_own:pages': report.md is the report's own file; rename",
        ),
        (None, r"extra_report='a_study_of_ones_own:pages': a_study_of_ones_own has no function 'pages'"),
    ],
)
def test_what_it_may_not_do_is_one_line(tmp_path, monkeypatch, write, message):
    study = declared(monkeypatch, write)
    with pytest.raises(UserError, match=message):
        reported(study, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_module_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"extra_report='nobody\.has:it': no module 'nobody'"):
        reported(made_study(2, extra_report="nobody.has:it"), tmp_path)


@pytest.mark.parametrize("name", ["pages", "a.b", "a:b:c", "a b:c", ":pages", "a:"])
def test_its_name_is_a_module_and_a_function(name):
    with pytest.raises(UserError, match=r"write it as 'package\.module:function'"):
        made_study(2, extra_report=name)


def test_it_is_no_part_of_the_plan_and_older_studies_have_none():
    study = made_study(2, extra_report="a.b:c")
    assert study.plan_hash == made_study(2).plan_hash
    assert Study.from_dict(study.to_dict()).extra_report == "a.b:c"
    older = {key: value for key, value in study.to_dict().items() if key != "extra_report"}
    assert Study.from_dict(older).extra_report == ""
