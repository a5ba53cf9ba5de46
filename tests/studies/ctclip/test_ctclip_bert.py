"""BERT weights: every bit arrives, the function is Hugging Face's, and what does not fit is one line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxablate import config as configs
from jaxablate.errors import UserError
from jaxablate.program import Program
from jaxablate.sharding import make_mesh
from jaxablate.studies.ctclip import bert
from jaxablate.studies.ctclip.config import TextConfig
from jaxablate.studies.ctclip.model import TextEncoder
from jaxablate.studies.ctclip.task import CtClipTask
from jaxablate.trees import flat

CONFIG = TextConfig(dim=48, depth=3, heads=4, ffn_dim=80)
VOCAB, LENGTH = 100, 17
Tensors = dict[str, np.ndarray]


def encoder(config: TextConfig = CONFIG, vocab: int = VOCAB, length: int = LENGTH) -> TextEncoder:
    return TextEncoder(config, vocab, length, jnp.float32, "none")


def boxed(seed: int, config: TextConfig = CONFIG, vocab: int = VOCAB, length: int = LENGTH) -> dict[str, Any]:
    """Random parameters; the norms too, so that no two tensors of a shape are equal."""
    init = encoder(config, vocab, length).init
    abstract = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, length), jnp.int32))["params"]
    rng = np.random.default_rng(seed)
    values = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), nn.unbox(abstract))
    return nn.meta.replace_boxed(abstract, values)


def hugging_face(params: dict[str, Any], config: TextConfig = CONFIG) -> Tensors:
    """The names and layout of transformers' BertModel, written out without the code under test."""
    p, dim = nn.unbox(params), config.dim
    norm = {"weight": "scale", "bias": "bias"}
    tensors = {
        "embeddings.word_embeddings.weight": p["words"]["embedding"],
        "embeddings.position_embeddings.weight": p["positions"]["table"],
        "embeddings.token_type_embeddings.weight": p["segment"],
        **{f"embeddings.LayerNorm.{k}": p["embedding_norm"][v] for k, v in norm.items()},
    }
    for i in range(config.depth):
        block, at = p["layers"][f"layer_{i}"]["block"], f"encoder.layer.{i}"
        attention = block["attention"]
        for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
            tensors[f"{at}.attention.self.{theirs}.weight"] = attention[ours]["kernel"].reshape(dim, dim).T
            tensors[f"{at}.attention.self.{theirs}.bias"] = attention[ours]["bias"].reshape(dim)
        tensors[f"{at}.attention.output.dense.weight"] = attention["out"]["kernel"].reshape(dim, dim).T
        tensors[f"{at}.attention.output.dense.bias"] = attention["out"]["bias"]
        for ours, theirs in (("wi", "intermediate.dense"), ("wo", "output.dense")):
            tensors[f"{at}.{theirs}.weight"] = block["ffn"][ours]["kernel"].T
            tensors[f"{at}.{theirs}.bias"] = block["ffn"][ours]["bias"]
        for ours, theirs in (
            ("attention_norm", "attention.output.LayerNorm"),
            ("ffn_norm", "output.LayerNorm"),
        ):
            tensors |= {f"{at}.{theirs}.{k}": block[ours][v] for k, v in norm.items()}
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def with_prefix(tensors: Tensors) -> Tensors:
    heads = {"cls.predictions.bias": np.zeros(VOCAB, np.float32)}
    return {f"bert.{name}": value for name, value in tensors.items()} | heads


def with_old_names(tensors: Tensors) -> Tensors:
    def old(name: str) -> str:
        return name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")

    return {old(name): value for name, value in tensors.items()}


def save(path: Path, tensors: Tensors, settings: dict[str, Any] | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    if settings is not None:
        path.with_name("config.json").write_text(json.dumps(settings))
    return str(path)


def assert_same_bits(loaded: Any, expected: Any) -> None:
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(loaded), jax.tree.leaves(expected), strict=True
    ):
        assert a.dtype == np.float32, path
        np.testing.assert_array_equal(a, b, err_msg=str(path))


