"""One look at everything in a file: is it all finite, what are its mean and its spread, which trajectories are they."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jaxablate import cache
from jaxablate.errors import UserError
from jaxablate.studies.burgers.data.trajectories import Trajectories

log = logging.getLogger(__name__)

FORMAT = 1  # of what is kept, part of the cache key
_SUMS, _DIGESTS = "sums.json", "trajectories.npy"
_AT_ONCE = 1 << 26  # bytes


@dataclass(frozen=True)
class Survey:
    """Of some trajectories.

    Attributes:
      digests: uint64 (trajectories,), a digest of the values of each.
      count, total, squares: of the values: how many, their sum and the sum of their squares.
    """

    digests: npt.NDArray[np.uint64]
    count: int
    total: float
    squares: float

    @property
    def digest(self) -> str:
        """Of all values."""
        return hashlib.sha256(self.digests.astype("<u8").tobytes()).hexdigest()[:32]


def mean_and_std(surveys: Sequence[Survey]) -> tuple[float, float]:
    """Of all values together."""
    count = sum(survey.count for survey in surveys)
    mean = math.fsum(survey.total for survey in surveys) / count
    variance = math.fsum(survey.squares for survey in surveys) / count - mean**2
    return mean, math.sqrt(max(variance, 0.0))


def survey(part: Trajectories, field: str, folder: Path) -> Survey:
    """The survey of a part, kept in `folder` for as long as the file does not change.

    Raises UserError, naming file, trajectory, frame and cell, for a value that is not finite, and for data that
    cannot be read.
    """
    state = part.path.stat()
    key = cache.fingerprint(
        "survey", FORMAT, str(part.path.resolve()), state.st_size, state.st_mtime_ns, part.layout, part.first,
        part.count, part.space_stride,
    )  # fmt: skip
    cache.built_folder(folder / key, lambda scratch: _take(part, field, scratch))
    sums = json.loads((folder / key / _SUMS).read_text())
    return Survey(np.load(folder / key / _DIGESTS, allow_pickle=False), **sums)


def _take(part: Trajectories, field: str, folder: Path) -> None:
    log.info("looking through %d trajectories of %s", part.count, part.path)
    digests, count, total, squares = [], 0, 0.0, 0.0
    at_once = max(1, _AT_ONCE // (part.read(0).nbytes * part.space_stride))
    for start in range(0, part.count, at_once):
        try:
            rows = part.rows(start, min(start + at_once, part.count))
        except OSError as error:
            raise UserError(f"{field}={part.path}: cannot be read ({error}); fetch it again") from None
        if not np.isfinite(rows).all():
            row, frame, cell = np.argwhere(~np.isfinite(rows))[0]
            raise UserError(
                f"{field}={part.path}: trajectory {part.first + start + row} is {rows[row, frame, cell]} in frame "
                f"{frame}, cell {cell * part.space_stride}; leave that trajectory out"
            )
        digests += [hashlib.blake2b(row.astype("<f4").tobytes(), digest_size=8).digest() for row in rows]
        count += rows.size
        total += float(rows.sum(dtype=np.float64))
        squares += float(np.einsum("ijk,ijk->", rows, rows, dtype=np.float64))
    np.save(folder / _DIGESTS, np.frombuffer(b"".join(digests), "<u8").astype(np.uint64), allow_pickle=False)
    sums = {"count": count, "total": total, "squares": squares}
    (folder / _SUMS).write_text(json.dumps(sums))
