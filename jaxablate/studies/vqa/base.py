"""The frozen base: trained on captions here, read from a published checkpoint, or drawn; then stored as asked.

Each parameter is put into storage as soon as it is there, a layer at a time: the whole model is never held as numbers
of full width.
"""

from __future__ import annotations

import functools
import zlib
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from jaxablate.errors import UserError
from jaxablate.nn import quantized
from jaxablate.nn.quantized import Stored
from jaxablate.studies.vqa.config import VqaData, VqaModel
from jaxablate.studies.vqa.model import BASE, Vlm
from jaxablate.studies.vqa.pretraining import caption_run, pretrained
from jaxablate.studies.vqa.qwen3vl import load
from jaxablate.studies.vqa.qwen3vl.config import Qwen3VlConfig, read_config
from jaxablate.studies.vqa.qwen3vl.model import Variables
from jaxablate.studies.vqa.qwen3vl.names import Key

DEVIATION = 0.02  # of matrices that are drawn, as those of published models began


def load_base(model: VqaModel, data: VqaData, vlm: Vlm, cache: Path) -> Variables:
    """The frozen collections of a model, as `Vlm.abstract_base` describes them.

    Args:
      data: of which the captions are, where the base is trained on them.
      vlm: of `model`.

    Raises:
      UserError: the checkpoint is missing, damaged or of other sizes; training on captions came to nothing.
    """
    if model.base == "random":
        return draw(vlm, model.base_seed)
    return read(_folder(model, data, cache), vlm)


def name(model: VqaModel, data: VqaData) -> str:
    """What an adapter calls its base: the folder of the checkpoint, or what tells apart those that are made here."""
    if model.base == "folder":
        return model.base_path.rstrip("/")
    which = caption_run(model, data, Path()).fingerprint if model.base == "pretrained" else model.base_seed
    return f"jaxablate/vqa-{model.size}-{model.base}-{which}"


# ------------------------------------------------------------------------------------------ checkpoints


def read(folder: Path, vlm: Vlm) -> Variables:
    """The frozen collections from a checkpoint's folder.

    Raises:
      UserError: it is missing, damaged, or of another model.
    """
    sizes = _checked(folder, vlm.config)
    stored = _flat(vlm.abstract_base()[quantized.COLLECTION])

    def place(key: Key, value: np.ndarray) -> Any:
        return _stored(value, stored[key]) if key in stored else value

    dtype: Any = jnp.dtype(vlm.dtype).name
    shapes = nn.unbox(vlm.plain_shapes())
    return _parted(flatten_dict(load.load(folder, sizes, shapes, dtype=dtype, place=place)))


def _folder(model: VqaModel, data: VqaData, cache: Path) -> Path:
    return Path(model.base_path).expanduser() if model.base == "folder" else pretrained(model, data, cache)


def _checked(folder: Path, wanted: Qwen3VlConfig) -> Qwen3VlConfig:
    """`wanted`, if the checkpoint is of these sizes."""
    found = read_config(folder)
    for part in ("vision", "text"):
        ours, theirs = vars(getattr(wanted, part)), vars(getattr(found, part))
        for field, value in ours.items():
            if theirs[field] != value and not field.endswith("_impl"):
                raise UserError(
                    f"{folder / 'config.json'}: the {part} part has {field}={theirs[field]}, but model.size asks for "
                    f"{value}; give the checkpoint of that size"
                )
    if found.image_token != wanted.image_token:
        raise UserError(
            f"{folder / 'config.json'}: image_token_id={found.image_token} must be {wanted.image_token}; give a "
            f"published checkpoint"
        )
    return wanted


def _stored(value: np.ndarray, like: Stored) -> Stored:
    """A kernel in storage, on the host; of stacked layers one after another."""
    n_out, n_in = like.shape
    stacked = like.codes.ndim > 2
    layers = [
        jax.device_get(_quantize(layer.reshape(n_in, n_out).T, kind=quantized.kind_of(like)))
        for layer in (value if stacked else value[None])
    ]
    return jax.tree.map(lambda *parts: np.stack(parts), *layers) if stacked else layers[0]


_quantize = jax.jit(quantized.quantize, static_argnames="kind")


# -------------------------------------------------------------------------------------------- drawn


def draw(vlm: Vlm, seed: int) -> Variables:
    """A base that knows nothing: normal matrices of deviation 0.02, norms of one, biases of zero; on the device."""
    abstract = vlm.abstract_base()
    rng, drawn = jax.random.key(seed), {}
    for path, like in {**_flat(abstract[BASE]), **_flat(abstract[quantized.COLLECTION])}.items():
        key = jax.random.fold_in(rng, zlib.crc32("/".join(path).encode()))
        stack = 1 if path[2:3] == ("layers",) else 0  # axes of stacked layers
        if isinstance(like, Stored):
            layers = like.codes.shape[:stack]
            drawn[path] = _matrices(key, layers, like.shape, jnp.float32, quantized.kind_of(like))
        elif path[-1].endswith("scale"):
            drawn[path] = jnp.ones(like.shape, like.dtype)
        elif path[-1] == "bias":
            drawn[path] = jnp.zeros(like.shape, like.dtype)
        else:
            drawn[path] = _matrices(key, like.shape[:stack], like.shape[stack:], like.dtype, None)
    return _parted(drawn)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _matrices(
    key: jax.Array, layers: tuple[int, ...], shape: tuple[int, ...], dtype: Any, kind: quantized.Kind | None
) -> Any:
    """Normal numbers, or what is stored of them; those of stacked layers are drawn one layer after another."""

    def one(key: jax.Array) -> Any:
        drawn = DEVIATION * jax.random.normal(key, shape)
        return drawn.astype(dtype) if kind is None else quantized.quantize(drawn, kind)

    return lax.map(one, jax.random.split(key, layers)) if layers else one(key)


# ------------------------------------------------------------------------------------------- trees


def _flat(tree: Any) -> dict[Key, Any]:
    return dict(flatten_dict(nn.unbox(dict(tree))))


def _parted(leaves: dict[Any, Any]) -> Variables:
    """The collections that parameters and stored kernels belong to."""
    stored = {key: leaf for key, leaf in leaves.items() if isinstance(leaf, Stored)}
    plain = {key: leaf for key, leaf in leaves.items() if key not in stored}
    return {BASE: unflatten_dict(plain), quantized.COLLECTION: unflatten_dict(stored)}
