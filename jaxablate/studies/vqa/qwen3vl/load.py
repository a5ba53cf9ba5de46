"""Published weights: safetensors in one file or in shards, read a parameter at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from jaxablate.disk import read_json
from jaxablate.errors import UserError
from jaxablate.studies.vqa.qwen3vl.config import Qwen3VlConfig
from jaxablate.studies.vqa.qwen3vl.names import Key, Origin, origins

Params = Mapping[str, Any]
DType = Literal["kept", "float32", "bfloat16", "float16"]
Place = Callable[[Key, np.ndarray], Any]

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SHOWN = 4  # names of a long list that an error spells out


def load(
    folder: str | Path, config: Qwen3VlConfig, params: Params, *, dtype: DType, place: Place | None = None
) -> dict[str, Any]:
    """The parameters of `Qwen3Vl` as a checkpoint holds them, in the structure of `params`.

    At no time is more in memory than what `place` has made so far and one parameter.

    Args:
      folder: with a model.safetensors, or with shards and their index.
      params: shapes, as `model.shapes` gives them; axis names around them stay.
      dtype: `kept` leaves each parameter in the type that it is stored in.
      place: what becomes of each parameter, given its path: to put it on a device or to quantise it at once.
        By default it stays an array of numpy.

    Raises:
      UserError: a file is missing or damaged; tensors are missing, unexpected or of another shape; a parameter
        holds no floating-point numbers, or is made of tensors of different types that are to be kept.
    """
    shapes = _flat(params)
    wanted = {key: origins(key, leaf.shape, config) for key, leaf in shapes.items()}
    with _open(folder) as checkpoint:
        checkpoint.compare(wanted)
        loaded = {}
        for key, parts in wanted.items():
            value = _read(checkpoint, key, shapes[key].shape, parts, dtype)
            loaded[key] = value if place is None else place(key, value)
    return nn.meta.replace_boxed(dict(params), unflatten_dict(loaded))


def check(folder: str | Path, config: Qwen3VlConfig, params: Params) -> None:
    """Whether `load` can do its work, from the headers of the files alone.

    Raises:
      UserError: see `load`.
    """
    shapes = _flat(params)
    with _open(folder) as checkpoint:
        checkpoint.compare({key: origins(key, leaf.shape, config) for key, leaf in shapes.items()})


def _flat(params: Params) -> dict[Key, Any]:
    return dict(flatten_dict(nn.unbox(dict(params))))


class _Checkpoint:
    """The open files of a checkpoint."""

    def __init__(self, folder: Path, files: Mapping[str, Any], where: Mapping[str, str]):
        self.folder, self._files, self._where = folder, files, where

    def slice(self, name: str) -> Any:
        return self._files[self._where[name]].get_slice(name)

    def compare(self, wanted: Mapping[Key, Sequence[Origin]]) -> None:
        """Raises one line about all tensors that are not what is wanted."""
        expected = {
            name: origin.shape for parts in wanted.values() for origin in parts for name in origin.names
        }
        tied = "lm_head.weight" not in expected
        # Some write the head of a tied model as well: it is the embedding once more.
        unexpected = sorted(set(self._where) - set(expected) - ({"lm_head.weight"} if tied else set()))
        missing = sorted(set(expected) - set(self._where))
        wrong = []
        for name in sorted(set(expected) & set(self._where)):
            tensor = self.slice(name)
            found = tuple(tensor.get_shape())
            if found != expected[name]:
                wrong.append(f"{name} has shape {found}, not {expected[name]}")
            elif tensor.get_dtype() not in _STORED:
                wrong.append(f"{name} holds {tensor.get_dtype()}, not {', '.join(_STORED)}")
        faults = [
            f"{title}: {_listed(names)}"
            for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong", wrong))
            if names
        ]
        if faults:
            raise UserError(
                f"{self.folder}: does not hold the weights of this model: {'; '.join(faults)}; "
                f"use the config.json beside them, and weights that are not quantised"
            )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _read(
    checkpoint: _Checkpoint, key: Key, shape: tuple[int, ...], parts: Sequence[Origin], dtype: DType
) -> np.ndarray:
    """One parameter in our layout."""
    names = [name for origin in parts for name in origin.names]
    stored = {checkpoint.slice(name).get_dtype() for name in names}
    if dtype == "kept" and len(stored) > 1:
        raise UserError(
            f"{checkpoint.folder}: {names[0]} and the tensors beside it are stored as {', '.join(sorted(stored))}; "
            f"choose one type for all instead of dtype=kept"
        )
    stacked = key[2:3] == ("layers",)
    value = np.empty(shape, jnp.dtype(_STORED[stored.pop()] if dtype == "kept" else dtype))
    for i, origin in enumerate(parts):
        pieces = [_piece(checkpoint, name, origin) for name in origin.names]
        if key[-1] == "kernel":
            pieces = [piece.reshape(piece.shape[0], -1).T for piece in pieces]
        whole = pieces[0] if len(pieces) == 1 else np.stack(pieces, axis=1)
        into = value[i] if stacked else value
        into[...] = whole.reshape(into.shape)
    return value


def _piece(checkpoint: _Checkpoint, name: str, origin: Origin) -> np.ndarray:
    tensor = checkpoint.slice(name)
    if origin.third is None:
        return tensor[:]
    rows = origin.shape[0] // 3
    return tensor[origin.third * rows : (origin.third + 1) * rows]


@contextlib.contextmanager
def _open(folder: str | Path) -> Iterator[_Checkpoint]:
    at = Path(folder).expanduser()
    index = _index(at)
    with contextlib.ExitStack() as stack:
        files = {}
        for file in sorted(set(index.values())) if index else [WHOLE]:
            if not (at / file).is_file():
                shard = f", which {INDEX} names" if index else f", nor a {INDEX}"
                raise UserError(f"{at / file}: there is no such file{shard}; fetch the checkpoint again")
            try:
                files[file] = stack.enter_context(safe_open(at / file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"{at / file}: cannot be read as safetensors ({reason}); fetch it again"
                ) from None
        where = {name: file for file, opened in files.items() for name in opened.keys()}  # noqa: SIM118
        elsewhere = sorted(name for name, file in index.items() if where.get(name) != file)
        if elsewhere:
            raise UserError(
                f"{at / INDEX}: says that {index[elsewhere[0]]} holds {_listed(elsewhere)}, which it does not; "
                f"fetch the checkpoint again"
            )
        yield _Checkpoint(at, files, where)


def _index(folder: Path) -> Mapping[str, str]:
    """Tensor -> file, as the index says; empty where there is none."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    found = read_json(path)
    names = found.get("weight_map") if isinstance(found, Mapping) else None
    if not isinstance(names, Mapping) or not names:
        raise UserError(f"{path}: has no weight_map; fetch the checkpoint again")
    for file in names.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(
                f"{path}: {file!r} in weight_map is no name of a file; fetch the checkpoint again"
            )
    return names
