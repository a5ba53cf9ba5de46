"""Promotion: refused unless every gate is open, and then a config that trains what the evidence is about."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxablate import cli, config
from jaxablate.analysis import results
from jaxablate.analysis.from_csv import from_csv
from jaxablate.analysis.promote import Promotion, promote
from jaxablate.analysis.stats.analyse import analyse
from jaxablate.config import frozen_config
from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.study import Hypothesis
from tests.frozen import COMMIT, RULE, WIDE_BETTER, freeze, resolved, toy_study, write_run

SEEDS = tuple(range(5))
BETTER = {"wide": -0.4, "wide_noisy": -0.4}  # against the others' loss of about 1
NOISY_EQUAL = Hypothesis("noisy_equal", "equivalence", "noisy", margin=0.1, primary=False)
NOISY_BETTER = Hypothesis("noisy_better", "superiority", "noisy", primary=False)


def study(
    workdir: Path,
    shift: Mapping[str, float] = BETTER,
    lost: Mapping[str, Sequence[int]] | None = None,
    **changes: Any,
) -> Manifest:
    """A study that ran with five seeds; `shift` is what an arm's loss is off by, `lost` are seeds that diverged."""
    manifest = freeze(toy_study(workdir, **({"seeds": SEEDS} | changes))).lock()
    if manifest.study.learning_rate is not None:
        rates = {arm.name: {"learning_rate": 0.01} for arm in manifest.study.arms}
        manifest = manifest.with_rates(rates, resolved(toy_study(workdir, **({"seeds": SEEDS} | changes))))
    for run in manifest.runs:
        if run.phase == "confirm" and run.seed in (lost or {}).get(run.arm, ()):
            write_run(manifest, run, "diverged")
        else:
            noise = 0.01 * ((run.seed * 7 + len(run.arm)) % 5 - 2)
            loss = 1.0 + 0.05 * run.seed + shift.get(run.arm, 0.0) + noise
            write_run(manifest, run, metrics={"val/loss": loss, "val/score": 1 - loss})
    return manifest


def promoted(manifest: Manifest, arm: str, out: Path, **options: Any) -> Promotion:
    found = results.load(manifest)
    return promote(found, analyse(found), arm, **({"name": "best", "production_dir": out} | options))


def refused(manifest: Manifest, arm: str, out: Path, *says: str, **options: Any) -> None:
    with pytest.raises(UserError) as raised:
        promoted(manifest, arm, out, **options)
    message = str(raised.value)
    assert "\n" not in message
    for words in says:
        assert words in message, message
    assert not out.exists() or list(out.iterdir()) == []


# ------------------------------------------------------------------------------------- what it makes


def test_the_production_config_trains_what_the_arms_runs_trained(tmp_path: Path):
    manifest, out = study(tmp_path), tmp_path / "production"
    found = promoted(manifest, "wide", out)
    assert sorted(path.name for path in out.iterdir()) == ["best.json", "best.promotion.json", "best.py"]
    (run,) = config.load(str(found.config)).runs
    first = next(run for run in manifest.runs if run.arm == "wide")
    assert run.fingerprint == first.fingerprint  # study, arm and host are no part of it
    assert (run.study, run.arm, run.seed, run.model.width) == ("production", "best", 0, 16)
    assert str(run.host.workdir) == "runs"


def test_the_command_line_takes_it(tmp_path: Path, repo: Path, child_env: dict[str, str]):
    found = promoted(study(tmp_path), "wide", tmp_path / "production")
    command = [sys.executable, "-m", "jaxablate.main", f"--config={found.config}", "--print-config"]
    child = subprocess.run(
        [*command, "--config.seeds=3,4"], cwd=repo, env=child_env, capture_output=True, text=True, check=True
    )
    printed = json.loads(child.stdout)
    assert [(run["arm"], run["seed"], run["model"]["width"]) for run in printed] == [
        ("best", 3, 16),
        ("best", 4, 16),
    ]


