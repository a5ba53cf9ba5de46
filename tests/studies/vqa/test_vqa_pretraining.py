"""The base that is trained on captions: once for all arms, kept as a checkpoint, refused if it came to nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from jaxablate.errors import UserError
from jaxablate.studies.vqa import base, pretraining
from jaxablate.studies.vqa.config import VqaData, VqaModel
from jaxablate.studies.vqa.model import BASE, Vlm
from tests.lines import one_line

MODEL = VqaModel(size="tiny", base="pretrained", storage="float", base_steps=3, base_batch_size=4)
DATA = VqaData(source="synthetic", wording="short", max_text=192, image_tokens=36, scenes=2, sequences=3)

pytestmark = pytest.mark.standard_dtypes


@pytest.mark.slow
def test_a_base_is_trained_once_and_read_by_every_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pretraining.pretrained(MODEL, DATA, tmp_path)

    def again(*_: object) -> None:
        raise AssertionError("it is there already")

    monkeypatch.setattr(pretraining, "train", again)
    for options in (
        {},
        {"loop": "unrolled", "storage": "int8", "lora_rank": 8, "attention_impl": "reference"},
    ):
        model = dataclasses.replace(MODEL, **options)
        vlm = Vlm.of(model)
        found = base.load_base(model, dataclasses.replace(DATA, epochs=1), vlm, tmp_path)
        shapes = jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), nn.unbox(vlm.abstract_base()))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == shapes
    untrained = base.draw(Vlm.of(MODEL), 0)[BASE]["decoder"]["final_norm"]["scale"]
    trained = base.read(folder, Vlm.of(MODEL))[BASE]["decoder"]["final_norm"]["scale"]
    assert 0 < np.abs(trained - untrained).max() < 0.1
    with pytest.raises(AssertionError, match="it is there already"):
        pretraining.pretrained(dataclasses.replace(MODEL, base_seed=1), DATA, tmp_path)


def test_a_base_that_diverged_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "train", lambda cohort: [{"state": "diverged", "run_id": "seed0"}])
    with pytest.raises(
        UserError, match=r"ended as 'diverged'; lower config.model.base_learning_rate=0.003"
    ) as error:
        pretraining.pretrained(MODEL, DATA, tmp_path)
    assert "/vqa_base/captions/seed0: the base's training" in one_line(error)
    assert not list((tmp_path / "vqa").glob("base-?*/model.safetensors"))
