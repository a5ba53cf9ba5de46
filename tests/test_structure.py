"""Mappings become dataclasses strictly, or one line says which field is wrong and how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxablate.errors import UserError
from jaxablate.structure import convert, from_mapping


@dataclass(frozen=True)
class Inner:
    rate: float
    mode: Literal["fast", "slow"] = "fast"


@dataclass(frozen=True)
class Outer:
    name: str
    count: int
    inner: Inner
    sizes: tuple[int, ...] = ()
    pair: tuple[int, float] = (0, 0.0)
    maybe: float | None = None
    levels: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    inners: tuple[Inner, ...] = ()
    open: Any = None


GOOD = {
    "name": "a",
    "count": 3,
    "inner": {"rate": 1, "mode": "slow"},
    "sizes": [1, 2],
    "pair": [1, 2],
    "maybe": None,
    "levels": {"off": {}, "on": {"x": [1]}},
    "inners": [{"rate": 0.5, "mode": "fast"}],
    "open": {"any": "thing"},
}


def test_a_mapping_becomes_the_dataclass_it_describes():
    made = from_mapping(Outer, GOOD, "config.")
    assert made == Outer(
        "a", 3, Inner(1.0, "slow"), (1, 2), (1, 2.0), None, GOOD["levels"], (Inner(0.5),), GOOD["open"]
    )
    assert type(made.inner.rate) is float  # an int where a float is meant
    assert type(made.pair[1]) is float
    assert from_mapping(Outer, {**GOOD, "maybe": 2}, "").maybe == 2.0


@pytest.mark.parametrize(
    "change, says",
    [
        ({"nme": "a"}, "config.nme: no such field; did you mean 'name'?"),
        ({"name": 3}, "config.name=3: must be str"),
        ({"name": None}, "config.name=None: must be str"),
        ({"count": "3"}, "config.count='3': must be int"),
        ({"count": 3.0}, "config.count=3.0: must be int"),
        ({"count": True}, "config.count=True: must be int"),
        ({"inner": 3}, "config.inner=3: is a section"),
        ({"inner": {"rate": 1.0}}, "config.inner.mode: missing"),
        ({"inner": {"rate": True, "mode": "fast"}}, "config.inner.rate=True: must be float"),
        ({"inner": {"rate": math.nan, "mode": "fast"}}, "config.inner.rate=nan: must be finite"),
        ({"inner": {"rate": 1.0, "mode": "fsat"}}, "config.inner.mode='fsat': did you mean 'fast'?"),
        ({"inner": {"rate": 1.0, "mode": ["fast"]}}, "config.inner.mode=['fast']: "),
        ({"sizes": 3}, "config.sizes=3: must be a tuple"),
        ({"sizes": "12"}, "config.sizes='12': must be a tuple"),
        ({"sizes": [1, "2"]}, "config.sizes[1]='2': must be int"),
        ({"pair": [1]}, "config.pair=[1]: must have 2 values"),
        ({"maybe": "1"}, "config.maybe='1': must be float"),
        ({"levels": [1]}, "config.levels=[1]: must be a mapping"),
        ({"levels": {"on": 3}}, "config.levels.on=3: must be a mapping"),
        ({"inners": [{"rate": "x", "mode": "fast"}]}, "config.inners[0].rate='x': must be float"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(change, says):
    with pytest.raises(UserError) as raised:
        from_mapping(Outer, {**GOOD, **change}, "config.")
    assert str(raised.value).startswith(says)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", sorted(GOOD))
def test_every_field_must_be_given_even_one_with_a_default(name):
    values = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(UserError, match=f"config.{name}: missing"):
        from_mapping(Outer, values, "config.")


def test_open_fields_take_the_type_that_is_handed_in():
    made = from_mapping(Outer, {**GOOD, "open": {"rate": 2, "mode": "slow"}}, "", {"open": Inner})
    assert made.open == Inner(2.0, "slow")
    with pytest.raises(UserError, match=r"open\.rate"):
        from_mapping(Outer, {**GOOD, "open": {"rate": "2", "mode": "slow"}}, "", {"open": Inner})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KINDS = (
    int,
    float,
    str,
    tuple[int, ...],
    tuple[int, float],
    float | None,
    Literal["a", "b"],
    Inner,
    dict[str, int],
)


@given(json_values, st.sampled_from(KINDS))
def test_any_json_is_taken_or_refused_in_one_line(value, kind):
    message = "path: taken"
    try:
        convert(kind, value, "path")
    except UserError as error:
        message = str(error)
    assert message.startswith("path")
    assert "\n" not in message
