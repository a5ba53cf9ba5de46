"""The data of the Burgers study: generated trajectories or HDF5 files behind one `open_fields`.

Imports no jax, so that reader processes start fast.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxablate import cache
from jaxablate.errors import UserError
from jaxablate.rules import enforce
from jaxablate.studies.burgers.config import BurgersData
from jaxablate.studies.burgers.data import prepare
from jaxablate.studies.burgers.data.fields import Fields
from jaxablate.studies.burgers.data.pdebench import Contents, Layout, contents, write_pdebench
from jaxablate.studies.burgers.data.survey import Survey, mean_and_std, survey
from jaxablate.studies.burgers.data.trajectories import Trajectories, Windows
from jaxablate.studies.burgers.rules import data_rules

__all__ = ["Fields", "Trajectories", "Windows", "open_fields", "write_pdebench"]

HELD_OUT = 10  # one trajectory in so many of a benchmark's file is for evaluation, the first ones
_SUFFIXES = (".hdf5", ".h5")
_SHARD = re.compile(r"burgers1d_(?:train|val)_(\d+)\.h5")


def open_fields(data: BurgersData, cache_dir: Path, *, steps: int, eval_batch_size: int) -> Fields:
    """Find, check and prepare everything `data` names; what it returns can be trained on.

    Args:
      cache_dir: below it stay generated trajectories and what is known of files, and are used again.
      steps: in time, of a training window.
      eval_batch_size: windows of an evaluation batch.

    Raises:
      UserError: one line, for any fault of config or data.
    """
    enforce(data_rules(data, steps=steps))
    cache_dir = Path(cache_dir).absolute()
    sides = _sides(data, cache_dir)
    surveys = {
        name: [survey(part, f"data.{name}", cache_dir / "surveys") for part in parts]
        for name, parts in sides.items()
    }
    _check_apart(sides, surveys)
    mean, std = mean_and_std(surveys["train"])
    if not std > 0:
        raise UserError(
            f"data.train={data.train}: all fields are {mean:g} everywhere; give other trajectories"
        )
    train = _windows(data, sides["train"], steps, mean, std)
    val = _windows(data, sides["val"], data.rollout, mean, std)
    viscosities = tuple(sorted({part.viscosity for part in val.parts}))
    _check_evaluation(data, val, viscosities)
    content = {name: [found.digest for found in side] for name, side in surveys.items()}
    told = {name: [(part.viscosity, part.interval) for part in side] for name, side in sides.items()}
    return Fields(
        train=train,
        val=val,
        mean=mean,
        std=std,
        viscosities=viscosities,
        fingerprint=cache.fingerprint(content, told, mean, std),
        eval_windows=data.eval_windows,
        eval_batch_size=eval_batch_size,
    )


def _sides(data: BurgersData, cache_dir: Path) -> dict[str, list[Trajectories]]:
    """The trajectories of `train` and `val`."""
    if data.source == "generated":
        train, val = prepare.generated_files(data, cache_dir / "fields")
        strided = 1  # the files have every space_stride-th cell already
        return {
            name: [_part(data, path, "pdebench", f"data.{name}", strided) for path in paths]
            for name, paths in (("train", train), ("val", val))
        }
    if not data.train:
        raise UserError(f"data.train is empty: data.source={data.source} needs files; give their path")
    if not data.val and data.source != "pdebench":
        raise UserError(
            f"data.val is empty: data.source={data.source} has files of its own for validation; give their path"
        )
    train = _parts(data, "train")
    if data.val:
        return {"train": train, "val": _parts(data, "val")}
    return _split(train)


def _split(parts: Sequence[Trajectories]) -> dict[str, list[Trajectories]]:
    """The first tenth of each file's trajectories held out, as the benchmark does."""
    sides: dict[str, list[Trajectories]] = {"train": [], "val": []}
    for part in parts:
        held_out = part.count // HELD_OUT
        if not held_out:
            raise UserError(
                f"data.train={part.path}: has {part.count} trajectories, of which one in {HELD_OUT} is held out; "
                f"give more, or a file as data.val"
            )
        sides["val"].append(_rows(part, 0, held_out))
        sides["train"].append(_rows(part, held_out, part.count - held_out))
    return sides


def _rows(part: Trajectories, first: int, count: int) -> Trajectories:
    return Trajectories(
        part.path, part.layout, first, count, part.frames, part.space_stride, part.viscosity, part.interval
    )


def _parts(data: BurgersData, name: str) -> list[Trajectories]:
    assert data.source != "generated"
    places = [place.strip() for place in getattr(data, name).split(",")]
    paths = [path for place in places for path in _files(Path(place), data.source, name)]
    if twice := [path for i, path in enumerate(paths) if path in paths[:i]]:
        raise UserError(f"data.{name}={getattr(data, name)}: names {twice[0]} twice; leave one out")
    return [_part(data, path, data.source, f"data.{name}", data.space_stride) for path in paths]


