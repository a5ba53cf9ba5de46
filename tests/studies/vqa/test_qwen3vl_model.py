"""Qwen3-VL by itself: sizes, where pictures stand, what they see, one loop or another, and reading token by token."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxablate.decoding import continue_prompts
from jaxablate.nn.position import Rope, rotary_tables
from jaxablate.studies.vqa.qwen3vl import model as qwen
from jaxablate.studies.vqa.qwen3vl import places
from jaxablate.studies.vqa.qwen3vl.config import PUBLISHED, QWEN3_VL_8B
from jaxablate.studies.vqa.qwen3vl.model import Qwen3Vl
from tests.studies.vqa.small import IMAGE, SMALL

# Two rows of 20 tokens: pictures of 2x4 and 4x2 patches behind two tokens of text; one of 4x4 at the start.
GRIDS = np.array([[(2, 4), (4, 2)], [(4, 4), (0, 0)]], np.int32)
ROWS = [[1, 2, *[IMAGE] * 2, 3, *[IMAGE] * 2, *range(4, 17)], [*[IMAGE] * 4, *range(5, 21)]]


def inputs(patches: int = 16) -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens = jnp.array(ROWS, jnp.int32)
    values = np.random.default_rng(0).normal(size=(2, 2, 16, SMALL.vision.patch_size)).astype(np.float32)
    padded = np.zeros((2, 2, patches, SMALL.vision.patch_size), np.float32)
    padded[:, :, :16] = values
    return tokens, jnp.asarray(padded), jnp.asarray(GRIDS)


RUN = jax.jit(Qwen3Vl(SMALL).apply)  # compiled once for all tests


@pytest.fixture(scope="module")
def params() -> Any:
    """Random numbers, larger than at the start of training, so that everything matters."""
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: Any) -> jax.Array:
        around = 1.0 if path[-1].key in ("scale", "q_scale", "k_scale") else 0.0
        return jnp.asarray(rng.normal(around, 0.3, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(qwen.shapes(Qwen3Vl(SMALL))))


# --------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("name, total", [("2b", 2_127_532_032), ("8b", 8_767_123_696)])
def test_published_sizes(name: str, total: int) -> None:
    shapes = qwen.shapes(Qwen3Vl(PUBLISHED[name], loop="scan"))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(nn.unbox(shapes))) == total


def test_a_head_of_its_own_is_counted() -> None:
    """The negative control of the count: the 8b model without its own head is smaller by vocabulary x width."""
    tied = dataclasses.replace(QWEN3_VL_8B, text=dataclasses.replace(QWEN3_VL_8B.text, head="tied"))
    count = sum(
        math.prod(x.shape) for x in jax.tree.leaves(nn.unbox(qwen.shapes(Qwen3Vl(tied, loop="scan"))))
    )
    assert count == 8_767_123_696 - 151_936 * 4096


# ---------------------------------------------------------------------------------- where pictures stand


def walked(row: list[int], grids: np.ndarray) -> tuple[list[tuple[int, int, int]], int]:
    """Positions of a row's tokens by walking along it, and the next one."""
    found: list[tuple[int, int, int]] = []
    at, left = 0, [(h // 2, w // 2) for h, w in grids]
    while len(found) < len(row):
        if row[len(found)] != IMAGE:
            found.append((at, at, at))
            at += 1
        else:
            height, width = left.pop(0)
            found += [(at, at + y, at + x) for y in range(height) for x in range(width)]
            at += max(height, width)
    return found, at


def test_positions_are_those_of_walking_along_the_row() -> None:
    rng = np.random.default_rng(0)
    length = 60
    in_row = jax.jit(lambda visual, grids: places.in_row(visual, grids, merge=2, per_picture=16))
    for _ in range(8):
        tokens, grids = np.zeros((3, length), int), np.zeros((3, 3, 2), np.int32)
        for i in range(3):
            row = list(rng.integers(0, IMAGE, rng.integers(0, 3)))
            for j in range(rng.integers(0, 4)):
                grids[i, j] = 2 * rng.integers(1, 5, 2)
                visual = [IMAGE] * int(np.prod(grids[i, j]) // 4)
                row += visual + list(rng.integers(0, IMAGE, rng.integers(0, 3)))
            tokens[i, : len(row)] = row
        at = in_row(tokens == IMAGE, grids)
        for i, row in enumerate(tokens.tolist()):
            positions, after = walked(row, grids[i])
            np.testing.assert_array_equal(at.positions[i], positions)
            assert after == length + at.shift[i]
            sources = [(j * 16) + m for j, (h, w) in enumerate(grids[i]) for m in range(h * w // 4)]
            np.testing.assert_array_equal(at.source[i][tokens[i] == IMAGE], sources)


def test_patches_come_in_blocks() -> None:
    at = places.in_picture(jnp.array([[4, 6], [0, 0]]), 28, merge=2)
    wanted = [
        (2 * by + y, 2 * bx + x) for by in range(2) for bx in range(3) for y in range(2) for x in range(2)
    ]
    assert list(zip(at.rows[0, :24].tolist(), at.columns[0, :24].tolist(), strict=True)) == wanted
    assert at.there.sum(axis=1).tolist() == [24, 0]


def test_rotary_sections() -> None:
    rope = Rope.interleaved(16, (4, 2, 2), 100.0)
    assert rope.axes == (0, 1, 2, 0, 1, 2, 0, 0)
    # On equal positions of all axes it is ordinary rotary embedding; on different ones it is not.
    at = jnp.arange(5)
    for found, wanted in zip(rope.tables(jnp.stack([at] * 3, -1)), rotary_tables(at, 16, 100.0), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert not np.allclose(rope.tables(jnp.stack([at, at, 2 * at], -1))[0], rotary_tables(at, 16, 100.0)[0])
    grid = Rope.grid(16)
    assert grid.axes == (0,) * 4 + (1,) * 4
    assert grid.frequencies[:4] == grid.frequencies[4:] == tuple(10_000.0 ** (-i / 8) for i in (0, 2, 4, 6))
    with pytest.raises(ValueError, match="must share 16/2"):
        Rope.interleaved(16, (4, 2, 1), 100.0)
    with pytest.raises(ValueError, match="head dimension of 4n"):
        Rope.grid(6)


def test_the_table_is_stretched_end_on_end() -> None:
    index, weight = places.table_weights(jnp.arange(4)[None], jnp.array([4]), 5)
    found = np.sum(np.asarray(index * weight), axis=-1)[0]
    np.testing.assert_allclose(found, np.linspace(0, 4, 4), atol=1e-6)
    np.testing.assert_allclose(weight.sum(axis=-1), 1, atol=1e-6)


# ------------------------------------------------------------------------------------------ what is seen


def test_padding_and_other_pictures_do_not_matter(params: Any) -> None:
    tokens, patches, grids = inputs()
    base = np.asarray(RUN({"params": params}, tokens, patches, grids))
    wider = np.asarray(RUN({"params": params}, *inputs(patches=24)))
    np.testing.assert_allclose(wider, base, atol=1e-5)
    # Behind a picture's own 8 patches anything may stand; the second picture comes after the first's tokens.
    other = patches.at[0, 0, 8:].set(9.0).at[0, 1].add(1.0)
    changed = np.asarray(RUN({"params": params}, tokens, other, grids))
    np.testing.assert_array_equal(changed[0, :5], base[0, :5])
    np.testing.assert_array_equal(changed[1], base[1])
    assert np.abs(changed[0, 5:] - base[0, 5:]).min(axis=0).max() > 1e-3  # which it does change


def test_without_pictures_a_row_is_text(params: Any) -> None:
    tokens, patches, _ = inputs()
    text = jnp.where(tokens == IMAGE, 0, tokens)
    none = jnp.zeros((2, 2, 2), jnp.int32)
    without = RUN({"params": params}, text)
    np.testing.assert_allclose(RUN({"params": params}, text, patches, none), without, atol=1e-5)


def test_scan_and_remat_change_nothing(params: Any) -> None:
    def stacked(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        if any(name.startswith("layer_") for name in tree):
            layers = [tree[f"layer_{i}"] for i in range(len(tree))]
            return {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}
        return {name: stacked(value) for name, value in tree.items()}

    tokens, patches, grids = inputs()
    targets = jnp.where(tokens == IMAGE, -100, tokens)

    other = Qwen3Vl(SMALL, loop="scan", remat="block")
    losses = jax.jit(lambda p: other.apply({"params": p}, tokens, targets, patches, grids, method="losses"))
    logits = RUN({"params": params}, tokens, patches, grids)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses(stacked(params)), jnp.where(tokens == IMAGE, 0, nll), atol=1e-4)


def test_half_precision_is_computed_in(params: Any) -> None:
    tokens, patches, grids = inputs()
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    half = Qwen3Vl(SMALL, dtype=jnp.bfloat16)
    states = jax.eval_shape(
        lambda p: half.apply({"params": p}, tokens, patches, grids, method="states"), halves
    )
    assert states.dtype == jnp.bfloat16
    found = jax.jit(half.apply)({"params": halves}, tokens, patches, grids)
    assert found.dtype == jnp.float32
    wanted = RUN({"params": params}, tokens, patches, grids)
    assert 0 < float(jnp.abs(found - wanted).mean()) < 0.05 * float(jnp.abs(wanted).mean())


# ------------------------------------------------------------------------------------------ token by token


def test_reading_on_is_reading_all(params: Any) -> None:
    """Each row goes on from its own end, and the logits are those of reading the longer row at once."""
    tokens, patches, grids = inputs()
    length = tokens.shape[1]
    cached = Qwen3Vl(SMALL, context=length)
    last = jnp.array([11, 8])
    whole = np.asarray(RUN({"params": params}, tokens, patches, grids))
    logits, cache = jax.jit(lambda: qwen.fill(cached, {"params": params}, tokens, last, patches, grids))()
    begun = jax.tree.map(lambda x: x, cache)
    extend = jax.jit(lambda cache, ids, at: qwen.extend(cached, {"params": params}, cache, ids, at))
    for step in range(8):
        at = last + step
        np.testing.assert_allclose(logits, whole[[0, 1], at], atol=1e-4)
        logits, cache = extend(cache, tokens[jnp.arange(2), at + 1], at + 1)
    # The negative control: without the shift of the pictures' positions the numbers are others.
    begun["turns"]["shift"] += 3
    moved, _ = extend(begun, tokens[jnp.arange(2), last + 1], last + 1)
    assert np.abs(np.asarray(moved) - whole[[0, 1], last + 1]).max() > 1e-3


@pytest.mark.slow
def test_the_general_loop_answers(params: Any) -> None:
    tokens, patches, grids = inputs()
    lengths, limit = jnp.array([12, 9]), 4
    cached = Qwen3Vl(SMALL, context=20)
    answers = continue_prompts(
        lambda ids, last: qwen.fill(cached, {"params": params}, ids, last, patches, grids),
        lambda cache, ids, at: qwen.extend(cached, {"params": params}, cache, ids, at),
        tokens,
        lengths,
        jax.random.split(jax.random.key(0), 2),
        limit=limit,
        context=20,
        size=IMAGE,
        temperature=0.0,
        top_p=1.0,
    )
    rows = np.array(tokens)
    for step in range(limit):
        at = np.asarray(lengths) + step
        logits = RUN({"params": params}, jnp.asarray(rows), patches, grids)
        best = np.asarray(logits)[[0, 1], at - 1, :IMAGE].argmax(axis=-1)
        np.testing.assert_array_equal(answers.tokens[:, step], best)
        rows[[0, 1], at] = best
