"""With a cache of keys and values a language model computes what it computes without one."""

from __future__ import annotations

import functools
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxablate import xla
from jaxablate.nn.position import PositionKind
from jaxablate.studies.tinystories.config import LmModel
from jaxablate.studies.tinystories.model import DecoderLm

ROWS, VOCABULARY, CONTEXT, PROMPT = 3, 20, 10, 6
LENGTHS = jnp.array([2, 6, 4])
TOKENS = jax.random.randint(jax.random.key(0), (ROWS, CONTEXT), 0, VOCABULARY)


@functools.cache
def program(**options: Any) -> tuple[Any, Any]:
    """A compiled `compare` of one model, and variables for it that say something."""
    config = LmModel(dim=16, layers=2, heads=2, **options)
    models = [DecoderLm(config, VOCABULARY, CONTEXT, cache=cache) for cache in ("none", "kept")]
    abstract = nn.unbox(jax.eval_shape(lambda: models[0].init(jax.random.key(1), TOKENS)))
    rng = np.random.default_rng(0)
    # Not as they start: scales that are all 1 would hide some mistakes.
    variables = jax.tree.map(lambda x: rng.normal(x.ndim == 1, 0.4, x.shape).astype(np.float32), abstract)
    compiled = jax.jit(functools.partial(compare, *models), compiler_options=dict(xla.quick()))
    return compiled, variables


def compare(plain: Any, cached: Any, variables: Any, behind: jax.Array) -> tuple[jax.Array, ...]:
    """Logits without a cache; with one those of the prompts, and of four further tokens of each row.

    Each of these is said to stand `behind` its place.
    """
    padded = jnp.where(jnp.arange(PROMPT)[None] < LENGTHS[:, None], TOKENS[:, :PROMPT], 0)
    first, state = cached.apply(variables, padded, mutable=["cache"])

    def step(state: Any, i: jax.Array) -> tuple[Any, jax.Array]:
        at = (LENGTHS + i)[:, None]
        token = jnp.take_along_axis(TOKENS, at, axis=1)
        logits, state = cached.apply({**variables, **state}, token, at - behind, mutable=["cache"])
        return state, logits[:, 0]

    return plain.apply(variables, TOKENS), first, lax.scan(step, state, jnp.arange(4))[1]


def errors(behind: int, **options: Any) -> tuple[float, float]:
    """Largest difference to the whole pass, as a share of its largest logit: in the prompts, and behind them."""
    compiled, variables = program(**options)
    full, first, further = jax.device_get(compiled(variables, behind))
    rows, last = np.arange(ROWS), np.asarray(LENGTHS)
    prompts = max(np.abs(first[i, :n] - full[i, :n]).max() for i, n in enumerate(last))
    steps = np.stack([full[rows, last + i] for i in range(4)])
    largest = np.abs(full).max()
    return float(prompts / largest), float(np.abs(further - steps).max() / largest)


@pytest.mark.parametrize("qk_norm", ["none", "rms"])
@pytest.mark.parametrize("position", get_args(PositionKind))
def test_cached_logits_are_those_of_the_whole_pass(position: str, qk_norm: str) -> None:
    prompts, further = errors(0, position=position, qk_norm=qk_norm)
    assert prompts < 1e-5
    assert further < 1e-5


@pytest.mark.parametrize("position", ["rope", "none"])
def test_a_token_said_to_stand_one_place_before_its_own_gives_other_logits(position: str) -> None:
    assert errors(1, position=position, qk_norm="none")[1] > 1e-2


def test_without_norms_and_with_norms_behind_the_cache_is_right_too() -> None:
    assert max(errors(0, norm="none", final_norm="off", ffn="silu")) < 1e-5
    assert max(errors(0, placement="post", norm="layernorm", ffn="gelu")) < 1e-5
