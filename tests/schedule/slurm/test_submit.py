"""`jaxablate submit`: all of a submission is queued or nothing, and no run twice. With SLURM's tools played."""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from jaxablate import cli, runstore
from jaxablate.claims import Claim, Claimed
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.schedule import local
from jaxablate.schedule.slurm import cluster, elements
from jaxablate.schedule.slurm import submission as records
from jaxablate.schedule.slurm import submit as submits
from jaxablate.schedule.slurm.left import Options
from jaxablate.schedule.slurm.queue import _PASSING
from jaxablate.schedule.slurm.site import Site
from jaxablate.schedule.slurm.submission import Submission
from jaxablate.schedule.slurm.submit import Outcome, submit
from tests.frozen import write_run
from tests.schedule.slurm.fake_slurm import SILENT, FakeSlurm
from tests.schedule.toy_studies import STUDIES


@pytest.fixture
def fake(tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    found = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("PATH", found.path)
    monkeypatch.chdir(repo)
    monkeypatch.setattr(cluster, "_PAUSES_S", (0.0, 0.0))
    return found


def submitted(workdir: Path, study: str = "faults", site: Site | None = None, **options: Any) -> Outcome:
    return submit(STUDIES[study](str(workdir)), site or Site(), Options(**options))


def frozen(workdir: Path, study: str, **states: runstore.State) -> Manifest:
    """A frozen study; `baseline="done"` gives the state of an arm's runs, the others never ran."""
    declared = STUDIES[study](str(workdir))
    manifest = Manifest.freeze(declared, local.resolve(declared))
    for run in manifest.runs:
        if state := states.get(run.arm):
            write_run(manifest, run, state)
    return manifest


def newest(workdir: Path) -> Submission:
    return records.submissions(workdir / "toy")[-1]


def option(argv: list[str], name: str) -> str:
    return next((word.partition("=")[2] for word in argv if word.startswith(f"--{name}=")), "")


# ------------------------------------------------------------------------------------ what is submitted


def test_an_element_for_each_arm_in_one_array(tmp_path: Path, fake: FakeSlurm) -> None:
    outcome = submitted(tmp_path)
    (argv,) = fake.calls("sbatch")
    assert option(argv, "array") == "0-5"
    record = newest(tmp_path)
    assert outcome.submission == record
    assert record.state == "submitted"
    assert record.jobs() == [100]
    assert record.tasks() == {n: f"100_{n}" for n in range(6)}
    manifest = Manifest.load(tmp_path / "toy")
    carried = [run.id for element in record.elements for run in element.runs_of(manifest)]
    assert carried == [run.id for run in manifest.runs]
    assert (tmp_path / "toy" / "slurm").stat().st_mode & 0o077 == 0


def test_a_dry_run_prints_what_is_submitted_and_writes_nothing(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], repo: Path
) -> None:
    study = "tests/configs/toy_study.py"
    arguments = ["submit", study, f"--workdir={tmp_path / 'runs'}", "--array-limit=2", "--time=01:00:00"]
    assert cli.main([*arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert fake.calls("sbatch") == []
    assert (repo / "launch" / "array.sbatch").read_text().rstrip() in said
    assert cli.main(arguments) == 0
    (argv,) = fake.calls("sbatch")
    (line,) = (line for line in said.splitlines() if line.startswith("sbatch "))
    id = newest(tmp_path / "runs").id
    printed = [
        word.replace(option(shlex.split(line), "comment").split()[1], id) for word in shlex.split(line)
    ]
    assert printed == ["sbatch", *argv]
    assert "--array=0-3%2" in argv
    assert "--time=01:00:00" in argv


def test_a_second_time_nothing_is_submitted_until_it_has_left_the_queue(
    tmp_path: Path, fake: FakeSlurm
) -> None:
    submitted(tmp_path)
    again = submitted(tmp_path)
    assert again.submission is None
    assert again.notes == ("12 runs left out: queued already",)
    assert len(fake.jobs) == 1
    fake.end()  # and the directories say that nothing was done: they are right
    assert len(submitted(tmp_path).submission.elements) == 6
    assert len(fake.jobs) == 2


def test_what_is_done_or_failed_or_worked_on_is_left_out(tmp_path: Path, fake: FakeSlurm) -> None:
    manifest = frozen(tmp_path, "faults", baseline="done", raises="bug", tight="diverged")
    run = next(run for run in manifest.runs if run.arm == "killed")
    manifest.run_dir(run).create(manifest.config_of(run))
    with Claim(manifest.run_dir(run).claim):
        outcome = submitted(tmp_path)
    assert [(e.arm, len(e.runs)) for e in outcome.submission.elements] == [
        ("diverges", 2),
        ("hopeless", 2),
        ("killed", 1),
    ]
    assert "4 runs left out: done" in outcome.notes
    assert "1 run left out: being trained now" in outcome.notes


def test_only_what_was_asked_for(tmp_path: Path, fake: FakeSlurm) -> None:
    outcome = submitted(tmp_path, arms=("killed", "tight"), seeds=(1,))
    assert [(e.arm, e.seeds) for e in outcome.submission.elements] == [("tight", (1,)), ("killed", (1,))]
    frozen(tmp_path / "b", "faults", raises="bug", baseline="done")
    outcome = submitted(tmp_path / "b", only="failed")
    assert [e.arm for e in outcome.submission.elements] == ["raises"]


def test_cohorts_are_no_larger_than_is_allowed(tmp_path: Path, fake: FakeSlurm) -> None:
    outcome = submitted(tmp_path, max_members=1)
    assert [len(e.runs) for e in outcome.submission.elements] == [1] * 12
    outcome = submitted(tmp_path / "b", max_members=1, site=Site(gres="gpu:a100:2"))
    assert [len(e.runs) for e in outcome.submission.elements] == [2] * 6  # one cohort for each GPU


# --------------------------------------------------------------------------------------------- chains


def test_confirmations_wait_for_the_tuning_of_their_arm(tmp_path: Path, fake: FakeSlurm) -> None:
    outcome = submitted(tmp_path, "tuned", on_finish=("true", "now"))
    found = [(e.arm, e.phase, len(e.runs), e.after) for e in outcome.submission.elements]
    assert found == [
        ("baseline", "tuning", 4, ()),
        ("wide", "tuning", 4, ()),
        ("baseline", "confirm", 0, (0,)),
        ("wide", "confirm", 0, (1,)),
    ]
    first, second, last = fake.calls("sbatch")
    assert option(first, "dependency") == ""
    assert option(second, "dependency") == "afterany:100"
    assert option(last, "dependency") == "afterany:100:101"
    assert all("--kill-on-invalid-dep=yes" in argv for argv in (second, last))
    assert last[-1] == "--finish"
    assert newest(tmp_path).finish_job == 102
    assert submitted(tmp_path, "tuned").submission is None


def test_confirmations_of_an_arm_with_a_rate_wait_for_nobody(tmp_path: Path, fake: FakeSlurm) -> None:
    manifest = frozen(tmp_path, "tuned", baseline="done")
    resolved = local.resolve(STUDIES["tuned"](str(tmp_path)))
    manifest.with_rates({"baseline": {"learning_rate": 0.002, "grid": [0.0005, 0.002]}}, resolved)
    outcome = submitted(tmp_path, "tuned")
    found = [(e.arm, e.phase, len(e.runs), e.after) for e in outcome.submission.elements]
    assert found == [("wide", "tuning", 4, ()), ("baseline", "confirm", 2, ()), ("wide", "confirm", 0, (0,))]


def test_an_arm_whose_tuning_failed_is_told_apart(tmp_path: Path, fake: FakeSlurm) -> None:
    frozen(tmp_path, "tuned", wide="bug")
    outcome = submitted(tmp_path, "tuned")
    assert {e.arm for e in outcome.submission.elements} == {"baseline"}
    assert any(note.startswith("wide has no confirmations yet") for note in outcome.notes)


def test_stages_are_chained_if_asked_for(tmp_path: Path, fake: FakeSlurm) -> None:
    declared = STUDIES["slow"](str(tmp_path))
    declared.base.model.stages = "two"
    outcome = submit(declared, Site(), Options(stages="chained"))
    first, second = outcome.submission.elements
    assert (first.stage, first.after, second.stage, second.after) == ("first", (), "", (0,))
    assert first.runs == second.runs
    assert outcome.submission.later(first) == [first, second]
    assert outcome.submission.later(second) == [second]
    assert [option(argv, "dependency") for argv in fake.calls("sbatch")] == ["", "afterany:100"]


# --------------------------------------------------------------------------------------------- limits


def test_an_array_is_cut_where_slurm_takes_no_longer_one(tmp_path: Path, fake: FakeSlurm) -> None:
    fake.write(max_array_size=4)
    submitted(tmp_path, site=Site(array_limit=4))
    first, second = fake.calls("sbatch")
    assert (option(first, "array"), first[-1]) == ("0-3%2", "--first=0")
    assert (option(second, "array"), second[-1]) == ("0-1", "--first=4")
    assert newest(tmp_path).tasks() == {
        0: "100_0",
        1: "100_1",
        2: "100_2",
        3: "100_3",
        4: "101_0",
        5: "101_1",
    }


def test_cut_levels_wait_for_exactly_the_arrays_they_need() -> None:
    one = [records.Element(n, f"a{n}", "tuning", (f"r{n}",), (0,)) for n in range(5)]
    two = [records.Element(5 + n, f"a{n}", "confirm", (), (0,), after=(n,)) for n in range(5)]
    arrays = elements.cut([tuple(one), tuple(two)], 2)
    assert [(a.first, a.count, a.after) for a in arrays] == [
        (0, 2, ()), (2, 2, ()), (4, 1, ()), (5, 2, (0,)), (7, 2, (1,)), (9, 1, (2,)),
    ]  # fmt: skip


def test_cohorts_of_an_arm_share_an_element_where_the_queue_is_short(tmp_path: Path, fake: FakeSlurm) -> None:
    outcome = submitted(tmp_path, max_members=1, site=Site(max_submit=8))
    assert [len(e.runs) for e in outcome.submission.elements] == [2] * 6
    assert newest(tmp_path).max_members == 1
    with pytest.raises(UserError, match="6 elements, and SLURM takes 2 more of this user's jobs") as caught:
        submitted(tmp_path / "b", site=Site(max_submit=8))
    assert "--group" in str(caught.value)
    assert len(fake.jobs) == 1
    assert records.submissions(tmp_path / "b" / "toy") == []


# --------------------------------------------------------------------------------------------- faults

TWO = {"study": "tuned"}  # of two arrays


def test_a_refusal_leaves_nothing_in_the_queue(tmp_path: Path, fake: FakeSlurm) -> None:
    fake.answer("sbatch", "ok", "Batch job submission failed: Invalid partition name specified")
    with pytest.raises(UserError, match="Invalid partition name") as caught:
        submitted(tmp_path, **TWO)
    assert "\n" not in str(caught.value)
    assert fake.states == ["CANCELLED"]
    assert newest(tmp_path).state == "withdrawn"
    assert submitted(tmp_path, **TWO).submission.state == "submitted"
    assert fake.states == ["CANCELLED", "PENDING", "PENDING"]


def test_what_got_no_answer_is_handed_over_again(tmp_path: Path, fake: FakeSlurm) -> None:
    fake.answer("sbatch", "silent", "ok", "silent", "silent", "ok")
    assert submitted(tmp_path, **TWO).submission.jobs() == [100, 101]
    assert fake.states == ["PENDING", "PENDING"]


def test_a_lost_answer_does_not_submit_twice(tmp_path: Path, fake: FakeSlurm) -> None:
    fake.answer("sbatch", "lost", "lost")
    assert submitted(tmp_path, **TWO).submission.jobs() == [100, 101]
    assert len(fake.jobs) == 2


def test_a_controller_that_stays_silent_is_one_line(tmp_path: Path, fake: FakeSlurm) -> None:
    fake.answer("sbatch", "ok", *["silent"] * 3)
    with pytest.raises(UserError, match="Unable to contact slurm controller"):
        submitted(tmp_path, **TWO)
    assert fake.states == ["CANCELLED"]
    assert newest(tmp_path).state == "withdrawn"


def test_what_cannot_be_taken_back_is_said_and_taken_back_next_time(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.answer("sbatch", "ok", "QOSMaxSubmitJobPerUserLimit")
    fake.answer("scancel", "Access denied")
    with pytest.raises(UserError, match=r"jobs 100 were accepted and could not be cancelled") as caught:
        submitted(tmp_path, **TWO)
    assert "QOSMaxSubmitJobPerUserLimit" in str(caught.value)
    assert newest(tmp_path).state == "submitting"
    submitted(tmp_path, **TWO)
    assert [one.state for one in records.submissions(tmp_path / "toy")] == ["withdrawn", "submitted"]
    assert fake.states == ["CANCELLED", "PENDING", "PENDING"]


class _Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("write", "left", "then"), [(2, ["PENDING"], "withdrawn"), (3, ["PENDING"] * 2, "submitted")]
)
def test_a_kill_between_sbatch_and_the_record_loses_no_array(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, write: int, left: list[str], then: str
) -> None:
    writes = 0
    real = records.write

    def killed(study: Path, submission: Submission) -> None:
        nonlocal writes
        writes += 1
        if writes == write:
            raise _Killed
        real(study, submission)

    monkeypatch.setattr(records, "write", killed)
    with pytest.raises(_Killed):
        submitted(tmp_path, **TWO)
    monkeypatch.setattr(records, "write", real)
    assert fake.states == left
    assert newest(tmp_path).state == "submitting"
    assert None in [array.job for array in newest(tmp_path).arrays]
    again = submitted(tmp_path, **TWO)
    first, *rest = records.submissions(tmp_path / "toy")
    assert first.state == then
    if then == "submitted":
        assert first.jobs() == [100, 101]
        assert again.submission is None
        assert fake.states == ["PENDING", "PENDING"]
    else:
        assert fake.states == ["CANCELLED", "PENDING", "PENDING"]
        assert [one.state for one in rest] == ["submitted"]


def test_without_slurm_it_says_what_else_to_do(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"sbatch: not on PATH; .* `jaxablate run`"):
        submitted(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    dry = submit(STUDIES["faults"](str(tmp_path / "runs")), Site(), Options(), "dry run")
    assert any("1001" in note for note in dry.notes)
    assert len(dry.commands) == 1


def test_a_queue_that_cannot_be_asked_submits_nothing(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(tmp_path, **TWO)
    fake.answer("squeue", *["silent"] * 4)
    with pytest.raises(UserError, match=r"what is queued of .* cannot be told"):
        submitted(tmp_path, **TWO)
    assert len(fake.jobs) == 2


@pytest.mark.parametrize("write", [1, 2])
def test_a_full_disk_submits_nothing(
    tmp_path: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    writes = 0
    real = runstore.write_json

    def full(path: Path, obj: object) -> None:
        nonlocal writes
        if Path(path).name == "submission.json":
            writes += 1
            if writes >= write:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, obj)

    monkeypatch.setattr(runstore, "write_json", full)
    with pytest.raises(UserError, match="No space left on device; make room") as caught:
        submitted(tmp_path, **TWO)
    assert "\n" not in str(caught.value)
    assert fake.states == ["CANCELLED"] * (write - 1)
    monkeypatch.undo()


def test_two_at_a_time_are_one_too_many(tmp_path: Path, fake: FakeSlurm) -> None:
    frozen(tmp_path, "slow")
    folder = tmp_path / "toy" / "slurm"
    folder.mkdir()
    with Claim(folder / "submitting.json"), pytest.raises(Claimed, match="the submission of the study"):
        submitted(tmp_path, "slow")
    assert fake.jobs == []


def test_what_is_refused_before_anything_is_written(tmp_path: Path, fake: FakeSlurm) -> None:
    declared = STUDIES["slow"](str(tmp_path / "runs"))
    named = dataclasses.replace(
        declared, arms=(dataclasses.replace(declared.arms[0], name="slurm"),), baseline="slurm"
    )
    with pytest.raises(UserError, match="arm 'slurm': its directory is where submissions are kept"):
        submit(named, Site(), Options())
    with pytest.raises(UserError, match="--max-members=-1"):
        Options(max_members=-1)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--time=soon", "--time: time='soon'"),
        ("--signal=KILL", "--signal: signal='KILL'"),
        ("--array-limit=-2", "--array-limit: array_limit=-2"),
        ("--site=nowhere.toml", "--site=nowhere.toml: cannot be read"),
        ("--on-finish=no-such-program now", "no program 'no-such-program'"),
        ("--on-finish='", "quote it as for a shell"),
        ("--prepare", "--dry-run: not allowed with --prepare"),
    ],
)
def test_a_mistaken_option_is_one_line(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], argument: str, words: str
) -> None:
    arguments = [
        "submit",
        "tests/configs/toy_study.py",
        f"--workdir={tmp_path / 'runs'}",
        "--dry-run",
        argument,
    ]
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert words in err
    assert not (tmp_path / "runs").exists()


def test_a_prepared_submission_waits_for_its_user(tmp_path: Path, fake: FakeSlurm) -> None:
    outcome = submit(STUDIES["faults"](str(tmp_path)), Site(), Options(), "prepare")
    assert fake.calls("sbatch") == []
    assert newest(tmp_path).state == "prepared"
    assert shlex.join(outcome.commands[0]) in outcome.text()
    assert submitted(tmp_path).submission.state == "submitted"  # it holds nothing back


def test_the_words_of_silence_are_those_that_pass() -> None:
    assert _PASSING.search(SILENT)
    assert not _PASSING.search("Batch job submission failed: Invalid partition name specified")
    assert submits.script_of(Site()).name == "array.sbatch"
    assert submits.script_of(Site(nodes=2)).name == "multinode.sbatch"
