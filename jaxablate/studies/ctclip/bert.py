"""The text encoder's parameters from a Hugging Face BERT checkpoint in safetensors."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from jaxablate.disk import read_json
from jaxablate.errors import UserError
from jaxablate.studies.ctclip.config import TextConfig
from jaxablate.studies.ctclip.model import BERT_EPS

logger = logging.getLogger(__name__)

Params = Mapping[str, Any]
Key = tuple[str, ...]  # path of one parameter

# Each axis of a tensor is as long as a config field says; `segments` is fixed.
DIM, FFN, VOCAB, LENGTH = "model.text.dim", "model.text.ffn_dim", "data.vocab_size", "data.text_length"
SEGMENTS = "segments"

# Our module -> its name in the checkpoint and the axes of its weight; torch's Linear is (outputs, inputs).
EMBEDDINGS = {
    "words": ("embeddings.word_embeddings", (VOCAB, DIM)),
    "segment": ("embeddings.token_type_embeddings", (SEGMENTS, DIM)),
    "positions": ("embeddings.position_embeddings", (LENGTH, DIM)),
    "embedding_norm": ("embeddings.LayerNorm", (DIM,)),
}
LAYER = {
    "attention/q": ("attention.self.query", (DIM, DIM)),
    "attention/k": ("attention.self.key", (DIM, DIM)),
    "attention/v": ("attention.self.value", (DIM, DIM)),
    "attention/out": ("attention.output.dense", (DIM, DIM)),
    "attention_norm": ("attention.output.LayerNorm", (DIM,)),
    "ffn/wi": ("intermediate.dense", (FFN, DIM)),
    "ffn/wo": ("output.dense", (DIM, FFN)),
    "ffn_norm": ("output.LayerNorm", (DIM,)),
}
OLD_LEAF = {"weight": "gamma", "bias": "beta"}  # of a LayerNorm that was converted from TensorFlow
FLOATS = ("F32", "F16", "BF16", "F64")

# What the tensors do not show but `TextEncoder` takes for granted; config.json beside them says it.
SETTINGS = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "layer_norm_eps": BERT_EPS,
    "is_decoder": False,
}


def load_bert(path: str, params: Params, config: TextConfig) -> dict[str, Any]:
    """The parameters of `TextEncoder` as `path` holds them: float32, in the structure of `params`.

    The tensors are read one by one. Positions past the end of our table are left out; tensors that the
    encoder has no use for (pooler, heads) are listed in the log.

    Args:
      path: a .safetensors file, or a folder with a model.safetensors. Names may begin with `bert.`, and
        LayerNorms may have `gamma` and `beta`.
      params: the encoder's parameters, of which the shapes are used; axis names around them stay.

    Raises:
      UserError: see `check_bert`.
    """
    shapes = _flat(params)
    with _open(path) as (file, checkpoint):
        _check_settings(file, config)
        names = _match(file, checkpoint, shapes, config)
        if unused := sorted(set(checkpoint.keys()) - set(names.values())):
            logger.info("%s: tensors without a use here: %s", file, ", ".join(unused))
        loaded = {key: _read(checkpoint, name, key, shapes[key].shape) for key, name in names.items()}
    return nn.meta.replace_boxed(dict(params), unflatten_dict(loaded))


def check_bert(path: str, params: Params, config: TextConfig) -> None:
    """Whether `load_bert` can do its work, from the header of the file alone.

    Raises:
      UserError: `safetensors` is not installed; the file is missing or damaged; it lacks a tensor; a
        shape, the number of layers, or (where a config.json lies beside it) the number of heads is not
        the config's; it is no BERT with exact GELU and learned absolute positions.
    """
    with _open(path) as (file, checkpoint):
        _check_settings(file, config)
        _match(file, checkpoint, _flat(params), config)


def init_from_bert(path: str, params: Params, config: TextConfig) -> dict[str, Any]:
    """`load_bert` for use under jit, vmap and eval_shape: the file is read when the result is computed.

    A callback, since constants of this size would have to pass through the compiler. It has no
    arguments, so every member starts from the same numbers.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(nn.unbox(params)))
    loaded = jax.pure_callback(lambda: load_bert(path, shapes, config), shapes)
    return nn.meta.replace_boxed(dict(params), loaded)


# ----------------------------------------------------------------------------------------- the file


@contextlib.contextmanager
def _open(path: str) -> Iterator[tuple[Path, Any]]:
    """The file's path and an open handle of it."""
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "model.safetensors"
    if not file.is_file():
        raise UserError(
            f"config.model.text.weights='{path}': there is no file {file}; "
            f"give a BERT checkpoint in safetensors, or '' to train from scratch"
        )
    try:
        handle = safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: cannot be read as safetensors ({reason}); fetch it again") from None
    with handle as checkpoint:
        yield file, checkpoint


