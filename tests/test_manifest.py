"""The frozen study: what is frozen stays, tampering is refused, a kill or a second writer loses nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jaxablate import disk
from jaxablate import manifest as manifest_module
from jaxablate.claims import Claim
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest, read_rates, study_dir
from jaxablate.study import Hypothesis, Response, Study, factorial, one_factor_out
from tests.frozen import NOISY, RULE, WIDE, WIDE_BETTER, freeze, resolved, toy_study

ARMS = ["baseline", "wide", "noisy", "wide_noisy"]


def rows(manifest: Manifest) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (manifest.path / "runs.jsonl").read_text().splitlines()]


def edit_study(manifest: Manifest, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((manifest.path / "study.json").read_text())
    change(values)
    (manifest.path / "study.json").write_text(json.dumps(values))


def one_line(call: Callable[[], object], *says: str) -> str:
    with pytest.raises(UserError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    for words in says:
        assert words in message
    return message


# -------------------------------------------------------------------------------- freeze and load


def test_a_frozen_study_loads_as_it_was_frozen(tmp_path: Path):
    study = toy_study(tmp_path)
    frozen = freeze(study)
    assert frozen.path == tmp_path / "toy"
    loaded = Manifest.load(frozen.path)
    assert loaded.runs == frozen.runs
    assert dataclasses.replace(loaded.study, base=None) == dataclasses.replace(study, base=None)
    assert loaded.plan_hash == study.plan_hash
    assert (loaded.locked, loaded.amendments) == (None, ())
    assert [(run.arm, run.seed) for run in loaded.runs] == [(arm, seed) for arm in ARMS for seed in (0, 1, 2)]
    assert [run.index for run in loaded.runs] == list(range(12))


def test_a_run_is_frozen_with_its_whole_config(tmp_path: Path):
    study = toy_study(tmp_path)
    manifest = freeze(study)
    run = next(run for run in manifest.runs if (run.arm, run.seed) == ("wide", 2))
    config = manifest.config_of(run)
    assert (config["model"]["width"], config["seed"]) == (16, 2)
    assert "host" not in config
    assert run.fingerprint == dataclasses.replace(resolved(study)["wide"], seed=2).fingerprint
    assert manifest.run_dir(run).path == tmp_path / "toy" / "wide" / run.id


def test_freezing_the_same_again_changes_nothing(tmp_path: Path):
    first = freeze(toy_study(tmp_path))
    before = {name: (first.path / name).read_bytes() for name in ("study.json", "runs.jsonl")}
    again = freeze(toy_study(tmp_path))
    assert again.runs == first.runs
    assert before == {name: (first.path / name).read_bytes() for name in before}


def test_a_preview_says_what_freeze_would_do_and_writes_nothing(tmp_path: Path):
    study = toy_study(tmp_path / "new")
    assert len(Manifest.preview(study, resolved(study)).runs) == 12
    assert not (tmp_path / "new").exists()


# -------------------------------------------------------------------------------------- tampering

TAMPER: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "edited": lambda lines: [lines[0].replace(b'"seed": 0', b'"seed": 7'), *lines[1:]],
    "deleted": lambda lines: lines[:-1],
    "deleted in the middle": lambda lines: [*lines[:3], *lines[4:]],
    "appended": lambda lines: [*lines, lines[-1]],
    "swapped": lambda lines: [lines[1], lines[0], *lines[2:]],
    "emptied": lambda lines: [],
    "binary": lambda lines: [b"\xff\x00"],
    "torn": lambda lines: [*lines[:-1], lines[-1][:-4]],
}


@pytest.mark.parametrize("how", TAMPER)
def test_a_list_of_runs_that_is_not_the_frozen_one_is_refused(tmp_path: Path, how: str):
    path = freeze(toy_study(tmp_path)).path
    list_file = path / "runs.jsonl"
    list_file.write_bytes(b"".join(TAMPER[how](list_file.read_bytes().splitlines(keepends=True))))
    for call in (lambda: Manifest.load(path), lambda: freeze(toy_study(tmp_path))):
        one_line(call, "runs.jsonl", "restore the file")


def test_a_list_of_runs_that_is_gone_is_refused(tmp_path: Path):
    path = freeze(toy_study(tmp_path)).path
    (path / "runs.jsonl").unlink()
    one_line(lambda: Manifest.load(path), "runs.jsonl", "restore the file")


def test_an_older_list_of_runs_is_refused(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    older = (manifest.path / "runs.jsonl").read_bytes()
    freeze(toy_study(tmp_path, seeds=(0, 1, 2, 3)))
    (manifest.path / "runs.jsonl").write_bytes(older)
    one_line(lambda: Manifest.load(manifest.path), "runs.jsonl")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"null", b"\xff", b'{"format": 99}', b'{"a": NaN}']
)
def test_a_half_written_declaration_is_one_line(tmp_path: Path, content: bytes):
    path = freeze(toy_study(tmp_path)).path
    (path / "study.json").write_bytes(content)
    for call in (lambda: Manifest.load(path), lambda: freeze(toy_study(tmp_path))):
        one_line(call, str(path / "study.json"))


KEYS = ("study", "configs", "host", "plan_hash", "locked", "amendments", "runs_sha256")
TEXTS = ("locked",)  # where any text will do


@pytest.mark.parametrize(
    "key, value",
    [
        (key, value)
        for key in KEYS
        for value in ("absent", 3, [3], "x")
        if (value, key in TEXTS) != ("x", True)
    ],
)
def test_a_declaration_that_was_edited_by_hand_is_one_line(tmp_path: Path, key: str, value: Any):
    path = freeze(toy_study(tmp_path)).path

    def change(values: dict[str, Any]) -> None:
        values[key] = value
        if value == "absent":
            del values[key]

    edit_study(Manifest.load(path), change)
    one_line(lambda: Manifest.load(path), str(path), "restore the file")


def test_a_study_within_the_declaration_that_was_edited_is_one_line(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path))
    edit_study(manifest, lambda values: values["study"].update(alpha="big"))
    one_line(lambda: Manifest.load(manifest.path), "study.json", "study.alpha='big'", "restore the file")


ANOTHER_PLAN = "its plan is not the one whose hash it carries; restore the file"


def test_a_plan_that_was_edited_under_its_hash_is_refused(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path)).lock()
    edit_study(manifest, lambda values: values["study"].update(title="Another"))
    assert Manifest.load(manifest.path).study.title == "Another"  # words are no part of it
    edit_study(manifest, lambda values: values["study"]["hypotheses"][0].update(margin=0.1))
    one_line(lambda: Manifest.load(manifest.path), "study.json", ANOTHER_PLAN)
    one_line(lambda: freeze(toy_study(tmp_path)), ANOTHER_PLAN)


def test_of_an_amended_plan_the_last_hash_counts(tmp_path: Path):
    freeze(toy_study(tmp_path)).lock()
    amended = freeze(toy_study(tmp_path, hypotheses=(dataclasses.replace(WIDE_BETTER, margin=0.1),)))
    assert len(Manifest.load(amended.path).amendments) == 1
    edit_study(
        amended, lambda values: values["study"]["hypotheses"][0].update(margin=0.0)
    )  # as it was locked
    one_line(lambda: Manifest.load(amended.path), ANOTHER_PLAN)


def test_whole_numbers_where_others_are_meant_are_the_same_plan(tmp_path: Path):
    whole = toy_study(tmp_path, hypotheses=(dataclasses.replace(WIDE_BETTER, margin=0),))
    frozen = freeze(whole).lock()
    assert Manifest.load(frozen.path).plan_hash == frozen.plan_hash
    assert freeze(toy_study(tmp_path)).amendments == ()  # which says 0.0


def test_a_directory_without_a_study_is_one_line(tmp_path: Path):
    one_line(lambda: Manifest.load(tmp_path), "holds no study.json")
    one_line(lambda: Manifest.load(tmp_path / "none"), "no such directory")


def test_rates_that_were_edited_are_one_line(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path, learning_rate=RULE))
    assert read_rates(manifest.path) == {}
    for content in ("[]", '{"wide": 3}', '{"wide": {}}', "{"):
        (manifest.path / "rates.json").write_text(content)
        one_line(lambda: read_rates(manifest.path), "rates.json")


# ------------------------------------------------------------------------------- kills and full disks


class Killed(BaseException):
    """Stands for a process that ends in the middle."""


def kill_at(monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    """The process dies as it is about to replace its `write`-th file, from 0."""
    replace, count = os.replace, iter(range(100))

    def dying(*args: Any, **kw: Any) -> None:
        if next(count) == write:
            raise Killed
        replace(*args, **kw)

    monkeypatch.setattr(os, "replace", dying)


@pytest.mark.parametrize("write", range(3))
def test_a_kill_while_a_study_is_frozen_first_leaves_one_that_can_be_frozen(
    tmp_path: Path, monkeypatch, write: int
):
    with monkeypatch.context() as patch:
        kill_at(patch, write)
        with pytest.raises(Killed):
            freeze(toy_study(tmp_path))
    assert len(freeze(toy_study(tmp_path)).runs) == 12
    assert len(Manifest.load(tmp_path / "toy").runs) == 12


@pytest.mark.parametrize("write", range(3))
def test_a_kill_while_seeds_are_added_leaves_a_study_that_loads(tmp_path: Path, monkeypatch, write: int):
    old = freeze(toy_study(tmp_path)).lock()
    with monkeypatch.context() as patch:
        kill_at(patch, write)
        with pytest.raises(Killed):
            freeze(toy_study(tmp_path, seeds=(0, 1, 2, 3)))
    left = Manifest.load(old.path)
    assert left.runs[:12] == old.runs
    assert len(left.runs) in (12, 16)
    assert left.locked == old.locked
    finished = freeze(toy_study(tmp_path, seeds=(0, 1, 2, 3)))
    assert len(finished.runs) == 16
    assert len(finished.amendments) == 1


def test_the_test_of_kills_reaches_past_the_last_write(tmp_path: Path, monkeypatch):
    kill_at(monkeypatch, 3)
    assert len(freeze(toy_study(tmp_path)).runs) == 12


def test_a_full_disk_is_one_line_and_what_was_frozen_stays(tmp_path: Path, monkeypatch):
    old = freeze(toy_study(tmp_path))
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(disk, "write_bytes", full)
        one_line(lambda: freeze(toy_study(tmp_path, seeds=(0, 1, 2, 3))), "No space left", "--workdir")
    assert Manifest.load(old.path).runs == old.runs


def test_a_read_only_workdir_is_one_line(tmp_path: Path, monkeypatch):
    path = freeze(toy_study(tmp_path)).path

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:  # as root, who runs tests in containers, permissions hold nobody
        patch.setattr(Claim, "acquire", read_only)
        one_line(lambda: freeze(toy_study(tmp_path)), str(path), "Read-only file system", "--workdir")
        assert len(Manifest.load(path).runs) == 12  # reading goes on
    file = tmp_path / "file"
    file.touch()
    one_line(lambda: freeze(toy_study(file)), str(file), "cannot create the directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_workdir_without_permission_is_one_line(tmp_path: Path):
    path = freeze(toy_study(tmp_path)).path
    path.chmod(0o500)
    one_line(lambda: freeze(toy_study(tmp_path, seeds=(0, 1, 2, 3))), str(path), "--workdir")
    path.chmod(0o700)


# ------------------------------------------------------------------------------------- two writers


def test_writers_at_the_same_time_add_up(tmp_path: Path):
    study = toy_study(tmp_path, learning_rate=RULE)
    start = freeze(study)
    configs = resolved(study)
    rates = [0.1 * (i + 1) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda rate: start.with_tuning({"wide": [rate]}, configs), rates))
    manifest = Manifest.load(start.path)
    added = manifest.runs[len(start.runs) :]
    assert sorted({run.learning_rate for run in added}) == pytest.approx(rates)
    assert len(added) == 2 * len(rates)
    assert [run.index for run in manifest.runs] == list(range(len(manifest.runs)))
    assert not (start.path / "writing.json").exists()


def test_a_writer_that_never_ends_is_named(tmp_path: Path, monkeypatch):
    path = freeze(toy_study(tmp_path)).path
    monkeypatch.setattr(manifest_module.time, "sleep", lambda _: None)
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(manifest_module.time, "monotonic", lambda: next(ticks))
    with Claim(path / "writing.json"):
        one_line(
            lambda: freeze(toy_study(tmp_path)),
            "writing.json: the study is claimed",
            f"process {os.getpid()}",
        )


def listed(start: Manifest, rates: Sequence[float], study: Study) -> None:
    for rate in rates:
        start.with_tuning({"wide": [rate]}, resolved(study))


def test_a_reader_beside_a_writer_sees_the_list_before_or_after(tmp_path: Path):
    study = toy_study(tmp_path, learning_rate=RULE)
    start = freeze(study)
    sizes = []
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(listed, start, [0.1 * (i + 1) for i in range(10)], study)
        while not writer.done():
            sizes.append(len(Manifest.load(start.path).runs))
        writer.result()
    assert sizes == sorted(sizes)
    assert set(sizes) <= set(range(len(start.runs), len(start.runs) + 21, 2))


@pytest.mark.parametrize("honest", [True, False])
def test_a_list_that_changes_between_the_two_files_is_read_anew(tmp_path: Path, monkeypatch, honest: bool):
    """The instant that the test above may miss: the list is written after study.json was read."""
    study = toy_study(tmp_path, learning_rate=RULE)
    start, read = freeze(study), manifest_module._read_runs

    def late(path: Path, frozen: Sequence[str]) -> Any:
        monkeypatch.undo()  # once; and the writer reads as well
        if honest:
            listed(start, [0.1], study)
        else:
            path.write_bytes(path.read_bytes().replace(b'"seed": 100', b'"seed": 7'))
        return read(path, frozen)

    monkeypatch.setattr(manifest_module, "_read_runs", late)
    if honest:
        assert len(Manifest.load(start.path).runs) == len(start.runs) + 2
    else:
        one_line(lambda: Manifest.load(start.path), "is not the list of runs")


# ------------------------------------------------------------------------------------ what is added


def test_further_seeds_and_arms_are_added_behind_what_is_there(tmp_path: Path):
    few = toy_study(tmp_path, arms=one_factor_out((WIDE, NOISY)))
    old = freeze(few)
    new = freeze(toy_study(tmp_path, seeds=(0, 1, 2, 3)))
    assert new.runs[: len(old.runs)] == old.runs
    added = [(run.arm, run.seed) for run in new.runs[len(old.runs) :]]
    assert set(added) == {
        ("baseline", 3),
        ("wide", 3),
        ("noisy", 3),
        *(("wide_noisy", seed) for seed in range(4)),
    }
    assert new.study.seeds == (0, 1, 2, 3)
    assert Manifest.load(new.path).runs == new.runs


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda study: study.base.training.update(steps=7), "training.steps: 1000 -> 7"),
        (lambda study: study.base.model.update(noise=0.5), "model.noise: 0.0 -> 0.5"),
    ],
)
def test_a_config_that_would_give_other_numbers_is_refused(tmp_path: Path, change, says: str):
    old = freeze(toy_study(tmp_path))
    edited = toy_study(tmp_path)
    change(edited)
    one_line(lambda: freeze(edited), "arm 'baseline' was frozen with another config", says, "--workdir")
    assert Manifest.load(old.path).runs == old.runs


def test_another_host_is_no_other_config(tmp_path: Path):
    freeze(toy_study(tmp_path))
    elsewhere = toy_study(tmp_path)
    elsewhere.base.host.update(workers=3, split=2)
    assert freeze(elsewhere).host["workers"] == 3


def test_arms_and_seeds_with_runs_cannot_be_taken_away(tmp_path: Path):
    freeze(toy_study(tmp_path))
    one_line(
        lambda: freeze(toy_study(tmp_path, arms=one_factor_out((WIDE, NOISY)))), "arm 'wide_noisy' has runs"
    )
    one_line(lambda: freeze(toy_study(tmp_path, seeds=(0, 1))), "seed 2 has runs")


# ------------------------------------------------------------------------------------- the plan


def test_a_plan_can_be_edited_until_it_is_locked(tmp_path: Path):
    first = freeze(toy_study(tmp_path))
    second = freeze(toy_study(tmp_path, hypotheses=()))
    assert second.plan_hash != first.plan_hash
    assert second.amendments == ()
    assert Manifest.load(second.path).study.hypotheses == ()


def test_an_edit_of_a_locked_plan_is_an_amendment(tmp_path: Path):
    locked = freeze(toy_study(tmp_path)).lock()
    assert Manifest.load(locked.path).locked == locked.locked
    assert locked.lock() == locked  # once
    stricter = dataclasses.replace(WIDE_BETTER, margin=0.1)
    second = freeze(toy_study(tmp_path, hypotheses=(stricter,)))
    assert second.plan_hash == locked.plan_hash  # the hash that was locked
    assert [a["changes"] for a in second.amendments] == [["hypotheses[0].margin: 0.0 -> 0.1"]]
    assert second.amendments[0]["hash"] == toy_study(tmp_path, hypotheses=(stricter,)).plan_hash
    again = freeze(toy_study(tmp_path, hypotheses=(stricter,)))
    assert again.amendments == second.amendments
    back = freeze(toy_study(tmp_path))
    assert len(back.amendments) == 2  # going back is an edit too
    assert Manifest.load(back.path).amendments == back.amendments


def test_words_are_no_amendment(tmp_path: Path):
    freeze(toy_study(tmp_path)).lock()
    renamed = freeze(toy_study(tmp_path, title="Another", groups={"g": ("wide",)}))
    assert renamed.amendments == ()
    assert Manifest.load(renamed.path).study.title == "Another"


def test_more_seeds_in_a_locked_plan_are_an_amendment(tmp_path: Path):
    freeze(toy_study(tmp_path)).lock()
    more = freeze(toy_study(tmp_path, seeds=(0, 1, 2, 3)))
    assert more.amendments[0]["changes"] == ["seeds: [0, 1, 2] -> [0, 1, 2, 3]"]


def test_a_hypothesis_after_the_lock_is_in_the_amendment(tmp_path: Path):
    freeze(toy_study(tmp_path)).lock()
    late = Hypothesis("late", "superiority", "noisy")
    (amendment,) = freeze(toy_study(tmp_path, hypotheses=(WIDE_BETTER, late))).amendments
    assert any('"late"' in change for change in amendment["changes"])


# ----------------------------------------------------------------------------------- learning rates


def test_tuning_comes_first_and_confirmation_at_the_chosen_rates(tmp_path: Path):
    study = toy_study(tmp_path, learning_rate=RULE)
    tuning = freeze(study)
    assert {(run.phase, run.seed, run.learning_rate) for run in tuning.runs} == {
        ("tuning", seed, rate) for seed in (100, 101) for rate in (0.001, 0.01)
    }
    chosen = tuning.with_rates(
        {"wide": {"learning_rate": 0.01}, "noisy": {"learning_rate": None}}, resolved(study)
    )
    added = chosen.runs[len(tuning.runs) :]
    assert [(run.arm, run.phase, run.seed, run.learning_rate) for run in added] == [
        ("wide", "confirm", seed, 0.01) for seed in (0, 1, 2)
    ]
    assert chosen.config_of(added[0])["optim"]["learning_rate"] == 0.01
    assert read_rates(chosen.path)["noisy"]["learning_rate"] is None
    assert Manifest.load(chosen.path).runs == chosen.runs


def test_rates_are_added_to_those_that_were_chosen_before(tmp_path: Path):
    study = toy_study(tmp_path, learning_rate=RULE)
    manifest = freeze(study).with_rates({"wide": {"learning_rate": 0.01}}, resolved(study))
    manifest = manifest.with_rates({"baseline": {"learning_rate": 0.001}}, resolved(study))
    assert set(read_rates(manifest.path)) == {"wide", "baseline"}
    assert sum(run.phase == "confirm" for run in manifest.runs) == 6


def test_rates_give_runs_to_the_seeds_of_the_newest_study(tmp_path: Path):
    study = toy_study(tmp_path, learning_rate=RULE)
    stale = freeze(study)
    freeze(toy_study(tmp_path, learning_rate=RULE, seeds=(0, 1, 2, 3)))
    chosen = stale.with_rates({"wide": {"learning_rate": 0.01}}, resolved(study))
    assert [run.seed for run in chosen.runs if run.phase == "confirm"] == [0, 1, 2, 3]


def test_of_two_choices_the_one_that_has_its_runs_stands(tmp_path: Path):
    study = toy_study(tmp_path, learning_rate=RULE)
    stale = freeze(study)
    first = stale.with_rates({"wide": {"learning_rate": 0.01}}, resolved(study))
    second = stale.with_rates({"wide": {"learning_rate": 0.001}}, resolved(study))
    assert second.runs == first.runs
    assert read_rates(stale.path)["wide"]["learning_rate"] == 0.01


def test_a_longer_grid_is_added_once(tmp_path: Path):
    study = toy_study(tmp_path, learning_rate=RULE)
    manifest = freeze(study).with_tuning({"wide": [0.1]}, resolved(study))
    assert len(manifest.runs) == 4 * 4 + 2
    assert manifest.with_tuning({"wide": [0.1]}, resolved(study)).runs == manifest.runs


def test_a_kill_between_rates_and_runs_is_mended_by_freezing_again(tmp_path: Path, monkeypatch):
    study = toy_study(tmp_path, learning_rate=RULE)
    manifest = freeze(study)
    with monkeypatch.context() as patch:
        kill_at(patch, 1)  # rates.json is the first file
        with pytest.raises(Killed):
            manifest.with_rates({"wide": {"learning_rate": 0.01}}, resolved(study))
    assert read_rates(manifest.path)
    assert all(run.phase == "tuning" for run in Manifest.load(manifest.path).runs)
    assert sum(run.phase == "confirm" for run in freeze(study).runs) == 3


def test_seeds_of_tuned_arms_can_be_extended(tmp_path: Path):
    study = toy_study(tmp_path, learning_rate=RULE)
    freeze(study).with_rates({"wide": {"learning_rate": 0.01}}, resolved(study))
    more = freeze(toy_study(tmp_path, learning_rate=RULE, seeds=(0, 1, 2, 3)))
    assert sorted(run.seed for run in more.runs if run.phase == "confirm") == [0, 1, 2, 3]


# -------------------------------------------------------------------------------------- where it is


def test_arms_that_compute_the_same_are_still_two_arms(tmp_path: Path):
    same = dataclasses.replace(WIDE, levels={"off": {}, "on": {"model.width": 8}})  # the width it has anyhow
    manifest = freeze(toy_study(tmp_path, factors=(same,), arms=factorial((same,)), hypotheses=()))
    assert [(run.arm, run.seed) for run in manifest.runs] == [
        (arm, seed) for arm in ("baseline", "wide") for seed in (0, 1, 2)
    ]
    assert len({manifest.run_dir(run).path for run in manifest.runs}) == 6


def test_a_study_moves_with_its_directory(tmp_path: Path):
    manifest = freeze(toy_study(tmp_path / "a"))
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = Manifest.load(tmp_path / "b" / "toy")
    assert moved.runs == manifest.runs
    assert moved.run_dir(moved.runs[0]).path.is_relative_to(tmp_path / "b")


def test_a_study_is_found_by_its_directory_or_its_file(tmp_path: Path):
    assert study_dir(str(tmp_path)) == tmp_path
    file = tmp_path / "s.py"
    file.write_text("from pathlib import Path\nfrom tests.frozen import toy_study\n"
                    "def get_study():\n    return toy_study(Path('somewhere'))\n")  # fmt: skip
    assert study_dir(str(file)) == Path("somewhere/toy")
    assert study_dir(str(file), [("host.workdir", "else")]) == Path("else/toy")
    one_line(lambda: study_dir(str(tmp_path / "none.py")), "no such file")


def test_studies_of_another_response_are_other_plans(tmp_path: Path):
    first = freeze(toy_study(tmp_path))
    second: Study = toy_study(tmp_path, responses=(Response("val/score", "max"),))
    assert freeze(second).plan_hash != first.plan_hash