def _files(place: Path, layout: Layout, name: str) -> list[Path]:
    """A file itself; of a folder the files of a side, in order."""
    if not place.is_dir():
        return [place]
    if layout != "converted":
        found = sorted(path for path in place.iterdir() if path.suffix in _SUFFIXES)
        wanted = " or ".join(f"*{suffix}" for suffix in _SUFFIXES)
    else:
        wanted = f"burgers1d_{name}.h5 or burgers1d_{name}_000.h5, …"
        whole, shards = place / f"burgers1d_{name}.h5", sorted(place.glob(f"burgers1d_{name}_*.h5"))
        if whole.exists() and shards:
            raise UserError(
                f"data.{name}={place}: has both {whole.name} and {shards[0].name}; name the one meant"
            )
        found = [whole] if whole.exists() else _all_shards(shards, place, name)
    if not found:
        raise UserError(f"data.{name}={place}: the folder has no {wanted}; give the folder of the files")
    return found


def _all_shards(shards: Sequence[Path], place: Path, name: str) -> list[Path]:
    """The shards in the order of their numbers, of which none may be missing in between."""
    numbered = {int(match[1]): path for path in shards if (match := _SHARD.fullmatch(path.name))}
    order = sorted(numbered)
    if order and (missing := sorted(set(range(min(order[0], 1), order[-1])) - set(order))):
        raise UserError(
            f"data.{name}={place}: shard {missing[0]} of {order[-1]} is missing; fetch it, or name the files"
        )
    return [numbered[number] for number in order]


def _part(data: BurgersData, path: Path, layout: Layout, field: str, space_stride: int) -> Trajectories:
    """All trajectories of a file, which has the frames and cells that the config needs."""
    found = contents(path, layout, field)
    rows, frames, cells = found.shape
    if not rows:
        raise UserError(f"{field}={path}: holds no trajectory; give another file")
    if cells % space_stride or cells // space_stride != data.cells:
        fits = not cells % space_stride
        fix = (
            f"set data.cells={cells // space_stride}" if fits else "use a data.space_stride that divides them"
        )
        raise UserError(
            f"data.cells={data.cells}: every {space_stride}th (data.space_stride) of the {cells} cells of {path} does "
            f"not make so many; {fix}"
        )
    return Trajectories(
        path=path.absolute(),
        layout=layout,
        first=0,
        count=rows,
        frames=frames,
        space_stride=space_stride,
        viscosity=_viscosity(data, found, path, field),
        interval=data.interval if found.interval is None else found.interval,
    )


def _viscosity(data: BurgersData, found: Contents, path: Path, field: str) -> float:
    if found.viscosity is not None:
        return found.viscosity
    if len(data.viscosities) != 1:
        raise UserError(
            f"{field}={path}: does not say its viscosity, and data.viscosities={data.viscosities} is not one number; "
            f"set data.viscosities to the file's, or write it into its attribute `Nu`"
        )
    return data.viscosities[0]


def _windows(
    data: BurgersData, parts: Sequence[Trajectories], steps: int, mean: float, std: float
) -> Windows:
    needed = 1 + steps * data.time_stride
    for part in parts:
        if part.frames < needed:
            raise UserError(
                f"data.time_stride={data.time_stride}: {steps} steps need {needed} frames, and {part.path} has "
                f"{part.frames}; use a shorter stride or fewer steps (data.rollout, model.loss.rollout_steps)"
            )
    hop = data.time_stride if data.starts == "strided" else 1
    return Windows(tuple(parts), steps, data.time_stride, hop, mean, std)


def _check_apart(sides: dict[str, list[Trajectories]], surveys: dict[str, list[Survey]]) -> None:
    """Raises UserError if a held-out trajectory is one of those to train on."""
    known = np.concatenate([found.digests for found in surveys["train"]])
    for part, found in zip(sides["val"], surveys["val"], strict=True):
        shared = np.flatnonzero(np.isin(found.digests, known))
        if len(shared):
            raise UserError(
                f"data.val={part.path}: trajectory {part.first + shared[0]} ({len(shared)} in all) is in data.train "
                f"too; what is held out must not be trained on, give other files"
            )


def _check_evaluation(data: BurgersData, val: Windows, viscosities: Sequence[float]) -> None:
    each, left = divmod(data.eval_windows, len(viscosities))
    if left or not each:
        raise UserError(
            f"data.eval_windows={data.eval_windows}: is no multiple of the {len(viscosities)} viscosities of data.val; "
            f"use one, so that there are equally many of each"
        )
    for viscosity in viscosities:
        if (there := len(val.of(viscosity))) < each:
            raise UserError(
                f"data.eval_windows={data.eval_windows}: makes {each} of viscosity {viscosity:g}, of which data.val "
                f"has {there}; use {there * len(viscosities)} at most"
            )
