"""The document's one job: its four chains beside a better packing, and a launcher that carries that packing out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest

from jaxablate import config, study
from jaxablate.config import import_task
from jaxablate.errors import UserError
from jaxablate.estimate.facts import Estimate
from jaxablate.manifest import Manifest
from jaxablate.schedule import cohorts, local
from jaxablate.schedule.cohorts import Job
from jaxablate.schedule.plan import follow
from jaxablate.schedule.plan.estimates import Cohort, Problem
from jaxablate.schedule.plan.make import make
from jaxablate.schedule.plan.plan import Plan, Request
from jaxablate.schedule.plan.table import table
from jaxablate.schedule.plan.work import Remaining
from jaxablate.schedule.retries import PENDING, outlook
from jaxablate.schedule.survey import Selection
from jaxablate.study import Arm, Study
from tests.schedule.plan.made_estimates import Made, made
from tests.schedule.toy_studies import LOSS, WIDE, base

GPUS = 4
STEP_S = 3.6  # of every update, so that a thousand of them take an hour
JOBS = "configs/vqa.py:scale=8b,arms=jobs"


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)


def of_the_document(cohorts: Iterable[Cohort]) -> dict[Cohort, Estimate | Problem]:
    """Estimates in which every update of the study takes the same time."""
    declared, found = study.load(JOBS), dict[Cohort, Estimate | Problem]()
    for cohort in cohorts:
        run = config.resolve(declared.config(cohort.arm)).base
        stages = {stage.name: stage.steps for stage in import_task(run.task)(run, "cpu").stages()}
        hours = sum(stages.values()) * STEP_S / 3600
        found[cohort] = made(cohort.arm, cohort.members, hours, stages=stages)
    return found


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        workdir = str(tmp_path_factory.mktemp("runs"))
        declared = study.load(JOBS, [("host.workdir", workdir)])
        selection = Selection.of(declared, "", (), declared.seeds[:1], "all")
        work = Remaining.of(declared, local.resolve(declared), selection)
        asked = Request(work.digest, work.arms, declared.seeds[:1], "h100", GPUS, deadline=6.0)
        return make(work, asked, of_the_document)


def updates(hours: float | None) -> int:
    return round((hours or 0.0) * 3600 / STEP_S)


def test_the_documents_chains_take_a_third_longer_than_the_packing(plan: Plan) -> None:
    assert [(" > ".join(chain.arms), chain.steps, updates(chain.hours)) for chain in plan.chains] == [
        ("exp1_random > exp5_three_pass", 3360, 3360),
        ("exp2_ordered", 1680, 1680),
        ("exp3_stage1 > exp3_stage2", 1680, 1680),
        ("exp4_curriculum", 1680, 1680),
    ]
    assert updates(plan.makespan) == 2520
    assert plan.steps == 2520
    assert not plan.short
    said = " ".join(table(plan, width=200).split())
    assert "finished after 2.5 h on 4 GPUs" in said
    assert (
        "as the document places them, after 3.4 h on 4 GPUs, with 3,360 updates on one instead of 2,520"
        in said
    )
    assert "exp1_random → exp5_three_pass 3.4 h" in said


def test_no_job_is_cut_and_only_the_curriculum_waits(plan: Plan) -> None:
    """Five jobs of at least 1,260 updates on four GPUs: two of them share one, whatever the order."""
    lengths = {element.name: updates(element.hours) for element in plan.elements}
    assert sorted(lengths.values()) == [420, 420, 1260, 1260, 1680, 1680, 1680]
    waiting = {element.name: element.after for element in plan.elements if element.after}
    assert waiting == {"exp4_curriculum/confirm/1/stage_2": ("exp4_curriculum/confirm/1/stage_1",)}
    end = {element.name: element.end or 0.0 for element in plan.elements}
    for element in plan.elements:
        assert all((element.start or 0.0) >= end[name] for name in element.after)
    for gpu in range(GPUS):
        own = [e for e in plan.elements if e.gpu == gpu]
        assert all((b.start or 0.0) >= (a.end or 0.0) - 1e-9 for a, b in itertools.pairwise(own))


def test_a_deadline_that_the_chains_would_miss_is_met_and_a_shorter_one_says_what_helps(plan: Plan) -> None:
    assert updates(max(chain.hours for chain in plan.chains)) > 3000 > updates(plan.makespan)
    declared = study.load(JOBS)
    work = Remaining.of(
        declared, local.resolve(declared), Selection.of(declared, "", (), declared.seeds[:1], "all")
    )
    met, missed = (
        make(work, dataclasses.replace(plan.request, deadline=h), of_the_document) for h in (3.0, 2.0)
    )
    assert not met.short
    assert missed.short.endswith("give --deadline=2.6h, or --gpus=5")


def test_a_chain_of_an_arm_that_there_is_not_is_refused() -> None:
    declared = study.load(JOBS)
    with pytest.raises(UserError, match="study vqa_jobs: no arm 'exp9'"):
        dataclasses.replace(declared, chains=(("exp1_random", "exp9"),))
    # Where they are told makes no difference to how results are read.
    assert dataclasses.replace(declared, chains=()).plan_hash == declared.plan_hash


# ------------------------------------------------------------------------- stages on different GPUs


def two_stages(workdir: Path) -> Study:
    """A run of two stages, which are worth parting, and one of one."""
    config = base(str(workdir), steps=8, eval_every=4)
    config.model.stages = "two"
    return Study("toy", (WIDE,), (Arm("baseline"), Arm("wide", {"wide": "on"})), (0,), (LOSS,), config)


def parted(declared: Study) -> Plan:
    """A plan in which the second stage of the baseline is on another process than the first."""
    selection = Selection.of(declared, "", (), (), "all")
    work = Remaining.of(declared, local.resolve(declared), selection)
    request = Request(work.digest, work.arms, declared.seeds, "cpu", 2)
    stages = {"first": 4, "second": 4}
    made_plan = make(work, request, Made(baseline={"stages": stages}, wide={"stages": stages}))
    elements = tuple(
        dataclasses.replace(e, gpu=1, start=5.0, end=6.0) if (e.arm, e.stage) == ("baseline", "second") else e
        for e in made_plan.elements
    )
    return dataclasses.replace(made_plan, elements=elements)


def test_a_job_gives_up_its_place_at_the_stage_that_the_plan_has_elsewhere(tmp_path: Path) -> None:
    declared = two_stages(tmp_path)
    plan = parted(declared)
    manifest = Manifest.freeze(declared, local.resolve(declared))
    jobs = {run.arm: Job(run.arm, "confirm", (run,)) for run in manifest.runs}
    assert {arm: follow.until(plan, job) for arm, job in jobs.items()} == {"baseline": "first", "wide": ""}
    further = dataclasses.replace(jobs["baseline"], behind="first")
    element = follow.element_of(plan, further)
    assert element is not None
    assert (element.stage, element.gpu) == ("second", 1)
    assert follow.until(plan, further) == ""


def test_a_launcher_brings_parted_stages_to_their_end(tmp_path: Path) -> None:
    declared = two_stages(tmp_path)
    ended = local.run_study(declared, local.RunOptions(plan=parted(declared)))
    assert ended.counts == {"done": 2}
    manifest = Manifest.load(tmp_path / "toy")
    ends = {
        run.arm: [row for row in manifest.run_dir(run).history() if row["state"] != "running"]
        for run in manifest.runs
    }
    said = {arm: [row.get("paused", row["state"]) for row in rows] for arm, rows in ends.items()}
    assert said == {"baseline": ["first", "done"], "wide": ["done"]}


def test_jobs_are_behind_a_stage_only_if_all_their_runs_are(tmp_path: Path) -> None:
    declared = dataclasses.replace(two_stages(tmp_path), seeds=(0, 1))
    runs = [run for run in Manifest.freeze(declared, local.resolve(declared)).runs if run.arm == "wide"]
    paused = outlook([{"attempt": 1, "state": "preempted", "time": "", "paused": "first"}], 8)
    assert paused.behind == "first"
    most = {"confirm": 2, "tuning": 2}
    (together,) = cohorts.plan(runs, dict.fromkeys(runs, paused), most)
    (mixed,) = cohorts.plan(runs, {runs[0]: paused, runs[1]: PENDING}, most)
    assert (together.behind, mixed.behind) == ("first", "")
