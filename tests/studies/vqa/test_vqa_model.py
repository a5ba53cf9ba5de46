"""The model with its frozen base: sizes, one loop or another, what is in storage, dropout, answers."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxablate import xla
from jaxablate.errors import UserError
from jaxablate.nn import lora, quantized
from jaxablate.nn.lora import Lora
from jaxablate.studies.vqa import base
from jaxablate.studies.vqa.config import VqaModel
from jaxablate.studies.vqa.model import BASE, Rules, Vlm
from jaxablate.studies.vqa.qwen3vl.save import save
from tests.lines import one_line
from tests.studies.vqa.small import IMAGE, SMALL

TARGETS = VqaModel().lora_targets
VLM = Vlm(SMALL, Lora(TARGETS, dropout=0.5))
KEY = jax.random.key(0)


def batch() -> dict[str, jax.Array]:
    """Two rows of a picture of 4 x 4 patches, a question and an answer of one, or of three tokens."""
    rows = [[*[IMAGE] * 4, 5, 6, 7, 8, 9], [*[IMAGE] * 4, 9, 3, 2, 4, 1]]
    targets = [[-100] * 8 + [3], [-100] * 6 + [2, 4, 1]]
    patches = np.random.default_rng(0).integers(0, 256, (2, 1, 16, SMALL.vision.patch_size), np.uint8)
    return {
        "tokens": jnp.array(rows, jnp.int32),
        "targets": jnp.array(targets, jnp.int32),
        "patches": jnp.asarray(patches),
        "grids": jnp.full((2, 1, 2), 4, jnp.int32),
    }


def quickly(f: Any, *args: Any) -> Any:
    return jax.jit(f, compiler_options=dict(xla.quick()))(*args)


def moved(adapter: Any) -> Any:
    """An adapter that changes what the model gives."""
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(KEY, x.shape), nn.unbox(adapter))


def made(vlm: Vlm) -> dict[str, Any]:
    return quickly(lambda: {"params": moved(vlm.init_adapter(KEY)), **base.draw(vlm, 0)})


@functools.cache
def compiled_losses(vlm: Vlm) -> Any:
    return jax.jit(vlm.losses, compiler_options=dict(xla.quick()))


def losses(vlm: Vlm, variables: Any, rows: slice = slice(None), keys: Any = None) -> np.ndarray:
    given = {name: value[rows] for name, value in batch().items()}
    nll, count = compiled_losses(vlm)(variables, given, keys)
    assert count.tolist() == [1, 3][rows]
    return np.asarray(nll)


@pytest.fixture(scope="module")
def variables() -> Any:
    return made(VLM)


@pytest.fixture(scope="module")
def folder(variables: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a checkpoint."""
    at = tmp_path_factory.mktemp("base")
    save(at, SMALL, variables[BASE])
    return at


# ----------------------------------------------------------------------------------------------- sizes


@functools.cache
def published(size: Any) -> Vlm:
    return Vlm.of(VqaModel(size=size))


@pytest.mark.parametrize(
    "size, adapters, parameters",
    [("tiny", 4_096, None), ("2b", 1_605_632, 2_127_532_032), ("8b", 3_833_856, 8_767_123_696)],
)
def test_sizes_of_adapters_and_bases(size: Any, adapters: int, parameters: int | None) -> None:
    vlm = published(size)
    assert count(vlm.abstract_adapter()) == adapters
    assert parameters in (None, vlm.base_parameters)


def test_adapters_of_a_layer() -> None:
    vlm = published("8b")
    first = vlm.abstract_adapter()["decoder"]["stage_0"]
    assert count(first) == 106_496
    assert {name for path in flatten_dict(vlm.abstract_adapter()) for name in path} >= {"q", "k", "v", "out"}
    assert set(vlm.abstract_adapter()) == {"decoder"}  # none in the tower


def count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def test_storage_holds_every_projection_but_that_of_the_patches() -> None:
    vlm = published("8b")
    plain = flatten_dict(nn.unbox(vlm.plain_shapes()))
    base = nn.unbox(vlm.abstract_base())
    kept, stored = flatten_dict(base[BASE]), flatten_dict(base[quantized.COLLECTION])
    projections = {path for path in plain if path[-1] == "kernel" and path[0] in ("decoder", "tower")}
    assert projections - stored.keys() == {("tower", "patches", "kernel")}
    assert stored.keys() < projections
    assert kept.keys() | stored.keys() == plain.keys() and not kept.keys() & stored.keys()
    # Of 17.5 GB in bfloat16 there are left 2.5 of embedding and head, and a little more than half a byte a weight.
    numbers, packed = (2 * count(kept), sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stored)))
    assert 2 * count(plain) > 17.5e9 > 6.4e9 > numbers + packed > packed > 0.5 * (count(plain) - count(kept))