def test_the_evidence_says_what_it_rests_on(tmp_path: Path):
    manifest, out = study(tmp_path), tmp_path / "production"
    promoted(manifest, "wide", out, thresholds={"loss": "0.9"})
    evidence = json.loads((out / "best.promotion.json").read_text())
    assert (evidence["study"], evidence["arm"], evidence["plan_hash"]) == ("toy", "wide", manifest.plan_hash)
    assert [gate["name"] for gate in evidence["gates"]] == ["plan", "seeds", "wide_better", "threshold loss"]
    assert {gate["state"] for gate in evidence["gates"]} == {"open"}
    assert [verdict["outcome"] for verdict in evidence["verdicts"]] == ["supported"]
    assert evidence["seeds"] == [0, 1, 2, 3, 4]
    assert evidence["code"] == f"commit {COMMIT[:12]}"
    assert evidence["learning_rate"] == 0.001
    loss = evidence["values"]["loss"]
    assert loss["mean"]["low"] < loss["mean"]["value"] < loss["mean"]["high"]
    assert loss["mean"]["value"] == pytest.approx(sum(loss["values"].values()) / 5)


def test_a_tuned_arm_is_promoted_at_its_rate(tmp_path: Path):
    manifest, out = study(tmp_path, learning_rate=RULE), tmp_path / "production"
    found = promoted(manifest, "wide", out)
    assert config.load(str(found.config)).base.optim.learning_rate == 0.01
    assert json.loads((out / "best.promotion.json").read_text())["learning_rate"] == 0.01


def test_a_dry_run_shows_the_files_and_writes_none(tmp_path: Path):
    manifest, out = study(tmp_path), tmp_path / "production"
    shown = promoted(manifest, "wide", out, mode="dry run")
    assert not out.exists()
    assert f"would write {out / 'best.json'}" in shown.text()
    assert '"width": 16' in shown.text()
    written = promoted(manifest, "wide", out)
    assert shown.files.keys() == written.files.keys()
    assert (out / "best.json").read_text() == shown.files[str(out / "best.json")]
    assert f"python -m jaxablate.main --config={out / 'best.py'}" in written.text()
    data = shown.to_dict()
    assert json.loads(json.dumps(data))["mode"] == "dry run"


