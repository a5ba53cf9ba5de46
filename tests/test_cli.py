"""The command line: whatever is wrong is one clear line and exit code 2, and nothing on disk is touched."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxablate import cli, config, study
from jaxablate.manifest import Manifest

TOY = "tests/configs/toy_study.py"
ON_A_FROZEN_STUDY = ("run", "status", "retry", "cancel", "report", "export", "leaderboard", "promote")
VERBS = ("check", *ON_A_FROZEN_STUDY)


_READ_ONLY = ""  # a folder that nothing may be written in, for as long as a test sets it


def _refuse_writes(event: str, args: tuple[object, ...]) -> None:
    """An audit hook that makes a folder read-only also for root, whom permissions do not stop."""
    if not _READ_ONLY or event not in (
        "open",
        "os.mkdir",
        "os.rename",
        "os.link",
        "os.remove",
        "os.truncate",
    ):
        return
    if event == "open" and not (
        isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    ):
        return
    for path in args[:2]:
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(_READ_ONLY):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


sys.addaudithook(_refuse_writes)


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


@pytest.fixture
def frozen(tmp_path: Path) -> Manifest:
    """The toy study, frozen and never run."""
    declared = study.load(TOY, [("host.workdir", str(tmp_path))])
    resolved = {arm.name: config.resolve(declared.config(arm.name)).base for arm in declared.arms}
    return Manifest.freeze(declared, resolved)


def command(verb: str, *args: str) -> list[str]:
    """The verb with what it cannot do without."""
    return [verb, *args, *(["--arm=wide"] if verb == "promote" else [])]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a refused command leaves on stderr."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_study_path_names_the_nearest(verb: str, capsys, tmp_path: Path) -> None:
    line = refused(capsys, *command(verb, "tests/configs/toy_stud.py", f"--workdir={tmp_path}"))
    assert "tests/configs/toy_stud.py: no such file" in line
    assert "did you mean 'tests/configs/toy_study.py'" in line


@pytest.mark.parametrize("verb", ["check", "run", "status", "retry", "cancel", "promote"])
def test_an_unknown_arm_names_the_nearest(verb: str, capsys, frozen: Manifest) -> None:
    before = contents(frozen.path)
    spec = TOY if verb in ("check", "run") else str(frozen.path)
    arguments = [verb, spec, "--arm=wiide"] + ([f"--workdir={frozen.path.parent}"] if spec == TOY else [])
    assert "no arm 'wiide'; did you mean 'wide'?" in refused(capsys, *arguments)
    assert contents(frozen.path) == before


@pytest.mark.parametrize("verb", ["check", "run"])
def test_an_unknown_group_names_the_nearest(verb: str, capsys, tmp_path: Path) -> None:
    line = refused(capsys, verb, TOY, "--group=narow", f"--workdir={tmp_path}")
    assert "no group 'narow'; did you mean 'narrow'?" in line
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("verb", ON_A_FROZEN_STUDY)
def test_a_half_written_study_is_named(verb: str, capsys, frozen: Manifest) -> None:
    file = frozen.path / "study.json"
    file.write_bytes(file.read_bytes()[:200])
    before = contents(frozen.path)
    assert "study.json: not valid JSON" in refused(
        capsys, *command(verb, TOY, f"--workdir={frozen.path.parent}")
    )
    assert contents(frozen.path) == before


@pytest.mark.parametrize("verb", ON_A_FROZEN_STUDY)
def test_an_edited_list_of_runs_is_refused(verb: str, capsys, frozen: Manifest) -> None:
    file = frozen.path / "runs.jsonl"
    file.write_text(file.read_text().replace('"seed": 2', '"seed": 7'))
    before = contents(frozen.path)
    line = refused(capsys, *command(verb, TOY, f"--workdir={frozen.path.parent}"))
    assert "runs.jsonl: is not the list of runs that study.json froze; restore the file" in line
    assert contents(frozen.path) == before


@pytest.mark.parametrize("verb", ["status", "retry", "cancel", "report", "export", "leaderboard", "promote"])
def test_a_study_that_was_never_run_is_named(verb: str, capsys, tmp_path: Path) -> None:
    line = refused(capsys, *command(verb, TOY, f"--workdir={tmp_path}"))
    assert f"{tmp_path / 'toy'}: no such directory" in line
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no study.json" in refused(capsys, *command(verb, str(empty)))


@pytest.mark.parametrize("verb", ["run", "retry", "cancel", "report", "leaderboard"])
def test_a_workdir_that_may_not_be_written_is_named(
    verb: str, frozen: Manifest, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = frozen.run_dir(frozen.runs[0])
    failed.create(frozen.config_of(frozen.runs[0]))
    failed.mark("bug", "something to retry")
    before = contents(frozen.path)
    out = [f"--out={frozen.path}/board"] if verb == "leaderboard" else []
    argv = command(verb, TOY, f"--workdir={frozen.path.parent}", *out)
    monkeypatch.setattr(sys.modules[__name__], "_READ_ONLY", str(frozen.path))
    line = refused(capsys, *argv)
    assert str(frozen.path) in line
    assert "Permission denied" in line
    monkeypatch.undo()
    assert contents(frozen.path) == before


def test_the_read_only_folder_of_these_tests_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "_READ_ONLY", str(tmp_path))
    for write in (lambda: (tmp_path / "a").write_text(""), lambda: (tmp_path / "b").mkdir()):
        with pytest.raises(PermissionError):
            write()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["chek", TOY], ["VERB", "chek", "check"]),
        (["run", TOY, "--fial-fast"], ["--fial-fast", "did you mean '--fail-fast'"]),
        (["run", TOY, "--workers=two"], ["--workers", "two"]),
        (["run", TOY, "--seeds=0,x"], ["write seeds as 0,1,2"]),
        (["run", TOY, "--config.optim.learning_rat=1"], ["did you mean 'optim.learning_rate'"]),
        (["check", TOY, "--static", "--execute"], ["not allowed with"]),
        (["report"], ["STUDY: missing"]),
        (["report", TOY, "--from-csv=x.csv"], ["not on both"]),
        (["report", "--from-csv=/nowhere/x.csv"], ["/nowhere/x.csv"]),
        (["report", "--from-csv=tests/conftest.py", "--direction=loss"], ["RESPONSE=min|max"]),
        (["run", f"{TOY}:steps=41"], ["unknown steps", "40"]),
        (["run", "configs/flash_rms.py"], ["defines no get_study()"]),
        (["check"], ["STUDY"]),
        (["check", TOY, "--group=narrow", "--arm=wide"], ["no arm is in both"]),
        (["run", TOY, "--config.seeds=1"], ["config.seeds: is the study's to say"]),
        (["run", TOY, "--config.model.width=4"], ["what factor 'wide' varies"]),
        (["status", "tests", "--workdir=x"], ["tests: is the directory of a study"]),
    ],
)
def test_a_mistake_is_one_line(argv: list[str], words: list[str], capsys) -> None:
    line = refused(capsys, *argv)
    for word in words:
        assert word in line


def test_a_dry_run_prints_the_cohorts_and_writes_nothing(capsys, tmp_path: Path) -> None:
    assert cli.main(["run", TOY, "--dry-run", "--group=narrow", f"--workdir={tmp_path}"]) == 0
    out, _ = capsys.readouterr()
    assert "baseline" in out
    assert "split" in out
    assert "wide" not in out
    assert contents(tmp_path) == {}


def test_check_tells_right_from_wrong_by_its_exit_code(capsys, tmp_path: Path) -> None:
    assert cli.main(["check", TOY, "--json", f"--workdir={tmp_path}"]) == 0
    assert json.loads(capsys.readouterr().out)
    broken = tmp_path / "broken.py"
    text = Path(TOY).read_text().replace('"implementation", {"training', '"model", {"training')
    broken.write_text(text)
    assert cli.main(["check", str(broken), f"--workdir={tmp_path}"]) == cli.CHECK_FAILED
    assert "changes nothing" in capsys.readouterr().out


def test_what_starts_at_once_imports_nothing_heavy(child_env: dict[str, str], frozen: Manifest) -> None:
    code = (
        "import sys; from jaxablate.cli import main; main(sys.argv[1:]);"
        "print(*({'jax', 'pandas', 'matplotlib', 'scipy', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, "status", str(frozen.path)],
        env=child_env,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr.strip() == ""
    assert "baseline" in child.stdout


@pytest.mark.slow
def test_from_declaration_to_report(capsys, tmp_path: Path, child_env, monkeypatch) -> None:
    """What a user does: run, look, report; a second run has nothing left to do."""
    for name, value in child_env.items():
        monkeypatch.setenv(name, value)
    where = [TOY, f"--workdir={tmp_path}"]
    assert cli.main(["run", *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"]["done"] == 12
    attempts = {p: p.read_text() for p in tmp_path.rglob("attempts.jsonl")}
    assert cli.main(["run", *where]) == 0
    assert {p: p.read_text() for p in tmp_path.rglob("attempts.jsonl")} == attempts
    capsys.readouterr()
    assert cli.main(["status", *where, "--json"]) == 0
    assert "done" in capsys.readouterr().out
    assert cli.main(["report", *where]) == 0
    report = tmp_path / "toy" / "report"
    for name in ("report.html", "report.md", "ablation_comparison.csv", "ablation_comparison.png", "tables.tex",
                 "ablation_analysis.txt", "numbers.tex", "methods.md"):  # fmt: skip
        assert (report / name).stat().st_size > 100, name
    verdicts = json.loads((report / "analysis.json").read_text())["verdicts"]
    assert {v["hypothesis"] for v in verdicts} == {"wide_helps", "split_equal"}
    assert {v["outcome"] for v in verdicts if v["hypothesis"] == "split_equal"} == {"supported"}
    capsys.readouterr()
    for form in ("csv", "json", "parquet", "rliable"):
        assert cli.main(["export", *where, f"--format={form}", f"--out={tmp_path / form}"]) == 0
        assert (tmp_path / form).stat().st_size
    assert cli.main(["leaderboard", *where, f"--out={tmp_path / 'board'}"]) == 0
