"""Low-rank adapters on disk as the library peft writes them: adapter_model.safetensors and adapter_config.json.

A module of the base model there has the tensors `base_model.model.<module>.lora_A.weight` (rank, inputs) and
`base_model.model.<module>.lora_B.weight` (outputs, rank). What our projections are called in it is said by a mapping
from their paths, such as

    {"decoder/layer_0/block/attention/q": "model.layers.0.self_attn.q_proj"}

and for parameters that are stacked along their first axis, by several names, one of each layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jaxablate import disk
from jaxablate.errors import UserError
from jaxablate.nn import lora
from jaxablate.nn.lora import Lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FLOATS = ("F32", "F16", "BF16")
Names = Mapping[str, str | Sequence[str]]  # path of a projection -> what the base model calls it

# What we do not compute, and the value which says that an adapter does without.
PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
}


@dataclass(frozen=True)
class _Factor:
    """One of our arrays and one of its layers, as a tensor of the file."""

    path: tuple[str, ...]
    layer: int | None  # None: not stacked
    shape: tuple[int, int]  # (outputs, inputs), as torch has it


def save_adapter(folder: Path, adapter: lora.Tree, spec: Lora, names: Names, base: str) -> None:
    """Writes an adapter for peft. The tensors keep their dtype and their bits.

    Args:
      folder: is made if need be; the two files in it are replaced.
      adapter: the adapters alone, as `lora.split` gives them.
      names: see the module; of every projection with an adapter.
      base: name of the model that the adapter belongs to, such as `Qwen/Qwen3-VL-8B-Instruct`.
    """
    arrays: dict[Any, Any] = flatten_dict(nn.unbox(dict(adapter)))
    tensors = {}
    for name, factor in _factors(adapter, names).items():
        value = np.asarray(arrays[factor.path])
        value = value if factor.layer is None else value[factor.layer]
        tensors[name] = np.ascontiguousarray(value.reshape(factor.shape[::-1]).T)
    modules = sorted({_module(name) for name in tensors})
    config = {
        **PLAIN,
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": modules,  # in full: a suffix such as q_proj could be another tower's as well
        "task_type": None,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    disk.make_private(folder)
    disk.write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    disk.write_json(folder / CONFIG, config)


def load_adapter(folder: Path, like: lora.Tree, spec: Lora, names: Names, base: str) -> dict[str, Any]:
    """The adapter that peft, or `save_adapter`, wrote, in the structure of ours.

    Args:
      like: the adapters of the model, of which structure, shapes and dtypes are used; axis names stay.
      spec: the adapters that the model is built with; rank and alpha must be the file's.
      names: see the module.
      base: name of the model. Of the file's only what stands behind the last slash is compared, since a copy of a
        model may lie anywhere; a file may leave it out.

    Raises:
      UserError: a file is missing or damaged; the adapter is of another base or kind, or has another rank or alpha;
        tensors are missing, unexpected, of another shape or quantised, all of which are named.
    """
    _check_config(folder / CONFIG, spec, base)
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; give a folder that peft's save_pretrained wrote")
    factors = _factors(like, names)
    try:
        with safe_open(file, framework="flax") as tensors:
            _check_tensors(file, tensors, factors)
            found = {factor: tensors.get_tensor(name) for name, factor in factors.items()}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: cannot be read as safetensors ({reason}); copy it again") from None
    loaded = {}
    for path, boxed in flatten_dict(dict(like)).items():
        target = nn.unbox(boxed)
        parts = [value.T for factor, value in found.items() if factor.path == path]  # layers in order
        value = jnp.stack(parts).reshape(target.shape).astype(target.dtype)
        loaded[path] = nn.meta.replace_boxed(boxed, value)
    return unflatten_dict(loaded)


# ------------------------------------------------------------------------------------ names and checks


def _factors(adapter: lora.Tree, names: Names) -> dict[str, _Factor]:
    """Every tensor that the file has of these adapters."""
    arrays: dict[Any, Any] = flatten_dict(nn.unbox(dict(adapter)))
    factors = {}
    for module in lora.adapted(adapter):
        given = names.get("/".join(module))
        if given is None:
            raise ValueError(f"no name in the base model is given for the projection {'/'.join(module)}")
        stacked = not isinstance(given, str)
        layers = list(enumerate(given)) if stacked else [(None, given)]
        for part, letter in ((lora.A, "A"), (lora.B, "B")):
            path = (*module, part, "kernel")
            shape = tuple(arrays[path].shape)
            sizes = shape[1:] if stacked else shape
            if stacked and shape[0] != len(layers):
                raise ValueError(
                    f"{'/'.join(module)}: {shape[0]} layers are stacked, {len(layers)} are named"
                )
            rank = sizes[-1] if part == lora.A else sizes[0]
            rest = math.prod(sizes) // rank
            torch_shape = (rank, rest) if part == lora.A else (rest, rank)
            for layer, name in layers:
                factors[f"base_model.model.{name}.lora_{letter}.weight"] = _Factor(path, layer, torch_shape)
    return factors


def _module(tensor: str) -> str:
    return tensor.removeprefix("base_model.model.").rsplit(".", 2)[0]


def _check_config(file: Path, spec: Lora, base: str) -> None:
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; give a folder that peft's save_pretrained wrote")
    found = disk.read_json(file)
    if not isinstance(found, dict):
        raise UserError(f"{file}: is no JSON object; give a folder that peft's save_pretrained wrote")
    theirs = found.get("base_model_name_or_path") or base
    if str(theirs).rstrip("/").rpartition("/")[2] != base.rstrip("/").rpartition("/")[2]:
        raise UserError(f"{file}: the adapter belongs to the base '{theirs}', not to '{base}'; use that base")
    for name, plain in PLAIN.items():
        if name in found and found[name] != plain and (found[name] or plain):
            raise UserError(
                f"{file}: {name}={found[name]!r} is not supported, only {plain!r}; use another adapter"
            )
    for name, ours, field in (("r", spec.rank, "rank"), ("lora_alpha", spec.alpha, "alpha")):
        if found.get(name) != ours:
            raise UserError(
                f"{file}: {name}={found.get(name)!r}, but the model is built with {field}={ours}; set the adapter's "
                f"{field} to the file's"
            )


def _check_tensors(file: Path, tensors: Any, factors: Mapping[str, _Factor]) -> None:
    """Names all that is wrong, in one line."""
    there, wrong = set(tensors.keys()), []
    if missing := sorted(factors.keys() - there):
        wrong.append(f"lacks {_listed(missing)}")
    if unexpected := sorted(there - factors.keys()):
        wrong.append(f"has the unexpected {_listed(unexpected)}")
    shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in sorted(there & factors.keys())}
    if odd := [
        f"{n} {shape}, not {factors[n].shape}" for n, shape in shapes.items() if shape != factors[n].shape
    ]:
        wrong.append(f"has other shapes: {_listed(odd)}")
    kinds = {name: tensors.get_slice(name).get_dtype() for name in shapes}
    if odd := [f"{name} {kind}" for name, kind in kinds.items() if kind not in FLOATS]:
        wrong.append(f"has other dtypes than {', '.join(FLOATS)}: {_listed(odd)}")
    if wrong:
        raise UserError(f"{file}: {'; it '.join(wrong)}; use an adapter of this model and these targets")


def _listed(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
