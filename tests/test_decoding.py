"""The loop that writes text, on models whose next token is known, and the draws of a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from jaxablate import xla
from jaxablate.decoding import END, FULL, LIMIT, Continued, continue_prompts, draw, nucleus

VOCABULARY = 8


def keys(rows: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), rows)


def go_on(table: np.ndarray, prompts: Sequence[Sequence[int]], **options) -> Continued:
    """Continues prompts with a model whose logits are the last token's row of `table`, (VOCABULARY, VOCABULARY)."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = np.full((len(prompts), lengths.max()), 7, np.int32)  # the padding is a token that matters
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    logits = jnp.asarray(table, jnp.float32)

    def fill(tokens, last):
        return logits[jnp.take_along_axis(tokens, last[:, None], 1)[:, 0]], last + 1

    def extend(read, tokens, positions):
        return logits[tokens], jnp.where(read == positions, read + 1, -1)  # -1, for good: out of turn

    given = {"limit": 6, "context": 100, "size": VOCABULARY, "temperature": 0.0, "top_p": 1.0, **options}
    own = given.pop("keys", keys(len(prompts)))

    def program() -> Continued:
        return continue_prompts(fill, extend, jnp.asarray(padded), jnp.asarray(lengths), own, **given)

    return quickly(program)


def quickly(program: Callable[[], Any]) -> Any:
    """What a program gives, on the host; compiled without optimisation, which would take longer than it."""
    return jax.device_get(jax.jit(program, compiler_options=dict(xla.quick()))())


def successor() -> np.ndarray:
    """After token i comes i + 1, and 0 after the last."""
    return 50.0 * np.roll(np.eye(VOCABULARY), 1, axis=1)


def texts(found: Continued) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(found.tokens, found.lengths, strict=True)]


def test_rows_of_different_lengths_go_on_from_their_own_end() -> None:
    found = go_on(successor(), [[3, 1], [0], [5, 5, 5, 2]], limit=4)
    assert texts(found) == [[2, 3, 4, 5], [1, 2, 3, 4], [3, 4, 5, 6]]
    assert found.ended.tolist() == [LIMIT] * 3


def test_a_row_ends_before_its_end_of_text_and_the_others_go_on() -> None:
    found = go_on(successor(), [[4], [1], [5]], limit=5, ends=(6,))
    assert texts(found) == [[5], [2, 3, 4, 5], []]
    assert found.ended.tolist() == [END, END, END]
    assert (found.tokens[0, 1:] == 0).all()
    assert texts(go_on(successor(), [[4], [1], [5]], limit=5))[0] == [5, 6, 7, 0, 1]  # without an end


def test_any_of_several_tokens_ends_a_row() -> None:
    found = go_on(successor(), [[4], [1], [5]], limit=5, ends=(6, 3))
    assert texts(found) == [[5], [2], []]
    assert found.ended.tolist() == [END] * 3


def test_a_row_ends_where_its_context_is_full() -> None:
    """The token after the last place of the context is still drawn: the model has seen all that stands before it."""
    found = go_on(successor(), [[0, 1, 2], [0], [3, 4, 5, 6]], limit=3, context=4)
    assert texts(found) == [[3, 4], [1, 2, 3], [7]]
    assert found.ended.tolist() == [FULL, LIMIT, FULL]
    assert go_on(successor(), [[0, 1]], limit=3, context=4).ended.tolist() == [
        LIMIT
    ]  # full, and has all it asked


def test_ids_beyond_the_tokenizer_are_never_drawn() -> None:
    assert texts(go_on(successor(), [[4]], limit=2, size=6)) == [[5, 0]]
    found = go_on(np.zeros((VOCABULARY, VOCABULARY)), [[0]] * 50, size=3, temperature=1.0, limit=20)
    assert set(found.tokens.ravel().tolist()) == {0, 1, 2}


def test_a_row_is_the_same_alone_and_in_company() -> None:
    table, prompts, own = np.zeros((VOCABULARY, VOCABULARY)), [[1, 2], [3], [4, 5, 6]], keys(3)
    options = {"temperature": 1.0, "ends": (0,), "limit": 12, "context": 13}
    together = go_on(table, prompts, keys=own, **options)
    for row, prompt in enumerate(prompts):
        assert texts(go_on(table, [prompt], keys=own[row : row + 1], **options))[0] == texts(together)[row]
    others = go_on(table, prompts, keys=keys(3, seed=1), **options)
    assert texts(others) != texts(together)  # or the keys would not matter