# ------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize(
    "rename",
    [lambda t: t, with_prefix, with_old_names, lambda t: with_prefix(with_old_names(t))],
    ids=["plain", "prefix", "gamma_beta", "prefix_gamma_beta"],
)
def test_every_bit_arrives(tmp_path: Path, rename: Callable[[Tensors], Tensors]) -> None:
    params = boxed(1)
    path = save(tmp_path / "model.safetensors", rename(hugging_face(params)))
    for given in (path, str(tmp_path)):  # the file, or the folder with it
        bert.check_bert(given, boxed(2), CONFIG)
        assert_same_bits(bert.load_bert(given, boxed(2), CONFIG), params)  # boxes and all


def test_a_longer_table_of_positions_is_cut(tmp_path: Path) -> None:
    params = boxed(1)
    path = save(tmp_path / "a.safetensors", hugging_face(params))
    loaded = bert.load_bert(path, boxed(2, length=9), CONFIG)
    np.testing.assert_array_equal(
        nn.unbox(loaded)["positions"]["table"], nn.unbox(params)["positions"]["table"][:9]
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32(tmp_path: Path, dtype: str) -> None:
    halves = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), boxed(1))
    path = save(tmp_path / "a.safetensors", hugging_face(halves))
    assert_same_bits(
        bert.load_bert(path, boxed(2), CONFIG), jax.tree.map(lambda x: x.astype(np.float32), halves)
    )


def test_what_is_not_used_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {
        "pooler.dense.weight": np.zeros((48, 48), np.float32),
        "embeddings.position_ids": np.zeros(3, np.int64),
    }
    path = save(tmp_path / "a.safetensors", hugging_face(boxed(1)) | extra)
    with caplog.at_level(logging.INFO, logger=bert.__name__):
        bert.load_bert(path, boxed(2), CONFIG)
    assert "embeddings.position_ids, pooler.dense.weight" in caplog.text
    assert "no config.json" in caplog.text
    assert "encoder.layer" not in caplog.text


# ---------------------------------------------------------------------------------------------- faults

WORDS, NORM = "embeddings.word_embeddings.weight", "encoder.layer.1.output.LayerNorm.weight"


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def resized(name: str, *shape: int, dtype: Any = np.float32) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: np.zeros(shape, dtype)}


