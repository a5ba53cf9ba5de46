"""Files of safetensors: opened with one-line errors, read as float32; and digests of files, kept while they stay."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxablate import cache
from jaxablate.errors import UserError
from jaxablate.studies.lora_space.data.names import Shape

FORMAT = 1  # of the digests kept, part of their cache key
_DIGESTS = "sha256.json"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises UserError if it is not there or damaged, now or while it is read."""
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as safetensors ({reason}); fetch it again") from None


def shapes_of(path: Path) -> dict[str, Shape]:
    """The shapes of all tensors, by name, from the header alone."""
    with opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 no mapping


def floats(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    """Weights in single precision. Raises UserError if they are no floating-point numbers."""
    if array.dtype.kind not in "fV" and array.dtype.name != "bfloat16":
        raise UserError(
            f"{path}: tensor '{name}' is of {array.dtype.name}; weights are floating-point numbers"
        )
    return array.astype(np.float32)


def digests(paths: Sequence[Path], folder: Path, workers: int) -> list[str]:
    """SHA-256 of each file, kept in `folder` for as long as no file changes its size or its time."""
    states = [(str(path.resolve()), (state := path.stat()).st_size, state.st_mtime_ns) for path in paths]
    key = cache.fingerprint("digests", FORMAT, states)

    def build(scratch: Path) -> None:
        with ThreadPoolExecutor(max(1, workers)) as threads:
            found = list(threads.map(cache.file_digest, paths))
        (scratch / _DIGESTS).write_text(json.dumps(found))

    cache.built_folder(folder / key, build)
    return json.loads((folder / key / _DIGESTS).read_text())