def test_the_loop_can_be_mapped_over_models() -> None:
    tables = np.random.default_rng(0).normal(size=(3, VOCABULARY, VOCABULARY)).astype(np.float32)

    def one(table: jax.Array) -> Continued:
        return continue_prompts(
            lambda tokens, last: (table[tokens[:, -1]], last),
            lambda cache, tokens, positions: (table[tokens], cache),
            jnp.array([[1], [2]], jnp.int32),
            jnp.array([1, 1], jnp.int32),
            keys(2),
            limit=9, context=50, size=VOCABULARY, ends=(0,), temperature=0.7, top_p=0.9,
        )  # fmt: skip

    mapped = quickly(lambda: jax.vmap(one)(jnp.asarray(tables)))
    for i, table in enumerate(tables):
        alone = quickly(lambda table=table: one(jnp.asarray(table)))
        np.testing.assert_array_equal(alone.tokens, mapped.tokens[i])
        np.testing.assert_array_equal(alone.ended, mapped.ended[i])


@pytest.mark.parametrize(
    "wrong",
    [{"limit": 0}, {"context": 1}, {"temperature": -1.0}, {"top_p": 0.0}, {"ends": (VOCABULARY,)}],
)
def test_what_makes_no_sense_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match="must be"):
        go_on(successor(), [[0, 1]], **wrong)


# ------------------------------------------------------------------------------------------- draws


@st.composite
def distributions(draw_) -> tuple[np.ndarray, float]:
    """Probabilities in 64ths, whose sums are exact, and a share in 128ths: on a sum and between two."""
    cuts = sorted(draw_(st.lists(st.integers(0, 64), min_size=7, max_size=7)))
    return np.diff([0, *cuts, 64]) / 64, draw_(st.integers(1, 128)) / 128


def smallest_set(probabilities: np.ndarray, share: float) -> set[int]:
    chosen: set[int] = set()
    for i in sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i)):
        chosen.add(i)
        if sum(probabilities[list(chosen)]) >= share:
            break
    return chosen


_nucleus = jax.jit(nucleus)


@given(distributions())
def test_the_nucleus_is_the_smallest_set_with_that_probability(case: tuple[np.ndarray, float]) -> None:
    probabilities, share = case
    kept = _nucleus(jnp.asarray(probabilities, jnp.float32)[None], share)[0]
    assert set(np.flatnonzero(kept).tolist()) == smallest_set(probabilities, share)


LOGITS = np.log([0.02, 0.4, 0.08, 0.25, 0.1, 0.15])


def counts(temperature: float, top_p: float, draws: int = 5_000) -> np.ndarray:
    logits = jnp.tile(jnp.asarray(LOGITS, jnp.float32), (draws, 1))
    found = jax.jit(lambda: draw(logits, keys(draws), temperature=temperature, top_p=top_p))()
    return np.bincount(np.asarray(found), minlength=len(LOGITS))


def p_value(found: np.ndarray, probabilities: np.ndarray) -> float:
    assert found[probabilities == 0].sum() == 0
    there = probabilities > 0
    return float(chisquare(found[there], found.sum() * probabilities[there] / probabilities.sum()).pvalue)


def test_draws_follow_the_softmax_at_any_temperature() -> None:
    plain = np.exp(LOGITS)
    assert p_value(counts(1.0, 1.0), plain) > 1e-3
    assert p_value(counts(0.5, 1.0), plain**2) > 1e-3
    assert p_value(counts(0.5, 1.0), plain) < 1e-6  # the test sees a wrong temperature


def test_draws_of_a_nucleus_follow_the_softmax_within_it() -> None:
    plain = np.exp(LOGITS)
    inside = np.where(plain >= 0.15, plain, 0.0)  # 0.4 + 0.25 + 0.15 = 0.8
    assert p_value(counts(1.0, 0.75), inside) > 1e-3
    assert counts(1.0, 0.85)[4] > 0  # one more is needed there


def test_the_nucleus_is_of_the_probabilities_after_the_temperature() -> None:
    found = counts(0.25, 0.8)  # 0.4**4 is 0.83 of the sum of fourth powers
    assert np.flatnonzero(found).tolist() == [1]
    assert len(np.flatnonzero(counts(1.0, 0.8))) > 1


def test_temperature_0_takes_the_likeliest_and_of_equals_the_first() -> None:
    logits = jnp.array([[0.0, 2.0, 2.0], [5.0, 1.0, 1.0]])
    assert draw(logits, keys(2), temperature=0.0, top_p=1.0).tolist() == [1, 0]
    assert draw(logits, keys(2), temperature=1e-6, top_p=1.0)[1] == 0  # and near it nothing overflows
