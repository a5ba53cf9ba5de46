"""Adapters of runs as peft's files: bit for bit, in one loop or another, and only beside their own base."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxablate.errors import UserError
from jaxablate.studies.vqa import adapters
from jaxablate.studies.vqa.config import VqaData, VqaModel
from jaxablate.studies.vqa.model import Vlm
from tests.lines import one_line

MODEL = VqaModel(size="tiny", base="pretrained", storage="float")
DATA = VqaData(source="synthetic", wording="short", max_text=192, image_tokens=36)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("adapter") / "new"
    adapters.export(at, nn.unbox(Vlm.of(MODEL).init_adapter(jax.random.key(3))), MODEL, DATA)
    return at


def test_an_adapter_comes_back_in_either_loop(folder: Path) -> None:
    for loop in ("scan", "unrolled"):
        model = dataclasses.replace(MODEL, loop=loop)
        wanted = nn.unbox(Vlm.of(model).init_adapter(jax.random.key(3)))
        found = nn.unbox(adapters.read(folder, model, DATA))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_the_files_hold_the_adapter_alone(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sum(x.size for x in tensors.values()) == 4_096
    assert min(tensors) == "base_model.model.model.language_model.layers.0.self_attn.k_proj.lora_A.weight"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8.0, 0.05)


@pytest.mark.parametrize(
    "model, data",
    [
        ({"base_seed": 1}, {}),
        ({"base_steps": 200}, {}),
        ({"base": "folder", "base_path": "Org/Other"}, {}),
        ({}, {"seed": 1}),
    ],
)
def test_an_adapter_of_another_base_is_one_line(folder: Path, model: dict, data: dict) -> None:
    other, scenes = dataclasses.replace(MODEL, **model), dataclasses.replace(DATA, **data)
    said = r"the adapter belongs to the base 'jaxablate/vqa-tiny-pretrained-\w+', not to"
    with pytest.raises(UserError, match=said) as error:
        adapters.read(folder, other, scenes)
    one_line(error)


def test_what_does_not_bear_on_the_base_makes_no_other(folder: Path) -> None:
    storage = dataclasses.replace(MODEL, attention_impl="reference", base_path="elsewhere")
    adapters.read(folder, storage, dataclasses.replace(DATA, epochs=1, max_samples=3))
