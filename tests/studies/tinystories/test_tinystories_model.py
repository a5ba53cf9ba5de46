"""The language model: sizes, worked-out numbers, and that each arm takes away what it says."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate import config
from jaxablate.nn.ffn import Ffn
from jaxablate.nn.norm import Norm
from jaxablate.nn.position import rotary_tables
from jaxablate.studies.tinystories.config import LmModel, feed_forward_width, training_steps
from jaxablate.studies.tinystories.model import DecoderLm, ffn_width
from jaxablate.trees import count
from jaxablate_kernels import Rotary, attention

ARMS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "no_layer_norm": {"norm": "none"},
    "post_norm": {"placement": "post"},
    "no_position_emb": {"position": "none"},
    "silu_ffn": {"ffn": "silu"},
}
PAPER = LmModel()
TINY = dataclasses.replace(PAPER, dim=96, layers=2, heads=4)


def lm(model: LmModel, vocab: int = 512, context: int = 64, **options: Any) -> DecoderLm:
    return DecoderLm(model, vocab, context, **options)


@functools.cache
def start(model: LmModel, vocab: int = 512, context: int = 64, seed: int = 0) -> Any:
    tokens = jnp.zeros((1, 8), jnp.int32)
    return nn.unbox(lm(model, vocab, context).init(jax.random.key(seed), tokens))


def tokens(rows: int, length: int, vocab: int, seed: int = 1) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, vocab)


# ------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("arm", "paper", "tiny"),
    [
        ("baseline", 22_696_448, 319_968),
        ("no_layer_norm", 22_691_840, 319_488),
        ("post_norm", 22_696_448, 319_968),
        ("no_position_emb", 22_696_448, 319_968),
        ("silu_ffn", 22_827_520, 319_968),
    ],
)
def test_parameter_counts_are_the_published_ones(arm: str, paper: int, tiny: int) -> None:
    def size(model: LmModel, *shape: int) -> int:
        init = functools.partial(lm(model, *shape).init, jax.random.key(0))
        return count(jax.eval_shape(init, jnp.zeros((1, 8), jnp.int32))["params"])

    assert size(dataclasses.replace(PAPER, **ARMS[arm]), 10_000, 256) == paper
    assert size(dataclasses.replace(TINY, **ARMS[arm]), 512, 64) == tiny
    if arm == "baseline":
        small = dataclasses.replace(PAPER, dim=64, layers=3, ffn_width=128, heads=4)
        assert size(small, 10_000, 256) == 1_403_328


@pytest.mark.parametrize(
    ("dim", "gated", "plain"),
    [
        (64, 192, 256),
        (96, 256, 384),
        (128, 320, 512),
        (256, 704, 1024),
        (512, 1344, 2048),
        (768, 2048, 3072),
        (1024, 2752, 4096),
    ],
)
def test_the_width_is_the_nearest_multiple_of_64(dim: int, gated: int, plain: int) -> None:
    assert ffn_width(LmModel(dim=dim)) == gated
    assert ffn_width(LmModel(dim=dim, ffn="silu")) == plain
    assert ffn_width(LmModel(dim=dim, ffn_width=100)) == 100


def test_a_width_that_rounds_to_nothing_is_refused() -> None:
    assert feed_forward_width(13, 8 / 3) == 64  # 34
    with pytest.raises(ValueError, match="no width"):
        feed_forward_width(12, 8 / 3)  # 32


@pytest.mark.parametrize(
    ("scale", "batch", "expected"),
    [
        ("paper", 8, (160_000, 1600, 1600, 16_000)),
        ("paper", 16, (80_000, 800, 800, 8000)),
        ("paper", 32, (40_000, 400, 400, 4000)),
        ("paper", 64, (20_000, 200, 200, 2000)),
        ("low_resource", 32, (4882, 100, 200, 1000)),
    ],
)
def test_steps_and_cadences_follow_from_the_budget(scale, batch, expected, repo, monkeypatch) -> None:
    monkeypatch.chdir(repo)
    run = config.load(
        f"configs/tinystories.py:baseline,scale={scale}", [("training.batch_size", str(batch))]
    ).base
    training = run.training
    assert (
        training.steps,
        run.optim.warmup_steps,
        training.eval_every,
        run.host.checkpoint_every,
    ) == expected
    assert run.data.tokens // 1000 * 1000 == run.data.tokens
    assert training_steps(40_000_000, 32, 256) * 32 * 256 == 39_993_344


# --------------------------------------------------------------------------------- worked-out numbers


def test_the_first_loss_is_that_of_the_initialisation() -> None:
    batch = tokens(8, 129, 10_000)

    def first(model: LmModel) -> float:
        variables = start(model, 10_000, 256)
        nll = lm(model, 10_000, 256).apply(variables, batch[:, :-1], batch[:, 1:], method="losses")
        return float(jnp.mean(jnp.asarray(nll)))

    # ln 10000 + half the variance of the logits: 512 weights of variance 2 / 10512 on a unit vector.
    assert abs(first(PAPER) - 9.259) < 0.02
    assert first(dataclasses.replace(PAPER, norm="none")) > 12


def test_swiglu_and_silu() -> None:
    w1, w3 = np.array([[1, 0], [0, -1], [0.5, 0.5]]), np.array([[0.2, 0.1], [1, 1], [-1, 2]])
    w2, x = np.array([[1, 2, -1], [0, 0.5, 1]]), jnp.array([[1.0, -2.0]])
    wi = jnp.asarray(np.stack([w1.T, w3.T], axis=1), jnp.float32)
    wo = {"kernel": jnp.asarray(w2.T, jnp.float32)}

    def out(kind: Any, kernel: jax.Array) -> np.ndarray:
        params = {"wi": {"kernel": kernel}, "wo": wo}
        return np.asarray(Ffn(kind=kind, width=3).apply({"params": params}, x))[0]

    np.testing.assert_allclose(out("swiglu", wi), [-4.46703998, 0.06305459], rtol=1e-5)
    np.testing.assert_allclose(out("silu", wi[:, 0]), [4.44301722, 0.69202674], rtol=1e-5)


def test_rmsnorm() -> None:
    x = jnp.array([[1.0, 2.0, 4.0, -3.0]])
    found = Norm("rmsnorm").apply({"params": {"scale": jnp.ones(4)}}, x)
    expected = [[0.36514813, 0.73029626, 1.46059251, -1.09544438]]
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("pairing", "position", "expected"),
    [
        ("adjacent", 1, [-1.1426397, 1.9220756, 2.9598507, 4.0297995]),
        ("adjacent", 3, [-1.2722325, -1.8388650, 2.8786681, 4.0881866]),
        ("halves", 1, [-1.9841106, 1.9599007, 2.4623779, 4.0197997]),
    ],
)
def test_rotary_positions(pairing: Any, position: int, expected: list[float]) -> None:
    # Attention over one key gives its value; the logit to a unit query reads a feature of the turned key off.
    at, zero = rotary_tables(jnp.array([position]), 4), rotary_tables(jnp.array([0]), 4)
    key = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    k = jnp.concatenate([key, jnp.zeros_like(key)], axis=1)
    v = jnp.array([1.0, 0, 0, 0, 0, 0, 0, 0]).reshape(1, 2, 1, 4)  # first feature: weight of the key
    tables = (jnp.concatenate([at[0], zero[0]]), jnp.concatenate([at[1], zero[1]]))
    read = []
    for feature in np.eye(4, dtype=np.float32):
        q = jnp.asarray(feature).reshape(1, 1, 1, 4)
        rotary = Rotary(zero, tables, pairing=pairing)
        weight = attention(q, k, v, impl="reference", scale=1.0, causal=False, rotary=rotary)[0, 0, 0, 0]
        read.append(float(jnp.log(weight / (1 - weight))))
    np.testing.assert_allclose(read, expected, rtol=1e-5)


# ------------------------------------------------------------------------------- what the arms ablate


def last(model: LmModel, batch: jax.Array) -> np.ndarray:
    """Logits after the last token of each row."""
    return np.asarray(lm(model).apply(start(model), batch))[:, -1]


def test_without_positions_the_order_of_earlier_tokens_is_lost_and_with_them_it_is_not() -> None:
    rows = tokens(2, 12, 512)
    order = np.random.default_rng(0).permutation(11)
    permuted = jnp.concatenate([rows[:, order], rows[:, 11:]], axis=1)
    for position in ("rope", "none", "learned", "sinusoidal", "faithful_none"):
        # One layer: in deeper ones the causal mask itself tells positions apart.
        model = dataclasses.replace(TINY, layers=1, position=position)
        change = np.abs(last(model, rows) - last(model, permuted)).max()
        assert (change < 1e-5) == (position == "none"), (position, change)


def test_no_norm_leaves_no_normaliser_in_the_program() -> None:
    def ops(model: LmModel) -> str:
        batch = tokens(1, 9, 512)
        params = start(model)
        return str(
            jax.make_jaxpr(lambda v: lm(model).apply(v, batch[:, :-1], batch[:, 1:], method="losses"))(params)
        )

    assert "rsqrt" in ops(TINY)
    found = ops(dataclasses.replace(TINY, norm="none"))
    assert not any(op in found for op in ("rsqrt", "sqrt", "integer_pow"))


@pytest.mark.parametrize("arm", list(ARMS)[1:])
def test_every_arm_computes_another_function_from_the_same_shared_numbers(arm: str) -> None:
    other = dataclasses.replace(TINY, **ARMS[arm])
    rows = tokens(2, 16, 512)
    assert np.abs(last(TINY, rows) - last(other, rows)).max() > 1e-3
    mine, theirs = (
        {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(start(m))}
        for m in (TINY, other)
    )
    shared = [k for k in mine if k in theirs and mine[k].shape == theirs[k].shape]
    assert len(shared) >= 10
    assert all((mine[k] == theirs[k]).all() for k in shared)


def test_a_norm_after_the_sum_keeps_the_stream_at_unit_size() -> None:
    rows = tokens(2, 16, 512)
    post = dataclasses.replace(TINY, placement="post", final_norm="off")
    states = np.asarray(lm(post).apply(start(post), rows, method="states"))
    np.testing.assert_allclose(np.mean(states**2, axis=-1), 1.0, rtol=1e-3)
    pre = dataclasses.replace(TINY, final_norm="off")
    assert np.mean(np.asarray(lm(pre).apply(start(pre), rows, method="states")) ** 2) > 1.2


@pytest.mark.parametrize(
    "impl", ["attention_impl=blockwise", "norm_impl=recompute", "ffn_impl=recompute", "loss_impl=chunked"]
)
def test_an_implementation_changes_nothing(impl: str) -> None:
    slot, _, name = impl.partition("=")
    rows = tokens(2, 17, 512)

    def losses(model: LmModel) -> np.ndarray:
        found = lm(model).apply(start(TINY), rows[:, :-1], rows[:, 1:], method="losses")
        return np.asarray(found)

    np.testing.assert_allclose(
        losses(dataclasses.replace(TINY, **{slot: name})), losses(TINY), rtol=1e-5, atol=1e-5
    )
