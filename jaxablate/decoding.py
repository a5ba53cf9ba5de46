"""Text from a model, a token at a time: the prompts fill a cache, then each row goes on from where its prompt ends.

Knows no model: it is given two functions, one that reads whole prompts and one that reads a further token. Rows
of several models may go along, as more rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# (tokens, index of each row's last one) -> (logits of the token after that, cache). A row shorter than the
# others is padded on the right, with tokens that must not matter to those before them.
Fill = Callable[[Int[Array, "rows length"], Int[Array, " rows"]], tuple[Float[Array, "rows vocabulary"], Any]]
# (cache, a token for each row, its position) -> (logits of the token after it, cache).
Extend = Callable[
    [Any, Int[Array, " rows"], Int[Array, " rows"]], tuple[Float[Array, "rows vocabulary"], Any]
]

LIMIT, END, FULL = range(3)  # why a row ends: the limit, a token that ends it, no place left in the context


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Continued:
    """What follows each prompt. The token that ends it is no part of it; what lies behind `lengths` is 0."""

    tokens: Int[Array, "rows limit"]
    lengths: Int[Array, " rows"]
    ended: Int[Array, " rows"]  # LIMIT, END or FULL


class _State(NamedTuple):
    count: Array  # tokens drawn, of a row that goes on
    last: Int[Array, " rows"]
    cache: Any
    tokens: Int[Array, "rows limit"]
    lengths: Int[Array, " rows"]
    ended: Int[Array, " rows"]


def continue_prompts(
    fill: Fill,
    extend: Extend,
    prompts: Int[Array, "rows length"],
    lengths: Int[Array, " rows"],
    keys: Array,
    *,
    limit: int,
    context: int,
    size: int,
    ends: Sequence[int] = (),
    temperature: float,
    top_p: float,
) -> Continued:
    """Draws up to `limit` tokens after each prompt, until all rows have ended.

    A token is a function of its row's key and position and of the tokens before it: not of the other rows.

    Args:
      fill, extend: the model; see `Fill` and `Extend`.
      prompts: padded on the right; the longest is not longer than `context`.
      lengths: tokens of each prompt, one at least.
      keys: a random key for each row.
      limit: tokens to draw at most.
      context: tokens that the cache holds. The one that is drawn after them all ends its row.
      size: ids below it may be drawn; logits may be wider.
      ends: ids that end a row, such as that of the end-of-text token.
      temperature, top_p: see `draw`.
    """
    if limit < 1 or prompts.shape[1] > context:
        raise ValueError(f"limit={limit} must be 1 or more, prompts of {prompts.shape[1]} fit into {context}")
    if not set(ends) <= set(range(size)):
        raise ValueError(f"ends={sorted(ends)} must be ids below {size}, which may be drawn")
    ending = np.isin(np.arange(size), list(ends))

    def take(state: _State, logits: Array) -> _State:
        """Draws the next token of each row, and notes which rows end with it."""
        at = lengths + state.count
        logits = jnp.where(jnp.arange(logits.shape[-1]) < size, logits, -jnp.inf)
        drawn = draw(logits, jax.vmap(jax.random.fold_in)(keys, at), temperature=temperature, top_p=top_p)
        going = state.ended == LIMIT
        ends_now = going & jnp.asarray(ending)[drawn]
        kept = going & ~ends_now
        ended = jnp.where(ends_now, END, jnp.where(kept & (at == context), FULL, state.ended))
        return state._replace(
            count=state.count + 1,
            last=drawn,
            tokens=state.tokens.at[:, state.count].set(jnp.where(kept, drawn, 0)),
            lengths=state.lengths + kept,
            ended=ended,
        )

    def goes_on(state: _State) -> Array:
        return (state.count < limit) & jnp.any(state.ended == LIMIT)

    def further(state: _State) -> _State:
        # A row that has ended reads on, into places that nothing looks at any more.
        at = jnp.minimum(lengths + state.count - 1, context - 1)
        logits, cache = extend(state.cache, state.last, at)
        return take(state._replace(cache=cache), logits)

    logits, cache = fill(prompts, lengths - 1)
    nothing = jnp.zeros_like(lengths)
    tokens = jnp.zeros((prompts.shape[0], limit), prompts.dtype)
    first = take(_State(jnp.int32(0), nothing, cache, tokens, nothing, nothing), logits)
    last = lax.while_loop(goes_on, further, first)
    # A row that ended for want of room with its very last token has all that it was asked for.
    ended = jnp.where((last.ended == FULL) & (last.lengths == limit), LIMIT, last.ended)
    return Continued(last.tokens, last.lengths, ended)


def draw(
    logits: Float[Array, "rows vocabulary"], keys: Array, *, temperature: float, top_p: float
) -> Int[Array, " rows"]:
    """A token for each row, by its key.

    Args:
      temperature: what the logits are divided by; at 0 the likeliest token is taken, of equals the first.
      top_p: only the likeliest tokens that have this probability together are drawn (nucleus sampling,
        Holtzman et al. 2020), after the division by the temperature; 1: all.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} must be 0 or more, top_p={top_p} in (0, 1]")
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    if top_p < 1:
        logits = jnp.where(nucleus(jax.nn.softmax(logits), top_p), logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def nucleus(probabilities: Float[Array, "rows vocabulary"], top_p: float) -> Bool[Array, "rows vocabulary"]:
    """The smallest set of the likeliest tokens whose probabilities sum to `top_p` or more; of equals the first."""
    order = jnp.argsort(-probabilities, axis=-1, stable=True)
    falling = jnp.take_along_axis(probabilities, order, axis=-1)
    before = jnp.cumsum(falling, axis=-1) - falling  # of those that are likelier
    ranks = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(before < top_p, ranks, axis=-1)
