"""Parameters as a published checkpoint: what `load` reads, and the transformers library."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from jaxablate.disk import write_json
from jaxablate.studies.vqa.qwen3vl.config import Qwen3VlConfig, settings
from jaxablate.studies.vqa.qwen3vl.load import WHOLE
from jaxablate.studies.vqa.qwen3vl.names import Origin, origins


def save(folder: Path, config: Qwen3VlConfig, params: Any) -> None:
    """Writes config.json and model.safetensors, in the types that the parameters have.

    Args:
      folder: is there.
      params: of `Qwen3Vl`, of either loop.
    """
    tensors: dict[str, np.ndarray] = {}
    leaves: dict[Any, Any] = flatten_dict(nn.unbox(dict(params)))
    for key, leaf in leaves.items():
        parts = origins(key, leaf.shape, config)
        values = np.asarray(leaf) if key[2:3] == ("layers",) else np.asarray(leaf)[None]
        for value, origin in zip(values, parts, strict=True):
            pieces = _pieces(value, origin) if key[-1] == "kernel" else value[None]
            for name, piece in zip(origin.names, pieces, strict=True):
                whole = tensors.setdefault(name, np.empty(origin.shape, value.dtype))
                rows = origin.shape[0] // (1 if origin.third is None else 3)
                first = rows * (origin.third or 0)
                whole[first : first + rows] = piece.reshape(rows, *origin.shape[1:])
    save_file(tensors, folder / WHOLE, metadata={"format": "pt"})
    write_json(folder / "config.json", settings(config))


def _pieces(kernel: np.ndarray, origin: Origin) -> np.ndarray:
    """A kernel (inputs…, [halves,] outputs…) as matrices (halves, outputs, inputs)."""
    inputs = math.prod(origin.shape[1:])
    return kernel.reshape(inputs, len(origin.names), -1).transpose(1, 2, 0)
