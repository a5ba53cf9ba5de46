"""What one member of a cohort does, for all members one after another, as one CPU is fastest with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def in_turn(f: Callable[..., Any], own: int, members: int) -> Callable[..., Any]:
    """`f` of each member; its first `own` arguments are the member's own, and have a member axis here.

    One member's arrays stay in the caches, where all members' side by side do not.
    """

    def of_all(*args: Any) -> Any:
        def one(_: None, mine: tuple[Any, ...]) -> tuple[None, Any]:
            return None, f(*mine, *args[own:])

        return lax.scan(one, None, args[:own], unroll=members == 1)[1]

    return of_all


def of_some(f: Callable[..., Any], own: int) -> Callable[..., Any]:
    """The same for the members that `which`, bool (members,), the first argument, names; the others' are zeros."""

    def of_them(which: jax.Array, *args: Any) -> Any:
        mine, shared = args[:own], args[own:]

        def one(m: jax.Array, found: Any) -> Any:
            return _put(found, f(*_taken(mine, m), *shared), m)

        like = jax.eval_shape(lambda m: f(*_taken(mine, m), *shared), jnp.int32(0))
        return _visit(which, one, _room(like, len(which)))

    return of_them


def changing_some(f: Callable[..., tuple[Any, Any]], own: int) -> Callable[..., tuple[Any, Any]]:
    """The same of a function whose first argument is a state that it returns changed, with something besides.

    The states stay where they are and are changed there: a loop that took them and gave others would hold all of them
    twice. What `f` returns as it got it is not touched, nor is any state of a member that is not named.
    """

    def of_them(which: jax.Array, *args: Any) -> tuple[Any, Any]:
        states, mine, shared = args[0], args[1:own], args[own:]
        changes: list[bool] = []

        def news(m: jax.Array, states: Any) -> tuple[list[jax.Array], Any]:
            before = _taken(states, m)
            after, besides = f(before, *_taken(mine, m), *shared)
            pairs = list(zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True))
            changes[:] = [new is not old for new, old in pairs]
            return [new for new, old in pairs if new is not old], besides

        like = jax.eval_shape(news, jnp.int32(0), states)

        def one(m: jax.Array, carried: tuple[Any, Any]) -> tuple[Any, Any]:
            states, found = carried
            # Always true, which XLA cannot know. Across a branch it fuses nothing: it would otherwise compute one new
            # array from the old ones of all members while it overwrites those, for which it first copies them.
            new, besides = lax.cond(which[m], news, lambda *_: _zeros(like), m, states)
            leaves, tree = jax.tree.flatten(states)
            waiting = iter(new)
            put = [_put_leaf(x, next(waiting), m) if change else x
                   for x, change in zip(leaves, changes, strict=True)]  # fmt: skip
            return jax.tree.unflatten(tree, put), _put(found, besides, m)

        return _visit(which, one, (states, _room(like[1], len(which))))

    return of_them


def _room(like: Any, members: int) -> Any:
    """Zeros for what all members give, who each give what is `like` it."""
    return jax.tree.map(lambda x: jnp.zeros((members, *x.shape), x.dtype), like)


def _zeros(like: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def _visit(which: jax.Array, one: Callable[[jax.Array, Any], Any], carried: Any) -> Any:
    """Does `one` for each member that is named, and takes no time for the others."""
    order = jnp.argsort(~which, stable=True)
    return lax.fori_loop(0, jnp.sum(which), lambda i, carried: one(order[i], carried), carried)


def _taken(tree: Any, m: jax.Array) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, m, 0, keepdims=False), tree)


def _put(tree: Any, of_one: Any, m: jax.Array) -> Any:
    return jax.tree.map(lambda all_of_them, x: _put_leaf(all_of_them, x, m), tree, of_one)


def _put_leaf(all_of_them: jax.Array, x: jax.Array, m: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(all_of_them, x, m, 0)