# How deep, wide and long tells apart what there is of one layer and of all.
DEPTH = 80
DEEP = dataclasses.replace(
    VLM,
    config=dataclasses.replace(
        SMALL,
        vision=dataclasses.replace(SMALL.vision, depth=DEPTH, ffn_dim=256),
        text=dataclasses.replace(SMALL.text, depth=DEPTH, ffn_dim=256),
    ),
    storage="nf4",
    remat="block",
)


def largest(vlm: Vlm) -> int:
    """Numbers of the largest array that a gradient's program makes, in any of its loops."""

    def made(jaxpr: Any) -> Iterator[int]:
        for equation in jaxpr.eqns:
            yield from (math.prod(v.aval.shape) for v in equation.outvars)
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        yield from made(inner)

    def total(params: Any, base: Any) -> jax.Array:
        return vlm.losses({"params": params, **base}, batch(), None)[0].sum()

    params, base = nn.unbox(vlm.abstract_adapter()), nn.unbox(vlm.abstract_base())
    return max(made(jax.make_jaxpr(jax.grad(total))(params, base).jaxpr))


def test_a_step_holds_kernels_and_activations_of_one_layer_at_a_time() -> None:
    """Beside what the layers hand on: of the frozen tower's nothing, whose gradient nobody asks for."""
    handed_on = DEPTH * 2 * 9 * SMALL.text.dim
    assert largest(DEEP) <= handed_on < DEPTH * SMALL.text.dim * 256  # that of all kernels of one projection
    assert largest(dataclasses.replace(DEEP, remat="none")) > 2 * handed_on  # the control


def test_the_published_names_of_adapters_are_those_of_peft() -> None:
    names = VLM.adapter_names
    assert names["decoder/stage_1/layers/block/attention/out"] == (
        "model.language_model.layers.1.self_attn.o_proj",
        "model.language_model.layers.2.self_attn.o_proj",
    )
    assert len(names) == 8


# --------------------------------------------------------------------------------- one loop or another


def stacked(layers: dict[str, Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *layers.values())


def unstacked(tree: Any, depth: int) -> dict[str, Any]:
    return {f"layer_{i}": jax.tree.map(operator.itemgetter(i), tree) for i in range(depth)}


def test_a_loop_changes_neither_the_fresh_adapter_nor_the_losses(variables: Any, folder: Path) -> None:
    unrolled = dataclasses.replace(VLM, loop="unrolled")
    fresh, other = (nn.unbox(vlm.init_adapter(KEY))["decoder"]["stage_1"] for vlm in (VLM, unrolled))
    jax.tree.map(np.testing.assert_array_equal, fresh["layers"], stacked(other))
    a = np.asarray(other["layer_0"]["block"]["attention"]["q"][lora.A]["kernel"])
    assert 0.8 < np.abs(a).max() * 24**0.5 <= 1  # torch's U(-1/sqrt(inputs), 1/sqrt(inputs))
    assert np.abs(a - np.asarray(other["layer_1"]["block"]["attention"]["q"][lora.A]["kernel"])).max() > 0.01

    own = nn.unbox(unrolled.abstract_adapter())["decoder"]
    params = {
        stage: unstacked(variables["params"]["decoder"][stage]["layers"], len(own[stage])) for stage in own
    }
    again = {"params": {"decoder": params}, **base.read(folder, unrolled)}
    np.testing.assert_allclose(losses(unrolled, again), losses(VLM, variables), rtol=1e-5)


def test_remat_does_not_change_the_gradient(variables: Any) -> None:
    def gradient(vlm: Vlm) -> Any:
        def total(params: Any) -> jax.Array:
            keys = jax.random.split(KEY, 2)
            return vlm.losses({**variables, "params": params}, batch(), keys)[0].sum()

        return quickly(jax.grad(total), variables["params"])

    one, other = gradient(VLM), gradient(dataclasses.replace(VLM, remat="block"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(one))


# ------------------------------------------------------------------------------------------- the base


def test_a_checkpoint_of_ours_is_read_again(variables: Any, folder: Path) -> None:
    back = base.read(folder, VLM)
    jax.tree.map(np.testing.assert_array_equal, back[BASE], variables[BASE])


@pytest.mark.parametrize("loop", ["scan", "unrolled"])
@pytest.mark.parametrize("storage", ["float", "nf4", "int8"])
def test_bases_are_what_their_shapes_say(storage: Any, loop: Any, folder: Path) -> None:
    vlm = dataclasses.replace(VLM, storage=storage, loop=loop, dtype=jnp.bfloat16)
    wanted = jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), nn.unbox(vlm.abstract_base()))
    for found in (jax.eval_shape(lambda: base.draw(vlm, 0)), base.read(folder, vlm)):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == wanted
    assert bool(jax.tree.leaves(wanted[quantized.COLLECTION])) == (storage != "float")


