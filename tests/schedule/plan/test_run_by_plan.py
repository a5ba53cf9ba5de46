"""`run` with a plan: its seeds alone, its order, and a word on what was left out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.schedule import local
from jaxablate.schedule.plan.make import make
from jaxablate.schedule.plan.plan import Plan, Request
from jaxablate.schedule.plan.work import Remaining
from jaxablate.schedule.survey import Selection
from jaxablate.study import Study, factorial
from tests.schedule.plan.made_estimates import Made
from tests.schedule.toy_studies import LOSS, WIDE, base


def two_arms(workdir: Path) -> Study:
    return Study("toy", (WIDE,), factorial((WIDE,)), (0, 1, 2), (LOSS,), base(str(workdir)))


def planned(study: Study, deadline: float) -> Plan:
    """On one process, `wide` before `baseline`, since it is the longer one."""
    selection = Selection.of(study, "", (), (), "all")
    work = Remaining.of(study, local.resolve(study), selection)
    request = Request(work.digest, work.arms, study.seeds, "cpu", 1, deadline=deadline)
    return make(work, request, Made(wide={"hours": 2.0}))


def test_what_a_plan_drops_is_not_run_and_said(tmp_path, capfd):
    study = two_arms(tmp_path)
    plan = planned(study, deadline=6.5)
    assert plan.dropped == (2,)
    outcome = local.run_study(study, local.RunOptions(plan=plan))
    assert outcome.exit_code == 0
    assert outcome.counts == {"done": 4}
    assert outcome.notes == (
        "seeds left out of every arm for the deadline: 2; without --deadline they are run too",
    )
    manifest = Manifest.load(tmp_path / "toy")
    states = {(run.arm, run.seed): manifest.run_dir(run).state() for run in manifest.runs}
    assert {key for key, state in states.items() if state == "done"} == {
        (a, s) for a in ("baseline", "wide") for s in (0, 1)
    }
    assert {state for (_, seed), state in states.items() if seed == 2} == {"pending"}
    started = [line for line in capfd.readouterr().err.splitlines() if line.startswith("started")]
    assert [line.split()[1] for line in started] == ["wide", "baseline"]  # one process, the longer one first
    assert all("2 members" in line for line in started)


def test_a_dry_run_shows_the_plans_order(tmp_path):
    study = two_arms(tmp_path)
    text = local.dry_run(study, local.RunOptions(plan=planned(study, deadline=6.5)))
    cohorts = [line.split()[0] for line in text.splitlines() if "members" in line]
    assert cohorts == ["wide", "baseline"]
    assert "would train 4 runs in 2 cohorts, 1 at a time" in text


def test_workers_and_a_plan_exclude_each_other(tmp_path):
    plan = planned(two_arms(tmp_path), deadline=100)
    with pytest.raises(UserError, match=r"--workers=2: not allowed with --gpus"):
        local.RunOptions(plan=plan, workers=2)


def test_a_seed_that_has_begun_is_not_dropped(tmp_path):
    study = two_arms(tmp_path)
    before = planned(study, deadline=6.5)
    manifest = Manifest.freeze(study, local.resolve(study))
    done = next(run for run in manifest.runs if (run.arm, run.seed) == ("baseline", 2))
    where = manifest.run_dir(done)
    where.create(manifest.config_of(done))
    where.end_attempt(where.begin_attempt(step=0), "done", "")
    plan = planned(study, deadline=5.0)
    assert plan.dropped == (1,)
    assert "left out, since they have their outcome: 1 run" in plan.notes
    assert plan.request.serves(
        dataclasses.replace(before.request, deadline=5.0)
    )  # the same study, further on
