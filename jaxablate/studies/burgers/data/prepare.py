"""Generated trajectories, written once below the cache as files of the benchmark's layout."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jaxablate import cache
from jaxablate.errors import UserError
from jaxablate.studies.burgers.config import BurgersData
from jaxablate.studies.burgers.data.pdebench import write_pdebench

log = logging.getLogger(__name__)

FORMAT = 1  # of the files, part of the cache key
_AT_ONCE = 1 << 31  # bytes of trajectories, on the device and on the host
_MOST_STEPS = 1_000_000  # of a frame; with still shorter ones, single precision would lose count of the time


def generated_files(data: BurgersData, folder: Path) -> tuple[list[Path], list[Path]]:
    """The files with the training and with the held-out trajectories, one for each viscosity.

    The held-out ones are made from the next seed. Raises UserError for a viscosity so large that its steps are
    hopelessly short on so fine a grid.
    """
    from jaxablate.studies.burgers.data import generator  # jax: reader processes do without

    cells = data.cells * data.space_stride
    for viscosity in data.viscosities:
        steps = data.interval * viscosity / (math.pi * generator.DIFFUSIVE) * cells**2
        if steps > _MOST_STEPS:
            raise UserError(
                f"data.viscosities={data.viscosities}: {viscosity:g} takes {steps:.1e} steps a frame on {cells} "
                f"cells; use a coarser grid (data.cells) or a smaller viscosity"
            )
    key = cache.fingerprint(
        "burgers", FORMAT, generator.GENERATOR, data.viscosities, data.cells, data.space_stride, data.frames,
        data.interval, data.trajectories, data.held_out, data.seed,
    )  # fmt: skip

    def blocks(viscosity: float, count: int, seed: int) -> Iterator[npt.NDArray[np.float32]]:
        most = max(1, _AT_ONCE // (4 * (data.frames + 1) * cells))
        for numbers in np.array_split(np.arange(count), -(-count // most)):
            found = generator.generate(
                numbers, viscosity=viscosity, cells=cells, frames=data.frames, interval=data.interval, seed=seed
            )  # fmt: skip
            yield found[..., :: data.space_stride]

    def build(scratch: Path) -> None:
        log.info("generating %d + %d trajectories of each viscosity into %s", *counts.values(), folder / key)
        for number, (side, count) in enumerate(counts.items()):
            for viscosity in data.viscosities:
                write_pdebench(
                    scratch / _name(side, viscosity),
                    blocks(viscosity, count, data.seed + number),
                    shape=(count, data.frames + 1, data.cells),
                    x=generator.centres(cells)[:: data.space_stride],
                    t=data.interval * np.arange(data.frames + 2),
                    viscosity=viscosity,
                )

    counts = {"train": data.trajectories, "val": data.held_out}
    cache.built_folder(folder / key, build)
    train, val = ([folder / key / _name(side, nu) for nu in data.viscosities] for side in counts)
    return train, val


def _name(side: str, viscosity: float) -> str:
    return f"{side}_1D_Burgers_Sols_Nu{viscosity!r}.hdf5"
