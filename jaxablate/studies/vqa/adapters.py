"""Adapters of finished runs as files that the library peft reads, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxablate import peft
from jaxablate.nn.lora import Tree
from jaxablate.studies.vqa import base
from jaxablate.studies.vqa.config import VqaData, VqaModel
from jaxablate.studies.vqa.model import Vlm


def export(folder: Path, adapter: Tree, model: VqaModel, data: VqaData) -> None:
    """Writes one adapter: adapter_model.safetensors and adapter_config.json, which names the base.

    Args:
      folder: is made if need be; the two files in it are replaced.
      adapter: `params` of a run, or those of one of its experts.
    """
    vlm = Vlm.of(model)
    peft.save_adapter(folder, adapter, vlm.lora, vlm.adapter_names, base.name(model, data))


def read(folder: Path, model: VqaModel, data: VqaData) -> dict[str, Any]:
    """An adapter from a folder that `export` or peft wrote, as `Vlm` takes it.

    Raises:
      UserError: see `peft.load_adapter`; above all that it belongs to another base.
    """
    vlm = Vlm.of(model)
    return peft.load_adapter(
        folder, vlm.abstract_adapter(), vlm.lora, vlm.adapter_names, base.name(model, data)
    )
