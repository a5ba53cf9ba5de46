"""The picture of a plan: a bar for each cohort, none over another, and the same file for the same plan."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from jaxablate.analysis import plots
from jaxablate.errors import UserError
from jaxablate.schedule.plan import gantt
from jaxablate.schedule.plan.packing import Item
from jaxablate.schedule.plan.plan import ArmPlan, Plan
from tests.schedule.plan.made_estimates import made_plan


def drawn(plan: Plan) -> Plan:
    """With a row for each arm, which have their colours from those."""
    arms = tuple(ArmPlan(e.arm, 1, 1, 1) for e in plan.elements)
    return dataclasses.replace(plan, arms=arms, request=dataclasses.replace(plan.request, deadline=3.0))


@pytest.fixture
def figures(monkeypatch):
    """The figures that are made, to look into."""
    made = []
    real = plots.new_figure
    monkeypatch.setattr(plots, "new_figure", lambda *size: made.append(real(*size)) or made[-1])
    return made


def test_bars_lie_at_their_hours_and_are_labelled(figures):
    plan = drawn(made_plan([Item("a", 2.0), Item("b", 1.5), Item("c", 2.5)], 2))
    assert gantt.gantt(plan).startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    bars = {(round(p.get_x(), 6), round(p.get_width(), 6)) for p in axes.patches}
    assert bars == {(e.start, e.hours) for e in plan.elements}
    texts = [text.get_text() for text in axes.texts]
    assert {"a\nseed 0", "b\nseed 0", "c\nseed 0", "deadline 3.0 h: missed"} == set(texts)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["GPU 0", "GPU 1"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [e.arm for e in plan.elements]


def test_a_label_that_has_no_room_is_left_out(figures):
    gantt.gantt(drawn(made_plan([Item("a_name_that_is_long", 0.01), Item("b", 5.0)], 1)))
    texts = [text.get_text() for text in figures[0].axes[0].texts]
    assert not any("a_name" in text for text in texts)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_overlaps_in_a_lane(seed):
    rng = random.Random(seed)
    items = [Item(f"i{n}", rng.uniform(0.1, 3), 5, rng.choice([0.2, 0.5, 1.0])) for n in range(12)]
    plan = made_plan(items, 2)
    lanes = gantt.lanes(plan.elements)
    assert sum(map(len, lanes.values())) == len(items)
    for (gpu, _), row in lanes.items():
        assert {e.gpu for e in row} == {gpu}
        assert all((a.end or 0) <= (b.start or 0) * (1 + 1e-9) for a, b in itertools.pairwise(row))


def test_alone_a_gpu_has_one_lane():
    plan = made_plan([Item(f"i{n}", 1.0) for n in range(9)], 3)
    assert list(gantt.lanes(plan.elements)) == [(0, 0), (1, 0), (2, 0)]


def test_a_plan_is_drawn_the_same_every_time_and_signs_are_no_formulas():
    plan = drawn(made_plan([Item("a$b$", 2.0), Item("c_{d}", 1.0)], 1))
    assert gantt.gantt(plan) == gantt.gantt(plan)


def test_more_arms_than_colours_are_grey_together(figures):
    gantt.gantt(drawn(made_plan([Item(f"i{n:02}", 1.0) for n in range(12)], 2)))
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels[-1] == "other arms"
    assert len(labels) == len(plots.PALETTE) + 1


def test_what_has_no_places_is_not_drawn():
    plan = dataclasses.replace(made_plan([Item("a", 1.0)], 1), elements=(), notes=("hours are unknown",))
    with pytest.raises(UserError, match="no cohort has a place to be drawn: hours are unknown"):
        gantt.gantt(plan)
