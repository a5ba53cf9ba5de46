"""HDF5 files of trajectories: the PDEBench layout, written and read, and the layouts that others made of it.

pdebench:   `tensor` (N, T, X), `x-coordinate` (X), `t-coordinate` (T or T + 1), and the viscosity as attribute
            `Nu`, or in the file's name: `1D_Burgers_Sols_Nu0.001.hdf5`.
converted:  `data` (N, T, X, 1); perhaps `t-coordinate` and `Nu`.
operator:   `x` (N, X), `y` (N, T, X) and `visc`, one number. `y` is what becomes of `x`; if it does not begin
            with `x`, then `x` is the frame before it.

Here N are trajectories, T frames, X cells. But for the operator layout, which is small, nothing reads a whole
dataset. h5py is imported where a file is opened, since looking at a config opens none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from jaxablate.errors import UserError

if TYPE_CHECKING:
    import h5py

Layout = Literal["pdebench", "converted", "operator"]

_AXES: dict[Layout, dict[str, str]] = {  # of each dataset; a layout's first one holds the trajectories
    "pdebench": {"tensor": "NTX", "x-coordinate": "X", "t-coordinate": "T"},
    "converted": {"data": "NTX1"},
    "operator": {"y": "NTX", "x": "NX", "visc": ""},
}
_NU_IN_NAME = re.compile(r"_Nu(\d+(?:\.\d+)?(?:[eE]-?\d+)?)")
_UNEVEN = 1e-2  # of an interval: what rounding to float32 may do to a time


@dataclass(frozen=True)
class Contents:
    """What a file says of its trajectories; None where it is silent.

    Attributes:
      shape: trajectories, frames, cells.
      viscosity: epsilon of all of them.
      interval: time between frames.
    """

    shape: tuple[int, int, int]
    viscosity: float | None
    interval: float | None


def write_pdebench(
    path: Path,
    blocks: Iterable[npt.NDArray[np.float32]],
    *,
    shape: tuple[int, int, int],
    x: npt.NDArray[np.floating],
    t: npt.NDArray[np.floating],
    viscosity: float,
) -> None:
    """Writes a new file in the benchmark's layout.

    Args:
      blocks: of trajectories, (n, T, X) each, which are written as they come.
      shape: of all blocks together, (N, T, X).
      x, t: the coordinates of cells and frames, (X,) and (T,) or (T + 1,).
      viscosity: epsilon.
    """
    import h5py

    with h5py.File(path, "x") as file:
        tensor, at = file.create_dataset("tensor", shape, np.float32), 0
        for block in blocks:
            tensor[at : at + len(block)] = block
            at += len(block)
        if at != shape[0]:
            raise ValueError(f"{at} trajectories for a shape of {shape}")
        file["x-coordinate"], file["t-coordinate"] = np.asarray(x, np.float32), np.asarray(t, np.float32)
        file.attrs["Nu"] = viscosity


def contents(path: Path, layout: Layout, field: str) -> Contents:
    """What is in a file, from its headers and coordinates.

    `field` ("data.train") is named in messages. Raises UserError for a file that is missing, torn or no HDF5,
    whose datasets have other names, ranks or types than the layout's, or whose frames are not evenly spaced.
    """
    with _opened(path, field) as file:
        for name, axes in _AXES[layout].items():
            _check(file, name, axes, layout, f"{field}={path}")
        shape = _dataset(file, next(iter(_AXES[layout]))).shape
        if layout == "pdebench":
            _check_length(file, "x-coordinate", (shape[2],), f"{field}={path}")
        if layout == "operator":
            if (given := _dataset(file, "x").shape) != (shape[0], shape[2]):
                raise UserError(
                    f"{field}={path}: `x` {given} does not fit `y` {shape}; write `x` as {(shape[0], shape[2])}"
                )
            shape = (shape[0], shape[1] + (not _begins_with_input(file)), shape[2])
        return Contents(
            shape=shape[:3],
            viscosity=_viscosity(file, path, layout, field),
            interval=_interval(file, shape[1], f"{field}={path}"),
        )


def values(path: Path, layout: Layout) -> Any:
    """The trajectories, (N, T, X) or (N, T, X, 1), as something to slice: a mapped file wherever that is possible.

    The file must have passed `contents`. What is returned keeps the file open.
    """
    import h5py

    file = h5py.File(path, "r")
    if layout == "operator":
        with file:
            x, y = _dataset(file, "x")[:], _dataset(file, "y")[:]
            return y if _begins_with_input(file) else np.concatenate([x[:, None], y], axis=1)
    dataset = _dataset(file, next(iter(_AXES[layout])))
    offset = dataset.id.get_offset()  # None of one that is compressed or lies in chunks
    if offset is None or dataset.size == 0:
        return dataset
    with file:
        return np.memmap(path, dataset.dtype, "r", offset, dataset.shape)


@contextmanager
def _opened(path: Path, field: str) -> Iterator[h5py.File]:
    import h5py

    if not path.is_file():
        raise UserError(f"{field}={path}: no such file; give the path of an HDF5 file")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{field}={path}: is no whole HDF5 file ({error}); fetch it again") from None
    with file:
        yield file


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    import h5py

    found = file[name]
    assert isinstance(found, h5py.Dataset), name
    return found


def _check(file: h5py.File, name: str, axes: str, layout: Layout, where: str) -> None:
    """Raises UserError unless the file has such a dataset of floating-point numbers with these axes."""
    import h5py

    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        raise UserError(
            f"{where}: has no dataset `{name}`, only {', '.join(sorted(file)) or 'none'}; data.source={layout} needs "
            f"{', '.join(_AXES[layout])}: choose another data.source or rename it"
        )
    right_rank = len(found.shape) == len(axes) and not (axes.endswith("1") and found.shape[-1] != 1)
    if not right_rank and not (axes == "" and found.size == 1):
        raise UserError(
            f"{where}: `{name}` has shape {found.shape}, and data.source={layout} needs "
            f"({', '.join(axes)}); write it so"
        )
    if found.dtype.kind != "f":
        raise UserError(f"{where}: `{name}` has type {found.dtype}; write it as float32")


def _check_length(file: h5py.File, name: str, shapes: tuple[int, ...], where: str) -> None:
    if (length := len(_dataset(file, name))) not in shapes:
        raise UserError(
            f"{where}: `{name}` has {length} entries and not {' or '.join(map(str, shapes))}; write one for each"
        )


def _begins_with_input(file: h5py.File) -> bool:
    """Whether the first frames of the outputs are the inputs, up to rounding."""
    x, y = _dataset(file, "x")[:], _dataset(file, "y")[:, 0]
    return bool(np.allclose(x, y, rtol=1e-5, atol=1e-6))


def _viscosity(file: h5py.File, path: Path, layout: Layout, field: str) -> float | None:
    """Epsilon, from wherever the layout keeps it; if in two places, then they must agree."""
    found: dict[str, float] = {}
    if layout == "operator":
        found["`visc`"] = float(np.ravel(_dataset(file, "visc")[()])[0])
    elif "Nu" in file.attrs:
        found["attribute `Nu`"] = _number(file.attrs["Nu"], f"{field}={path}: attribute `Nu`")
    if layout == "pdebench" and (match := _NU_IN_NAME.search(path.name)):
        found["file name"] = float(match[1])
    for place, value in found.items():
        if not 0 < value < math.inf:
            raise UserError(f"{field}={path}: {place} is {value:g}; a viscosity is above 0, correct it")
    if len(found) == 2 and not math.isclose(*found.values(), rel_tol=1e-5):
        said = " and ".join(f"{place} says {value:g}" for place, value in found.items())
        raise UserError(f"{field}={path}: {said}; correct the one that is wrong")
    return next(iter(found.values()), None)


def _number(value: Any, what: str) -> float:
    try:
        if np.size(value) == 1:
            one = np.ravel(value)[0]
            return float(one.decode() if isinstance(one, bytes) else one)
    except (ValueError, UnicodeDecodeError):
        pass
    raise UserError(f"{what} is {value!r}; write one number")


def _interval(file: h5py.File, frames: int, where: str) -> float | None:
    """The time between frames; None without `t-coordinate`."""
    if "t-coordinate" not in file:
        return None
    _check(file, "t-coordinate", "T", "pdebench", where)
    _check_length(file, "t-coordinate", (frames, frames + 1), where)
    times = _dataset(file, "t-coordinate")[:frames].astype(np.float64)
    if frames < 2:
        raise UserError(f"{where}: has {frames} frames; a step needs two")
    interval = (times[-1] - times[0]) / (frames - 1)
    even = times[0] + interval * np.arange(frames)
    if not (interval > 0 and np.abs(times - even).max() < _UNEVEN * interval):
        raise UserError(
            f"{where}: `t-coordinate` does not rise in equal steps; write frames that are equally far apart"
        )
    return float(f"{interval:.6g}")  # as the file's float32 knows it
