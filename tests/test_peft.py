"""Adapters on disk as peft writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxablate.errors import UserError
from jaxablate.nn import lora
from jaxablate.nn.attention import Attention
from jaxablate.nn.block import Stack
from jaxablate.nn.lora import Lora
from jaxablate.nn.projections import projections
from jaxablate.peft import load_adapter, save_adapter
from tests.lines import one_line

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 5, 16))
SPEC = Lora(("*/attention/*",), rank=2, alpha=6.0, dropout=0.05)
BASE = "Org/Base-1B"
PEFT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + Attention(heads=4, head_dim=8, kv_heads=2, impl="reference", name="attention")(x)


def model(loop: Any) -> Stack:
    return Stack(Layer, 2, loop=loop)


def names(loop: str) -> dict[str, str | list[str]]:
    if loop == "scan":
        return {f"layers/attention/{k}": [f"layers.{i}.{v}" for i in range(2)] for k, v in PEFT.items()}
    return {f"layer_{i}/attention/{k}": f"layers.{i}.{v}" for i in range(2) for k, v in PEFT.items()}


def made(loop: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Base and adapter, trained a little."""
    with projections(adapters=SPEC):
        params = nn.unbox(model(loop).init(KEY, X)["params"])
    base, adapter = lora.split(params)
    return base, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), adapter)


@pytest.fixture(scope="module", params=["unrolled", "scan"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    folder = tmp_path_factory.mktemp("adapter")
    _, adapter = made(request.param)
    save_adapter(folder, adapter, SPEC, names(request.param), BASE)
    return request.param, folder, adapter


def test_what_is_saved_comes_back_bit_for_bit(saved) -> None:
    loop, folder, adapter = saved
    like = jax.eval_shape(lambda: adapter)
    back = load_adapter(folder, like, SPEC, names(loop), f"/mnt/models/{BASE.rpartition('/')[2]}/")
    jax.tree.map(np.testing.assert_array_equal, back, adapter)


def test_the_files_have_the_names_and_shapes_of_peft(saved) -> None:
    loop, folder, adapter = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    shapes = {f"lora_{letter}": {} for letter in "AB"}
    for name, value in tensors.items():
        prefix, layer, module, factor, weight = name.rsplit(".", 4)
        assert (prefix, weight) == ("base_model.model.layers", "weight")
        shapes[factor][int(layer), module] = value.shape
    assert len(tensors) == 16
    assert shapes["lora_A"][1, "q_proj"] == (2, 16)
    assert shapes["lora_B"][1, "q_proj"] == (32, 2)
    assert shapes["lora_B"][0, "k_proj"] == (16, 2)
    assert shapes["lora_A"][0, "o_proj"] == (2, 32)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 6.0, 0.05)
    assert config["base_model_name_or_path"] == BASE
    assert "layers.1.q_proj" in config["target_modules"]
    a = adapter["layers"]["attention"]["q"] if loop == "scan" else adapter["layer_1"]["attention"]["q"]
    a = np.asarray(a[lora.A]["kernel"])[-1] if loop == "scan" else np.asarray(a[lora.A]["kernel"])
    np.testing.assert_array_equal(tensors["base_model.model.layers.1.q_proj.lora_A.weight"], a.T)


# ------------------------------------------------------------------------------------------ bad files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(tmp_path, made("unrolled")[1], SPEC, names("unrolled"), BASE)
    return tmp_path


def refused(folder: Path, spec: Lora = SPEC, base: str = BASE) -> str:
    like = jax.eval_shape(lambda: made("unrolled")[1])
    with pytest.raises(UserError) as error:
        load_adapter(folder, like, spec, names("unrolled"), base)
    return one_line(error)


def test_all_wrong_tensors_are_named_in_one_line(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors, stem = load_file(file), "base_model.model.layers"
    del tensors[f"{stem}.0.q_proj.lora_A.weight"]
    tensors[f"{stem}.0.gate_proj.lora_A.weight"] = np.zeros((2, 16), np.float32)
    tensors[f"{stem}.1.v_proj.lora_B.weight"] = np.zeros((32, 2), np.float32)
    tensors[f"{stem}.1.k_proj.lora_B.weight"] = np.zeros((16, 2), np.int8)
    save_file(tensors, file)
    said = refused(folder)
    assert f"lacks {stem}.0.q_proj.lora_A.weight" in said
    assert f"has the unexpected {stem}.0.gate_proj.lora_A.weight" in said
    assert f"has other shapes: {stem}.1.v_proj.lora_B.weight (32, 2), not (16, 2)" in said
    assert f"{stem}.1.k_proj.lora_B.weight I8" in said
    assert str(file) in said


def test_an_adapter_of_another_model_names_a_few_tensors_and_counts_the_rest(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({k.replace("model.layers", "model.blocks"): v for k, v in load_file(file).items()}, file)
    assert refused(folder).count("and 12 more") == 2


@pytest.mark.parametrize(
    "change,says",
    [
        (
            {"base_model_name_or_path": "Org/Other-1B"},
            "belongs to the base 'Org/Other-1B', not to 'Org/Base-1B'",
        ),
        ({"r": 8}, "r=8, but the model is built with rank=2; set the adapter's rank"),
        ({"lora_alpha": 2}, "lora_alpha=2, but the model is built with alpha=6.0"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported, only 'none'"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern={'q_proj': 3} is not supported"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type='PROMPT_TUNING' is not supported"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(folder: Path, change: dict[str, Any], says: str) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"use_rslora": None}))  # as good as false
    like = jax.eval_shape(lambda: made("unrolled")[1])
    load_adapter(folder, like, SPEC, names("unrolled"), BASE)
    file.write_text(json.dumps(config | change))
    assert says in refused(folder)


def test_files_that_are_missing_or_torn(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert "cannot be read as safetensors" in refused(folder)
    file.unlink()
    assert "there is no such file; give a folder that peft's save_pretrained wrote" in refused(folder)
    (folder / "adapter_config.json").write_text("[]")
    assert "is no JSON object" in refused(folder)
    (folder / "adapter_config.json").unlink()
    assert "adapter_config.json: there is no such file; give a folder" in refused(folder)


def test_bf16_is_converted_to_what_the_model_has(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    low = {k: v.astype(jnp.bfloat16) for k, v in load_file(file).items()}
    save_file(low, file)
    _, adapter = made("unrolled")
    back = load_adapter(folder, adapter, SPEC, names("unrolled"), BASE)
    wanted = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), adapter)
    jax.tree.map(np.testing.assert_array_equal, back, wanted)


def test_a_projection_without_a_name_is_a_mistake_of_the_model(tmp_path: Path) -> None:
    given = {k: v for k, v in names("unrolled").items() if k != "layer_1/attention/v"}
    with pytest.raises(ValueError, match="projection layer_1/attention/v"):
        save_adapter(tmp_path, made("unrolled")[1], SPEC, given, BASE)
