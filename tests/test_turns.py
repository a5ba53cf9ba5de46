"""Members in turn: as by themselves, in place, and those that rest cost nothing and stay what they are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate import turns

SIZE = 50_000  # values of a member's array, which is most of the memory


def step(state: Any, x: jax.Array, rate: jax.Array) -> tuple[Any, Any]:
    """Two arrays that each change by what the other was, which is what tempts XLA to copy them; `kept` stays."""
    a, b = state["a"], state["b"]
    new = {"a": a - rate * b * x, "b": jnp.sqrt(b * b + a * x), "kept": state["kept"]}
    return new, {"sum": jnp.sum(a), "count": jnp.int32(1)}


def states(members: int) -> dict[str, jax.Array]:
    drawn = np.random.default_rng(0).uniform(1, 2, (3, members, SIZE)).astype(np.float32)
    return dict(zip(("a", "b", "kept"), map(jnp.asarray, drawn), strict=True))


@pytest.mark.parametrize("which", [(True, True, True), (False, True, False), (False, False, False)])
def test_those_named_change_as_alone_and_the_others_stay(which: tuple[bool, ...]) -> None:
    before, x = states(3), jnp.asarray([0.5, 0.25, 0.125])
    of_them = jax.jit(turns.changing_some(step, own=2))
    after, found = of_them(np.array(which), before, x, jnp.float32(0.1))
    alone = jax.jit(step)
    for m, named in enumerate(which):
        own = {key: value[m] for key, value in before.items()}
        new, besides = alone(own, x[m], jnp.float32(0.1)) if named else (own, {"sum": 0.0, "count": 0})
        for key, value in new.items():
            np.testing.assert_array_equal(after[key][m], value)
        assert (float(found["sum"][m]), int(found["count"][m])) == (besides["sum"], besides["count"])


def test_the_states_are_held_once() -> None:
    """A loop that takes the states and gives others holds them twice: the negative control."""
    rate, members = jnp.float32(0.1), 12
    before, x, which = states(members), jnp.ones(members), np.ones(members, bool)

    def room(f: Any, *args: Any) -> float:
        """What a program needs besides what it is given, in arrays of a member."""
        compiled = jax.jit(f, donate_argnums=len(args) - 3).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * SIZE)

    assert room(turns.changing_some(step, own=2), which, before, x, rate) < 4
    assert room(turns.in_turn(step, 2, members), before, x, rate) > members


def test_outputs_of_those_who_are_not_asked_are_zeros() -> None:
    x = jnp.arange(6.0).reshape(3, 2)
    found = turns.of_some(lambda row, k: {"y": row * k}, own=1)(np.array([True, False, True]), x, 2.0)
    np.testing.assert_array_equal(found["y"], [[0, 2], [0, 0], [8, 10]])
