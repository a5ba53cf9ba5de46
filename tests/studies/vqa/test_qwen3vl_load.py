"""Published weights: every number arrives where it belongs, in the asked type; what does not fit is one line."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxablate.errors import UserError
from jaxablate.studies.vqa.qwen3vl import load, names
from jaxablate.studies.vqa.qwen3vl import model as qwen
from jaxablate.studies.vqa.qwen3vl.config import PUBLISHED, QWEN3_VL_8B, Qwen3VlConfig, read_config
from jaxablate.studies.vqa.qwen3vl.model import Qwen3Vl

Tensors = dict[str, np.ndarray]
SETTINGS: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "image_token_id": 29,
    "tie_word_embeddings": False,
    "text_config": {
        "vocab_size": 30,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5_000_000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
    },
    "vision_config": {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": 24,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "spatial_merge_size": 2,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [1],
        "hidden_act": "gelu_pytorch_tanh",
    },
}


def published(dtype: str = "float32") -> Tensors:
    """Random tensors under the published names."""
    text, vision = "model.language_model", "model.visual"
    shapes: dict[str, tuple[int, ...]] = {
        f"{text}.embed_tokens.weight": (30, 24),
        f"{text}.norm.weight": (24,),
        "lm_head.weight": (30, 24),
        f"{vision}.patch_embed.proj.weight": (16, 3, 2, 4, 4),
        f"{vision}.patch_embed.proj.bias": (16,),
        f"{vision}.pos_embed.weight": (25, 16),
    }
    for i in range(3):
        at = f"{text}.layers.{i}"
        for name, shape in {
            "self_attn.q_proj": (32, 24),
            "self_attn.k_proj": (16, 24),
            "self_attn.v_proj": (16, 24),
            "self_attn.o_proj": (24, 32),
            "self_attn.q_norm": (16,),
            "self_attn.k_norm": (16,),
            "mlp.gate_proj": (32, 24),
            "mlp.up_proj": (32, 24),
            "mlp.down_proj": (24, 32),
            "input_layernorm": (24,),
            "post_attention_layernorm": (24,),
        }.items():
            shapes[f"{at}.{name}.weight"] = shape
        at = f"{vision}.blocks.{i}"
        for name, shape in {
            "attn.qkv": (48, 16),
            "attn.proj": (16, 16),
            "mlp.linear_fc1": (40, 16),
            "mlp.linear_fc2": (16, 40),
            "norm1": (16,),
            "norm2": (16,),
        }.items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
    for at, norm in ((f"{vision}.merger", 16), (f"{vision}.deepstack_merger_list.0", 64)):
        for name, shape in {"norm": (norm,), "linear_fc1": (64, 64), "linear_fc2": (24, 64)}.items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(jnp.dtype(dtype)) for name, shape in shapes.items()}


def save(folder: Path, tensors: Tensors, settings: dict[str, Any] | None = None, shards: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings or SETTINGS))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / load.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@functools.cache
def shapes_of(config: Qwen3VlConfig, loop: Any = "unrolled") -> Any:
    return qwen.shapes(Qwen3Vl(config, loop=loop))


def read(folder: Path, dtype: Any = "kept", loop: str = "unrolled", **options: Any) -> Any:
    config = read_config(folder)
    return nn.unbox(load.load(folder, config, shapes_of(config, loop), dtype=dtype, **options))


@pytest.mark.parametrize("shards", [1, 3])
def test_every_number_has_its_place(tmp_path: Path, shards: int) -> None:
    tensors = published()
    params = read(save(tmp_path, tensors, shards=shards))
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(x.size for x in tensors.values())
    text = params["decoder"]["stage_1"]["layer_1"]["block"]  # cut behind layer 0: the third of all
    at = "model.language_model.layers.2"
    x = np.random.default_rng(1).normal(size=24).astype(np.float32)
    for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj")):
        found = np.einsum("d,dhe->he", x, text["attention"][ours]["kernel"]).ravel()
        np.testing.assert_allclose(
            found, tensors[f"{at}.self_attn.{theirs}.weight"] @ x, rtol=1e-4, atol=1e-5
        )
    wi, gate, up = text["ffn"]["wi"]["kernel"], "mlp.gate_proj.weight", "mlp.up_proj.weight"
    np.testing.assert_array_equal(wi[:, 0].T, tensors[f"{at}.{gate}"])
    np.testing.assert_array_equal(wi[:, 1].T, tensors[f"{at}.{up}"])
    np.testing.assert_array_equal(
        text["attention"]["out"]["kernel"].reshape(32, 24).T, tensors[f"{at}.self_attn.o_proj.weight"]
    )
    vision = params["tower"]["stage_1"]["layer_0"]["block"]["attention"]  # cut behind layer 1
    fused, bias = (tensors[f"model.visual.blocks.2.attn.qkv.{leaf}"] for leaf in ("weight", "bias"))
    np.testing.assert_array_equal(vision["v"]["kernel"].reshape(16, 16).T, fused[32:])
    np.testing.assert_array_equal(vision["k"]["bias"].ravel(), bias[16:32])


def test_stacked_layers_are_the_same_numbers(tmp_path: Path) -> None:
    folder = save(tmp_path, published())
    one, stacked = read(folder), read(folder, loop="scan")
    for part, stage in (("decoder", "stage_1"), ("tower", "stage_0")):
        layers = [one[part][stage][f"layer_{i}"] for i in range(2)]
        jax.tree.map(
            lambda a, b, c: np.testing.assert_array_equal(a, np.stack([b, c])),
            stacked[part][stage]["layers"],
            *layers,
        )


def test_types_are_kept_or_converted(tmp_path: Path) -> None:
    halves = save(tmp_path / "halves", published("bfloat16"))
    kept = read(halves)
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype("bfloat16")}
    wide = read(halves, "float32")
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(np.float32), b), kept, wide)
    mixed = published()
    mixed["model.language_model.layers.0.mlp.up_proj.weight"] = np.zeros((32, 24), np.float16)
    folder = save(tmp_path / "mixed", mixed)
    assert read(folder, "bfloat16")["head"]["kernel"].dtype == jnp.dtype("bfloat16")
    with pytest.raises(UserError, match=r"gate_proj.* are stored as F16, F32; choose one type"):
        read(folder)


def test_each_parameter_is_handed_on_at_once(tmp_path: Path) -> None:
    seen = []

    def place(key: tuple[str, ...], value: np.ndarray) -> int:
        seen.append("/".join(key))
        return value.size

    sizes = read(save(tmp_path, published()), place=place)
    assert len(seen) == len(jax.tree.leaves(sizes)) == len(set(seen))
    assert "decoder/stage_0/layer_0/block/attention/q/kernel" in seen


def test_a_tied_model_has_no_head(tmp_path: Path) -> None:
    tied = SETTINGS | {"tie_word_embeddings": True}
    tensors = published()
    for name, given in (
        ("with", tensors),
        ("without", {k: v for k, v in tensors.items() if k != "lm_head.weight"}),
    ):
        assert "head" not in read(save(tmp_path / name, given, tied))


# ---------------------------------------------------------------------------------------------- faults

GATE, NORM = "model.language_model.layers.1.mlp.gate_proj.weight", "model.language_model.norm.weight"


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda t: {k: v for k, v in t.items() if k not in (GATE, NORM)}, [f"missing: {GATE}, {NORM};"]),
        (lambda t: t | {"extra.weight": np.zeros(3, np.float32)}, ["unexpected: extra.weight;"]),
        (lambda t: t | {NORM: np.zeros(25, np.float32)}, [f"wrong: {NORM} has shape (25,), not (24,);"]),
        (lambda t: t | {GATE: np.zeros((32, 24), np.int8)}, [f"{GATE} holds I8, not F32", "not quantised"]),
        (
            lambda t: {k.replace("gate", "get"): v for k, v in t.items()},
            ["missing:", "unexpected:", "layers.0.mlp.get_proj.weight"],
        ),
        (lambda t: {"x": np.zeros(1, np.float32)}, ["missing: lm_head.weight", "and 83 more", "unexpected: x"]),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_one_line(
    tmp_path: Path, change: Callable[[Tensors], Tensors], parts: list[str]
) -> None:
    folder = save(tmp_path, change(published()))
    config = read_config(folder)
    shapes = shapes_of(config)
    for call in (
        lambda: load.check(folder, config, shapes),
        lambda: load.load(folder, config, shapes, dtype="kept"),
    ):
        with pytest.raises(UserError) as error:
            call()
        text = str(error.value)
        assert "\n" not in text and str(folder) in text
        for part in parts:
            assert part in text


def shard_lost(folder: Path) -> None:
    (folder / "model-1.safetensors").unlink()


def shard_cut(folder: Path) -> None:
    file = folder / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def index_lies(folder: Path) -> None:
    index = json.loads((folder / load.INDEX).read_text())
    index["weight_map"][NORM] = "model-0.safetensors"
    index["weight_map"][GATE] = "model-0.safetensors"
    (folder / load.INDEX).write_text(json.dumps(index))


def index_leads_away(folder: Path) -> None:
    (folder / load.INDEX).write_text(json.dumps({"weight_map": {NORM: "../other.safetensors"}}))


def nothing_there(folder: Path) -> None:
    for file in (*folder.glob("*.safetensors"), folder / load.INDEX):
        file.unlink()


@pytest.mark.parametrize(
    "damage, pattern",
    [
        (shard_lost, r"model-1\.safetensors: there is no such file, which .*index\.json names; fetch"),
        (shard_cut, r"model-1\.safetensors: cannot be read as safetensors \(.*\); fetch it again"),
        (index_lies, r"index\.json: says that model-0\.safetensors holds .*, which it does not"),
        (index_leads_away, r"'\.\./other\.safetensors' in weight_map is no name of a file"),
        (nothing_there, r"model\.safetensors: there is no such file, nor a model\.safetensors\.index\.json"),
    ],
)
def test_files_that_are_damaged_are_one_line(
    tmp_path: Path, damage: Callable[[Path], None], pattern: str
) -> None:
    folder = save(tmp_path, published())
    config = read_config(folder)
    shapes = shapes_of(config)
    load.check(folder, config, shapes)  # before, nothing is wrong
    damage(folder)
    with pytest.raises(UserError, match=pattern) as error:
        load.check(folder, config, shapes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("", {"model_type": "qwen2_vl"}, "model_type='qwen2_vl', but only 'qwen3_vl'"),
        ("", {"image_token_id": None}, "image_token_id=None must be a whole number"),
        ("text_config", {"hidden_act": "gelu"}, "text_config.hidden_act='gelu'"),
        ("text_config", {"attention_bias": True}, "attention_bias=True"),
        ("text_config", {"head_dim": "16"}, "head_dim='16' must be a whole number"),
        ("text_config", {"rope_scaling": {"mrope_section": [4, 2, 1]}}, "[4, 2, 1] must sum to half"),
        ("text_config", {"rope_scaling": {"rope_type": "yarn"}}, "rotary positions"),
        ("text_config", {"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
        ("vision_config", {"out_hidden_size": 32}, "out_hidden_size=32 must be"),
        ("vision_config", {"num_position_embeddings": 26}, "=26 must be a square"),
        ("vision_config", {"deepstack_visual_indexes": [2, 1]}, "[2, 1] must rise below depth=3"),
        ("vision_config", {"deepstack_visual_indexes": [3]}, "[3] must rise below depth=3"),
        ("vision_config", {"num_heads": 3}, "num_heads=3"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_is_one_line(
    tmp_path: Path, part: str, change: dict[str, Any], message: str
) -> None:
    settings = SETTINGS | (change if not part else {part: SETTINGS[part] | change})
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_a_config_that_is_missing_or_short_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file; give the folder"):
        read_config(tmp_path)
    for text in ("[]", '{"model_type": "qwen3_vl"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="lacks "):
            read_config(tmp_path)


def test_both_spellings_of_rotary_positions(tmp_path: Path) -> None:
    text = {k: v for k, v in SETTINGS["text_config"].items() if k not in ("rope_theta", "rope_scaling")}
    text["rope_parameters"] = {"rope_theta": 5_000_000, "mrope_section": [4, 2, 2], "rope_type": "default"}
    for name, settings in (("old", SETTINGS), ("new", SETTINGS | {"text_config": text})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    assert read_config(tmp_path / "old") == read_config(tmp_path / "new")


# ---------------------------------------------------------------------------------------------- names


def test_names_of_the_published_models() -> None:
    """Every layer is named once, the fused matrices three times, at the sizes of the published models."""
    for config in PUBLISHED.values():
        shapes = nn.unbox(shapes_of(config, "scan"))
        found: dict[str, int] = {}
        size = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
            for origin in names.origins(tuple(k.key for k in path), leaf.shape, config):
                for name in origin.names:
                    found[name] = found.get(name, 0) + 1
                size += math.prod(origin.shape) * len(origin.names) // (1 if origin.third is None else 3)
        assert size == sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
        assert {n for n, times in found.items() if times != 1} == {n for n in found if ".attn.qkv." in n}
        layers = {int(m[1]) for n in found if (m := re.search(r"language_model\.layers\.(\d+)\.", n))}
        assert layers == set(range(config.text.depth))


def test_a_projection_is_named_as_adapters_name_it() -> None:
    path = ("decoder", "stage_3", "layer_4", "block", "attention", "q")
    assert names.module_names(path, QWEN3_VL_8B) == "model.language_model.layers.7.self_attn.q_proj"
    stacked = ("decoder", "stage_3", "layers", "block", "attention", "out")
    wanted = tuple(f"model.language_model.layers.{i}.self_attn.o_proj" for i in range(3, 36))
    assert names.module_names(stacked, QWEN3_VL_8B) == wanted
    halves = ("decoder", "stage_0", "layer_0", "block", "ffn", "wi")
    with pytest.raises(ValueError, match="has no name of its own"):
        names.module_names(halves, QWEN3_VL_8B)
