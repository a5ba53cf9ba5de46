"""Plans of toy studies from made-up estimates: what they hold, what they say, and what they drop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxablate.errors import UserError
from jaxablate.manifest import Manifest
from jaxablate.schedule import local
from jaxablate.schedule.plan.estimates import Cohort
from jaxablate.schedule.plan.make import make
from jaxablate.schedule.plan.plan import FORMAT, Plan, Request, SeedsNeeded
from jaxablate.schedule.plan.table import table
from jaxablate.schedule.plan.work import Remaining
from jaxablate.schedule.survey import Selection
from jaxablate.study import Study, factorial, switch
from tests.schedule.plan.made_estimates import GB, Made
from tests.schedule.toy_studies import LOSS, WIDE, base, tuned

NOISY = switch("noisy", "model", {"model.noise": 0.1})
STAGES = {"pretrain": 300, "finetune": 100}
MakePlan = Callable[..., Plan]


def four_arms(workdir: str, seeds: Sequence[int] = (0, 1, 2, 3)) -> Study:
    factors = (WIDE, NOISY)
    return Study("toy", factors, factorial(factors), tuple(seeds), (LOSS,), base(workdir))


@pytest.fixture
def plan_of(tmp_path: Path) -> MakePlan:
    """`plan_of(four_arms, gpus=2)`: a plan; `made` answers for the estimates, `needed` for the hypotheses."""

    def plan(
        study: Callable[[str], Study], made: Made | None = None, needed: Any = None, **asked: Any
    ) -> Plan:
        declared = study(str(tmp_path))
        selection = Selection.of(declared, "", (), asked.pop("only", ()), "all")
        work = Remaining.of(declared, local.resolve(declared), selection)
        fields = {"target": "h200", "gpus": 1, **asked}
        seeds = tuple(sorted(selection.seeds))
        request = Request(work.digest, work.arms, seeds, **fields)
        return make(work, request, made or Made(), **({"needed": needed} if needed else {}))

    return plan


def test_a_plan_has_the_cohorts_that_run_forms_and_sums_them_up(plan_of):
    plan = plan_of(four_arms, gpus=2, rate=3.0)
    assert [(e.arm, e.seeds) for e in sorted(plan.elements, key=lambda e: e.name)] == [
        (arm, (0, 1, 2, 3)) for arm in ("baseline", "noisy", "wide", "wide_noisy")
    ]
    assert (plan.runs, plan.hours, plan.cost, plan.longest) == (16, 16.0, 48.0, 4.0)
    assert (plan.makespan, plan.bound) == (8.0, 8.0)
    assert {(e.gpu, e.start) for e in plan.elements} == {(0, 0.0), (1, 0.0), (0, 4.0), (1, 4.0)}


def test_a_plan_says_what_it_is_in_a_table(plan_of):
    text = table(plan_of(four_arms, gpus=2, rate=3.0, deadline=9.0), "full", 160)
    assert "23.43 M" in text
    assert "finished after 8.0 h on 2 GPUs" in text
    assert "the deadline of 9.0 h is met, with 1.0 h to spare" in text
    assert "wide_noisy, seeds 0,1,2,3" in text
    assert "all runs of the arm in one program" in text
    assert max(map(len, text.splitlines())) <= 160


def test_the_tuning_comes_before_what_it_chooses_for(plan_of):
    plan = plan_of(tuned, gpus=2)
    ends = {e.name: e.end for e in plan.elements}
    assert {e.phase for e in plan.elements} == {"tuning", "confirm"}
    for element in plan.elements:
        assert element.after == ((f"{element.arm}/tuning/1",) if element.phase == "confirm" else ())
        assert all(element.start >= ends[name] for name in element.after)
        assert element.rates == ((0.0005, 0.002) if element.phase == "tuning" else ())
    assert any("edge of the grid adds up to 2 tuning runs" in note for note in plan.notes)


def test_the_stages_of_a_cohort_are_one_chain_on_one_gpu(plan_of):
    plan = plan_of(four_arms, Made(baseline={"stages": STAGES}, wide={"stages": STAGES}), gpus=4)
    for arm in ("baseline", "wide"):
        first, second = (e for e in plan.elements if e.arm == arm)
        assert (first.stage, second.stage) == ("pretrain", "finetune")
        assert second.after == (first.name,)
        assert (first.gpu, first.end) == (second.gpu, second.start)
        assert (first.hours, second.hours) == (3.0, 1.0)


def test_the_stages_of_a_cohort_are_apart_where_all_is_done_earlier_for_it(plan_of):
    """Whole, four cohorts of four hours take eight on three GPUs."""
    plan = plan_of(four_arms, Made(baseline={"stages": STAGES}, wide={"stages": STAGES}), gpus=3)
    assert plan.makespan == pytest.approx(7.0)
    by_arm = {arm: [e for e in plan.elements if e.arm == arm] for arm in ("baseline", "wide")}
    assert all(second.start >= first.end for first, second in by_arm.values())
    assert any(first.gpu != second.gpu for first, second in by_arm.values())
    assert all(second.after == (first.name,) for first, second in by_arm.values())


def test_cohorts_are_halved_until_they_fit(plan_of):
    plan = plan_of(four_arms, Made(wide={"peak": 30 * GB}), gpus=1)
    assert [e.members for e in plan.elements if e.arm == "wide"] == [2, 2]
    assert [e.members for e in plan.elements if e.arm == "baseline"] == [4]
    wide = next(arm for arm in plan.arms if arm.arm == "wide")
    assert wide.fits
    assert "cohorts of 2: 4 members take 120 GB of 80 GB" in wide.choices


def test_a_micro_batch_that_does_not_fit_is_split(plan_of):
    plan = plan_of(four_arms, Made(wide={"peak": 100 * GB, "largest": 10}), gpus=1)
    assert {e.split for e in plan.elements if e.arm == "wide"} == {4}
    wide = next(arm for arm in plan.arms if arm.arm == "wide")
    assert not wide.fits
    assert "micro-batches split by 4: 32 examples do not fit, 10 do" in wide.choices
    row = next(line for line in table(plan, width=160).splitlines() if line.split()[:1] == ["wide"])
    assert row.split()[-5:] == ["10", "4", "4", "4.00", "1.00"]
    assert "OOM" in row


def test_an_arm_that_does_not_fit_at_all_is_a_problem_and_no_part_of_the_schedule(plan_of):
    plan = plan_of(four_arms, Made(wide={"peak": 100 * GB, "largest": None}), gpus=1)
    assert "wide" not in {e.arm for e in plan.elements}
    assert (
        next(arm.problem for arm in plan.arms if arm.arm == "wide") == "does not fit: takes 100 GB of 80 GB"
    )
    assert plan.hours is None
    assert "left out of the totals: wide" in plan.notes


def test_unknown_hours_stay_unknown(plan_of):
    plan = plan_of(four_arms, Made(**{arm: {"hours": None} for arm in ("baseline", "wide", "noisy", "wide_noisy")}),
                   gpus=2, deadline=1.0, rate=2.0)  # fmt: skip
    assert (plan.hours, plan.cost, plan.makespan, plan.elements, plan.dropped) == (None, None, None, (), ())
    assert any("hours are unknown" in note for note in plan.notes)
    assert "?" in table(plan)


def test_a_cohort_that_smaller_micro_batches_do_not_help_is_a_problem(plan_of):
    """Such as an evaluation that is larger than a step."""
    plan = plan_of(four_arms, Made(wide={"peak": 100 * GB, "largest": 64}), gpus=1)
    assert {e.arm for e in plan.elements} == {"baseline", "noisy", "wide_noisy"}
    problems = {arm.arm: arm.problem for arm in plan.arms if arm.problem}
    assert problems == {"wide": "does not fit: takes 100 GB of 80 GB"}
    assert plan.warnings == (
        "the plan has no place for these, which are trained last: wide: does not fit: takes 100 GB of 80 GB",
    )


def test_what_does_not_fit_beside_another_on_a_cpu_says_that_one_process_has_more(plan_of):
    plan = plan_of(four_arms, Made(wide={"peak": 100 * GB, "largest": 64}), gpus=2, target="cpu")
    (wide,) = (arm for arm in plan.arms if arm.problem)
    assert wide.problem == (
        "does not fit: takes 100 GB of 80 GB, which is what each of 2 processes has; give --gpus=1"
    )
    alone = plan_of(four_arms, Made(wide={"peak": 100 * GB, "largest": 64}), gpus=1, target="cpu")
    assert "--gpus" not in "".join(arm.problem for arm in alone.arms)


def test_what_is_placed_fits_by_its_estimate_unless_it_is_split(plan_of):
    plan = plan_of(four_arms, Made(wide={"peak": 30 * GB}, noisy={"peak": 90 * GB, "largest": 16}), gpus=1)
    held = {e.arm: e.memory for e in plan.elements}
    assert held == {"baseline": 40 * GB, "wide": 60 * GB, "noisy": 80 * GB, "wide_noisy": 40 * GB}


def test_an_arm_that_takes_several_gpus_is_priced_and_not_placed(plan_of):
    plan = plan_of(four_arms, Made(wide={"devices": 4}), gpus=4, rate=2.0)
    wide, *others = sorted(plan.arms, key=lambda arm: arm.arm != "wide")
    assert wide.problem.startswith(
        "host.mesh lays a cohort over 4 devices at once, and a plan gives it one: set "
    )
    assert "--config.host.mesh.data=1" in wide.problem
    assert (wide.hours, wide.cost, wide.longest) == (16.0, 32.0, 4.0)
    assert "wide" not in {e.arm for e in plan.elements}
    assert "in the totals, but not in the schedule: wide" in plan.notes
    assert plan.hours == wide.hours + sum(arm.hours for arm in others)


# ------------------------------------------------------------------------------------ the price of a seed


def finish(study: Study, seeds: Sequence[int]) -> None:
    """Gives the runs of these seeds their outcome, of every arm."""
    manifest = Manifest.freeze(study, local.resolve(study))
    for run in manifest.runs:
        if run.seed in seeds:
            where = manifest.run_dir(run)
            where.create(manifest.config_of(run))
            where.end_attempt(where.begin_attempt(step=0), "done", "")


class Prices:
    """What a plan tells of the price of a seed; two more are needed, or none."""

    def __init__(self, more: int = 2):
        self.more, self.told = more, list[float | None]()

    def __call__(self, seeds: int, hours: float | None) -> list[SeedsNeeded]:
        self.told.append(hours)
        return [SeedsNeeded("h", 0.8, seeds + self.more, self.more, None, None, "pilot")]


@pytest.mark.parametrize("ended", [(), (0,), (0, 1, 2), (0, 1, 2, 3)])
def test_the_price_of_a_seed_does_not_depend_on_what_has_run(plan_of, tmp_path, ended):
    finish(four_arms(str(tmp_path)), ended)
    made, prices = Made(wide={"hours": 3.0}), Prices()
    plan = plan_of(four_arms, made, prices, gpus=1)
    assert plan.runs == 4 * (4 - len(ended))
    assert prices.told[-1] == 6.0  # hours of a seed of four arms
    assert len({cohort.arm for cohort in made.asked}) == len(made.asked) == 4


def test_of_what_has_ended_nothing_is_estimated_that_nobody_asks_for(plan_of, tmp_path):
    finish(four_arms(str(tmp_path)), (0, 1, 2, 3))
    made = Made()
    plan_of(four_arms, made, Prices(more=0), gpus=1)
    plan_of(four_arms, made, gpus=1)
    assert made.asked == []
    untimed = Made(**{arm: {"hours": None} for arm in ("baseline", "wide", "noisy", "wide_noisy")})
    prices = Prices()
    plan_of(four_arms, untimed, prices, gpus=1)
    assert (prices.told[-1], len(untimed.asked)) == (None, 1)  # no hours: the others need not be compiled


# ----------------------------------------------------------------------------------------- deadlines


def test_a_deadline_drops_whole_seeds_the_last_ones_first(plan_of):
    plan = plan_of(four_arms, gpus=2, deadline=6.0)
    assert (plan.seeds, plan.dropped, plan.makespan, plan.short) == ((0, 1, 2), (3,), 6.0, "")
    assert {e.seeds for e in plan.elements} == {(0, 1, 2)}
    assert len({e.arm for e in plan.elements}) == 4  # balanced: every arm keeps the same ones
    assert "seed 3 of every arm is dropped; seeds 0,1,2 are kept" in table(plan)


def test_a_deadline_that_is_long_enough_drops_nothing(plan_of):
    plan = plan_of(four_arms, gpus=2, deadline=8.0)
    assert (plan.dropped, plan.short) == ((), "")


def test_a_deadline_that_cannot_be_met_says_by_how_much(plan_of):
    plan = plan_of(four_arms, gpus=2, deadline=2.5)
    assert (plan.seeds, plan.dropped) == ((0, 1), (2, 3))
    assert plan.short == (
        "2 seeds on 2 GPUs take 4.0 h, 1.5 h more than the deadline of 2.5 h: give --deadline=4h, or --gpus=4"
    )


def test_on_a_cpu_more_processes_are_no_advice(plan_of):
    plan = plan_of(four_arms, gpus=2, deadline=2.5, target="cpu")
    assert plan.short == (
        "2 seeds on 2 processes take 4.0 h, 1.5 h more than the deadline of 2.5 h: give --deadline=4h"
    )


def test_where_no_number_of_gpus_helps_that_is_said(plan_of):
    assert plan_of(four_arms, gpus=2, deadline=0.5).short.endswith(
        "and no number of GPUs is enough: give --deadline=4h"
    )


def test_seeds_that_the_hypotheses_need_are_kept(plan_of):
    def needed(seeds: int, hours: float | None) -> list[SeedsNeeded]:
        return [SeedsNeeded("h", 0.8, 3, 0, None, None, "pilot")]

    plan = plan_of(four_arms, needed=needed, gpus=2, deadline=2.5)
    assert plan.seeds == (0, 1, 2)


def test_what_one_more_seed_takes_is_told(plan_of):
    asked = []
    plan_of(four_arms, needed=lambda seeds, hours: asked.append((seeds, hours)) or (), gpus=2)
    assert asked[-1] == (4, 4.0)  # a seed of four arms


def test_the_smaller_cohorts_are_estimated_anew(plan_of):
    made = Made()
    plan_of(four_arms, made, gpus=2, deadline=6.0)
    assert {c.members for c in made.asked} == {4, 3}
    assert len(set(made.asked)) == len(made.asked)


def test_shares_put_small_cohorts_beside_each_other(plan_of):
    plan = plan_of(four_arms, gpus=1, share=0.5, rate=3.0)
    assert plan.makespan == 8.0  # of 16 alone
    assert (plan.hours, plan.cost, plan.longest) == (8.0, 24.0, 4.0)  # one GPU for as long
    starts = [(e.start, e.gpu) for e in plan.elements]
    assert len(starts) - len(set(starts)) == 2
    alone = plan_of(four_arms, Made(**{a: {"peak": 15 * GB} for a in ("baseline", "wide", "noisy", "wide_noisy")}),
                    gpus=1, share=0.5)  # fmt: skip
    assert alone.makespan == alone.hours == 16.0  # 60 GB each, of 80


# ------------------------------------------------------------------------------------------ keeping it


def test_a_plan_is_kept_and_read_back(plan_of, tmp_path):
    plan = plan_of(tuned, gpus=2, rate=1.0, deadline=100.0)
    path = plan.save(tmp_path / "out")
    assert Plan.load(tmp_path / "out") == plan
    assert json.loads(path.read_text()) == json.loads(json.dumps(plan.to_dict()))
    assert Plan.load(tmp_path) is None


@pytest.mark.parametrize("text", ["{", "[]", f'{{"format": {FORMAT}}}'])
def test_a_damaged_plan_is_one_line(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match=r"plan\.json"):
        Plan.load(tmp_path)


def test_a_plan_of_another_version_is_none(tmp_path):
    (tmp_path / "plan.json").write_text('{"format": 0}')
    assert Plan.load(tmp_path) is None


def test_a_plan_serves_the_same_request_alone(plan_of):
    request = plan_of(four_arms, gpus=2, deadline=6.0).request
    assert request.serves(dataclasses.replace(request, rate=2.0, share=0.5, target="NVIDIA H200"))
    for other in ({"gpus": 3}, {"deadline": 7.0}, {"seeds": (0,)}, {"study": "x"}, {"max_members": 1}):
        assert not request.serves(dataclasses.replace(request, **other))


def test_estimates_that_fail_are_problems(plan_of):
    plan = plan_of(four_arms, Made(wide="config.model.width=-1: must be positive"))
    assert [arm.problem for arm in plan.arms if arm.arm == "wide"] == [
        "config.model.width=-1: must be positive"
    ]
    assert "problem: wide: config.model.width=-1: must be positive" in table(plan)


def test_sizes_that_were_not_asked_for_are_told_from_their_neighbours(plan_of):
    made = Made()
    plan = plan_of(lambda workdir: four_arms(workdir, range(5)), made, gpus=1, max_members=2)
    assert set(made.asked) == {Cohort(a, 2) for a in ("baseline", "wide", "noisy", "wide_noisy")}
    assert [e.hours for e in plan.elements if e.arm == "wide"] == [2.0, 2.0, 1.0]