@pytest.mark.parametrize(
    "change, parts",
    [
        (without(WORDS), [f"no tensor '{WORDS}'", "model.text.weights"]),
        (without(NORM), [f"no tensor '{NORM}'"]),
        (lambda t: with_prefix(without(NORM)(t)), [f"no tensor 'bert.{NORM}'"]),
        (lambda t: {"x": np.zeros(3, np.float32)}, ["no tensor 'embeddings."]),
        (resized(WORDS, 101, 48), [WORDS, "(101, 48)", "(100, 48)", "set data.vocab_size=101"]),
        (resized(WORDS, 100, 64), ["(100, 64)", "(100, 48)", "set model.text.dim=64"]),
        (resized(WORDS, 101, 64), ["set data.vocab_size=101, model.text.dim=64"]),
        (
            resized("embeddings.position_embeddings.weight", 16, 48),
            ["position_embeddings", "(16, 48)", "(17, 48)", "set data.text_length=16 or less"],
        ),
        (
            resized("embeddings.token_type_embeddings.weight", 1, 48),
            ["token_type_embeddings", "(1, 48)", "(2, 48)", "another checkpoint"],
        ),
        (
            resized("encoder.layer.2.intermediate.dense.weight", 96, 48),
            ["layer.2.intermediate", "(96, 48)", "(80, 48)", "set model.text.ffn_dim=96"],
        ),
        (resized("encoder.layer.0.output.dense.weight", 48, 96), ["(48, 96)", "(48, 80)", "ffn_dim=96"]),
        (resized(NORM, 48, 1), ["(48, 1)", "(48,)", "another checkpoint"]),
        (resized(WORDS, 100, 48, dtype=np.int8), [WORDS, "I8", "quantised"]),
        (resized("encoder.layer.3.x", 1), ["has 4 layers", "model.text.depth=3", "set model.text.depth=4"]),
        (
            lambda t: {k: v for k, v in t.items() if ".layer.2." not in k},
            ["has 2 layers", "set model.text.depth=2"],
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, change: Callable[[Tensors], Tensors], parts: list[str]
) -> None:
    path = save(tmp_path / "a.safetensors", change(hugging_face(boxed(1))))
    for function in (bert.check_bert, bert.load_bert):
        with pytest.raises(UserError) as error:
            function(path, boxed(2), CONFIG)
        text = str(error.value)
        assert "\n" not in text
        for part in (path, *parts):
            assert part in text


GOOD = {"model_type": "bert", "hidden_act": "gelu", "num_attention_heads": 4, "layer_norm_eps": 1e-12}


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"num_attention_heads": 6}, ["num_attention_heads=6", "heads=4", "set model.text.heads=6"]),
        ({"hidden_act": "gelu_new"}, ["hidden_act='gelu_new'", "'gelu'"]),
        ({"layer_norm_eps": 1e-5}, ["layer_norm_eps=1e-05", "1e-12"]),
        ({"position_embedding_type": "relative_key"}, ["relative_key", "absolute"]),
        ({"model_type": "roberta"}, ["roberta"]),
        ({"is_decoder": True}, ["is_decoder=True"]),
    ],
)
def test_what_config_json_says_is_checked(tmp_path: Path, change: dict[str, Any], parts: list[str]) -> None:
    path = save(tmp_path / "model.safetensors", hugging_face(boxed(1)), GOOD)
    bert.check_bert(path, boxed(2), CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(UserError) as error:
        bert.check_bert(path, boxed(2), CONFIG)
    for part in ("config.json", *parts):
        assert part in str(error.value)


def test_a_missing_or_damaged_file_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match=r"there is no file .*safetensors; give"):
            bert.check_bert(str(path), boxed(2), CONFIG)
    whole = Path(save(tmp_path / "whole.safetensors", hugging_face(boxed(1)))).read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    for data in (b"", b"no header", whole[: len(whole) // 2], whole[:100]):
        damaged.write_bytes(data)
        with pytest.raises(UserError, match=r"damaged.safetensors: cannot be read as safetensors") as error:
            bert.check_bert(str(damaged), boxed(2), CONFIG)
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ in training


def cohort(repo: Path, weights: str, **overrides: str) -> configs.Cohort:
    given = {"model.text.weights": weights, "data.tokenizer": "wordpiece", "seeds": "(3, 4)", **overrides}
    return configs.load(f"{repo}/configs/ctclip.py:baseline,scale=tiny", list(given.items()))


def tiny_checkpoint(repo: Path, path: Path) -> tuple[str, dict[str, Any]]:
    base = cohort(repo, "").base
    text, data = base.model.text, base.data
    params = boxed(7, text, data.vocab_size, data.text_length)
    return save(path, hugging_face(params, text)), nn.unbox(params)


def test_members_start_from_the_file_and_keep_their_own_rest(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, params = tiny_checkpoint(repo, tmp_path / "model.safetensors")
    reads: list[str] = []
    load = bert.load_bert
    monkeypatch.setattr(bert, "load_bert", lambda path, *rest: reads.append(path) or load(path, *rest))

    small = {f"model.image.{axis}_depth": "0" for axis in ("spatial", "temporal")}  # quicker to compile

    def program(weights: str) -> Program:
        runs = cohort(repo, weights, **small)
        task = CtClipTask(runs.base, "cpu")
        return Program(task, runs, task.stages()[0], make_mesh(runs.base.host.mesh, 2, 16))

    pretrained, scratch = program(path), program("")
    assert reads == []  # shapes, shardings and axis names need no file
    assert jax.tree.structure(pretrained.state_sharding) == jax.tree.structure(scratch.state_sharding)
    assert jax.tree.leaves(pretrained.state_sharding) == jax.tree.leaves(scratch.state_sharding)
    state, other = pretrained.init(), scratch.init()
    jax.block_until_ready(state)
    assert reads == [path] * 2  # once for each member, on all eight devices
    for member in (0, 1):
        mine = jax.tree.map(lambda x, m=member: np.asarray(x[m]), state.params["text"])
        assert_same_bits(mine, params)
    for name, value in flat(other.params).items():
        if not name.startswith("text/"):  # what the file does not give is as without it
            np.testing.assert_array_equal(flat(state.params)[name], value, err_msg=name)


def test_a_file_that_does_not_fit_is_found_before_training(repo: Path, tmp_path: Path) -> None:
    path, _ = tiny_checkpoint(repo, tmp_path / "model.safetensors")
    for weights, overrides, message in (
        (f"{path}.gone", {}, "there is no file"),
        (path, {"model.text.depth": "2"}, "set model.text.depth=1"),
        (path, {"data.text_length": "33"}, "set data.text_length=32 or less"),
        (path, {"data.vocab_size": "64"}, "set data.vocab_size=128"),
    ):
        task = CtClipTask(cohort(repo, weights, **overrides).base, "cpu")
        with pytest.raises(UserError, match=message):
            task.open(tmp_path)
    with pytest.raises(UserError, match=r"data\.vocab_file"):  # the weights are right, so the data is next
        CtClipTask(cohort(repo, path).base, "cpu").open(tmp_path)


def test_weights_with_another_vocabulary_are_refused(repo: Path) -> None:
    with pytest.raises(UserError, match=r"set data\.tokenizer=wordpiece"):
        CtClipTask(cohort(repo, "x", **{"data.tokenizer": "words"}).base, "cpu")


# ---------------------------------------------------------------------------------------------- parity


@pytest.mark.filterwarnings("default")  # what torch and transformers deprecate is theirs
@pytest.mark.parametrize("wrapper", ["BertModel", "BertForMaskedLM"])
def test_the_function_is_hugging_faces(tmp_path: Path, wrapper: str) -> None:
    torch = pytest.importorskip("torch", reason="torch and transformers are not installed")
    transformers = pytest.importorskip("transformers", reason="torch and transformers are not installed")
    torch.manual_seed(0)
    settings = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80,
        max_position_embeddings=21, initializer_range=0.3,
    )  # fmt: skip
    whole = getattr(transformers, wrapper)(settings).eval()
    with torch.no_grad():  # fresh norms are 1 and 0, biases 0: an exchange would not show
        for parameter in whole.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    whole.save_pretrained(tmp_path, safe_serialization=True)
    params = jax.device_put(nn.unbox(bert.load_bert(str(tmp_path), boxed(2), CONFIG)))
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, (5, LENGTH)).astype(np.int32)
    for row, length in enumerate((17, 11, 7, 3, 1)):
        tokens[row, length:] = 0
    model = whole if wrapper == "BertModel" else whole.bert
    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64))
        theirs = model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state[:, 0].numpy()
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(encoder().apply({"params": params}, jnp.asarray(tokens)))
    error = np.abs(ours - theirs).max()
    print(f"{wrapper}: max error {error:.2e} at |x| <= {np.abs(theirs).max():.2f}")
    assert error < 1e-5
    # The comparison sees what it should: without the mask the padded rows differ.
    with torch.no_grad():
        unmasked = model(input_ids=ids).last_hidden_state[:, 0].numpy()
    assert np.abs(ours - unmasked)[1:].max() > 1e-2