def test_what_is_drawn_depends_on_the_seed_alone(variables: Any) -> None:
    same, other = (
        quickly(lambda seed=seed: base.draw(VLM, seed)[BASE]["decoder"]["stage_1"]["layers"]["block"])
        for seed in (0, 1)
    )
    drawn = variables[BASE]["decoder"]["stage_1"]["layers"]["block"]
    jax.tree.map(np.testing.assert_array_equal, same, drawn)
    one, two = drawn["ffn"]["wo"]["kernel"]
    assert np.abs(one - two).max() > 0.01  # layers differ from one another
    assert np.abs(one - other["ffn"]["wo"]["kernel"][0]).max() > 0.01
    assert 0.018 < float(jnp.std(drawn["ffn"]["wi"]["kernel"])) < 0.022


def test_stored_kernels_are_those_of_the_checkpoint_rounded(variables: Any, folder: Path) -> None:
    vlm = dataclasses.replace(VLM, storage="nf4")
    found = base.read(folder, vlm)
    like = nn.unbox(vlm.abstract_base()[quantized.COLLECTION])
    rest, stored = quickly(quantized.quantize_params, variables[BASE], like)
    jax.tree.map(np.testing.assert_array_equal, found[BASE], rest)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found[quantized.COLLECTION], stored
    )
    assert "patches" in found[BASE]["tower"] and "patches" not in found[quantized.COLLECTION]["tower"]
    exact, rounded = losses(VLM, variables), losses(vlm, {"params": variables["params"], **found})
    assert 1e-4 < np.abs(rounded - exact).max() < 0.5


def test_another_models_checkpoint_is_one_line(folder: Path) -> None:
    deeper = dataclasses.replace(
        VLM, config=dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, depth=4))
    )
    with pytest.raises(
        UserError, match=r"the text part has depth=3, but model.size asks for 4; give the"
    ) as error:
        base.read(folder, deeper)
    one_line(error)


def test_a_checkpoint_without_a_shard_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"model.safetensors: there is no such file") as error:
        base.read(tmp_path, VLM)
    one_line(error)


# -------------------------------------------------------------------------------------------- dropout


def test_dropout_is_the_rows_own_however_the_batch_is_split(variables: Any) -> None:
    keys = jax.random.split(KEY, 2)
    whole = losses(VLM, variables, keys=keys)
    parts = [losses(VLM, variables, slice(i, i + 1), keys[i : i + 1]) for i in range(2)]
    np.testing.assert_allclose(whole, np.concatenate(parts), rtol=1e-5)
    assert np.abs(whole - losses(VLM, variables)).max() > 1e-3
    assert np.abs(whole - losses(VLM, variables, keys=keys[::-1])).max() > 1e-3


# ------------------------------------------------------------------------------------------- answers


def test_answers_are_the_likeliest_tokens() -> None:
    """Each is the first choice of the model that reads prompt and answer as a whole."""
    vlm = dataclasses.replace(VLM, storage="int8")
    variables = made(vlm)
    rows, lengths, rules = batch(), jnp.array([9, 7], jnp.int32), Rules(4, (), IMAGE)
    answers = quickly(
        lambda v: vlm.generate(v, rows["tokens"], lengths, rows["patches"], rows["grids"], rules), variables
    )
    for row, start in enumerate([9, 7]):
        tokens = rows["tokens"][row, :start].tolist()
        for drawn in np.asarray(answers.tokens[row]).tolist():
            assert drawn == likeliest(vlm, variables, tokens, row)
            tokens.append(drawn)
    first = int(answers.tokens[0, 1])
    ended = quickly(
        lambda v: vlm.generate(
            v,
            rows["tokens"],
            lengths,
            rows["patches"],
            rows["grids"],
            dataclasses.replace(rules, ends=(first,)),
        ),
        variables,
    )
    assert ended.lengths[0] <= 1 < answers.lengths[0]


def likeliest(vlm: Vlm, variables: Any, tokens: list[int], row: int) -> int:
    """By the losses of all tokens as the next one, of rows padded to one length."""
    ids = jnp.array([tokens + [0] * (14 - len(tokens))] * IMAGE, jnp.int32)
    targets = jnp.full((IMAGE, 14), -100).at[:, len(tokens) - 1].set(jnp.arange(IMAGE))
    rows = batch()
    given = {
        "tokens": ids,
        "targets": targets,
        **{k: jnp.repeat(rows[k][row : row + 1], IMAGE, axis=0) for k in ("patches", "grids")},
    }
    return int(compiled_losses(vlm)(variables, given, None)[0].argmin())
