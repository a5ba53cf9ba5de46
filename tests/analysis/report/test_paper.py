"""The bundle for a paper: LaTeX that compiles, macros that are unique and right, a paragraph that reviewers ask for."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxablate.analysis import origin, results, sentences
from jaxablate.analysis.findings import Estimate
from jaxablate.analysis.report import paper
from jaxablate.analysis.report.scene import Scene
from jaxablate.analysis.results import Results
from jaxablate.analysis.stats.analyse import analyse
from jaxablate.study import Arm
from tests.analysis.made import FACTORS, HYPOTHESES, made_results, made_study, tuned_study
from tests.analysis.made_dirs import made_study_dir


def scene_of(found: Results) -> Scene:
    return Scene(found, analyse(found))


@pytest.fixture(scope="module")
def scene() -> Scene:
    """Three seeds, one run diverged."""
    return scene_of(made_results(made_study(3), effects={"swiglu": 0.05}, diverged={"rms_only": (2,)}))


def macros(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^\\newcommand\{\\([^}]*)\}\{(.*)\} %", text, re.M)


def problems(tex: str) -> list[str]:
    """What TeX would stumble over: braces, environments, special characters, cells in a row."""
    found, depth, open_, columns = [], 0, [], 0
    for number, line in enumerate(tex.splitlines(), start=1):
        code = re.sub(r"(?<!\\)%.*", "", line)
        bare = re.sub(r"\\.", "", code)
        for brace in re.findall("[{}]", bare):
            depth += 1 if brace == "{" else -1
            if depth < 0:
                found.append(f"{number}: a brace too many")
        for what, name in re.findall(r"\\(begin|end)\{(\w+)\}", code):
            if what == "begin":
                open_.append(name)
            elif not open_ or open_.pop() != name:
                found.append(f"{number}: end of {name}")
        if form := re.search(r"\\begin\{tabular\}\{([lr]+)\}", code):
            columns = len(form[1])
        elif code.rstrip().endswith(r"\\") and len(re.findall(r"(?<!\\)&", code)) != columns - 1:
            found.append(f"{number}: not {columns} cells")
        elif not code.rstrip().endswith(r"\\") and re.search(r"(?<!\\)&", code):
            found.append(f"{number}: & outside of a row")
        if re.search(r"(?<!\\)[#$^~_]", code.replace("\\label", "")) and "\\label" not in code:
            found.append(f"{number}: special character")
        if not code.isascii():
            found.append(f"{number}: {[c for c in code if not c.isascii()]}")
    return found + (["braces left open"] if depth else []) + [f"{name} left open" for name in open_]


def test_the_tables_are_sound(scene: Scene) -> None:
    tex = paper.tables_tex(scene)
    assert problems(tex) == []
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == tex.count(r"\begin{table}") >= 4
    assert problems(paper.numbers_tex(scene)) == []


@pytest.mark.parametrize(
    "bad",
    [r"\begin{table}", "{", "a } b {", r"\begin{a}\end{b}", "50_percent", "a & b",
     "\\begin{tabular}{ll}\na & b & c \\\\\n\\end{tabular}", "a − b"],
)  # fmt: skip
def test_unsound_tex_would_be_seen(bad: str) -> None:
    assert problems(bad)


@given(st.text(max_size=60))
def test_any_text_is_escaped(text: str) -> None:
    escaped = paper.escape(text)
    assert [p for p in problems(f"a {escaped} b") if "[" not in p] == []


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_the_bundle_compiles(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "tables.tex").write_text(paper.tables_tex(scene))
    (tmp_path / "numbers.tex").write_text(paper.numbers_tex(scene))
    (tmp_path / "paper.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{numbers}\input{tables}"
        r"\madeFlashOnlyMacroAurocMean{} \madeHypothesisSwigluBetterOutcome{}\end{document}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]


def test_macros_are_letters_and_unique_and_hold_the_findings(scene: Scene) -> None:
    found = macros(paper.numbers_tex(scene))
    names = [name for name, _ in found]
    assert len(names) == len(set(names)) > 100
    assert all(re.fullmatch("[a-zA-Z]+", name) for name in names)
    values = dict(found)
    mean = scene.analysis.arm("flash_only", "macro_auroc").mean
    assert mean.value is not None and mean.low is not None and mean.high is not None
    assert float(values["madeFlashOnlyMacroAurocMean"]) == pytest.approx(mean.value, abs=5e-4)
    assert float(values["madeFlashOnlyMacroAurocLow"]) == pytest.approx(mean.low, abs=5e-4)
    assert float(values["madeFlashOnlyMacroAurocHigh"]) == pytest.approx(mean.high, abs=5e-4)
    assert values["madeFlashOnlyMacroAurocN"] == "3"
    assert (values["madeRmsOnlyMacroAurocN"], values["madeRmsOnlyMacroAurocDiverged"]) == ("2", "1")
    assert values["madeRmsOnlyMacroAurocLow"] == "--"  # two survivors have no interval
    outcome = next(v.outcome for v in scene.analysis.verdicts if v.hypothesis == "swiglu_better")
    assert values["madeHypothesisSwigluBetterOutcome"] == outcome
    assert values["madePlanHash"] == scene.results.plan_hash


@pytest.mark.parametrize(
    "words, name",
    [
        (("ctclip", "flash_only", "macro_auroc", "mean"), "ctclipFlashOnlyMacroAurocMean"),
        (("Study-2", "lr3e-4"), "studyTwoLrThreeEFour"),
        (("é", "1"), "one"),
    ],
)
def test_names_of_macros(words: tuple[str, ...], name: str) -> None:
    assert paper.macro_name(*words) == name


def test_arms_whose_letters_are_equal_keep_macros_of_their_own() -> None:
    arms = (Arm("baseline"), Arm("a_b", {"rms": "on"}), Arm("a-b", {"swiglu": "on"}))
    study = made_study(3, factors=FACTORS, arms=arms, hypotheses=HYPOTHESES[:0])
    found = scene_of(made_results(study, effects={"rms": -0.1, "swiglu": 0.1}, noise=0.001))
    values = dict(macros(paper.numbers_tex(found)))
    assert len(values) == len(macros(paper.numbers_tex(found)))
    for name, arm in (("madeABMacroAurocMean", "a_b"), ("madeABMacroAurocMeanB", "a-b")):
        assert float(values[name]) == pytest.approx(
            found.analysis.arm(arm, "macro_auroc").mean.value, abs=2e-3
        )


def test_methods_say_what_a_reviewer_asks(tmp_path: Path) -> None:
    found = results.load(made_study_dir(tmp_path, tuned_study(3), rows=6))
    said = paper.methods_md(scene_of(found), origin.read(found))
    for words in (
        "Error bars are 95 % confidence intervals of the mean over training seeds (Student t, n = 3; not standard",
        "24 of 24 runs finished and 0 diverged",
        "The unit of replication is the training seed",
        f"plan hash {found.plan_hash}",
        "Each arm's learning rate was chosen from 0.0003, 0.001 and 0.003 on the tuning seeds 100 and 101",
        "Results are from other seeds",
        "Hardware: 1 x NVIDIA H200",
        "training time of the runs that ended",
        "training time of each of them",
        "jax 0.10.2",
        "code commit 1a2b3c4d5e6f",
    ):
        assert words in said, words


def test_methods_do_not_claim_what_is_not_known() -> None:
    found = made_results(made_study(2), locked=None)
    said = paper.methods_md(scene_of(found), origin.read(found))
    assert "No intervals are given: 2 seeds: no interval below 3" in said
    assert "Software versions were not recorded." in said
    assert "was not locked before the runs" in said
    assert "confidence intervals of the mean" not in said


# --------------------------------------------------------------------------------- numbers in words


@pytest.mark.parametrize(
    "value, decimals, text",
    [
        (0.91234, None, "0.9123"), (-0.004, 3, "−0.004"), (-0.0001, 3, "0.000"), (1234567, 0, "1,234,567"),
        (None, 2, "–"), (float("nan"), 2, "–"), (0.02, None, "0.02"), (3.0, None, "3"), (1e-7, None, "1e−07"),
    ],
)  # fmt: skip
def test_numbers(value: float | None, decimals: int | None, text: str) -> None:
    assert sentences.number(value, decimals) == text


def test_intervals_and_p_values() -> None:
    even = Estimate(0.912, 0.908, 0.916)
    assert sentences.plus_minus(even, 3) == "0.912 ± 0.004"
    assert sentences.interval(even) == "0.9120 (0.9080 to 0.9160)"
    skewed = Estimate(0.912, 0.90, 0.95)
    assert sentences.plus_minus(skewed, 3) == "0.912 (0.900 to 0.950)"  # ± would be wrong
    assert sentences.plus_minus(Estimate(0.912, note="2 seeds"), 3) == "0.912"
    assert sentences.interval(Estimate(-0.01, -0.03, 0.01), sign="+") == "−0.010 (−0.030 to +0.010)"
    assert [sentences.p_value(p) for p in (0.0, 0.00099, 0.034, 0.5, None)] == [
        "< 0.001",
        "< 0.001",
        "0.034",
        "0.50",
        "–",
    ]


def test_a_time_is_better_the_lower_whatever_its_metric() -> None:
    auroc, loss, time = made_study(3).responses
    assert [sentences.goal(r) for r in (auroc, loss, time)] == ["higher", "lower", "lower"]


def test_seeds_say_what_became_of_each(scene: Scene) -> None:
    assert sentences.seeds(scene.analysis.arm("rms_only", "loss")) == "2 of 3, 1 diverged"
    assert sentences.seeds(scene.analysis.arm("baseline", "loss")) == "3 of 3"