def test_promoting_the_same_again_writes_nothing(tmp_path: Path):
    manifest, out = study(tmp_path), tmp_path / "production"
    promoted(manifest, "wide", out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    again = promoted(manifest, "wide", out)
    assert again.files == {}
    assert "nothing to write" in again.text()
    assert before == {path: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("lacking", ["best.json", "best.promotion.json", "best.py"])
def test_a_promotion_that_was_killed_is_finished_by_the_next(tmp_path: Path, lacking: str):
    manifest, out = study(tmp_path), tmp_path / "production"
    promoted(manifest, "wide", out)
    (out / lacking).unlink()
    assert list(promoted(manifest, "wide", out).files) == [str(out / lacking)]
    assert config.load(str(out / "best.py"))


def test_a_name_that_is_taken_by_another_config_is_refused(tmp_path: Path):
    manifest, out = study(tmp_path), tmp_path / "production"
    promoted(manifest, "wide", out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    for mode in ("write", "dry run"):
        with pytest.raises(
            UserError, match=r"best\.json: is another promotion of that name; give another --name"
        ):
            promoted(manifest, "wide_noisy", out, mode=mode)
    (out / "best.py").write_text("import os\n")
    with pytest.raises(UserError, match=r"best\.py: is another promotion"):
        promoted(manifest, "wide", out)
    before[out / "best.py"] = b"import os\n"
    assert before == {path: path.read_bytes() for path in out.iterdir()}


# ---------------------------------------------------------------------------------------------- gates


def test_a_hypothesis_that_is_not_supported_closes_the_gate(tmp_path: Path):
    refused(
        study(tmp_path / "1", {}),
        "wide",
        tmp_path / "p",
        "arm 'wide' is not promoted",
        "wide_better: inconclusive",
    )
    worse = study(tmp_path / "2", {"wide": 0.4, "wide_noisy": 0.4})
    refused(worse, "wide", tmp_path / "p", "wide_better: refuted")


def test_an_arm_that_lost_a_seed_is_refused_by_name(tmp_path: Path):
    refused(study(tmp_path / "1", lost={"wide": (3,)}), "wide", tmp_path / "p",
            "seeds: 4 of 5 are done (seed 3 is diverged)")  # fmt: skip


def test_an_arm_with_a_run_missing_is_refused(tmp_path: Path):
    manifest = study(tmp_path)
    run = next(run for run in manifest.runs if (run.arm, run.seed) == ("wide", 4))
    manifest.run_dir(run).attempts.unlink()
    refused(manifest, "wide", tmp_path / "p", "4 of 5 are done (seed 4 is pending)")


def test_a_run_that_finished_without_the_response_is_no_evidence(tmp_path: Path):
    manifest = study(tmp_path)
    run = next(run for run in manifest.runs if (run.arm, run.seed) == ("wide", 4))
    write_run(manifest, run, metrics={"val/score": 1.0})
    refused(manifest, "wide", tmp_path / "p", "some have no value of loss")


def test_a_plan_that_was_amended_or_never_locked_closes_the_gate(tmp_path: Path):
    manifest = study(tmp_path)
    refused(
        dataclasses.replace(manifest, locked=None), "wide", tmp_path / "p", "plan: the plan was never locked"
    )
    easier = dataclasses.replace(WIDE_BETTER, text="new words", primary=False)
    amended = freeze(toy_study(tmp_path, seeds=SEEDS, hypotheses=(easier,)))
    refused(
        amended,
        "wide",
        tmp_path / "p",
        "plan: amended at ",
        "hypotheses[0].primary",
        thresholds={"loss": 5.0},
    )


def test_an_interim_look_closes_the_gate_of_a_factor(tmp_path: Path):
    """The arm itself is complete; an arm that its factor's effect rests on too is not."""
    factor = Hypothesis("wide_helps", "superiority", factor="wide")
    manifest = study(tmp_path, hypotheses=(factor,))
    promoted(manifest, "wide", tmp_path / "whole")
    late = next(run for run in manifest.runs if (run.arm, run.seed) == ("noisy", 4))
    write_run(manifest, late, "oom")
    refused(manifest, "wide", tmp_path / "p", "wide_helps: an interim look: supported on 4 of 5 seeds")


def test_runs_that_began_before_the_lock_close_the_gate(tmp_path: Path):
    manifest = dataclasses.replace(study(tmp_path), locked="2101-01-01T00:00:00.000+00:00")
    refused(manifest, "wide", tmp_path / "p", "wide_better: exploratory")


def test_every_closed_gate_is_named(tmp_path: Path):
    manifest = study(tmp_path, {}, lost={"wide": (0, 1)})
    says = ("seeds: 3 of 5", "wide_better:", "threshold loss: mean 1.1", "at most 0.5")
    refused(manifest, "wide", tmp_path / "p", *says, thresholds={"loss": 0.5})


def test_thresholds_follow_the_responses_direction(tmp_path: Path):
    manifest = study(tmp_path)  # of wide: loss 0.7, score 0.3
    promoted(manifest, "wide", tmp_path / "1", thresholds={"loss": 0.75, "score": 0.25})
    refused(
        manifest, "wide", tmp_path / "2", "threshold loss: mean 0.7", "at most 0.6", thresholds={"loss": 0.6}
    )
    refused(
        manifest,
        "wide",
        tmp_path / "2",
        "threshold score: mean 0.3",
        "at least 0.4",
        thresholds={"score": 0.4},
    )
    refused(
        manifest, "wide", tmp_path / "2", "--threshold=loss=low: must be a number", thresholds={"loss": "low"}
    )
    refused(manifest, "wide", tmp_path / "2", "no response 'los'; did you mean 'loss'", thresholds={"los": 1})


def test_an_arm_that_no_primary_hypothesis_is_about_needs_a_gate_of_its_own(tmp_path: Path):
    manifest = study(tmp_path, hypotheses=(WIDE_BETTER, NOISY_EQUAL, NOISY_BETTER))
    refused(manifest, "noisy", tmp_path / "p", "evidence: no primary hypothesis is about it; give --gate")
    refused(manifest, "baseline", tmp_path / "p", "evidence:")
    refused(manifest, "noisy", tmp_path / "p", "noisy_better: inconclusive", gates=["noisy_better"])
    found = promoted(manifest, "noisy", tmp_path / "p", gates=["noisy_equal"])
    assert [gate.name for gate in found.gates] == ["plan", "seeds", "noisy_equal"]


def test_a_gate_about_another_arm_is_no_gate(tmp_path: Path):
    manifest = study(tmp_path, hypotheses=(WIDE_BETTER, NOISY_EQUAL))
    refused(
        manifest,
        "noisy",
        tmp_path / "p",
        "--gate=wide_better: is not about arm 'noisy'",
        gates=["wide_better"],
    )
    refused(manifest, "noisy", tmp_path / "p", "did you mean 'noisy_equal'?", gates=["noisy_eqal"])


def test_a_further_gate_does_not_open_the_primary_ones(tmp_path: Path):
    manifest = study(
        tmp_path,
        {},
        hypotheses=(WIDE_BETTER, Hypothesis("w", "equivalence", "wide", margin=0.1, primary=False)),
    )
    refused(manifest, "wide", tmp_path / "p", "wide_better: inconclusive", gates=["w"])


# ---------------------------------------------------------------------------------- the leaderboard


def test_a_promotion_is_entered_in_the_leaderboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    manifest, board = study(tmp_path), tmp_path / "board"
    argv = ["promote", str(manifest.path), "--arm=wide", "--name=best", f"--update-leaderboard={board}"]
    argv += [f"--production-dir={tmp_path / 'production'}"]
    assert cli.main([*argv, "--dry-run"]) == 0
    assert not board.exists()
    capsys.readouterr()
    assert cli.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["leaderboard"]["added"] == 4
    with (board / "leaderboard.csv").open(newline="") as file:
        rows = {row["arm"]: row["extra:promoted"] for row in csv.DictReader(file)}
    assert rows == {"baseline": "", "noisy": "", "wide": "best", "wide_noisy": ""}
    assert cli.main(argv) == 0
    assert "0 new rows" in capsys.readouterr().out


def test_what_is_not_promoted_enters_no_leaderboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    manifest, board = study(tmp_path, lost={"wide": (1,)}), tmp_path / "board"
    argv = ["promote", str(manifest.path), "--arm=wide", f"--update-leaderboard={board}"]
    assert cli.main([*argv, f"--production-dir={tmp_path / 'production'}"]) == 2
    assert "seeds: 4 of 5 are done (seed 1 is diverged)" in capsys.readouterr().err
    assert not board.exists()


# ------------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_one_line(tmp_path: Path):
    manifest, out = study(tmp_path), tmp_path / "p"
    refused(manifest, "wyde", out, "no arm 'wyde'; did you mean 'wide'?")
    for name in ("../best", "a b", "", "best.promotion"):
        refused(manifest, "wide", out, f"--name={name}: letters", name=name)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        promoted(manifest, "wide", tmp_path / "file" / "p")


def test_a_table_has_nothing_to_promote(tmp_path: Path):
    file = tmp_path / "t.csv"
    file.write_text(
        "arm,seed,loss\n" + "".join(f"{arm},{seed},{seed}\n" for arm in "ab" for seed in range(3))
    )
    found = from_csv(file, directions={"loss": "min"})
    with pytest.raises(UserError, match="a table has no configs to promote"):
        promote(found, analyse(found), "b", name="n", production_dir=tmp_path / "p")


@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff"])
def test_a_frozen_config_that_is_damaged_is_one_line(tmp_path: Path, content: bytes | None):
    out = tmp_path / "production"
    promoted(study(tmp_path), "wide", out)
    (out / "best.json").unlink()
    if content is not None:
        (out / "best.json").write_bytes(content)
    with pytest.raises(UserError, match=r"best\.json: .*restore the file"):
        config.load(str(out / "best.py"))


def test_a_frozen_config_keeps_tuples_and_takes_the_default_host(tmp_path: Path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"model": {"patch": [1, 2]}, "seeds": [0, 1]}))
    loaded = frozen_config(file)
    assert (loaded.model.patch, loaded.seeds) == ((1, 2), (0, 1))
    assert loaded.host.workdir == "runs"