def _check_settings(file: Path, config: TextConfig) -> None:
    """Compares config.json, if there is one, with what the encoder computes."""
    described = file.with_name("config.json")
    if not described.is_file():
        logger.info(
            "%s: no config.json beside it; %d heads and exact GELU are taken for granted", file, config.heads
        )
        return
    found = read_json(described)
    for name, ours in SETTINGS.items():
        if found.get(name, ours) != ours:
            raise UserError(
                f"{described}: {name}={found[name]!r}, but the text encoder has {ours!r}; "
                f"use another checkpoint in config.model.text.weights"
            )
    heads = found.get("num_attention_heads", config.heads)
    if heads != config.heads:
        raise UserError(
            f"{described}: num_attention_heads={heads}, but config.model.text.heads={config.heads}; "
            f"set model.text.heads={heads}"
        )


def _read(checkpoint: Any, name: str, key: Key, shape: tuple[int, ...]) -> np.ndarray:
    """One parameter in our layout: kernels are (inputs, outputs), with the heads apart."""
    tensor = checkpoint.get_slice(name)[: shape[0]] if key[0] == "positions" else checkpoint.get_tensor(name)
    value = np.asarray(tensor, np.float32)
    return (value.T if key[-1] == "kernel" else value).reshape(shape)


# ---------------------------------------------------------------------------------- names and shapes


def _flat(params: Params) -> dict[Key, Any]:
    return dict(flatten_dict(nn.unbox(params)))


def _source(key: Key) -> tuple[str, tuple[str, ...]]:
    """A parameter's name in the checkpoint, without prefix, and what gives the lengths of its axes."""
    if key[0] == "layers":
        _, layer, _, *module, leaf = key
        name, axes = LAYER["/".join(module)]
        name = f"encoder.layer.{layer.removeprefix('layer_')}.{name}"
    else:
        (name, axes), leaf = EMBEDDINGS[key[0]], key[-1]
    return (f"{name}.bias", axes[:1]) if leaf == "bias" else (f"{name}.weight", axes)


def _match(file: Path, checkpoint: Any, shapes: Mapping[Key, Any], config: TextConfig) -> dict[Key, str]:
    """Each parameter's name in the file, where all are there and have the right shape."""
    there = set(checkpoint.keys())
    prefix = "bert." if any(name.startswith("bert.") for name in there) else ""
    layers = [re.match(rf"{re.escape(prefix)}encoder\.layer\.(\d+)\.", name) for name in there]
    depth = 1 + max((int(found[1]) for found in layers if found), default=-1)
    # A file without any layer is something else altogether: the missing tensor says more.
    if depth and depth != config.depth:
        raise UserError(
            f"{file}: has {depth} layers ({prefix}encoder.layer.*), but config.model.text.depth="
            f"{config.depth}; set model.text.depth={depth}"
        )
    lengths = {
        DIM: config.dim,
        FFN: config.ffn_dim,
        VOCAB: shapes["words", "embedding"].shape[0],
        LENGTH: shapes["positions", "table"].shape[0],
        SEGMENTS: shapes["segment",].shape[0],
    }
    names = {}
    for key in shapes:
        name, axes = _source(key)
        names[key] = _find(file, there, prefix + name)
        _check_tensor(file, checkpoint, names[key], axes, lengths)
    return names


def _find(file: Path, there: set[str], name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    old = f"{stem}.{OLD_LEAF[leaf]}"
    if name in there:
        return name
    if stem.endswith("LayerNorm") and old in there:
        return old
    raise UserError(
        f"{file}: has no tensor '{name}'; config.model.text.weights must be a whole BERT encoder "
        f"with the names of Hugging Face"
    )


def _check_tensor(
    file: Path, checkpoint: Any, name: str, axes: tuple[str, ...], lengths: Mapping[str, int]
) -> None:
    tensor = checkpoint.get_slice(name)
    found, wanted = tuple(tensor.get_shape()), tuple(lengths[axis] for axis in axes)
    if tensor.get_dtype() not in FLOATS:
        raise UserError(
            f"{file}: tensor '{name}' holds {tensor.get_dtype()}, not {', '.join(FLOATS)}; "
            f"use a checkpoint that is not quantised in config.model.text.weights"
        )
    if len(found) != len(wanted):
        advice = "use another checkpoint in config.model.text.weights"
    else:
        # Of positions the first ones do; everything else must be equal.
        wrong = {
            axis: have
            for axis, have, want in zip(axes, found, wanted, strict=True)
            if (have < want if axis == LENGTH else have != want)
        }
        if not wrong:
            return
        advice = "set " + ", ".join(
            f"{axis}={have}" + (" or less" if axis == LENGTH else "") for axis, have in wrong.items()
        )
        if SEGMENTS in wrong:
            advice = "use another checkpoint in config.model.text.weights"
    raise UserError(f"{file}: tensor '{name}' has shape {found}, but the config needs {wanted}; {advice}")
